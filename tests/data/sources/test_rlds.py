import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from gear_jax.data.rlds_writer import Column, RldsWriter
from gear_jax.data.sources.rlds import ArrayRecordSource, RldsSource
from gear_jax.data.tfrecord import DataError
from gear_jax.data.tfrecord_index import build

COLUMNS = {
    "steps/observation/state": Column("tensor", (3,)),
    "steps/observation/image": Column("image", (8, 8, 3)),
    "steps/language_instruction": Column("text"),
    "steps/is_first": Column("tensor", (), "bool"),
    "steps/code_points": Column("tensor", (6,), "int32"),
    "episode_metadata/file_path": Column("text"),
}


def _episode(number, steps):
    points = np.zeros((steps, 6), int)
    points[:, :2] = [ord("h"), ord("i")]
    return {
        "steps/observation/state": np.arange(3.0 * steps).reshape(steps, 3) + number,
        "steps/observation/image": [b"%d-%d" % (number, i) for i in range(steps)],
        "steps/language_instruction": ["pick é"] * steps,
        "steps/is_first": np.arange(steps) == 0,
        "steps/code_points": points,
        "episode_metadata/file_path": f"raw/{number}",
    }


@pytest.fixture(scope="module")
def tfrecord(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rlds")
    with RldsWriter(folder, "toy", COLUMNS, shard_bytes=400) as writer:
        for number, steps in enumerate((4, 1, 6)):
            writer.add(_episode(number, steps))
    build(folder / "toy" / "1.0.0", "train")
    return folder / "toy" / "1.0.0"


@pytest.fixture(scope="module")
def array_record(tfrecord, tmp_path_factory):
    """The same records as ArrayRecord, as tfds would lay them out."""
    from array_record.python.array_record_module import ArrayRecordWriter

    folder = tmp_path_factory.mktemp("array_record")
    source = RldsSource(tfrecord)
    writer = ArrayRecordWriter(
        str(folder / "toy-train.array_record-00000-of-00001"), "group_size:1"
    )
    for shard, _, offset, length in source.index.episodes.tolist():
        with source.index.shards[shard].open("rb") as file:
            file.seek(offset)
            writer.write(file.read(length))
    writer.close()
    (folder / "features.json").write_text((tfrecord / "features.json").read_text())
    info = (tfrecord / "dataset_info.json").read_text()
    lengths = source.index.dataset.joinpath("dataset_info.json").read_text()
    assert lengths == info
    import json

    told = json.loads(info)
    told["fileFormat"] = "array_record"
    told["splits"][0]["shardLengths"] = ["3"]
    (folder / "dataset_info.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(params=["tfrecord", "array_record"])
def source(request):
    folder = request.getfixturevalue(request.param)
    return RldsSource(folder) if request.param == "tfrecord" else ArrayRecordSource(folder)


def test_both_formats_give_the_episodes_that_were_written(source):
    source = pickle.loads(pickle.dumps(source))
    assert [source.episode(i).num_steps for i in range(len(source))] == [4, 1, 6]
    for number, steps in enumerate((4, 1, 6)):
        raw, wanted = source.episode(number), _episode(number, steps)
        np.testing.assert_array_equal(
            raw.read("steps/observation/state"), wanted["steps/observation/state"]
        )
        assert list(raw.images("steps/observation/image")) == wanted["steps/observation/image"]
        assert raw.images("steps/observation/image")[steps - 1] == b"%d-%d" % (number, steps - 1)
        assert raw.read("steps/is_first").tolist() == [True] + [False] * (steps - 1)
        assert raw.text("steps/language_instruction") == "pick é"
        assert raw.text("steps/code_points") == "hi"
        assert raw.episode_id == f"train/{number}:raw/{number}"
        assert raw.fps is None
        assert not raw.has("steps/observation/other")
    assert "float32[3]" in source.keys()["steps/observation/state"]


def test_an_image_past_the_end_is_refused(source):
    images = source.episode(1).images("steps/observation/image")
    assert len(images) == 1
    for step in (1, -1):
        with pytest.raises(IndexError):
            images[step]


def test_array_record_names_what_is_wrong(array_record, tmp_path):
    with pytest.raises(DataError, match="file format 'array_record', expected 'tfrecord'"):
        build(array_record, "train", tmp_path / "ix")
    with pytest.raises(IndexError, match="episode 3"):
        ArrayRecordSource(array_record).episode(3)
    folder = tmp_path / "bad"
    folder.mkdir()
    for file in array_record.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    shard = folder / "toy-train.array_record-00000-of-00001"
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="toy-train.array_record-00000-of-00001"):
        ArrayRecordSource(folder)


def test_the_writer_is_read_by_tfds_without_tensorflow(tfrecord):
    builder = tfds.builder_from_directory(str(tfrecord))
    assert builder.info.splits["train"].num_examples == 3
    index = RldsSource(tfrecord).index
    shard, _, offset, length = index.episodes[2].tolist()
    payload = index.shards[shard].read_bytes()[offset : offset + length]
    parsed = tf_example_pb2.Example.FromString(payload).features.feature
    assert list(parsed["steps/is_first"].int64_list.value) == [1, 0, 0, 0, 0, 0]
    assert parsed["steps/observation/state"].float_list.value[4] == 6.0
    index.verify()


def test_the_same_episodes_are_the_same_bytes(tfrecord):
    index = RldsSource(tfrecord).index
    for shard, _, offset, length in index.episodes.tolist():
        payload = index.shards[shard].read_bytes()[offset : offset + length]
        places = [payload.index(key.encode()) for key in sorted(COLUMNS)]
        assert places == sorted(places)  # keys in an order that no process chose for itself


def test_the_writer_equals_tensorflows_reader_where_it_is_installed(tfrecord):
    tf = pytest.importorskip("tensorflow")
    source = RldsSource(tfrecord)
    files = [str(path) for path in source.index.shards]
    for number, record in enumerate(tf.data.TFRecordDataset(files)):
        parsed = tf.train.Example.FromString(record.numpy()).features.feature
        raw = source.episode(number)
        np.testing.assert_array_equal(
            np.array(parsed["steps/observation/state"].float_list.value).reshape(-1, 3),
            raw.read("steps/observation/state"),
        )


@pytest.mark.parametrize("name", ["derived_rlds_franka", "bridge_dataset_octo/bridge_dataset"])
def test_real_records_equal_tensorflows_where_it_is_installed(samples, tmp_path, name):
    tf = pytest.importorskip("tensorflow")
    folder = samples / name / "1.0.0"
    build(folder, "train", tmp_path / "ix")
    source = RldsSource(folder, "train", tmp_path / "ix")
    files = [str(path) for path in source.index.shards]
    records = list(tf.data.TFRecordDataset(files))
    assert len(records) == len(source)
    for number, record in enumerate(records):
        columns = tf.train.Example.FromString(record.numpy()).features.feature
        for key, feature in source.index.features.items():
            kind = columns[key].WhichOneof("kind")
            theirs = list(getattr(columns[key], kind).value) if kind else []
            if not source.index.has(key, number):
                assert not theirs
                continue
            ours = source.index.read(key, number)
            if feature.dtype != "bytes":
                ours = np.asarray(ours).ravel().tolist()
            assert ours == theirs, key


def test_the_writer_refuses_what_it_cannot_mean(tmp_path):
    good = _episode(0, 2)
    cases = [
        ({k: v for k, v in good.items() if k != "steps/is_first"}, "expected \\["),
        (good | {"steps/is_first": [True]}, "numbers of steps"),
        (good | {"steps/observation/state": np.zeros((2, 4))}, "expected float32\\[3\\]"),
        (good | {"steps/observation/image": ["text", "text"]}, "expected bytes for every image"),
        (good | {"steps/code_points": np.zeros((2, 6))}, "expected int32"),
    ]
    for episode, message in cases:
        with pytest.raises(DataError, match=message), RldsWriter(tmp_path, "t", COLUMNS) as writer:
            writer.add(episode)
        assert not list(tmp_path.glob("t/*"))
    with pytest.raises(DataError, match="no episode"), RldsWriter(tmp_path, "t", COLUMNS):
        pass
    with pytest.raises(DataError, match="three numbers"):
        RldsWriter(tmp_path, "t", COLUMNS, version="1.0")
