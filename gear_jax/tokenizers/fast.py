"""FAST: action chunks <-> short token sequences (a cosine transform, rounding, byte-pair encoding).

    chunk [H, D] -> DCT-II over time -> round(scale * c) -> one character each -> BPE ids

Low frequencies first, all dimensions of one frequency together. Files are those of the reference
(physical-intelligence/fast: tokenizer.json, processor_config.json); ids and decoded chunks equal it
under `strict_reference`. Two things differ by default, because the reference fails silently there:
a coefficient without a token becomes the nearest that has one, and a sequence of the wrong length
decodes to the nearest legal chunk instead of zeros. `Grammar` goes further: under its mask a model
cannot write a sequence of the wrong length. Source: ported_models.md C.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.fft
import tokenizers

_CONFIG = ("scale", "vocab_size", "min_token", "time_horizon", "action_dim")


@dataclasses.dataclass(frozen=True, eq=False)
class FastTokenizer:
    """One vocabulary and its quantisation.

    Attributes:
        bpe: byte-level BPE over characters chr(coefficient - min_token).
        scale: quantisation steps per unit of a coefficient.
        min_token: least coefficient.
        chunk_len: H.
        action_dim: D.
    """

    bpe: tokenizers.Tokenizer
    scale: float
    min_token: int
    chunk_len: int
    action_dim: int

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike,
        *,
        chunk_len: int | None = None,
        action_dim: int | None = None,
    ) -> "FastTokenizer":
        """Read tokenizer.json and processor_config.json.

        Args:
            directory: of a released or a fitted tokenizer.
            chunk_len: H; needed where the files do not say it, as the universal tokenizer's do not.
            action_dim: D; likewise.

        Raises:
            ValueError: unreadable, contradicting sizes, or sizes that nobody says.
        """
        folder = pathlib.Path(directory)
        try:
            config = json.loads((folder / "processor_config.json").read_text("utf-8"))
            bpe = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            scale, min_token = float(config["scale"]), int(config["min_token"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder}: not a FAST tokenizer: {error!r}") from error
        except Exception as error:  # what tokenizers raises for a bad file
            raise ValueError(f"{folder / 'tokenizer.json'}: not a tokenizer: {error}") from error
        sizes: dict[str, Any] = {}
        for name, key, given in (
            ("chunk_len", "time_horizon", chunk_len),
            ("action_dim", "action_dim", action_dim),
        ):
            said = config.get(key)
            if said is None and given is None:
                raise ValueError(f"{folder}: {key} is not said: give {name}")
            if None not in (said, given) and said != given:
                raise ValueError(f"{folder}: {key} is {said}, but {name} {given} was asked for")
            sizes[name] = given if said is None else said
        return cls(bpe, scale, min_token, **sizes)

    @classmethod
    def fit(
        cls, chunks: np.ndarray, *, vocab_size: int = 2048, scale: float = 10.0, margin: int = 8
    ) -> "FastTokenizer":
        """Train a vocabulary on chunks; every byte has a token, so no coefficient is ever lost.

        Args:
            chunks: float[n, H, D], normalised to about -1 .. 1.
            vocab_size: greatest number of tokens.
            scale: quantisation steps per unit of a coefficient.
            margin: coefficients below the least seen that can still be said.

        Raises:
            ValueError: not finite, or a range of coefficients that the vocabulary cannot hold.
        """
        if chunks.ndim != 3 or not len(chunks) or not np.isfinite(chunks).all():
            raise ValueError(f"chunks are {list(chunks.shape)}: expected finite [n, H, D]")
        coefficients = quantize(chunks, scale)
        least = int(coefficients.min()) - margin
        if int(coefficients.max()) - least > vocab_size or vocab_size < 257:
            raise ValueError(
                f"coefficients from {coefficients.min()} to {coefficients.max()}: expected a range "
                f"of at most vocab_size {vocab_size}, from 257: normalise, or lower scale"
            )
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            show_progress=False,
            special_tokens=[],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            max_token_length=10000,
        )
        texts = _texts(coefficients - least)
        bpe.train_from_iterator(texts, trainer, length=len(texts))
        return cls(bpe, float(scale), least, *chunks.shape[1:])

    def save(self, directory: str | os.PathLike) -> None:
        """Write the two files, as the reference reads them."""
        folder = pathlib.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        scale = int(self.scale) if self.scale == int(self.scale) else self.scale
        sizes = (scale, self.vocab_size, self.min_token, self.chunk_len, self.action_dim)
        config = json.dumps(dict(zip(_CONFIG, sizes, strict=True)))
        (folder / "processor_config.json").write_text(config)
        self.bpe.save(str(folder / "tokenizer.json"))

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self.bpe.get_vocab_size()

    def encode(self, chunks: np.ndarray, *, strict_reference: bool = False) -> list[np.ndarray]:
        """Token ids of chunks.

        Args:
            chunks: float[n, H, D]; clipped to the range that the vocabulary can say.
            strict_reference: do as the reference, which loses coefficients without a token.

        Returns:
            n arrays int32[length].

        Raises:
            ValueError: other sizes, or numbers that are not finite.
        """
        expected = (self.chunk_len, self.action_dim)
        if chunks.ndim != 3 or chunks.shape[1:] != expected or not np.isfinite(chunks).all():
            raise ValueError(
                f"chunks are {list(chunks.shape)}: expected finite numbers [n, *{list(expected)}]"
            )
        codes = np.maximum(quantize(chunks, self.scale) - self.min_token, 0)
        if not strict_reference:
            codes = self._nearest[np.minimum(codes, len(self._nearest) - 1)]
        encoded = self.bpe.encode_batch_fast(_texts(codes), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]

    def decode(
        self, tokens: Sequence[np.ndarray], *, strict_reference: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Chunks of token sequences.

        Args:
            tokens: n sequences of ids.
            strict_reference: zeros for a sequence that is malformed, as the reference gives; by
                default its coefficients are cut or filled with zeros, and those beyond the
                vocabulary's range are clipped.

        Returns:
            chunks float64[n, H, D]; whole bool[n], False where a sequence was malformed.
        """
        size = self.chunk_len * self.action_dim
        coefficients = np.zeros((len(tokens), size))
        whole = np.zeros(len(tokens), bool)
        for row, ids in enumerate(tokens):
            ids = [int(token) for token in ids]
            text = self.bpe.decode(ids, skip_special_tokens=False)
            codes = np.array([ord(letter) for letter in text], np.int64)
            broken = codes == 0xFFFD  # a character that was cut
            whole[row] = len(codes) == size and not broken.any()
            if strict_reference:
                if len(codes) == size:
                    coefficients[row] = codes + self.min_token
                continue
            codes = np.where(broken, -self.min_token, np.minimum(codes, len(self._nearest) - 1))
            coefficients[row, : len(codes)] = codes[:size] + self.min_token
        spectrum = coefficients.reshape(-1, self.chunk_len, self.action_dim) / self.scale
        return scipy.fft.idct(spectrum, axis=1, norm="ortho"), whole

    def pad(self, tokens: Sequence[np.ndarray], length: int = 256) -> tuple[np.ndarray, np.ndarray]:
        """Rows of one length: ids int32[n, length] with -1 behind the end; fits bool[n].

        A sequence that is longer does not fit: its row is cut, and must not be trained on.
        """
        rows = np.full((len(tokens), length), -1, np.int32)
        for row, ids in zip(rows, tokens, strict=True):
            row[: min(len(ids), length)] = ids[:length]
        return rows, np.array([len(ids) <= length for ids in tokens], bool)

    @functools.cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each token stands for."""
        letters = _byte_of_letter()
        names = [self.bpe.id_to_token(token) or "" for token in range(self.vocab_size)]
        return [bytes(letters.get(letter, 0) for letter in name) for name in names]

    @functools.cached_property
    def _nearest(self) -> np.ndarray:
        """int64[codes]: for each code up to the greatest, the nearest whose bytes have tokens."""
        known = {token for token in self.token_bytes if len(token) == 1}
        last = self.vocab_size - 1
        sayable = np.array(
            [
                all(bytes([b]) in known for b in chr(code).encode("utf-8"))
                for code in range(last + 1)
            ]
        )
        codes = np.flatnonzero(sayable)
        if not len(codes):
            raise ValueError("this vocabulary has no token for any coefficient")
        each = np.arange(last + 1)
        after = np.minimum(np.searchsorted(codes, each), len(codes) - 1)
        before = np.maximum(after - 1, 0)
        nearer = np.abs(codes[before] - each) <= np.abs(codes[after] - each)
        return np.where(nearer, codes[before], codes[after])


def quantize(chunks: np.ndarray, scale: float) -> np.ndarray:
    """Rounded coefficients int64[n, H, D] of chunks float[n, H, D]: halves go to the even.

    In the precision of `chunks` and by SciPy, as the reference: any other way rounds differently
    what lies on a half.
    """
    spectrum = scipy.fft.dct(chunks, axis=1, norm="ortho")
    return np.round(spectrum * scale).astype(np.int64)


def _texts(codes: np.ndarray) -> list[str]:
    """One character a coefficient, row by row."""
    rows = codes.reshape(len(codes), -1).astype("<u4")
    return [row.tobytes().decode("utf-32-le", "surrogatepass") for row in rows]


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """Byte-level BPE writes bytes as printable letters: the way back."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + n): byte for n, byte in enumerate(others)}


