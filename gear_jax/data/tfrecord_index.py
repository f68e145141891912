"""Byte ranges of every value in untouched TFRecord shards: build once, read only what is needed.

An RLDS record is one tf.train.Example that holds a whole episode; its features are columns over
the steps. The index walks the headers of each record once and remembers where each column lies,
and each element of a column of byte strings (a JPEG per step). A training sample then costs three
image reads and a few rows of floats instead of the whole record, and no copy of the data is made.

On disk (`build` makes it whole or not at all):

    manifest.json         version, sha256 of features.json, shards with their sizes, keys
    episodes.npy          EPISODE[E]: shard, payload place and length, number of steps
    columns/{n}.npy       COLUMN[E]: kind, place, bytes and number of values of key n
    elements/{n}.npy      ELEMENT[...]: place and length of each byte string, episode by episode
    starts/{n}.npy        uint64[E + 1]: first element of each episode

Facts and measurements: data.md 2.3 and 5.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import mmap
import multiprocessing
import os
import pathlib
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gear_jax.data.rlds_features import (
    STEPS,
    Feature,
    decode_tensors,
    list_shards,
    load_json,
    read_features,
)
from gear_jax.data.tfrecord import (
    BYTES,
    FLOATS,
    MISSING,
    DataError,
    decode_column,
    frames,
    masked_crc,
    walk_example,
)

VERSION = 1
_FLOAT32 = np.dtype("<f4")
_OPENING = threading.Lock()  # CPython 3.11 can fail where several threads parse .npy headers

EPISODE = np.dtype([("shard", "<u4"), ("steps", "<u4"), ("offset", "<u8"), ("length", "<u8")])
COLUMN = np.dtype([("kind", "u1"), ("count", "<u4"), ("offset", "<u8"), ("length", "<u8")])
ELEMENT = np.dtype([("offset", "<u4"), ("length", "<u4")])  # from the start of the payload


def build(
    dataset: str | os.PathLike,
    split: str,
    target: str | os.PathLike | None = None,
    *,
    num_workers: int = 1,
    report: Callable[[str], None] = lambda shard: None,
) -> pathlib.Path:
    """Index one split of a data set directory.

    Args:
        dataset: holds features.json, dataset_info.json and the shards.
        split: its name, such as "train".
        target: directory of the index; by default `<dataset>/.gear_index/<split>`.
        num_workers: processes, a shard each.
        report: called with the name of each shard that is done.

    Returns:
        The index's directory. One that was there is replaced.

    Raises:
        DataError: anything wrong with the data set; nothing is left behind.
    """
    dataset = pathlib.Path(dataset)
    target = _place(dataset, split, target)
    shards, lengths = list_shards(dataset, split)
    features = read_features(dataset)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        parts = []
        for path, part in zip(shards, _index_all(shards, features, num_workers), strict=True):
            parts.append(part)
            report(path.name)
        for path, part, expected in zip(shards, parts, lengths, strict=True):
            if len(part["episodes"]) != expected:
                raise DataError(
                    f"{path.name}: {len(part['episodes'])} records, but dataset_info.json says "
                    f"{expected}"
                )
        _write(partial, dataset, shards, features, parts)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _place(dataset: pathlib.Path, split: str, target: str | os.PathLike | None) -> pathlib.Path:
    return pathlib.Path(target) if target else dataset / ".gear_index" / split


def _index_all(
    shards: Sequence[pathlib.Path], features: dict[str, Feature], num_workers: int
) -> Iterator[dict]:
    if num_workers <= 1:
        yield from (_index_shard(path, features) for path in shards)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_workers, context) as pool:
        yield from pool.map(_index_shard, shards, [features] * len(shards))


def _index_shard(path: pathlib.Path, features: dict[str, Feature]) -> dict[str, Any]:
    """Episodes, columns and elements of one shard."""
    episodes, columns = [], {key: [] for key in features}
    elements: dict[str, list] = {key: [] for key in features}
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            data: Any = b""
        else:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for number, (offset, length) in enumerate(frames(data, path.name)):
            where = f"{path.name}, record {number}"
            if length >= 1 << 32:
                raise DataError(f"{where}: {length} bytes; a record may have at most 4 GiB")
            try:
                walked = {key: rest for key, *rest in walk_example(data, offset, length)}
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
            steps = _num_steps(walked, features, where)
            episodes.append((0, steps, offset, length))
            for key in features:
                column, places = walked.get(key, ((MISSING, 0, offset, 0), []))
                columns[key].append(column)
                elements[key] += places
    return {
        "episodes": np.array(episodes, EPISODE),
        "columns": {key: np.array(rows, COLUMN) for key, rows in columns.items()},
        "elements": {key: np.array(rows, ELEMENT) for key, rows in elements.items()},
    }


def _num_steps(walked: dict[str, list], features: dict[str, Feature], where: str) -> int:
    """The number of steps, on which all columns must agree."""
    found: dict[str, int] = {}
    for key, feature in features.items():
        kind, count = walked[key][0][:2] if key in walked else (MISSING, 0)
        is_bytes = feature.dtype == "bytes" or feature.encoding != "none"
        if kind == MISSING or not count:
            continue
        if (kind == BYTES) != is_bytes:
            raise DataError(f"{where}: key {key!r} is not stored as features.json says")
        if not key.startswith(STEPS):
            if count != feature.width:
                raise DataError(
                    f"{where}: key {key!r} has {count} values, expected {feature.width}"
                )
            continue
        if count % feature.width:
            raise DataError(
                f"{where}: key {key!r} has {count} values, no multiple of {feature.width}"
            )
        found[key] = count // feature.width
    if len(set(found.values())) > 1:
        first, *_, last = sorted(found, key=found.__getitem__)
        raise DataError(
            f"{where}: key {first!r} has {found[first]} steps, key {last!r} has {found[last]}"
        )
    return next(iter(found.values()), 0)


def _write(
    partial: pathlib.Path,
    dataset: pathlib.Path,
    shards: Sequence[pathlib.Path],
    features: dict[str, Feature],
    parts: Sequence[dict],
) -> None:
    for folder in ("columns", "elements", "starts"):
        (partial / folder).mkdir(parents=True)
    for number, part in enumerate(parts):
        part["episodes"]["shard"] = number
    np.save(partial / "episodes.npy", np.concatenate([part["episodes"] for part in parts]))
    for number, key in enumerate(features):
        columns = np.concatenate([part["columns"][key] for part in parts])
        counts = np.where(columns["kind"] == BYTES, columns["count"], 0)
        starts = np.concatenate([[0], np.cumsum(counts, dtype=np.uint64)]).astype(np.uint64)
        np.save(partial / "columns" / f"{number}.npy", columns)
        np.save(partial / "starts" / f"{number}.npy", starts)
        elements = np.concatenate([part["elements"][key] for part in parts])
        np.save(partial / "elements" / f"{number}.npy", elements)
    manifest = {
        "version": VERSION,
        "features_sha256": _sha256(dataset / "features.json"),
        "shards": [{"name": path.name, "size": path.stat().st_size} for path in shards],
        "keys": {key: dataclasses.asdict(feature) for key, feature in features.items()},
    }
    (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))


def _sha256(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclasses.dataclass(frozen=True, slots=True)
class _Column:
    """The opened arrays of one key."""

    feature: Feature
    per_step: bool
    is_bytes: bool
    columns: np.ndarray
    starts: np.ndarray
    elements: np.ndarray


class Index:
    """Random access to a split of an RLDS data set; cheap to hand to worker processes.

    Nothing is read when it is opened but the manifest: the arrays are memory-mapped, files are
    opened at first use in each process.
    """

    def __init__(
        self, dataset: str | os.PathLike, split: str, directory: str | os.PathLike | None = None
    ):
        """Open the index that `build` made.

        Raises:
            DataError: no index, or one of other data: shards or features.json have changed.
        """
        self.dataset, self.split = pathlib.Path(dataset), split
        self.directory = _place(self.dataset, split, directory)
        manifest = load_json(self.directory / "manifest.json")
        if manifest.get("version") != VERSION:
            raise DataError(f"{self.directory}: made by another version; build it again")
        if manifest["features_sha256"] != _sha256(self.dataset / "features.json"):
            raise DataError(f"{self.directory}: features.json has changed; build the index again")
        self.shards = [self.dataset / shard["name"] for shard in manifest["shards"]]
        for path, shard in zip(self.shards, manifest["shards"], strict=True):
            if not path.is_file() or path.stat().st_size != shard["size"]:
                raise DataError(
                    f"{path}: not the shard of {shard['size']} bytes that was indexed; build again"
                )
        self.features = {
            key: Feature(tuple(value["shape"]), value["dtype"], value["encoding"])
            for key, value in manifest["keys"].items()
        }
        self._open()

    def _open(self) -> None:
        self.episodes = _mapped(self.directory / "episodes.npy")
        self._columns: dict[str, _Column] = {}
        self._files: dict[int, int] = {}
        self._row: tuple[int, Any] = (-1, None)  # the episode read last, for the next key
        weakref.finalize(self, _close, self._files)

    def __getstate__(self):
        opened = {"episodes", "_columns", "_files", "_row"}
        return {key: value for key, value in self.__dict__.items() if key not in opened}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    def __repr__(self) -> str:
        return f"Index({str(self.dataset)!r}, {self.split!r})"

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.episodes)

    def num_steps(self, episode: int) -> int:
        """Steps of one episode."""
        return int(self.episodes[episode]["steps"])

    def has(self, key: str, episode: int) -> bool:
        """Whether an episode has any value of a key."""
        return int(self._column(key).columns[episode]["count"]) > 0

    def read(self, key: str, episode: int, start: int = 0, stop: int | None = None) -> Any:
        """Values of one key of one episode.

        Args:
            key: as in tf.train.Example, such as "steps/observation/state".
            episode: 0 .. len(self) - 1.
            start: first step; keys outside "steps/" have one value, at 0.
            stop: one past the last step; by default all.

        Returns:
            Images and text: list of bytes. Numbers: an array [stop - start, *shape] of the
            feature's dtype.

        Raises:
            KeyError: no such key.
            IndexError: steps that the episode does not have.
            DataError: the episode has no value of this key, or the file cannot be read.
        """
        found = self._column(key)
        feature = found.feature
        row = self._row
        if row[0] != episode:  # the keys of a sample are read one after the other
            row = self._row = (episode, self.episodes[episode].item())
        shard, steps, payload, _ = row[1]
        if not found.per_step:
            steps = 1
        if stop is None:
            stop = steps
        if not 0 <= start <= stop <= steps:
            raise IndexError(f"steps {start} .. {stop} of {key!r}: episode {episode} has {steps}")
        if start == stop:
            return [] if feature.dtype == "bytes" else np.zeros((0, *feature.shape), feature.dtype)
        if found.is_bytes:
            first, last = found.starts[episode : episode + 2].tolist()
            if first == last:
                raise DataError(f"{self.where(episode)}: no value of key {key!r}")
            places = found.elements[first + start : first + stop].tolist()
            if len(places) == 1:
                values = [self._pread(shard, payload + places[0][0], places[0][1])]
            else:
                values = self._elements(shard, payload, places)
            if feature.dtype == "bytes":
                return values
            return decode_tensors(feature, values, self.where(episode))
        kind, count, place, length = found.columns[episode].item()
        if not count:
            raise DataError(f"{self.where(episode)}: no value of key {key!r}")
        width = feature.width
        if kind == FLOATS:  # fixed width: read only the rows asked for
            data = self._pread(shard, place + 4 * width * start, 4 * width * (stop - start))
            numbers = np.frombuffer(data, _FLOAT32)
        else:
            data = self._pread(shard, place, length)
            numbers = decode_column(kind, data)[width * start : width * stop]
        if feature.dtype != "float32" or kind != FLOATS:
            numbers = numbers.astype(feature.dtype, copy=False)
        return numbers.reshape(stop - start, *feature.shape)

    def _elements(self, shard: int, payload: int, places: list) -> list[bytes]:
        """Byte strings that lie one after the other, in one read."""
        begin, end = places[0][0], sum(places[-1])
        data = self._pread(shard, payload + begin, end - begin)
        return [data[offset - begin : offset - begin + length] for offset, length in places]

    def _column(self, key: str) -> "_Column":
        """The arrays of one key, opened once in a process."""
        found = self._columns.get(key)
        if found is not None:
            return found
        if key not in self.features:
            raise KeyError(f"{key!r} is none of {sorted(self.features)}")
        file = f"{list(self.features).index(key)}.npy"
        feature = self.features[key]
        is_bytes = feature.dtype == "bytes" or feature.encoding != "none"
        with _OPENING:
            if key not in self._columns:
                folders = ("columns", "starts", "elements")
                arrays = [_mapped(self.directory / folder / file) for folder in folders]
                self._columns[key] = _Column(feature, key.startswith(STEPS), is_bytes, *arrays)
            return self._columns[key]

    def _pread(self, shard: int, offset: int, length: int) -> bytes:
        descriptor = self._files.get(shard)
        if descriptor is None:
            descriptor = self._open_shard(shard)
        data = os.pread(descriptor, length, offset)
        if len(data) != length:
            raise DataError(f"{self.shards[shard].name}: ends before byte {offset + length}")
        return data

    def _open_shard(self, shard):
        with _OPENING:
            if shard not in self._files:
                descriptor = os.open(self.shards[shard], os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
                self._files[shard] = descriptor
            return self._files[shard]

    def where(self, episode: int) -> str:
        """Shard and number of an episode, for messages."""
        return f"{self.shards[int(self.episodes[episode]['shard'])].name}, episode {episode}"

    def verify(self, report: Callable[[int], None] = lambda episode: None) -> None:
        """Compare every record with its checksum: the only defence against flipped bits.

        Raises:
            DataError: names the first damaged record.
        """
        for episode, record in enumerate(self.episodes):
            shard, _, offset, length = record.item()
            data = self._pread(shard, offset, length + 4)
            if masked_crc(data[:length]) != int.from_bytes(data[length:], "little"):
                raise DataError(f"{self.where(episode)}: damaged, its checksum does not fit")
            report(episode)


def _close(files: dict[int, int]) -> None:
    for descriptor in files.values():
        os.close(descriptor)


def _mapped(path: pathlib.Path) -> np.ndarray:
    """An array that stays on disk; a plain view, since indexing a `memmap` costs ten times more."""
    return np.load(path, mmap_mode="r").view(np.ndarray)
