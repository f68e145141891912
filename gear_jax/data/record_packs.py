"""Vision-language records that share token rows: short ones are packed, so that little is padding.

    Pool -> packs of record numbers -> rows with a segment for each record

The packs are laid out once, from the length of each record's line and its number of images; the
bytes of a line bound the tokens of its text from above. Each record is in exactly one pack.
"""

import dataclasses
import hashlib
import json
import pathlib

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
        record_tokens: of a record, beside its images and its line: chat template and prompt words.
    """

    tokens: int
    images: int
    image_tokens: int
    record_tokens: int


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
            count = len(pool.record(number)["images"])
            needed = pool.line_bytes(number) + room.record_tokens + count * room.image_tokens
            if tokens + needed > room.tokens or images + count > room.images:
                begins.append(place)
                tokens = images = 0
            tokens, images = tokens + needed, images + count
        self._order, self._begins = order, np.array([*begins, len(order)], np.int64)
        told = json.dumps([pool.digest, dataclasses.asdict(room), seed])
        self.digest = hashlib.sha256(told.encode()).hexdigest()

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
