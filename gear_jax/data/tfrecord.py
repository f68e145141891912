"""TFRecord files and tf.train.Example at the level of bytes: where things lie, nothing decoded.

What enters is the memory of a file, what leaves are places in it. No TensorFlow, no protobuf.
Formats: data.md 2.3 and 5.
"""

from collections.abc import Iterator
from typing import Any

import google_crc32c
import numpy as np

MISSING, BYTES, FLOATS, LOOSE_FLOATS, INTS, LOOSE_INTS = range(6)  # how a column lies

_FRAME = 12  # bytes before a payload: length, checksum of the length
_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5


class DataError(ValueError):
    """A data set that cannot be trusted; one sentence that names file and place."""


def frames(data: Any, name: str) -> Iterator[tuple[int, int]]:
    """(offset, length) of every payload of a TFRecord file, after checking the length's checksum.

    Raises:
        DataError: not a TFRecord file, or one that was cut short or damaged.
    """
    place, size = 0, len(data)
    while place < size:
        head = bytes(data[place : place + _FRAME])
        if len(head) == _FRAME and masked_crc(head[:8]) == int.from_bytes(head[8:], "little"):
            length = int.from_bytes(head[:8], "little")
            if place + _FRAME + length + 4 <= size:
                yield place + _FRAME, length
                place += _FRAME + length + 4
                continue
            raise DataError(
                f"{name}: the record at byte {place} has {length} bytes, but the file ends "
                f"at {size}"
            )
        if head.startswith(b"version https"[:_FRAME]):
            raise DataError(f"{name}: a git-lfs pointer, not the data: fetch it with git lfs pull")
        raise DataError(f"{name}: damaged or not a TFRecord file at byte {place}")


def masked_crc(data: bytes) -> int:
    """TFRecord's checksum: crc32c, rotated and shifted."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def walk_example(data: Any, offset: int, length: int) -> Iterator[tuple[str, tuple, list]]:
    """Columns of a serialised tf.train.Example, in whatever order they lie.

    Args:
        data: the file.
        offset: where the payload begins.
        length: its bytes.

    Yields:
        key, (kind, count, offset, length) with offsets from the start of the file, and for byte
        strings their (offset, length) from the start of the payload.

    Raises:
        DataError: the bytes are not a tf.train.Example.
    """
    end = offset + length
    for number, _, start, stop in _fields(data, offset, end):  # Example
        if number != 1:
            continue
        for entry, _, first, last in _fields(data, start, stop):  # Features
            if entry != 1:
                continue
            key, column, elements = "", (MISSING, 0, first, 0), []
            for part, _, a, b in _fields(data, first, last):  # map entry
                if part == 1:
                    key = bytes(data[a:b]).decode("utf-8", "surrogateescape")
                elif part == 2:
                    column, elements = _column(data, a, b, offset)
            yield key, column, elements


def _column(data: Any, start: int, stop: int, payload: int) -> tuple[tuple, list]:
    """A Feature: its kind, number of values and place; places of its byte strings."""
    for number, _, a, b in _fields(data, start, stop):
        if number == 1:
            elements = [(x - payload, y - x) for n, _, x, y in _fields(data, a, b) if n == 1]
            return (BYTES, len(elements), a, b - a), elements
        if number in (2, 3):
            floats = number == 2
            values = [(wire, x, y) for n, wire, x, y in _fields(data, a, b) if n == 1]
            packed = [(x, y) for wire, x, y in values if wire == _DELIMITED]
            if floats and any((y - x) % 4 for _, x, y in values):
                raise DataError(f"byte {a}: a list of floats is no multiple of 4 bytes long")
            if len(packed) == len(values) == 1:
                x, y = packed[0]
                count = (y - x) // 4 if floats else _count_varints(data[x:y])
                return (FLOATS if floats else INTS, count, x, y - x), []
            count = sum(
                1 if wire != _DELIMITED else (y - x) // 4 if floats else _count_varints(data[x:y])
                for wire, x, y in values
            )
            return (LOOSE_FLOATS if floats else LOOSE_INTS, count, a, b - a), []
    return (MISSING, 0, start, 0), []


def _fields(data: Any, place: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, wire type, start, stop) of the fields of one protobuf message."""
    while place < end:
        tag, place = _varint(data, place, end)
        wire = tag & 7
        start = place
        if wire == _DELIMITED:
            size, start = _varint(data, place, end)
            place = start + size
        elif wire == _VARINT:
            _, place = _varint(data, place, end)
        elif wire in (_FIXED32, _FIXED64):
            place += 4 if wire == _FIXED32 else 8
        else:
            raise DataError(f"byte {start}: wire type {wire} is none of tf.train.Example's")
        if place > end:
            raise DataError(f"byte {start}: a field reaches beyond its message")
        yield tag >> 3, wire, start, place


def _varint(data: Any, place: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while place < end and shift < 70:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
    raise DataError(f"byte {place}: a number without an end")


def _count_varints(data: bytes) -> int:
    return int(np.count_nonzero(np.frombuffer(data, np.uint8) < 128))


def decode_varints(data: bytes) -> np.ndarray:
    """Packed varints -> int64[n]."""
    raw = np.frombuffer(data, np.uint8)
    last = np.flatnonzero(raw < 128)
    if not len(last):
        return np.zeros(0, np.int64)
    first = np.concatenate([[0], last[:-1] + 1])
    within = np.arange(last[-1] + 1) - np.repeat(first, last - first + 1)
    parts = (raw[: last[-1] + 1] & 127).astype(np.uint64) << (7 * within).astype(np.uint64)
    return np.add.reduceat(parts, first).astype(np.int64)


def decode_column(kind: int, data: bytes) -> np.ndarray:
    """The bytes of a column of numbers -> float32[n] or int64[n]."""
    if kind == FLOATS:
        return np.frombuffer(data, "<f4")
    if kind == INTS:
        return decode_varints(data)
    floats, parts = kind == LOOSE_FLOATS, []
    for number, _, start, stop in _fields(data, 0, len(data)):
        if number == 1:
            piece = data[start:stop]
            if floats:
                parts.append(np.frombuffer(piece, "<f4"))
            else:
                parts.append(decode_varints(piece))
    return np.concatenate(parts) if parts else np.zeros(0, np.float32 if floats else np.int64)
