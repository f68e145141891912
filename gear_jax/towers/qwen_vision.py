"""Qwen2.5-VL's vision tower: patches in attention-window order -> one feature per patch.

Patches come as [B, W, S, P]: B rows, W windows, S slots a window (64 for 112 px), so that window
attention is attention inside the third axis and full attention is attention over W * S. Ragged
image sizes are empty slots, told apart by `segments`; `data/patch_windows.py` makes that layout.
Images whose sides are multiples of 112 px (GEAR: 448 px, 16 windows of 64) need no segments at all:
`window_patches` is one reshape. The merger is the projector tower. Source: ported_models.md A4.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from gear_jax.towers import attention
from gear_jax.towers.stack import run_layers


@dataclasses.dataclass(frozen=True)
class QwenVisionConfig:
    """Sizes of the vision tower; the defaults are those of the released 3B and 7B models."""

    depth: int = 32
    width: int = 1280
    num_heads: int = 16
    mlp_dim: int = 3420
    full_attention_layers: tuple[int, ...] = (7, 15, 23, 31)
    patch_size: int = 14
    temporal_patch: int = 2
    spatial_merge: int = 2
    window_size: int = 112  # pixels
    channels: int = 3
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    attention: str = "xla"
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @property
    def head_dim(self):
        """Channels of one head, H."""
        return self.width // self.num_heads

    @property
    def window(self):
        """Merged units along one side of a window (4 for 112 px)."""
        return self.window_size // self.patch_size // self.spatial_merge

    @property
    def patch_dim(self):
        """Values of one patch row: channels x two frames x pixels."""
        return self.channels * self.temporal_patch * self.patch_size**2


class _Block(nn.Module):
    cfg: QwenVisionConfig

    @nn.compact
    def __call__(self, x, is_full, angles, segments):
        c = self.cfg
        dense = functools.partial(nn.DenseGeneral, dtype=c.dtype, param_dtype=c.param_dtype)
        norm = functools.partial(
            nn.RMSNorm, epsilon=c.norm_eps, dtype=c.dtype, param_dtype=c.param_dtype
        )
        y = norm(name="attn_norm")(x)
        qkv = dense((3, c.num_heads, c.head_dim), name="qkv")(y)  # [B, W, S, 3, N, H]
        y = jax.lax.cond(
            is_full,
            functools.partial(_attend, pattern="b w s -> b (w s)", backend=c.attention),
            functools.partial(_attend, pattern="b w s -> (b w) s", backend=c.attention),
            qkv,
            angles,
            segments,
        )
        y = checkpoint_name(y, "attention")
        x = x + dense(c.width, axis=(-2, -1), name="proj")(y)
        y = norm(name="mlp_norm")(x)
        y = nn.silu(dense(c.mlp_dim, name="gate")(y)) * dense(c.mlp_dim, name="up")(y)
        x = x + dense(c.width, name="down")(y)
        return x, x, None


def _attend(qkv, angles, segments, *, pattern, backend):
    """Attention within windows or over the whole row, as `pattern` groups the slots."""
    batch, windows, slots = qkv.shape[:3]
    before, after = pattern.split(" -> ")
    group = functools.partial(rearrange, pattern=f"{before} ... -> {after} ...")
    q, k, v = (group(qkv[:, :, :, i]) for i in range(3))
    angles = group(angles)
    segments = None if segments is None else group(segments)
    q, k = attention.rotate(q, angles), attention.rotate(k, angles)
    y = attention.attend(q, k, v, backend=backend, q_segments=segments, kv_segments=segments)
    return y.reshape(batch, windows, slots, *y.shape[2:])


class QwenVision(nn.Module):
    """The tower: patch embedding and `depth` blocks; the module's first lines tell the layout."""

    cfg: QwenVisionConfig

    @nn.compact
    def __call__(self, patches, positions, segments=None, taps=()):
        """Features of all patches.

        Args:
            patches: float[B, W, S, P], normalised pixels in (channel, frame, row, column) order, or
                [B, W, S, P/2] without the frame axis for still images, whose two frames are equal.
            positions: int32[B, W, S, 2], row and column of each patch in its image.
            segments: int32[B, W, S], one number per image frame and -1 for empty slots; None when
                every row is one full image.
            taps: blocks whose output is returned as well.

        Returns:
            [B, W, S, D], and the taps [len(taps), B, W, S, D].
        """
        c = self.cfg
        init = nn.initializers.lecun_normal()
        kernel = self.param("patch_embed", init, (c.patch_dim, c.width), c.param_dtype)
        if patches.shape[-1] != c.patch_dim:  # a still image: both frames' weights see one frame
            kernel = rearrange(kernel, "(c t p) d -> c t p d", c=c.channels, t=c.temporal_patch)
            kernel = kernel.sum(axis=1).reshape(-1, c.width)
        x = jnp.einsum("BWSP,PD->BWSD", patches.astype(c.dtype), kernel.astype(c.dtype))
        is_full = np.isin(np.arange(c.depth), c.full_attention_layers)
        # rows turn the first half of the frequencies, columns the second: one section of H/2
        angles = attention.rotary(positions, c.head_dim // 2, c.rope_theta)
        angles = rearrange(angles, "b w s side k -> b w s 1 (side k)")
        angles = jnp.broadcast_to(angles, (*x.shape[:3], *angles.shape[3:]))
        block = _Block(c, name="layers")
        x, taps, _ = run_layers(
            block,
            x,
            jnp.asarray(is_full),
            angles,
            segments,
            length=c.depth,
            remat=c.remat,
            taps=taps,
        )
        return x, taps


def window_patches(images, cfg):
    """Images whose sides are multiples of the window -> the tower's input, by one reshape.

    Args:
        images: uint8[B, H, W, 3], H and W multiples of 112 px (for the released models).
        cfg: QwenVisionConfig.

    Returns:
        patches float32[B, windows, 64, P/2], normalised; positions int32[1, windows, 64, 2].

    Raises:
        ValueError: a side is no multiple of the window.
    """
    height, width = images.shape[1:3]
    if height % cfg.window_size or width % cfg.window_size:
        raise ValueError(
            f"images of {height} x {width} px do not split into windows of {cfg.window_size} px: "
            "resize them, or use data/patch_windows.py, which takes any size"
        )
    mean, std = (
        np.asarray(x, np.float32).reshape(1, 1, 1, -1) for x in (cfg.image_mean, cfg.image_std)
    )
    x = (images.astype(jnp.float32) / 255.0 - mean) / std
    return raster_to_windows(x, cfg, pixels=True), window_positions(height, width, cfg)


def window_positions(height, width, cfg):
    """int32[1, windows, 64, 2], row and column of each patch of a `height` x `width` px image."""
    rows, columns = height // cfg.patch_size, width // cfg.patch_size
    grid = np.stack(np.mgrid[:rows, :columns], axis=-1).astype(np.int32)
    return raster_to_windows(grid[None], cfg)


def raster_to_windows(x, cfg, *, pixels=False):
    """[B, rows, columns, C] -> [B, windows, slots, C]; `pixels`: x holds pixels, not patches."""
    if pixels:
        x = rearrange(x, "b (r p) (c q) d -> b r c (d p q)", p=cfg.patch_size, q=cfg.patch_size)
    sides = {"i": cfg.window, "j": cfg.window, "m": cfg.spatial_merge, "n": cfg.spatial_merge}
    return rearrange(x, "b (r i m) (c j n) d -> b (r c) (i j m n) d", **sides)


def windows_to_raster(x, columns, cfg):
    """[B, windows, merged slots, C] -> [B, merged rows * columns, C]; `columns` merged ones."""
    side = cfg.window
    return rearrange(x, "b (r c) (i j) d -> b (r i c j) d", c=columns // side, i=side, j=side)
