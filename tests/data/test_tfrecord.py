"""Places in serialised tf.train.Example, against protobuf's own parse."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2

from gear_jax.data import tfrecord
from gear_jax.data.tfrecord import DataError, decode_column, decode_varints, frames, walk_example
from tests.data.records import example, frame


def _decoded(payload, offset=0):
    data = b"\0" * offset + payload
    found = {}
    for key, (kind, count, start, length), places in walk_example(data, offset, len(payload)):
        if kind == tfrecord.BYTES:
            found[key] = [data[offset + a : offset + a + n] for a, n in places]
        elif kind == tfrecord.MISSING:
            found[key] = []
        else:
            found[key] = decode_column(kind, data[start : start + length]).tolist()
        assert len(found[key]) == count
    return found


float32 = st.floats(width=32, allow_nan=False)
column = st.one_of(
    st.lists(st.binary(max_size=300), max_size=5),
    st.lists(float32, max_size=40),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=40),
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=12), column, max_size=5), st.integers(0, 40))
def test_every_value_is_found_where_it_lies(columns, offset):
    assert _decoded(example(**columns), offset) == columns


def test_unpacked_numbers_are_read_too():
    # float_list { value: 1.5 } written twice, int64_list { value: 3 } { packed 4, 300 }
    floats = b"\x0d" + struct.pack("<f", 1.5) + b"\x0d" + struct.pack("<f", -2)
    ints = b"\x08\x03" + b"\x0a\x03\x04\xac\x02"

    def entry(key, number, body):
        feature = bytes([number << 3 | 2, len(body)]) + body
        pair = bytes([10, len(key)]) + key + bytes([18, len(feature)]) + feature
        return bytes([10, len(pair)]) + pair

    features = entry(b"f", 2, floats) + entry(b"i", 3, ints)
    payload = bytes([10, len(features)]) + features
    assert _decoded(payload) == {"f": [1.5, -2.0], "i": [3, 4, 300]}
    parsed = tf_example_pb2.Example.FromString(payload)
    assert list(parsed.features.feature["i"].int64_list.value) == [3, 4, 300]


def _varint(value):
    value &= 2**64 - 1
    out = []
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=30))
def test_varints_of_any_size_decode(values):
    assert decode_varints(b"".join(map(_varint, values))).tolist() == values


def test_frames_are_found_and_their_lengths_checked():
    data = frame(b"abc") + frame(b"") + frame(b"x" * 300)
    places = list(frames(data, "shard"))
    assert [data[a : a + n] for a, n in places] == [b"abc", b"", b"x" * 300]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (frame(b"abc")[:-2], "shard: the record at byte 0 has 3 bytes, but the file ends at 17"),
        (b"\x04" + frame(b"abc")[1:], "shard: damaged or not a TFRecord file at byte 0"),
        (frame(b"abc") + b"junk", "shard: damaged or not a TFRecord file at byte 19"),
        (b"version https://git-lfs.github.com/spec/v1\n", "shard: a git-lfs pointer"),
        (
            struct.pack("<Q", 2**62)
            + struct.pack("<I", tfrecord.masked_crc(struct.pack("<Q", 2**62))),
            "shard: the record at byte 0 has 4611686018427387904 bytes, but the file ends at 12",
        ),
    ],
)
def test_damaged_files_are_refused(data, message):
    with pytest.raises(DataError, match=message):
        list(frames(data, "shard"))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_bytes_that_are_no_example_end_in_our_error_or_parse(junk):
    try:
        found = _decoded(junk)
    except DataError:
        found = {}
    assert isinstance(found, dict)


def test_decoding_an_empty_column_gives_an_empty_array():
    assert decode_column(tfrecord.LOOSE_FLOATS, b"").dtype == np.float32
    assert decode_column(tfrecord.LOOSE_INTS, b"").dtype == np.int64
    assert len(decode_varints(b"")) == 0
