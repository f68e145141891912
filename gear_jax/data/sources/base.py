"""What every kind of recording looks like before standardisation: episodes under their own keys.

A source knows files and formats, and nothing of robots: no units, frames or signs. What its keys
mean is said by a row of data/standard_rows.py.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from gear_jax.data.tfrecord import DataError
from gear_jax.types import Image

_COLUMN = re.compile(r"(?P<key>.+?)(\[(?P<start>\d+)(?P<colon>:(?P<stop>\d+))?\])?")


class RawEpisode(Protocol):
    """One recorded episode, under its data set's own keys."""

    @property
    def where(self) -> str:
        """File and episode, for messages."""
        ...

    @property
    def episode_id(self) -> str:
        """Unique within the source."""
        ...

    @property
    def num_steps(self) -> int:
        """E."""
        ...

    @property
    def fps(self) -> float | None:
        """Steps per second, or None if the recording does not say."""
        ...

    def has(self, key: str) -> bool:
        """Whether this episode has any value of a key, images included."""
        ...

    def read(self, key: str) -> np.ndarray:
        """Numbers of every step [E, ...], or [1, ...] for what is said once an episode."""
        ...

    def text(self, key: str) -> str:
        """Text of the episode; of its first step where each has one."""
        ...

    def images(self, key: str) -> Sequence[bytes | Image]:
        """E images, read on access; encoded, or decoded as the source stores them."""
        ...


class Source(Protocol):
    """Episodes of one data set; cheap to hand to worker processes."""

    def __len__(self) -> int:
        """Number of episodes."""
        ...

    def episode(self, number: int) -> RawEpisode:
        """One of them, opened as lazily as the format allows."""
        ...

    def keys(self) -> Mapping[str, str]:
        """{key: what it holds, in words}, for the person who writes a row."""
        ...

    def fingerprint(self) -> str:
        """Hex sha256 that changes when the files do."""
        ...


def read_column(raw: RawEpisode, column: str) -> np.ndarray:
    """Numbers of "key", "key[3]" or "key[3:6]": float64[E, n].

    Raises:
        DataError: no such key in this episode, or not as many numbers.
    """
    key, part = parse_column(column)
    if not raw.has(key):
        raise DataError(f"{raw.where}: key {key!r} is missing")
    values = np.asarray(raw.read(key), np.float64)
    values = values.reshape(len(values), -1)
    if part.stop is not None and part.stop > values.shape[1]:
        raise DataError(f"{raw.where}: {column!r}: {key!r} has {values.shape[1]} numbers")
    return values[:, part]


def parse_column(column: str) -> tuple[str, slice]:
    """(key, which of its numbers) of "key", "key[3]" or "key[3:6]"."""
    found = _COLUMN.fullmatch(column)
    if not found:
        raise ValueError(f"column {column!r}: expected key, key[3] or key[3:6]")
    if found["start"] is None:
        return found["key"], slice(None)
    start = int(found["start"])
    return found["key"], slice(start, int(found["stop"]) if found["stop"] else start + 1)
