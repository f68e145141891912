"""Images -> what the Qwen vision tower reads: legal sizes, patches in merge-block order.

NumPy and Pillow. Source: ported_models.md A3; values equal those of the reference's PIL backend.
"""

import dataclasses
import json
import math
import pathlib

import numpy as np
from PIL import Image

_MAX_ASPECT = 200


@dataclasses.dataclass(frozen=True)
class PreprocessorConfig:
    """What preprocessor_config.json says; the defaults are those of the released Qwen2.5-VL."""

    min_pixels: int = 3136
    max_pixels: int = 12_845_056
    patch_size: int = 14
    temporal_patch: int = 2
    spatial_merge: int = 2
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def factor(self):
        """Pixels along one side of a merged unit; sides of images are multiples of it."""
        return self.patch_size * self.spatial_merge


def read_preprocessor(path):
    """A checkpoint's preprocessor_config.json -> PreprocessorConfig.

    Newer files state the pixel bounds as `size.shortest_edge` and `size.longest_edge`; the older
    `min_pixels` and `max_pixels` win where both stand.

    Raises:
        ValueError: unreadable, or a field that we need is missing or makes no sense.
    """
    path = pathlib.Path(path)
    fields = {
        "min_pixels": "min_pixels",
        "max_pixels": "max_pixels",
        "patch_size": "patch_size",
        "temporal_patch": "temporal_patch_size",
        "spatial_merge": "merge_size",
        "image_mean": "image_mean",
        "image_std": "image_std",
    }
    try:
        stored = json.loads(path.read_text("utf-8"))
        if not isinstance(stored, dict):
            raise ValueError("expected an object")
        stored = _bounds(stored.get("size")) | {k: v for k, v in stored.items() if v is not None}
        values = {ours: stored[theirs] for ours, theirs in fields.items()}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable JSON file: {error}") from error
    except KeyError as error:
        raise ValueError(
            f"{path}: field {error} is missing, expected {list(fields.values())}"
        ) from error
    for name in ("image_mean", "image_std"):
        channels = values[name] if isinstance(values[name], list) else []
        if len(channels) != 3 or not all(_is_number(x) for x in channels):
            raise ValueError(f"{path}: {name} is {values[name]!r}: expected three numbers")
        values[name] = tuple(channels)
    if min(values["image_std"]) <= 0:
        raise ValueError(f"{path}: image_std is {values['image_std']}: expected numbers above 0")
    for ours in ("min_pixels", "max_pixels", "patch_size", "temporal_patch", "spatial_merge"):
        if type(values[ours]) is not int or values[ours] < 1:
            raise ValueError(
                f"{path}: {fields[ours]} is {values[ours]!r}: expected an integer from 1"
            )
    if values["min_pixels"] > values["max_pixels"]:
        raise ValueError(
            f"{path}: min_pixels is {values['min_pixels']}: expected at most max_pixels, "
            f"{values['max_pixels']}"
        )
    return PreprocessorConfig(**values)


def _bounds(size):
    """The pixel bounds of a newer file's `size`, under their older names."""
    names = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
    size = size if isinstance(size, dict) else {}
    return {older: size[newer] for older, newer in names.items() if size.get(newer) is not None}


def _is_number(x):
    return isinstance(x, int | float) and not isinstance(x, bool)


def smart_resize(height, width, factor=28, min_pixels=3136, max_pixels=12_845_056):
    """(height, width) of the legal size nearest to an image's.

    Both become multiples of `factor`, their product lies between the two bounds, and the aspect
    ratio changes as little as that allows. Python's round half to even, as the reference.

    Raises:
        ValueError: a side below 1 px, or one side more than 200 times the other.
    """
    if min(height, width) < 1 or max(height, width) / min(height, width) > _MAX_ASPECT:
        raise ValueError(
            f"image of {height} x {width} px: expected sides from 1 px, at most {_MAX_ASPECT} to 1"
        )
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


def resize_bicubic(image, height, width):
    """uint8[H, W, 3] -> uint8[height, width, 3], antialiased bicubic; as it is if it fits.

    Raises:
        ValueError: not uint8[H, W, 3], or a new side below 1 px.
    """
    image = _checked(image, 3, "image")
    if min(height, width) < 1:
        raise ValueError(f"new size is {height} x {width} px: expected sides from 1 px")
    if image.shape[:2] == (height, width):
        return image
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def image_patches(image, config):
    """One image of any size -> its patches.

    Args:
        image: uint8[H, W, 3], RGB.
        config: PreprocessorConfig.

    Returns:
        float32[N, 3 * T * 14 * 14], both frames equal; grid int64[3] = (1, rows, columns) of
        patches.

    Raises:
        ValueError: not uint8[H, W, 3], or a shape that `smart_resize` refuses.
    """
    return video_patches(_checked(image, 3, "image")[None], config)


def video_patches(frames, config):
    """Frames of one video -> its patches, `temporal_patch` frames to a patch.

    Args:
        frames: uint8[F, H, W, 3], RGB; the last frame is repeated until F is a multiple of the
            patch.
        config: PreprocessorConfig.

    Returns:
        float32[N, 3 * T * 14 * 14]; grid int64[3] = (F / T, rows, columns) of patches.

    Raises:
        ValueError: not uint8[F, H, W, 3], or a shape that `smart_resize` refuses.
    """
    c = config
    frames = _checked(frames, 4, "video")
    height, width = smart_resize(*frames.shape[1:3], c.factor, c.min_pixels, c.max_pixels)
    frames = np.stack([resize_bicubic(frame, height, width) for frame in frames])
    fill = -len(frames) % c.temporal_patch
    frames = np.concatenate([frames, np.repeat(frames[-1:], fill, axis=0)])
    mean, std = np.asarray(c.image_mean, np.float32), np.asarray(c.image_std, np.float32)
    x = (frames.astype(np.float32) / np.float32(255) - mean) / std
    grid = (len(frames) // c.temporal_patch, height // c.patch_size, width // c.patch_size)
    m, p = c.spatial_merge, c.patch_size
    x = x.reshape(grid[0], c.temporal_patch, grid[1] // m, m, p, grid[2] // m, m, p, 3)
    # (t, row of units, column of units, row and column in the unit, channel, frame, pixels)
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return np.ascontiguousarray(x.reshape(math.prod(grid), -1)), np.array(grid)


def _checked(array, ndim, name):
    try:
        array = np.asarray(array)
    except ValueError as error:
        raise ValueError(f"{name} is ragged: expected frames of one size") from error
    if array.dtype != np.uint8 or array.ndim != ndim or array.shape[-1] != 3 or not array.size:
        raise ValueError(
            f"{name} is {array.dtype}{list(array.shape)}: expected uint8 of shape "
            f"{['H', 'W', 3] if ndim == 3 else ['F', 'H', 'W', 3]}"
        )
    return array