@dataclasses.dataclass(frozen=True, eq=False)
class Grammar:
    """Which tokens may follow, so that every sequence that ends holds exactly H x D coefficients.

    And only such as the vocabulary's range has: nothing is clipped.

    A state is the part of a character that tokens have begun and not finished; 0 is none. All are
    plain arrays: `mask` and `advance` work on NumPy and on JAX, inside jit, with leading axes.

    Attributes:
        size: H x D.
        count: int32[S, V], characters that a token finishes in each state.
        following: int32[S, V], the state after it; -1 where the bytes would be no character.
        can_end: bool[size + 1, S], whether so many characters can still be written from a state.
    """

    size: int
    count: np.ndarray
    following: np.ndarray
    can_end: np.ndarray

    def mask(self, left: Any, state: Any) -> Any:
        """bool[..., V]: tokens after which the rest can still be written.

        Args:
            left: int32[...], characters still to be written; at 0 the sequence must end.
            state: int32[...].
        """
        count, following = _like(self.count, left)[state], _like(self.following, left)[state]
        rest = left[..., None] - count
        fits = (rest >= 0) & (following >= 0) & (left[..., None] > 0)
        rest, following = rest.clip(0, self.size), following.clip(0, None)
        return fits & _like(self.can_end, left)[rest, following]

    def advance(self, left: Any, state: Any, token: Any) -> tuple[Any, Any]:
        """(left, state) after a token int32[...] that the mask allows."""
        count, following = _like(self.count, left), _like(self.following, left)
        return left - count[state, token], following[state, token]


