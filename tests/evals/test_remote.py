import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from gear_jax.evals import remote, wire, worker
from gear_jax.evals.remote import RemoteSimulator, WorkerConfig, WorkerError, WorkerGoneError
from gear_jax.evals.sims.point import PointSimulator

POINT = WorkerConfig("point")


@pytest.fixture
def start():
    with contextlib.ExitStack() as stack:

        def begin(config=POINT, number=0):
            return stack.enter_context(contextlib.closing(RemoteSimulator(config, number)))

        yield begin


def targets(place, count):
    pose = np.eye(4)
    pose[:3, 3] = place
    return [{"right": (pose, 1.0)}] * count


def test_a_worker_imports_neither_jax_nor_what_a_simulators_own_environment_may_lack():
    code = (
        "import sys; from gear_jax.evals import worker; worker.open_simulator('point', {}); "
        "print(sorted({'jax', 'flax', 'scipy', 'absl', 'cv2', 'av', 'tensorflow'} & "
        "set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_a_worker_gives_what_the_simulator_gives_in_process(start):
    simulator, there = PointSimulator(), start()
    simulator.reset("far", 3)
    hello = there.call("hello")
    assert remote.tasks_of(hello) == simulator.tasks()
    assert (hello["protocol"], hello["rate_hz"]) == (simulator.protocol(), 20.0)
    seen = remote.observation_of(there.call("reset", task="far", init=3))
    here = simulator.observe()
    assert (seen.instruction, seen.embodiment) == ("reach the far goal", "franka")
    np.testing.assert_array_equal(seen.images["head"], here.images["head"], strict=True)
    for key, value in here.state.items():
        np.testing.assert_array_equal(seen.state[key], value, strict=True)
    reply = there.call("run", targets=targets(simulator.goal + 0.3, 2), observe=True)
    assert (reply["done"], reply["steps"]) == (False, 2)
    assert remote.observation_of(reply).images["head"].shape == (32, 32, 3)
    reply = there.call("run", targets=targets(simulator.goal, 50), observe=True)
    assert reply["done"]
    assert 1 < reply["steps"] < 50
    assert remote.observation_of(reply) is None
    assert set(reply["seconds"]) == {"physics", "render"}
    there.call("reset", task="far", init=3)
    reply = there.call("run", targets=targets(simulator.goal + 0.3, 2), observe=False)
    assert remote.observation_of(reply) is None


def test_errors_come_back_as_one_sentence_with_the_workers_name(start):
    there = start(number=4)
    with pytest.raises(ValueError, match="^worker 4 \\(point\\), reset: task 'x', initial state 0"):
        there.call("reset", task="x", init=0)
    with pytest.raises(WorkerError, match="run: 'left_foot' \\[KeyError\\]|run: 'right'"):
        there.call("run", targets=[{"left_foot": (np.eye(4), 0.0)}], observe=False)
    with pytest.raises(ValueError, match="one of \\['hello', 'reset', 'run', 'audit'\\]"):
        there.call("eval", code="1")
    with pytest.raises(ValueError, match="audit: the simulator has no audit"):
        there.call("audit")
    assert there.call("hello")["rate_hz"] == 20.0  # it is still there
    wrong = start(WorkerConfig("point", {"speed": 3}))
    with pytest.raises(ValueError, match="simulator 'point' with options .*speed"):
        wrong.call("hello")


def test_only_our_own_names_can_be_started(start):
    with pytest.raises(ValueError, match="simulator 'os:system' is unknown"):
        worker.open_simulator("os:system", {})
    with pytest.raises(WorkerGoneError, match="ended with 2; it said last: .*invalid choice"):
        start(WorkerConfig("os:system")).call("hello")
    with pytest.raises(ValueError, match="worker 0 \\(point\\) cannot be started"):
        start(WorkerConfig("point", python="/nowhere/python"))


def test_a_killed_worker_is_noticed_at_once(start):
    there = start(WorkerConfig("point", {"pace": 1e6}, timeout=1e6))
    there.call("reset", task="near", init=0)
    there.ask("run", targets=targets(np.ones(3), 5), observe=True)
    assert remote.wait([there], 0.3) == []
    there.process.kill()
    assert remote.wait([there]) == [there]  # for ever, if only its silence were noticed
    with pytest.raises(
        WorkerGoneError, match="worker 0 \\(point\\) failed in run: .*ended with -9"
    ):
        there.take()


def test_a_worker_that_says_nothing_is_given_up(start):
    there = start()
    there.call("hello")
    os.kill(there.process.pid, signal.SIGSTOP)
    there.config = WorkerConfig("point", timeout=0.2)
    with pytest.raises(WorkerGoneError, match="no reply in 0.2 s; the process is running"):
        there.call("hello")


def test_who_has_not_the_token_is_sent_away(start):
    there = start()
    with socket.create_connection(there._listener.getsockname()) as stranger:
        wire.send(stranger, {"token": "guess"})
        assert there.call("hello")["rate_hz"] == 20.0
        assert stranger.recv(1) == b""


def test_no_worker_outlives_a_killed_evaluation():
    code = (
        "from gear_jax.evals.remote import *; one = RemoteSimulator(WorkerConfig('point', "
        "{'pace': 60.0})); one.call('reset', task='near', init=0); import numpy as np; "
        "one.ask('run', targets=[{'right': (np.ones((4, 4)), 1.0)}], observe=True); "
        "print(one.process.pid, flush=True); wait([one])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as parent:
        child = int(parent.stdout.readline())
        os.kill(child, 0)
        parent.kill()
    until = time.monotonic() + 60
    while _alive(child) and time.monotonic() < until:
        time.sleep(0.1)
    assert not _alive(child)


def _alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False
