"""Losses. Eq. 1 of GEAR-VLA: next-token cross-entropy."""

import jax
import jax.numpy as jnp
import optax

from gear_jax.data.sequences import IGNORE


def next_token_loss(logits, labels):
    """Mean cross-entropy of every labelled token given the tokens before it.

    Args:
        logits: float32[B, T, V].
        labels: int32[B, T], the tokens themselves; `IGNORE` where there is nothing to learn.
            Position t is predicted from position t - 1.

    Returns:
        float32[], mean over the labelled positions 1 .. T-1 of the whole batch; 0 if there is none.
    """
    targets = labels[:, 1:]
    counted = targets != IGNORE
    nll = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], jnp.where(counted, targets, 0)
    )
    return jnp.sum(nll * counted) / jnp.maximum(jnp.sum(counted), 1)


def labelled_token_loss(hidden, labels, logits, *, most, chunk=256):
    """The same mean, of logits that are made for labelled positions only, a few at a time.

    Logits of every position of a batch over 150,000 words would be the largest array of a step.

    Args:
        hidden: [B, T, D], final hidden states.
        labels: int32[B, T], as in `next_token_loss`.
        logits: hidden [1, n, D] -> float32[1, n, V].
        most: labelled positions that a row may have. A row with more makes the loss NaN, which no
            training step applies: nothing is left out in silence.
        chunk: positions whose logits exist at the same time; they are made again for the gradient.

    Returns:
        float32[], mean over the labelled positions 1 .. T-1 of the whole batch; 0 if there is none.
    """
    targets, width = labels[:, 1:], hidden.shape[-1]
    counted = targets != IGNORE
    most = min(most, targets.shape[1])
    _, places = jax.lax.top_k(counted.astype(jnp.int32), most)
    chosen = jnp.take_along_axis(hidden[:, :-1], places[..., None], axis=1).reshape(-1, width)
    wanted = jnp.take_along_axis(targets, places, axis=1).reshape(-1)
    fill = -len(wanted) % chunk
    chosen = jnp.pad(chosen, ((0, fill), (0, 0))).reshape(-1, 1, chunk, width)
    wanted = jnp.pad(wanted, (0, fill), constant_values=IGNORE).reshape(-1, 1, chunk)

    @jax.checkpoint
    def summed(pair):
        states, ids = pair
        there = ids != IGNORE
        nll = optax.softmax_cross_entropy_with_integer_labels(
            logits(states), jnp.where(there, ids, 0)
        )
        return jnp.sum(nll * there)

    total = jnp.sum(jax.lax.map(summed, (chosen, wanted)))
    count = jnp.sum(counted, axis=1)
    mean = total / jnp.maximum(jnp.sum(count), 1)
    return jnp.where(jnp.any(count > most), jnp.nan, mean)
