"""Numbers for TensorBoard: its event file, written without TensorFlow.

A file is a TFRecord of `Event` messages; the few fields that numbers need are encoded here.
"""

import os
import pathlib
import struct
import time
from collections.abc import Mapping

from gear_jax.data.tfrecord import masked_crc

_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5  # wire types


class EventFile:
    """Numbers of one run from one start on; what an earlier start wrote beyond it is hidden."""

    def __init__(self, directory: str | os.PathLike, begun: int):
        """Make a new file.

        Args:
            directory: that `tensorboard --logdir` is given.
            begun: step at which the run goes on.
        """
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns():020}.{os.uname().nodename}.{os.getpid()}"
        self._file = (directory / name).open("xb")
        self._write(_field(3, _BYTES, b"brain.Event:2"))
        started = _field(1, _VARINT, 1)  # SessionLog.START
        self._write(_field(2, _VARINT, begun + 1) + _field(7, _BYTES, started))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a step."""
        summary = b"".join(
            _field(1, _BYTES, _field(1, _BYTES, tag.encode()) + _field(2, _FLOAT, value))
            for tag, value in values.items()
        )
        self._write(_field(2, _VARINT, step) + _field(5, _BYTES, summary))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, fields):
        data = _field(1, _DOUBLE, time.time()) + fields
        length = struct.pack("<Q", len(data))
        crcs = [struct.pack("<I", masked_crc(part)) for part in (length, data)]
        self._file.write(length + crcs[0] + data + crcs[1])
        self._file.flush()


def _field(number, wire, value):
    head = _varint(number << 3 | wire)
    if wire == _VARINT:
        return head + _varint(value)
    if wire == _BYTES:
        return head + _varint(len(value)) + value
    return head + struct.pack("<d" if wire == _DOUBLE else "<f", value)


def _varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
