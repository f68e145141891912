import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gear_jax.train import sharding


def _shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


def test_trailing_dimensions_get_the_axes_and_layers_are_never_split(mesh):
    shapes = {"language": {"embed": _shape(8, 4), "layers": {"q": {"kernel": _shape(3, 4, 2, 5)}}}}
    made = sharding.param_shardings(shapes, mesh)["language"]
    assert made["embed"].spec == P("tensor", "fsdp")
    assert made["layers"]["q"]["kernel"].spec == P(None, "fsdp", "tensor", None)


def test_a_parameter_without_a_rule_is_named(mesh):
    with pytest.raises(
        ValueError, match=r"language/gadget of shape \(3,\) matches no sharding rule"
    ):
        sharding.param_shardings({"language": {"gadget": _shape(3), "embed": _shape(2, 2)}}, mesh)


def test_a_size_that_its_axis_does_not_divide_names_the_next_legal_one():
    mesh = sharding.make_mesh({"tensor": 8})
    shapes = {"language": {"layers": {"k": {"bias": _shape(2, 4, 16)}}}}
    with pytest.raises(ValueError, match="tensor=8 does not divide 4; the next smaller .* is 4"):
        sharding.param_shardings(shapes, mesh)


def test_the_first_rule_that_matches_wins(mesh):
    rules = ((r"a/.*", ("fsdp",)), (r".*", ("tensor",)))
    made = sharding.param_shardings({"a": {"b": _shape(4)}, "c": _shape(4)}, mesh, rules)
    assert (made["a"]["b"].spec, made["c"].spec) == (P("fsdp"), P("tensor"))


def test_one_axis_of_a_mesh_may_be_what_is_left():
    assert dict(sharding.make_mesh({"data": -1, "tensor": 2}).shape) == {
        "replica": 1, "data": 4, "fsdp": 1, "tensor": 2
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "said", "nearest"),
    [
        ({"fsdp": 4}, "4 places for 8", (1, 2, 4, 1)),
        ({"data": 4}, "4 places for 8", (1, 8, 1, 1)),
        ({"fsdp": 3, "tensor": 2}, "6 places for 8", (1, 2, 2, 2)),
        ({"data": -1, "tensor": 3}, "3 places times what is left for 8", (1, 4, 1, 2)),
        ({"data": -1, "fsdp": -1}, "1 places times what is left for 8", (1, 1, 8, 1)),
        ({"data": -1, "fsdp": 16}, "16 places times what is left for 8", (1, 1, 8, 1)),
        ({"data": 8, "fsdp": 0}, "0 places for 8", (1, 8, 1, 1)),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_the_nearest_that_does(sizes, said, nearest):
    with pytest.raises(ValueError, match=said) as error:
        sharding.make_mesh(sizes)
    legal = dict(zip(sharding.AXES, nearest, strict=True))
    assert str(error.value).endswith(f"the nearest that fits is {legal}")
    assert dict(sharding.make_mesh(legal).shape) == legal


def test_a_mesh_has_known_axes_alone():
    with pytest.raises(ValueError, match=r"mesh axes \['model'\] are unknown"):
        sharding.make_mesh({"model": 8})


def test_the_batch_is_split_over_every_axis_but_tensor(mesh):
    x = jax.device_put(np.zeros((8, 3)), sharding.batch_sharding(mesh))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 3)}
