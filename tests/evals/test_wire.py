import socket
import struct
import threading

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gear_jax.evals.wire import DTYPES, MAX_BYTES, WireError, pack, receive, unpack


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3), (1, 2, 1, 2, 1)])
def test_arrays_come_back_equal_and_writable(dtype, shape):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    back = unpack(pack({"x": [array]}))["x"][0]
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array, strict=True)
    assert back.flags.writeable


def test_plain_values_and_rows_of_a_strided_array_come_back():
    value = {"a": None, "b": [1, 2.5, True, "é", b"\0"], "c": {}}
    assert unpack(pack(value)) == value
    array = np.arange(12).reshape(3, 4)[:, ::2]
    assert unpack(pack(array)).tolist() == [[0, 2], [4, 6], [8, 10]]
    assert unpack(pack((np.float32(0.5), np.bool_(1)))) == [0.5, True]


def array(**changes):
    value = {"__array__": "<f4", "shape": [2], "data": b"\0" * 8} | changes
    return msgpack.packb({key: one for key, one in value.items() if one is not None})


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (array(__array__="|O"), "array of '|O': expected one of"),
        (array(__array__="|V0", shape=[1 << 40], data=b""), "array of '|V0'"),
        (array(__array__=["<f4"]), "expected one of"),
        (array(__array__=">f4"), "array of '>f4'"),
        (array(shape=[-1]), "array of shape \\[-1\\]"),
        (array(shape=[1] * 6, data=b"\0" * 4), "expected at most 5 sizes"),
        (array(shape=[True, 2]), "expected at most 5 sizes"),
        (array(shape=2), "array of shape 2"),
        (array(shape=[1 << 20, 1 << 20, 0], data=b"x"), "expected 0 bytes"),
        (array(data=b"\0" * 7), "array of <f4 \\[2\\]: expected 8 bytes"),
        (array(data="\0" * 8), "expected 8 bytes"),
        (array(data=None), "array with the keys"),
        (array(more=1), "array with the keys"),
        (array(__array__="|b1", data=b"\0\2"), "neither 0 nor 1"),
        (msgpack.packb(msgpack.ExtType(1, b"")), "an extension of type 1"),
        (msgpack.packb(msgpack.Timestamp(1)), "malformed message"),
        (msgpack.packb({b"a": 1}), "keys that are no text"),
        (msgpack.packb({1: 1}), "malformed message"),
        (b"\x91" * 100_000, "malformed message"),
        (b"", "malformed message"),
        (b"\xc1", "malformed message"),
        (b"\xdd\xff\xff\xff\xff", "malformed message"),
        (b"\xa1\xff", "malformed message"),
        (msgpack.packb(1) + b"\1", "malformed message"),
    ],
)
def test_what_is_malformed_is_one_kind_of_error(message, words):
    with pytest.raises(WireError, match=words):
        unpack(message)


def _is_a_value_or_one_kind_of_error(message):
    """A value is one that can be sent on; any exception but WireError passes through."""
    try:
        value = unpack(message)
    except WireError:
        return True
    return len(pack(value)) > 0


@given(st.binary(max_size=200))
def test_any_bytes_are_a_value_or_one_kind_of_error(message):
    assert _is_a_value_or_one_kind_of_error(message)


@given(st.data())
def test_a_changed_message_is_a_value_or_one_kind_of_error(data):
    message = bytearray(pack({"action": np.ones((3, 2), np.float32), "n": [1, "text", None]}))
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    assert _is_a_value_or_one_kind_of_error(bytes(message))


def test_what_has_no_form_is_not_sent():
    for bad in ({"x": object()}, np.array([None]), np.zeros((1,) * 6), np.array("text"), 1 << 70):
        with pytest.raises(WireError, match="cannot be sent"):
            pack(bad)


def test_a_length_beyond_the_limit_and_a_closed_connection_are_noticed():
    for header, error in (
        (struct.pack(">I", MAX_BYTES + 1), WireError),
        (b"\0\0", ConnectionError),
    ):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            sender = threading.Thread(
                target=lambda to=theirs, x=header: (to.sendall(x), to.close())
            )
            sender.start()
            with pytest.raises(error):
                receive(ours)
            sender.join()
