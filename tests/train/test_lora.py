import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gear_jax.train import lora
from gear_jax.train.lora import LoraConfig

CFG = LoraConfig(rank=2, alpha=4.0, targets=(r"language/layers/(q|o)/kernel",))


@pytest.fixture
def params():
    keys = jax.random.split(jax.random.key(0), 3)
    layers = {
        "q": {"kernel": jax.random.normal(keys[0], (3, 8, 2, 4))},  # width -> heads
        "o": {"kernel": jax.random.normal(keys[1], (3, 2, 4, 8))},  # heads -> width
        "up": {"kernel": jax.random.normal(keys[2], (3, 8, 6))},
    }
    return {"language": {"layers": layers}}


def test_at_the_start_the_factors_change_nothing(params):
    factors = lora.init(params, CFG, jax.random.key(1))
    assert set(factors) == {"language.layers.q.kernel", "language.layers.o.kernel"}
    merged = lora.merge(params | {"lora": factors}, CFG)
    jax.tree.map(np.testing.assert_array_equal, merged, params)


def test_a_merged_kernel_is_the_kernel_and_the_scaled_product_over_its_inputs(params):
    factors = lora.init(params, CFG, jax.random.key(1))
    factors = jax.tree.map(lambda x: x + 0.1, factors)
    merged = lora.merge(params | {"lora": factors}, CFG)["language"]["layers"]
    x = jax.random.normal(jax.random.key(2), (5, 2, 4))
    one = factors["language.layers.o.kernel"]
    for layer in range(3):
        kernel = params["language"]["layers"]["o"]["kernel"][layer]
        plain = jnp.einsum("bnh,nhd->bd", x, kernel)
        low = 2.0 * x.reshape(5, 8) @ one["a"][layer] @ one["b"][layer]
        made = jnp.einsum("bnh,nhd->bd", x, merged["o"]["kernel"][layer])
        np.testing.assert_allclose(made, plain + low, atol=1e-5)
    untouched = params["language"]["layers"]["up"]["kernel"]
    np.testing.assert_array_equal(merged["up"]["kernel"], untouched)


def test_a_target_that_is_no_kernel_is_named(params):
    with pytest.raises(ValueError, match="'language/head' matches no parameter"):
        lora.init(params, LoraConfig(targets=("language/head",)), jax.random.key(0))
