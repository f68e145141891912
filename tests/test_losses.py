import jax
import jax.numpy as jnp
import numpy as np

from gear_jax.losses import IGNORE, next_token_loss


def test_the_loss_is_the_mean_over_labelled_tokens_of_the_token_before():
    logits = jnp.log(jnp.asarray([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [1 / 3] * 3]]))
    labels = jnp.asarray(
        [[2, 1, 2]]
    )  # 1 from position 0, 2 from position 1; the first is not learnt
    expected = -(np.log(0.25) + np.log(0.8)) / 2
    np.testing.assert_allclose(next_token_loss(logits, labels), expected, rtol=1e-6)
    one = jnp.asarray([[2, IGNORE, 2]])
    np.testing.assert_allclose(next_token_loss(logits, one), -np.log(0.8), rtol=1e-6)


def test_a_batch_without_labels_costs_nothing_and_moves_nothing():
    labels = jnp.full((2, 3), IGNORE)
    value, gradient = jax.value_and_grad(next_token_loss)(jnp.ones((2, 3, 5)), labels)
    assert value == 0
    assert np.all(np.asarray(gradient) == 0)


def test_only_positions_before_a_label_get_a_gradient():
    labels = jnp.asarray([[1, IGNORE, 3, IGNORE]])
    logits = jax.random.normal(jax.random.key(0), (1, 4, 5))
    gradient = jax.grad(next_token_loss)(logits, labels)
    assert np.any(np.asarray(gradient) != 0, axis=-1).tolist() == [[False, True, False, False]]
