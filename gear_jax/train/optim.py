"""AdamW by partition: what is trained, clipped, decayed and how fast, as lists of (regex, value).

Each partition has its own clip, so a loss that reaches one partition alone cannot change the update
of another (systems.md 1). Every parameter must be covered, or the run refuses to start.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

import jax
import optax

Table = Sequence[tuple[str, Any]]
FROZEN = "frozen"


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimiser; a regex matches a parameter's whole path, and the first that matches counts.

    Attributes:
        lr: greatest learning rate.
        warmup_steps: linear from 0.
        schedule: after the warm-up.
        num_steps: of the whole run; where "cosine" ends at 0.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: of Adam.
        partitions: (regex, name of the partition, or None to freeze).
        clip: global norm of each partition's gradient.
        lr_scale: (regex, factor of the learning rate); 1 where none matches.
        weight_decay: (regex, decay); 0 where none matches.
        accumulate: parts of a batch that pass one after the other, to save memory; where the loss
            is a mean over rows, this changes rounding alone.
    """

    lr: float
    warmup_steps: int
    num_steps: int
    partitions: Table
    schedule: Literal["constant", "cosine"] = "constant"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip: float = 1.0
    lr_scale: Table = ()
    weight_decay: Table = ()
    accumulate: int = 1


def learning_rate(config: OptimConfig) -> optax.Schedule:
    """Step -> learning rate.

    Raises:
        ValueError: an unknown schedule, or a warm-up that is longer than the run.
    """
    if not 0 <= config.warmup_steps <= config.num_steps:
        raise ValueError(
            f"warmup_steps is {config.warmup_steps}: expected 0 .. num_steps = {config.num_steps}"
        )
    if config.schedule == "constant":
        after = optax.constant_schedule(config.lr)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(
            config.lr, max(config.num_steps - config.warmup_steps, 1)
        )
    else:
        raise ValueError(f"schedule {config.schedule!r} is unknown: expected constant or cosine")
    warmup = optax.linear_schedule(0.0, config.lr, max(config.warmup_steps, 1))
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def labels(shapes: Any, table: Table) -> Any:
    """The partition of every parameter, in a tree like `shapes`; `FROZEN` for those that stay.

    Raises:
        ValueError: parameters that no pattern matches, or patterns that match none; all named.
    """
    unused = {pattern for pattern, _ in table}
    faults = []

    def one(name):
        for pattern, partition in table:
            if re.fullmatch(pattern, name):
                unused.discard(pattern)
                return FROZEN if partition is None else partition
        faults.append(f"{name} is in no partition")
        return FROZEN

    tree = _by_name(one, shapes)
    faults += [f"partition pattern {pattern!r} matches no parameter" for pattern in sorted(unused)]
    if faults:
        raise ValueError("; ".join(faults))
    return tree


def stop_frozen(params: Any, table: Table) -> Any:
    """The same parameters, those that stay without a gradient: their backward pass is left out."""
    return jax.tree.map(
        lambda x, label: jax.lax.stop_gradient(x) if label == FROZEN else x,
        params,
        labels(params, table),
    )


def make_tx(shapes: Any, config: OptimConfig) -> optax.GradientTransformation:
    """The optimiser of a parameter tree; frozen leaves get no moments.

    Raises:
        ValueError: a parameter in no partition, or a pattern without a parameter.
    """
    partition = labels(shapes, config.partitions)
    scale = _by_name(lambda name: _first(config.lr_scale, name, 1.0), shapes)
    decay = _by_name(lambda name: _first(config.weight_decay, name, 0.0), shapes)
    schedule = learning_rate(config)

    def adamw(name):
        def own(tree):
            return jax.tree.map(
                lambda value, label: value if label == name else optax.MaskedNode(), tree, partition
            )

        steps = [
            optax.clip_by_global_norm(config.clip),
            optax.scale_by_adam(config.b1, config.b2, config.eps),
        ]
        if config.weight_decay:
            steps.append(_decayed(own(decay)))
        if config.lr_scale:
            steps.append(_scaled(own(scale)))
        return optax.chain(*steps, optax.scale_by_learning_rate(schedule))

    names = sorted(set(jax.tree.leaves(partition)) - {FROZEN})
    parts = {name: adamw(name) for name in names}
    return optax.multi_transform({**parts, FROZEN: optax.set_to_zero()}, partition)


def _decayed(factors):
    def update(updates, params):
        return jax.tree.map(lambda u, p, f: u + f * p, updates, params, factors)

    return optax.stateless(update)


def _scaled(factors):
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: f * u, updates, factors))


def _first(table, name, default):
    return next((value for pattern, value in table if re.fullmatch(pattern, name)), default)


def _by_name(function, tree):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: function(jax.tree_util.keystr(path, simple=True, separator="/")), tree
    )
