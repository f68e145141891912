"""The launcher of scripted demonstrations, with episodes made by hand."""

import numpy as np
import pytest

from gear_jax.data.windows import empty_state
from gear_jax.evals.sims import recording
from gear_jax.types import Observation
from launch import demos


def _record(source):
    state = empty_state()
    state["arm_mask"][1] = True
    view = np.zeros((8, 8, 3), np.uint8)
    recorder = recording.Recorder(source)
    for step in range(3):
        observation = Observation({"head": view, "right_wrist": view}, "go", "franka", state)
        recorder.add(observation, np.full(7, 0.1 * step + 0.1))
    return recorder.episode()


def _fake(args):
    """The expert fails at every initial state 1."""
    for task in args.tasks:
        for init in args.inits:
            source = f"{task}/{init}"
            yield source, None if init == 1 else _record(source)


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setitem(demos.SIMULATORS, "libero_spatial", _fake)


def _run(tmp_path, *flags):
    return demos.main(["--sim", "libero_spatial", "--target", str(tmp_path), *flags])


def test_successes_are_written_and_failures_named(tmp_path, capsys, fake):
    assert _run(tmp_path, "--tasks", "4,2", "--inits", "0:3") == 0
    said = capsys.readouterr()
    folder = tmp_path / "libero_spatial_scripted/1.0.0"
    assert said.out == f"4 episodes, 12 steps, of 4 of 6 runs: {folder}\n"
    assert "left out: 4/1" in said.err
    assert "left out: 2/1" in said.err
    assert (folder / "features.json").is_file()


def test_a_set_without_a_success_leaves_nothing_behind(tmp_path, capsys, fake):
    assert _run(tmp_path, "--inits", "1", "--name", "none") == 4
    assert "no episode was written" in capsys.readouterr().err
    assert list((tmp_path / "none").iterdir()) == []


def test_a_set_that_is_there_is_not_touched(tmp_path, capsys, fake):
    assert _run(tmp_path, "--inits", "0") == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert _run(tmp_path, "--inits", "2") == 4
    assert "already there" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tasks", "3:3"], "--tasks '3:3': expected FIRST:END or numbers with commas"),
        (["--tasks", "-1"], "--tasks '-1'"),
        (["--inits", "0:"], "--inits '0:'"),
        (["--inits", "1,,2"], "--inits '1,,2'"),
        (["--noise", "1.5"], "--noise 1.5: expected 0 .. 1"),
        (["--seed", "-1"], "--seed -1: expected 0 or more"),
        (["--workers", "0"], "--workers 0: expected 1 or more"),
        (["--repeats", "0"], "--repeats 0: expected 1 or more"),
        (["--speed", "0"], "--speed 0.0: expected more than 0, 1 at most"),
        (["--speed", "1.1"], "--speed 1.1: expected more than 0, 1 at most"),
    ],
)
def test_wrong_flags_are_one_sentence(tmp_path, capsys, flags, said):
    name, value = flags
    assert _run(tmp_path, f"{name}={value}") == 4
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_liberos_is_refused_on_the_tabletop(tmp_path, capsys):
    for flags in (("--repeats", "2"), ("--speed", "0.5")):
        assert demos.main(["--sim", "tabletop", "--target", str(tmp_path), *flags]) == 4
        assert "--repeats and --speed are of LIBERO" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_repeat_counts_as_a_run(tmp_path, capsys, fake):
    assert _run(tmp_path, "--tasks", "4", "--inits", "0", "--repeats", "3") == 0
    assert "of 3 of 3 runs" in capsys.readouterr().out


def test_workers_make_the_same_set(tmp_path):
    pytest.importorskip("mujoco")
    flags = ["--sim", "tabletop", "--tasks", "0:2", "--inits", "1000:1010", "--noise", "0.7"]
    made = []
    for workers in ("1", "2"):
        folder = tmp_path / workers
        assert demos.main([*flags, "--target", str(folder), "--workers", workers]) == 0
        made.append({p.name: p.read_bytes() for p in sorted(folder.rglob("*.tfrecord*"))})
    assert made[0]
    assert made[0] == made[1]
