"""The action expert: a diffusion transformer that reads the latent tokens' keys and values.

    noised chunk, tau -> L layers, layer l beside layer l of the language tower -> velocity

In every layer the chunk's own tokens see each other, both ways, and the latent tokens: one softmax
over both (GEAR-VLA 3.1: the latent tokens are all that it sees of the robot's world). Keys and
values enter as arrays; who made them, and that no gradient goes back, is the caller's affair
(systems/). Decisions: systems.md 2.6, ported_models.md E; AdaLN-zero as in DiT.
"""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from gear_jax.towers import attention
from gear_jax.towers.stack import run_layers
from gear_jax.towers.state_projector import EmbodimentDense

MLPS = ("swiglu", "gelu")
_TIME_DIM = 256  # sines and cosines of tau
_PERIODS = (4e-3, 4.0)  # shortest and longest of them, in units of tau (openpi)


@dataclasses.dataclass(frozen=True)
class ActionExpertConfig:
    """Sizes and choices; the defaults are those beside Qwen2.5-VL-7B.

    Attributes:
        depth: L, as many layers as the language tower.
        width: D.
        num_heads: N, query heads.
        num_kv_heads: K, the language tower's.
        head_dim: H, the language tower's.
        mlp_dim: hidden units of the MLP.
        mlp: "swiglu" or "gelu".
        action_dim: a.
        chunk_len: A.
        num_embodiments: 0; or E, for input and output maps of each embodiment ("output-aware",
            systems.md 2.12).
        rope_theta: the language tower's.
        norm_eps: of the norms.
        attention: backend (towers/attention.py).
        remat: what the backward pass keeps (towers/stack.py).
        dtype: of the layers; tau, the embedding and the output are float32.
        param_dtype: of the parameters.
    """

    depth: int = 28
    width: int = 1024
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 128
    mlp_dim: int = 4096
    mlp: str = "swiglu"
    action_dim: int = 20
    chunk_len: int = 30
    num_embodiments: int = 0
    rope_theta: float = 1_000_000.0
    norm_eps: float = 1e-6
    attention: str = "xla"
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        """Check the choices.

        Raises:
            ValueError: all faults in one sentence.
        """
        faults = []
        if self.mlp not in MLPS:
            faults.append(f"mlp is {self.mlp!r}, expected one of {MLPS}")
        if self.num_heads % self.num_kv_heads:
            faults.append(
                f"num_heads is {self.num_heads}, expected a multiple of num_kv_heads = "
                f"{self.num_kv_heads}"
            )
        if self.head_dim % 2:
            faults.append(f"head_dim is {self.head_dim}, expected an even number")
        if self.num_embodiments < 0:
            faults.append(f"num_embodiments is {self.num_embodiments}, expected 0 or more")
        if faults:
            raise ValueError(f"ActionExpertConfig: {'; '.join(faults)}")


def _modulated(c, x, shift, scale):
    """Norm without parameters, then tau's shift [B, 1, D] and scale [B, 1, D]; float32."""
    norm = nn.LayerNorm(
        c.norm_eps, use_bias=False, use_scale=False, use_fast_variance=False, dtype=jnp.float32
    )
    return norm(x) * (1 + scale) + shift


def _modulation(c, condition, num, name):
    """Condition float32[B, D] -> `num` vectors float32[B, 1, D], zero at the start."""
    dense = nn.DenseGeneral(
        (num, c.width),
        kernel_init=nn.initializers.zeros,
        dtype=c.dtype,
        param_dtype=c.param_dtype,
        name=name,
    )
    parts = dense(condition.astype(c.dtype)).astype(jnp.float32)
    return [parts[:, None, i] for i in range(num)]


class _Block(nn.Module):
    cfg: ActionExpertConfig

    @nn.compact
    def __call__(self, x, latent_kv, condition, angles, segments, kv_segments):
        """X [B, A, D]; latent_kv 2 x [B, M, K, H]; condition float32[B, D]."""
        c = self.cfg
        types = {"dtype": c.dtype, "param_dtype": c.param_dtype, "use_bias": False}
        heads, dense = (functools.partial(f, **types) for f in (nn.DenseGeneral, nn.Dense))
        parts = _modulation(c, condition, 6, "modulation")
        attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = parts

        y = _modulated(c, x, attn_shift, attn_scale).astype(c.dtype)
        q = attention.rotate(heads((c.num_heads, c.head_dim), name="q")(y), angles)
        k = attention.rotate(heads((c.num_kv_heads, c.head_dim), name="k")(y), angles)
        v = heads((c.num_kv_heads, c.head_dim), name="v")(y)
        keys, values = (
            jnp.concatenate([latent.astype(c.dtype), own], axis=1)
            for latent, own in zip(latent_kv, (k, v), strict=True)
        )
        y = attention.attend(
            q, keys, values, backend=c.attention, q_segments=segments, kv_segments=kv_segments
        )
        y = checkpoint_name(y, "attention")
        y = heads(c.width, axis=(-2, -1), name="o")(y)
        x = x + (attn_gate * y).astype(c.dtype)

        y = _modulated(c, x, mlp_shift, mlp_scale).astype(c.dtype)
        up = dense(c.mlp_dim, name="up")(y)
        y = nn.silu(dense(c.mlp_dim, name="gate")(y)) * up if c.mlp == "swiglu" else nn.gelu(up)
        y = dense(c.width, name="down")(y)
        x = x + (mlp_gate * y).astype(c.dtype)
        return x, x, None


