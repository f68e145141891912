import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gear_jax.towers.state_projector import (
    TOKENS,
    EmbodimentDense,
    StateProjector,
    StateProjectorConfig,
    with_new_slot,
)
from gear_jax.train import sharding

CFG = StateProjectorConfig(num_embodiments=5, hidden_dim=6, width=3)
B = 8
ROBOTS = jnp.asarray([1, 3, 1, 0, 3, 1, 0, 3])  # nobody is 2 or 4


def _state():
    rng = np.random.default_rng(0)
    ee_mask = np.ones((B, 2), bool)
    joint_mask = np.ones((B, 2, 9), bool)
    ee_mask[0, 0] = ee_mask[1, 1] = False
    joint_mask[0, 0] = joint_mask[2, 1] = False  # an arm that is not there; joints not on record
    joint_mask[:, :, 6:8] = False  # six joints and the gripper
    return {
        "ee": rng.uniform(-1, 1, (B, 2, 9)).astype(np.float32),
        "ee_mask": ee_mask,
        "joints": rng.uniform(-1, 1, (B, 2, 9)).astype(np.float32),
        "joint_mask": joint_mask,
        "arm_mask": ee_mask | joint_mask.any(-1),
    }


STATE = _state()


def _project(params, state, robots):
    return StateProjector(CFG).apply({"params": params}, state, robots)


project = jax.jit(_project)


@pytest.fixture(scope="module")
def fresh():
    return StateProjector(CFG).init(jax.random.key(0), STATE, ROBOTS)["params"]


@pytest.fixture(scope="module")
def params(fresh):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape, np.float32), fresh)


def test_a_row_goes_through_the_map_of_its_own_robot(params):
    tokens, mask = project(params, STATE, ROBOTS)
    assert TOKENS == ("left_ee", "left_joints", "right_ee", "right_joints")
    for row, robot in enumerate(np.asarray(ROBOTS)):
        w = jax.tree.map(lambda x, robot=robot: np.asarray(x[robot]), params)
        ee = STATE["ee"][row] * STATE["ee_mask"][row][:, None]
        joints = STATE["joints"][row] * STATE["joint_mask"][row]
        x = np.concatenate([ee[0], joints[0], ee[1], joints[1]])
        hidden = jax.nn.gelu(x @ w["fc1"]["kernel"] + w["fc1"]["bias"])
        expected = (hidden @ w["fc2"]["kernel"] + w["fc2"]["bias"]).reshape(4, 3)
        expected = expected * np.asarray(mask)[row][:, None]
        np.testing.assert_allclose(tokens[row], expected, atol=1e-5)


def test_every_step_of_a_chunk_goes_through_its_robots_map():
    dense = EmbodimentDense(5, 4)
    x = jax.random.normal(jax.random.key(2), (B, 3, 2))
    params = {
        "kernel": jax.random.normal(jax.random.key(3), (5, 2, 4)),
        "bias": jax.random.normal(jax.random.key(4), (5, 4)),
    }
    expected = jnp.einsum("btd,bdf->btf", x, params["kernel"][ROBOTS])
    expected = expected + params["bias"][ROBOTS][:, None]
    np.testing.assert_allclose(dense.apply({"params": params}, x, ROBOTS), expected, atol=1e-6)


def test_a_token_counts_where_the_robot_tells_it(params):
    tokens, mask = project(params, STATE, ROBOTS)
    expected = np.ones((B, 4), bool)
    expected[0, :2] = expected[1, 2] = expected[2, 3] = False
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(np.any(tokens != 0, axis=-1), expected)


def test_hidden_numbers_have_no_influence_bit_for_bit(params):
    noise = {
        "ee": np.where(STATE["ee_mask"][..., None], STATE["ee"], np.nan),
        "joints": np.where(STATE["joint_mask"], STATE["joints"], 99),
    }
    ours, _ = project(params, {**STATE, **noise}, ROBOTS)
    np.testing.assert_array_equal(ours, project(params, STATE, ROBOTS)[0])


def test_a_robot_teaches_its_own_slot_and_no_other(params):
    @jax.jit
    def gradient(params, row):
        return jax.grad(lambda p: jnp.sum(_project(p, STATE, ROBOTS)[0][row] ** 2))(params)

    for row in (3, 4):
        own = np.arange(5) == ROBOTS[row]
        for leaf in jax.tree.leaves(gradient(params, row)):
            reached = np.asarray(leaf).reshape(5, -1) != 0
            np.testing.assert_array_equal(reached.any(axis=1), own)
    for leaf in jax.tree.leaves(jax.grad(lambda p: project(p, STATE, ROBOTS)[0].sum())(params)):
        reached = np.any(np.asarray(leaf).reshape(5, -1) != 0, axis=1)
        assert reached.tolist() == [True, True, False, True, False]


