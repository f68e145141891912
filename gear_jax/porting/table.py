"""The porting engine: a table of (foreign key, our path, einops pattern), run both ways.

A row speaks of one layer's tensor; `{i}` in the key is the layer, which is our leading axis. A
table must use every foreign key exactly once and fill every parameter exactly once, with equal
shapes, or nothing is loaded. Tensors stream in parts of at most 8 MiB straight into the shards
that need them.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from gear_jax.porting.files import DTYPES, CheckpointError, Tensor, shorten

_PART = 8 << 20  # bytes read at a time
_SHOWN = 20  # faults named in one error


@dataclasses.dataclass(frozen=True)
class Row:
    """One foreign tensor per layer and the parameter it fills.

    Attributes:
        foreign: key, with `{i}` for the layer of a stacked parameter.
        ours: path in our tree, joined by "/".
        pattern: einops pattern from the foreign tensor to ours (without the layer axis).
    """

    foreign: str
    ours: str
    pattern: str


@dataclasses.dataclass(frozen=True)
class Table:
    """How one published model maps to our parameters.

    Attributes:
        rows: the map.
        sizes: lengths of axes that patterns join, such as heads.
        renames: (regex, replacement) on foreign keys: newer spellings to the released one.
        ignored: regexes of foreign keys that belong to parts we do not build.
        carried: paths of `rows` that no tower reads; they are kept so that nothing is lost.
    """

    rows: tuple[Row, ...]
    sizes: dict[str, int]
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    carried: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One foreign tensor and its place in ours."""

    key: str
    ours: str
    layer: int | None
    shape: tuple[int, ...]  # foreign
    row: Row


def flatten(tree: Any) -> dict[str, Any]:
    """A parameter tree as {path joined by "/": leaf}."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[name] = leaf
    return tree


def entries(table: Table, targets: Mapping[str, Any]) -> list[Entry]:
    """Every foreign tensor the table asks for, with the shape it must have.

    Args:
        table: Table.
        targets: {path: anything with a shape}, the parameters to fill, without `carried` ones.

    Returns:
        list of Entry, in the table's order, layer by layer within a row.

    Raises:
        ValueError: a row without a target, a target without a row, or with two (a fault of a
            table).
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in targets.items()} | table.carried
    filled = [row.ours for row in table.rows]
    if len(set(filled)) != len(filled) or set(filled) != set(shapes):
        odd = sorted(set(filled) ^ set(shapes)) or sorted(
            {x for x in filled if filled.count(x) > 1}
        )
        raise ValueError(f"the table's rows and the parameters differ in {odd[:_SHOWN]}")
    made = []
    for row in table.rows:
        layers = range(shapes[row.ours][0]) if "{i}" in row.foreign else [None]
        ours = shapes[row.ours] if layers == [None] else shapes[row.ours][1:]
        left, right = _sides(row.pattern)
        axes = _bind(right, ours, table.sizes, row)
        shape = tuple(int(np.prod([axes[a] for a in group], dtype=np.int64)) for group in left)
        made += [Entry(row.foreign.replace("{i}", str(i)), row.ours, i, shape, row) for i in layers]
    return made


def match(
    table: Table, targets: Mapping[str, Any], tensors: Mapping[str, Tensor], cast: bool = False
) -> list[tuple[Entry, Tensor]]:
    """Pair every entry with its foreign tensor.

    Args:
        table: Table.
        targets: {path: anything with a shape}.
        tensors: {key: Tensor} of a checkpoint.
        cast: the caller casts to a dtype of its own, so tensors may differ in dtype.

    Returns:
        list of (Entry, Tensor).

    Raises:
        CheckpointError: keys missing, left over or there under two spellings; a shape or dtype that
            is not the expected one. Up to 20 offenders are named.
    """
    found: dict[str, Tensor] = {}
    pairs: list[tuple[Entry, Tensor]] = []
    faults: list[str] = []
    for key, tensor in tensors.items():
        if any(re.fullmatch(pattern, key) for pattern in table.ignored):
            continue
        name = released_name(table, key)
        if name in found:
            twin = found[name].key
            faults.append(f"{tensor.file.name}: {shorten(key)} and {twin!r} are the same parameter")
        found[name] = tensor
    for entry in entries(table, targets):
        tensor = found.pop(entry.key, None)
        if tensor is None:
            faults.append(f"{entry.key!r} is missing, expected with shape {list(entry.shape)}")
        elif tensor.shape != entry.shape:
            faults.append(
                f"{tensor.file.name}: {tensor.key!r} has shape {shorten(list(tensor.shape))}, "
                f"expected {list(entry.shape)}"
            )
        elif tensor.dtype not in DTYPES:
            faults.append(
                f"{tensor.file.name}: {tensor.key!r} is {tensor.dtype}, expected one of "
                f"{', '.join(DTYPES)}"
            )
        else:
            pairs.append((entry, tensor))
    faults += [f"{t.file.name}: {shorten(t.key)} is not part of this model" for t in found.values()]
    if not faults and not cast:
        faults = _mixed(pairs)
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise CheckpointError("; ".join(faults[:_SHOWN]) + more)
    return pairs


