import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gear_jax.towers.qwen_language import QwenLanguage, QwenLanguageConfig, vocabulary_logits

CFG = QwenLanguageConfig(
    depth=2,
    width=16,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=24,
    vocab_size=32,
    head_dim=8,
    rope_sections=(1, 1, 2),
)
TOKENS = jnp.asarray([[3, 4, 5, 6, 7, 8]])
POSITIONS = jnp.broadcast_to(jnp.arange(6), (3, 1, 6))
ONES = jnp.ones((1, 6), jnp.int32)


@pytest.fixture(scope="module")
def params():
    made = QwenLanguage(CFG).init(jax.random.key(0), TOKENS, POSITIONS, ONES)
    noise = iter(jax.random.split(jax.random.key(1), 50))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(noise), x.shape), made)


def test_gradients_flow_only_from_later_to_earlier_tokens(params):
    def last(inserts, row):
        index = jnp.arange(6)[None]
        hidden, _, _ = QwenLanguage(CFG).apply(params, TOKENS, POSITIONS, ONES, inserts, index)
        return jnp.sum(hidden[0, row] ** 2)

    gradient = jax.jit(jax.vmap(jax.grad(last), in_axes=(None, 0)))(
        jax.random.normal(jax.random.key(2), (1, 6, 16)), jnp.arange(6)
    )
    reached = np.any(np.asarray(gradient)[:, 0] != 0, axis=-1)
    assert np.array_equal(reached, np.tril(np.ones((6, 6), bool)))


def test_tokens_one_by_one_with_memory_equal_the_whole_sequence(params):
    apply = jax.jit(lambda *args, **kwargs: QwenLanguage(CFG).apply(params, *args, **kwargs))
    whole, (keys, values), _ = apply(TOKENS, POSITIONS, ONES)
    start, (k, v), _ = apply(TOKENS[:, :3], POSITIONS[:, :, :3], ONES[:, :3])
    room = ((0, 0), (0, 0), (0, 3), (0, 0), (0, 0))
    memory, segments = [jnp.pad(x, room) for x in (k, v)], jnp.asarray([[1, 1, 1, 0, 0, 0]])
    outputs = [start]
    for t in range(3, 6):
        hidden, new, _ = apply(
            TOKENS[:, t : t + 1],
            POSITIONS[:, :, t : t + 1],
            ONES[:, :1],
            memory=tuple(memory),
            memory_segments=segments,
        )
        memory = [x.at[:, :, t].set(y[:, :, 0]) for x, y in zip(memory, new, strict=True)]
        segments = segments.at[:, t].set(1)
        outputs.append(hidden)
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), whole, atol=1e-5)
    np.testing.assert_allclose(memory[0], keys, atol=1e-5)
    np.testing.assert_allclose(memory[1], values, atol=1e-5)


def test_packed_sequences_do_not_see_each_other(params):
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2]])
    positions = jnp.broadcast_to(jnp.asarray([0, 1, 2, 0, 1, 2]), (3, 1, 6))
    packed, _, _ = QwenLanguage(CFG).apply(params, TOKENS, positions, segments)
    alone, _, _ = QwenLanguage(CFG).apply(params, TOKENS[:, 3:], POSITIONS[:, :, :3], ONES[:, :3])
    np.testing.assert_allclose(packed[:, 3:], alone, atol=1e-5)


def test_inserts_replace_the_embedding_of_their_tokens_only(params):
    table = params["params"]["embed"]
    inserts = table[jnp.asarray([[20, 21]])]
    index = jnp.asarray([[-1, 1, -1, -1, 0, -1]])
    ours, _, _ = QwenLanguage(CFG).apply(params, TOKENS, POSITIONS, ONES, inserts, index)
    plain, _, _ = QwenLanguage(CFG).apply(
        params, jnp.asarray([[3, 21, 5, 6, 20, 8]]), POSITIONS, ONES
    )
    np.testing.assert_array_equal(ours, plain)


def test_a_tied_model_has_no_head_and_uses_its_embedding():
    tied = dataclasses.replace(CFG, tied_head=True)
    made = QwenLanguage(tied).init(jax.random.key(0), TOKENS, POSITIONS, ONES)["params"]
    assert "head" not in made
    hidden = jnp.eye(16)[None]
    np.testing.assert_array_equal(vocabulary_logits(made, hidden)[0], made["embed"].T)


def test_initial_values_are_as_wide_as_the_config_says():
    """`embed_std` of the embedding; `residual_scale` of what writes to the residual stream."""

    def made(**changes):
        cfg = dataclasses.replace(CFG, width=64, mlp_dim=128, vocab_size=512, **changes)
        return QwenLanguage(cfg).init(jax.random.key(0), TOKENS, POSITIONS, ONES)["params"]

    plain, wide = made(), made(embed_std=0.1, residual_scale=0.3)
    assert np.std(plain["embed"]) == pytest.approx(0.02, rel=0.05)
    np.testing.assert_allclose(wide["embed"], 5 * plain["embed"], rtol=1e-5)
    found = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(plain["layers"]):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        other = wide["layers"]
        for key in path:
            other = other[key.key]
        scale = 0.3 if name.endswith(("o/kernel", "down/kernel")) else 1.0
        np.testing.assert_allclose(other, scale * leaf, rtol=1e-5, err_msg=name)
        found |= {name} if scale != 1 else set()
    assert len(found) == 2
