"""Parameters <-> an Orbax directory that appears whole or not at all, with a digest of every file.

Orbax does not notice flipped bytes in array data (reliability.md, finding 1), hence the digests.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, Literal

import google_crc32c
import jax
import orbax.checkpoint as ocp

_PARAMS, _DIGESTS, _PARTIAL = "params", "digests.json", "digests.json.partial"

Algorithm = Literal["sha256", "crc32c"]


@contextlib.contextmanager
def new_directory(target: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A directory to fill; it takes its final name only when the block ends well.

    Args:
        target: must not exist. What a killed run left behind is cleared first.

    Raises:
        FileExistsError: `target` exists.
    """
    target = pathlib.Path(target).absolute()
    partial = target.with_name(f".{target.name}.partial")
    for path in (target, partial):
        if os.path.lexists(path) and not (path == partial and path.is_dir()):
            raise FileExistsError(f"{path}: already exists; choose another name or remove it")
    parents = [parent for parent in target.parents if not parent.exists()]
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        _sync(partial)
        partial.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in parents:
            parent.rmdir()
        raise


def save_params(directory: str | os.PathLike, params: Any) -> None:
    """Write a tree of arrays below `directory`, inside a `new_directory` block."""
    shards = [s.data.nbytes for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards]
    # bounds the copies in flight; Orbax refuses a shard larger than the bound
    handler = ocp.StandardCheckpointHandler(save_concurrent_gb=1 + max(shards) // 10**9)
    path = pathlib.Path(directory).absolute() / _PARAMS
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, args=ocp.args.StandardSave(params))


def restore_params(directory: str | os.PathLike, targets: Any) -> Any:
    """Arrays of a checkpoint, after its digests were verified.

    Args:
        directory: written by `save_params` and `write_digests`.
        targets: tree of ShapeDtypeStruct with shardings; shapes and dtypes must be the stored ones.

    Raises:
        ValueError: a file is missing, extra or damaged.
    """
    verify_digests(directory)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(pathlib.Path(directory).absolute() / _PARAMS, targets)


def stored_dtypes(directory: str | os.PathLike) -> dict[str, Any]:
    """{path: dtype} of the stored arrays."""
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(pathlib.Path(directory).absolute() / _PARAMS)
    leaves = jax.tree_util.tree_leaves_with_path(metadata.item_metadata.tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.dtype for path, leaf in leaves
    }


def write_digests(directory: str | os.PathLike, algorithm: Algorithm = "sha256") -> None:
    """Record size and digest of every file below `directory`; the record appears whole.

    Args:
        directory: complete.
        algorithm: "sha256" for what is published; "crc32c", four times as fast, for a run's own.
    """
    directory = pathlib.Path(directory)
    text = json.dumps(_digests(directory, algorithm), indent=1)
    with (directory / _PARTIAL).open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    (directory / _PARTIAL).replace(directory / _DIGESTS)


def has_digests(directory: str | os.PathLike) -> bool:
    """Whether a record of digests is there; `verify_digests` reads it."""
    return (pathlib.Path(directory) / _DIGESTS).is_file()


def digest(directory: str | os.PathLike) -> str:
    """Hex sha256 over the record of digests: it names the checkpoint's contents."""
    return hashlib.sha256((pathlib.Path(directory) / _DIGESTS).read_bytes()).hexdigest()


def verify_digests(directory: str | os.PathLike) -> None:
    """Compare every file with its record.

    Raises:
        ValueError: no record, or files that differ from it; up to 5 are named.
    """
    directory = pathlib.Path(directory)
    try:
        recorded = json.loads((directory / _DIGESTS).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{directory}: no readable {_DIGESTS}: not a checkpoint, or damaged"
        ) from error
    algorithm = "crc32c" if any("crc32c" in entry for entry in recorded.values()) else "sha256"
    found = _digests(directory, algorithm)
    odd = sorted(k for k in recorded.keys() | found.keys() if recorded.get(k) != found.get(k))
    if odd:
        raise ValueError(f"{directory}: missing, extra or damaged: {', '.join(odd[:5])}")


def _digests(directory: pathlib.Path, algorithm: Algorithm) -> dict[str, dict[str, Any]]:
    made = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name not in (_DIGESTS, _PARTIAL):
            digest = hashlib.sha256() if algorithm == "sha256" else google_crc32c.Checksum()
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
            made[path.relative_to(directory).as_posix()] = {
                "size": path.stat().st_size,
                algorithm: digest.digest().hex(),
            }
    return made


def _sync(directory: pathlib.Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
