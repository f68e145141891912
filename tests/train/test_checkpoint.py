import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gear_jax.train import checkpoint, sharding

PARAMS = {
    "a": {"kernel": np.arange(32, dtype=np.float32).reshape(8, 4)},
    "b": np.array([1.5, np.nan, -0.0, np.inf], jnp.bfloat16),
}


def _save(folder, params=PARAMS):
    with checkpoint.new_directory(folder) as target:
        checkpoint.save_params(target, jax.tree.map(jnp.asarray, params))
        checkpoint.write_digests(target)


def _targets(mesh):
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spec), PARAMS)


@pytest.mark.parametrize("fsdp", [1, 2, 4])
def test_parameters_come_back_bit_for_bit_on_any_mesh(tmp_path, fsdp):
    _save(tmp_path / "c")
    mesh = sharding.make_mesh({"fsdp": fsdp}, jax.devices()[:fsdp])
    back = checkpoint.restore_params(tmp_path / "c", _targets(mesh))
    assert len(back["b"].addressable_shards) == fsdp
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a).view(np.uint8), b.view(np.uint8)),
        back,
        PARAMS,
    )
    assert checkpoint.stored_dtypes(tmp_path / "c") == {"a/kernel": np.float32, "b": jnp.bfloat16}


def test_every_damaged_missing_or_added_file_is_named(tmp_path):
    _save(tmp_path / "c")
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    paths = [p for p in (tmp_path / "c").rglob("*") if p.is_file() and p.name != "digests.json"]
    assert len(paths) > 3
    for path in paths:
        data = path.read_bytes()
        name = path.relative_to(tmp_path / "c").as_posix()
        for damaged in (bytes([data[0] ^ 1]) + data[1:], data[:-1], None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"damaged: {name}"):
                checkpoint.restore_params(tmp_path / "c", _targets(mesh))
            path.write_bytes(data)
    checkpoint.verify_digests(tmp_path / "c")
    (tmp_path / "c" / "extra").touch()
    with pytest.raises(ValueError, match="damaged: extra"):
        checkpoint.verify_digests(tmp_path / "c")
    (tmp_path / "c" / "digests.json").unlink()
    with pytest.raises(ValueError, match="no readable digests.json"):
        checkpoint.verify_digests(tmp_path / "c")


def test_a_record_of_digests_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "array").write_bytes(b"1234")

    def full(descriptor):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.write_digests(tmp_path)
    assert not checkpoint.has_digests(tmp_path)
    checkpoint.write_digests(tmp_path)  # what the first one left is no file of the checkpoint
    checkpoint.verify_digests(tmp_path)
    assert list(json.loads((tmp_path / "digests.json").read_text())) == ["array"]


def test_a_block_that_fails_leaves_nothing(tmp_path):
    def fail():
        with checkpoint.new_directory(tmp_path / "c") as target:
            (target / "file").touch()
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_cleared_and_what_exists_is_kept(tmp_path):
    (tmp_path / ".c.partial").mkdir()
    (tmp_path / ".c.partial" / "rest").touch()
    _save(tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    with pytest.raises(FileExistsError, match="c: already exists"):
        _save(tmp_path / "c")
