"""Where a run's parameters come from."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import policy_gear, port_proof
from gear_jax.data.embodiments import EMBODIMENTS
from gear_jax.systems import gear as system
from gear_jax.towers.qwen_language import QwenLanguage
from gear_jax.train import checkpoint, gear, sharding, start
from launch import port
from launch.port_proof import write_random

CONFIG = port_proof.get_config()


@pytest.fixture(scope="module")
def ported(tmp_path_factory):
    """Random Qwen2.5-VL and VGGT of the port proof's sizes, converted as released ones are."""
    folder = tmp_path_factory.mktemp("ported")
    for name in ("qwen2_5_vl", "vggt"):
        source, target = folder / "hf" / name, folder / name
        write_random(name, CONFIG[name].to_dict(), source, 0)
        arguments = ["convert", "--model", name, "--source", str(source), "--target", str(target)]
        assert port.main([*arguments, "--dtype", "float32"]) == 0
    return folder


def _model():
    """The debug config with the port proof's towers."""
    config = policy_gear.get_config("debug")
    config.model.language.update(mlp_dim=96)
    config.model.vision.update(depth=4, mlp_dim=44, full_attention_layers=(1, 3))
    config.model.geometry.update(depth=3, width=64, num_heads=4, mlp_dim=128)
    config.model.geometry.dino.update(depth=2, width=64, num_heads=4, mlp_dim=128, pos_embed_grid=5)
    return gear.model_config(config.model)


@pytest.fixture(scope="module")
def params():
    cfg = _model()
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    make = functools.partial(system.init, cfg)
    shapes = jax.eval_shape(make, jax.random.key(0))
    where = sharding.param_shardings(shapes, mesh)
    return jax.jit(make, out_shardings=where)(jax.random.key(0))


def _init(ported, **changes):
    names = ("qwen2_5_vl", "vggt")
    init = {name: str(ported / name) for name in names} | {"run": None, "trained": ()}
    fresh = ("state/.*", "projector/geometry_kernel", "expert/.*")
    plain = {"unused": ("unused/.*",), "fresh_rows": (), "rows_like": (), "deeper": False}
    return init | {"fresh": fresh} | plain | changes


def test_ported_towers_fill_what_they_have_and_words_that_are_new_begin_at_the_mean(ported, params):
    said = []
    made = start.loader(_init(ported), 500, said.append)(params)
    hidden = CONFIG.qwen2_5_vl.hidden_size
    stored = checkpoint.restore_params(
        ported / "qwen2_5_vl",
        {"language": {"embed": jax.ShapeDtypeStruct((512, hidden), jnp.float32)}} | _others(ported),
    )["language"]["embed"]
    ours = np.asarray(made["language"]["embed"])
    np.testing.assert_array_equal(ours[:500], np.asarray(stored)[:500])
    new = ours[500:] - ours[:500].mean(axis=0)
    assert abs(new.std() - 0.02) < 1e-3
    for tower in ("state", "expert"):
        jax.tree.map(np.testing.assert_array_equal, made[tower], params[tower])
    assert not np.asarray(made["projector"]["geometry_kernel"]).any()
    for tower in ("vision", "geometry"):
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), made[tower], params[tower])
        assert any(jax.tree.leaves(moved)), tower
    jax.tree.map(
        lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim) or 1 / 0, made, params
    )
    assert any("512 rows of words; the others new" in line for line in said)
    assert f"state/fc1/bias [{len(EMBODIMENTS)}, 32] <- random" in said


def test_rows_that_a_vlm_had_and_never_used_begin_at_random_again(ported, params):
    stored = start.loader(_init(ported), 500)(params)["language"]["embed"]
    made = start.loader(_init(ported, fresh_rows=(490, 505)), 500)(params)["language"]["embed"]
    for rows, wanted in (
        (slice(490), stored), (slice(490, 505), params["language"]["embed"]),
        (slice(505, None), stored),
    ):  # fmt: skip
        np.testing.assert_array_equal(made[rows], wanted[rows])
    assert made.sharding.is_equivalent_to(stored.sharding, 2)


def test_rows_begin_as_another_and_their_random_values(ported, params):
    stored = start.loader(_init(ported), 500)(params)["language"]["embed"]
    made = start.loader(_init(ported, rows_like=(7, 490, 505)), 500)(params)["language"]["embed"]
    ours, rows = params["language"]["embed"], np.r_[:490, 505 : len(made)]
    np.testing.assert_array_equal(made[rows], stored[rows])
    np.testing.assert_array_equal(made[490:505], stored[7][None] + ours[490:505])
    assert made.sharding.is_equivalent_to(stored.sharding, 2)


def test_layers_that_are_added_change_nothing_at_first(ported, params):
    before = start.loader(_init(ported), 500)(params)
    layers = params["language"]["layers"]
    more = jax.tree.map(lambda x: jnp.concatenate([x, x[:2] + 1]), layers)
    taller = {**params, "language": {**params["language"], "layers": more}}
    with pytest.raises(ValueError, match="language/layers/.* is .* here and"):
        start.loader(_init(ported), 500)(taller)
    after = start.loader(_init(ported, deeper=True), 500)(taller)
    cfg = _model().vlm.language
    tokens = jnp.arange(12)[None]
    positions = jnp.broadcast_to(tokens, (3, 1, 12))
    run = jax.jit(
        lambda cfg, params: QwenLanguage(cfg).apply(
            {"params": params["language"]}, tokens, positions, jnp.ones_like(tokens)
        )[0],
        static_argnums=0,
    )
    grown = dataclasses.replace(cfg, depth=cfg.depth + 2)
    np.testing.assert_allclose(run(grown, after), run(cfg, before), atol=1e-6)


def _others(ported):
    """Everything else of the converted Qwen2.5-VL, as it is stored."""
    manifest = json.loads((ported / "qwen2_5_vl" / "port.json").read_text())
    from gear_jax.porting import models, table

    model = models.describe("qwen2_5_vl", manifest["config"])
    tree = table.unflatten(model.targets)
    tree["language"].pop("embed")
    embed = jax.ShapeDtypeStruct((512, CONFIG.qwen2_5_vl.hidden_size), jnp.float32)
    return tree | {"language": tree["language"] | {"embed": embed}}


def test_what_is_left_over_missing_or_of_another_shape_is_named(ported, params):
    with pytest.raises(ValueError, match="state/fc1/bias is in none of the checkpoints"):
        start.loader(_init(ported, fresh=("expert/.*", "projector/.*")), 500)(params)
    with pytest.raises(ValueError, match="geometry/.* is no parameter of this model"):
        start.loader(_init(ported), 500)({k: v for k, v in params.items() if k != "geometry"})
    other = {**params, "language": {**params["language"], "final_norm": {"scale": jnp.ones(7)}}}
    with pytest.raises(ValueError, match=r"final_norm/scale is \[7\] here and \[64\] in"):
        start.loader(_init(ported), 500)(other)
    with pytest.raises(ValueError, match="say '.\\*' to begin everything at random"):
        start.loader(_init(ported, qwen2_5_vl=None, vggt=None), 500)


def test_everything_at_random_is_said_in_the_config_and_loads_nothing(ported):
    assert start.loader(_init(ported, qwen2_5_vl=None, vggt=None, fresh=(".*",)), 500) is None
