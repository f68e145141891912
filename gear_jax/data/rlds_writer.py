"""Write episodes as RLDS: TFRecord shards with features.json and dataset_info.json.

What is written reads back with tfds, with and without TensorFlow, and with our own index. A data
set appears whole or not at all.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
from tensorflow_datasets.proto import tf_example_pb2

from gear_jax.data.rlds_features import STEPS
from gear_jax.data.tfrecord import DataError, masked_crc

_TFDS = "tensorflow_datasets.core.features."


@dataclasses.dataclass(frozen=True)
class Column:
    """One key of a data set.

    Attributes:
        kind: "image" for encoded bytes, "text", or "tensor".
        shape: of one value; of an image, [H, W, 3], with None where it varies.
        dtype: of a tensor: "float32", "float64", "int32", "int64" or "bool".
        encoding: of an image: "jpeg" or "png".
    """

    kind: Literal["image", "text", "tensor"]
    shape: tuple[int | None, ...] = ()
    dtype: str = "float32"
    encoding: Literal["jpeg", "png"] = "jpeg"


class RldsWriter:
    """Episodes in, shards out; a context manager.

        columns = {"steps/observation/state": Column("tensor", (8,)), ...}
        with RldsWriter(folder, "my_robot", columns) as writer:
            writer.add({"steps/observation/state": states, ...})

    The same episodes are the same bytes. Leaving it with an error leaves nothing behind.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        name: str,
        columns: Mapping[str, Column],
        *,
        version: str = "1.0.0",
        split: str = "train",
        shard_bytes: int = 256 << 20,
    ):
        """Nothing is written before the first episode.

        Args:
            directory: of the data set; `<directory>/<name>/<version>` is made.
            name: letters, digits and "_".
            columns: {key of tf.train.Example}; those of each step begin with "steps/".
            version: three numbers.
            split: such as "train".
            shard_bytes: a shard is closed when it reaches this size.

        Raises:
            DataError: a name that tfds cannot read, or columns without steps.
            FileExistsError: there is such a data set.
        """
        if not name.isidentifier() or not split.isidentifier():
            raise DataError(f"data set {name!r}, split {split!r}: expected letters, digits and '_'")
        if not re.fullmatch(r"\d+\.\d+\.\d+", version):
            raise DataError(f"version {version!r}: expected three numbers, such as 1.0.0")
        if not any(key.startswith(STEPS) for key in columns):
            raise DataError(f"columns {sorted(columns)}: expected some that begin with {STEPS!r}")
        self.target = pathlib.Path(directory) / name / version
        if self.target.exists():
            raise FileExistsError(f"{self.target} is already there")
        self.name, self.version, self.split = name, version, split
        self.columns, self.shard_bytes = dict(columns), shard_bytes
        self._partial = self.target.with_name(f".{version}.partial")
        self._lengths: list[int] = []
        self._bytes = 0
        self._file: Any = None

    def __enter__(self) -> Self:
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        return self

    def __exit__(self, kind, error, trace):
        if self._file is not None:
            self._file.close()
        try:
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, episode: Mapping[str, Any]) -> None:
        """Write one episode.

        Args:
            episode: a value for every column; those of steps have a leading axis of steps, equal
                for all. Images are bytes, texts str.

        Raises:
            DataError: a key too few or too many, or values of another shape or number of steps.
        """
        if set(episode) != set(self.columns):
            raise DataError(f"episode has keys {sorted(episode)}, expected {sorted(self.columns)}")
        message: Any = tf_example_pb2.Example()  # type: ignore[missing-attribute]
        lengths = {}
        for key, column in self.columns.items():
            values = episode[key] if key.startswith(STEPS) else [episode[key]]
            if key.startswith(STEPS):
                lengths[key] = len(values)
            _put(message.features.feature[key], key, column, values)
        if len(set(lengths.values())) != 1 or not min(lengths.values()):
            raise DataError(f"numbers of steps {lengths}: expected one, above 0")
        payload = message.SerializeToString(deterministic=True)  # a map has no order of its own
        if self._file is None or self._file.tell() > self.shard_bytes:
            if self._file is not None:
                self._file.close()
            self._file = (self._partial / str(len(self._lengths))).open("wb")
            self._lengths.append(0)
        length = struct.pack("<Q", len(payload))
        for part in (length, payload):
            self._file.write(part + struct.pack("<I", masked_crc(part)))
        self._lengths[-1] += 1
        self._bytes += len(payload)

    def _finish(self) -> None:
        if not self._lengths:
            raise DataError(f"{self.target}: no episode was written")
        count = len(self._lengths)
        for number in range(count):
            shard = f"{self.name}-{self.split}.tfrecord-{number:05d}-of-{count:05d}"
            (self._partial / str(number)).rename(self._partial / shard)
        info = {
            "fileFormat": "tfrecord",
            "moduleName": f"{self.name}.{self.name}",
            "name": self.name,
            "version": self.version,
            "splits": [
                {
                    "name": self.split,
                    "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                    "shardLengths": [str(n) for n in self._lengths],
                    "numBytes": str(self._bytes),
                }
            ],
        }
        (self._partial / "dataset_info.json").write_text(json.dumps(info, indent=1))
        (self._partial / "features.json").write_text(json.dumps(_features(self.columns), indent=1))
        self._partial.rename(self.target)


