"""Disks that fail, bits that flip, two in one place (F3, F8, F9, F13, F14, F15)."""

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gear_jax.train import checkpoint, exits, sharding
from gear_jax.train.run_checkpoints import NoCheckpointError, RunCheckpoints
from tests.faults.runs import LONG, sha256

BIG = {"width": 1024, "loop.checkpoint_every": 2}


def _odd(dtype):
    values = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    values[0, :5] = np.nan, np.inf, -np.inf, -0.0, 1e-40
    return jnp.asarray(values).astype(dtype)


def test_f3_what_eight_devices_saved_is_the_same_on_four_two_one_and_eight(tmp_path):
    state = {dtype: _odd(dtype) for dtype in ("float32", "bfloat16", "float8_e4m3fn", "int8")}
    state |= {"step": jnp.int32(7), "scalar": jnp.float32(np.nan), "rng": jax.random.key(3)}

    def where(devices):
        mesh = sharding.make_mesh({"data": -1, "fsdp": min(2, devices)}, jax.devices()[:devices])
        return jax.tree.map(
            lambda x: NamedSharding(mesh, P("fsdp", "data") if x.ndim == 2 else P()), state
        )

    wanted = sha256(state)
    checkpoints = RunCheckpoints(tmp_path)
    checkpoints.save(1, jax.device_put(state, where(8)), {})
    checkpoints.finish(1)
    for devices in (4, 2, 1, 8):
        targets = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            state, where(devices),
        )  # fmt: skip
        got = checkpoints.restore(targets).state
        assert got["float32"].sharding.num_devices == devices
        assert sha256(got) == wanted
    checkpoints.close()
    print("F3: float32, bfloat16, float8, int8, int32, NaN, key: saved on 8, equal on 4, 2, 1, 8")


@contextlib.contextmanager
def _mounted(target, *options):
    target.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(["mount", *options, target], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"cannot mount here: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", target], check=True)


def _failed(one, made, begun):
    """The run ended with exit 6 and one sentence, and what was there is whole."""
    assert made.wait() == exits.SAVE, made.said()
    sentence = made.said().splitlines()[-1]
    pattern = (
        r"error: .*/checkpoints/\d+: could not be saved: .*; \d+ bytes are needed and \d+ were"
    )
    assert re.match(pattern, sentence), sentence
    assert not one.leftovers()
    return time.monotonic() - begun, sentence


def test_f8_a_disk_that_is_too_full_is_found_out_before_and_while_writing(place):
    for blind in (False, True):
        one = place(**BIG)
        folder = one.workdir / "checkpoints"
        with _mounted(folder, "-t", "tmpfs", "-o", "size=60m", "none"):
            made = one.start(fault={"slow": 0.8, "blind": 1} if blind else {"slow": 0.8})
            made.until(lambda one=one: one.steps() == [2])
            begun = time.monotonic()
            with (folder / "filler").open("wb") as filler:  # at once: the next save is near
                free = shutil.disk_usage(folder).free
                os.posix_fallocate(filler.fileno(), 0, free - 4_000_000)
            passed, sentence = _failed(one, made, begun)
            assert 2 in one.steps()
            said = "No space left" if blind else "the disk is too full to begin"
            assert said in made.said(), sentence
            (folder / "filler").unlink()
            one.run()  # with space again, it goes on
            print(f"F8: disk full ({said}): exit 6 after {passed:.1f} s; earlier steps whole")


def test_f8_a_disk_that_became_read_only_ends_the_run(place):
    one = place(**BIG)
    folder = one.workdir / "checkpoints"
    folder.mkdir(parents=True)
    with _mounted(folder, "--bind", folder):
        made = one.start(fault={"slow": 0.2}).until(lambda: one.steps() == [2])
        begun = time.monotonic()
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        passed, sentence = _failed(one, made, begun)
        assert "Read-only file system" in sentence
        assert 2 in one.steps()
        print(f"F8: read-only: exit 6 after {passed:.1f} s; earlier steps whole")


@pytest.mark.parametrize("how", ["vanished", "too long", "forbidden"])
def test_f8_a_directory_that_cannot_be_written_ends_the_run(place, how):
    if how == "forbidden" and os.geteuid() == 0:
        pytest.skip("nothing is forbidden to root")
    one = place(**BIG)
    folder = one.workdir / "checkpoints"
    if how == "too long":  # no file may be longer than 2 MB: an error of the kernel as any other
        begun = time.monotonic()
        made = one.start(fault={"file_bytes": 2_000_000})
        passed, sentence = _failed(one, made, begun)
        assert "too large" in sentence, sentence
    else:
        made = one.start(fault={"slow": 0.2}).until(lambda: one.steps() == [2])
        begun = time.monotonic()
        if how == "vanished":
            folder.rename(one.workdir / "elsewhere")
        else:
            folder.chmod(0o500)
        passed, sentence = _failed(one, made, begun)
    print(f"F8: {how}: exit 6 after {passed:.1f} s: {sentence[-160:]}")


