import concurrent.futures
import json
import os
import pickle
import shutil
import time
import zlib

import numpy as np
import pytest
from tensorflow_datasets.proto import tf_example_pb2

from gear_jax.data.tfrecord import DataError, frames
from gear_jax.data.tfrecord_index import Index, build
from tests.data.records import example, frame

DATASETS = {
    "bridge": ("bridge_dataset_octo/bridge_dataset/1.0.0", "train"),
    "bridge val": ("bridge_dataset_octo/bridge_dataset/1.0.0", "val"),
    "franka": ("derived_rlds_franka/1.0.0", "train"),
}


@pytest.mark.parametrize("name", DATASETS)
def test_every_value_of_every_step_equals_the_protobuf_parse(samples, tmp_path, name):
    folder, split = DATASETS[name]
    build(samples / folder, split, tmp_path / "index")
    index = Index(samples / folder, split, tmp_path / "index")
    data = index.shards[0].read_bytes()
    records = [data[a : a + n] for a, n in frames(data, "shard")]
    assert len(records) == len(index) > 0
    index.verify()
    for episode, record in enumerate(records):
        parsed = tf_example_pb2.Example.FromString(record).features.feature
        assert set(parsed) <= set(index.features)
        for key, feature in index.features.items():
            column = parsed[key]
            values = getattr(column, column.WhichOneof("kind")).value
            steps = index.num_steps(episode) if key.startswith("steps/") else 1
            if feature.dtype == "bytes":
                assert index.read(key, episode) == list(values), key
                assert index.read(key, episode, steps - 1, steps) == [values[steps - 1]], key
                continue
            expected = np.array(values).reshape(steps, *feature.shape).astype(feature.dtype)
            whole = index.read(key, episode)
            assert whole.dtype == feature.dtype
            np.testing.assert_array_equal(whole, expected)
            for start, stop in ((0, 1), (steps // 2, steps), (steps, steps)):
                part = index.read(key, episode, start, stop)
                np.testing.assert_array_equal(part, expected[start:stop])


def _tensor(dtype, *shape, encoding="none"):
    dimensions = [str(side) for side in shape]
    return {"tensor": {"shape": {"dimensions": dimensions}, "dtype": dtype, "encoding": encoding}}


def _dataset(folder, records, shard_lengths=None, features=None):
    """A data set of our own with one record per shard, unless told otherwise."""
    folder.mkdir(parents=True)
    features = features or {
        "steps": {
            "sequence": {
                "feature": {
                    "featuresDict": {
                        "features": {
                            "image": {"image": {}},
                            "state": _tensor("float64", 2),
                            "packed": _tensor("float32", 3, encoding="zlib"),
                            "flag": _tensor("bool"),
                        }
                    }
                }
            }
        },
        "name": {"text": {}},
        "absent": _tensor("float32", 4),
    }
    (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": features}}))
    shard_lengths = shard_lengths or [1] * len(records)
    info = {"fileFormat": "tfrecord", "name": "toy"}
    info["splits"] = [{"name": "train", "shardLengths": [str(n) for n in shard_lengths]}]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for number, record in enumerate(records):
        path = folder / f"toy-train.tfrecord-{number:05d}-of-{len(shard_lengths):05d}"
        path.write_bytes(record)
    return folder


def _record(steps, **changes):
    columns = {
        "steps/image": [b"jpeg%d" % i for i in range(steps)],
        "steps/state": [float(i) for i in range(2 * steps)],
        "steps/packed": [zlib.compress(np.full(3, i, "<f4").tobytes()) for i in range(steps)],
        "steps/flag": [int(i == 0) for i in range(steps)],
        "name": [b"episode"],
    }
    return frame(example(**(columns | changes)))


def test_compressed_missing_and_cast_values_are_read(tmp_path):
    build(_dataset(tmp_path / "d", [_record(3), _record(1)]), "train")
    index = Index(tmp_path / "d", "train")
    assert [index.num_steps(i) for i in range(len(index))] == [3, 1]
    np.testing.assert_array_equal(index.read("steps/packed", 0, 1, 3), [[1, 1, 1], [2, 2, 2]])
    assert index.read("steps/state", 0, 2).tolist() == [[4, 5]]
    assert index.read("steps/state", 0).dtype == np.float64
    assert index.read("steps/flag", 0).tolist() == [True, False, False]
    assert index.read("name", 1) == [b"episode"]
    assert index.has("name", 0)
    assert not index.has("absent", 0)
    with pytest.raises(
        DataError, match="toy-train.tfrecord-00000-of-00002, episode 0: no value of"
    ):
        index.read("absent", 0)
    with pytest.raises(KeyError, match="'steps/speed' is none of"):
        index.read("steps/speed", 0)
    with pytest.raises(IndexError, match=r"steps 2 .. 4 of 'steps/state': episode 0 has 3"):
        index.read("steps/state", 0, 2, 4)


def test_two_processes_build_the_same_index_as_one(tmp_path):
    _dataset(tmp_path / "d", [_record(n) for n in (2, 5, 1)])
    done = []
    build(tmp_path / "d", "train", tmp_path / "one", report=done.append)
    build(tmp_path / "d", "train", tmp_path / "two", num_workers=2)
    assert len(done) == 3
    one, two = (
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.*")}
        for n in ("one", "two")
    )
    assert one == two


def test_an_index_travels_to_another_process_without_its_files(tmp_path):
    build(_dataset(tmp_path / "d", [_record(500)]), "train")
    index = Index(tmp_path / "d", "train")
    before = index.read("steps/image", 0, 7, 9)
    data = pickle.dumps(index)
    assert len(data) < 2000
    assert pickle.loads(data).read("steps/image", 0, 7, 9) == before == [b"jpeg7", b"jpeg8"]


def test_threads_open_each_file_once_and_one_after_the_other(tmp_path, monkeypatch):
    build(_dataset(tmp_path / "d", [_record(5), _record(6)]), "train")
    index = Index(tmp_path / "d", "train")
    opened, inside = [], []

    def slowly(function):
        def call(path, *args, **kwargs):
            opened.append(path)
            inside.append(path)
            time.sleep(0.01)
            together = len(inside)
            inside.remove(path)
            assert together == 1
            return function(path, *args, **kwargs)

        return call

    monkeypatch.setattr(np, "load", slowly(np.load))
    monkeypatch.setattr(os, "open", slowly(os.open))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        asked = [("steps/image", 0), ("steps/state", 1)] * 8
        read = list(pool.map(lambda one: index.read(*one, 2, 3), asked))
    assert read[0::2] == [[b"jpeg2"]] * 8
    assert len(opened) == len(set(opened)) == 2 * 3 + 2


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (_record(3)[:-3], "the record at byte 0 has .* bytes, but the file ends"),
        (b"", "0 records, but dataset_info.json says 1"),
        (_record(3, **{"steps/flag": [1, 0]}), "record 0: key .* has 2 steps, key .* has 3"),
        (
            _record(3, **{"steps/state": [0.0] * 5}),
            "key 'steps/state' has 5 values, no multiple of 2",
        ),
        (
            _record(3, **{"steps/state": [b"x"] * 3}),
            "key 'steps/state' is not stored as features.json",
        ),
        (_record(3, name=[b"a", b"b"]), "key 'name' has 2 values, expected 1"),
        (frame(b"\x0a\xff"), "record 0: byte .*: a number without an end"),
    ],
)
def test_a_damaged_shard_is_named_and_leaves_no_index(tmp_path, record, message):
    _dataset(tmp_path / "d", [record])
    with pytest.raises(DataError, match=f"toy-train.tfrecord-00000-of-00001.*{message}"):
        build(tmp_path / "d", "train")
    assert list((tmp_path / "d").glob(".gear_index/*")) == []


def test_a_flipped_bit_in_the_data_is_found_by_verify(tmp_path):
    record = bytearray(_record(3))
    record[record.index(b"jpeg1")] ^= 4
    build(_dataset(tmp_path / "d", [_record(2), bytes(record)]), "train")
    with pytest.raises(DataError, match="00001-of-00002, episode 1: damaged, its checksum"):
        Index(tmp_path / "d", "train").verify()


def test_an_index_of_other_data_is_refused(tmp_path):
    folder = _dataset(tmp_path / "d", [_record(2)])
    with pytest.raises(DataError, match="manifest.json: cannot be read"):
        Index(folder, "train")
    build(folder, "train")
    Index(folder, "train")
    features = (folder / "features.json").read_text()
    (folder / "features.json").write_text(features + " ")
    with pytest.raises(DataError, match="features.json has changed; build the index again"):
        Index(folder, "train")
    (folder / "features.json").write_text(features)
    shard = next(folder.glob("*.tfrecord*"))
    shard.write_bytes(_record(3))
    with pytest.raises(DataError, match="not the shard of .* bytes that was indexed"):
        Index(folder, "train")


def test_what_is_no_dataset_is_refused(tmp_path):
    folder = _dataset(tmp_path / "d", [_record(2)])
    with pytest.raises(DataError, match=r"split 'val' is unknown: expected one of \['train'\]"):
        build(folder, "val")
    next(folder.glob("*.tfrecord*")).unlink()
    with pytest.raises(DataError, match="the shard is not there"):
        build(folder, "train")
    (folder / "features.json").write_text("{}")
    shutil.copy(folder / "dataset_info.json", folder / "toy-train.tfrecord-00000-of-00001")
    with pytest.raises(DataError, match="feature '' is a"):
        build(folder, "train")
