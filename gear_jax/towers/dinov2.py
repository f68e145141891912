"""DINOv2 with registers: images -> normalised tokens. Its block is VGGT's block too.

Source: ported_models.md B (facebookresearch/dinov2 and vggt, release code).
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from gear_jax.towers import attention
from gear_jax.towers.stack import run_layers


@dataclasses.dataclass(frozen=True)
class Dinov2Config:
    """Sizes of DINOv2; the defaults are the ViT-L/14 inside VGGT-1B."""

    depth: int = 24
    width: int = 1024
    num_heads: int = 16
    mlp_dim: int = 4096
    patch_size: int = 14
    pos_embed_grid: int = 37  # trained on 518 px
    pos_embed_std: float = 0.02  # at random initialisation
    num_registers: int = 4
    norm_eps: float = 1e-6
    attention: str = "xla"
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32


class ScaledBlock(nn.Module):
    """Pre-norm attention and GELU MLP, each scaled per channel (LayerScale).

    Also VGGT's block: with `qk_norm`, and turned by 2D angles. The second value returned is x
    again, the third is None: the form `run_layers` asks for.
    """

    num_heads: int
    mlp_dim: int
    norm_eps: float
    scale_init: float
    qk_norm: bool = False
    attention: str = "xla"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, layer=None, angles=None, segments=None):
        """X [B, T, D], angles float32[B, T, 2, H/4] or None, segments int32[B, T] or None."""
        del layer
        width = x.shape[-1]
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = functools.partial(nn.DenseGeneral, **types)
        norm = functools.partial(
            nn.LayerNorm, epsilon=self.norm_eps, use_fast_variance=False, **types
        )

        def scaled(name, y):
            scale = self.param(
                name, nn.initializers.constant(self.scale_init), (width,), self.param_dtype
            )
            return y * scale.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (width,))

        y = norm(name="attn_norm")(x)
        qkv = dense((3, self.num_heads, width // self.num_heads), name="qkv")(y)
        q, k, v = (qkv[:, :, i] for i in range(3))
        if self.qk_norm:
            q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
        if angles is not None:
            q, k = attention.rotate(q, angles), attention.rotate(k, angles)
        y = attention.attend(
            q, k, v, backend=self.attention, q_segments=segments, kv_segments=segments
        )
        y = checkpoint_name(y, "attention")
        x = x + scaled("attn_scale", dense(width, axis=(-2, -1), name="proj")(y))
        y = dense(self.mlp_dim, name="fc1")(norm(name="mlp_norm")(x))
        y = dense(width, name="fc2")(nn.gelu(y, approximate=False))
        x = x + scaled("mlp_scale", y)
        return x, x, None


class PatchEmbed(nn.Module):
    """Square patches of an image, row by row, each through one linear map."""

    width: int
    patch_size: int
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images):
        """Images [B, H, W, 3] -> [B, rows * columns, D]."""
        p = self.patch_size
        x = rearrange(images, "b (r p) (c q) d -> b (r c) (p q d)", p=p, q=p)
        return nn.Dense(self.width, dtype=self.dtype, param_dtype=self.param_dtype, name="proj")(x)


class Dinov2(nn.Module):
    """The tower; position embeddings are resized to the image's grid inside the graph."""

    cfg: Dinov2Config

    @nn.compact
    def __call__(self, images):
        """Tokens after the final norm.

        Args:
            images: float[B, H, W, 3], ImageNet-normalised; H and W multiples of the patch size.

        Returns:
            [B, 1 + num_registers + patches, D]: class token, registers, patches row by row.
        """
        c = self.cfg
        batch, height, width, _ = images.shape
        rows, columns = height // c.patch_size, width // c.patch_size
        types = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        init = nn.initializers.normal(0.02)
        cls = self.param("cls_token", init, (1, c.width), c.param_dtype)
        registers = self.param("registers", init, (c.num_registers, c.width), c.param_dtype)
        grid = (1 + c.pos_embed_grid**2, c.width)
        places = nn.initializers.normal(c.pos_embed_std)
        pos_embed = self.param("pos_embed", places, grid, c.param_dtype)
        x = PatchEmbed(c.width, c.patch_size, name="patch_embed", **types)(images.astype(c.dtype))
        x = jnp.concatenate([_repeat(cls.astype(c.dtype), batch), x], axis=1)
        x = x + resize_pos_embed(pos_embed, rows, columns).astype(c.dtype)[None]
        x = jnp.concatenate([x[:, :1], _repeat(registers.astype(c.dtype), batch), x[:, 1:]], axis=1)
        block = ScaledBlock(
            c.num_heads,
            c.mlp_dim,
            c.norm_eps,
            scale_init=1.0,
            attention=c.attention,
            name="layers",
            **types,
        )
        x, _, _ = run_layers(block, x, length=c.depth, remat=c.remat)
        return nn.LayerNorm(c.norm_eps, use_fast_variance=False, name="norm", **types)(x)


def resize_pos_embed(pos_embed, rows, columns):
    """[1 + G * G, D] of a square grid -> float32[1 + rows * columns, D]; the class row is kept.

    Antialiased bicubic, as the released model resizes (ported_models.md B3).
    """
    cls, grid = pos_embed[:1].astype(jnp.float32), pos_embed[1:].astype(jnp.float32)
    side = round(len(grid) ** 0.5)
    if (rows, columns) != (side, side):
        grid = grid.reshape(side, side, -1)
        shape = (rows, columns, grid.shape[-1])
        grid = jax.image.resize(grid, shape, "cubic", antialias=True).reshape(rows * columns, -1)
    return jnp.concatenate([cls, grid])


def _repeat(x, batch):
    return jnp.broadcast_to(x[None], (batch, *x.shape))
