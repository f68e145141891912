"""VGGT's aggregator: several views of one scene -> tokens that know its geometry.

Pairs of blocks alternate: one attends inside each view, the next over all views. Absent views (a
robot without a left wrist camera) are masked as keys in the second kind, which the reference cannot
do. Only the tapped pairs' outputs are kept. Source: ported_models.md B (facebookresearch/vggt).
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from gear_jax.towers import attention
from gear_jax.towers.dinov2 import Dinov2, Dinov2Config, PatchEmbed, ScaledBlock
from gear_jax.towers.stack import run_layers

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class VggtConfig:
    """Sizes of the aggregator; the defaults are those of VGGT-1B."""

    depth: int = 24  # pairs of blocks
    width: int = 1024
    num_heads: int = 16
    mlp_dim: int = 4096
    patch_size: int = 14
    num_registers: int = 4
    rope_theta: float = 100.0
    norm_eps: float = 1e-5
    dino: Dinov2Config | None = Dinov2Config()  # noqa: RUF009 - frozen; None: one linear patch embedding
    attention: str = "xla"
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @property
    def num_special(self):
        """Tokens before a view's patches: one camera token and the registers."""
        return 1 + self.num_registers


class _Pair(nn.Module):
    cfg: VggtConfig

    @nn.compact
    def __call__(self, x, layer, angles, segments):
        """X [B, V, N, D] -> x, the tap [B, V, N, 2D], None."""
        del layer
        c = self.cfg
        batch, views = x.shape[:2]

        def block(name):
            return ScaledBlock(
                c.num_heads,
                c.mlp_dim,
                c.norm_eps,
                scale_init=0.01,
                qk_norm=True,
                attention=c.attention,
                dtype=c.dtype,
                param_dtype=c.param_dtype,
                name=name,
            )

        inside = rearrange(x, "b v n d -> (b v) n d")
        inside, _, _ = block("frame")(inside, None, rearrange(angles, "b v n g k -> (b v) n g k"))
        across = rearrange(inside, "(b v) n d -> b (v n) d", b=batch)
        angles = rearrange(angles, "b v n g k -> b (v n) g k")
        segments = None if segments is None else rearrange(segments, "b v n -> b (v n)")
        across, _, _ = block("global")(across, None, angles, segments)
        frame = rearrange(inside, "(b v) n d -> b v n d", b=batch)
        x = rearrange(across, "b (v n) d -> b v n d", v=views)
        return x, jnp.concatenate([frame, x], axis=-1), None


class Vggt(nn.Module):
    """The aggregator; the 3D heads of VGGT are not part of it."""

    cfg: VggtConfig

    @nn.compact
    def __call__(self, images, scenes=None, taps=(-1,)):
        """Outputs of the tapped pairs of blocks.

        Args:
            images: float[B, V, H, W, 3] in 0 .. 1; H and W multiples of the patch size.
            scenes: int32[B, V], number of the scene that a view shows, below V; -1 for an absent
                view; None: all show scene 0. Views of a scene see each other; the first is its
                reference view.
            taps: pairs of blocks, negative ones from the end.

        Returns:
            [len(taps), B, V, num_special + patches, 2D]: of each token first the output of the
            frame block, then of the global block; camera token, registers, patches row by row.

        Raises:
            ValueError: image sides that are no multiples of the patch size.
        """
        c = self.cfg
        batch, views, height, width, _ = images.shape
        if height % c.patch_size or width % c.patch_size:
            raise ValueError(
                f"images of {height} x {width} px do not split into patches of {c.patch_size} px"
            )
        mean, std = (
            np.asarray(x, np.float32).reshape(1, 1, 1, 1, 3) for x in (IMAGE_MEAN, IMAGE_STD)
        )
        x = rearrange((images - mean) / std, "b v h w d -> (b v) h w d")
        x = rearrange(PatchTokens(c, name="patch_tokens")(x), "(b v) n d -> b v n d", b=batch)

        init = nn.initializers.normal(1e-6)
        camera = self.param("camera", init, (2, 1, c.width), c.param_dtype)
        registers = self.param("registers", init, (2, c.num_registers, c.width), c.param_dtype)
        special = jnp.concatenate([camera, registers], axis=1).astype(c.dtype)
        later = jnp.broadcast_to(jnp.arange(views)[None] > 0, (batch, views))
        if scenes is not None:
            earlier = jnp.tril(jnp.ones((views, views), bool), -1)[None]
            same = scenes[:, :, None] == scenes[:, None, :]
            later = jnp.any(same & earlier, axis=-1) | (scenes < 0)
        special = special[later.astype(jnp.int32)]  # row 0: reference views; row 1: all others
        x = jnp.concatenate([special, x], axis=2)

        angles = _angles(height // c.patch_size, width // c.patch_size, c)
        angles = jnp.broadcast_to(angles[None, None], (batch, views, *angles.shape))
        segments = None
        if scenes is not None:
            segments = jnp.broadcast_to(scenes[:, :, None] + 1, x.shape[:3])
        _, taps, _ = run_layers(
            _Pair(c, name="layers"),
            x,
            None,
            angles,
            segments,
            length=c.depth,
            remat=c.remat,
            taps=tuple(tap % c.depth if -c.depth <= tap < 0 else tap for tap in taps),
            tap_width=2 * c.width,
        )
        return taps


class PatchTokens(nn.Module):
    """VGGT's patch tokens: DINOv2's, or those of one linear map."""

    cfg: VggtConfig

    @nn.compact
    def __call__(self, images):
        """Normalised images [B, H, W, 3] -> [B, rows * columns, D]."""
        c = self.cfg
        if c.dino is None:
            return PatchEmbed(
                c.width, c.patch_size, dtype=c.dtype, param_dtype=c.param_dtype, name="linear"
            )(images)
        return Dinov2(c.dino, name="dino")(images)[:, 1 + c.dino.num_registers :]


def _angles(rows, columns, cfg):
    """float32[tokens, 2, H/4]: patches count rows and columns from 1, special tokens are at 0."""
    grid = np.mgrid[1 : rows + 1, 1 : columns + 1].reshape(2, -1).T
    positions = np.concatenate([np.zeros((cfg.num_special, 2), int), grid])
    return attention.rotary(jnp.asarray(positions), cfg.width // cfg.num_heads // 2, cfg.rope_theta)
