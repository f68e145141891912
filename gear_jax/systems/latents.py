"""The latent-action tokenizer as plain functions: quantise, reconstruct, keep the codebook alive.

    clip -> encoder -> z -> nearest codes -> decoder -> the frames that follow

The codebook is state, not a parameter: moving averages of the vectors that chose each code (EMA
VQ-VAE), on the unit sphere; a code that nobody chooses restarts at a vector of the batch. Sums run
over the global batch, so any sharding gives the same codebook. Source: GEAR-VLA 3.2,
ported_models.md D3 and D4, systems.md 2.4.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gear_jax.towers.latent_action import LatentDecoder, LatentEncoder, patches

_TINY = 1e-6


@dataclasses.dataclass(frozen=True)
class LatentLossConfig:
    """Weights of the loss and the life of the codebook.

    Attributes:
        commitment: weight of |z - code|^2.
        decay: of the codebook's moving averages.
        restart_usage: a code whose share of choices falls below this part of an even share ...
        restart_steps: ... for so many steps, restarts; 0 never restarts.
    """

    commitment: float = 0.25
    decay: float = 0.99
    restart_usage: float = 0.1
    restart_steps: int = 50


def init(cfg, rng):
    """Random parameters {"encoder", "decoder"} and a codebook state."""
    keys = jax.random.split(rng, 3)
    side = cfg.image_size
    frames = jnp.zeros((1, cfg.num_frames, side, side, 3))
    first = jnp.zeros((1, cfg.num_patches, cfg.width))
    base = jnp.zeros((1, cfg.num_patches, cfg.output_dim))
    codes = jnp.zeros((1, cfg.num_transitions, cfg.codes_per_transition, cfg.latent_dim))
    params = {
        "encoder": LatentEncoder(cfg).init(keys[0], frames)["params"],
        "decoder": LatentDecoder(cfg).init(keys[1], first, base, codes)["params"],
    }
    return params, init_codebook(cfg, keys[2])


def init_codebook(cfg, rng):
    """Codes float32[G, K, d] on the unit sphere, and their moving averages; {} for "fsq"."""
    if cfg.quantizer == "fsq":
        return {}
    shape = (cfg.num_groups, cfg.codes_per_group, cfg.code_dim)
    codes = _unit(jax.random.normal(rng, shape))
    return {
        "codes": codes,
        "count": jnp.ones(shape[:2]),
        "sum": codes,
        "idle": jnp.zeros(shape[:2], jnp.int32),
    }


def quantize(cfg, codebook, z):
    """The nearest code of each latent.

    Args:
        cfg: LatentActionConfig.
        codebook: state of `init_codebook`.
        z: float32[..., C, latent_dim].

    Returns:
        ids int32[..., C], 0 .. G * K - 1, group by group; codes float32[..., C, latent_dim], whose
        gradient is z's (straight through); z as it was compared, on the sphere for "ema".
    """
    groups = np.array(cfg.group_pattern)
    if cfg.quantizer == "fsq":
        z = jnp.tanh(z)
        bits = z > 0
        places = 2 ** np.arange(cfg.latent_dim)
        local = jnp.einsum("...cd,d->...c", bits.astype(jnp.int32), places)
        codes = jnp.where(bits, 1.0, -1.0)
    else:
        z = _unit(z)
        table = codebook["codes"][groups]  # [C, K, d]
        local = jnp.argmax(jnp.einsum("...cd,ckd->...ck", z, table), axis=-1)
        chosen = jax.nn.one_hot(local, cfg.codes_per_group)
        codes = jnp.einsum("...ck,ckd->...cd", chosen, table)
    ids = local + cfg.codes_per_group * groups.reshape((1,) * (local.ndim - 1) + (-1,))
    return ids.astype(jnp.int32), z + jax.lax.stop_gradient(codes - z), z


def encode(params, cfg, codebook, frames):
    """Ids int32[B, T, C] of clips float[B, F, H, W, 3] in -1 .. 1."""
    _, z = LatentEncoder(cfg).apply({"params": params["encoder"]}, frames)
    return quantize(cfg, codebook, z)[0]


def loss(params, cfg, codebook, frames, mask, config, targets=None):
    """Reconstruction and commitment.

    Args:
        params: {"encoder", "decoder"}.
        cfg: LatentActionConfig.
        codebook: state.
        frames: float[B, F, H, W, 3], -1 .. 1.
        mask: bool[B, T], transitions to learn from.
        config: LatentLossConfig.
        targets: float[B, F, P, target_dim], frozen features of each frame, where they are the
            target; else the pixels are.

    Returns:
        the loss; a dictionary: ids int32[B, T, C] and z float32[B, T, C, d] for `update_codebook`,
        and the monitors reconstruction, copy_first (its error when nothing moves) and commitment.
    """
    features, z = LatentEncoder(cfg).apply({"params": params["encoder"]}, frames)
    ids, codes, z = quantize(cfg, codebook, z)
    if targets is None:
        targets = patches(frames, cfg.patch_size)
    first = jax.lax.stop_gradient(features[:, 0])
    predicted = decode(params, cfg, first, targets[:, 0], codes)
    wanted = targets[:, cfg.targets()].astype(jnp.float32)
    error = _mean(jnp.abs(predicted - wanted).mean(axis=(-2, -1)), mask)
    copied = _mean(jnp.abs(targets[:, :1] - wanted).mean(axis=(-2, -1)), mask)
    pull = jnp.sum((z - jax.lax.stop_gradient(codes)) ** 2, axis=-1).mean(axis=-1)
    commitment = _mean(pull, mask)
    total = error + config.commitment * commitment
    return total, {
        "ids": ids,
        "z": jax.lax.stop_gradient(z),
        "reconstruction": error,
        "copy_first": copied,
        "commitment": commitment,
    }


def decode(params, cfg, first, base, codes):
    """Targets float32[B, T, P, output_dim] from the first frame and quantised codes."""
    return LatentDecoder(cfg).apply({"params": params["decoder"]}, first, base, codes)


def update_codebook(cfg, config, codebook, ids, z, mask, rng):
    """The codebook after one batch.

    Args:
        cfg: LatentActionConfig.
        config: LatentLossConfig.
        codebook: state.
        ids: int32[B, T, C], of the whole batch.
        z: float32[B, T, C, d].
        mask: bool[B, T].
        rng: key, the same on every host.

    Returns:
        The new state; a code that too few chose for too long is now a random z of the batch.
    """
    if cfg.quantizer == "fsq":
        return codebook
    groups = np.array(cfg.group_pattern)
    weight = mask[..., None].astype(jnp.float32)
    counts, sums, spare = [], [], []
    for group in range(cfg.num_groups):
        places = np.flatnonzero(groups == group)
        local = ids[..., places] - group * cfg.codes_per_group
        chosen = jax.nn.one_hot(local, cfg.codes_per_group) * weight[..., None]
        counts.append(chosen.sum(axis=(0, 1, 2)))
        sums.append(jnp.einsum("btck,btcd->kd", chosen, z[..., places, :]))
        rows = z[..., places, :].reshape(-1, z.shape[-1])
        odds = jnp.broadcast_to(weight, (*mask.shape, len(places))).reshape(-1)
        odds = jnp.where(odds.sum() > 0, odds, 1.0)
        key = jax.random.fold_in(rng, group)
        picked = jax.random.choice(key, len(rows), (cfg.codes_per_group,), p=odds / odds.sum())
        spare.append(rows[picked])
    count, total, spare = jnp.stack(counts), jnp.stack(sums), jnp.stack(spare)
    decay = config.decay
    kept = decay * codebook["count"] + (1 - decay) * count
    summed = decay * codebook["sum"] + (1 - decay) * total
    share = kept / jnp.maximum(kept.sum(axis=1, keepdims=True), _TINY)
    unused = share < config.restart_usage / cfg.codes_per_group
    idle = jnp.where(unused, codebook["idle"] + 1, 0)
    restart = idle >= config.restart_steps if config.restart_steps else jnp.zeros_like(unused)
    even = kept.mean(axis=1, keepdims=True)
    codes = _unit(summed)
    return {
        "codes": jnp.where(restart[..., None], spare, codes),
        "count": jnp.where(restart, even, kept),
        "sum": jnp.where(restart[..., None], spare * even[..., None], summed),
        "idle": jnp.where(restart, 0, idle),
    }


def usage(cfg, ids, mask) -> dict[str, Any]:
    """Monitors of what is chosen: per group perplexity float32[G] and used codes int32[G].

    A group of K codes has a perplexity of K when all are equally frequent and 1 when it has
    collapsed.
    """
    groups = np.array(cfg.group_pattern)
    weight = mask[..., None, None].astype(jnp.float32)
    perplexity, used = [], []
    for group in range(cfg.num_groups):
        local = ids[..., np.flatnonzero(groups == group)] - group * cfg.codes_per_group
        counts = (jax.nn.one_hot(local, cfg.codes_per_group) * weight).sum(axis=(0, 1, 2))
        share = counts / jnp.maximum(counts.sum(), 1)
        entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-9)), 0.0))
        perplexity.append(jnp.exp(entropy))
        used.append((counts > 0).sum())
    return {"perplexity": jnp.stack(perplexity), "used": jnp.stack(used)}


def legal_ids(cfg):
    """bool[T * C, G * K]: ids that each place of the generated sequence may take."""
    groups = np.tile(cfg.group_pattern, cfg.num_transitions)
    owner = np.repeat(np.arange(cfg.num_groups), cfg.codes_per_group)
    return groups[:, None] == owner[None]


def _mean(values, mask):
    weight = mask.astype(jnp.float32)
    return jnp.sum(values * weight) / jnp.maximum(weight.sum(), 1.0)


def _unit(x):
    return x / jnp.maximum(jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True)), _TINY)
