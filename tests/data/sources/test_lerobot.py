import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gear_jax.data.sources.lerobot import LeRobotSource
from gear_jax.data.tfrecord import DataError
from tests.data.sources.test_video import write_video

VIDEO = "observation.images.top"
LENGTHS = (4, 6, 5)


def _rows(episode):
    length = LENGTHS[episode]
    return {
        "observation.state": [[float(episode), float(i), 0.5] for i in range(length)],
        "action": [[float(i)] for i in range(length)],
        "timestamp": [i / 10 for i in range(length)],
        "episode_index": [episode] * length,
        "task_index": [episode % 2] * length,
        "note": [episode % 2] * length,
        "blob": [b"x"] * length,
    }


FEATURES = {
    "observation.state": {"dtype": "float32", "shape": [3], "names": ["a", "b", "c"]},
    "action": {"dtype": "float32", "shape": [1], "names": None},
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
    "note": {"dtype": "int64", "shape": [1], "names": None},
    "blob": {"dtype": "binary", "shape": [1], "names": None},
    VIDEO: {"dtype": "video", "shape": [64, 64, 3], "names": None},
}
TASKS = ["pick", "place"]


def _grey(episode, step):
    return 40 * episode + 12 * step + 10


def write_v2(root, missing_video=2):
    info = {
        "codebase_version": "v2.1",
        "fps": 10,
        "total_episodes": 3,
        "chunks_size": 2,
        "features": FEATURES,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/{episode_chunk:03d}/{video_key}/{episode_index:06d}.mp4",
    }
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(info))
    tasks = [json.dumps({"task_index": i, "task": task}) for i, task in enumerate(TASKS)]
    (root / "meta" / "tasks.jsonl").write_text("\n".join(tasks))
    lines = []
    for episode, length in enumerate(LENGTHS):
        entry = {"episode_index": episode, "tasks": [TASKS[episode % 2]], "length": length}
        lines.append(json.dumps(entry))
        place = {"episode_chunk": episode // 2, "episode_index": episode}
        path = root / info["data_path"].format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(_rows(episode)), path)
        if episode != missing_video:
            video = root / info["video_path"].format(video_key=VIDEO, **place)
            write_video(video, [_grey(episode, i) for i in range(length)])
    (root / "meta" / "episodes.jsonl").write_text("\n".join(lines))
    return root


def write_v3(root):
    info = {
        "codebase_version": "v3.0",
        "fps": 10,
        "total_episodes": 3,
        "features": FEATURES,
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    (root / "meta" / "episodes" / "chunk-000").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(info))
    tasks = pa.table({"task_index": [0, 1], "__index_level_0__": TASKS})
    pq.write_table(tasks, root / "meta" / "tasks.parquet")
    files = [[0, 1], [2]]
    rows = []
    for file, members in enumerate(files):
        table = {}
        for episode in members:
            for key, values in _rows(episode).items():
                table.setdefault(key, []).extend(values)
        path = root / info["data_path"].format(chunk_index=0, file_index=file)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), path)
    write_video(
        root / info["video_path"].format(video_key=VIDEO, chunk_index=0, file_index=0),
        [_grey(e, i) for e in range(3) for i in range(LENGTHS[e])],
    )
    start = 0
    for episode, length in enumerate(LENGTHS):
        rows.append(
            {
                "episode_index": episode,
                "tasks": [TASKS[episode % 2]],
                "length": length,
                "data/chunk_index": 0,
                "data/file_index": int(episode == 2),
                f"videos/{VIDEO}/chunk_index": 0,
                f"videos/{VIDEO}/file_index": 0,
                f"videos/{VIDEO}/from_timestamp": start / 10,
                "stats/action/min": [0.0],
            }
        )
        start += length
    path = root / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return root


@pytest.mark.parametrize("write", [write_v2, write_v3])
def test_both_versions_give_the_same_episodes(tmp_path, write):
    source = LeRobotSource(write(tmp_path))
    assert len(source) == 3
    for number, length in enumerate(LENGTHS):
        raw = source.episode(number)
        assert (raw.num_steps, raw.fps) == (length, 10.0)
        assert raw.episode_id == f"episode_{number:06d}"
        wanted = _rows(number)
        np.testing.assert_array_equal(raw.read("observation.state"), wanted["observation.state"])
        np.testing.assert_array_equal(raw.read("timestamp"), wanted["timestamp"])
        assert raw.text("task") == raw.text("note") == TASKS[number % 2]
        if raw.has(VIDEO):
            frames = raw.images(VIDEO)
            levels = [frame.mean() for frame in frames]
            np.testing.assert_allclose(levels, [_grey(number, i) for i in range(length)], atol=4)
            np.testing.assert_allclose(frames[length - 1].mean(), levels[-1], atol=0.01)
    assert source.keys()["observation.state"] == "float32[3] ['a', 'b', 'c']"


def test_a_video_that_is_not_there_is_an_absent_view(tmp_path):
    source = LeRobotSource(write_v2(tmp_path))
    assert [source.episode(i).has(VIDEO) for i in range(3)] == [True, True, False]


def test_binary_columns_are_not_read(tmp_path):
    raw = LeRobotSource(write_v2(tmp_path)).episode(0)
    with pytest.raises(DataError, match="'blob' holds binary objects"):
        raw.read("blob")


def test_what_is_wrong_is_named(tmp_path):
    root = write_v2(tmp_path / "a")
    info = json.loads((root / "meta" / "info.json").read_text())
    cases = [
        (info | {"codebase_version": "v1.6"}, "codebase_version 'v1.6': expected v2.x or v3.x"),
        (info | {"fps": 0}, "fps is 0"),
        (info | {"total_episodes": 9}, "total_episodes is 9, but 3 are listed"),
        ({k: v for k, v in info.items() if k != "features"}, "'features'"),
    ]
    for changed, message in cases:
        (root / "meta" / "info.json").write_text(json.dumps(changed))
        with pytest.raises(DataError, match=message):
            LeRobotSource(root)
    root = write_v2(tmp_path / "b")
    episodes = (root / "meta" / "episodes.jsonl").read_text().replace('"length": 6', '"length": 7')
    (root / "meta" / "episodes.jsonl").write_text(episodes)
    with pytest.raises(DataError, match="episode 1: 6 rows, but the metadata say 7"):
        LeRobotSource(root).episode(1).read("action")
    (root / "data" / "chunk-000" / "episode_000000.parquet").write_bytes(b"version https://git-lfs")
    with pytest.raises(DataError, match="episode_000000.parquet: not a readable parquet"):
        LeRobotSource(root).episode(0).read("action")


def test_the_real_sample(samples):
    source = LeRobotSource(samples / "internvla_m1_sim_franka" / "sim_pick_place")
    assert [source.episode(i).num_steps for i in range(4)] == [412, 411, 398, 446]
    assert source.episode(2).text("task") == "Move the potato to the top of the cooking utensils."
    assert [source.episode(i).has("video.base_view") for i in range(4)] == [
        False,
        False,
        True,
        False,
    ]
    assert source.episode(2).images("video.ego_view")[100].shape == (480, 640, 3)