def test_slots_start_equal_so_a_bank_starts_as_a_shared_projector(fresh):
    for leaf in jax.tree.leaves(fresh):
        np.testing.assert_array_equal(leaf, jnp.broadcast_to(leaf[:1], leaf.shape))
    shared = StateProjector(dataclasses.replace(CFG, shared=True))
    made = shared.init(jax.random.key(0), STATE, ROBOTS)
    assert made["params"]["fc2"]["kernel"].shape == (1, 6, 12)
    tokens, mask = shared.apply(made, STATE, ROBOTS)
    np.testing.assert_array_equal(shared.apply(made, STATE, ROBOTS * 0)[0], tokens)
    banked = project(fresh, STATE, ROBOTS)
    np.testing.assert_allclose(banked[0], tokens, atol=1e-6)
    np.testing.assert_array_equal(banked[1], mask)


def test_the_spread_of_a_map_does_not_shrink_with_the_number_of_robots(fresh):
    kernel = np.asarray(fresh["fc1"]["kernel"][0])
    np.testing.assert_allclose(kernel.std(), 36**-0.5, rtol=0.2)


def test_a_robot_without_a_slot_is_loud(params):
    tokens, _ = project(params, STATE, ROBOTS.at[3].set(5).at[4].set(-1))
    lost = np.isnan(tokens).all(axis=(1, 2))
    assert lost.tolist() == [False] * 3 + [True] * 2 + [False] * 3


def test_a_new_slot_is_the_mean_of_the_trained_ones_and_leaves_them_alone(params):
    grown = with_new_slot(params, num=2, trained=(1, 3))

    def check(old, new):
        assert new.shape == (7, *old.shape[1:])
        np.testing.assert_array_equal(new[:5], old)
        for slot in (5, 6):
            np.testing.assert_allclose(new[slot], (old[1] + old[3]) / 2, rtol=1e-6)

    jax.tree.map(check, params, grown)
    every = with_new_slot({"bias": jnp.arange(6.0).reshape(3, 2).astype(jnp.bfloat16)})
    np.testing.assert_array_equal(every["bias"], [[0, 1], [2, 3], [4, 5], [2, 3]])
    assert every["bias"].dtype == jnp.bfloat16
    larger = StateProjector(dataclasses.replace(CFG, num_embodiments=7))
    tokens, _ = larger.apply({"params": grown}, STATE, ROBOTS)
    np.testing.assert_allclose(tokens, project(params, STATE, ROBOTS)[0], atol=1e-5)


def test_what_is_no_bank_or_no_slot_is_refused(params):
    with pytest.raises(ValueError, match="num is 0: expected at least 1"):
        with_new_slot(params, num=0)
    with pytest.raises(ValueError, match=r"trained is \[5\]: expected some of the slots 0 .. 4"):
        with_new_slot(params, trained=[5])
    with pytest.raises(ValueError, match=r"not a bank: its leaves have \[\(2,\), \(3,\)\] slots"):
        with_new_slot({"a": jnp.ones((2, 3)), "b": jnp.ones((3, 3))})
    with pytest.raises(ValueError, match="num_embodiments is 0, expected at least 1"):
        StateProjectorConfig(num_embodiments=0)


def test_one_device_equals_eight(params):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    state, robots = jax.device_put((STATE, ROBOTS), sharding.batch_sharding(mesh))
    tokens, _ = project(jax.device_put(params, NamedSharding(mesh, P())), state, robots)
    assert {shard.data.shape for shard in tokens.addressable_shards} == {(1, 4, 3)}
    np.testing.assert_allclose(tokens, project(params, STATE, ROBOTS)[0], atol=1e-6)


def test_the_full_bank_has_its_shapes():
    bank = StateProjector(StateProjectorConfig(14, dtype=jnp.bfloat16))
    (tokens, mask), variables = jax.eval_shape(
        bank.init_with_output, jax.random.key(0), STATE, ROBOTS
    )
    assert (tokens.shape, tokens.dtype, mask.shape) == ((B, 4, 3584), jnp.bfloat16, (B, 4))
    shapes = jax.tree.map(lambda x: x.shape, variables["params"])
    assert shapes == {
        "fc1": {"kernel": (14, 36, 512), "bias": (14, 512)},
        "fc2": {"kernel": (14, 512, 14_336), "bias": (14, 14_336)},
    }
