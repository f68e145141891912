"""A tokenizer of some hundred words, for models that are trained from nothing.

    python -m gear_jax.tokenizers.small        # learn its merges anew, into small_merges.txt

Byte-level BPE as Qwen's, learned from our own templates: prompts and answers of
data/vision_language.py, the chat template, and instructions of the embedded simulators. Any text
can be written with it, what it has not seen in more tokens.
"""

import itertools
import json
import pathlib

import tokenizers
from tokenizers import models, normalizers, trainers

from gear_jax.data.vision_language import TYPES
from gear_jax.tokenizers import text

NUM_MERGES = 400
NUM_FAST = 512
_PATH = pathlib.Path(__file__).with_name("small_merges.txt")


def small_tokenizer() -> text.TextTokenizer:
    """The tokenizer, with GEAR-VLA's added tokens, but `NUM_FAST` codes of FAST."""
    merges = []
    for line in _PATH.read_text("utf-8").splitlines():
        left, right = line.split(" ")
        merges.append((left, right))
    letters = text.byte_letters()
    words = [*letters.values(), *("".join(pair) for pair in merges)]
    backend = tokenizers.Tokenizer(
        models.BPE({word: number for number, word in enumerate(words)}, merges)
    )
    return text.finish(backend, NUM_FAST)


def corpus() -> list[str]:
    """What the merges are learned from."""
    things = [
        f"{colour} {noun}"
        for colour, noun in itertools.product(
            ("red", "green", "blue", "yellow"), ("block", "cube", "one", "bowl", "plate")
        )
    ]
    asked = [
        prompt.format(label=thing, instruction=f"pick up the {thing}", question="Where is it?",
                      colour="red")
        for kind in TYPES.values() for prompt in kind.prompts for thing in things
    ]  # fmt: skip
    told = [
        phrase.format(thing)
        for thing in things
        for phrase in ("pick up the {} and place it on the plate", "lift the {}", "take the {}",
                       "grab the {} and lift it", "put the {} in the basket")
    ]  # fmt: skip
    said = ['[{"point_2d": [1, 2]}, {"point_2d": [3, 4]}]', '{"bbox_2d": [5, 6, 7, 8]}'] * 40
    turns = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", "\n"] * 100
    return [*asked, *told, *said, *turns]


def learn() -> str:
    """The merges as the file has them, one a line."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = text.pre_tokenizer()
    letters = text.byte_letters()
    trainer = trainers.BpeTrainer(
        vocab_size=len(letters) + NUM_MERGES, initial_alphabet=list(letters.values()),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(corpus(), trainer)
    merges = json.loads(backend.to_str())["model"]["merges"]
    return "".join(f"{left} {right}\n" for left, right in merges)


if __name__ == "__main__":
    _PATH.write_text(learn(), "utf-8")
    print(f"{_PATH.name}: {len(learn().splitlines())} merges")
