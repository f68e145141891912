"""The expanded visual projector: 2D patch features, and 3D ones beside them -> LM embeddings.

GEAR-VLA eq. 3: Z = [H2D; H3D] W + b with W = [W_Qwen; 0] at the start. The 2D rows are Qwen2.5-VL's
merger; the 3D rows are a parameter of their own, so that Hugging Face keys map one to one and the
block can have its own learning rate. Decisions: systems.md 2.7.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """Sizes of the projector; the defaults are those of Qwen2.5-VL-7B with VGGT-1B."""

    vision_width: int = 1280
    geometry_width: int | None = 2048  # None: Qwen2.5-VL's merger as released
    merge: int = 4  # patches in one token
    width: int = 3584
    expand: str = "first"  # the linear map that the 3D block widens: "first" or "last"
    geometry_std: float = 0.0  # of the 3D block at the start; GEAR-VLA begins at zero
    norm_eps: float = 1e-6
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32


class Projector(nn.Module):
    """Norm, join 2 x 2 patches, linear, GELU, linear."""

    cfg: ProjectorConfig

    @nn.compact
    def __call__(self, vision, geometry=None):
        """Embeddings of merged patches.

        Args:
            vision: [..., P, vision_width], each `merge` consecutive patches form one token.
            geometry: [..., P, geometry_width] in the same order, or None: no 3D branch.

        Returns:
            [..., P / merge, width].

        Raises:
            ValueError: unknown `expand`.
        """
        c = self.cfg
        if c.expand not in ("first", "last"):
            raise ValueError(f"projector.expand is {c.expand!r}: expected 'first' or 'last'")
        types = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        hidden = c.vision_width * c.merge
        y = nn.RMSNorm(c.norm_eps, name="norm", **types)(vision)
        y = nn.Dense(hidden, name="fc1", **types)(_join(y, c.merge))
        depth = None
        if c.geometry_width is not None:
            shape = (c.geometry_width * c.merge, hidden if c.expand == "first" else c.width)
            start = (
                nn.initializers.normal(c.geometry_std) if c.geometry_std else nn.initializers.zeros
            )
            kernel = self.param("geometry_kernel", start, shape, c.param_dtype)
            if geometry is not None:
                norm = nn.LayerNorm(use_bias=False, use_scale=False, name="geometry_norm", **types)
                depth = _join(norm(geometry), c.merge) @ kernel.astype(c.dtype)
        if depth is not None and c.expand == "first":
            y = y + depth
        y = nn.Dense(c.width, name="fc2", **types)(nn.gelu(y, approximate=False))
        if depth is not None and c.expand == "last":
            y = y + depth
        return y


def _join(x, merge):
    return rearrange(x, "... (p m) d -> ... p (m d)", m=merge)
