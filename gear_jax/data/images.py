"""Encoded camera images -> slots of the batch: decode, fit, augment.

Images are decoded and resized straight into the batch's memory; nothing else of their size is
allocated. Augmentation is GEAR-VLA's (systems.md 2.9): one crop and one colour change per view and
sample, drawn from a generator that the caller seeds by the sample's number.
"""

import dataclasses
import io
import threading
from typing import Any, Literal

import cv2
import numpy as np
import simplejpeg
from PIL import Image as PilImage

from gear_jax.types import Image

MAX_PIXELS = 50_000_000
MIN_SIDE = 8  # what is smaller is a placeholder, not a picture

_LUMA = np.array([0.299, 0.587, 0.114])
_scratch = threading.local()

cv2.setNumThreads(1)  # workers are processes


class BadImageError(ValueError):
    """Bytes that are no usable picture; `code` is a key of `faults.POLICY`."""

    def __init__(self, code: str, what: str):
        """`what` says what was found."""
        super().__init__(what)
        self.code = code


def decode(image: bytes | Image) -> Image:
    """uint8[H, W, 3], RGB, of JPEG, PNG or WebP bytes; an array is checked and handed on.

    The array of a JPEG lives in a buffer that this thread's next call reuses: copy it to keep it.

    Raises:
        BadImageError: not a picture, cut short, smaller than 8 px or larger than 50 megapixels.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise BadImageError(
                "bad_image", f"{image.dtype}{list(image.shape)}, not uint8[H, W, 3]"
            )
        _check_size(*image.shape[:2])
        return image
    if image[:2] != b"\xff\xd8":
        return _decode_other(image)
    try:
        height, width = map(int, simplejpeg.decode_jpeg_header(image)[:2])
        _check_size(height, width)
        buffer = _buffer(height * width * 3)
        return simplejpeg.decode_jpeg(image, "RGB", buffer=buffer)
    except BadImageError:
        raise
    except ValueError as error:
        raise BadImageError("bad_image", f"JPEG does not decode: {error}") from error


def _decode_other(data: bytes) -> Image:
    try:
        with PilImage.open(io.BytesIO(data), formats=["PNG", "WEBP"]) as opened:
            _check_size(opened.height, opened.width)
            return np.asarray(opened.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, BadImageError):
            raise
        raise BadImageError("bad_image", f"neither JPEG, PNG nor WebP: {error}") from error


def _check_size(height: int, width: int) -> None:
    if min(height, width) < MIN_SIDE:
        raise BadImageError("tiny_image", f"{height} x {width} px, expected sides from {MIN_SIDE}")
    if height * width > MAX_PIXELS:
        raise BadImageError(
            "bad_image", f"{height} x {width} px, expected up to {MAX_PIXELS} in all"
        )


def _buffer(size: int) -> Any:
    """This thread's memory for decoded pixels: fresh pages would cost more than the decoding."""
    found = getattr(_scratch, "memory", None)
    if found is None or len(found) < size:
        found = _scratch.memory = np.empty(size, np.uint8)
    return found


@dataclasses.dataclass(frozen=True)
class Fit:
    """Where an image of (height, width) lies in a square slot, and back.

    Attributes:
        height: of the image, pixels.
        width: of the image, pixels.
        size: side of the slot, pixels.
        mode: "pad": the whole image, centred, its shape kept; "stretch": it fills the slot.
    """

    height: int
    width: int
    size: int
    mode: Literal["pad", "stretch"] = "pad"

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the image in the slot."""
        if self.mode == "stretch":
            return 0, 0, self.size, self.size
        scale = self.size / max(self.height, self.width)
        height = max(1, round(self.height * scale))
        width = max(1, round(self.width * scale))
        return (self.size - height) // 2, (self.size - width) // 2, height, width

    @property
    def affine(self) -> tuple[float, float, float, float]:
        """(scale x, scale y, shift x, shift y): slot = image * scale + shift, in pixels."""
        top, left, height, width = self.box
        return width / self.width, height / self.height, float(left), float(top)


def fit_into(slot: Image, image: Image, mode: Literal["pad", "stretch"] = "pad") -> Fit:
    """Resize an image into a slot, in place; what it does not cover becomes black.

    Bilinear; averaging areas when shrinking to less than half, where bilinear would skip pixels.

    Args:
        slot: uint8[S, S, 3]; written.
        image: uint8[H, W, 3].
        mode: see `Fit`.

    Returns:
        Where it went.
    """
    fit = Fit(image.shape[0], image.shape[1], len(slot), mode)
    top, left, height, width = fit.box
    if (height, width) != slot.shape[:2]:
        slot[:] = 0
    target = slot[top : top + height, left : left + width]
    if image.shape[:2] == (height, width):
        target[:] = image
    else:
        shrinks = height * 2 < image.shape[0] or width * 2 < image.shape[1]
        how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        cv2.resize(image, (width, height), dst=target, interpolation=how)
    return fit


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """How much a sample's views may change (systems.md 2.9).

    Attributes:
        crop: least side of the random crop, as a fraction of the image's.
        brightness: greatest relative change.
        contrast: greatest relative change, about mid-grey.
        saturation: greatest relative change.
        hue: greatest turn of the colour circle, as a fraction of a whole one.
    """

    crop: float = 0.9
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.05


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is done to one view of one sample.

    Attributes:
        crop: (top, left, height, width) as fractions of the image.
        colour: float64[3, 4], RGB' = colour @ (R, G, B, 1).
    """

    crop: tuple[float, float, float, float]
    colour: np.ndarray


def draw(config: AugmentConfig, rng: np.random.Generator) -> Augmentation:
    """One augmentation; eight numbers of the generator, always."""
    sides = rng.uniform(config.crop, 1, 2)
    corner = rng.uniform(0, 1, 2) * (1 - sides)
    limits = np.array([config.brightness, config.contrast, config.saturation, config.hue])
    brightness, contrast, saturation, hue = rng.uniform(-1, 1, 4) * limits
    return Augmentation(
        (float(corner[0]), float(corner[1]), float(sides[0]), float(sides[1])),
        _colour(1 + brightness, 1 + contrast, 1 + saturation, 2 * np.pi * hue),
    )


def _colour(brightness, contrast, saturation, angle):
    """All four changes as one matrix; the hue turns about the grey axis."""
    axis = np.full(3, 1 / np.sqrt(3))
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    turn = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    grey = np.tile(_LUMA, (3, 1))
    mix = (saturation * np.eye(3) + (1 - saturation) * grey) @ turn * brightness * contrast
    return np.concatenate([mix, np.full((3, 1), 127.5 * (1 - contrast))], axis=1)


def crop(image: Image, augmentation: Augmentation) -> Image:
    """The part of an image that an augmentation keeps; a view, no copy."""
    top, left, height, width = augmentation.crop
    rows, columns = image.shape[:2]
    y, x = int(top * rows), int(left * columns)
    return image[y : y + max(1, round(height * rows)), x : x + max(1, round(width * columns))]


def change_colours(slot: Image, augmentation: Augmentation) -> None:
    """Apply an augmentation's colours in place, rounded and clipped."""
    cv2.transform(slot, augmentation.colour, dst=slot)
