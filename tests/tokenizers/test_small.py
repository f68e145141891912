import pytest

from gear_jax.tokenizers import small, text


def test_the_merges_in_the_package_are_those_that_are_learned():
    assert small._PATH.read_text("utf-8") == small.learn()


def test_templates_are_short_and_any_text_comes_back():
    tokenizer, by_bytes = small.small_tokenizer(), text.byte_tokenizer()
    prompt = "<|im_start|>user\nPoint to the red block. Answer in JSON.<|im_end|>\n"
    assert len(tokenizer.encode(prompt)) < 0.4 * len(by_bytes.encode(prompt))
    for told in (prompt, 'Stra\u00dfe \u673a\u5668 {"point_2d": [21, 34]}', "\n\n  x"):
        assert tokenizer.decode(tokenizer.encode(told)) == told


def test_digits_stand_alone_as_in_qwen():
    tokenizer = small.small_tokenizer()
    assert [tokenizer.decode([one]) for one in tokenizer.encode("345")] == ["3", "4", "5"]


def test_added_tokens_lie_in_a_row_with_fewer_fast_codes():
    tokenizer = small.small_tokenizer()
    first = tokenizer.id("<fast_0000>")
    assert tokenizer.id(f"<fast_{small.NUM_FAST - 1:04d}>") == first + small.NUM_FAST - 1
    assert tokenizer.id("<la_0>") == first + small.NUM_FAST
    assert tokenizer.id("<la_15>") == tokenizer.id("<la_0>") + 15
    with pytest.raises(KeyError, match="fast_0512"):
        tokenizer.id("<fast_0512>")
