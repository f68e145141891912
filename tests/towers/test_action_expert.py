import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gear_jax.towers import attention
from gear_jax.towers.action_expert import ActionExpert, ActionExpertConfig
from gear_jax.train import sharding

CFG = ActionExpertConfig(
    depth=3,
    width=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    action_dim=5,
    chunk_len=4,
    rope_theta=100.0,
)
SECTIONS = (1, 1, 2)  # of the language tower's m-rope
B, M = 8, 3


def _draw(key, *shape):
    return jax.random.normal(jax.random.key(key), shape)


def _turned(keys, positions):
    """Keys of M text tokens that end at `positions`, as the language tower leaves them."""
    places = positions[:, None] + jnp.arange(1 - M, 1)[None]
    places = jnp.broadcast_to(places[None], (3, *places.shape))
    angles = attention.multimodal_rotary(places, 8, CFG.rope_theta, SECTIONS)
    return jnp.stack([attention.rotate(layer, angles) for layer in keys])


ROBOTS = jnp.asarray([2, 0] * 4)
POSITIONS = jnp.arange(B) * 3 + 20
KEYS = _draw(3, 3, B, M, 2, 8)
INPUTS = {
    "noisy": _draw(0, B, 4, 5),
    "tau": jnp.linspace(0.0, 1.0, B),
    "k": _turned(KEYS, POSITIONS),
    "v": _draw(4, 3, B, M, 2, 8),
    "positions": POSITIONS,
    "kv_mask": jnp.ones((B, M), bool).at[:2, 0].set(False).at[1, 2].set(False),
}


@jax.jit
def velocity(params, inputs):
    return ActionExpert(CFG).apply({"params": params}, **inputs)


@pytest.fixture(scope="module")
def fresh():
    return jax.jit(ActionExpert(CFG).init)(jax.random.key(1), **INPUTS)["params"]


