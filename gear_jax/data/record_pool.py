"""Files of vision-language records: a JSONL file, one record a line, images beside it.

Lines are found once and read by number; a record is checked against its type when it is read.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from gear_jax.data.record_state import state_fault
from gear_jax.data.tfrecord import DataError
from gear_jax.data.vision_language import TYPES, Record, text_fault
from gear_jax.types import VIEWS


def keep_record(record_id: str, percent: int) -> bool:
    """Whether a record is in the fixed subset of so many percent (systems.md 2.9).

    By the first eight bytes of BLAKE2b, since the standard library has no xxHash.
    """
    digest = hashlib.blake2b(record_id.encode()).digest()
    return int.from_bytes(digest[:8], "little") % 100 < percent


class Pool:
    """Records of a JSONL file, or of all in a folder; read by number, checked when read."""

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        types: Sequence[str] | None = None,
        keep_percent: int = 100,
    ):
        """Find the lines.

        Args:
            path: a .jsonl file, or a folder of them; images lie relative to it.
            types: take only records of these; all by default.
            keep_percent: take a fixed subset; see `keep_record`.

        Raises:
            DataError: no such file, no records, or, where records are picked, a bad one.
        """
        path = pathlib.Path(path)
        self.root = path if path.is_dir() else path.parent
        self.files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not self.files or not all(file.is_file() for file in self.files):
            raise DataError(f"{path}: expected a .jsonl file, or a folder of them")
        places, digest = [], hashlib.sha256(json.dumps([types, keep_percent]).encode())
        for number, file in enumerate(self.files):
            offset = 0
            with file.open("rb") as lines:
                for line_number, line in enumerate(lines, 1):
                    digest.update(line)
                    if line.strip():
                        places.append((number, line_number, offset, len(line)))
                    offset += len(line)
        self._places = np.array(places, np.int64).reshape(-1, 4)
        if types is not None or keep_percent < 100:
            kept = [
                (types is None or record["type"] in types)
                and keep_record(record["id"], keep_percent)
                for record in map(self.record, range(len(self._places)))
            ]
            self._places = self._places[np.array(kept, bool)]
        if not len(self._places):
            raise DataError(f"{path}: has no records" + (f" of {list(types)}" if types else ""))
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        """Number of records."""
        return len(self._places)

    def where(self, number: int) -> str:
        """File and line of a record, for messages."""
        file, line, _, _ = self._places[number].tolist()
        return f"{self.files[file].name}, line {line}"

    def pack(self, number: int) -> list[int]:
        """Records of one row: here each has its own (record_packs.py joins them)."""
        return [number]

    def record(self, number: int) -> Record:
        """One record.

        Raises:
            DataError: it is not what its type needs; names file, line, id and field.
        """
        file, _, offset, length = self._places[number].tolist()
        with self.files[file].open("rb") as lines:
            lines.seek(offset)
            return _checked(lines.read(length), self.where(number))

    def image_paths(self, record: Record) -> list[pathlib.Path]:
        """Where its images lie."""
        return [self.root / image for image in record["images"]]

    def check(self) -> Iterator[str]:
        """A sentence for every bad record, and every image that is not there."""
        for number in range(len(self)):
            try:
                for path in self.image_paths(self.record(number)):
                    if not path.is_file():
                        yield f"{self.where(number)}: image {path} is not there"
            except DataError as error:
                yield str(error)


def _checked(line: bytes, where: str) -> Record:
    def no_twice(pairs):
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            raise ValueError(f"keys {keys} stand twice")
        return dict(pairs)

    try:
        record = json.loads(line.decode("utf-8"), object_pairs_hook=no_twice)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not a JSON object: {error}") from error
    if not isinstance(record, dict) or text_fault(record.get("id")):
        raise DataError(f"{where}: expected an object with a text 'id'")
    where = f"{where}, id {record['id']!r}"
    kind = record.get("type")
    if not isinstance(kind, str) or kind not in TYPES:
        raise DataError(f"{where}: type {kind!r}: expected one of {list(TYPES)}")
    task = TYPES[kind]
    optional = {"views", "state", *task.optional}
    known = {"id", "type", "images", *task.fields, *optional}
    for field in sorted(known - set(record) - optional):
        raise DataError(f"{where}: field {field!r} is missing")
    for field in sorted(set(record) - known):
        raise DataError(f"{where}: field {field!r} is not one of {kind}'s: {sorted(known)}")
    least, most = task.images
    images = record["images"]
    if not isinstance(images, list) or not least <= len(images) <= most:
        raise DataError(f"{where}: expected {least} to {most} images")
    for image in images:
        path = None if text_fault(image) or "\0" in image else pathlib.PurePosixPath(image)
        if path is None or path.is_absolute() or ".." in path.parts:
            raise DataError(f"{where}: image {image!r}: expected a path below the pool's folder")
    views = record.get("views", VIEWS[: len(images)])
    if not isinstance(views, list | tuple) or sorted(map(str, views)) != sorted(
        view for view in VIEWS if view in views
    ):
        raise DataError(f"{where}: field 'views': expected different ones of {list(VIEWS)}")
    if len(views) != len(images):
        raise DataError(f"{where}: field 'views' has {len(views)}, expected one for each image")
    if "state" in record and "views" not in record:
        raise DataError(f"{where}: field 'state' is a robot's: expected field 'views' beside it")
    for field, check in {**task.fields, **task.optional, "state": state_fault}.items():
        wrong = check(record[field]) if field in record else None
        if wrong:
            raise DataError(f"{where}: field {field!r}: expected {wrong}")
    if "options" in record and record["answer"] not in record["options"]:
        raise DataError(f"{where}: field 'answer': expected one of the options")
    return record
