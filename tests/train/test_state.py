import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gear_jax.train import sharding
from gear_jax.train.state import make_train_step, new_state

TX = optax.sgd(0.1)


def _init(rng):
    return {"w": jax.random.normal(rng, (5, 3))}, {"seen": jnp.zeros(())}


def _loss(params, extra, batch, rng):
    error = jnp.tanh(batch["x"] @ params["w"]) - batch["y"]
    extra = {"seen": extra["seen"] + batch["x"].sum()}
    return (error**2).mean(), (extra, {"error": jnp.abs(error).mean(axis=0)})


def _batch(rows=24):
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((rows, 5)).astype(np.float32),
        "y": rng.standard_normal((rows, 3)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def state():
    return jax.jit(functools.partial(new_state, _init, TX, 0, ema=False))()


@pytest.mark.parametrize("parts", [2, 3, 24])
def test_a_batch_in_parts_gives_the_step_of_the_whole_up_to_rounding(state, parts):
    whole, said = jax.jit(make_train_step(_loss, TX))(state, _batch())
    parted, heard = jax.jit(make_train_step(_loss, TX, accumulate=parts))(state, _batch())
    for a, b in ((whole.params, parted.params), (whole.extra, parted.extra), (said, heard)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), a, b)
    assert (whole.params["w"] != state.params["w"]).all()


def test_parts_draw_their_own_noise_and_pass_the_extra_on(state):
    def loss(params, extra, batch, rng):
        draw = jax.random.uniform(rng)
        mean = params["w"].sum() * draw
        return mean, ({"seen": 2 * extra["seen"] + batch["x"].sum()}, {"draw": draw})

    x = np.arange(4, dtype=np.float32)[:, None]
    new, metrics = jax.jit(make_train_step(loss, TX, accumulate=2))(state, {"x": x})
    assert float(new.extra["seen"]) == 2 * (0 + 2) + (1 + 3)  # rows 0 and 2, then 1 and 3
    rng = jax.random.fold_in(state.rng, 0)
    draws = [float(jax.random.uniform(jax.random.fold_in(rng, part))) for part in (0, 1)]
    assert draws[0] != draws[1]
    assert float(metrics["draw"]) == pytest.approx(np.mean(draws))


def test_one_part_that_is_not_finite_spoils_the_whole_step(state):
    batch = _batch()
    batch["x"][5] = np.nan
    new, metrics = jax.jit(make_train_step(_loss, TX, accumulate=4))(state, batch)
    assert int(metrics["bad_steps"]) == int(new.step) == 1
    np.testing.assert_array_equal(new.params["w"], state.params["w"])
    np.testing.assert_array_equal(new.extra["seen"], state.extra["seen"])


def test_parts_that_do_not_divide_the_batch_are_refused(state):
    with pytest.raises(ValueError, match="a batch of 24 rows in 5 parts: expected accumulate to"):
        jax.jit(make_train_step(_loss, TX, accumulate=5))(state, _batch())


def test_rows_stay_on_their_device_when_a_batch_is_taken_in_parts(state):
    mesh = sharding.make_mesh({"data": 8})
    rows = sharding.batch_sharding(mesh)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    step = jax.jit(
        make_train_step(_loss, TX, accumulate=3),
        in_shardings=(everywhere, rows),
        out_shardings=everywhere,
    )
    text = step.lower(state, _batch()).compile().as_text()
    assert "all-reduce" in text
    for moved in ("all-to-all", "all-gather", "collective-permute"):
        assert moved not in text
