import pickle

import numpy as np
import pytest

from gear_jax.data.faults import FaultLog
from gear_jax.data.prepared import Prepared, hold_out, prepare, stored_episodes
from gear_jax.data.standardize import standard_episode
from gear_jax.data.tfrecord import DataError
from tests.data.raw import Recording
from tests.data.test_standardize import ROW, _changed, _raw


def _recording():
    episodes = []
    for number in range(70):
        raw = _raw(2 + number % 5)
        raw.episode_id, raw.texts["text"] = f"train/{number}", f"pick é {number}"
        raw.numbers["pose"][:, 1] = number / 100
        if number % 3 == 0:
            raw.pictures = {}
        episodes.append(raw)
    return Recording(episodes)


def _same(episode, raw):
    wanted = standard_episode(raw, ROW, FaultLog())
    for key in ("dataset", "episode_id", "embodiment", "num_steps", "fps", "instruction"):
        assert getattr(episode, key) == getattr(wanted, key)
    assert list(episode.views) == list(wanted.views)
    ours, theirs = episode.arms["right"], wanted.arms["right"]
    for key in ("ee_pos", "ee_quat", "joint_pos", "grip_open", "grip_cmd"):
        np.testing.assert_array_equal(getattr(ours, key), getattr(theirs, key))
    assert ours.grip_held == theirs.grip_held


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_prepared_data_set_gives_the_standard_episodes_back(tmp_path, num_workers):
    source, seen = _recording(), []
    prepare(source, ROW, tmp_path / "p", num_workers=num_workers, report=seen.append)
    assert seen[-1] == 70
    prepared = pickle.loads(pickle.dumps(Prepared(tmp_path / "p", source)))
    assert len(prepared) == 70
    assert prepared.num_steps == sum(raw.num_steps for raw in source.episodes)
    for number, raw in enumerate(source.episodes):
        _same(prepared.episode(number), raw)
    assert [prepared.locate(step) for step in range(6)] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0)
    ]  # fmt: skip
    assert prepared.locate(prepared.num_steps - 1) == (69, source.episodes[69].num_steps - 1)
    with pytest.raises(IndexError):
        prepared.locate(prepared.num_steps)
    assert prepared.faults.counts == {"missing_view": 24}


def test_dropped_episodes_are_counted_and_the_rest_is_kept(tmp_path):
    source = _recording()
    bad = _changed("pose", 3, np.nan)
    source.episodes.insert(5, bad)
    prepare(source, ROW, tmp_path / "p", budget=0.02)
    prepared = Prepared(tmp_path / "p", source)
    assert len(prepared) == 70
    assert prepared.faults.dropped == 1
    assert "step 3" in prepared.faults.examples["not_finite"][0]
    _same(prepared.episode(5), source.episodes[6])
    with pytest.raises(DataError, match="1 of 71 records dropped, more than the budget of 1.0%"):
        prepare(source, ROW, tmp_path / "q")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p"]


def test_a_data_set_without_a_good_episode_is_refused(tmp_path):
    with pytest.raises(DataError, match="no episode is left of 1"):
        prepare(Recording([_raw(1)]), ROW, tmp_path / "p", budget=1.0)


def test_the_numbers_are_there_without_the_recordings(tmp_path):
    source = _recording()
    prepare(source, ROW, tmp_path / "p")
    episodes = stored_episodes(tmp_path / "p")
    assert len(episodes) == 70
    wanted = Prepared(tmp_path / "p", source).episode(69)
    np.testing.assert_array_equal(episodes[69].arms["right"].ee_pos, wanted.arms["right"].ee_pos)
    assert episodes[69].views == {}


def test_other_data_than_was_prepared_are_refused(tmp_path):
    source = _recording()
    prepare(source, ROW, tmp_path / "p")
    with pytest.raises(DataError, match="the data have changed"):
        Prepared(tmp_path / "p", Recording(source.episodes[:-1]))
    with (tmp_path / "p" / "tracks.bin").open("ab") as file:
        file.write(b"1234")
    with pytest.raises(DataError, match="tracks.bin: expected"):
        Prepared(tmp_path / "p", source)
    with pytest.raises(DataError, match="manifest.json"):
        Prepared(tmp_path / "nowhere", source)


def test_parts_of_one_recording_are_held_out_together(tmp_path):
    source = _recording()
    for number, raw in enumerate(source.episodes):
        raw.episode_id = f"run_{number // 5}#{number % 5}"
    prepare(source, ROW, tmp_path / "p")
    parts = hold_out(Prepared(tmp_path / "p", source), 0.3)
    train, held = (
        {part.episode(number).episode_id for number in range(len(part))} for part in parts
    )
    runs = [{one.partition("#")[0] for one in ids} for ids in (train, held)]
    assert len(train) + len(held) == 70
    assert runs[0].isdisjoint(runs[1])
    assert len(runs[0]) + len(runs[1]) == 14
