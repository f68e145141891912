import io

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gear_jax.data.images import (
    Augmentation,
    AugmentConfig,
    BadImageError,
    Fit,
    change_colours,
    crop,
    decode,
    draw,
    fit_into,
)


def _picture(height=48, width=64, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return cv2.GaussianBlur(noise, (9, 9), 0)


def _encoded(image, kind):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
    return file.getvalue()


def test_jpeg_decodes_as_pillow_does_and_png_exactly():
    picture = _picture()
    jpeg = simplejpeg.encode_jpeg(picture, 90)
    np.testing.assert_array_equal(decode(jpeg), np.asarray(Image.open(io.BytesIO(jpeg))))
    np.testing.assert_array_equal(decode(_encoded(picture, "PNG")), picture)
    rgba = np.concatenate([picture, np.full((48, 64, 1), 9, np.uint8)], axis=2)
    np.testing.assert_array_equal(decode(_encoded(rgba, "PNG")), picture)
    grey = simplejpeg.encode_jpeg(picture[..., :1].copy(), colorspace="GRAY")
    assert decode(grey).shape == (48, 64, 3)
    assert decode(picture) is picture


def _huge_header():
    """A JPEG that says 60000 x 60000."""
    jpeg = bytearray(simplejpeg.encode_jpeg(_picture()))
    place = jpeg.index(b"\xff\xc0")
    jpeg[place + 5 : place + 9] = (60000).to_bytes(2, "big") * 2
    return bytes(jpeg)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "bad_image"),
        (b"version https://git-lfs.github.com/spec/v1", "bad_image"),
        (simplejpeg.encode_jpeg(_picture())[:200], "bad_image"),
        (simplejpeg.encode_jpeg(_picture())[:-200], "bad_image"),
        (_huge_header(), "bad_image"),
        (_encoded(_picture(), "PNG")[:300], "bad_image"),
        (_encoded(_picture(), "GIF"), "bad_image"),
        (simplejpeg.encode_jpeg(np.zeros((1, 1, 3), np.uint8)), "tiny_image"),
        (_encoded(np.zeros((4, 40, 3), np.uint8), "PNG"), "tiny_image"),
        (np.zeros((48, 64), np.uint8), "bad_image"),
        (np.zeros((48, 64, 3), np.float32), "bad_image"),
    ],
)
def test_what_is_no_picture_is_refused(data, code):
    with pytest.raises(BadImageError) as caught:
        decode(data)
    assert caught.value.code == code


def test_a_wide_image_is_centred_between_black_bars():
    slot = np.full((28, 28, 3), 7, np.uint8)
    fit = fit_into(slot, np.full((30, 60, 3), 200, np.uint8))
    assert fit.box == (7, 0, 14, 28)
    assert (slot[7:21] == 200).all()
    assert not slot[:7].any()
    assert not slot[21:].any()
    stretched = np.zeros((28, 28, 3), np.uint8)
    fit_into(stretched, np.full((30, 60, 3), 200, np.uint8), "stretch")
    assert (stretched == 200).all()


def test_resizing_into_a_slot_equals_resizing_apart():
    batch = np.zeros((2, 3, 96, 96, 3), np.uint8)
    picture = _picture(64, 64)
    fit_into(batch[1, 2], picture)
    np.testing.assert_array_equal(batch[1, 2], cv2.resize(picture, (96, 96)))
    assert not batch[0].any()
    small = np.zeros((20, 20, 3), np.uint8)
    fit_into(small, picture)
    area = cv2.resize(picture, (20, 20), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(small, area)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(8, 2000),
    width=st.integers(8, 2000),
    size=st.sampled_from([28, 224, 448]),
    mode=st.sampled_from(["pad", "stretch"]),
)
def test_a_fit_keeps_the_image_inside_and_its_affine_meets_the_corners(height, width, size, mode):
    fit = Fit(height, width, size, mode)
    top, left, rows, columns = fit.box
    assert min(top, left) >= 0
    assert max(top + rows, left + columns) <= size
    assert max(rows, columns) == size
    sx, sy, dx, dy = fit.affine
    assert (0 * sx + dx, 0 * sy + dy) == (left, top)
    np.testing.assert_allclose((width * sx + dx, height * sy + dy), (left + columns, top + rows))
    if mode == "pad" and min(rows, columns) > 20:
        assert abs(rows / columns - height / width) <= 0.05 * height / width


def test_no_augmentation_changes_nothing_and_extremes_stay_in_range():
    still = draw(AugmentConfig(1.0, 0, 0, 0, 0), np.random.default_rng(0))
    picture = _picture()
    np.testing.assert_array_equal(crop(picture, still), picture)
    changed = picture.copy()
    change_colours(changed, still)
    np.testing.assert_array_equal(changed, picture)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_crops_and_colours_keep_their_limits(seed):
    augmentation = draw(AugmentConfig(), np.random.default_rng(seed))
    part = crop(_picture(100, 200), augmentation)
    assert 90 <= part.shape[0] <= 100
    assert 180 <= part.shape[1] <= 200
    top, left, height, width = augmentation.crop
    assert top + height <= 1 + 1e-9
    assert left + width <= 1 + 1e-9
    grey = augmentation.colour @ [127.5, 127.5, 127.5, 1]
    np.testing.assert_allclose(grey, grey[0])  # grey stays grey
    assert 0.8 * 0.8 * 127.5 < grey[0] < 1.2 * 1.2 * 127.5 + 1


def test_brightness_in_numbers():
    brighter = np.concatenate([1.2 * np.eye(3), np.zeros((3, 1))], axis=1)
    slot = np.full((4, 4, 3), 100, np.uint8)
    change_colours(slot, Augmentation((0, 0, 1, 1), brighter))
    assert (slot == 120).all()
    slot[:] = 230
    change_colours(slot, Augmentation((0, 0, 1, 1), brighter))
    assert (slot == 255).all()
