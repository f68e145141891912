import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gear_jax import flow

ACTION = jnp.asarray([[[1.0, -2.0], [3.0, 0.5]], [[0.0, 1.0], [-1.0, 4.0]]])
NOISE = jnp.asarray([[[-1.0, 2.0], [1.0, 0.5]], [[2.0, 1.0], [0.0, 0.0]]])


def test_tau_0_is_noise_and_tau_1_is_data():
    made = flow.noised(ACTION, NOISE, jnp.asarray([0.0, 1.0]))
    np.testing.assert_array_equal(made, [NOISE[0], ACTION[1]])
    quarter = flow.noised(ACTION, NOISE, jnp.asarray([0.25, 0.25]))
    np.testing.assert_array_equal(quarter, [[[-0.5, 1.0], [1.5, 0.5]], [[1.5, 1.0], [-0.25, 1.0]]])


def test_the_target_is_how_the_noised_chunk_changes_with_tau():
    tau = jnp.asarray([0.2, 0.7])
    _, change = jax.jvp(lambda t: flow.noised(ACTION, NOISE, t), (tau,), (jnp.ones(2),))
    np.testing.assert_allclose(flow.target(ACTION, NOISE), change, atol=1e-6)
    np.testing.assert_array_equal(
        flow.target(ACTION, NOISE), [[[2, -4], [2, 0]], [[-2, 0], [-1, 4]]]
    )


def test_tau_follows_its_law_and_lies_nearer_to_noise():
    tau = np.sort(flow.sample_tau(jax.random.key(0), (200, 100)), axis=None)
    assert tau.dtype == np.float32
    assert tau[0] >= 0
    assert tau[-1] <= np.float32(0.999)
    # u = 1 - tau / 0.999 has the distribution function u^1.5
    law = 1 - np.clip(1 - tau / 0.999, 0, 1) ** 1.5
    assert np.abs(law - np.arange(len(tau)) / len(tau)).max() < 0.01
    np.testing.assert_allclose(tau.mean(), 0.999 * 0.4, atol=0.005)


def test_the_loss_is_the_mean_over_the_valid_entries_of_the_whole_batch():
    velocity = jnp.asarray([[[1.0, 2.0], [3.0, np.nan]], [[5.0, 0.0], [0.0, 0.0]]])
    mask = jnp.asarray([[[1, 1], [1, 0]], [[1, 0], [0, 0]]], bool)
    target = jnp.ones((2, 2, 2))
    value, gradient = jax.value_and_grad(flow.flow_loss)(velocity, target, mask)
    np.testing.assert_allclose(value, (0 + 1 + 4 + 16) / 4)
    np.testing.assert_allclose(gradient, [[[0, 0.5], [1, 0]], [[2, 0], [0, 0]]])


def test_a_batch_without_actions_costs_nothing_and_moves_nothing():
    value, gradient = jax.value_and_grad(flow.flow_loss)(ACTION, NOISE, jnp.zeros((2, 2, 2), bool))
    assert value == 0
    assert np.all(np.asarray(gradient) == 0)


def test_everything_is_float32_whatever_comes_in():
    action, noise, tau = (x.astype(jnp.bfloat16) for x in (ACTION, NOISE, ACTION[:, 0, 0]))
    assert flow.noised(action, noise, tau).dtype == jnp.float32
    assert flow.target(action, noise).dtype == jnp.float32
    assert flow.flow_loss(action, noise, noise > 0).dtype == jnp.float32
    sampled = flow.integrate(lambda x, tau: x.astype(jnp.bfloat16), noise, 2)
    assert sampled.dtype == jnp.float32


def test_a_linear_field_is_followed_as_euler_does():
    rate = jnp.asarray([0.5, -1.0])[None, None]
    for num_steps in (1, 10):
        expected = NOISE * (1 + rate / num_steps) ** num_steps
        ours = flow.integrate(lambda x, tau: rate * x, NOISE, num_steps)
        np.testing.assert_allclose(ours, expected, rtol=1e-6)
    many = flow.integrate(lambda x, tau: rate * x, NOISE, 2000)
    np.testing.assert_allclose(many, NOISE * jnp.exp(rate), rtol=1e-3)


def test_the_integrator_asks_at_the_start_of_every_step():
    # 0 + 1/4 + 2/4 + 3/4, each for a quarter of the time
    ours = flow.integrate(
        lambda x, tau: jnp.broadcast_to(tau[:, None, None], x.shape), jnp.zeros((2, 2, 2)), 4
    )
    np.testing.assert_array_equal(ours, np.full((2, 2, 2), 0.375))


def test_the_field_towards_one_chunk_ends_there_from_any_noise():
    def field(x, tau):
        return (ACTION - x) / (1 - tau[:, None, None])

    np.testing.assert_allclose(flow.integrate(field, NOISE, 10), ACTION, atol=1e-5)
    moved = jax.jacobian(lambda noise: flow.integrate(field, noise, 10))(NOISE)
    np.testing.assert_allclose(moved, np.zeros((2,) * 3 + (2,) * 3), atol=1e-5)


def test_no_step_at_all_is_refused():
    with pytest.raises(ValueError, match="num_steps is 0: expected at least 1"):
        flow.integrate(lambda x, tau: x, NOISE, 0)
