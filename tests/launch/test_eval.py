"""The evaluation through its public door: killed, restarted, spread over processes, compared."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest

from gear_jax.evals import ledger
from gear_jax.evals.episodes import Episode
from gear_jax.evals.sims.base import Task
from launch import eval as door

POINT = ("--policy", "noise", "--sim", "point", "--inits", "0:8")


def run(capsys, folder, *more):
    """Exit code, the last line's object (None without one) and what was said to the user."""
    code = door.main([*POINT, "--out", str(folder), *more])
    said = capsys.readouterr()
    lines = said.out.strip().splitlines()
    return code, json.loads(lines[-1]) if lines else None, said.err


def test_an_evaluation_ends_with_one_json_object_and_again_has_nothing_to_do(tmp_path, capsys):
    code, said, _ = run(capsys, tmp_path)
    assert (code, said["ok"], said["finished"], said["ran"]) == (0, True, True, 16)
    rows, _ = ledger.read(tmp_path)
    assert said["success"] == sum(row["success"] for row in rows.values()) > 0
    code, again, _ = run(capsys, tmp_path, "--workers", "3", "--batch", "2")
    assert (code, again["ran"], again["ledger_sha256"]) == (0, 0, said["ledger_sha256"])


def test_another_protocol_is_refused_in_one_sentence(tmp_path, capsys):
    run(capsys, tmp_path)
    for more, words in (
        (("--replan", "5"), "replan_rows is 10 there and 5 now; steps_per_query is 7 there and 3"),
        (("--seed", "1"), "seed is 0 there and 1 now"),
        (("--inits", "0:9"), "inits is [0,8] there and [0,9] now"),
        (("--tasks", "near"), "absent now"),
        (("--policy", "hold"), "another policy: metres_per_second is 0.3 there and absent now"),
    ):
        code, said, error = run(capsys, tmp_path, *more)
        assert (code, said) == (4, None)
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert words in error


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--inits", "5"), "--inits '5': expected FIRST:END"),
        (("--inits", "0:51"), "initial states 0:51 of 'near': expected within 0:50"),
        (("--tasks", "near,up"), "--tasks near,up: expected all, or some of ['far', 'near']"),
        (("--policy", "best"), "policy 'best' is unknown"),
        (("--policy", "hold", "--temperature", "0.5"), "has no temperature"),
        (("--options", '{"speed": 1}'), "simulator 'point' with options {'speed': 1}"),
        (("--worker-python", "/nowhere"), "worker 0 (point) cannot be started"),
        (("--host", "2", "--hosts", "2"), "--host 2 of 2"),
        (("--workers", "0"), "--workers 0: expected at least 1"),
        (("--device-batch", "0"), "--device-batch 0: expected at least 1"),
    ],
)
def test_what_cannot_be_used_is_one_sentence_and_exit_code_4(tmp_path, capsys, more, words):
    code, said, error = run(capsys, tmp_path, *more)
    assert (code, said) == (4, None)
    assert words in error
    assert error.count("\n") == 1


def test_an_unknown_task_among_thousands_is_one_short_sentence():
    tasks = [Task("s", f"task_{number:04}", "go", 1, 9) for number in range(2400)]
    with pytest.raises(ValueError, match=r"'task_0019'\] and 2380 more, once each$") as caught:
        door._chosen(tasks, "task_0001,nonsense")
    assert len(str(caught.value)) < 400
    assert door._chosen(tasks, "task_0007,task_0003") == [tasks[3], tasks[7]]


def test_an_audit_is_refused_where_a_simulator_has_none(capsys):
    assert door.main(["audit", "--sim", "point"]) == 4
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: worker 0 (point), audit: the simulator has no audit")


