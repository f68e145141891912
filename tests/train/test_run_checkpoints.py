import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gear_jax.train import checkpoint, run_checkpoints
from gear_jax.train.run_checkpoints import NoCheckpointError, RunCheckpoints, SaveError

STATE = {"params": {"w": jnp.arange(4.0)}, "moments": {"w": jnp.ones(4)}, "rng": jax.random.key(3)}


def _targets(state=STATE):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)


def _filled(directory, steps, **options):
    checkpoints = RunCheckpoints(directory, **options)
    for step in steps:
        state = {**STATE, "params": {"w": STATE["params"]["w"] + step}}
        checkpoints.save(step, state, {"data": {"samples": step}})
    checkpoints.close()


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _damage(directory, step):
    _flip(max((directory / str(step) / "state" / "d").rglob("*"), key=lambda p: p.stat().st_size))


def test_what_is_saved_comes_back_bitwise(tmp_path):
    _filled(tmp_path, [1, 2])
    checkpoints = RunCheckpoints(tmp_path)
    got = checkpoints.restore(_targets())
    assert (got.step, got.meta) == (2, {"data": {"samples": 2}})
    np.testing.assert_array_equal(got.state["params"]["w"], np.arange(4.0) + 2)
    assert jax.random.key_data(got.state["rng"]).tolist() == [0, 3]
    checkpoints.close()


def test_the_newest_stay_and_the_bin_is_emptied(tmp_path):
    _filled(tmp_path, range(1, 8), keep=2, keep_every=3)
    assert RunCheckpoints(tmp_path, read_only=True).steps() == [3, 6, 7]
    assert not list((tmp_path / ".trash").glob("*"))


def test_a_flipped_bit_is_named_and_an_older_step_is_used(tmp_path):
    _filled(tmp_path, [1, 2])
    _damage(tmp_path, 2)
    said = []
    checkpoints = RunCheckpoints(tmp_path)
    assert checkpoints.restore(_targets(), say=said.append).step == 1
    assert "step 2 is passed over" in said[0]
    assert "damaged: state/d/" in said[0]
    _damage(tmp_path, 1)
    with pytest.raises(NoCheckpointError, match=r"steps \[1, 2\]: all damaged"):
        checkpoints.restore(_targets(), say=said.append)
    assert checkpoints.steps() == [1, 2]  # nothing was deleted
    checkpoints.close()


def test_a_step_without_digests_is_not_listed_until_a_trainer_seals_it(tmp_path):
    _filled(tmp_path, [1, 2])
    (tmp_path / "2" / "digests.json").unlink()
    assert RunCheckpoints(tmp_path, read_only=True).steps() == [1]
    assert RunCheckpoints(tmp_path).steps() == [1, 2]


def test_what_a_killed_save_left_is_cleared(tmp_path):
    _filled(tmp_path, [1])
    left = tmp_path / "2.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "half").write_text("x")
    reader = RunCheckpoints(tmp_path, read_only=True)
    assert reader.steps() == [1]
    assert left.exists()
    RunCheckpoints(tmp_path).close()
    assert not left.exists()


def test_parameters_alone_are_read_without_the_rest(tmp_path):
    _filled(tmp_path, [5])
    reader = RunCheckpoints(tmp_path, read_only=True)
    got = reader.restore_part({"params": _targets()["params"]})
    assert list(got.state) == ["params"]
    np.testing.assert_array_equal(got.state["params"]["w"], np.arange(4.0) + 5)
    assert got.meta["data"] == {"samples": 5}
    with pytest.raises(NoCheckpointError, match="no checkpoint"):
        RunCheckpoints(tmp_path / "other").restore_part(_targets())


