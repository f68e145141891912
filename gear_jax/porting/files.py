"""A directory of safetensors files -> named tensors, trusting nothing.

Headers are checked claim by claim before a tensor is believed: sizes, offsets, key names and file
names are somebody else's. Nothing is ever unpickled. Bytes are read, never mapped, so that memory
stays bounded and a file cut short meanwhile is an error, not a crash. (The safetensors package,
asked for ten rows of a tensor with its `pread` backend, reads all of it: 246 MB for 41 kB.)
Faults: reliability.md 2h.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import stat
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2,
    "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_MAX_JSON = 4 << 20  # bytes; the header of a 7B model has 90 thousand
_MAX_SIDE, _MAX_AXES = 1 << 40, 64  # of a shape, so that no claim costs time
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_INDEX = "model.safetensors.index.json"
_EXPONENT = {
    "F32": (np.uint32, np.uint32(0x7F800000)),
    "F16": (np.uint16, np.uint16(0x7C00)),
    "BF16": (np.uint16, np.uint16(0x7F80)),
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be trusted or does not fit; one sentence that names file and key."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one foreign tensor lies: name, file, first byte, safetensors dtype, shape."""

    key: str
    file: pathlib.Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start .. stop of the first axis as a NumPy array; no other byte is read.

        Raises:
            CheckpointError: the file cannot be read any more, or holds NaN or infinity here.
        """
        bits, exponent = _EXPONENT[self.dtype]
        rows = range(*slice(start, stop).indices(self.shape[0])) if self.shape else range(1)
        row = math.prod(self.shape[1:])
        skip = self.offset + rows.start * row * np.dtype(bits).itemsize
        try:
            array = np.fromfile(self.file, bits, len(rows) * row, offset=skip)
        except OSError as error:
            raise CheckpointError(
                f"{self.file.name}: cannot read key {self.key!r}: {error}"
            ) from error
        if array.size != len(rows) * row:
            raise CheckpointError(f"{self.file.name}: cut short within key {self.key!r}")
        if np.any(array & exponent == exponent):
            raise CheckpointError(f"{self.file.name}: key {self.key!r} holds NaN or infinity")
        return array.view(DTYPES[self.dtype]).reshape(
            len(rows) if self.shape else (), *self.shape[1:]
        )


def load_json(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a JSON file of at most 4 MiB.

    Raises:
        CheckpointError: absent, no plain file, too large, not UTF-8, not JSON, not an object, or a
            key twice.
    """
    path = pathlib.Path(path)
    return _parse(_read_small(path), path.name)


def _read_small(path: pathlib.Path) -> bytes:
    """All bytes of a plain file of at most 4 MiB."""
    size = _plain_size(path)
    if size > _MAX_JSON:
        raise CheckpointError(f"{path.name}: {size} bytes; at most {_MAX_JSON} are expected")
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error.strerror} ({path})") from error


