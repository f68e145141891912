"""The train state and the pure step that every stage shares.

    loss(params, extra, batch, rng) -> loss, (extra, metrics)

`extra` is what a stage carries beside its parameters and changes without a gradient: the codebook
of the latent stage, nothing elsewhere. A step whose loss or gradient is not finite changes nothing
but the step counter and the count of such steps (reliability.md 2g).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gear_jax.train import sharding


class TrainState(struct.PyTreeNode):
    """All that a run is, apart from its place in the data.

    Attributes:
        step: int32[], steps taken.
        params: {tower: parameters}, float32.
        extra: what the stage carries beside them.
        opt_state: of the optimiser.
        ema: moving average of params, or None.
        rng: key; that of a step is folded from it and the step.
        bad_steps: int32[], steps in a row that were not finite.
    """

    step: jax.Array
    params: Any
    extra: Any
    opt_state: Any
    ema: Any
    rng: jax.Array
    bad_steps: jax.Array


def new_state(init: Callable, tx: optax.GradientTransformation, seed: int, ema: bool) -> TrainState:
    """The state before the first step; pure, for `jax.eval_shape` and for jit.

    Args:
        init: rng -> params, extra.
        tx: the optimiser.
        seed: of parameters and of all the steps.
        ema: whether to keep a moving average.
    """
    start, rng = jax.random.split(jax.random.key(seed))
    params, extra = init(start)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        extra=extra,
        opt_state=tx.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        rng=rng,
        bad_steps=zero,
    )


def state_shardings(
    shapes: TrainState, mesh: jax.sharding.Mesh, rules: Sequence[tuple[str, tuple]]
) -> TrainState:
    """Shardings of a state: moments and averages lie like their parameters, the rest everywhere.

    Raises:
        ValueError: a parameter that no rule matches, or whose size an axis does not divide.
    """
    params = sharding.param_shardings(shapes.params, mesh, rules)
    known = {
        jax.tree_util.keystr(path, simple=True, separator="/"): (leaf.shape, where)
        for (path, leaf), where in zip(
            jax.tree_util.tree_leaves_with_path(shapes.params),
            jax.tree.leaves(params),
            strict=True,
        )
    }
    everywhere = NamedSharding(mesh, P())

    def one(path, leaf):
        parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        for start in range(len(parts)):
            shape, where = known.get("/".join(parts[start:]), (None, None))
            if shape == leaf.shape:
                return where
        return everywhere

    return jax.tree_util.tree_map_with_path(one, shapes)


def make_train_step(
    loss: Callable,
    tx: optax.GradientTransformation,
    ema_decay: float | None = None,
    accumulate: int = 1,
) -> Callable:
    """The step (state, batch) -> state, metrics; jit it once, with the state donated.

    Args:
        loss: params, extra, batch, rng -> loss, (extra, metrics).
        tx: the optimiser.
        ema_decay: of the moving average, or None.
        accumulate: parts of a batch that pass one after the other, to save memory; the step takes
            the means of their losses, gradients and metrics, and `extra` goes from part to part.

    Raises:
        ValueError: by the step, a batch that `accumulate` does not divide.
    """
    gradient = _averaged(jax.value_and_grad(loss, has_aux=True), accumulate)

    def train_step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(state.rng, state.step)
        (value, (extra, metrics)), grads = gradient(state.params, state.extra, batch, rng)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay is not None:
            ema = jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, ema, params)
        keep = functools.partial(jnp.where, finite)
        bad_steps = jnp.where(finite, 0, state.bad_steps + 1)
        state = TrainState(
            step=state.step + 1,
            params=jax.tree.map(keep, params, state.params),
            extra=jax.tree.map(keep, extra, state.extra),
            opt_state=jax.tree.map(keep, opt_state, state.opt_state),
            ema=jax.tree.map(keep, ema, state.ema),
            rng=state.rng,
            bad_steps=bad_steps,
        )
        metrics = {**metrics, "loss": value, "grad_norm": norm, "bad_steps": bad_steps}
        return state, metrics

    return train_step


def _averaged(gradient, parts):
    """`gradient` of a batch as the mean over its parts; a part takes its rows from every device."""
    if parts == 1:
        return gradient

    def split(leaf):
        if leaf.shape[0] % parts:
            raise ValueError(
                f"a batch of {leaf.shape[0]} rows in {parts} parts: expected accumulate to divide "
                "the batch"
            )
        return jnp.moveaxis(leaf.reshape(-1, parts, *leaf.shape[1:]), 1, 0)

    def averaged(params, extra, batch, rng):
        def one(carry, part):
            extra, total = carry
            number, rows = part
            (value, (extra, metrics)), grads = gradient(
                params, extra, rows, jax.random.fold_in(rng, number)
            )
            return (extra, jax.tree.map(jnp.add, total, grads)), (value, metrics)

        first = extra, jax.tree.map(jnp.zeros_like, params)
        numbered = jnp.arange(parts), jax.tree.map(split, batch)
        (extra, total), (values, metrics) = jax.lax.scan(one, first, numbered)
        mean = functools.partial(jnp.mean, axis=0)
        grads = jax.tree.map(lambda leaf: leaf / parts, total)
        return (mean(values), (extra, jax.tree.map(mean, metrics))), grads

    return averaged
