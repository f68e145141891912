import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gear_jax.tokenizers.fast import FastTokenizer, make_grammar, quantize


def _chunks(num, seed=0, horizon=30, dims=20):
    """Smooth paths within -1 .. 1, some dims at rest, some grippers."""
    rng = np.random.default_rng(seed)
    times = np.linspace(0, 1, horizon)[None, :, None]
    speed, bend, phase = rng.uniform(-1, 1, (3, num, 1, dims))
    chunks = 0.6 * speed * times + 0.4 * bend * np.sin(4 * times + 3 * phase)
    chunks[:, :, -1] = np.where(times[..., 0] > rng.random((num, 1)), 1.0, -1.0)
    chunks[:, :, dims // 2 :] *= rng.random((num, 1, 1)) > 0.5
    return chunks.clip(-1, 1)


@pytest.fixture(scope="module")
def fitted():
    return FastTokenizer.fit(_chunks(400), vocab_size=512)


@pytest.fixture(scope="module")
def released(golden):
    return FastTokenizer.load(golden / "fast"), np.load(golden / "fast" / "cases.npz")


def _split(cases, name):
    return np.split(cases[f"{name}_tokens"], np.cumsum(cases[f"{name}_lengths"])[:-1])


@pytest.mark.parametrize("name", ["test", "special"])
def test_ids_and_chunks_equal_the_reference(released, name):
    tokenizer, cases = released
    actions, wanted = cases[f"{name}_actions"], _split(cases, name)
    np.testing.assert_array_equal(quantize(actions, tokenizer.scale), cases[f"{name}_dct_q"])
    for ours, theirs in zip(tokenizer.encode(actions, strict_reference=True), wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    decoded, whole = tokenizer.decode(wanted, strict_reference=True)
    np.testing.assert_allclose(decoded, cases[f"{name}_decoded"], atol=1e-9)
    assert whole.all()


def test_cases_that_the_reference_cannot_decode(released):
    tokenizer, cases = released
    above = cases["above_range_actions"]
    strict = tokenizer.encode(above, strict_reference=True)[0]
    np.testing.assert_array_equal(strict, cases["above_range_tokens"])
    for tokens in ([strict], cases["bad_tokens"]):
        decoded, whole = tokenizer.decode(tokens, strict_reference=True)
        assert not decoded.any()  # zeros, silently
        assert not whole.any()
    clipped, whole = tokenizer.decode(tokenizer.encode(above))
    assert whole.all()
    assert clipped[0, :, above[0].max(axis=0) > 1].max() > 0.5  # the nearest that can be said
    kept, whole = tokenizer.decode(cases["bad_tokens"])
    assert not whole.any()
    assert kept.any()


def test_a_fitted_vocabulary_loses_no_coefficient(fitted):
    rng = np.random.default_rng(1)
    chunks = rng.uniform(-1, 1, (300, 30, 20))  # far from what it was fitted on
    decoded, whole = fitted.decode(fitted.encode(chunks))
    assert whole.all()
    inside = quantize(chunks, fitted.scale) - fitted.min_token
    assert inside.min() >= 0
    error = quantize(decoded, fitted.scale) - quantize(chunks, fitted.scale)
    assert not error.any()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.floats(0, 1))
def test_a_round_trip_stays_within_half_a_step(fitted, seed, size):
    chunk = size * _chunks(1, seed)
    decoded, whole = fitted.decode(fitted.encode(chunk))
    assert whole.all()
    assert np.linalg.norm(decoded - chunk, axis=1).max() <= 0.5 / fitted.scale * np.sqrt(30) + 1e-9


def test_what_is_fitted_comes_back_from_its_files(fitted, tmp_path):
    fitted.save(tmp_path)
    again = FastTokenizer.load(tmp_path)
    chunks = _chunks(5, 3)
    for one, two in zip(fitted.encode(chunks), again.encode(chunks), strict=True):
        np.testing.assert_array_equal(one, two)
    assert json.loads((tmp_path / "processor_config.json").read_text()) == {
        "scale": 10, "vocab_size": 512, "min_token": fitted.min_token, "time_horizon": 30,
        "action_dim": 20,
    }  # fmt: skip


def test_sizes_that_nobody_says_must_be_given(fitted, tmp_path):
    fitted.save(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(
        json.dumps(config | {"time_horizon": None, "action_dim": None})
    )
    with pytest.raises(ValueError, match="time_horizon is not said: give chunk_len"):
        FastTokenizer.load(tmp_path)
    assert FastTokenizer.load(tmp_path, chunk_len=30, action_dim=20).chunk_len == 30
    fitted.save(tmp_path)
    with pytest.raises(ValueError, match="time_horizon is 30, but chunk_len 10 was asked for"):
        FastTokenizer.load(tmp_path, chunk_len=10)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer"):
        FastTokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="not a FAST tokenizer"):
        FastTokenizer.load(tmp_path / "nowhere")


def test_bad_chunks_are_refused(fitted):
    for chunks in (np.zeros((2, 29, 20)), np.zeros((30, 20)), np.full((1, 30, 20), np.nan)):
        with pytest.raises(ValueError, match="expected finite"):
            fitted.encode(chunks)
    with pytest.raises(ValueError, match="a range of at most vocab_size 300"):
        FastTokenizer.fit(50 * _chunks(3), vocab_size=300)


def test_long_sequences_are_cut_and_said_not_to_fit(fitted):
    rows, fits = fitted.pad([np.arange(3), np.arange(9)], 5)
    assert rows.tolist() == [[0, 1, 2, -1, -1], [0, 1, 2, 3, 4]]
    assert fits.tolist() == [True, False]


def _sample(grammar, vocab_size, num, seed):
    """Sequences from random logits under the grammar's mask."""
    rng = np.random.default_rng(seed)
    left, state = np.full(num, grammar.size, np.int32), np.zeros(num, np.int32)
    columns = []
    while left.any():
        allowed = grammar.mask(left, state)
        live = left > 0
        assert allowed[live].any(axis=1).all()
        assert not allowed[~live].any()
        logits = rng.random((num, vocab_size), np.float32)
        token = np.where(allowed, logits, -1).argmax(axis=1)
        after = grammar.advance(left, state, token)
        left, state = np.where(live, after[0], left), np.where(live, after[1], state)
        columns.append(np.where(live, token, -1))
    return [row[row >= 0] for row in np.stack(columns, axis=1)]


@pytest.mark.parametrize("seed", range(3))
def test_under_the_grammar_no_sequence_is_malformed(fitted, seed):
    grammar = make_grammar(fitted)
    sequences = _sample(grammar, fitted.vocab_size, 100, seed)
    assert fitted.decode(sequences)[1].all()
    free = [np.random.default_rng(seed).integers(0, 512, len(row)) for row in sequences]
    assert not fitted.decode(free)[1].any()


def test_the_grammar_knows_characters_of_several_bytes():
    """Coefficients from -400 need characters above 127, whose bytes tokens may cut."""
    chunks = 4 * _chunks(200, horizon=6, dims=3)
    tokenizer = FastTokenizer.fit(chunks, vocab_size=600, margin=300)
    grammar = make_grammar(tokenizer)
    assert len(grammar.count) > 1
    sequences = _sample(grammar, tokenizer.vocab_size, 300, 0)
    assert tokenizer.decode(sequences)[1].all()
    for row in tokenizer.encode(chunks[:50]):  # and what is real is allowed
        left, state = np.int32(grammar.size), np.int32(0)
        for token in row:
            assert grammar.mask(left[None], state[None])[0, token]
            left, state = grammar.advance(left, state, token)
        assert (left, state) == (0, 0)


def test_the_grammar_works_inside_jit(fitted):
    grammar = make_grammar(fitted)
    left, state = np.array([600, 1, 0], np.int32), np.zeros(3, np.int32)
    ours = jax.jit(grammar.mask)(jnp.asarray(left), jnp.asarray(state))
    np.testing.assert_array_equal(ours, grammar.mask(left, state))
    token = np.array([70, 70, 70])
    after = jax.jit(grammar.advance)(jnp.asarray(left), jnp.asarray(state), jnp.asarray(token))
    np.testing.assert_array_equal(after[0], grammar.advance(left, state, token)[0])