def _plain_size(path: pathlib.Path) -> int:
    """Size of a plain file; anything else, such as a pipe or a device, could block or never end."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error.strerror} ({path})") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path.name}: not a plain file ({path})")
    return status.st_size


def _parse(data: bytes, name: str) -> dict[str, Any]:
    def no_duplicates(pairs):
        made = dict(pairs)
        if len(made) != len(pairs):
            seen = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise CheckpointError(f"{name}: key {shorten(twice)} stands there twice")
        return made

    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=no_duplicates)
    except CheckpointError:
        raise
    except RecursionError as error:
        raise CheckpointError(f"{name}: JSON nested too deep") from error
    except ValueError as error:
        raise CheckpointError(f"{name}: not valid UTF-8 JSON: {shorten(str(error))}") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{name}: expected a JSON object, found {type(parsed).__name__}")
    return parsed


def shorten(value: Any) -> str:
    """A value as a message shows it: one line, at most 100 characters."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def read_header(path: pathlib.Path) -> dict[str, Tensor]:
    """Tensors of one safetensors file, {key: Tensor}, after checking every claim of its header.

    Raises:
        CheckpointError: anything but a well-formed file whose tensors cover its bytes exactly once.
    """
    name, size = path.name, _plain_size(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise CheckpointError(
                    f"{name}: {size} bytes cannot hold the header of {length} bytes it announces: "
                    "not a safetensors file, or cut short"
                )
            if length > _MAX_JSON:
                raise CheckpointError(
                    f"{name}: header of {length} bytes; at most {_MAX_JSON} expected"
                )
            header = _parse(file.read(length), name)
    except OSError as error:
        raise CheckpointError(f"{name}: cannot be read: {error.strerror} ({path})") from error
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(x, str) for x in notes.values()):
        raise CheckpointError(f"{name}: __metadata__ is {shorten(notes)}, expected texts by name")
    tensors, spans = {}, []
    for key, entry in header.items():
        dtype, shape, begin, end = _claims(name, key, entry)
        tensors[key] = Tensor(key, path, 8 + length + begin, dtype, shape)
        spans.append((begin, end, key))
    place = 0
    for begin, end, key in sorted(spans):
        if begin != place:
            raise CheckpointError(
                f"{name}: key {shorten(key)} begins at byte {begin} of the data, expected {place}: "
                "tensors overlap or leave a hole"
            )
        place = end
    if place != size - 8 - length:
        last = max(spans, default=(0, 0, None))[2]
        raise CheckpointError(
            f"{name}: {size - 8 - length} bytes of data, but its tensors, of which "
            f"{shorten(last)} is the last, end at {place}"
        )
    return tensors


