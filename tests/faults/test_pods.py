"""Two processes as two hosts, over loopback: equal to one, and gone together (F5, F6, F7)."""

import json
import os
import shutil
import signal
import time

import numpy as np

from tests.faults.runs import LONG

HEARTBEAT = 5
ROUNDS = 3 if LONG else 1


def _ended(pair, code=0):
    for made in pair:
        assert made.wait() == code, made.said()


def _gone(pair, begun):
    """Seconds until all have ended; at most heartbeat + 5."""
    for made in pair:
        made.process.wait(max(1, begun + HEARTBEAT + 5 - time.monotonic()))
        assert made.process.returncode in (70, -6, -9), made.said()
    return time.monotonic() - begun


def test_f5_two_processes_learn_what_one_does_read_each_sample_once_and_restore_as_one(
    place, tmp_path
):
    one, two, again = place("one"), place("two"), place("again")
    one.run(devices=8)
    _ended(two.pair(fault={"log": str(tmp_path / "samples")}))
    _ended(again.pair(**{"loop.checkpoint_minutes": 0}))
    assert (two.steps(), again.steps()) == ([6, 9, 12], [10, 11, 12])  # by the clock of process 0
    assert again.losses() == two.losses()
    assert again.digest() == two.digest()
    np.testing.assert_allclose(two.losses(), one.losses(), rtol=1e-6)
    off = [abs(a / b - 1) for (_, a), (_, b) in zip(two.losses(), one.losses(), strict=True)]
    read = [
        [json.loads(line) for line in (tmp_path / f"samples-{n}").read_text().splitlines()]
        for n in range(2)
    ]
    for step, (a, b) in enumerate(zip(*read, strict=True)):
        assert a + b == list(range(8 * step, 8 * step + 8))
    # the same place, gone on by one process on another mesh; and with other data
    shutil.rmtree(two.workdir / "checkpoints" / "12")
    assert "resumed at step 9" in two.run(devices=2, **{"mesh.fsdp": 2})
    assert [row["step"] for row in two.rows()] == list(range(1, 13))
    np.testing.assert_allclose(two.losses(), one.losses(), rtol=1e-6)
    assert "config.data.episodes was 20 and is 19" in two.run(4, **{"data.episodes": 19})
    print(f"F5: 2 x 4 devices against 1 x 8: losses within {max(off):.1e}, 2 x 4 again: bit-equal")


def test_two_processes_prepare_a_data_set_that_neither_has_seen_one_after_the_other(
    place, tmp_path
):
    one = place(**{"data.work": tmp_path / "new", "data.episodes": 18, "optim.num_steps": 2})
    _ended(one.pair())
    assert one.steps() == [2]


def test_f6_f7_whoever_dies_hangs_or_is_told_to_stop_all_end_and_the_relaunch_is_exact(place):
    options = {"loop.checkpoint_every": 2, "optim.num_steps": 14 + 10 * (ROUNDS - 1)}
    whole, broken = place("whole", **options), place("broken", **options)
    _ended(whole.pair())
    for _ in range(ROUNDS):
        for number, name in ((1, "KILL"), (0, "KILL"), (1, "STOP"), (1, "TERM")):
            known = max((row["step"] for row in broken.rows()), default=0)
            pair = broken.pair(HEARTBEAT, fault={"slow": 0.3})
            pair[0].until(broken.reached(known + 2))
            begun = time.monotonic()
            os.kill(pair[number].process.pid, getattr(signal, f"SIG{name}"))
            if name == "TERM":
                _ended(pair, 42)
                step = max(broken.steps())
                for made in pair:
                    assert f"preempted: step {step} is saved" in made.said()
                assert time.monotonic() - begun < 30
                print(f"F7: SIGTERM to one of two, step {step} saved, both exit 42 after "
                      f"{time.monotonic() - begun:.1f} s")  # fmt: skip
            else:
                other = pair[1 - number]
                _gone([other] if name == "STOP" else pair, begun)
                print(
                    f"F6: SIG{name} to process {number}, heartbeat {HEARTBEAT} s: the other ends "
                    f"with {other.process.returncode} after {time.monotonic() - begun:.1f} s"
                )
                if name == "STOP":  # what a launcher does when a process of a run has ended
                    os.kill(pair[number].process.pid, signal.SIGKILL)
    _ended(broken.pair())
    assert broken.digest() == whole.digest()
    assert broken.losses() == whole.losses()


def test_f7_sigterm_at_any_time_saves_one_step_and_ends_with_42(place):
    options = {"loop.checkpoint_every": 1, "optim.num_steps": 22, "width": 512}
    whole, broken = place("whole", **options), place("broken", **options)
    whole.run()
    for when in ("compile", "twice", "save"):
        known = max((row["step"] for row in broken.rows()), default=0)
        compiling = 3 if when == "compile" else 0
        made = broken.start(fault={"slow": 0.1, "compile": compiling})
        if when == "compile":
            made.until(lambda: (broken.workdir / "metrics.jsonl").exists())
        else:
            made.until(broken.reached(known + 3))
        if when == "save":
            made.until(lambda: broken.leftovers())
        begun = time.monotonic()
        os.kill(made.process.pid, signal.SIGTERM)
        if when == "twice":
            time.sleep(0.05)
            os.kill(made.process.pid, signal.SIGTERM)
        assert made.wait() == 42, made.said()
        passed = time.monotonic() - begun
        step = max(broken.steps())
        assert f"preempted: step {step} is saved" in made.said()
        assert not broken.leftovers()
        assert passed < 30
        print(f"F7: SIGTERM ({when}), step {step} saved, exit 42 after {passed:.1f} s")
    broken.run()
    assert broken.digest() == whole.digest()