def _mixed(pairs: list[tuple[Entry, Tensor]]) -> list[str]:
    counts = {}
    for _, tensor in pairs:
        counts.setdefault(tensor.dtype, []).append(tensor)
    usual = max(counts, key=lambda dtype: len(counts[dtype]))
    return [
        f"{tensor.file.name}: {tensor.key!r} is {dtype}, but {len(counts[usual])} others are "
        f"{usual}: name the dtype to cast all to, if that is meant"
        for dtype, odd in counts.items()
        if dtype != usual
        for tensor in odd
    ]


def released_name(table: Table, key: str) -> str:
    """A foreign key in the spelling of the released checkpoints."""
    for pattern, replacement in table.renames:
        key = re.sub(pattern, replacement, key)
    return key


def load(
    pairs: Sequence[tuple[Entry, Tensor]],
    targets: Mapping[str, Any],
    sizes: Mapping[str, int],
    shardings: Mapping[str, jax.sharding.Sharding],
    dtype: Any = None,
    report: Callable[[Tensor], None] = lambda tensor: None,
) -> dict[str, jax.Array]:
    """Stream tensors into sharded arrays; no process reads what none of its devices keeps.

    Args:
        pairs: from `match`.
        targets: {path: anything with a shape}, `carried` ones too.
        sizes: the table's.
        shardings: {path: jax.sharding.Sharding}.
        dtype: dtype of all parameters; by default that of the file.
        report: called with each Tensor once it is in place.

    Returns:
        {path: jax.Array}.

    Raises:
        CheckpointError: a tensor that cannot be read, or holds NaN or infinity.
    """
    by_path = {}
    for entry, tensor in pairs:
        by_path.setdefault(entry.ours, []).append((entry, tensor))
    arrays: dict[str, jax.Array] = {}
    for path, sources in by_path.items():
        shape, sharding = tuple(targets[path].shape), shardings[path]
        kind = jnp.dtype(dtype or DTYPES[sources[0][1].dtype])
        places = sharding.addressable_devices_indices_map(shape)
        places = {device: _ranges(index, shape) for device, index in places.items()}
        shards = {
            device: jnp.zeros([b - a for a, b in ranges], kind, device=device)
            for device, ranges in places.items()
        }
        for entry, tensor in sources:
            _fill(shards, places, entry, tensor, sizes, len(shape))
            report(tensor)
        arrays[path] = jax.make_array_from_single_device_arrays(
            shape, sharding, list(shards.values())
        )
    return arrays