def _shaken(params):
    """Parameters that are nowhere zero."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + 0.2 * rng.standard_normal(x.shape, np.float32), params)


@pytest.fixture(scope="module")
def params(fresh):
    return _shaken(fresh)


@pytest.fixture(scope="module")
def plain(params):
    return velocity(params, INPUTS)


def _norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + CFG.norm_eps)


def _silu(x):
    return x / (1 + np.exp(-x))


def _turn(x, positions):
    """One row of heads [T, N, H] at its positions [T]."""
    angles = positions[:, None] * CFG.rope_theta ** -(np.arange(4) / 4)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = x[..., :4], x[..., 4:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def _by_hand(params, inputs, row):
    """Velocity [A, a] of one row, by loops over layers, tokens and heads, in float64."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x, tau, k, v, position, mask = (
        np.asarray(value[:, row] if name in "kv" else value[row], np.float64)
        for name, value in inputs.items()
    )

    def linear(name, y):
        return y @ p[name]["kernel"] + p[name]["bias"]

    angles = 2 * np.pi * tau / np.geomspace(4e-3, 4.0, 128)
    y = np.concatenate([np.sin(angles), np.cos(angles)])
    condition = _silu(linear("time_out", _silu(linear("time_in", y))))
    x = linear("action_in", x) + p["step_embed"]
    places = position + 1 + np.arange(4)
    for layer in range(len(k)):
        w = {name: {k: v[layer] for k, v in part.items()} for name, part in p["layers"].items()}
        parts = np.einsum("d,dnw->nw", condition, w["modulation"]["kernel"])
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts + w["modulation"]["bias"]
        y = _norm(x) * (1 + scale) + shift
        q = _turn(np.einsum("td,dnh->tnh", y, w["q"]["kernel"]), places)
        own = _turn(np.einsum("td,dnh->tnh", y, w["k"]["kernel"]), places)
        keys = np.concatenate([k[layer], own])
        values = np.concatenate([v[layer], np.einsum("td,dnh->tnh", y, w["v"]["kernel"])])
        seen = np.flatnonzero(np.concatenate([mask, np.ones(4)]))
        out = np.zeros_like(q)
        for t, n in np.ndindex(4, 4):
            weights = np.exp(keys[seen, n // 2] @ q[t, n] / np.sqrt(8))
            out[t, n] = weights @ values[seen, n // 2] / weights.sum()
        x = x + gate * np.einsum("tnh,nhd->td", out, w["o"]["kernel"])
        y = _norm(x) * (1 + mlp_scale) + mlp_shift
        up = y @ w["up"]["kernel"]
        y = _silu(y @ w["gate"]["kernel"]) * up if "gate" in w else np.asarray(jax.nn.gelu(up))
        x = x + mlp_gate * (y @ w["down"]["kernel"])
    parts = np.einsum("d,dnw->nw", condition, p["final_modulation"]["kernel"])
    shift, scale = parts + p["final_modulation"]["bias"]
    return linear("action_out", _norm(x) * (1 + scale) + shift)


def test_the_expert_is_one_softmax_over_latent_and_own_keys_in_every_layer(params, plain):
    expected = np.stack([_by_hand(params, INPUTS, row) for row in range(B)])
    np.testing.assert_allclose(plain, expected, atol=3e-4)


def test_at_the_start_the_velocity_is_exactly_zero(fresh):
    np.testing.assert_array_equal(velocity(fresh, INPUTS), np.zeros((B, 4, 5)))


def test_with_closed_gates_the_layers_pass_their_input_on(params, plain):
    def closed(x):  # shift, scale and gate of the attention, then of the MLP
        return x.at[..., 2, :].set(0).at[..., 5, :].set(0)

    layers = {
        **params["layers"],
        "modulation": jax.tree.map(closed, params["layers"]["modulation"]),
    }
    shut = {**params, "layers": layers}
    made = velocity(shut, INPUTS)
    assert np.abs(made - plain).max() > 0.1
    other = {**INPUTS, "k": -INPUTS["k"], "v": 7 * INPUTS["v"]}
    np.testing.assert_array_equal(velocity(shut, other), made)


@pytest.fixture(scope="module")
def gradients(params):
    """Of the sum over the batch: by parameter, by input, and of each step by each noisy step."""

    @jax.jit
    def run(params, inputs):
        expert = ActionExpert(dataclasses.replace(CFG, remat="attention"))

        def steps(params, noisy, k, v):
            made = expert.apply({"params": params}, **{**inputs, "noisy": noisy, "k": k, "v": v})
            return jnp.sum(made**2, axis=(0, 2))

        _, pull = jax.vjp(steps, params, *(inputs[name] for name in ("noisy", "k", "v")))
        return jax.vmap(pull)(jnp.eye(4))

    by_params, noisy, k, v = run(params, INPUTS)
    total = jax.tree.map(lambda x: np.asarray(x.sum(axis=0)), by_params)
    return total, *(np.asarray(x) for x in (noisy, k, v))


def test_every_parameter_of_every_layer_is_reached(gradients):
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients[0]):
        lead = len(leaf) if "layers" in str(path[0]) else 1
        assert np.all(np.any(leaf.reshape(lead, -1) != 0, axis=-1)), path


def test_own_tokens_see_each_other_both_ways(gradients):
    reached = np.any(gradients[1] != 0, axis=3)  # step of the velocity, row, noisy step
    assert reached.shape == (4, B, 4)
    assert reached.all()


def test_every_layer_depends_on_its_own_part_of_the_cache_and_on_nothing_hidden(gradients):
    seen = np.broadcast_to(np.asarray(INPUTS["kv_mask"])[None, None], (4, 3, B, M))
    for gradient in gradients[2:]:
        np.testing.assert_array_equal(np.any(gradient != 0, axis=(4, 5)), seen)


def test_hidden_latent_tokens_have_no_influence_bit_for_bit(params, plain):
    hidden = ~INPUTS["kv_mask"][None, :, :, None, None]
    other = {name: jnp.where(hidden, 1e4, INPUTS[name]) for name in "kv"}
    np.testing.assert_array_equal(velocity(params, {**INPUTS, **other}), plain)
    shown = {**other, "kv_mask": jnp.ones((B, M), bool)}
    changed = np.any(velocity(params, {**INPUTS, **shown}) != plain, axis=(1, 2))
    assert changed.tolist() == [True] * 2 + [False] * 6


def test_the_layers_of_the_cache_are_not_interchangeable(params, plain):
    order = np.array([1, 0, 2])
    other = velocity(params, {**INPUTS, "k": INPUTS["k"][order], "v": INPUTS["v"][order]})
    assert np.abs(other - plain).max() > 0.01


def test_only_the_distance_to_the_latent_tokens_counts(params, plain):
    """Own keys turn as the language tower turns its text: all move on by 9, nothing changes."""
    later = {**INPUTS, "positions": POSITIONS + 9}
    assert np.abs(velocity(params, later) - plain).max() > 0.01
    both = {**later, "k": _turned(KEYS, POSITIONS + 9)}
    np.testing.assert_allclose(velocity(params, both), plain, atol=1e-4)


def test_a_call_gives_back_no_state_and_its_parameters_are_its_own(fresh):
    _, kept = jax.eval_shape(
        lambda p: ActionExpert(CFG).apply({"params": p}, **INPUTS, mutable=True), fresh
    )
    assert set(kept) == {"params"}
    assert sorted(fresh) == [
        "action_in", "action_out", "final_modulation", "layers", "step_embed", "time_in",
        "time_out",
    ]  # fmt: skip
    assert sorted(fresh["layers"]) == ["down", "gate", "k", "modulation", "o", "q", "up", "v"]


def test_one_device_equals_eight(params, plain):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rows = sharding.BATCH_AXES
    placed = {
        name: jax.device_put(value, NamedSharding(mesh, P(None, rows) if name in "kv" else P(rows)))
        for name, value in INPUTS.items()
    }
    split = sharding.param_shardings({"expert": params}, mesh)["expert"]
    made = velocity(jax.device_put(params, split), placed)
    assert {shard.data.shape for shard in made.addressable_shards} == {(2, 4, 5)}
    np.testing.assert_allclose(made, plain, atol=1e-4)


@pytest.fixture(scope="module")
def aware():
    """An output-aware expert with GELU and no mask: at the start, then shaken, and its gradient."""
    expert = ActionExpert(dataclasses.replace(CFG, depth=1, num_embodiments=4, mlp="gelu"))
    inputs = {name: x[:1] if name in "kv" else x for name, x in INPUTS.items()}
    del inputs["kv_mask"]

    @jax.jit
    def run(params):
        def loss(params):
            made = expert.apply({"params": params}, **inputs, embodiment_id=ROBOTS)
            return jnp.sum(made**2), made

        return jax.grad(loss, has_aux=True)(params)

    init = jax.jit(lambda rng: expert.init(rng, **inputs, embodiment_id=ROBOTS)["params"])
    fresh = init(jax.random.key(5))
    shaken = _shaken(fresh)
    return inputs, run(fresh)[1], shaken, *run(shaken)


def test_output_aware_maps_are_those_of_the_embodiment(aware):
    inputs, start, params, _, made = aware
    np.testing.assert_array_equal(start, np.zeros((B, 4, 5)))
    assert params["action_in"]["kernel"].shape == (4, 5, 16)
    assert params["action_out"]["kernel"].shape == (4, 16, 5)
    inputs = {**inputs, "kv_mask": np.ones((B, M))}
    for row in range(B):
        maps = {
            name: jax.tree.map(lambda x, row=row: x[ROBOTS[row]], params[name])
            for name in ("action_in", "action_out")
        }
        np.testing.assert_allclose(made[row], _by_hand(params | maps, inputs, row), atol=3e-4)


def test_output_aware_maps_learn_from_their_own_embodiment_only(aware):
    gradient = aware[3]
    chex.assert_tree_all_finite(gradient)
    for name in ("action_in", "action_out"):
        for leaf in jax.tree.leaves(gradient[name]):
            reached = np.any(np.asarray(leaf).reshape(4, -1) != 0, axis=1)
            assert reached.tolist() == [True, False, True, False]


@pytest.mark.parametrize(("num_latent", "dtype"), [(20, jnp.bfloat16), (4, jnp.float32)])
def test_the_full_expert_beside_the_7b_tower_has_its_shapes(num_latent, dtype):
    expert = ActionExpert(ActionExpertConfig(dtype=dtype))
    kv = jax.ShapeDtypeStruct((28, 2, num_latent, 4, 128), dtype)
    rows = jax.ShapeDtypeStruct((2,), jnp.int32)
    noisy = jax.ShapeDtypeStruct((2, 30, 20), jnp.float32)
    tau = jax.ShapeDtypeStruct((2,), jnp.float32)
    made, variables = jax.eval_shape(
        expert.init_with_output, jax.random.key(0), noisy, tau, kv, kv, rows
    )
    assert (made.shape, made.dtype) == ((2, 30, 20), jnp.float32)
    assert sum(x.size for x in jax.tree.leaves(variables)) == 620_219_412


def test_what_does_not_fit_is_refused_and_named(params):
    def call(cfg=CFG, **changes):
        ActionExpert(cfg).apply({"params": params}, **{**INPUTS, **changes})

    with pytest.raises(ValueError, match=r"keys are \(2, 8, 3, 2, 8\), expected \(3, 8, 'M', 2"):
        call(k=INPUTS["k"][:2], v=INPUTS["v"][:2])
    with pytest.raises(ValueError, match=r"the chunk is \(3, 5\), expected \(4, 5\): chunk_len"):
        call(noisy=INPUTS["noisy"][:, :3])
    with pytest.raises(ValueError, match="embodiment_id is missing for 2 embodiments"):
        call(dataclasses.replace(CFG, num_embodiments=2))
    with pytest.raises(ValueError, match="mlp is 'relu', expected one of .*; num_heads is 3, exp"):
        dataclasses.replace(CFG, mlp="relu", num_heads=3)
