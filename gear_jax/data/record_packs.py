"""Vision-language records that share token rows: short ones are packed, so that little is padding.

    Pool -> packs of record numbers -> rows with a segment for each record

The packs are laid out once, from a bound of each record's tokens and its number of images. Each
record is in exactly one pack.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable

import numpy as np

from gear_jax.data.record_pool import Pool
from gear_jax.data.vision_language import Record


@dataclasses.dataclass(frozen=True)
class Room:
    """What fits in a row.

    Attributes:
        tokens: of a row.
        images: of a row.
        image_tokens: of an image, with its marks.
        count: tokens of a record at most, beside its images.
    """

    tokens: int
    images: int
    image_tokens: int
    count: Callable[[Record], int]


class Packed:
    """A pool whose rows hold as many records as fit."""

    def __init__(self, pool: Pool, room: Room, seed: int):
        """Lay out the packs.

        Args:
            pool: the records.
            room: of a row; a record that alone is larger has a pack of its own.
            seed: of the order in which records meet.
        """
        self.pool = pool
        order = np.random.default_rng(seed).permutation(len(pool))
        begins, tokens, images = [], room.tokens, room.images
        for place, number in enumerate(order.tolist()):
            record = pool.record(number)
            count = len(record["images"])
            needed = room.count(record) + count * room.image_tokens
            if "views" in record:  # all of a robot's, and their marks
                count = room.images
                needed = room.count(record) + count * (room.image_tokens + 1)
            if tokens + needed > room.tokens or images + count > room.images:
                begins.append(place)
                tokens = images = 0
            tokens, images = tokens + needed, images + count
        self._order, self._begins = order, np.array([*begins, len(order)], np.int64)
        told = json.dumps([pool.digest, room.images, seed]).encode()
        self.digest = hashlib.sha256(told + self._begins.tobytes()).hexdigest()

    def __len__(self) -> int:
        """Number of packs."""
        return len(self._begins) - 1

    def pack(self, number: int) -> list[int]:
        """Records of one pack."""
        return self._order[self._begins[number] : self._begins[number + 1]].tolist()

    def record(self, number: int) -> Record:
        """As `Pool.record`."""
        return self.pool.record(number)

    def image_paths(self, record: Record) -> list[pathlib.Path]:
        """As `Pool.image_paths`."""
        return self.pool.image_paths(record)

    def where(self, number: int) -> str:
        """As `Pool.where`."""
        return self.pool.where(number)