def _fill(shards, places, entry, tensor: Tensor, sizes, rank):
    """Write one foreign tensor, part by part, into every shard that overlaps it."""
    left, right = _sides(entry.row.pattern)
    axes = _bind(left, entry.shape, sizes, entry.row)
    lead = [] if entry.layer is None else [(entry.layer, entry.layer + 1)]
    whole = [int(np.prod([axes[a] for a in group], dtype=np.int64)) for group in right]
    for start, stop, rows, axis, scale in _parts(left, right, entry, tensor, axes):
        piece = lead + [(0, size) for size in whole]
        if axis is not None:
            piece[len(lead) + axis] = (start * scale, stop * scale)
        overlaps = {device: _overlap(piece, ranges) for device, ranges in places.items()}
        if all(overlap is None for overlap in overlaps.values()):
            continue
        known = axes | ({left[0][0]: stop - start} if axis is not None else {})
        names = {a for group in left for a in group}
        array = rearrange(
            tensor.read(*rows), entry.row.pattern, **{a: n for a, n in known.items() if a in names}
        )
        array = array.reshape((1,) * (rank - array.ndim) + array.shape)
        for device, overlap in overlaps.items():
            if overlap is not None:
                inside = tuple(
                    slice(a - p, b - p) for (a, b), (p, _) in zip(overlap, piece, strict=True)
                )
                starts = [a - s for (a, _), (s, _) in zip(overlap, places[device], strict=True)]
                block = np.ascontiguousarray(array[inside]).astype(shards[device].dtype)
                shards[device] = _write(
                    shards[device],
                    jax.device_put(block, device),
                    jnp.asarray(starts, device=device),
                )
        jax.block_until_ready([shards[device] for device, x in overlaps.items() if x is not None])


@functools.partial(jax.jit, donate_argnums=0)
def _write(shard, block, starts):
    # as bits: XLA on the CPU would turn the whole of a bfloat16 shard to float32 and back
    bits = jnp.dtype(f"uint{8 * shard.dtype.itemsize}")
    shard_bits, block_bits = (jax.lax.bitcast_convert_type(x, bits) for x in (shard, block))
    starts = [starts[i] for i in range(shard.ndim)]
    written = jax.lax.dynamic_update_slice(shard_bits, block_bits, starts)
    return jax.lax.bitcast_convert_type(written, shard.dtype)


def _parts(left, right, entry, tensor, axes):
    """Split a large tensor along the outermost axis of its first dimension.

    Yields (start, stop along that axis, (foreign rows), dimension of ours, stride there).
    """
    size = DTYPES[tensor.dtype].itemsize * math.prod(entry.shape)
    outer = left[0][0] if left and left[0] else None
    group = next((g for g in right if outer in g), None)
    if size <= _PART or outer is None or group[0] != outer:
        yield 0, 1, (0, None), None, 1
        return
    count, inner = axes[outer], entry.shape[0] // axes[outer]
    scale = int(np.prod([axes[a] for a in group[1:]], dtype=np.int64))
    step = max(1, count * _PART // size)
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield start, stop, (start * inner, stop * inner), right.index(group), scale


def to_foreign(entry: Entry, array: Any, sizes: Mapping[str, int]) -> np.ndarray:
    """One foreign tensor out of our parameter, as a NumPy array in our dtype."""
    left, right = _sides(entry.row.pattern)
    part = np.asarray(array if entry.layer is None else array[entry.layer])
    names = {a for group in right for a in group}
    axes = {a: n for a, n in _bind(left, entry.shape, sizes, entry.row).items() if a in names}
    pattern = " -> ".join(reversed(entry.row.pattern.split(" -> ")))
    return rearrange(part, pattern, **axes)


def _sides(pattern):
    """Pattern "(n h) d -> d n h" as ([["n", "h"], ["d"]], [["d"], ["n"], ["h"]]); "1" as []."""
    return tuple(
        [
            [] if token == "1" else token.strip("()").split()
            for token in re.findall(r"\([^)]*\)|\S+", side)
        ]
        for side in pattern.split("->")
    )


def _bind(side, shape, sizes, row):
    """Lengths of all axes of one side of a pattern, given the tensor's shape."""
    axes = {}
    if len(side) != len(shape):
        raise ValueError(f"{row.ours}: shape {shape} does not fit pattern {row.pattern!r}")
    for group, length in zip(side, shape, strict=True):
        known = {a: sizes[a] for a in group if a in sizes}
        unknown = [a for a in group if a not in sizes]
        rest, odd = divmod(length, math.prod(list(known.values())))
        if odd or len(unknown) > 1 or (not unknown and rest != 1):
            raise ValueError(
                f"{row.ours}: shape {shape} does not fit pattern {row.pattern!r}, {sizes}"
            )
        axes |= known | dict.fromkeys(unknown, rest)
    return axes


def _ranges(index, shape):
    return [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]


def _overlap(piece, ranges):
    both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(piece, ranges, strict=True)]
    return both if all(a < b for a, b in both) else None
