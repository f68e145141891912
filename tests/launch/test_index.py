import json

import pytest

from launch import index
from tests.data.records import example, frame


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "toy"
    folder.mkdir()
    steps = {"featuresDict": {"features": {"image": {"image": {}}}}}
    features = {"featuresDict": {"features": {"steps": {"sequence": {"feature": steps}}}}}
    (folder / "features.json").write_text(json.dumps(features))
    info = {"fileFormat": "tfrecord", "name": "toy"}
    info["splits"] = [{"name": "train", "shardLengths": ["2"]}]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    records = [frame(example(**{"steps/image": [b"x"] * n})) for n in (3, 4)]
    (folder / "toy-train.tfrecord-00000-of-00001").write_bytes(b"".join(records))
    return folder


def test_building_and_verifying_say_what_was_done(dataset, capsys):
    assert index.main([str(dataset)]) == 0
    assert "2 episodes, 7 steps in 1 shards -> " in capsys.readouterr().out
    assert index.main([str(dataset), "--verify"]) == 0
    assert "2 episodes verified" in capsys.readouterr().out


def test_a_fault_is_one_sentence_and_exit_code_4(dataset, capsys):
    assert index.main([str(dataset), "--split", "val"]) == 4
    assert "split 'val' is unknown: expected one of ['train']" in capsys.readouterr().err
    shard = next(dataset.glob("*.tfrecord*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert index.main([str(dataset)]) == 4
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: toy-train.tfrecord-00000-of-00001: the record at byte")
    assert not (dataset / ".gear_index" / "train").exists()
