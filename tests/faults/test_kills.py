"""Killed anywhere, a run goes on and ends with the bits of one that was not (F1, F2, F4, F12)."""

import os
import random
import shutil
import signal
import time

import pytest

from benchmarks import reach_ids
from configs import policy_gear
from tests.faults.runs import LONG, Gear, Latents, family, workers

KILLS = 30 if LONG else 3
BIG = {"width": 1024, "loop.checkpoint_every": 1, "optim.num_steps": 60 if LONG else 10}


def _kill(made):
    os.kill(made.process.pid, signal.SIGKILL)
    made.process.wait()


def test_f1_killed_while_saving_it_loses_the_save_in_flight_and_nothing_else(place):
    whole, broken = place("whole", **BIG), place("broken", **BIG)
    whole.run()
    chance, lost, starts = random.Random(1), [], []
    for _ in range(KILLS):
        begun = time.monotonic()
        known = max((row["step"] for row in broken.rows()), default=0)
        made = broken.start(fault={"slow": 0.05})
        made.until(broken.reached(min(known + 1, BIG["optim.num_steps"] - 1)))
        starts.append(time.monotonic() - begun)
        time.sleep(chance.uniform(0, 0.4))
        _kill(made)
        newest = max(broken.steps(), default=0)  # each is verified
        lost.append(max(row["step"] for row in broken.rows()) - newest)
        assert len(broken.leftovers()) <= 1
    broken.run()
    assert broken.digest() == whole.digest()
    assert broken.losses() == whole.losses()
    assert max(lost) <= 2  # the save in flight, and the step made meanwhile
    assert max(starts) < 60
    assert not broken.leftovers()
    print(f"F1: {KILLS} kills, state {whole.state().state.params['w'].nbytes * 4 / 1e6:.0f} MB, "
          f"steps lost {lost}, slowest first step {max(starts):.1f} s")  # fmt: skip


def test_f2_dead_at_any_removal_or_renaming_every_step_on_offer_is_whole(place):
    options = {"loop.keep": 1, "loop.checkpoint_every": 2, "optim.num_steps": 8}
    whole = place("whole", **options)
    whole.run()
    died = 0
    for n in range(1, 200, 3) if LONG else (5, 14):
        one = place(f"died{n}", **options)
        made = one.start(fault={"die": n})
        if made.wait() == 0:
            break  # it has fewer
        assert made.process.returncode == 9, made.said()
        died += 1
        one.steps()  # each is verified
        one.run()
        assert one.digest() == whole.digest()
        shutil.rmtree(one.workdir)
    assert died >= 2
    print(f"F2: died at {died} removals and renamings, every step on offer was whole")


def test_f4_killed_halfway_it_ends_as_an_unbroken_run_with_any_workers(place):
    options = {"optim.num_steps": 10, "loop.checkpoint_every": 5}
    whole = place("whole", **options, **{"data.num_workers": 2})
    whole.run()
    for before, after in ((0, 2), (2, 0)):
        broken = place(**options)
        made = broken.start(fault={"slow": 0.2}, **{"data.num_workers": before})
        made.until(lambda broken=broken: broken.steps() == [5])
        _kill(made)
        broken.run(**{"data.num_workers": after})
        assert broken.digest() == whole.digest()
        assert broken.losses() == whole.losses()
        print(f"F4: {before} then {after} workers: 10 losses and the state equal to the bit")


@pytest.mark.skipif(not LONG, reason="minutes; `make faults`")
@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2)])
def test_f4_latent_actions_killed_at_five_of_ten_end_as_an_unbroken_run(
    tmp_path, data, before, after
):
    latents = {
        "optim.num_steps": 10, "loop.checkpoint_every": 5, "monitor.every": 100,
        "data.batch_size": 64, "data.sets.shapes.work": tmp_path / "data",
    }  # fmt: skip
    whole, broken = (Latents(tmp_path / name, data, latents) for name in ("whole", "broken"))
    whole.run()
    made = broken.start(**{"data.num_workers": before}).until(broken.reached(6))
    _kill(made)
    assert broken.steps()[-1] == 5
    broken.run(**{"data.num_workers": after})
    assert broken.losses() == whole.losses()
    assert broken.digest() == whole.digest()
    print(f"F4: latents, {before} workers, killed at 5: 10 losses and the state equal to the bit")


@pytest.mark.skipif(not LONG, reason="minutes; `make faults`")
def test_f4_every_stage_killed_at_five_of_ten_ends_as_an_unbroken_run(tmp_path, data):
    """E13 by the real door: pretrain, policy and both phases of adapt, without and with workers."""
    fields = policy_gear.get_config("debug").data.sets.reach.to_dict() | {
        "work": str(tmp_path / "reach"), "latents": str(tmp_path / "ids"),
        "drawing": {"num_episodes": 12},
    }  # fmt: skip
    reach_ids.write(fields, fields["latents"])
    options = {
        "optim.num_steps": 10, "optim.warmup_steps": 1, "loop.checkpoint_every": 5,
        "monitor.every": 0, "data.fast.path": tmp_path / "fast", "ema_decay": 0.9,
        "data.sets.reach.work": fields["work"], "data.sets.reach.latents": fields["latents"],
        "data.sets.reach.drawing.num_episodes": 12,
    }  # fmt: skip
    before = None
    for name in ("pretrain_gear.py:debug", "policy_gear.py:debug", "adapt.py:debug,projector",
                 "adapt.py:debug,all"):  # fmt: skip
        start = {} if before is None else {"init.run": before.workdir}
        whole, *broken = (
            Gear(tmp_path / f"{name.replace('.py', '')}-{kind}", data, {**options, **start}, name)
            for kind in ("whole", 0, 2)
        )
        whole.run(devices=1)
        for workers_, one in zip((0, 2), broken, strict=True):
            made = one.start(devices=1, **{"data.num_workers": workers_})
            made.until(lambda one=one: one.steps() == [5])  # the save is in the background
            _kill(made)
            assert one.steps() == [5]
            one.run(devices=1, **{"data.num_workers": workers_})
            assert one.losses() == whole.losses()
            assert one.digest() == whole.digest()
            print(f"F4: {name}, {workers_} workers, killed at 5: losses and checkpoint equal")
        before = whole


def test_f12_a_killed_trainer_leaves_no_worker_behind(place):
    one = place()
    made = one.start(fault={"slow": 0.2}, **{"data.num_workers": 2})
    made.until(lambda: len(workers(made.process)) == 2)  # begun, not yet at work
    _kill(made)
    begun = time.monotonic()
    while family(made.process) and time.monotonic() - begun < 10:
        time.sleep(0.05)
    assert not family(made.process)
    print(f"F12: trainer killed, workers gone after {time.monotonic() - begun:.2f} s")
