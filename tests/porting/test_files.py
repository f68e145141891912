"""Damaged and hostile checkpoint directories: one sentence naming file and key, nothing else."""

import json
import pathlib
import pickle
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from gear_jax.porting.files import CheckpointError, open_directory, read_header, write_file

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.arange(4, dtype=np.float32)


def _entry(dtype="F32", shape=(4,), offsets=(24, 40)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


GOOD = {"a": _entry(shape=(2, 3), offsets=(0, 24)), "b": _entry()}
BODY = A.tobytes() + B.tobytes()


def _raw(header, body=BODY):
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(data)) + data + body


def _with_b(**changes):
    return _raw(GOOD | {"b": _entry(**changes)})


DAMAGED = {
    "empty": (b"", "0 bytes cannot hold the header"),
    "short": (b"\x10\0\0", "cannot hold the header"),
    "cut body": (
        _raw(GOOD)[:-1],
        "39 bytes of data, but its tensors, of which 'b' is the last, end at 40",
    ),
    "cut header": (_raw(GOOD)[:40], "cannot hold the header of"),
    "tail": (_raw(GOOD) + b"x", "41 bytes of data"),
    "huge header": (
        struct.pack("<Q", 1 << 63) + b"{}",
        "cannot hold the header of 9223372036854775808",
    ),
    "long header": (_raw(b" " * (5 << 20)), "at most 4194304 expected"),
    "bad json": (_raw(b"{'a': 1}"), "not valid UTF-8 JSON"),
    "bad utf-8": (_raw(b'{"\xff": 1}'), "not valid UTF-8 JSON"),
    "huge number": (_raw(b'{"a": ' + b"9" * 5000 + b"}"), "not valid UTF-8 JSON"),
    "nested": (_raw(b"[" * 200_000), "nested too deep"),
    "list": (_raw(b"[]"), "expected a JSON object, found list"),
    "overlap": (_with_b(offsets=(20, 36)), "key 'b' begins at byte 20 of the data, expected 24"),
    "hole": (_with_b(offsets=(28, 44)), "key 'b' begins at byte 28"),
    "past the end": (_with_b(shape=(400,), offsets=(24, 1624)), "of which 'b' is the last"),
    "reversed": (_with_b(offsets=(40, 24)), "key 'b', F32 of shape .* needs 16 bytes"),
    "negative": (_with_b(offsets=(-8, 8)), "key 'b' has shape .* expected lists of whole numbers"),
    "negative side": (_with_b(shape=(-4,)), "key 'b' has shape"),
    "shape lie": (_with_b(shape=(5,)), "key 'b', F32 of shape .* needs 20 bytes"),
    "dtype lie": (_with_b(dtype="F64"), "key 'b', F64 .* needs 32 bytes"),
    "overflow": (_with_b(shape=(1 << 62, 1 << 62)), "key 'b' has shape .* expected lists of whole"),
    "unknown dtype": (_with_b(dtype="F3"), "key 'b' has unknown dtype 'F3'"),
    "no offsets": (_raw(GOOD | {"b": {"dtype": "F32"}}), "key 'b' has no plain dtype"),
    "list as dtype": (_with_b(dtype=["F32"]), r"key 'b' has unknown dtype \['F32'\]"),
    "huge digits": (_with_b(shape=(10**4000,) * 3), "key 'b' has shape"),
    "many sides": (_with_b(shape=(4,) + (1,) * 200_000), "key 'b' has shape"),
    "strange notes": (_raw(GOOD | {"__metadata__": 1}), "__metadata__ is 1, expected texts"),
    "extra field": (_raw(GOOD | {"b": _entry() | {"x": 1}}), "key 'b' has no plain dtype"),
    "boolean side": (_with_b(shape=(True, 4)), "key 'b' has shape"),
    "a key twice": (
        _raw(b'{"b": %b, "b": %b}' % ((json.dumps(_entry()).encode(),) * 2)),
        "key 'b' stands there twice",
    ),
    "pickle": (pickle.dumps({"b": 1}), "not a safetensors file"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, name):
    data, message = DAMAGED[name]
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=f"^model.safetensors: .*{message}") as error:
        open_directory(tmp_path)
    assert "\n" not in str(error.value)


