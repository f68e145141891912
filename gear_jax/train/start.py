"""Where the parameters of a fresh run come from: ported weights, an earlier stage, or chance.

    config.init -> {parameter: checkpoint} -> params

Every parameter is filled from exactly one place, and every stored array is used; what may begin at
random (`fresh`) or lie idle (`unused`) is named in the config. Rows of the vocabulary that the
released model does not have begin as the mean of its rows and noise (systems.md 2.2); a robot that
the earlier stage did not know begins as the mean of those it trained (2.8).
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from gear_jax.towers.state_projector import with_new_slot
from gear_jax.train import checkpoint
from gear_jax.train.run_checkpoints import RunCheckpoints

_FOLDERS = ("qwen2_5_vl", "vggt", "published")
_TABLES = ("language/embed", "language/head")
_LAYERS = "language/layers/"
_LAST = ("/o/kernel", "/down/kernel")  # what a block adds to its input comes from these
_NOISE = 0.02  # standard deviation of a new vocabulary row about the mean


@dataclasses.dataclass(frozen=True)
class _Stored:
    """An array of a checkpoint."""

    origin: str  # as a person named it
    tree: pathlib.Path  # Orbax directory
    key: str  # path inside it
    shape: tuple[int, ...]


def loader(
    init: Mapping[str, Any], first_new_row: int, say: Callable[[str], None] = print
) -> Callable[[Any], Any] | None:
    """Fresh parameters -> the same tree, filled from where `init` says; None if from nowhere.

    Args:
        init: qwen2_5_vl, vggt: folders that launch.port wrote, or None; published: one that
            launch.publish wrote, or None; run: workdir of an earlier stage, or None; fresh: regexes
            of parameters that may begin at random; unused: regexes of stored arrays that nobody
            needs; trained: embodiment slots of `run` that were trained, () for all; fresh_rows:
            (first, end) of the vocabulary that begin at random though the checkpoint has them, for
            it was trained with them and never used them; rows_like: (row, first, end) of the
            vocabulary: those begin as `row` and their random values, and so attend as it does;
            deeper: the language tower may have more layers than the checkpoint, which begin as
            identities.
        first_new_row: of the vocabulary.
        say: told where every parameter comes from.

    Raises:
        ValueError: nothing to begin with; by the function, checkpoints that do not fit, all faults
            in one sentence.
    """
    sources = [name for name in (*_FOLDERS, "run") if init.get(name)]
    if not sources:
        if ".*" not in init["fresh"]:
            raise ValueError(
                f"init: no checkpoint is given ({', '.join((*_FOLDERS, 'run'))}), and init.fresh "
                f"is {tuple(init['fresh'])}: say '.*' to begin everything at random"
            )
        return None

    def load(params: Any) -> Any:
        stored = _gather(init, sources)
        leaves, tree = jax.tree_util.tree_flatten_with_path(params)
        named = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}
        _check(named, stored, init)
        filled = dict(named)
        for key, value in _restore(named, stored).items():
            ours = named[key]
            filled[key] = _grown(key, ours, value, stored[key], first_new_row, init)
            if key in _TABLES and init["fresh_rows"]:
                fresh = jax.jit(_fresh_rows, static_argnums=(2, 3), out_shardings=ours.sharding)
                filled[key] = fresh(filled[key], ours, *init["fresh_rows"])
            if key in _TABLES and init["rows_like"]:
                like = jax.jit(_rows_like, static_argnums=(2, 3, 4), out_shardings=ours.sharding)
                filled[key] = like(filled[key], ours, *init["rows_like"])
        if jax.process_index() == 0:
            _report(named, stored, say)
        return jax.tree_util.tree_unflatten(tree, list(filled.values()))

    return load


def _gather(init: Mapping[str, Any], sources: Sequence[str]) -> dict[str, _Stored]:
    stored: dict[str, _Stored] = {}
    for name in sources:
        for key, one in _stored(name, init[name]).items():
            if key in stored:
                raise ValueError(f"init: {key} is in {stored[key].origin} and in {one.origin}")
            stored[key] = one
    return stored


def _stored(name: str, folder: str) -> dict[str, _Stored]:
    if name == "run":
        checkpoints = RunCheckpoints(pathlib.Path(folder) / "checkpoints", read_only=True)
        try:
            step = checkpoints.newest()
            tree, prefix = checkpoints.path(step) / "state", "params/"
        finally:
            checkpoints.close()
        origin = f"{folder}, step {step}"
    else:
        checkpoint.verify_digests(folder)
        tree, prefix, origin = pathlib.Path(folder).absolute() / "params", "", str(folder)
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(tree).item_metadata.tree
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(metadata):
        key = jax.tree_util.keystr(path, simple=True, separator="/")
        if key.startswith(prefix):
            key = key.removeprefix(prefix)
            found[key] = _Stored(origin, tree, prefix + key, tuple(leaf.shape))
    return found


def _matches(patterns, key):
    return any(re.fullmatch(pattern, key) for pattern in patterns)


def _check(named, stored, init):
    faults = [
        f"{key} is in none of the checkpoints, and init.fresh does not name it"
        for key in named
        if key not in stored and not _matches(init["fresh"], key)
    ]
    faults += [
        f"{key} of {one.origin} is no parameter of this model, and init.unused does not name it"
        for key, one in stored.items()
        if key not in named and not _matches(init["unused"], key)
    ]
    for key in named.keys() & stored.keys():
        ours, theirs = named[key].shape, stored[key].shape
        grows = key.startswith(("state/", _LAYERS) if init["deeper"] else "state/")
        longer = ours[1:] == theirs[1:] and (key in _TABLES or grows)
        if ours != theirs and not (longer and (key in _TABLES or theirs[0] < ours[0])):
            faults.append(f"{key} is {list(ours)} here and {list(theirs)} in {stored[key].origin}")
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ValueError(f"init: {'; '.join(faults[:8])}{more}")


def _restore(named, stored):
    """{key: array} of everything that is stored and wanted, with our shardings and dtypes."""
    made = {}
    for tree in {one.tree for key, one in stored.items() if key in named}:
        keys = [key for key, one in stored.items() if one.tree == tree and key in named]
        targets, arguments = {}, {}
        for key in keys:
            ours = named[key]
            # tables are cut or filled with zeros to our length; slots come as they are
            shape = ours.shape if key in _TABLES else stored[key].shape
            where = ours.sharding
            if shape != ours.shape:
                spec = jax.sharding.PartitionSpec()
                where = jax.sharding.NamedSharding(ours.sharding.mesh, spec)
            _put(targets, stored[key].key, jax.ShapeDtypeStruct(shape, ours.dtype, sharding=where))
            _put(arguments, stored[key].key, ocp.ArrayRestoreArgs(
                sharding=where, global_shape=shape, dtype=ours.dtype, strict=False))  # fmt: skip
        with ocp.PyTreeCheckpointer() as checkpointer:
            restored = checkpointer.restore(
                tree, args=ocp.args.PyTreeRestore(targets, arguments, partial_restore=True)
            )
        for key in keys:
            value = restored
            for part in stored[key].key.split("/"):
                value = value[part]
            made[key] = value
    return made


def _put(tree, key, value):
    *parents, last = key.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[last] = value


def _grown(key, ours, value, stored, first_new_row, init):
    if key in _TABLES and stored.shape != ours.shape:
        return jax.jit(_new_rows, static_argnums=1, out_shardings=ours.sharding)(
            value, min(first_new_row, stored.shape[0]), jax.random.key(_TABLES.index(key))
        )
    if value.shape != ours.shape and key.startswith(_LAYERS):
        begin = jnp.zeros_like if key.endswith(_LAST) else jnp.asarray
        return jax.device_put(jnp.concatenate([value, begin(ours[len(value) :])]), ours.sharding)
    if value.shape != ours.shape:
        grow = len(ours) - len(value)
        trained = list(init["trained"]) or None
        grown = with_new_slot({"x": value}, grow, trained)["x"]
        return jax.device_put(grown, ours.sharding)
    return value


def _fresh_rows(table, ours, first, end):
    """A table whose rows `first` .. `end` - 1 are those of another."""
    rows = jnp.arange(len(table))[:, None]
    return jnp.where((first <= rows) & (rows < end), ours, table)


def _rows_like(table, ours, row, first, end):
    """A table whose rows `first` .. `end` - 1 are its `row` and the values of another."""
    return _fresh_rows(table, table[row][None] + ours, first, end)


def _new_rows(table, known, rng):
    """A table whose rows from `known` on are the mean of the others and noise."""
    old = (jnp.arange(len(table)) < known)[:, None]
    mean = jnp.sum(jnp.where(old, table, 0), axis=0, keepdims=True) / known
    noise = _NOISE * jax.random.normal(rng, table.shape, table.dtype)
    return jnp.where(old, table, mean + noise)


def _report(named, stored, say):
    """A line for the arrays of a tower that come from the same place, and for each exception."""
    whole: dict[tuple[str, str], int] = {}
    for key, ours in named.items():
        one = stored.get(key)
        if one is not None and ours.shape == one.shape:
            place = key.split("/")[0], one.origin
            whole[place] = whole.get(place, 0) + 1
        elif one is None:
            say(f"{key} {list(ours.shape)} <- random")
        else:
            kind = "rows of words" if key in _TABLES else "slots of robots"
            say(f"{key} {list(ours.shape)} <- {one.origin}, {one.shape[0]} {kind}; the others new")
    for (tower, origin), count in whole.items():
        say(f"{tower}: {count} arrays <- {origin}")
