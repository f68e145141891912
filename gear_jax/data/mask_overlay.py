"""Marking an object by a coloured mask, and run-length masks (systems.md 2.11).

The marked image is grey but for the object: the name of a colour points at it and nothing else.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gear_jax.data.images import MAX_PIXELS
from gear_jax.types import Image

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
    "orange": (255, 128, 0),
    "purple": (128, 0, 255),
}


def overlay(image: Image, mask: np.ndarray, colour: str) -> Image:
    """The image in grey, its marked pixels half grey and half colour, rounded half up.

    Args:
        image: uint8[H, W, 3], RGB.
        mask: bool[H, W].
        colour: a key of `COLOURS`.

    Returns:
        uint8[H, W, 3].

    Raises:
        ValueError: another size of mask, or an unknown colour.
    """
    if mask.shape != image.shape[:2]:
        raise ValueError(f"mask is {mask.shape}, the image {image.shape[:2]}")
    if colour not in COLOURS:
        raise ValueError(f"colour {colour!r}: expected one of {list(COLOURS)}")
    # in thousandths, as whole numbers: a half is a half, and is rounded up
    red, green, blue = np.moveaxis(image.astype(np.uint32), -1, 0)
    grey = (299 * red + 587 * green + 114 * blue)[..., None]
    marked = (grey + 1000 * np.array(COLOURS[colour], np.uint32) + 1000) // 2000
    return np.where(mask[..., None], marked, (grey + 500) // 1000).astype(np.uint8)


def decode_mask(stored: Mapping[str, Any]) -> np.ndarray:
    """bool[H, W] of COCO's uncompressed run lengths: column by column, runs of 0 first.

    Raises:
        ValueError: see `check_mask`.
    """
    check_mask(stored)
    size, counts = stored["size"], stored["counts"]
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(size[1], size[0]).T


def check_mask(stored: Mapping[str, Any]) -> None:
    """Refuse what `decode_mask` cannot read, before memory is taken for it.

    Raises:
        ValueError: not {"size": [H, W], "counts": [...]}, larger than any image may be, or runs
            that do not fill the mask.
    """
    size: Any = stored.get("size")
    counts: Any = stored.get("counts")
    if not _whole(size, 2) or min(size) < 1 or not _whole(counts, None):
        raise ValueError('mask: expected {"size": [H, W], "counts": [runs]} of whole numbers')
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"mask: size {size} has more than {MAX_PIXELS} pixels")
    if min(counts, default=0) < 0 or sum(counts) != size[0] * size[1]:
        raise ValueError(f"mask: runs fill {sum(counts)} pixels, expected {size[0] * size[1]}")


def encode_mask(mask: np.ndarray) -> dict[str, list[int]]:
    """The inverse of `decode_mask`."""
    flat = mask.T.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], ends, [len(flat)]])).tolist()
    return {"size": list(mask.shape), "counts": ([0] if flat[0] else []) + runs}


def _whole(values: Any, count: int | None) -> bool:
    return (
        isinstance(values, Sequence)
        and not isinstance(values, str)
        and (count is None or len(values) == count)
        and all(type(value) is int for value in values)
    )
