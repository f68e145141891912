import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gear_jax.towers import attention


def _qkv(rng, t, s, heads=4, kv_heads=2, dim=8, batch=2):
    shapes = ((batch, t, heads, dim), (batch, s, kv_heads, dim), (batch, s, kv_heads, dim))
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def _plain(q, k, v, allowed):
    """Attention by loops: allowed bool[B, T, S]."""
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(*q.shape[:3]):
        keys = np.flatnonzero(allowed[b, t])
        scores = np.asarray(q)[b, t, n] @ np.asarray(k)[b, keys, n // group].T / q.shape[-1] ** 0.5
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ np.asarray(v)[b, keys, n // group]
    return out


@pytest.mark.parametrize("backend", ["xla", "splash_interpret"])
def test_queries_see_equal_segments_and_nothing_later(backend):
    # two memory keys, then three own tokens; segment 0 is padding
    q_segments = np.array([[1, 1, 1], [0, 1, 2]])
    kv_segments = np.array([[1, 0, 1, 1, 1], [1, 2, 0, 1, 2]])
    allowed = np.array(
        [
            [[1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 1, 1]],
            [[0, 0, 1, 0, 0], [1, 0, 0, 1, 0], [0, 1, 0, 0, 1]],
        ],
        bool,
    )
    q, k, v = _qkv(np.random.default_rng(0), 3, 5)
    out = jax.jit(attention.attend, static_argnames=("backend", "causal"))(
        q,
        k,
        v,
        backend=backend,
        causal=True,
        q_segments=jnp.asarray(q_segments),
        kv_segments=jnp.asarray(kv_segments),
    )
    np.testing.assert_allclose(out, _plain(q, k, v, allowed), atol=1e-5)


@pytest.mark.parametrize("backend", ["xla", "splash_interpret"])
@pytest.mark.parametrize("causal", [False, True])
def test_without_segments_everything_up_to_the_query_is_seen(backend, causal):
    q, k, v = _qkv(np.random.default_rng(1), 4, 4)
    allowed = np.tril(np.ones((4, 4), bool)) if causal else np.ones((4, 4), bool)
    out = attention.attend(q, k, v, backend=backend, causal=causal)
    np.testing.assert_allclose(out, _plain(q, k, v, np.stack([allowed] * 2)), atol=1e-5)


def test_splash_gives_the_gradients_of_xla():
    q, k, v = _qkv(np.random.default_rng(2), 130, 130, batch=1)
    segments = jnp.asarray(np.r_[np.ones(100), np.full(30, 2)][None], jnp.int32)

    def total(q, k, v, backend):
        y = attention.attend(
            q, k, v, backend=backend, causal=True, q_segments=segments, kv_segments=segments
        )
        return jnp.sum(jnp.sin(y))

    ours, plain = (
        jax.grad(total, argnums=(0, 1, 2))(q, k, v, backend)
        for backend in ("splash_interpret", "xla")
    )
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_splash_on_a_mesh_equals_one_device():
    q, k, v = _qkv(np.random.default_rng(3), 6, 6, batch=4)
    segments = jnp.ones((4, 6), jnp.int32)
    run = jax.jit(
        lambda q, k, v, s: attention.attend(
            q, k, v, backend="splash_interpret", causal=True, q_segments=s, kv_segments=s
        )
    )
    alone = run(q, k, v, segments)
    mesh = jax.make_mesh(
        (2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3
    )
    with jax.set_mesh(mesh):
        together = run(q, k, v, segments)
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_cudnn_is_the_call_that_a_gpu_gets():
    q, k, v = (x.astype(jnp.bfloat16) for x in _qkv(np.random.default_rng(4), 8, 8, dim=64))
    with pytest.raises(RuntimeError, match="cuDNN"):  # there is no GPU here to give it to
        attention.attend(q, k, v, backend="cudnn")


def test_an_unknown_backend_is_named():
    q, k, v = _qkv(np.random.default_rng(5), 2, 2)
    with pytest.raises(ValueError, match="'flash' is unknown: expected one of"):
        attention.attend(q, k, v, backend="flash")


def test_rotation_keeps_scores_a_function_of_distance():
    rng = np.random.default_rng(6)
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(i, j):
        turn = [attention.rotary(jnp.asarray([[[p]]]), 8, 1e4) for p in (i, j)]
        return jnp.sum(attention.rotate(q, turn[0]) * attention.rotate(k, turn[1]))

    np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_multimodal_sections_turn_with_their_own_axis():
    positions = jnp.asarray([[[1, 2]], [[10, 20]], [[100, 200]]])
    angles = attention.multimodal_rotary(positions, 8, 1e4, (1, 2, 1))
    frequencies = 1e4 ** -(np.arange(4) / 4)
    expected = np.array([[1, 10, 10, 100], [2, 20, 20, 200]]) * frequencies
    np.testing.assert_allclose(angles[0, :, 0], expected, rtol=1e-6)


def test_hidden_groups_get_no_attention_and_other_queries_see_them_as_before():
    # keys: two of group 1, one of group 2, one of none; queries: hide none, 1, 2, both
    groups = jnp.array([[1, 1, 2, 0]] * 2)
    hidden = jnp.array([[0, 1, 2, 3]] * 2)
    q, k, v = _qkv(np.random.default_rng(1), 4, 4)
    seen = [[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 1], [0, 0, 0, 1]]
    run = jax.jit(attention.attend)
    out = run(q, k, v, hidden=hidden, kv_groups=groups)
    np.testing.assert_allclose(out, _plain(q, k, v, np.array([seen] * 2, bool)), atol=1e-5)
    np.testing.assert_array_equal(
        run(q, k, v.at[:, :2].add(7.0), hidden=hidden, kv_groups=groups)[:, [1, 3]], out[:, [1, 3]]
    )
    with pytest.raises(ValueError, match="'splash' cannot hide groups"):
        attention.attend(q, k, v, backend="splash", hidden=hidden, kv_groups=groups)