def _claims(name: str, key: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of one header entry."""

    def whole(values, most, count=None):
        fine = isinstance(values, list) and all(type(v) is int and 0 <= v <= most for v in values)
        return fine and (len(values) == count if count else len(values) <= _MAX_AXES)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{name}: key {shorten(key)} has no plain dtype, shape, data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise CheckpointError(f"{name}: key {shorten(key)} has unknown dtype {shorten(dtype)}")
    if not whole(shape, _MAX_SIDE) or not whole(offsets, 1 << 63, 2):
        raise CheckpointError(
            f"{name}: key {shorten(key)} has shape {shorten(shape)} and data_offsets "
            f"{shorten(offsets)}: expected lists of whole numbers from 0"
        )
    needed = _SIZES[dtype] * math.prod(shape)
    if offsets[1] - offsets[0] != needed:
        raise CheckpointError(
            f"{name}: key {shorten(key)}, {dtype} of shape {shorten(shape)}, needs "
            f"{shorten(needed)} bytes but has offsets {offsets}"
        )
    return dtype, tuple(shape), *offsets


def open_directory(
    directory: str | os.PathLike, parts: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """All tensors of a checkpoint directory, {key: Tensor}.

    Args:
        directory: holds `model.safetensors`, or shards and `model.safetensors.index.json`.
        parts: names of the safetensors files that make up the checkpoint, where its format has
            other names; then no index is looked for.

    Raises:
        CheckpointError: nothing usable, something ambiguous, or any fault of a file.
    """
    directory = pathlib.Path(directory)
    if directory.is_file() and directory.name.endswith(_PICKLED):
        raise CheckpointError(_pickled(directory.name))
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: no such directory; expected one with safetensors files"
        )
    if parts is not None:
        files, index = list(parts), None
    else:
        files, index = _listed(directory)
    paths = [inside(directory, name) for name in files]
    _verify_sums(directory, paths)
    tensors = {}
    for path in paths:
        for key, tensor in read_header(path).items():
            if key in tensors:
                raise CheckpointError(
                    f"{path.name}: key {key!r} is also in {tensors[key].file.name}"
                )
            tensors[key] = tensor
    if index is not None:
        _compare_index(index, tensors)
    return tensors


def _listed(directory: pathlib.Path) -> tuple[list[str], dict[str, str] | None]:
    """File names of a Hugging Face checkpoint, and its index {key: file name} or None."""
    single, index = directory / "model.safetensors", directory / _INDEX
    if os.path.lexists(single) and os.path.lexists(index):
        raise CheckpointError(
            f"{directory}: both model.safetensors and {_INDEX} are there: remove one"
        )
    if os.path.lexists(single):
        return ["model.safetensors"], None
    if not os.path.lexists(index):
        names = sorted(path.name for path in directory.iterdir())
        if pickled := [name for name in names if name.endswith(_PICKLED)]:
            raise CheckpointError(_pickled(pickled[0]))
        raise CheckpointError(
            f"{directory}: neither model.safetensors nor {_INDEX} is there, only {names[:5]}"
        )
    listed = load_json(inside(directory, _INDEX)).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError(f"{_INDEX}: expected 'weight_map', an object of key: file name")
    if not listed:
        raise CheckpointError(f"{_INDEX}: 'weight_map' is empty")
    for key, name in listed.items():
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name):
            raise CheckpointError(
                f"{_INDEX}: key {shorten(key)} lies in {shorten(name)}: expected the "
                "plain name of a .safetensors file"
            )
    for key, name in listed.items():
        if not (directory / name).exists():
            raise CheckpointError(
                f"{_INDEX}: key {shorten(key)} lies in {name!r}, which is not there"
            )
    return sorted(set(listed.values())), listed


def _pickled(name):
    return (
        f"{name}: pickled weights can run code and are never opened; save the model as safetensors "
        "(transformers: save_pretrained)"
    )


def inside(directory: pathlib.Path, name: str) -> pathlib.Path:
    """The path of a file; a link may lead only into the directory or its hub cache's `blobs`."""
    path = directory / name
    real, home = path.resolve(), directory.resolve()
    blobs = home.parent.parent / "blobs"
    if not (
        real.is_relative_to(home) or (home.parent.name == "snapshots" and real.parent == blobs)
    ):
        raise CheckpointError(f"{name}: a link that leads out of the checkpoint, to {real}")
    return path


def _compare_index(index: dict[str, str], tensors: dict[str, Tensor]) -> None:
    for key, name in index.items():
        if key not in tensors or tensors[key].file.name != name:
            raise CheckpointError(
                f"{_INDEX}: key {shorten(key)} is said to be in {name}, which lacks it"
            )
    for key, tensor in tensors.items():
        if key not in index:
            raise CheckpointError(f"{tensor.file.name}: key {shorten(key)} is not in {_INDEX}")


def _verify_sums(directory: pathlib.Path, paths: list[pathlib.Path]) -> None:
    """Compare with SHA256SUMS, where the publisher gave one (lines `<hex>  <file name>`)."""
    sums = directory / "SHA256SUMS"
    if not os.path.lexists(sums):
        return
    expected: dict[str, str] = {}
    for line in _read_small(inside(directory, sums.name)).decode("utf-8", "replace").splitlines():
        match = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line)
        if match and expected.setdefault(match[2], match[1].lower()) != match[1].lower():
            raise CheckpointError(f"SHA256SUMS: two different sums for {shorten(match[2])}")
    for path in paths:
        if path.name not in expected:
            raise CheckpointError(f"SHA256SUMS: has no line `<sha256>  {path.name}`")
    for name, digest in expected.items():
        path = directory / name
        if path in paths or (name == "config.json" and path.is_file()):
            _plain_size(path)
            if sha256(path) != digest:
                raise CheckpointError(f"{name}: its sha256 is not the one in SHA256SUMS: damaged")


def sha256(path: pathlib.Path) -> str:
    """Hex digest of a file, read in parts."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(
    path: pathlib.Path,
    tensors: Sequence[tuple[str, str, Sequence[int], Callable[[], np.ndarray]]],
) -> None:
    """Write one safetensors file, tensor by tensor, then force it to disk.

    Args:
        path: where; must not exist.
        tensors: list of (key, safetensors dtype, shape, function returning the array).
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for key, dtype, shape, _ in tensors:
        end = place + DTYPES[dtype].itemsize * math.prod(shape)
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, end]}
        place = end
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    with path.open("xb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        for key, dtype, shape, read in tensors:
            array = np.ascontiguousarray(read())
            if array.shape != tuple(shape) or array.dtype != DTYPES[dtype]:
                raise AssertionError(f"{key}: {array.dtype}{array.shape} for {dtype}{shape}")
            file.write(array.view(np.uint8).reshape(-1).data)
        file.flush()
        os.fsync(file.fileno())