def _like(array: np.ndarray, other: Any) -> Any:
    """A constant as the kind of array that `other` is."""
    if isinstance(other, np.ndarray | np.generic):
        return array
    import jax.numpy as jnp

    return jnp.asarray(array)


def make_grammar(tokenizer: FastTokenizer) -> Grammar:
    """The grammar of a tokenizer's vocabulary; some seconds for a large one, so make it once.

    Raises:
        ValueError: with this vocabulary no sequence of the right length can be written.
    """
    tokens, limit = tokenizer.token_bytes, tokenizer.vocab_size  # coefficients have no more codes
    begins = {
        chr(code).encode()[:length]
        for code in range(limit)
        for length in range(1, len(chr(code).encode()))
    }
    states, steps = {b"": 0}, []
    todo = [b""]
    while todo:
        begun = todo.pop(0)
        row = [_finish(begun + token, limit, begins) if token else None for token in tokens]
        for found in row:
            if found is not None and found[1] not in states:
                states[found[1]] = len(states)
                todo.append(found[1])
        steps.append(row)
    count = np.array([[f[0] if f else 0 for f in row] for row in steps], np.int32)
    following = np.array([[states[f[1]] if f else -1 for f in row] for row in steps], np.int32)
    size = tokenizer.chunk_len * tokenizer.action_dim
    can_end = np.zeros((size + 1, len(states)), bool)
    can_end[0, 0] = True
    # the moves that differ: many tokens finish as many characters and lead to the same state
    moves = [sorted({(int(c), int(f)) for c, f in zip(cs, fs, strict=True) if f >= 0})
             for cs, fs in zip(count, following, strict=True)]  # fmt: skip
    for left in range(size + 1):
        changed = True
        while changed:  # moves that finish no character stay on the same line
            changed = False
            for state, row in enumerate(moves):
                if not can_end[left, state] and any(
                    c <= left and can_end[left - c, f] for c, f in row if (c or f != state)
                ):
                    if left == 0 and state:
                        continue  # a begun character can only end by finishing one
                    can_end[left, state] = changed = True
    if not can_end[size, 0]:
        raise ValueError(f"this vocabulary cannot write {size} coefficients")
    return Grammar(size, count, following, can_end)


def _finish(data: bytes, limit: int, begun: set[bytes]) -> tuple[int, bytes] | None:
    """(characters, what is begun after them) of bytes; None if they are none below `limit`."""
    for cut in range(min(4, len(data) + 1)):
        head, tail = (data, b"") if not cut else (data[:-cut], data[-cut:])
        try:
            text = head.decode("utf-8")
        except UnicodeDecodeError:
            continue
        fits = all(ord(letter) < limit for letter in text) and (not tail or tail in begun)
        return (len(text), tail) if fits else None
    return None
