"""Numbers that are not finite, and data workers that die, fail or hang (F10, F11)."""

import os
import re
import signal
import time

import jax
import numpy as np

from gear_jax.train import exits
from tests.faults.runs import workers


def test_f10_a_bad_batch_changes_nothing_and_too_many_end_the_run_by_their_samples(place):
    options = {"optim.num_steps": 20, "loop.checkpoint_every": 1, "loop.keep": 20}
    one = place(**options)
    said = one.run(exits.NOT_FINITE, fault={"nan": [4, 9, 10, 11], "huge": [6]})
    assert (
        "step 11: loss or gradient was not finite 3 times in a row, last for samples 80 to 87"
        in (said.splitlines()[-1])
    )
    bad = {row["step"]: row["bad_steps"] for row in one.rows()}
    assert [step for step, count in bad.items() if count] == [4, 9, 10]
    states = {}
    for step in reversed(one.steps()):  # newest first, each taken away once it is read
        restored = one.state()
        states[restored.step] = restored.state
        (one.workdir / "checkpoints" / str(step)).rename(one.workdir / f"read-{step}")
    for step in (4, 9, 10):
        before, after = states[step - 1], states[step]
        for name in ("params", "opt_state", "ema", "extra"):
            jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(after, name))
    for state in states.values():
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((state.params, state.ema)))
    moved = np.abs(states[6].params["w"] - states[5].params["w"]).max()
    assert moved < 0.1  # a gradient 1e12 times too large is clipped
    print("F10: NaN once: state bit-equal; three times: exit 5 with samples; 1e6 rows: step "
          f"{moved:.4f}")  # fmt: skip


def test_f11_a_killed_worker_ends_the_run_in_one_sentence(place):
    one = place(**{"data.num_workers": 2, "optim.num_steps": 500})
    made = one.start(fault={"slow": 0.1}).until(one.reached(3))
    left = workers(made.process)
    assert len(left) == 2
    begun = time.monotonic()
    os.kill(left[0], signal.SIGKILL)
    assert made.wait() == exits.INTERNAL, made.said()
    passed = time.monotonic() - begun
    assert passed < 10
    sentence = [line for line in made.said().splitlines() if line.startswith("error: ")]
    assert len(sentence) == 1
    assert "Worker process was terminated" in sentence[0]
    print(f"F11: worker killed: exit 70 after {passed:.1f} s")


def test_f11_a_record_that_a_worker_cannot_read_ends_the_run_by_its_name(place):
    begun = time.monotonic()
    said = place(**{"data.num_workers": 2}).run(exits.DATA, fault={"sample": 37})
    assert "error: shapes, sample 37: damaged" in said
    print(
        f"F11: damaged record in a worker: exit 4, {time.monotonic() - begun:.1f} s with the start"
    )


def test_f11_a_worker_that_hangs_ends_the_run_by_the_watchdog_with_all_stacks(place):
    one = place(**{"data.num_workers": 1, "optim.num_steps": 500, "loop.watchdog_minutes": 0.05})
    made = one.start(fault={"slow": 0.1}).until(one.reached(3))
    (worker,) = workers(made.process)
    begun = time.monotonic()
    os.kill(worker, signal.SIGSTOP)
    assert made.wait() == exits.INTERNAL, made.said()
    passed = time.monotonic() - begun
    assert passed < 10
    said = made.said()
    assert re.search(r"error: data of step \d+ has taken more than 3 s: it hangs", said)
    assert "most recent call first" in said
    assert " in _next" in said
    print(f"F11: worker stopped, watchdog 3 s: exit 70 after {passed:.1f} s, with stacks")
