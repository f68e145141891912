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


def labelled_token_loss(hidden, labels, kinds, logits, *, num_kinds, most, chunk=256):
    """The same mean, of logits that are made for labelled positions only, a few at a time.

    Logits of every position of a batch over 150,000 words would be the largest array of a step.

    Args:
        hidden: [B, T, D], final hidden states.
        labels: int32[B, T], as in `next_token_loss`.
        kinds: int32[B, T], below num_kinds: what each label counts as in the means by kind.
        logits: hidden [1, n, D] -> float32[1, n, V].
        num_kinds: kinds of labels.
        most: labelled positions that a row may have. A row with more makes the loss NaN, which no
            training step applies: nothing is left out in silence.
        chunk: positions whose logits exist at the same time; they are made again for the gradient.

    Returns:
        float32[], mean over the labelled positions 1 .. T-1 of the whole batch, 0 if there is none;
        float32[num_kinds], the same over those of each kind.
    """
    targets = labels[:, 1:]
    counted = targets != IGNORE
    most = min(most, targets.shape[1])
    _, places = jax.lax.top_k(counted.astype(jnp.int32), most)

    def chosen(x, fill_value):
        x = x.reshape(-1, *x.shape[2:])
        fill = ((0, -len(x) % chunk), *((0, 0),) * (x.ndim - 1))
        return jnp.pad(x, fill, constant_values=fill_value).reshape(-1, chunk, *x.shape[1:])

    states = chosen(jnp.take_along_axis(hidden[:, :-1], places[..., None], axis=1), 0)
    wanted = chosen(jnp.take_along_axis(targets, places, axis=1), IGNORE)
    kind = chosen(jnp.take_along_axis(kinds[:, 1:], places, axis=1), 0)

    @jax.checkpoint
    def summed(part):
        states, ids, kind = part
        there = ids != IGNORE
        nll = optax.softmax_cross_entropy_with_integer_labels(
            logits(states[None])[0], jnp.where(there, ids, 0)
        )
        by_kind = jax.nn.one_hot(kind, num_kinds) * there[:, None]
        return jnp.sum(by_kind * nll[:, None], axis=0), jnp.sum(by_kind, axis=0)

    sums, counts = (jnp.sum(x, axis=0) for x in jax.lax.map(summed, (states, wanted, kind)))
    mean = jnp.sum(sums) / jnp.maximum(jnp.sum(counts), 1)
    too_many = jnp.any(jnp.sum(counted, axis=1) > most)
    return jnp.where(too_many, jnp.nan, mean), sums / jnp.maximum(counts, 1)
