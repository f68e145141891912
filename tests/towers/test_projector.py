import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gear_jax.towers.projector import Projector, ProjectorConfig

VISION = jax.random.normal(jax.random.key(0), (2, 8, 6))
GEOMETRY = jax.random.normal(jax.random.key(1), (2, 8, 10))


def _cfg(**changes):
    return ProjectorConfig(vision_width=6, geometry_width=10, width=12, **changes)


@pytest.mark.parametrize("expand", ["first", "last"])
def test_the_3d_block_changes_nothing_at_the_start_but_gets_a_gradient(expand):
    projector = Projector(_cfg(expand=expand))
    params = projector.init(jax.random.key(2), VISION, GEOMETRY)
    assert np.all(params["params"]["geometry_kernel"] == 0)
    without = projector.apply(params, VISION)
    np.testing.assert_array_equal(projector.apply(params, VISION, GEOMETRY), without)
    gradient = jax.grad(lambda p: jnp.sum(jnp.sin(projector.apply(p, VISION, GEOMETRY))))(params)
    assert np.all(np.asarray(gradient["params"]["geometry_kernel"]).any(axis=0))


def test_expanding_the_first_map_is_one_linear_map_over_both_features():
    projector = Projector(_cfg())
    params = projector.init(jax.random.key(2), VISION, GEOMETRY)["params"]
    kernel = jax.random.normal(jax.random.key(3), params["geometry_kernel"].shape)
    out = projector.apply({"params": params | {"geometry_kernel": kernel}}, VISION, GEOMETRY)

    two = VISION / jnp.sqrt(jnp.mean(VISION**2, -1, keepdims=True) + 1e-6)
    three = GEOMETRY - GEOMETRY.mean(-1, keepdims=True)
    three = three / jnp.sqrt(three.var(-1, keepdims=True) + 1e-6)
    joined = jnp.concatenate([two.reshape(2, 2, 24), three.reshape(2, 2, 40)], axis=-1)
    stacked = jnp.concatenate([params["fc1"]["kernel"], kernel])
    hidden = jax.nn.gelu(joined @ stacked, approximate=False)
    np.testing.assert_allclose(out, hidden @ params["fc2"]["kernel"], atol=2e-5)


def test_an_unknown_place_to_expand_is_refused():
    with pytest.raises(
        ValueError, match="projector.expand is 'middle': expected 'first' or 'last'"
    ):
        Projector(_cfg(expand="middle")).init(jax.random.key(0), VISION)