def _put(feature: Any, key: str, column: Column, values: Sequence[Any]) -> None:
    """Append the values of one key."""
    if column.kind != "tensor":
        kind = bytes if column.kind == "image" else str
        if not all(isinstance(value, kind) for value in values):
            raise DataError(f"key {key!r}: expected {kind.__name__} for every {column.kind}")
        feature.bytes_list.value.extend(
            value if isinstance(value, bytes) else value.encode() for value in values
        )
        return
    array = np.asarray(values)
    if array.shape[1:] != column.shape or not np.can_cast(array.dtype, column.dtype, "same_kind"):
        raise DataError(
            f"key {key!r} has {array.dtype}{list(array.shape[1:])}, expected "
            f"{column.dtype}{list(column.shape)} in each"
        )
    array = array.astype(column.dtype)
    if column.dtype.startswith("float"):  # tf.train.Example has float32 only
        feature.float_list.value.extend(array.astype(np.float32).ravel().tolist())
    else:
        feature.int64_list.value.extend(array.astype(np.int64).ravel().tolist())


def _features(columns: Mapping[str, Column]) -> dict[str, Any]:
    """features.json: the tree of keys, as tfds describes it."""
    tree: dict[str, Any] = {}
    for key, column in columns.items():
        *folders, leaf = key.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = column
    described = {name: _describe(child) for name, child in tree.items() if name != "steps"}
    described["steps"] = {
        "pythonClassName": f"{_TFDS}dataset_feature.Dataset",
        "sequence": {"feature": _describe(tree["steps"]), "length": "-1"},
    }
    return _dictionary(described)


def _dictionary(features: dict[str, Any]) -> dict[str, Any]:
    return {
        "pythonClassName": f"{_TFDS}features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }


def _describe(node: Any) -> dict[str, Any]:
    if isinstance(node, dict):
        return _dictionary({name: _describe(child) for name, child in node.items()})
    if node.kind == "text":
        return {"pythonClassName": f"{_TFDS}text_feature.Text", "text": {}}
    shape = {"dimensions": [str(-1 if n is None else n) for n in node.shape]} if node.shape else {}
    if node.kind == "image":
        return {
            "pythonClassName": f"{_TFDS}image_feature.Image",
            "image": {"dtype": "uint8", "encodingFormat": node.encoding, "shape": shape},
        }
    return {
        "pythonClassName": f"{_TFDS}tensor_feature.Tensor",
        "tensor": {"dtype": node.dtype, "encoding": "none", "shape": shape},
    }
