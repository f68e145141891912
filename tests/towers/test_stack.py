import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gear_jax.towers.stack import REMAT, run_layers


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x, layer, shared):
        x = nn.Dense(x.shape[-1], name="dense")(x) * layer + shared
        return x, jnp.concatenate([x, -x], -1), x.sum()


class _Tower(nn.Module):
    remat: str = "none"
    taps: tuple = ()

    @nn.compact
    def __call__(self, x, per_layer):
        block = _Block(name="layers")
        return run_layers(
            block, x, per_layer, 0.5, length=4, remat=self.remat, taps=self.taps, tap_width=6
        )


@pytest.fixture(scope="module")
def made():
    x, per_layer = jnp.ones((2, 3)), jnp.arange(1.0, 5.0)
    return x, per_layer, _Tower().init(jax.random.key(0), x, per_layer)


def _by_hand(made):
    x, per_layer, variables = made
    dense, outputs = variables["params"]["layers"]["dense"], []
    for i in range(4):
        x = (x @ dense["kernel"][i] + dense["bias"][i][None]) * per_layer[i] + 0.5
        outputs.append(x)
    return outputs


def test_layers_have_their_own_parameters_and_their_own_input(made):
    x, per_layer, variables = made
    assert variables["params"]["layers"]["dense"]["kernel"].shape == (4, 3, 3)
    out, taps, extra = _Tower().apply(variables, x, per_layer)
    expected = _by_hand(made)
    np.testing.assert_allclose(out, expected[-1], rtol=1e-5)
    np.testing.assert_allclose(extra, [x.sum() for x in expected], rtol=1e-5)
    assert taps.shape[0] == 0


def test_taps_come_in_the_order_asked_for(made):
    x, per_layer, variables = made
    _, taps, _ = _Tower(taps=(3, 1)).apply(variables, x, per_layer)
    expected = _by_hand(made)
    np.testing.assert_allclose(taps[..., :3], [expected[3], expected[1]], rtol=1e-5)
    np.testing.assert_allclose(taps[..., 3:], -taps[..., :3])


@pytest.mark.parametrize("remat", REMAT)
def test_remat_changes_no_gradient(made, remat):
    x, per_layer, variables = made

    def loss(variables, tower):
        out, taps, _ = tower.apply(variables, x, per_layer)
        return jnp.sum(jnp.sin(out)) + jnp.sum(taps**2)

    plain = jax.grad(loss)(variables, _Tower(taps=(1,)))
    ours = jax.grad(loss)(variables, _Tower(remat=remat, taps=(1,)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, plain)


def test_what_is_no_layer_or_policy_is_refused(made):
    x, per_layer, variables = made
    with pytest.raises(ValueError, match=r"taps \[4\] are no layers: expected 0 .. 3"):
        _Tower(taps=(4,)).apply(variables, x, per_layer)
    with pytest.raises(ValueError, match="remat policy 'some' is unknown"):
        _Tower(remat="some").apply(variables, x, per_layer)