def test_f9_one_flipped_bit_in_any_file_is_named_and_an_older_step_is_used(place):
    one = place(**{"loop.checkpoint_every": 2, "optim.num_steps": 4})
    one.run()
    folder = one.workdir / "checkpoints"
    files = [path for path in sorted((folder / "4").rglob("*")) if path.is_file()]
    files = [path for path in files if path.name != "digests.json" and path.stat().st_size]
    assert len(files) > 5
    for path in files:
        whole = path.read_bytes()
        for place_in_file in range(0, len(whole), max(1, len(whole) // (20 if LONG else 2))):
            broken = bytearray(whole)
            broken[place_in_file] ^= 1
            path.write_bytes(broken)
            with pytest.raises(ValueError, match=re.escape(str(path.relative_to(folder / "4")))):
                checkpoint.verify_digests(folder / "4")
        path.write_bytes(whole)
    checkpoint.verify_digests(folder / "4")

    def flip(path):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    flip(max(files, key=lambda path: path.stat().st_size))
    digest = one.digest()
    assert digest[0] == 2
    flip(folder / "2" / "meta" / "metadata")
    said = one.run(exits.NO_CHECKPOINT)
    assert "step 4 is passed over" in said
    assert "steps [2, 4]: all damaged" in said.splitlines()[-1]
    print(
        f"F9: a bit of each of {len(files)} files: named; older step used; exit 3 when none is left"
    )


def test_f13_a_run_is_done_only_when_its_last_step_reads_back_as_written(place):
    one = place(**{"optim.num_steps": 4})
    said = one.run()
    assert one.steps()[-1] == 4
    assert '"ok": true, "step": 4' in said.splitlines()[-1]
    made = one.start()  # nothing is left to do, but to look
    assert made.wait() == 0
    assert one.steps()[-1] == 4
    print("F13: exit 0, step 4 saved and read back")


def test_f14_a_second_trainer_in_one_place_is_refused_and_a_dead_one_does_not_hold_it(place):
    one = place(**{"optim.num_steps": 200})
    first = one.start(fault={"slow": 0.2}).until(one.reached(1))
    begun = time.monotonic()
    said = one.run(exits.DATA)
    passed = time.monotonic() - begun
    wanted = f"another trainer works here (process {first.process.pid} on {os.uname().nodename})"
    assert wanted in said.splitlines()[-1]
    assert first.process.poll() is None
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    one.start().until(one.reached(1))
    print(f"F14: second trainer refused after {passed:.1f} s; after SIGKILL of the first it starts")


_BLOCKS, _SIZE = 8, (512, 512)


def _train_quickly(folder, stop):
    """Saves one step after the other, each full of its own number, and keeps one."""
    checkpoints = RunCheckpoints(folder, keep=1)
    step = 0
    while not stop.is_set():
        step += 1
        params = {str(block): jnp.full(_SIZE, step, jnp.float32) for block in range(_BLOCKS)}
        checkpoints.save(step, {"params": params, "more": jnp.zeros(4)}, {"step": step})
        checkpoints.wait()
    checkpoints.close()


def _read_often(folder, reads, answers):
    """In a process of its own: Orbax leaves warnings behind where a read of several fails."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    array = jax.ShapeDtypeStruct(_SIZE, jnp.float32, sharding=place)
    targets = {"params": {str(block): array for block in range(_BLOCKS)}}
    said, refused, steps = [], 0, []
    for _ in range(reads):
        reader = RunCheckpoints(folder, read_only=True)
        try:
            got = reader.restore_part(targets, say=said.append)
        except NoCheckpointError:
            refused += 1
            continue
        finally:
            reader.close()
        assert got.meta == {"step": got.step}
        for block in got.state["params"].values():
            assert (np.asarray(block) == got.step).all()
        steps.append(got.step)
    answers.put((said, refused, steps))


def test_f15_who_reads_while_the_trainer_deletes_gets_one_whole_step(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    stop, answers, reads = spawn.Event(), spawn.Queue(), 200 if LONG else 20
    trainer = spawn.Process(target=_train_quickly, args=(tmp_path, stop))
    reader = spawn.Process(target=_read_often, args=(tmp_path, reads, answers))
    trainer.start()
    try:
        while not (tmp_path / "1/digests.json").exists() and trainer.is_alive():
            time.sleep(0.01)
        reader.start()
        said, refused, steps = answers.get(timeout=300)
        reader.join(60)
        assert trainer.is_alive()
    finally:
        stop.set()
        trainer.join(60)
    assert (trainer.exitcode, reader.exitcode) == (0, 0)
    assert steps == sorted(steps)
    assert len(set(steps)) > 1
    collided = sum("were deleted while they were read" in line for line in said)
    print(f"F15: {reads} reads, {collided} deleted meanwhile, {refused} refused, none wrong")
    if LONG:
        assert collided


def test_f15_a_reader_that_is_always_too_slow_says_what_would_help(tmp_path, monkeypatch):
    checkpoints = RunCheckpoints(tmp_path, keep=1)
    checkpoints.save(1, {"params": jnp.zeros(4)}, {})
    checkpoints.wait()
    reader, read = RunCheckpoints(tmp_path, read_only=True), RunCheckpoints._read_part

    def slow(self, step, targets):
        found = read(self, step, targets)
        checkpoints.save(step + 1, {"params": jnp.zeros(4)}, {})
        checkpoints.wait()
        return found

    monkeypatch.setattr(RunCheckpoints, "_read_part", slow)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    targets = {"params": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=place)}
    with pytest.raises(NoCheckpointError, match=r"5 times .* deleted .* expected .*loop\.keep"):
        reader.restore_part(targets, say=lambda line: None)
    reader.close()
    checkpoints.close()
