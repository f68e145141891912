import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gear_jax.porting import table
from gear_jax.porting.files import CheckpointError, open_directory, write_file
from gear_jax.porting.table import Row, Table
from gear_jax.train import sharding

TABLE = Table(
    rows=(
        Row("blocks.{i}.qkv", "layers/qkv", "(three n h) d -> d three n h"),
        Row("embed", "embed", "v d -> v d"),
        Row("scale", "unused/scale", "1 d -> d"),
    ),
    sizes={"three": 3, "h": 2},
    renames=((r"^model\.", ""),),
    ignored=(r"head\..*",),
    carried={"unused/scale": (4,)},
)
TARGETS = {
    "layers/qkv": jax.ShapeDtypeStruct((2, 4, 3, 5, 2), jnp.float32),
    "embed": jax.ShapeDtypeStruct((7, 4), jnp.float32),
}
ALL = TARGETS | {"unused/scale": jax.ShapeDtypeStruct((4,), jnp.float32)}


def _foreign(rng):
    return {
        "model.blocks.0.qkv": rng.standard_normal((30, 4)).astype(np.float32),
        "blocks.1.qkv": rng.standard_normal((30, 4)).astype(np.float32),
        "embed": rng.standard_normal((7, 4)).astype(np.float32),
        "scale": rng.standard_normal((1, 4)).astype(np.float32),
        "head.weight": np.ones((2, 2), np.float32),
    }


def _open(folder, arrays):
    names = {"float32": "F32", "float16": "F16"}
    write_file(
        folder / "model.safetensors",
        [(k, names[x.dtype.name], x.shape, lambda x=x: x) for k, x in arrays.items()],
    )
    return open_directory(folder)


def test_tensors_land_in_their_layer_and_axes_and_come_back_bit_for_bit(tmp_path):
    arrays = _foreign(np.random.default_rng(0))
    pairs = table.match(TABLE, TARGETS, _open(tmp_path, arrays))
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    loaded = table.load(pairs, ALL, TABLE.sizes, dict.fromkeys(ALL, one))
    # row (three, n, h) = (1, 3, 0) of layer 1 is row 1 * 10 + 3 * 2 + 0
    np.testing.assert_array_equal(loaded["layers/qkv"][1, :, 1, 3, 0], arrays["blocks.1.qkv"][16])
    for entry, tensor in pairs:
        back = table.to_foreign(entry, loaded[entry.ours], TABLE.sizes)
        assert back.tobytes() == arrays[tensor.key].tobytes()


@pytest.mark.parametrize("part", [16, 200, 1 << 20])
@pytest.mark.parametrize(
    "spec", [P(), P("fsdp", None, None, "tensor"), P(None, ("fsdp", "tensor"))]
)
def test_parts_and_shards_of_any_size_make_the_same_array(tmp_path, monkeypatch, part, spec):
    monkeypatch.setattr(table, "_PART", part)
    rows, layers = Row("w.{i}", "w", "(n h) d -> d n h"), 4
    toy = Table(rows=(rows,), sizes={"h": 4})
    arrays = {
        f"w.{i}": np.random.default_rng(i).standard_normal((24, 8)).astype(np.float32)
        for i in range(layers)
    }
    targets = {"w": jax.ShapeDtypeStruct((layers, 8, 6, 4), jnp.float32)}
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    pairs = table.match(toy, targets, _open(tmp_path, arrays))
    loaded = table.load(
        pairs, targets, toy.sizes, {"w": NamedSharding(mesh, spec)}, dtype=jnp.float32
    )
    expected = np.stack(
        [arrays[f"w.{i}"].reshape(6, 4, 8).transpose(2, 0, 1) for i in range(layers)]
    )
    np.testing.assert_array_equal(loaded["w"], expected)
    assert loaded["w"].sharding.spec == spec


def test_missing_extra_misshaped_and_odd_tensors_are_all_named_at_once(tmp_path):
    arrays = _foreign(np.random.default_rng(0))
    del arrays["scale"]
    arrays["embed"] = arrays["embed"].T.copy()
    arrays["../../etc/passwd"] = np.ones(1, np.float32)
    with pytest.raises(CheckpointError) as error:
        table.match(TABLE, TARGETS, _open(tmp_path, arrays))
    message = str(error.value)
    assert "'scale' is missing, expected with shape [1, 4]" in message
    assert "model.safetensors: 'embed' has shape [4, 7], expected [7, 4]" in message
    assert "model.safetensors: '../../etc/passwd' is not part of this model" in message


def test_one_parameter_under_two_spellings_is_refused(tmp_path):
    arrays = _foreign(np.random.default_rng(0))
    arrays["blocks.0.qkv"] = arrays["model.blocks.0.qkv"]
    with pytest.raises(CheckpointError, match="are the same parameter"):
        table.match(TABLE, TARGETS, _open(tmp_path, arrays))


def test_a_lone_dtype_is_refused_unless_all_are_cast(tmp_path):
    arrays = _foreign(np.random.default_rng(0))
    arrays["embed"] = arrays["embed"].astype(np.float16)
    tensors = _open(tmp_path, arrays)
    with pytest.raises(CheckpointError, match="'embed' is F16, but 3 others are F32"):
        table.match(TABLE, TARGETS, tensors)
    assert len(table.match(TABLE, TARGETS, tensors, cast=True)) == 4


def test_only_twenty_faults_are_spelled_out(tmp_path):
    arrays = {f"x{i}": np.ones(1, np.float32) for i in range(40)}
    with pytest.raises(CheckpointError, match="; and 24 more$"):
        table.match(TABLE, TARGETS, _open(tmp_path, arrays))


def test_a_table_that_does_not_cover_the_parameters_is_a_fault_of_ours():
    with pytest.raises(
        ValueError, match=r"the table's rows and the parameters differ in \['extra'\]"
    ):
        table.entries(TABLE, TARGETS | {"extra": TARGETS["embed"]})


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.data())
def test_a_row_and_its_inverse_are_the_identity(n, h, d, data):
    pattern = data.draw(
        st.sampled_from(
            ["(n h) d -> d n h", "d (n h) -> n h d", "d n h -> (n h) d", "n h d -> h (d n)"]
        )
    )
    row = Row("w", "w", pattern)
    left, _ = table._sides(pattern)
    sizes = {"n": n, "h": h, "d": d}
    shape = tuple(int(np.prod([sizes[a] for a in group])) for group in left)
    foreign = np.arange(n * h * d).reshape(shape)
    entry = table.Entry("w", "w", None, shape, row)
    ours = rearrange(foreign, pattern, **{a: sizes[a] for g in left for a in g})
    assert np.array_equal(table.to_foreign(entry, ours, sizes), foreign)
