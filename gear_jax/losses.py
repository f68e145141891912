"""Losses. Eq. 1 of GEAR-VLA: next-token cross-entropy."""

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
