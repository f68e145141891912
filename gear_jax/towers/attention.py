"""Attention and rotary embeddings: the one place that chooses a kernel.

Who may see whom is said with small integers, never with a [T, S] array made by a caller: a query
sees a key when their segments are equal and, if `causal`, when the key does not come later.
Padding, packing, several images in one row, attention windows and absent views are all segments.
Modality dropping is a second pair: the groups that a key is of, and those hidden from a query.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

BACKENDS = ("xla", "cudnn", "splash", "splash_interpret")
_LANES = 128  # splash attention works on blocks of 128 queries, 128 keys and 128 channels
_BATCH_AXES = ("replica", "data", "fsdp")


def rotary(positions, dim, theta):
    """Angles p * theta^(-2k/dim), k = 0 .. dim/2-1, in float32: [...] -> float32[..., dim/2]."""
    frequency = theta ** -(np.arange(0, dim, 2, dtype=np.float32) / dim)
    return positions[..., None].astype(jnp.float32) * _lead(frequency, positions.ndim + 1)


def multimodal_rotary(positions, dim, theta, sections):
    """Angles of Qwen2.5-VL's m-rope: each section of frequencies turns with its own position axis.

    Args:
        positions: int32[3, B, T], position along time, height and width.
        dim: head dimension H.
        theta: base of the frequencies.
        sections: frequencies given to time, height and width, in this order; they sum to H/2.

    Returns:
        float32[B, T, 1, H/2], for `rotate` with one section.
    """
    angles = rotary(positions, dim, theta)
    parts = jnp.split(angles, np.cumsum(sections)[:-1], axis=-1)
    return jnp.concatenate([part[axis] for axis, part in enumerate(parts)], axis=-1)[:, :, None]


def rotate(x, angles):
    """Turn the channels of x by `angles`, in float32; halves of a section form the pairs.

    Args:
        x: [B, T, N, H].
        angles: float32[B, T, G, H/(2G)], one row for each of G equal sections of the head: G = 1
            for Qwen2.5-VL (ported_models.md A4, A5), G = 2 (rows, columns) for VGGT (B3).

    Returns:
        [B, T, N, H] in x's dtype.
    """
    *lead, sections, width = angles.shape
    first, second = jnp.split(
        x.astype(jnp.float32).reshape(*x.shape[:-1], sections, 2 * width), 2, -1
    )
    cos, sin = (f(angles).reshape(*lead, 1, sections, width) for f in (jnp.cos, jnp.sin))
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def attend(q, k, v, *, backend="xla", causal=False, q_segments=None, kv_segments=None,
           hidden=None, kv_groups=None):  # fmt: skip
    """Scaled dot-product attention with grouped query heads; the softmax is taken in float32.

    Args:
        q: [B, T, N, H].
        k: [B, S, K, H]; N is a multiple of K, and query head n reads key head n // (N / K).
        v: [B, S, K, H].
        backend: "xla"; "cudnn" (GPU, bfloat16 or float16); "splash" (TPU); "splash_interpret" (the
            splash kernel emulated on any device, for tests).
        causal: the last T keys are the queries' own, the S - T before them are memory: query t sees
            all memory and its own keys up to t.
        q_segments: int32[B, T] or None (everything is one segment).
        kv_segments: int32[B, S] or None; given if and only if `q_segments` is.
        hidden: int32[B, T] or None, bits of the groups whose keys a query does not see. It must
            keep some key, mostly its own.
        kv_groups: int32[B, S] or None, bits of the groups that a key is of; given if and only if
            `hidden` is.

    Returns:
        [B, T, N, H] in q's dtype. A query whose segment holds no key gets some finite average.

    Raises:
        ValueError: unknown backend, or hidden groups where the backend has segments only.
    """
    if backend in ("xla", "cudnn"):
        plain = q_segments is None and hidden is None
        plain_causal = causal and plain and q.shape[1] == k.shape[1]
        mask = None if plain_causal else _mask(q, k, causal, q_segments, kv_segments)
        if hidden is not None:
            seen = (hidden[:, None, :, None] & kv_groups[:, None, None, :]) == 0
            mask = seen if mask is None else jnp.logical_and(seen, mask)
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=plain_causal, implementation=backend
        )
    if backend in ("splash", "splash_interpret"):
        if hidden is not None:
            raise ValueError(f"attention backend {backend!r} cannot hide groups: use xla")
        return _splash(q, k, v, causal, q_segments, kv_segments, backend == "splash_interpret")
    raise ValueError(f"attention backend {backend!r} is unknown: expected one of {BACKENDS}")


def _mask(q, k, causal, q_segments, kv_segments):
    """bool[B or 1, 1, T, S], or None when everything is visible."""
    mask = None
    if causal:
        own, memory = q.shape[1], k.shape[1] - q.shape[1]
        mask = (np.arange(own)[:, None] + memory >= np.arange(own + memory)[None])[None, None]
    if q_segments is not None:
        same = q_segments[:, None, :, None] == kv_segments[:, None, None, :]
        mask = same if mask is None else jnp.logical_and(same, mask)
    return mask


def _lead(x, ndim):
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def _splash(q, k, v, causal, q_segments, kv_segments, interpret):
    """TPU flash attention that skips masked blocks; one kernel per shard when a mesh is set."""
    if q_segments is None:
        q_segments = jnp.zeros(q.shape[:2], jnp.int32)
        kv_segments = jnp.zeros(k.shape[:2], jnp.int32)
    kernel = functools.partial(_splash_shard, causal=causal, interpret=interpret)
    axes = jax.sharding.get_abstract_mesh().axis_names
    if axes:  # a Pallas call is opaque to the partitioner: say how it splits
        batch = tuple(a for a in _BATCH_AXES if a in axes)
        heads = P(batch, None, "tensor" if "tensor" in axes else None, None)
        specs = (heads, heads, heads, P(batch), P(batch))
        kernel = jax.shard_map(kernel, in_specs=specs, out_specs=heads, check_vma=False)
    return kernel(q, k, v, q_segments, kv_segments)


def _splash_shard(q, k, v, q_segments, kv_segments, *, causal, interpret):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, memory, dim = q.shape[1], k.shape[1] - q.shape[1], q.shape[-1]
    q = _pad(q * dim**-0.5, (1, 3))
    k, v = _pad(k, (1, 3)), _pad(v, (1, 3))
    shape = (q.shape[1], k.shape[1])
    mask = masks.CausalMask(shape, offset=memory) if causal else masks.FullMask(shape)
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * q.shape[2]), interpret=interpret
    )
    segments = splash.SegmentIds(_pad(q_segments, (1,), -1), _pad(kv_segments, (1,), -1))
    heads_first = [x.transpose(0, 2, 1, 3) for x in (q, k, v)]
    out = jax.vmap(kernel)(*heads_first, segments)
    return out.transpose(0, 2, 1, 3)[:, :length, :, :dim]


def _pad(x, axes, value=0):
    widths = [(0, -size % _LANES if axis in axes else 0) for axis, size in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=value)
