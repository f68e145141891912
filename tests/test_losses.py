import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gear_jax.losses import IGNORE, labelled_token_loss, next_token_loss


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


def _labelled(most, chunk):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(3, 9, 4)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(11, 4)), jnp.float32)
    labels = np.full((3, 9), IGNORE, np.int32)
    labels[0, [2, 3, 8]] = [4, 0, 10]
    labels[1, 5] = 7

    def logits(table, states):
        return jnp.einsum("btd,vd->btv", states, table)

    kinds = jnp.zeros((3, 9), jnp.int32).at[0, 8].set(1)

    def ours(hidden, table):
        return labelled_token_loss(
            hidden, jnp.asarray(labels), kinds, lambda states: logits(table, states), num_kinds=3,
            most=most, chunk=chunk,
        )  # fmt: skip

    def plain(hidden, table):
        def loss(labels):
            return next_token_loss(logits(table, hidden), jnp.asarray(labels))

        first, last = labels.copy(), np.full_like(labels, IGNORE)
        first[0, 8], last[0, 8] = IGNORE, labels[0, 8]
        return loss(labels), jnp.stack([loss(first), loss(last), 0.0])

    return [
        jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(hidden, table)
        for f in (ours, plain)
    ]


@pytest.mark.parametrize(("most", "chunk"), [(3, 2), (3, 100), (100, 4)])
def test_logits_of_labelled_positions_alone_give_the_same_loss_and_gradient(most, chunk):
    (one, grads), (other, wanted) = _labelled(most, chunk)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, other)
    for a, b in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_more_labels_than_there_is_room_for_are_never_left_out_in_silence():
    ((value, _), _), _ = _labelled(2, 4)
    assert np.isnan(value)


def test_logits_of_the_whole_batch_never_exist_at_once():
    hidden, labels = jnp.zeros((4, 64, 8)), jnp.full((4, 64), IGNORE).at[:, 40:60].set(1)
    table = jnp.zeros((5000, 8))

    def memory(f):
        compiled = jax.jit(jax.grad(f)).lower(hidden).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def logits(states):
        return jnp.einsum("btd,vd->btv", states, table)

    def ours(h):
        return labelled_token_loss(h, labels, 0 * labels, logits, num_kinds=1, most=20, chunk=16)[0]

    assert memory(ours) < 0.2 * memory(lambda h: next_token_loss(logits(h), labels))
