"""What a tfds data set says of itself: features.json and dataset_info.json. data.md 2.2."""

import dataclasses
import functools
import json
import math
import pathlib
import zlib
from typing import Any

import numpy as np

from gear_jax.data.tfrecord import DataError

STEPS = "steps/"  # keys of values that every step has begin so


def list_shards(
    dataset: pathlib.Path, split: str, file_format: str = "tfrecord"
) -> tuple[list[pathlib.Path], list[int]]:
    """Paths of a split's shards and the number of records that dataset_info.json gives each.

    Raises:
        DataError: no such split, another file format, or a shard that is not there.
    """
    info = load_json(dataset / "dataset_info.json")
    try:
        if info["fileFormat"] != file_format:
            raise DataError(
                f"{dataset}: file format {info['fileFormat']!r}, expected {file_format!r}"
            )
        splits = {entry["name"]: entry for entry in info["splits"]}
        if split not in splits:
            raise DataError(
                f"{dataset}: split {split!r} is unknown: expected one of {list(splits)}"
            )
        lengths = [int(length) for length in splits[split]["shardLengths"]]
        template = splits[split].get(
            "filepathTemplate", "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        )
        name = info["name"]
    except (KeyError, TypeError) as error:
        raise DataError(f"{dataset / 'dataset_info.json'}: field {error} is missing") from error
    paths = []
    for number in range(len(lengths)):
        file = template.format(
            DATASET=name,
            SPLIT=split,
            FILEFORMAT=file_format,
            SHARD_X_OF_Y=f"{number:05d}-of-{len(lengths):05d}",
        )
        paths.append(dataset / file)
        if not paths[-1].is_file():
            raise DataError(f"{paths[-1]}: the shard is not there")
    return paths, lengths


@dataclasses.dataclass(frozen=True)
class Feature:
    """What features.json says of one key.

    Attributes:
        shape: of one value: of one step for keys below "steps/".
        dtype: its NumPy dtype; "bytes" for images and text, which are handed out as they lie.
        encoding: "none", or "zlib" and "bytes" for tensors stored as byte strings.
    """

    shape: tuple[int, ...]
    dtype: str
    encoding: str = "none"

    @functools.cached_property
    def width(self) -> int:
        """Numbers in one value; 1 for byte strings."""
        if self.dtype == "bytes" or self.encoding != "none":
            return 1
        return math.prod(self.shape)


def read_features(dataset: pathlib.Path) -> dict[str, Feature]:
    """{key of tf.train.Example: Feature} from features.json.

    Raises:
        DataError: unreadable, or a kind of feature that is not built.
    """
    path, found = dataset / "features.json", {}

    def walk(node: Any, key: str) -> None:
        if "featuresDict" in node:
            for name, child in node["featuresDict"]["features"].items():
                walk(child, f"{key}/{name}" if key else name)
        elif "sequence" in node and not key.startswith(STEPS):
            walk(node["sequence"]["feature"], key)
        elif "image" in node or "text" in node:
            found[key] = Feature((), "bytes")
        elif "tensor" in node:
            tensor = node["tensor"]
            shape = tuple(int(side) for side in tensor.get("shape", {}).get("dimensions", ()))
            dtype = "bytes" if tensor["dtype"] == "string" else tensor["dtype"]
            found[key] = Feature(shape, dtype, tensor.get("encoding", "none"))
        else:
            kinds = [kind for kind in node if kind not in ("pythonClassName", "description")]
            raise DataError(f"{path}: feature {key!r} is a {kinds}, which is not built")

    try:
        walk(load_json(path), "")
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a tfds features.json: {error!r}") from error
    return found


def decode_tensors(feature: Feature, values: list[bytes], where: str) -> np.ndarray:
    """Tensors that were stored as byte strings.

    Raises:
        DataError: one does not decode, or has another size than features.json says.
    """
    try:
        if feature.encoding == "zlib":  # never more than a tensor holds
            size = math.prod(feature.shape) * np.dtype(feature.dtype).itemsize
            values = [zlib.decompressobj().decompress(value, size + 1) for value in values]
        rows = [np.frombuffer(v, feature.dtype).reshape(feature.shape) for v in values]
    except (ValueError, zlib.error) as error:
        raise DataError(f"{where}: a tensor does not decode: {error}") from error
    return np.stack(rows)


def load_json(path: pathlib.Path) -> Any:
    """What a JSON file holds, or a DataError that names it."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
