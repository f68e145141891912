"""The latent-action tokenizer as plain functions: quantise, reconstruct, keep the codebook alive.

    clip -> encoder -> z -> nearest codes -> decoder -> the frames that follow

The codebook is state, not a parameter: moving averages of the vectors that chose each code (EMA
VQ-VAE), on the unit sphere; a code that nobody chooses restarts at a vector of the batch. Latents
are standardised before that, by the batch in training and by moving averages after. Sums run over
the global batch, so any sharding gives the same codebook. Source: GEAR-VLA 3.2,
ported_models.md D3 and D4, systems.md 2.4.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gear_jax.towers.latent_action import LatentDecoder, LatentEncoder, pixel_targets

_TINY = 1e-6
_LEAST_VAR = 1e-8  # of a latent that is the same in every clip
_STILL = 1e-4  # squared error of copying the first frame below which a batch counts as still


@dataclasses.dataclass(frozen=True)
class LatentLossConfig:
    """Weights of the loss and the life of the codebook.

    Attributes:
        commitment: weight of |z - code|^2.
        entropy: weight of the codes' entropy: each choice certain, all choices equally frequent.
        temperature: of the choice whose entropy is taken.
        decay: of the codebook's moving averages.
        spread_decay: of the moving averages by which latents are standardised.
        restart_usage: a code whose share of choices falls below this part of an even share ...
        restart_steps: ... for so many steps, restarts; 0 never restarts.
        standardize: False leaves latents as the encoder made them; they then collapse easily.
        fade_steps: steps over which quantisation, commitment and entropy are faded in: the decoder
            first reads the latents themselves, and so learns what is worth a code.
    """

    commitment: float = 0.05
    entropy: float = 0.05
    temperature: float = 0.1
    decay: float = 0.99
    spread_decay: float = 0.8
    restart_usage: float = 0.1
    restart_steps: int = 50
    standardize: bool = True
    fade_steps: int = 0


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
    """The state that is not learned by gradient.

    Returns:
        steps float32[]; mean, var float32[T, C, d] of each latent and their weight, not yet
        divided by it; with "ema" also codes float32[G, K, d] on the unit sphere, their moving
        count and sum, and idle int32[G, K], steps without enough choices.
    """
    shape = (cfg.num_transitions, cfg.codes_per_transition, cfg.latent_dim)
    zero = jnp.zeros(())
    spread = {"mean": jnp.zeros(shape), "var": jnp.zeros(shape), "weight": zero, "steps": zero}
    if cfg.quantizer == "fsq":
        return spread
    shape = (cfg.num_groups, cfg.codes_per_group, cfg.code_dim)
    codes = _unit(jax.random.normal(rng, shape))
    return {
        **spread,
        "codes": codes,
        "count": jnp.ones(shape[:2]),
        "sum": codes,
        "idle": jnp.zeros(shape[:2], jnp.int32),
    }


def standardize(codebook, z):
    """Latents in units of their own spread: what is the same in every clip tells nothing.

    Without this, commitment is satisfied best by an encoder that says the same of every clip.

    Args:
        codebook: state; nothing is changed before the first update.
        z: float32[B, T, C, d].
    """
    weight = jnp.maximum(codebook["weight"], _TINY)
    var = jnp.where(codebook["weight"] > 0, codebook["var"] / weight, 1.0)
    return _scaled(z, codebook["mean"] / weight, var)


def _scaled(z, mean, var):
    return (z - mean[None]) * jax.lax.rsqrt(var + _LEAST_VAR)[None]


def quantize(cfg, codebook, z):
    """The nearest code of each latent.

    Args:
        cfg: LatentActionConfig.
        codebook: state of `init_codebook`.
        z: float32[..., C, latent_dim], standardised.

    Returns:
        ids int32[..., C], 0 .. G * K - 1, group by group; codes float32[..., C, latent_dim], whose
        gradient is z's (straight through); z as it was compared, on the sphere for "ema".
    """
    groups = np.array(cfg.group_pattern)
    near = similarity(cfg, codebook, z)
    local = jnp.argmax(near, axis=-1)
    chosen = jax.nn.one_hot(local, cfg.codes_per_group)
    codes = jnp.einsum("...ck,ckd->...cd", chosen, _table(cfg, codebook))
    z = _bounded(cfg, z)
    ids = local + cfg.codes_per_group * groups.reshape((1,) * (local.ndim - 1) + (-1,))
    return ids.astype(jnp.int32), z + jax.lax.stop_gradient(codes - z), z


def similarity(cfg, codebook, z):
    """How near each latent is to each code of its group: [..., C, d] -> [..., C, K], 1 at most."""
    near = jnp.einsum("...cd,ckd->...ck", _bounded(cfg, z), _table(cfg, codebook))
    return near / cfg.latent_dim if cfg.quantizer == "fsq" else near


def _bounded(cfg, z):
    """On the unit sphere for "ema", in the cube for "fsq"."""
    return jnp.tanh(z) if cfg.quantizer == "fsq" else _unit(z)


def _table(cfg, codebook):
    """Codes of each place, float32[C, K, d]; those of "fsq" are the corners of the cube."""
    if cfg.quantizer == "fsq":
        bits = np.arange(cfg.codes_per_group)[:, None] >> np.arange(cfg.latent_dim) & 1
        corners = jnp.asarray(2.0 * bits - 1, jnp.float32)
        return jnp.broadcast_to(corners, (cfg.codes_per_transition, *corners.shape))
    return codebook["codes"][np.array(cfg.group_pattern)]


def encode(params, cfg, codebook, frames):
    """Ids int32[B, T, C] of clips float[B, F, H, W, 3] in -1 .. 1."""
    _, z = LatentEncoder(cfg).apply({"params": params["encoder"]}, frames)
    return quantize(cfg, codebook, standardize(codebook, z))[0]


def decode(params, cfg, first, base, codes):
    """Targets float32[B, T, P, output_dim] from the first frame and quantised codes."""
    return LatentDecoder(cfg).apply({"params": params["decoder"]}, first, base, codes)


def loss(params, cfg, codebook, frames, mask, config, rng, targets=None):
    """Reconstruction, commitment and entropy, and the codebook after this batch.

    The reconstruction's squared error is taken relative to that of copying the first frame, so the
    weights mean the same for pixels and features and for quick and slow clips.

    Args:
        params: {"encoder", "decoder"}.
        cfg: LatentActionConfig.
        codebook: state.
        frames: float[B, F, H, W, 3], -1 .. 1.
        mask: bool[B, T], transitions to learn from.
        config: LatentLossConfig.
        rng: key, the same on every host.
        targets: float[B, F, P, target_dim], frozen features of each frame, where they are the
            target; else the pixels are.

    Returns:
        the loss; (the new codebook, metrics): reconstruction, relative as above, commitment,
        perplexity float32[G] of the batch.
    """
    features, z = LatentEncoder(cfg).apply({"params": params["encoder"]}, frames)
    spread = {}
    if config.standardize:
        mean, var = _moments(z, mask)
        spread = _averaged(codebook, mean, var, config.spread_decay)
        z = _scaled(z, mean, var)
    near = similarity(cfg, codebook, z)
    ids, codes, z = quantize(cfg, codebook, z)
    if targets is None:
        targets = pixel_targets(cfg, frames)
    first = jax.lax.stop_gradient(features[:, 0])
    hard = jnp.clip(codebook["steps"] / max(config.fade_steps, 1), float(not config.fade_steps), 1)
    codes = hard * codes + (1 - hard) * z  # what the decoder reads, and what pulls at z
    predicted = decode(params, cfg, first, targets[:, 0], codes)
    error, copied = (_mean(x, mask) for x in _errors(cfg, predicted, targets))
    pull = jnp.sum((z - jax.lax.stop_gradient(codes)) ** 2, axis=-1).mean(axis=-1)
    commitment = _mean(pull, mask)
    relative = error / jnp.maximum(copied, _STILL)
    total = relative + hard * config.commitment * commitment
    if config.entropy:
        total = total - hard * config.entropy * _decisiveness(near / config.temperature, mask)
    z = jax.lax.stop_gradient(z)
    codebook = {**update_codebook(cfg, config, codebook, ids, z, mask, rng), **spread}
    codebook["steps"] = codebook["steps"] + 1
    perplexity = usage(counts(cfg, ids, mask))["perplexity"]
    metrics = {"reconstruction": relative, "commitment": commitment, "perplexity": perplexity}
    return total, (codebook, metrics)


def _errors(cfg, predicted, targets):
    """Squared errors float32[B, T] of the decoder, and of copying the first frame."""
    wanted = targets[:, cfg.targets()].astype(jnp.float32)
    return tuple(
        jnp.square(x - wanted).mean(axis=(-2, -1))
        for x in (predicted, targets[:, :1].astype(jnp.float32))
    )


def _moments(z, mask):
    """Mean and variance [T, C, d] over the clips of the global batch that the mask shows."""
    weight = mask.astype(jnp.float32)[..., None, None]
    total = jnp.maximum(weight.sum(axis=0), 1.0)
    mean = (z * weight).sum(axis=0) / total
    return mean, (jnp.square(z - mean[None]) * weight).sum(axis=0) / total


def _averaged(codebook, mean, var, decay):
    """Moving averages of both, with the weight they have gathered."""
    fresh = {"mean": mean, "var": var, "weight": jnp.ones(())}
    fresh = jax.lax.stop_gradient(fresh)
    return {k: decay * codebook[k] + (1 - decay) * new for k, new in fresh.items()}


def _decisiveness(logits, mask):
    """Entropy of the mean choice minus mean entropy of a choice, in nats (ported_models.md D4)."""
    odds = jax.nn.softmax(logits)
    weight = mask.astype(jnp.float32)[..., None, None]
    mean = (odds * weight).sum(axis=(0, 1)) / jnp.maximum(weight.sum(), 1.0)  # [C, K]
    return _entropy(mean).mean() - _mean(_entropy(odds).mean(axis=-1), mask)


def _entropy(odds):
    return -jnp.sum(odds * jnp.log(odds + 1e-9), axis=-1)


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
    counted, sums, spare = [], [], []
    for group in range(cfg.num_groups):
        places = np.flatnonzero(groups == group)
        local = ids[..., places] - group * cfg.codes_per_group
        chosen = jax.nn.one_hot(local, cfg.codes_per_group) * weight[..., None]
        counted.append(chosen.sum(axis=(0, 1, 2)))
        sums.append(jnp.einsum("btck,btcd->kd", chosen, z[..., places, :]))
        rows = z[..., places, :].reshape(-1, z.shape[-1])
        odds = jnp.broadcast_to(weight, (*mask.shape, len(places))).reshape(-1)
        odds = jnp.where(odds.sum() > 0, odds, 1.0)
        key = jax.random.fold_in(rng, group)
        picked = jax.random.choice(key, len(rows), (cfg.codes_per_group,), p=odds / odds.sum())
        spare.append(rows[picked])
    count, total, spare = jnp.stack(counted), jnp.stack(sums), jnp.stack(spare)
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
        **codebook,
        "codes": jnp.where(restart[..., None], spare, codes),
        "count": jnp.where(restart, even, kept),
        "sum": jnp.where(restart[..., None], spare * even[..., None], summed),
        "idle": jnp.where(restart, 0, idle),
    }


def measure(params, cfg, codebook, frames, mask, targets=None):
    """Sums over a batch from which `summary` makes the monitors; add those of more batches.

    Args:
        params: {"encoder", "decoder"}.
        cfg: LatentActionConfig.
        codebook: state.
        frames: float[B, F, H, W, 3], -1 .. 1; B is at least 2.
        mask: bool[B, T].
        targets: as in `loss`.

    Returns:
        number of transitions; summed squared errors of the decoder, of copying the first frame and
        of the decoder with another clip's codes; counts float32[G, K].
    """
    features, z = LatentEncoder(cfg).apply({"params": params["encoder"]}, frames)
    ids, codes, _ = quantize(cfg, codebook, standardize(codebook, z))
    if targets is None:
        targets = pixel_targets(cfg, frames)
    predict = functools.partial(decode, params, cfg, features[:, 0], targets[:, 0])
    error, copied = _errors(cfg, predict(codes), targets)
    shuffled, _ = _errors(cfg, predict(jnp.roll(codes, 1, axis=0)), targets)
    weight = mask.astype(jnp.float32)
    return {
        "number": weight.sum(),
        "error": jnp.sum(error * weight),
        "copied": jnp.sum(copied * weight),
        "shuffled": jnp.sum(shuffled * weight),
        "counts": counts(cfg, ids, mask),
    }


def summary(sums):
    """Monitors from the sums of `measure`.

    Returns:
        reconstruction: error relative to copying the first frame; gain_db: the same in decibels;
        shuffled: error with another clip's codes relative to that with the clip's own, 1 when the
        decoder does not read them; per group perplexity, used codes and entropy, bits.
    """
    error = jnp.maximum(sums["error"], _TINY)
    relative = error / jnp.maximum(sums["copied"], _TINY)
    return {
        "reconstruction": relative,
        "gain_db": -10 * jnp.log10(relative),
        "shuffled": sums["shuffled"] / error,
        **usage(sums["counts"]),
    }


def counts(cfg, ids, mask):
    """How often each code of each group was chosen, float32[G, K], of ids int32[B, T, C]."""
    weight = mask[..., None, None].astype(jnp.float32)
    chosen = jax.nn.one_hot(ids, cfg.num_groups * cfg.codes_per_group) * weight
    return chosen.sum(axis=(0, 1, 2)).reshape(cfg.num_groups, cfg.codes_per_group)


def usage(counted) -> dict[str, Any]:
    """Per group perplexity float32[G], entropy in bits float32[G] and used codes int32[G].

    A group of K codes has a perplexity of K when all are equally frequent and 1 when it has
    collapsed.
    """
    share = counted / jnp.maximum(counted.sum(axis=1, keepdims=True), 1)
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-9)), 0.0), axis=1)
    return {
        "perplexity": jnp.exp(entropy),
        "entropy": entropy / np.log(2),
        "used": (counted > 0).sum(axis=1),
    }


def legal_ids(cfg):
    """bool[T * C, G * K]: ids that each place of the generated sequence may take."""
    groups = np.tile(cfg.group_pattern, cfg.num_transitions)
    owner = np.repeat(np.arange(cfg.num_groups), cfg.codes_per_group)
    return groups[:, None] == owner[None]


def _mean(values, mask):
    weight = mask.astype(jnp.float32)
    return jnp.sum(values * weight) / jnp.maximum(weight.sum(), 1.0)


def _unit(x):
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _TINY**2)