class ActionExpert(nn.Module):
    """The tower; at the start its velocity is zero."""

    cfg: ActionExpertConfig

    @nn.compact
    def __call__(self, noisy, tau, k, v, positions, kv_mask=None, embodiment_id=None):
        """Velocity of a noised chunk (GEAR-VLA eq. 2).

        Args:
            noisy: float[B, A, a], `flow.noised`.
            tau: float32[B], flow time, 0 = noise, 1 = data.
            k: [L, B, M, K, H], keys of the language tower's layers, already turned.
            v: [L, B, M, K, H], their values.
            positions: int32[B], position of the last latent token; token i of the chunk stands at
                position + 1 + i. On text all axes of m-rope are equal, so plain rope is the same.
            kv_mask: bool[B, M], False for latent tokens that are not there; None: all are.
            embodiment_id: int32[B]; read only with `num_embodiments`.

        Returns:
            float32[B, A, a].

        Raises:
            ValueError: shapes that are not the config's, or no `embodiment_id` where one is needed.
        """
        c = self.cfg
        _check(c, noisy, k, v, embodiment_id)
        batch, length, _ = noisy.shape
        exact = {"param_dtype": c.param_dtype}  # float32

        def project(features, init, name, x):
            if c.num_embodiments:
                dense = EmbodimentDense(c.num_embodiments, features, init, name=name, **exact)
                return dense(x, embodiment_id)
            dense = nn.Dense(features, kernel_init=init, precision="highest", name=name, **exact)
            return dense(x)

        time = functools.partial(nn.Dense, c.width, precision="highest", **exact)
        condition = time(name="time_in")(_sinusoid(tau))
        condition = nn.silu(time(name="time_out")(nn.silu(condition)))

        init = nn.initializers.normal(0.02)
        step = self.param("step_embed", init, (c.chunk_len, c.width), c.param_dtype)
        x = noisy.astype(jnp.float32)
        x = project(c.width, nn.initializers.lecun_normal(), "action_in", x)
        x = (x + step.astype(jnp.float32)[None]).astype(c.dtype)

        own = positions[:, None] + 1 + jnp.arange(length)[None]
        angles = attention.rotary(own, c.head_dim, c.rope_theta)[:, :, None]
        segments = kv_segments = None
        if kv_mask is not None:
            segments = jnp.ones((batch, length), jnp.int32)
            kv_segments = jnp.concatenate([kv_mask.astype(jnp.int32), segments], axis=1)
        x, _, _ = run_layers(
            _Block(c, name="layers"),
            x,
            (k, v),
            condition,
            angles,
            segments,
            kv_segments,
            length=c.depth,
            remat=c.remat,
        )
        shift, scale = _modulation(c, condition, 2, "final_modulation")
        x = _modulated(c, x, shift, scale)
        return project(c.action_dim, nn.initializers.zeros, "action_out", x)


def _sinusoid(tau):
    """Sines and cosines float32[B, 256] of tau, with periods from 0.004 to 4."""
    frequency = 2 * np.pi / np.geomspace(*_PERIODS, _TIME_DIM // 2)
    angles = tau.astype(jnp.float32)[:, None] * jnp.asarray(frequency, jnp.float32)[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def _check(c, noisy, k, v, embodiment_id):
    """Refuse what is not of the config's shape; all faults in one sentence."""
    batch, faults = len(noisy), []
    if noisy.shape[1:] != (c.chunk_len, c.action_dim):
        faults.append(
            f"the chunk is {noisy.shape[1:]}, expected {(c.chunk_len, c.action_dim)}: "
            "chunk_len, action_dim"
        )
    expected = (c.depth, batch, "M", c.num_kv_heads, c.head_dim)
    for name, array in (("keys", k), ("values", v)):
        shape = array.shape
        if k.shape != v.shape or shape[:2] + shape[3:] != expected[:2] + expected[3:]:
            faults.append(f"{name} are {shape}, expected {expected}: L, B, M, K, H")
    if c.num_embodiments and embodiment_id is None:
        faults.append(f"embodiment_id is missing for {c.num_embodiments} embodiments")
    if faults:
        raise ValueError(f"ActionExpert: {'; '.join(faults)}")
