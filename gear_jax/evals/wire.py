"""Messages between the evaluation and its environment workers: msgpack with arrays.

A length of four bytes, big endian, then one msgpack value of None, bool, int, float, text, bytes,
list, map with text keys, or an array {"__array__": dtype, "shape": [...], "data": bytes}. Dtypes
come from a list and bytes must fit the shape exactly: a decoder that builds any dtype from what it
is told builds object pointers too. Needs NumPy and msgpack alone.
"""

import math
import socket
import struct
from typing import Any

import msgpack
import numpy as np

DTYPES = ("|b1", "|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8")
MAX_DIMS = 5
MAX_BYTES = 1 << 28  # of a message
_KEYS = {"__array__", "shape", "data"}


class WireError(Exception):
    """A message that is none, in one sentence."""


def pack(value: Any) -> bytes:
    """One message, without its length.

    Raises:
        WireError: holds something that has no form on the wire, or is too long.
    """
    try:
        message = msgpack.packb(value, default=_encode, use_bin_type=True)
    except (TypeError, ValueError, OverflowError) as error:
        raise WireError(f"cannot be sent: {error}") from error
    if len(message) > MAX_BYTES:
        raise WireError(f"a message of {len(message)} bytes: expected at most {MAX_BYTES}")
    return message


def unpack(message: bytes) -> Any:
    """The value of a message; arrays are fresh and writable.

    Raises:
        WireError: malformed in any way.
    """
    try:
        return msgpack.unpackb(
            message, raw=False, strict_map_key=True, object_hook=_decode, ext_hook=_refuse,
            max_ext_len=0,
        )  # fmt: skip
    except WireError:
        raise
    except (ValueError, TypeError, msgpack.UnpackException, RecursionError) as error:
        raise WireError(f"malformed message: {type(error).__name__}: {error}") from error


def send(connection: socket.socket, value: Any) -> None:
    """Send one message."""
    message = pack(value)
    connection.sendall(struct.pack(">I", len(message)) + message)


def receive(connection: socket.socket) -> Any:
    """Wait for one message.

    Raises:
        WireError: malformed, or longer than the limit.
        ConnectionError: the other side is gone.
    """
    (length,) = struct.unpack(">I", _read(connection, 4))
    if length > MAX_BYTES:
        raise WireError(f"a message of {length} bytes: expected at most {MAX_BYTES}")
    return unpack(_read(connection, length))


def _read(connection, length):
    data = bytearray(length)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if count == 0:
            raise ConnectionError("the other side closed the connection")
        view = view[count:]
    return bytes(data)


def _encode(value):
    if isinstance(value, np.ndarray):
        if value.dtype.str not in DTYPES or value.ndim > MAX_DIMS:
            raise TypeError(f"array of {value.dtype} with {value.ndim} axes")
        data = np.ascontiguousarray(value).tobytes()
        return {"__array__": value.dtype.str, "shape": list(value.shape), "data": data}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__}")


def _decode(value):
    if "__array__" not in value:
        if not all(type(key) is str for key in value):
            raise WireError("a map with keys that are no text")
        return value
    if value.keys() != _KEYS:
        raise WireError(f"array with the keys {sorted(map(str, value))}: expected {sorted(_KEYS)}")
    dtype, shape, data = value["__array__"], value["shape"], value["data"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise WireError(f"array of {str(dtype)[:40]!r}: expected one of {DTYPES}")
    if (
        type(shape) is not list
        or len(shape) > MAX_DIMS
        or not all(type(size) is int and 0 <= size <= MAX_BYTES for size in shape)
    ):
        raise WireError(f"array of shape {str(shape)[:40]}: expected at most {MAX_DIMS} sizes")
    needed = math.prod(shape) * np.dtype(dtype).itemsize
    if type(data) is not bytes or len(data) != needed:
        raise WireError(f"array of {dtype} {shape}: expected {needed} bytes of data")
    if dtype == "|b1" and data.strip(b"\0\1"):
        raise WireError("array of booleans that are neither 0 nor 1")
    return np.frombuffer(data, dtype).reshape(shape).copy()


def _refuse(code, data):
    raise WireError(f"an extension of type {code}")
