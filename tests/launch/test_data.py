import json

import numpy as np
import pytest

from gear_jax.data.statistics import Statistics
from launch.data import main
from tests.data.sources.test_lerobot import VIDEO, write_v2
from tests.data.test_pipeline import write_pool, write_robot

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    return str(write_robot(tmp_path_factory.mktemp("robot"), lengths=(40, 50)))


ROW = ["--row", "franka_sim_pick"]


def test_inspect_writes_a_page_and_recordings(robot, tmp_path, capsys):
    assert main(["inspect", robot, *ROW, "--out", str(tmp_path), "--episodes", "1"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "pick 50" in page
    assert "2, 90" in page
    assert page.count("data:image/jpeg") == 12  # two views, six steps
    assert page.count("data:image/png") == 3
    assert "left_wrist" in page
    assert "right position x" in page
    assert (tmp_path / "episode_1.rrd").stat().st_size > 10_000
    assert "2 episodes, 90 steps" in capsys.readouterr().out


def test_inspect_without_a_row_shows_keys_numbers_and_pictures(tmp_path):
    source = write_v2(tmp_path / "set")
    assert main(["inspect", str(source), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "page.html").read_text()
    for text in ("observation.state", VIDEO, "float32[3]", "pick", "No row says"):
        assert text in page
    assert page.count("data:image/jpeg") == 4 + 6
    assert page.count("data:image/png") == 2


def test_a_robot_with_joints_only_is_read_by_a_row_of_ones_own(tmp_path):
    source = write_v2(tmp_path / "set")
    row = {
        "name": "my_humanoid",
        "embodiment": "gr1",
        "fps": None,
        "arms": {
            "left": {"joints": "observation.state[0:2]"},
            "right": {
                "joints": "observation.state",
                "grip_open": {"column": "observation.state[2]", "closed": 0.0, "open": 1.0},
            },
        },
        "views": {"head": {"key": VIDEO}},
        "instruction": ["task"],
        "clock": "timestamp",
    }
    (tmp_path / "row.json").write_text(json.dumps(row))
    arguments = [str(source), "--row", str(tmp_path / "row.json"), "--out", str(tmp_path / "out")]
    assert main(["inspect", *arguments]) == 0
    page = (tmp_path / "out" / "page.html").read_text()
    assert "gr1" in page
    assert "place" in page
    assert "1 missing_view" in page


def test_stats_measure_and_merge_exactly(robot, tmp_path, capsys):
    out = tmp_path / "a"
    assert main(["stats", robot, *ROW, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "right position x" in said
    assert "fit to train on" in said
    one = Statistics.load(out / "statistics.json")
    merged = tmp_path / "all.json"
    parts = [str(out / "measured.npz")] * 2
    assert main(["merge", *parts, "--out", str(merged)]) == 0
    two = Statistics.load(merged)
    np.testing.assert_array_equal(two.action.count, 2 * one.action.count)
    np.testing.assert_allclose(two.action.std, one.action.std, rtol=1e-12, atol=1e-18)


def test_bench_prints_a_rate(robot, tmp_path, capsys):
    arguments = ["bench", robot, *ROW, "--out", str(tmp_path), "--seconds", "0.2", "--size", "56"]
    assert main(arguments) == 0
    assert "samples/s at 56 px" in capsys.readouterr().out


def test_records_are_checked(tmp_path, capsys):
    write_pool(tmp_path)
    assert main(["check-records", str(tmp_path / "pool.jsonl")]) == 0
    (tmp_path / "3.jpg").unlink()
    assert main(["check-records", str(tmp_path / "pool.jsonl")]) == 4
    assert "line 4: image" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["inspect", "{robot}", "--row", "nope"], "'nope' has no row"),
        (["inspect", "{robot}", *ROW, "--option", "head=x"], "option 'head' is 'x'"),
        (["inspect", "{robot}", *ROW, "--episodes", "9"], "episodes [9]: expected 0 .. 1"),
        (["stats", "{robot}"], "this command needs --row"),
        (["inspect", "{robot}", *ROW, "--format", "lerobot"], "info.json: cannot be read"),
        (["inspect", "/nowhere", *ROW], "neither dataset_info.json"),
        (["inspect", "{robot}", *ROW, "--split", "test"], "split 'test' is unknown"),
        (["inspect", "{robot}", "--row", "missing.json"], "missing.json: cannot be read"),
    ],
)
def test_mistakes_end_in_one_sentence(robot, tmp_path, capsys, arguments, sentence):
    arguments = [argument.format(robot=robot) for argument in arguments]
    assert main([*arguments, "--out", str(tmp_path)]) == 4
    error = capsys.readouterr().err
    assert error.lstrip().startswith("error: ")
    assert sentence in error
    assert "Traceback" not in error
