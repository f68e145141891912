"""Which mesh axis splits which dimension of which parameter: one ordered table, no catch-all.

Mesh axes: `replica` (across slices) and `data` copy parameters and split the batch, `fsdp` splits
both, `tensor` splits heads, hidden units and the vocabulary. The first pattern that matches a
parameter's whole path wins; a parameter that none matches is an error, as is a size that its axis
does not divide.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("replica", "data", "fsdp", "tensor")
BATCH_AXES = AXES[:3]

_F, _T = "fsdp", "tensor"

# (path, axes of the trailing dimensions); leading dimensions, such as layers, are not split.
RULES = (
    (r".*_norm/(scale|bias)", (None,)),
    # language
    (r"language/(embed|head)", (_T, _F)),
    (r"language/layers/(q|k|v)/kernel", (_F, _T, None)),
    (r"language/layers/(q|k|v)/bias", (_T, None)),
    (r"language/layers/o/kernel", (_T, None, _F)),
    (r"language/layers/(gate|up)/kernel", (_F, _T)),
    (r"language/layers/down/kernel", (_T, _F)),
    # vision, projector
    (r"vision/patch_embed", (None, _F)),
    (r"vision/layers/qkv/kernel", (_F, None, _T, None)),
    (r"vision/layers/qkv/bias", (None, _T, None)),
    (r"vision/layers/proj/kernel", (_T, None, _F)),
    (r"vision/layers/(gate|up)/kernel", (_F, _T)),
    (r"vision/layers/(gate|up)/bias", (_T,)),
    (r"vision/layers/down/kernel", (_T, _F)),
    (r"vision/layers/(proj|down)/bias", (None,)),
    (r"projector/(fc1/kernel|geometry_kernel)", (_F, _T)),
    (r"projector/fc1/bias", (_T,)),
    (r"projector/fc2/kernel", (_T, _F)),
    (r"projector/fc2/bias", (None,)),
    (r"projector/norm/scale", (None,)),
    # geometry: VGGT's pairs of blocks and its DINOv2
    (r"geometry/.*layers/.*qkv/kernel", (_F, None, _T, None)),
    (r"geometry/.*layers/.*qkv/bias", (None, _T, None)),
    (r"geometry/.*layers/.*proj/kernel", (_T, None, _F)),
    (r"geometry/.*layers/.*fc1/kernel", (_F, _T)),
    (r"geometry/.*layers/.*fc1/bias", (_T,)),
    (r"geometry/.*layers/.*fc2/kernel", (_T, _F)),
    (r"geometry/.*layers/.*(proj|fc2)/bias", (None,)),
    (r"geometry/.*layers/.*(attn|mlp)_scale", (None,)),
    (r"geometry/patch_tokens/.*proj/kernel", (None, _F)),
    (r"geometry/patch_tokens/.*proj/bias", (None,)),
    (r"geometry/patch_tokens/dino/norm/(scale|bias)", (None,)),
    (r"geometry/patch_tokens/dino/(cls_token|registers|pos_embed)", (None, _F)),
    (r"geometry/(camera|registers)", (None, None, _F)),
    (r"unused/dino_mask_token", (None,)),
    # action expert: a model width is split over fsdp only. Over tensor, where gates meet outputs
    # that are split over fsdp, the partitioner of jax 0.10 and 0.11 gives wrong numbers.
    (r"expert/layers/(q|k|v)/kernel", (_F, _T, None)),
    (r"expert/layers/o/kernel", (_T, None, _F)),
    (r"expert/layers/(gate|up)/kernel", (_F, _T)),
    (r"expert/layers/down/kernel", (_T, _F)),
    (r"expert/(layers/|final_)modulation/kernel", (_T, None, _F)),
    (r"expert/(layers/|final_)modulation/bias", (None, None)),
    (r"expert/time_in/kernel", (_F, _T)),
    (r"expert/time_in/bias", (_T,)),
    (r"expert/time_out/kernel", (_T, _F)),
    (r"expert/time_out/bias", (None,)),
    (r"expert/step_embed", (None, _F)),
    (r"expert/action_in/kernel", (None, _F)),
    (r"expert/action_out/kernel", (_F, None)),
    (r"expert/action_(in|out)/bias", (None,)),
    # learned embeddings of the ablations
    (r"learned/(latents|prompts)", (None, _F)),
    # low-rank factors
    (r"lora/.*/a", (_F, None)),
    (r"lora/.*/b", (None, _F)),
    # state projectors, one for each embodiment
    (r"state/fc1/kernel", (None, _T)),
    (r"state/fc1/bias", (_T,)),
    (r"state/fc2/kernel", (_T, _F)),
    (r"state/fc2/bias", (None,)),
)


def make_mesh(
    sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """A mesh with all four axes.

    Args:
        sizes: {axis: size}; axes left out have size 1, and one may be -1: what is left.
        devices: by default all of them.

    Raises:
        ValueError: an unknown axis, sizes that do not fill the devices, or a tensor axis across
            hosts, which would then need the same rows; says the nearest sizes that do.
    """
    devices = jax.devices() if devices is None else devices
    if unknown := set(sizes) - set(AXES):
        raise ValueError(f"mesh axes {sorted(unknown)} are unknown: expected some of {AXES}")
    asked = [sizes.get(axis, 1) for axis in AXES]
    known = int(np.prod([size for size in asked if size != -1]))
    shape = tuple(max(len(devices) // max(known, 1), 1) if n == -1 else n for n in asked)
    hosts = len({device.process_index for device in devices})
    if min(shape) < 1 or asked.count(-1) > 1 or np.prod(shape) != len(devices):
        raise ValueError(
            f"mesh {_sizes(asked)} has {known} places{' times what is left' * (-1 in asked)} for "
            f"{len(devices)} devices; the nearest that fits is "
            f"{_sizes(_nearest(asked, len(devices), hosts))}"
        )
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    mesh = jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    if (owners != owners[..., :1]).any():
        raise ValueError(
            f"mesh {_sizes(asked)}: tensor={shape[-1]} reaches across hosts of "
            f"{len(devices) // hosts} devices; the nearest that fits is "
            f"{_sizes(_nearest(asked, len(devices), hosts))}"
        )
    return mesh


def _nearest(asked, count, hosts):
    """Sizes that fill `count` devices: none larger than asked, and the rest for `data`."""
    found, left = {}, count
    for axis, most in (("tensor", count // hosts), ("fsdp", count), ("replica", count)):
        size = asked[AXES.index(axis)]
        most = min(most, left if size == -1 else size)
        found[axis] = max((n for n in range(1, most + 1) if left % n == 0), default=1)
        left //= found[axis]
    return [found.get(axis, left) for axis in AXES]


def _sizes(shape):
    return dict(zip(AXES, shape, strict=True))


def param_shardings(
    shapes: Any, mesh: jax.sharding.Mesh, rules: Sequence[tuple[str, tuple]] = RULES
) -> Any:
    """NamedSharding of every parameter, in a tree like `shapes`.

    Args:
        shapes: tree of anything with a shape.
        mesh: with all the axes that the rules name.
        rules: ordered (path regex, axes of the trailing dimensions).

    Raises:
        ValueError: parameters that match no rule, or whose size an axis does not divide; all named.
    """
    faults = []

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = next((axes for pattern, axes in rules if re.fullmatch(pattern, name)), None)
        if axes is None or len(axes) > len(leaf.shape):
            faults.append(f"{name} of shape {tuple(leaf.shape)} matches no sharding rule")
            return None
        spec = (None,) * (len(leaf.shape) - len(axes)) + axes
        for size, axis in zip(leaf.shape, spec, strict=True):
            if axis is not None and size % mesh.shape[axis]:
                legal = max(n for n in range(1, mesh.shape[axis]) if size % n == 0)
                faults.append(
                    f"{name}: {axis}={mesh.shape[axis]} does not divide {size}; the next smaller "
                    f"size that does is {legal}"
                )
        return NamedSharding(mesh, P(*spec))

    shardings = jax.tree_util.tree_map_with_path(one, shapes)
    if faults:
        raise ValueError("; ".join(faults))
    return shardings


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, P(BATCH_AXES))