def test_a_reader_waits_until_the_only_step_is_sealed(tmp_path, monkeypatch):
    _filled(tmp_path, [1])
    (tmp_path / "1/digests.json").unlink()
    reader, said = RunCheckpoints(tmp_path, read_only=True), []
    targets = {"params": _targets()["params"]}
    monkeypatch.setattr(run_checkpoints, "_SEAL_SECONDS", 0.0)
    with pytest.raises(NoCheckpointError, match="5 times a step was not whole yet"):
        reader.restore_part(targets, say=said.append)
    assert said == [f"{tmp_path}: the only step has no digests yet"] * 5
    monkeypatch.setattr(
        run_checkpoints.time, "sleep", lambda s: checkpoint.write_digests(tmp_path / "1", "crc32c")
    )
    assert reader.restore_part(targets, say=said.append).step == 1
    reader.close()


def test_another_shape_is_refused(tmp_path):
    _filled(tmp_path, [1])
    checkpoints = RunCheckpoints(tmp_path)
    with pytest.raises(ValueError, match="not the parameters this config makes"):
        checkpoints.restore(_targets({**STATE, "params": {"v": jnp.ones(4)}}))
    checkpoints.close()


def test_arrays_of_eight_devices_come_back_on_any_number(tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    values = jnp.arange(64.0).reshape(8, 8).astype(jnp.bfloat16)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    checkpoints = RunCheckpoints(tmp_path)
    checkpoints.save(1, {"w": jax.device_put(values, split)}, {})
    checkpoints.wait()
    for count in (1, 2, 4, 8):
        mesh = jax.make_mesh(
            (count,), ("x",), devices=jax.devices()[:count],
            axis_types=(jax.sharding.AxisType.Auto,),
        )  # fmt: skip
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
        target = {"w": jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=where)}
        got = checkpoints.restore(target).state["w"]
        assert got.sharding.is_equivalent_to(where, 2)
        assert np.asarray(got).tobytes() == np.asarray(values).tobytes()
    checkpoints.close()


def test_a_step_that_changed_after_it_was_saved_is_not_called_finished(tmp_path):
    checkpoints = RunCheckpoints(tmp_path)
    checkpoints.save(1, STATE, {})
    checkpoints.finish(1)
    checkpoints.save(2, STATE, {})
    checkpoints.wait()
    _damage(tmp_path, 2)
    with pytest.raises(SaveError, match="2: was saved, and then: .* damaged: state/"):
        checkpoints.finish(2)
    checkpoints.close()


def test_a_disk_without_room_is_found_out_before_anything_is_written(tmp_path, monkeypatch):
    checkpoints = RunCheckpoints(tmp_path)
    checkpoints.save(1, STATE, {})
    checkpoints.wait()
    needed = int(1.2 * (16 + 16 + 8))
    monkeypatch.setattr(RunCheckpoints, "_free", lambda self: needed - 1)
    with pytest.raises(SaveError, match=f"too full to begin; {needed} bytes are needed and 47"):
        checkpoints.save(2, STATE, {})
    assert checkpoints.steps() == [1]
    monkeypatch.undo()
    checkpoints.save(2, STATE, {})
    checkpoints.finish(2)
    checkpoints.close()


def test_what_other_writers_add_after_a_save_has_failed_is_removed_too(tmp_path, monkeypatch):
    checkpoints = RunCheckpoints(tmp_path)
    folder = tmp_path / "2.orbax-checkpoint-tmp" / "state" / "d"

    def go_on_writing():  # as TensorStore's threads do: a directory that is gone is made anew
        for number in range(60):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / str(number)).write_bytes(bytes(1000))
            except OSError:
                continue  # it was removed meanwhile
            time.sleep(0.005)

    writer = threading.Thread(target=go_on_writing)

    def fail(*args, **kwargs):
        writer.start()
        while not folder.exists():
            time.sleep(0.001)
        raise OSError("File too large")

    monkeypatch.setattr(checkpoints._manager, "save", fail)
    with pytest.raises(SaveError, match="2: could not be saved: File too large; "):
        checkpoints.save(2, STATE, {})
    writer.join()
    assert not list(tmp_path.glob("*tmp*"))
    monkeypatch.undo()
    checkpoints.close()


def test_meta_is_plain_json(tmp_path):
    _filled(tmp_path, [1])
    assert json.loads((tmp_path / "1" / "meta" / "metadata").read_text())["data"] == {"samples": 1}
