"""What a run will do, before it does it: faults of the config, who trains what, how much work.

`validate` refuses combinations that train nothing; `describe` prints which loss reaches which
tower, found by tracing the gradient, not by belief.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections

from gear_jax.data.sequences import SequenceConfig
from gear_jax.systems import gear
from gear_jax.systems.gear import GearConfig
from gear_jax.train.optim import FROZEN, OptimConfig, labels
from gear_jax.types import VIEWS


def validate(config: ml_collections.ConfigDict) -> None:
    """Refuse a config whose parts contradict each other.

    Raises:
        ValueError: all faults in one sentence.
    """
    model, faults = config.model, []
    expert = model.expert is not None
    if expert and model.latents == "none" and "latent" in model.kv_sources:
        faults.append(
            f"model.latents is 'none' and model.kv_sources {tuple(model.kv_sources)} has 'latent'"
        )
    trained = next((label for pattern, label in config.optim.partitions
                    if re.fullmatch(pattern, "learned/latents")), None)  # fmt: skip
    idle = trained is not None and not model.with_fast and not model.joint_grad
    if model.latents == "learned" and idle:
        faults.append(
            "model.latents is 'learned' and model.with_fast is False: nothing trains the learned "
            "latents, for the flow loss is stopped before them; expected latents 'none' and "
            "kv_sources ('image', 'text', 'state')"
        )
    if model.through_latents and (model.latents != "codes" or not model.scrambled):
        faults.append(
            f"model.through_latents is set, model.latents is {model.latents!r} and model.scrambled "
            f"is {model.scrambled}: expected 'codes' and more than 0, which draws their codes"
        )
    window = model.vision.window_size
    if model.image_size % window:
        faults.append(f"model.image_size is {model.image_size}: expected a multiple of {window}")
    if faults:
        raise ValueError(f"config: {'; '.join(faults)}")


def reached(
    init: Callable, loss: Callable, batch: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, set[str]]:
    """Parameters that each loss has a gradient for: {"tokens", "flow"} -> names.

    By the traced gradient: a parameter that a loss cannot reach has a constant zero there. A branch
    behind a zero-initialised map counts as reached.

    Args:
        init: rng -> params, extra; of a stage.
        loss: params, extra, batch, rng -> loss, (extra, metrics); of a stage.
        batch: shapes.
    """
    params, extra = jax.eval_shape(init, jax.random.key(0))
    names = list(_named(params))
    rng = jax.eval_shape(lambda: jax.random.key(0))
    known = jax.eval_shape(loss, params, extra, batch, rng)[1][1]
    made = {}
    for name in (one for one in ("tokens", "flow") if one in known):

        def value(params, batch, rng, name=name):
            return loss(params, extra, batch, rng)[1][1][name]

        jaxpr = jax.make_jaxpr(jax.grad(value))(params, batch, rng).jaxpr
        zeros = {
            eqn.outvars[0]
            for eqn in jaxpr.eqns
            if eqn.primitive.name == "broadcast_in_dim"
            and hasattr(eqn.invars[0], "val")
            and eqn.invars[0].val == 0
        }
        made[name] = {
            name
            for name, var in zip(names, jaxpr.outvars, strict=True)
            if not hasattr(var, "val") and var not in zeros
        }
    return made


def describe(
    config: ml_collections.ConfigDict,
    optim: OptimConfig,
    init: Callable,
    loss: Callable,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    mesh: jax.sharding.Mesh,
) -> str:
    """The plan of a run as lines of text.

    Args:
        config: of the run.
        optim: its optimiser.
        init: of the stage.
        loss: of the stage.
        batch: shapes of one row.
        mesh: of the run.

    Raises:
        ValueError: a trainable parameter that no loss reaches.
    """
    params, _ = jax.eval_shape(init, jax.random.key(0))
    reach = reached(init, loss, batch)
    partition = _named(labels(params, optim.partitions))
    sizes = {name: math.prod(leaf.shape) for name, leaf in _named(params).items()}
    everything = set().union(*reach.values())
    lines, idle = [f"stage {config.stage}, {optim.num_steps} steps, lr {optim.lr:g}"], []
    lines.append(f"{'tower':<12}{'parameters':>16}  {'trained':<18}{'reached by'}")
    for tower in params:
        mine = [name for name in partition if name.split("/")[0] == tower]
        kinds = sorted({partition[name] for name in mine})
        trained = {name for name in mine if partition[name] != FROZEN}
        losses = [loss for loss, names in reach.items() if names & trained]
        idle += sorted(trained - everything)
        count = sum(sizes[name] for name in mine)
        lines.append(f"{tower:<12}{count:>16,}  {'+'.join(kinds):<18}{', '.join(losses) or '-'}")
    if idle:
        raise ValueError(f"config: trainable, and no loss reaches them: {', '.join(idle[:5])}")
    rows, devices, parts = config.data.batch_size, mesh.devices.size, optim.accumulate
    lines.append(
        f"rows of {batch['tokens'].shape[1]} tokens; batch {rows} = {devices} devices x "
        f"{rows / devices / parts:g} rows x {parts} parts; mesh {dict(mesh.shape)}"
    )
    return "\n".join(lines)


def _named(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def flops_per_sample(
    cfg: GearConfig,
    sequence: SequenceConfig,
    tokens: int,
    partitions: Sequence[tuple[str, Any]],
) -> float:
    """Model FLOPs of training on one sample, without remat or padding.

    A matrix product of n parameters costs 2 n for each token, 6 n with its backward pass; causal
    attention counts half. A frozen vision or geometry tower costs its forward pass only. Embedding,
    head and attention inside a view are left out (about 2 %).

    Args:
        cfg: GearConfig.
        sequence: of its rows.
        tokens: that a row really has.
        partitions: of the optimiser, to see what is frozen.
    """
    shapes = jax.eval_shape(functools.partial(gear.init, cfg), jax.random.key(0))
    named = _named(shapes)

    def weights(pattern):
        return sum(math.prod(x.shape) for name, x in named.items() if re.fullmatch(pattern, name))

    def passes(tower):
        frozen = any(re.fullmatch(p, f"{tower}/x") and label is None for p, label in partitions)
        return 1 if frozen else 3

    vision, language, expert = cfg.vlm.vision, cfg.vlm.language, cfg.expert
    patches = len(VIEWS) * math.prod(sequence.view_grid) * vision.spatial_merge**2
    total = passes("vision") * 2.0 * weights("vision/.*kernel") * patches
    if cfg.vlm.geometry is not None:
        width, depth = cfg.vlm.geometry.width, cfg.vlm.geometry.depth
        dense = 2.0 * weights("geometry/.*kernel") * patches
        across = 4.0 * depth * width * patches**2
        total += passes("geometry") * (dense + across)
    total += 3 * 2.0 * weights("projector/.*kernel") * patches / vision.spatial_merge**2
    dense = 2.0 * weights("language/layers/.*kernel") * tokens
    attention = 2.0 * language.depth * language.num_heads * language.head_dim * tokens**2
    total += 3 * (dense + attention)
    if expert is not None:
        total += 3 * 2.0 * weights("expert/.*kernel") * expert.chunk_len * cfg.flow_draws
    return total
