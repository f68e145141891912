"""Qwen2.5-VL's language tower: tokens and inserted features -> hidden states, keys and values.

Prefill and decoding are the same call. Keys and values come out as arrays with a leading layer
axis, and go in as `memory`, which every query may see; writing them into a cache is the caller's
plain array update (systems/vlm.py). Logits are a plain function, so that a loss can ask for few
positions or for a slice of the vocabulary. Source: ported_models.md A5.
"""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gear_jax.towers import attention
from gear_jax.towers.stack import run_layers


@dataclasses.dataclass(frozen=True)
class QwenLanguageConfig:
    """Sizes of the decoder; the defaults are those of Qwen2.5-VL-7B."""

    depth: int = 28
    width: int = 3584
    num_heads: int = 28
    num_kv_heads: int = 4
    mlp_dim: int = 18_944
    vocab_size: int = 152_064
    head_dim: int = 128
    rope_theta: float = 1_000_000.0
    rope_sections: tuple[int, int, int] = (16, 24, 24)
    norm_eps: float = 1e-6
    tied_head: bool = False
    embed_std: float = 0.02  # of the embedding at random initialisation
    residual_scale: float = 1.0  # likewise, of the kernels that write to the residual stream
    attention: str = "xla"
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32


class _Block(nn.Module):
    cfg: QwenLanguageConfig

    @nn.compact
    def __call__(self, x, memory, angles, segments, kv_segments, hidden, groups):
        c = self.cfg
        types = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        heads = functools.partial(nn.DenseGeneral, **types)
        out = nn.initializers.variance_scaling(c.residual_scale**2, "fan_in", "truncated_normal")
        dense = functools.partial(nn.Dense, use_bias=False, **types)
        norm = functools.partial(nn.RMSNorm, epsilon=c.norm_eps, **types)

        y = norm(name="attn_norm")(x)
        q = attention.rotate(heads((c.num_heads, c.head_dim), name="q")(y), angles)
        k = attention.rotate(heads((c.num_kv_heads, c.head_dim), name="k")(y), angles)
        v = heads((c.num_kv_heads, c.head_dim), name="v")(y)
        keys, values = k, v
        if memory is not None:
            keys, values = (
                jnp.concatenate(pair, axis=1) for pair in zip(memory, (k, v), strict=True)
            )
        y = attention.attend(
            q,
            keys,
            values,
            backend=c.attention,
            causal=True,
            q_segments=segments,
            kv_segments=kv_segments,
            hidden=hidden,
            kv_groups=groups,
        )
        y = checkpoint_name(y, "attention")
        x = x + heads(c.width, axis=(-2, -1), use_bias=False, kernel_init=out, name="o")(y)
        y = norm(name="mlp_norm")(x)
        y = nn.silu(dense(c.mlp_dim, name="gate")(y)) * dense(c.mlp_dim, name="up")(y)
        x = x + dense(c.width, kernel_init=out, name="down")(y)
        return x, x, (k, v)


class QwenLanguage(nn.Module):
    """The tower: embedding, `depth` blocks, final norm; the head's table is kept here too."""

    cfg: QwenLanguageConfig

    @nn.compact
    def __call__(
        self,
        tokens,
        positions,
        segments,
        inserts=None,
        insert_index=None,
        memory=None,
        memory_segments=None,
        taps=(),
        hidden=None,
        groups=None,
    ):
        """Hidden states of T tokens, and their keys and values for later tokens.

        Args:
            tokens: int32[B, T].
            positions: int32[3, B, T], time, height and width (data/mrope.py).
            segments: int32[B, T]; tokens see earlier tokens of the same segment: 1 is the sequence,
                higher numbers further packed sequences. 0 is padding: it sees nothing, nothing sees
                it, and its output is a finite average without meaning (as the reference's).
            inserts: [B, I, D], features that stand in for the embedding of some tokens.
            insert_index: int32[B, T], row of `inserts` for a token, -1 for its own embedding.
            memory: (keys, values), each [L, B, M, K, H], of earlier tokens, keys already turned.
            memory_segments: int32[B, M]; a slot not yet filled has a segment that no token has.
            taps: layers whose output, before the final norm, is returned as well.
            hidden: int32[B, T] or None, bits of the groups whose keys a token does not see; without
                `memory` only.
            groups: int32[B, T] or None, bits of the groups that a token is of.

        Returns:
            hidden [B, T, D] after the final norm; (keys, values), each [L, B, T, K, H], of these
            tokens; taps [len(taps), B, T, D].
        """
        c = self.cfg
        embed = nn.initializers.normal(c.embed_std)
        x = self.param("embed", embed, (c.vocab_size, c.width), c.param_dtype)[tokens]
        if not c.tied_head:
            head = nn.initializers.normal(0.02)
            self.param("head", head, (c.vocab_size, c.width), c.param_dtype)
        x = x.astype(c.dtype)
        if inserts is not None:
            rows = jnp.maximum(insert_index, 0)[..., None]
            picked = jnp.take_along_axis(inserts.astype(c.dtype), rows, axis=1)
            x = jnp.where((insert_index >= 0)[..., None], picked, x)
        kv_segments = jnp.where(segments > 0, segments, -1)
        if memory is not None:
            kv_segments = jnp.concatenate([memory_segments, kv_segments], axis=1)
        angles = attention.multimodal_rotary(positions, c.head_dim, c.rope_theta, c.rope_sections)
        x, taps, kv = run_layers(
            _Block(c, name="layers"),
            x,
            memory,
            angles,
            segments,
            kv_segments,
            hidden,
            groups,
            length=c.depth,
            remat=c.remat,
            taps=taps,
        )
        norm = nn.RMSNorm(c.norm_eps, dtype=c.dtype, param_dtype=c.param_dtype, name="final_norm")
        return norm(x), kv, taps


def vocabulary_logits(params, hidden):
    """Logits float32[B, T, V] of the vocabulary, from the tower's parameters and its output."""
    table = params.get("head", params["embed"]).astype(hidden.dtype)
    return jnp.einsum("BTD,VD->BTV", hidden, table, preferred_element_type=jnp.float32)
