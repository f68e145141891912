import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gear_jax.train import optim
from gear_jax.train.optim import OptimConfig

PARAMS = {"vlm": {"a": jnp.ones(3), "b": jnp.ones(2)}, "expert": {"a": jnp.ones(3)}}
TABLE = (("vlm/.*", "vlm"), ("expert/.*", "expert"))


def _config(**changes):
    return OptimConfig(**{"lr": 0.1, "warmup_steps": 0, "num_steps": 10, "partitions": TABLE,
                          **changes})  # fmt: skip


def _grads(scale):
    return {"vlm": {"a": jnp.array([0.3, -0.2, 0.1]), "b": jnp.ones(2)},
            "expert": {"a": scale * jnp.array([1.0, 2.0, 3.0])}}  # fmt: skip


def _train(config, scale, steps=5):
    tx = optim.make_tx(PARAMS, config)
    state, params = tx.init(PARAMS), PARAMS
    for _ in range(steps):
        updates, state = tx.update(_grads(scale), state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_the_size_of_one_partitions_gradient_leaves_the_other_bitwise_the_same():
    one, thirty = _train(_config(clip=0.5), 1.0), _train(_config(clip=0.5), 30.0)
    for key in ("a", "b"):
        np.testing.assert_array_equal(one["vlm"][key], thirty["vlm"][key])


def test_a_frozen_partition_stays_and_has_no_moments():
    config = _config(partitions=(("vlm/a", None), ("vlm/b", "vlm"), ("expert/.*", "expert")))
    np.testing.assert_array_equal(_train(config, 1.0)["vlm"]["a"], PARAMS["vlm"]["a"])
    state = optim.make_tx(PARAMS, config).init(PARAMS)
    assert sorted(x.shape for x in jax.tree.leaves(state) if x.ndim) == [(2,), (2,), (3,), (3,)]


def test_one_partition_is_adamw_after_a_clip():
    config = _config(clip=0.5, weight_decay=((".*/a", 0.01),), partitions=((".*", "all"),))
    decay = {"vlm": {"a": True, "b": False}, "expert": {"a": True}}
    tx = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(0.1, 0.9, 0.999, 1e-8, weight_decay=0.01, mask=decay),
    )
    state, wanted = tx.init(PARAMS), PARAMS
    for _ in range(5):
        updates, state = tx.update(_grads(1.0), state, wanted)
        wanted = optax.apply_updates(wanted, updates)
    got = _train(config, 1.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, wanted)


def test_a_learning_rate_scale_scales_the_step():
    plain, scaled = _train(_config(), 1.0, 1), _train(_config(lr_scale=(("vlm/b", 0.1),)), 1.0, 1)
    np.testing.assert_allclose(1 - scaled["vlm"]["b"], 0.1 * (1 - plain["vlm"]["b"]), rtol=1e-4)
    np.testing.assert_array_equal(scaled["vlm"]["a"], plain["vlm"]["a"])


def test_every_parameter_must_be_in_a_partition_and_every_pattern_must_match():
    with pytest.raises(ValueError, match="expert/a is in no partition; .*'head/.*' matches no"):
        optim.make_tx(PARAMS, _config(partitions=(("vlm/.*", "vlm"), ("head/.*", "x"))))


def test_the_schedules():
    rate = optim.learning_rate(_config(warmup_steps=4, schedule="cosine"))
    np.testing.assert_allclose([rate(s) for s in (0, 2, 4, 7, 10)], [0, 0.05, 0.1, 0.05, 0],
                               atol=1e-7)  # fmt: skip
    rate = optim.learning_rate(_config(warmup_steps=4))
    np.testing.assert_allclose([rate(s) for s in (1, 4, 10)], [0.025, 0.1, 0.1], rtol=1e-6)
    with pytest.raises(ValueError, match="warmup_steps is 11"):
        optim.learning_rate(_config(warmup_steps=11))
    with pytest.raises(ValueError, match="'linear' is unknown"):
        optim.learning_rate(_config(schedule="linear"))