def test_a_good_file_gives_exactly_its_tensors(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(_raw(GOOD | {"__metadata__": {"format": "pt"}}))
    tensors = open_directory(tmp_path)
    assert set(tensors) == {"a", "b"}
    np.testing.assert_array_equal(tensors["a"].read(), A)
    np.testing.assert_array_equal(tensors["a"].read(1, 2), A[1:2])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_where_they_stand(tmp_path, dtype, bad):
    name = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[np.dtype(dtype).name]
    array = np.array([1, 2, 3, 4], dtype)
    array[2] = bad
    write_file(tmp_path / "model.safetensors", [("b", name, (4,), lambda: array)])
    tensor = open_directory(tmp_path)["b"]
    tensor.read(0, 2)
    with pytest.raises(CheckpointError, match="model.safetensors: key 'b' holds NaN or infinity"):
        tensor.read()


def test_a_file_cut_short_after_opening_is_an_error(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(_raw(GOOD))
    tensor = open_directory(tmp_path)["b"]
    path.write_bytes(_raw(GOOD)[:-4])
    with pytest.raises(CheckpointError, match="model.safetensors: cut short within key 'b'"):
        tensor.read()


def _sharded(folder, weight_map, shards=("a", "b")):
    for key, array in (("a", A), ("b", B)):
        if key in shards:
            write_file(
                folder / f"{key}.safetensors", [(key, "F32", array.shape, lambda x=array: x)]
            )
    text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def test_shards_and_their_index_are_one_checkpoint(tmp_path):
    _sharded(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"})
    assert {key: tensor.file.name for key, tensor in open_directory(tmp_path).items()} == {
        "a": "a.safetensors",
        "b": "b.safetensors",
    }


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../a.safetensors"}, "key 'a' lies in '../a.safetensors': expected the plain name"),
        ({"a": "/etc/a.safetensors"}, "key 'a' lies in '/etc/a.safetensors': expected the plain"),
        (
            {"a": "pytorch_model.bin"},
            "key 'a' lies in 'pytorch_model.bin': expected the plain name",
        ),
        ({"a": "c.safetensors"}, "key 'a' lies in 'c.safetensors', which is not there"),
        ({"a": "b.safetensors", "b": "b.safetensors"}, "key 'a' is said to be in b.safetensors"),
        ({"b": "a.safetensors", "a": "a.safetensors"}, "key 'b' is said to be in a.safetensors"),
        ({}, "'weight_map' is empty"),
        ({"a": 1}, "expected 'weight_map', an object"),
        ("[]", "expected a JSON object"),
        (
            '{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}',
            "key 'a' stands there twice",
        ),
        (
            json.dumps({"weight_map": {f"k{i}": "a.safetensors" for i in range(10**6)}}),
            "at most 4194304",
        ),
    ],
)
def test_a_hostile_index_is_refused(tmp_path, weight_map, message):
    _sharded(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=f"^model.safetensors.index.json: .*{message}"):
        open_directory(tmp_path)


def test_a_key_in_two_shards_or_in_no_index_is_refused(tmp_path):
    _sharded(tmp_path, {"a": "a.safetensors", "b": "b.safetensors"})
    (tmp_path / "a.safetensors").write_bytes(_raw(GOOD))
    with pytest.raises(CheckpointError, match="b.safetensors: key 'b' is also in a.safetensors"):
        open_directory(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "a.safetensors"}}')
    with pytest.raises(
        CheckpointError, match="a.safetensors: key 'b' is not in model.safetensors.in"
    ):
        open_directory(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "weights.pkl"])
def test_pickled_weights_are_never_opened(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "exploded",)

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=f"^{name}: pickled weights can run code"):
        open_directory(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_nothing_to_open_and_too_much_to_open_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such directory"):
        open_directory(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        open_directory(tmp_path)
    _sharded(tmp_path, {"a": "a.safetensors"})
    (tmp_path / "model.safetensors").write_bytes(_raw(GOOD))
    with pytest.raises(CheckpointError, match="both model.safetensors and"):
        open_directory(tmp_path)


def test_links_may_lead_into_the_hub_cache_and_nowhere_else(tmp_path):
    blobs, home = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    home.mkdir(parents=True)
    (blobs / "0123").write_bytes(_raw(GOOD))
    (home / "model.safetensors").symlink_to("../../blobs/0123")
    assert set(open_directory(home)) == {"a", "b"}
    (tmp_path / "secret").write_bytes(_raw(GOOD))
    (home / "model.safetensors").unlink()
    (home / "model.safetensors").symlink_to("../../secret")
    with pytest.raises(CheckpointError, match="model.safetensors: a link that leads out of"):
        open_directory(home)


def test_a_flipped_bit_is_found_where_the_publisher_gave_sums(tmp_path):
    import hashlib

    good = _raw(GOOD)
    (tmp_path / "SHA256SUMS").write_text(f"{hashlib.sha256(good).hexdigest()}  model.safetensors\n")
    (tmp_path / "model.safetensors").write_bytes(good)
    assert set(open_directory(tmp_path)) == {"a", "b"}
    (tmp_path / "model.safetensors").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="model.safetensors: its sha256 is not the one"):
        open_directory(tmp_path)
    (tmp_path / "SHA256SUMS").write_text("")
    with pytest.raises(CheckpointError, match="SHA256SUMS: has no line"):
        open_directory(tmp_path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_what_we_accept_the_safetensors_package_reads_alike(tmp_path_factory, data):
    """Random damage to a header: whatever passes our checks must mean the same to the reference."""
    raw = bytearray(_raw(GOOD))
    for _ in range(data.draw(st.integers(0, 3))):
        raw[data.draw(st.integers(0, len(raw) - 41))] = data.draw(
            st.sampled_from(b'0123456789[]{},:"abF ')
        )
    path = tmp_path_factory.getbasetemp() / "model.safetensors"
    path.write_bytes(raw)
    try:
        tensors = read_header(path)
    except CheckpointError:
        return
    theirs = load_file(path)
    assert set(theirs) == set(tensors)
    for key, tensor in tensors.items():
        if tensor.dtype == "F32":
            np.testing.assert_array_equal(tensor.read(), theirs[key])
