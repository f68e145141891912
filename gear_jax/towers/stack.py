"""The only `nn.scan` and `nn.remat`: a tower's layers as one scanned block.

Parameters of all layers lie in one tree with a leading layer axis L. What differs from layer to
layer (window or full attention, cached keys and values) enters as a scanned array.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
REMAT = ("none", *_POLICIES)


def run_layers(block, x, per_layer=None, *shared, length, remat="none", taps=(), tap_width=None):
    """Run `length` layers of `block`, a Module called as block(x, layer, *shared) -> x, tap, out.

    Args:
        block: Module instance; its parameters get a leading axis of `length`.
        x: [..., D], what flows from layer to layer.
        per_layer: tree of arrays [L, ...]; layer i gets row i.
        *shared: values that every layer gets whole.
        length: number of layers L.
        remat: what the backward pass keeps of a layer: "none" keeps all, "full" nothing but x,
            "attention" also the attention output, "dots" the results of weight products.
        taps: layers, 0 .. L-1, whose `tap` is returned; no other is kept.
        tap_width: last axis of a tap, its other axes are those of x; default D.

    Returns:
        x after the last layer; taps [len(taps), ..., tap_width] in the order asked for; `out` of
        all layers with a leading axis L.

    Raises:
        ValueError: unknown remat policy, or a tap that is no layer.
    """
    if remat not in REMAT:
        raise ValueError(f"remat policy {remat!r} is unknown: expected one of {REMAT}")
    if bad := [tap for tap in taps if not 0 <= tap < length]:
        raise ValueError(f"taps {bad} are no layers: expected 0 .. {length - 1}")
    spare = len(taps)  # row of the buffer for layers nobody asked for
    slots = np.full(length, spare, np.int32)
    slots[list(taps)] = np.arange(spare)
    buffer = jnp.zeros((spare + 1 if taps else 0, *x.shape[:-1], tap_width or x.shape[-1]), x.dtype)

    def layer(block, x, inputs):
        return block(x, inputs, *shared)

    if remat != "none":
        layer = nn.remat(layer, prevent_cse=False, policy=_POLICIES[remat])

    def body(block, carry, inputs):
        x, buffer = carry
        slot, inputs = inputs
        x, tap, out = layer(block, x, inputs)
        if taps:
            buffer = jax.lax.dynamic_update_index_in_dim(buffer, tap, slot, 0)
        return (x, buffer), out

    scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=length)
    (x, buffer), out = scan(block, (x, buffer), (jnp.asarray(slots), per_layer))
    return x, buffer[:spare], out