def test_libero_plus_is_added_up_over_folders_and_other_folders_are_refused(tmp_path, capsys):
    for suite, won in (("libero_plus_goal", True), ("libero_plus_10", False)):
        simulator = {"name": suite, "options": {}, "is": {"suite": suite}}
        protocol = {"tasks": {suite: {}}, "simulator": simulator}
        book = ledger.Ledger(tmp_path / suite, protocol, {"name": "a"})
        for number in range(3):
            one = Episode(suite, f"open_it_light_{number}", 0)
            book.add(one, success=won, steps=1, queries=1)
        book.close()
    folders = [str(path) for path in sorted(tmp_path.iterdir())]
    assert door.main(["axes", *folders]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[3].split() == ["light", "3/6", "50.0", "%", "of", "1142", "tasks"]
    assert lines[-1].startswith("3 successes in 6 of 10030 tasks, incomplete: camera, robot, ")
    found = json.loads(last)
    assert (found["ok"], found["complete"], found["weighted_total"]) == (True, False, None)
    run(capsys, tmp_path / "point")
    assert door.main(["axes", str(tmp_path / "point")]) == 4
    assert "is no episode of LIBERO-Plus" in capsys.readouterr().err


def test_two_policies_are_compared_by_episode(tmp_path, capsys):
    run(capsys, tmp_path / "noise")
    run(capsys, tmp_path / "hold", "--policy", "hold")
    assert door.main(["compare", str(tmp_path / "noise"), str(tmp_path / "hold")]) == 0
    *lines, last = capsys.readouterr().out.strip().splitlines()
    found = json.loads(last)
    assert (found["second"]["success"], found["only_second"], found["episodes"]) == (0, 0, 16)
    assert found["only_first"] == found["first"]["success"] > 0
    assert lines[0].startswith(f"{tmp_path / 'noise'}: {found['only_first']}/16 = ")
    run(capsys, tmp_path / "other", "--seed", "1")
    assert door.main(["compare", str(tmp_path / "noise"), str(tmp_path / "other")]) == 4
    assert (
        "different protocols: seed is 0 in the first and 1 in the second" in capsys.readouterr().err
    )


def command(folder, *more):
    return [sys.executable, "-m", "launch.eval", *POINT, "--out", str(folder), *more]


@pytest.mark.parametrize("pod", [False, True], ids=["told apart by hand", "by jax.distributed"])
def test_two_processes_give_the_ledger_of_one(tmp_path, capsys, pod):
    run(capsys, tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = []
    for number in ("0", "1"):
        more = ("--host", number, "--hosts", "2")
        if pod:
            more = ("--coordinator", address, "--num_processes", "2", "--process_id", number)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        both.append(subprocess.Popen(command(tmp_path / "two", *more), **quiet))
    assert [one.wait(120) for one in both] == [0, 0]
    for name in ("ledger.jsonl", "summary.json", "protocol.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    sizes = [len((tmp_path / f"two/episodes-{n}.jsonl").read_bytes().split()) for n in (0, 1)]
    assert sizes == [8, 8]


def test_killed_at_random_moments_the_same_command_ends_with_the_same_bytes(tmp_path):
    slow = ("--options", '{"pace": 0.002}', "--workers", "2")  # some 3 s in all
    straight = subprocess.run(command(tmp_path / "straight", *slow), capture_output=True, text=True)
    assert straight.returncode == 0, straight.stderr
    rng, rows, kills = random.Random(os.environ.get("KILL_SEED", "7")), [], 0
    while True:
        with subprocess.Popen(
            command(tmp_path / "killed", *slow), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            # die among the episodes, wherever this machine has got to
            goal = len(rows) + rng.randrange(4) if kills < 4 else 17
            while process.poll() is None and len(rows) < goal:
                time.sleep(rng.uniform(0, 0.02))
                rows = lines(tmp_path / "killed")
            time.sleep(rng.uniform(0, 0.3) if kills < 4 else 0)
            if process.poll() is None and kills < 4:
                process.send_signal(signal.SIGKILL)
                kills += 1
                continue
            assert process.wait(120) == 0
            said = json.loads(process.stdout.read().splitlines()[-1])
        break
    assert kills > 0
    assert said["finished"]
    assert said["ran"] < 16
    for name in ("ledger.jsonl", "summary.json", "protocol.json"):
        straight_bytes = (tmp_path / "straight" / name).read_bytes()
        assert (tmp_path / "killed" / name).read_bytes() == straight_bytes


def lines(folder):
    path = folder / "episodes-0.jsonl"
    return path.read_bytes().splitlines() if path.exists() else []
