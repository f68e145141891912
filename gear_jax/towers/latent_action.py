"""Latent-action towers: a clip of frames -> four vectors per transition, and back to frames.

The encoder is causal: what it says of the transition from frame i to i + 1 depends on frames up to
i + 1 alone. The decoder sees the first frame and the codes, never a later frame. Quantisation and
losses are plain functions (systems/latents.py). Source: GEAR-VLA 3.2, ported_models.md D (structure
of VideoWorld 2's tokenizer with a factorised causal transformer).
"""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from jax.ad_checkpoint import checkpoint_name

from gear_jax.towers import attention
from gear_jax.towers.dinov2 import PatchEmbed
from gear_jax.towers.stack import run_layers

WINDOWS = ("cumulative", "adjacent")
MODES = ("transitions", "lapa")
QUANTIZERS = ("ema", "fsq")
_SPREAD = 0.5  # of learned embeddings at the start: seen beside the content, not drowned in it


@dataclasses.dataclass(frozen=True)
class LatentActionConfig:
    """Sizes and choices (systems.md 2.4); the defaults are the full tokenizer's.

    Attributes:
        num_frames: F, of a clip at 5 Hz; F - 1 transitions.
        codes_per_transition: C.
        group_pattern: which group each of the C codes chooses from.
        codes_per_group: K.
        code_dim: of a code; with "fsq" log2(K) is used instead.
        window: what a transition sees: "cumulative", frames up to its end; "adjacent", its two.
        mode: "lapa" has one transition, from the first frame to the last.
        quantizer: "ema" codebook, or "fsq", which has none.
        target_dim: numbers per patch of a given target; None for pixels.
        target_pool: the pixels of the target are means over squares of this side. Coarse ones are
            learned sooner: where something is, before what it looks like.
    """

    image_size: int = 224
    patch_size: int = 14
    num_frames: int = 6
    width: int = 512
    num_heads: int = 8
    mlp_dim: int = 2048
    encoder_depth: int = 8
    query_depth: int = 2
    decoder_depth: int = 8
    codes_per_transition: int = 4
    group_pattern: tuple[int, ...] = (0, 0, 1, 1)
    codes_per_group: int = 8
    code_dim: int = 32
    window: str = "cumulative"
    mode: str = "transitions"
    quantizer: str = "ema"
    target_dim: int | None = None
    target_pool: int = 1
    attention: str = "xla"
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        """Check the choices.

        Raises:
            ValueError: all faults in one sentence.
        """
        faults = [
            f"{name} is {value!r}, expected one of {accepted}"
            for name, value, accepted in (
                ("window", self.window, WINDOWS),
                ("mode", self.mode, MODES),
                ("quantizer", self.quantizer, QUANTIZERS),
            )
            if value not in accepted
        ]
        if len(self.group_pattern) != self.codes_per_transition:
            faults.append(f"group_pattern {self.group_pattern}: expected "
                          f"{self.codes_per_transition} entries")  # fmt: skip
        if sorted(set(self.group_pattern)) != list(range(self.num_groups)):
            faults.append(f"group_pattern {self.group_pattern}: expected groups 0, 1, ...")
        if self.patch_size % self.target_pool:
            faults.append(
                f"target_pool is {self.target_pool}, expected a divisor of {self.patch_size}"
            )
        if self.image_size % self.patch_size or self.width % self.num_heads:
            faults.append("image_size must be patches, width must be heads")
        if self.quantizer == "fsq" and self.codes_per_group & (self.codes_per_group - 1):
            faults.append(f"fsq needs a power of two codes, not {self.codes_per_group}")
        if self.num_frames < 2:
            faults.append(f"num_frames is {self.num_frames}, expected at least 2")
        if faults:
            raise ValueError(f"LatentActionConfig: {'; '.join(faults)}")

    @property
    def num_groups(self):
        """G."""
        return max(self.group_pattern) + 1

    @property
    def num_transitions(self):
        """T."""
        return self.num_frames - 1 if self.mode == "transitions" else 1

    @property
    def num_patches(self):
        """P, of one frame."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def latent_dim(self):
        """Numbers in what is quantised."""
        return self.code_dim if self.quantizer == "ema" else self.codes_per_group.bit_length() - 1

    @property
    def output_dim(self):
        """Numbers that the decoder says of each patch."""
        return self.target_dim or 3 * (self.patch_size // self.target_pool) ** 2

    def targets(self):
        """Frames that the decoder reconstructs, int[T]: the end of each transition."""
        last = self.num_frames - 1
        return np.arange(1, last + 1) if self.mode == "transitions" else np.array([last])

    def ends(self):
        """Frames where transitions begin and end, int[T + 1]."""
        return np.concatenate([[0], self.targets()])

    def visible_frames(self):
        """bool[T, F]: which frames the queries of each transition see."""
        frame, end = np.arange(self.num_frames)[None], self.targets()[:, None]
        if self.mode == "lapa":
            return (frame == 0) | (frame == end)
        return (frame <= end) & ((frame >= end - 1) | (self.window == "cumulative"))


class _Attention(nn.Module):
    """Multi-head attention of queries to keys, with its projections.

    Where x has n times the rows of `memory`, n rows in turn read the same memory.
    """

    cfg: LatentActionConfig

    @nn.compact
    def __call__(self, x, memory, **options):
        c = self.cfg
        dense = functools.partial(nn.DenseGeneral, dtype=c.dtype, param_dtype=c.param_dtype)
        heads = (c.num_heads, c.width // c.num_heads)
        q = dense(heads, name="q")(x)
        k, v = dense(heads, name="k")(memory), dense(heads, name="v")(memory)
        k, v = (jnp.repeat(a, len(x) // len(memory), axis=0) for a in (k, v))
        y = attention.attend(q, k, v, backend=c.attention, **options)
        return dense(c.width, axis=(-2, -1), name="proj")(checkpoint_name(y, "attention"))


class _Mlp(nn.Module):
    """Two layers with GELU."""

    cfg: LatentActionConfig

    @nn.compact
    def __call__(self, x):
        c = self.cfg
        dense = functools.partial(nn.Dense, dtype=c.dtype, param_dtype=c.param_dtype)
        return dense(c.width, name="fc2")(nn.gelu(dense(c.mlp_dim, name="fc1")(x)))


def _norm(c, name):
    return nn.LayerNorm(1e-6, use_fast_variance=False, dtype=c.dtype, param_dtype=c.param_dtype,
                        name=name)  # fmt: skip


def _places(rng, shape, dtype):
    """Sines and cosines of row and column: neighbours begin alike."""
    del rng
    side, dim = int(shape[0] ** 0.5), shape[1]
    angles = np.arange(side)[:, None] / 10 ** (4 * np.arange(dim // 4) / (dim // 4))
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    rows, columns = np.repeat(line, side, axis=0), np.tile(line, (side, 1))
    return jnp.asarray(np.concatenate([rows, columns], axis=1), dtype)


class _SpaceTimeBlock(nn.Module):
    """Attention within each frame, then along time to the past, then an MLP."""

    cfg: LatentActionConfig

    @nn.compact
    def __call__(self, x, layer=None):
        """X [B, F, P, D]."""
        del layer
        c, (batch, frames, _, _) = self.cfg, x.shape
        y = rearrange(_norm(c, "space_norm")(x), "b f p d -> (b f) p d")
        y = _Attention(c, name="space")(y, y)
        x = x + rearrange(y, "(b f) p d -> b f p d", b=batch)
        y = rearrange(_norm(c, "time_norm")(x), "b f p d -> (b p) f d")
        y = _Attention(c, name="time")(y, y, causal=True)
        x = x + rearrange(y, "(b p) f d -> b f p d", f=frames, b=batch)
        x = x + _Mlp(c, name="mlp")(_norm(c, "mlp_norm")(x))
        return x, x, None


class _QueryBlock(nn.Module):
    """Queries of each transition read the frames that they may see."""

    cfg: LatentActionConfig

    @nn.compact
    def __call__(self, x, layer, memory, q_segments, kv_segments):
        """X [B T, C, D], memory [B, F P, D]."""
        del layer
        c = self.cfg
        y = _Attention(c, name="cross")(
            _norm(c, "cross_norm")(x), memory, q_segments=q_segments, kv_segments=kv_segments
        )
        x = x + y
        x = x + _Mlp(c, name="mlp")(_norm(c, "mlp_norm")(x))
        return x, x, None


class LatentEncoder(nn.Module):
    """A clip -> what is to be quantised."""

    cfg: LatentActionConfig

    @nn.compact
    def __call__(self, frames):
        """Features and latents of clips.

        Args:
            frames: float[B, F, H, W, 3], -1 .. 1.

        Returns:
            features [B, F, P, D], causal; latents float32[B, T, C, latent_dim].
        """
        c = self.cfg
        batch = len(frames)
        init = nn.initializers.normal(_SPREAD)
        place = self.param("place", _places, (c.num_patches, c.width), c.param_dtype)
        time = self.param("time", init, (c.num_frames, c.width), c.param_dtype)
        embed = PatchEmbed(c.width, c.patch_size, c.dtype, c.param_dtype, name="patch_embed")
        frames = frames.astype(c.dtype)
        change = jnp.diff(frames, axis=1, prepend=frames[:, :1])
        x = jnp.concatenate([frames, change], axis=-1)
        x = embed(rearrange(x, "b f h w c -> (b f) h w c"))
        x = rearrange(x, "(b f) p d -> b f p d", b=batch)
        x = x + place.astype(c.dtype)[None, None] + time.astype(c.dtype)[None, :, None]
        x, _, _ = run_layers(
            _SpaceTimeBlock(c, name="layers"), x, length=c.encoder_depth, remat=c.remat
        )
        features = _norm(c, "norm")(x)
        query = self.param("query", init, (c.codes_per_transition, c.width), c.param_dtype)
        order = self.param("order", init, (c.num_transitions, c.width), c.param_dtype)
        q = query.astype(c.dtype)[None] + order.astype(c.dtype)[:, None]  # [T, C, D]
        q = jnp.broadcast_to(q[None], (batch, *q.shape)).reshape(-1, *q.shape[1:])
        memory = rearrange(features, "b f p d -> b (f p) d")
        seen = np.repeat(c.visible_frames(), c.num_patches, axis=1).astype(np.int32)
        seen = jnp.tile(jnp.asarray(seen), (batch, 1))
        ones = jnp.ones(q.shape[:2], jnp.int32)
        q, _, _ = run_layers(
            _QueryBlock(c, name="queries"), q, None, memory, ones, seen, length=c.query_depth
        )
        latents = nn.Dense(c.latent_dim, param_dtype=c.param_dtype, name="to_latent")(
            _norm(c, "query_norm")(q).astype(jnp.float32)
        )
        return features, rearrange(latents, "(b t) c d -> b t c d", b=batch)


class _DecoderBlock(nn.Module):
    """Attention to the codes up to the frame to come, then within that frame, then an MLP."""

    cfg: LatentActionConfig

    @nn.compact
    def __call__(self, x, layer, codes, q_segments, kv_segments):
        """X [B T, P, D], codes [B, T C, D]."""
        del layer
        c = self.cfg
        x = x + _Attention(c, name="cross")(
            _norm(c, "cross_norm")(x), codes, q_segments=q_segments, kv_segments=kv_segments
        )
        y = _norm(c, "space_norm")(x)
        x = x + _Attention(c, name="space")(y, y)
        x = x + _Mlp(c, name="mlp")(_norm(c, "mlp_norm")(x))
        return x, x, None


class LatentDecoder(nn.Module):
    """The first frame and the codes -> the frames that follow; thrown away after training."""

    cfg: LatentActionConfig

    @nn.compact
    def __call__(self, first, base, codes):
        """What the end of each transition looks like.

        Args:
            first: [B, P, D], the encoder's features of frame 0, without gradient.
            base: float[B, P, output_dim], the target of frame 0, to which a change is added.
            codes: float[B, T, C, latent_dim], quantised.

        Returns:
            float32[B, T, P, output_dim]; that of transition i depends on codes up to i.
        """
        c = self.cfg
        batch, steps = codes.shape[:2]
        dense = functools.partial(nn.Dense, param_dtype=c.param_dtype)
        init = nn.initializers.normal(_SPREAD)
        place = self.param("place", _places, (c.num_patches, c.width), c.param_dtype)
        time = self.param("time", init, (c.num_transitions, c.width), c.param_dtype)
        slot = self.param("slot", init, (c.codes_per_transition, c.width), c.param_dtype)
        x = dense(c.width, dtype=c.dtype, name="from_features")(first.astype(c.dtype))
        x = x + dense(c.width, dtype=c.dtype, name="from_base")(base.astype(c.dtype))
        x = x + place.astype(c.dtype)[None]
        x = x[:, None] + time.astype(c.dtype)[None, :, None]  # [B, T, P, D]
        x = rearrange(x, "b t p d -> (b t) p d")
        y = dense(c.width, dtype=c.dtype, name="from_codes")(codes.astype(c.dtype))
        y = y + time.astype(c.dtype)[None, :, None] + slot.astype(c.dtype)[None, None]
        y = rearrange(y, "b t c d -> b (t c) d")
        past = np.arange(steps)[None] <= np.arange(steps)[:, None]
        past = np.repeat(past, c.codes_per_transition, axis=1).astype(np.int32)
        ones = jnp.ones(x.shape[:2], jnp.int32)
        x, _, _ = run_layers(
            _DecoderBlock(c, name="layers"),
            x,
            None,
            y,
            ones,
            jnp.tile(jnp.asarray(past), (batch, 1)),
            length=c.decoder_depth,
            remat=c.remat,
        )
        change = nn.Dense(
            c.output_dim,
            param_dtype=c.param_dtype,
            kernel_init=nn.initializers.zeros,
            name="to_target",
        )(_norm(c, "norm")(x).astype(jnp.float32))
        change = rearrange(change, "(b t) p d -> b t p d", b=batch)
        return base[:, None].astype(jnp.float32) + change


def pixel_targets(cfg, frames):
    """What the decoder reconstructs of frames [..., H, W, 3]: [..., P, output_dim]."""
    pool = cfg.target_pool
    coarse = reduce(frames, "... (r p) (c q) d -> ... r c d", "mean", p=pool, q=pool)
    return patches(coarse, cfg.patch_size // pool)


def patches(frames, patch_size):
    """Pixels [..., H, W, 3] -> [..., P, 3 * patch_size^2], row by row."""
    return rearrange(frames, "... (r p) (c q) d -> ... (r c) (p q d)", p=patch_size, q=patch_size)
