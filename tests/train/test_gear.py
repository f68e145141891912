"""Stages pretrain, policy and adapt: every config builds, trains, begins and goes on as it says."""

import dataclasses
import hashlib
import importlib
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simplejpeg

from benchmarks import reach_ids
from configs import gear_base
from gear_jax.data.sequences import IGNORE, token_rows
from gear_jax.data.tfrecord import DataError
from gear_jax.systems import gear as system
from gear_jax.train import adapt, gear, gear_eval, loop, optim, plan, policy, pretrain, sharding
from gear_jax.train.gear_batch import nested
from gear_jax.train.gear_data import open_data

STAGES = {"pretrain": pretrain, "policy": policy, "adapt": adapt}
FILES = ("pretrain_gear", "policy_gear", "adapt", "libero")


def _config(name, arg):
    return importlib.import_module(f"configs.{name}").get_config(arg)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the procedural robot's data, ids of five transitions and of one."""
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="module", autouse=True)
def _programs_are_compiled_once(tmp_path_factory):
    """Runs that begin, break and go on make the same program three times."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))
    yield
    jax.config.update("jax_compilation_cache_dir", None)


def _debug(name, arg, world):
    config = _config(name, arg)
    folder = world / str(config.model.transitions)
    config.init.update(run=None, fresh=(".*",))
    config.monitor.every = 0
    fields = config.data.sets.reach
    fields.drawing.num_episodes = 12
    fields.work, fields.latents = str(folder / "reach"), str(folder / "ids")
    config.data.fast.path = str(folder / "fast")
    if not (folder / "ids").is_dir():
        reach_ids.write(fields.to_dict(), fields.latents, config.model.transitions)
    return config


def _mesh(**sizes):
    return sharding.make_mesh(sizes, jax.devices()[: math.prod(sizes.values())])


# Full size


def _full(name, arg):
    """Everything of a full-size config that needs no data: shapes, shardings, partitions."""
    config = _config(name, arg)
    model = gear.make_model(config)
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    mesh = jax.sharding.AbstractMesh((1, 30, 8, 1), sharding.AXES)
    sharding.param_shardings(params, mesh)
    optim.make_tx(params, model.optim)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    value, _ = jax.eval_shape(model.loss, params, (), model.row(config), rng)
    assert value.shape == ()
    return config, model.cfg, params


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("size", ["7b", "3b"])
def test_every_config_builds_at_full_size(name, size):
    config, _, shapes = _full(name, size)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes["language"]))
    assert abs(count / {"7b": 7.62e9, "3b": 3.09e9}[size] - 1) < 0.01
    assert config.optim.warmup_steps == round(0.03 * config.optim.num_steps)


@pytest.mark.parametrize("variant", sorted(gear_base.VARIANTS))
def test_every_variant_builds_at_full_size(variant):
    _, cfg, shapes = _full("policy_gear", variant)
    assert ("geometry" in shapes) == (variant != "wo_vggt")
    assert ("learned" in shapes) == (variant in ("wo_latent", "soft_prompt"))
    assert (cfg.kv_sources == ("latent",)) == (variant not in ("wo_both", "app_a"))


def test_the_papers_numbers():
    numbers = {
        "pretrain_gear": (350_000, 1920, 10_500),
        "policy_gear": (700_000, 960, 21_000),
    }
    for name, expected in numbers.items():
        config = _config(name, "")
        said = config.optim.num_steps, config.data.batch_size, config.optim.warmup_steps
        assert said == expected
        assert (config.optim.lr, config.optim.clip, config.seed) == (2e-5, 1.0, 42)
    steps = [_config("libero", phase).optim.num_steps for phase in ("projector", "all")]
    assert sum(steps) == _config("libero", "one_stage").optim.num_steps == 12_000
    assert set(_config("libero", "").data.sets) == {
        "libero_spatial", "libero_object", "libero_goal", "libero_10",
    }  # fmt: skip


def test_full_sizes_compute_in_bfloat16_on_float32_masters():
    _, cfg, params = _full("policy_gear", "3b")
    towers = (cfg.vlm.language, cfg.vlm.vision, cfg.vlm.geometry, cfg.vlm.projector, cfg.expert)
    assert all(tower.dtype == jnp.bfloat16 for tower in towers)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))


def test_an_unknown_word_is_refused():
    with pytest.raises(ValueError, match=r"configs/policy_gear.py: 'wo_latents' is unknown"):
        _config("policy_gear", "7b,wo_latents")


# The plan


def _small(arg=""):
    config = _config("policy_gear", f"debug,{arg}")
    return config, gear.make_model(config)


def _reached(config, model):
    found = plan.reached(model.init, model.loss, model.row(config))
    return {loss: {name.split("/")[0] for name in names} for loss, names in found.items()}


def test_the_plan_knows_by_the_gradient_which_loss_reaches_which_tower():
    trained = {"geometry", "projector", "language", "state"}
    assert _reached(*_small()) == {"tokens": trained, "flow": {"expert"}}
    assert _reached(*_small("joint_grad"))["flow"] == {*trained, "expert"}
    assert _reached(*_small("lora"))["tokens"] == {*trained, "lora"} - {"language"}


def _plan(config, model, **mesh):
    row = model.row(config)
    return plan.describe(config, model.optim, model.init, model.loss, row, _mesh(**mesh))


def test_the_plan_is_a_page_that_names_what_is_frozen():
    said = _plan(*_small(), data=8)
    lines = {line.split()[0]: line.split() for line in said.splitlines()}
    assert lines["vision"][2:] == ["frozen", "-"]
    assert lines["expert"][2:] == ["expert", "flow"]
    assert "batch 8 = 8 devices x 1 rows x 1 parts" in said


def test_a_trainable_tower_that_no_loss_reaches_is_refused():
    config, model = _small()
    only = dataclasses.replace(model, loss=lambda *given: _without_flow(model.loss(*given)))
    with pytest.raises(ValueError, match="trainable, and no loss reaches them: expert/"):
        _plan(config, only, data=1)


def _without_flow(made):
    value, (extra, metrics) = made
    return value, (extra, {"tokens": metrics["tokens"]})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"latents": "none", "with_fast": False}, "kv_sources .* has 'latent'"),
        ({"latents": "learned", "with_fast": False}, "nothing trains the learned latents"),
        ({"through_latents": True}, "through_latents is set, .*scrambled is 0.0"),
    ],
)
def test_e15_a_policy_without_latents_and_fast_needs_other_sources(changes, sentence):
    config = _config("policy_gear", "debug")
    config.model.update(changes)
    with pytest.raises(ValueError, match=sentence):
        plan.validate(config)
    plan.validate(_config("policy_gear", "debug,wo_both"))


def test_stages_refuse_what_is_not_theirs():
    mesh = _mesh(data=1)
    with pytest.raises(ValueError, match="expected model.expert None"):
        pretrain.stage(_config("policy_gear", "debug"), mesh)
    with pytest.raises(ValueError, match="model.expert is None"):
        policy.stage(_config("pretrain_gear", "debug"), mesh)
    config = _config("adapt", "debug,projector")
    config.phase = "all"
    with pytest.raises(ValueError, match="phase 'projector', and it alone"):
        adapt.stage(config, mesh)
    config = _config("adapt", "debug,all")
    config.init.run = None
    with pytest.raises(ValueError, match="expected the workdir of a policy to adapt"):
        adapt.stage(config, mesh)


def test_flops_are_those_of_the_performance_page():
    config = _config("policy_gear", "7b")
    model = gear.make_model(config)
    made = plan.flops_per_sample(model.cfg, model.sequence, 944, config.optim.partitions)
    assert abs(made / 64e12 - 1) < 0.06  # performance.md 2: 511 TFLOP for 8 samples


# Debug size


def _run(config, workdir, mesh=None, **loop_fields):
    mesh = mesh or _mesh(data=1)
    stage = STAGES[config.stage].stage(config, mesh)
    fields = {"log_every": 1, "checkpoint_every": 2, **loop_fields}
    said = []
    state = loop.run(
        stage,
        loop.LoopConfig(**fields),
        workdir,
        mesh,
        seed=config.seed,
        record={},
        say=said.append,
    )
    return state, said


@pytest.mark.parametrize("variant", sorted(gear_base.VARIANTS))
def test_e14_every_variant_trains_two_steps_with_a_finite_loss(variant, world):
    config = _debug("policy_gear", f"debug,{variant}", world)
    config.model.language.depth = 2
    mesh = _mesh(data=1)
    stage = policy.stage(config, mesh)
    params, extra = jax.jit(stage.init)(jax.random.key(0))
    tx = optim.make_tx(params, stage.optim)

    @jax.jit
    def step(params, opt_state, batch, rng):
        gradient = jax.value_and_grad(lambda p: stage.loss(p, extra, batch, rng), has_aux=True)
        (loss, (_, metrics)), grads = gradient(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return jax.tree.map(jnp.add, params, updates), opt_state, loss, metrics

    stream, opt_state = stage.open_stream(None), tx.init(params)
    for number in range(2):
        batch = stage.arrays(next(stream))
        params, opt_state, loss, metrics = step(params, opt_state, batch, jax.random.key(number))
        assert np.isfinite(loss)
    stream.close()
    assert (metrics["latent"] > 0) == (variant not in ("wo_latent", "wo_both"))
    assert (metrics["fast"] > 0) == (variant not in ("wo_fast", "wo_both"))
    assert metrics["flow"] > 0
    assert 0 < metrics["padding"] < 1


@pytest.mark.parametrize("variant", ["full", "wo_latent", "wo_both", "soft_prompt"])
def test_every_kind_of_latents_acts_from_its_prompt(variant, world):
    config = _debug("policy_gear", f"debug,{variant}", world)
    stage = policy.stage(config, _mesh(data=1))
    params, _ = jax.jit(stage.init)(jax.random.key(0))
    cfg, prompts = gear.model_config(config.model), _prompts(config, stage)
    rows = len(prompts["tokens"])
    noise = jax.random.normal(
        jax.random.key(5), (rows, cfg.expert.chunk_len, cfg.expert.action_dim)
    )
    act = jax.jit(lambda p, b: system.act(p, cfg, nested(b), noise))
    chunk, ids = act(params, prompts)
    assert bool(jnp.isfinite(chunk).all())
    assert ids.shape[1] == (0 if variant in ("wo_latent", "wo_both") else 20)


def _prompts(config, stage):
    data = open_data(config, gear.sequence_config(config.model))
    stream = data.open_train(config, None)
    batch = next(stream)
    stream.close()
    only = dataclasses.replace(data.rows.config, prompt_only=True)
    batch |= token_rows(batch, data.rows.tokenizer, only, [None] * len(batch["sample"]))
    return stage.arrays(batch)


def test_latent_ids_that_are_missing_or_of_another_model_are_named(world):
    config = _debug("policy_gear", "debug", world)
    config.data.sets.reach.latents = None
    with pytest.raises(DataError, match=r"data.sets.reach.latents is None: .* launch.extract"):
        open_data(config, gear.sequence_config(config.model))
    config.model.update(through_latents=True, scrambled=0.5)  # then nobody needs to know them
    stream = open_data(config, gear.sequence_config(config.model)).open_train(config, None)
    row = next(stream)
    stream.close()
    assert row["latent_valid"].all()
    codes = np.take_along_axis(row["labels"], row["latent_index"], axis=1)
    assert (codes == IGNORE).all()
    config = _debug("policy_gear", "debug", world)
    config.model.transitions = 1
    with pytest.raises(DataError, match=r"\(5, 4\) transitions and codes, the model has \(1, 4\)"):
        open_data(config, gear.sequence_config(config.model))


def test_robots_and_questions_share_a_stream_by_weight(world, tmp_path):
    record = {"type": "general_vqa", "images": ["a.jpg"], "question": "What?", "answer": "A cup."}
    lines = [json.dumps({"id": f"q{n}", **record}) for n in range(9)]
    (tmp_path / "pool.jsonl").write_text("\n".join(lines))
    picture = simplejpeg.encode_jpeg(np.zeros((40, 40, 3), np.uint8))
    (tmp_path / "a.jpg").write_bytes(picture)
    config = _debug("policy_gear", "debug", world)
    config.data.pools = {"vqa": {"path": str(tmp_path), "weight": 1.0}}
    config.model.length = 1000  # bytes are many tokens
    data = open_data(config, gear.sequence_config(config.model))
    assert len(data.train["vqa"]) == 3  # three images in a row
    stream = data.open_train(config, None)
    batch = next(stream)
    stream.close()
    assert np.bincount(batch["source"]).tolist() == [4, 4]
    for row, source in enumerate(batch["source"]):
        assert len(batch["questions"][row]) == (3 if source == 1 else 0)
        assert set(batch["segments"][row]) >= ({1, 2, 3} if source == 1 else {1})
    config.data.sets.reach.update(weight=0.0, latents=None)  # for its statistics alone
    stream = open_data(config, gear.sequence_config(config.model)).open_train(config, None)
    batch = next(stream)
    stream.close()
    assert np.bincount(batch["source"]).tolist() == [0, 8]


def _sha(state):
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state.replace(rng=jax.random.key_data(state.rng))):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def trained(world):
    """A policy of ten steps, and its workdir."""
    config = _debug("policy_gear", "debug", world)
    config.optim.update(num_steps=10)
    config.ema_decay = 0.9
    state, _ = _run(config, world / "policy")
    return world / "policy", state


def _stage_config(name, world, trained):
    if name == "pretrain":
        config = _debug("pretrain_gear", "debug", world)
    elif name == "policy":
        config = _debug("policy_gear", "debug", world)
    else:
        config = _debug("adapt", f"debug,{name}", world)
        config.init.update(run=str(trained[0]), fresh=())
    config.optim.update(num_steps=10)
    config.ema_decay = 0.9
    return config


class _StopError(Exception):
    pass


@pytest.mark.parametrize(
    ("name", "workers"), [("pretrain", 0), ("policy", 2), ("projector", 0), ("all", 0)]
)
def test_e13_ten_steps_are_five_and_five_to_the_bit(name, workers, world, trained, tmp_path):
    config = _stage_config(name, world, trained)
    config.data.num_workers = workers
    whole = trained[1] if name == "policy" else _run(config, tmp_path / "whole")[0]

    def stop(line):
        if line.startswith("step 6/"):
            raise _StopError

    mesh = _mesh(data=1)
    stage = STAGES[config.stage].stage(config, mesh)
    options = loop.LoopConfig(log_every=1, checkpoint_every=5)
    run = {"seed": config.seed, "record": {}}
    with pytest.raises(_StopError):
        loop.run(stage, options, tmp_path / "broken", mesh, say=stop, **run)
    said = []
    state = loop.run(stage, options, tmp_path / "broken", mesh, say=said.append, **run)
    assert "resumed at step 5" in said
    assert _sha(state) == _sha(whole)


def test_the_projector_phase_changes_the_slot_of_the_robot_and_nothing_else(
    world, trained, tmp_path
):
    config = _stage_config("projector", world, trained)
    state, _ = _run(config, tmp_path)
    slot = 2  # franka
    for tower, tree in state.params.items():
        for path, now in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            before = trained[1].params[tower]
            for part in name.split("/"):
                before = before[part]
            changed = np.array(now != before)
            if tower == "state":
                assert changed[slot].any(), name
                changed[slot] = False
            assert not changed.any(), f"{tower}/{name}"


def test_two_by_two_by_two_devices_train_as_one(world, trained):
    config = _stage_config("policy", world, trained)
    config.optim.update(num_steps=2)
    one, _ = _run(config, world / "one")
    mesh = _mesh(data=2, fsdp=2, tensor=2)
    eight, _ = _run(config, world / "eight", mesh)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(eight.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)
    assert pathlib.Path(world / "eight" / "checkpoints" / "2").is_dir()


def test_a_chunk_is_measured_by_parts_so_that_small_turns_are_seen():
    wanted = np.zeros((1, 2, 20), np.float32)
    wanted[..., 10:13], wanted[..., 13:19], wanted[..., 19] = 1.0, 0.1, -1.0
    chunk = np.full_like(wanted, 9.0)  # of the left arm, which is not there, and of the second row
    chunk[:, 0, 10:] = [1.0, 1.0, 0.0, *[0.0] * 6, 1.0]
    mask = np.zeros(wanted.shape, bool)
    mask[:, 0, 10:] = True
    found = {
        name: one[0] / one[1] for name, one in gear_eval.chunk_errors(chunk, wanted, mask).items()
    }
    expected = {"chunk_error": 0.506, "fvu_position": 1 / 3, "fvu_rmat6d": 1.0, "fvu_gripper": 4.0}
    assert found == pytest.approx(expected, rel=1e-5)


def test_held_out_examples_are_measured_both_with_true_and_with_said_latents(world, trained):
    config = _stage_config("all", world, trained)
    config.data.hold_out = 0.3
    config.optim.update(num_steps=2)
    config.monitor.update(every=2, batches=1)
    mesh = _mesh(data=1)
    held = adapt.stage(config, mesh).evaluators["held_out"]
    seen = held.run(trained[1])
    assert set(seen) == {
        "tokens", "latent", "fast", "latent_right", "flow", "flow_predicted", "chunk_error",
        "fvu_position", "fvu_rmat6d", "fvu_gripper",
    }  # fmt: skip
    assert seen == held.run(trained[1])
    assert 0 <= seen["latent_right"] <= 1
    assert seen["flow"] != seen["flow_predicted"]
