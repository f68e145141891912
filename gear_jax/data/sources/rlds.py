"""RLDS data sets as tfds stores them: TFRecord shards read in place, or ArrayRecord files.

Keys are those of tf.train.Example, such as "steps/observation/state". TFRecord is read through the
byte-range index (`python -m launch.index`); an ArrayRecord file gives whole records only, so every
access parses one. No TensorFlow.
"""

import bisect
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gear_jax.data.rlds_features import (
    STEPS,
    Feature,
    decode_tensors,
    list_shards,
    read_features,
)
from gear_jax.data.tfrecord import BYTES, MISSING, DataError, decode_column, walk_example
from gear_jax.data.tfrecord_index import Index

_NAMES = ("episode_metadata/file_path", "episode_metadata/episode_id", "tfds_id")


class RldsSource:
    """Episodes of one split of TFRecord shards."""

    def __init__(
        self,
        dataset: str | os.PathLike,
        split: str = "train",
        index: str | os.PathLike | None = None,
    ):
        """Open the index that `tfrecord_index.build` made; `index` is its directory.

        Raises:
            DataError: no index, or one of other data.
        """
        self.index = Index(dataset, split, index)

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.index)

    def episode(self, number: int) -> "_Episode":
        """One episode; nothing is read yet."""
        return _Episode(_IndexRecord(self.index, number), self.index.split, number)

    def keys(self) -> Mapping[str, str]:
        """{key: dtype and shape}."""
        return _describe(self.index.features)

    def fingerprint(self) -> str:
        """Hash of the index's manifest and places of episodes."""
        manifest = (self.index.directory / "manifest.json").read_bytes()
        return hashlib.sha256(manifest + self.index.episodes.tobytes()).hexdigest()


class ArrayRecordSource:
    """Episodes of one split that tfds wrote as ArrayRecord."""

    def __init__(self, dataset: str | os.PathLike, split: str = "train"):
        """Open the files.

        Raises:
            DataError: no such split, a missing file, or another number of records than said.
        """
        self.dataset, self.split = pathlib.Path(dataset), split
        self.features = read_features(self.dataset)
        self.shards, self.lengths = list_shards(self.dataset, split, "array_record")
        self._ends = np.cumsum(self.lengths).tolist()
        for number, length in enumerate(self.lengths):
            found = self._reader(number).num_records()
            if found != length:
                raise DataError(
                    f"{self.shards[number]}: {found} records, but dataset_info.json says {length}"
                )

    @functools.cached_property
    def _readers(self) -> dict[int, Any]:
        return {}

    def _reader(self, shard: int) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        if shard not in self._readers:
            try:
                self._readers[shard] = ArrayRecordReader(str(self.shards[shard]))
            except RuntimeError as error:
                raise DataError(f"{self.shards[shard]}: damaged or no ArrayRecord file") from error
        return self._readers[shard]

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_readers"}

    def __len__(self) -> int:
        """Number of episodes."""
        return self._ends[-1]

    def episode(self, number: int) -> "_Episode":
        """One episode; its record is read and parsed.

        Raises:
            IndexError: no such episode.
            DataError: the record is damaged.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"episode {number}: {self.dataset} has {len(self)}")
        shard = bisect.bisect_right(self._ends, number)
        within = number - (self._ends[shard] - self.lengths[shard])
        where = f"{self.shards[shard].name}, record {within}"
        try:
            payload = self._reader(shard).read([within])[0]
            record = _ParsedRecord(payload, self.features, where)
        except (RuntimeError, IndexError, DataError) as error:
            raise DataError(f"{where}: damaged: {error}") from error
        return _Episode(record, self.split, number)

    def keys(self) -> Mapping[str, str]:
        """{key: dtype and shape}."""
        return _describe(self.features)

    def fingerprint(self) -> str:
        """Hash of names, sizes and features.json."""
        shards = [(path.name, path.stat().st_size) for path in self.shards]
        features = (self.dataset / "features.json").read_bytes()
        return hashlib.sha256(json.dumps(shards).encode() + features).hexdigest()


class _IndexRecord:
    """One record through the byte-range index."""

    def __init__(self, index: Index, number: int):
        self.index, self.number = index, number
        self.where, self.num_steps = index.where(number), index.num_steps(number)

    def has(self, key: str) -> bool:
        return key in self.index.features and self.index.has(key, self.number)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Any:
        return self.index.read(key, self.number, start, stop)


class _ParsedRecord:
    """One record in memory."""

    def __init__(self, payload: bytes, features: Mapping[str, Feature], where: str):
        self.payload, self.features, self.where = payload, features, where
        self.columns = {key: rest for key, *rest in walk_example(payload, 0, len(payload))}
        counts = {
            key: self.columns[key][0][1] / feature.width
            for key, feature in features.items()
            if key.startswith(STEPS) and self.has(key)
        }
        if len(set(counts.values())) > 1:
            raise DataError(f"{where}: keys have different numbers of steps: {counts}")
        self.num_steps = int(next(iter(counts.values()), 0))

    def has(self, key: str) -> bool:
        column = self.columns.get(key, ((MISSING, 0, 0, 0), []))[0]
        return key in self.features and column[1] > 0

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Any:
        feature = self.features[key]
        (kind, _, offset, length), places = self.columns[key]
        if kind == BYTES:
            values = [self.payload[a : a + n] for a, n in places[start:stop]]
            return (
                values if feature.dtype == "bytes" else decode_tensors(feature, values, self.where)
            )
        numbers = decode_column(kind, self.payload[offset : offset + length])
        rows = numbers.astype(feature.dtype, copy=False).reshape(-1, *feature.shape)
        return rows[start:stop]


class _Episode:
    """One record as a RawEpisode."""

    fps = None  # RLDS does not say

    def __init__(self, record: _IndexRecord | _ParsedRecord, split: str, number: int):
        self.record, self.where, self.num_steps = record, record.where, record.num_steps
        self._fallback = f"{split}/{number}"

    @property
    def episode_id(self) -> str:
        """What the data set calls it, or split and number."""
        for key in _NAMES:
            if self.has(key):
                name = self.record.read(key)[0]
                name = name.decode(errors="replace") if isinstance(name, bytes) else name
                return f"{self._fallback}:{name}"
        return self._fallback

    def has(self, key: str) -> bool:
        return self.record.has(key)

    def read(self, key: str) -> np.ndarray:
        return self.record.read(key)

    def text(self, key: str) -> str:
        """UTF-8, or Language-Table's way: code points as numbers, padded with zeros."""
        first = self.record.read(key, 0, 1)[0]
        if isinstance(first, bytes):
            return first.decode("utf-8")
        return "".join(map(chr, np.trim_zeros(np.asarray(first).ravel(), "b").tolist()))

    def images(self, key: str) -> Sequence[bytes]:
        return _Images(self.record, key)


class _Images(Sequence):
    """Encoded images of one view, read one by one."""

    def __init__(self, record: _IndexRecord | _ParsedRecord, key: str):
        self.record, self.key = record, key

    def __len__(self) -> int:
        return self.record.num_steps

    def __getitem__(self, step):
        if not 0 <= step < len(self):
            raise IndexError(step)
        return self.record.read(self.key, step, step + 1)[0]


def _describe(features: Mapping[str, Feature]) -> dict[str, str]:
    return {
        key: "bytes (image or text)" if f.dtype == "bytes" else f"{f.dtype}{list(f.shape)}"
        for key, f in features.items()
    }
