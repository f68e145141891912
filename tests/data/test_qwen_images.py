import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gear_jax.data.qwen_images import (
    PreprocessorConfig,
    image_patches,
    read_preprocessor,
    resize_bicubic,
    smart_resize,
    video_patches,
)

GOLDEN_CONFIG = PreprocessorConfig(max_pixels=28 * 28 * 1280)


def test_sizes_are_those_of_the_reference(golden):
    table = json.loads((golden / "qwen_smart_resize.json").read_text())
    for height, width, least, most, expected in table["rows"]:
        if expected is None:
            with pytest.raises(ValueError, match=f"{height} x {width} px"):
                smart_resize(height, width, table["factor"], least, most)
        else:
            ours = smart_resize(height, width, table["factor"], least, most)
            assert list(ours) == expected, (height, width)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((448, 448), (448, 448)),
        ((480, 640), (476, 644)),
        ((70, 98), (56, 112)),
        ((20, 20), (56, 56)),
    ],
)
def test_sizes_round_half_to_even_and_respect_the_bounds(size, expected):
    assert smart_resize(*size) == expected


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_legal_sizes_stay_as_they_are(rows, columns):
    height, width = 28 * (1 + rows % 20), 28 * (1 + columns % 20)
    if height * width >= 3136:
        assert smart_resize(height, width) == (height, width)


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (1, 201), (4020, 20)])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(
        ValueError, match=f"image of {size[0]} x {size[1]} px: expected sides from 1"
    ):
        smart_resize(*size)


@pytest.mark.parametrize(
    ("folder", "case"),
    [
        ("qwen2_5_vl_tiny", "case_two_images"),
        ("qwen2_5_vl_tiny", "case_batch_right_pad"),
        ("qwen2_5_vl_tiny_tied", "case_two_images"),
    ],
)
def test_patches_of_images_are_bit_for_bit_those_of_the_reference(golden, folder, case):
    stored = np.load(golden / folder / f"{case}.npz")
    images = [
        stored[k]
        for k in sorted(k for k in stored.files if k.startswith("image_") and k[-1].isdigit())
    ]
    patches, grids = zip(*(image_patches(image, GOLDEN_CONFIG) for image in images), strict=True)
    np.testing.assert_array_equal(np.stack(grids), stored["image_grid_thw"])
    np.testing.assert_allclose(np.concatenate(patches), stored["pixel_values"], atol=1e-6)


def test_patches_of_a_video_are_those_of_the_reference(golden):
    stored = np.load(golden / "qwen2_5_vl_tiny" / "case_video.npz")
    patches, grid = video_patches(stored["frames"], GOLDEN_CONFIG)
    np.testing.assert_array_equal(grid[None], stored["video_grid_thw"])
    np.testing.assert_allclose(patches, stored["pixel_values_videos"], atol=1e-6)


def test_rows_are_channel_frame_row_column_in_merge_block_order():
    image = np.zeros((56, 112, 3), np.uint8)
    image[14:28, 42:56] = (
        255,
        0,
        0,
    )  # patch row 1, column 3: unit (0, 1), second row, second column
    plain = PreprocessorConfig(image_mean=(0, 0, 0), image_std=(1, 1, 1))
    patches, grid = image_patches(image, plain)
    assert grid.tolist() == [1, 4, 8]
    expected = np.zeros((32, 3, 2, 14, 14), np.float32)
    expected[4 + 3, 0] = 1
    np.testing.assert_array_equal(patches.reshape(expected.shape), expected)


def test_an_odd_video_repeats_its_last_frame():
    frames = np.random.default_rng(0).integers(0, 256, (3, 56, 56, 3), dtype=np.uint8)
    odd, grid = video_patches(frames, GOLDEN_CONFIG)
    even, _ = video_patches(np.concatenate([frames, frames[-1:]]), GOLDEN_CONFIG)
    assert grid.tolist() == [2, 4, 4]
    np.testing.assert_array_equal(odd, even)


def test_an_image_of_the_right_size_is_not_touched():
    image = np.random.default_rng(0).integers(0, 256, (28, 56, 3), dtype=np.uint8)
    assert resize_bicubic(image, 28, 56) is image
    assert resize_bicubic(image, 56, 56).shape == (56, 56, 3)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((28, 28, 3), np.float32),
        np.zeros((28, 28, 4), np.uint8),
        np.zeros((28, 28), np.uint8),
        np.zeros((0, 28, 3), np.uint8),
    ],
)
def test_what_is_no_image_is_refused(image):
    with pytest.raises(ValueError, match="image is .*: expected uint8 of shape"):
        image_patches(image, GOLDEN_CONFIG)


def test_a_checkpoints_own_preprocessor_is_read(tmp_path):
    stored = {"min_pixels": 1, "max_pixels": 2, "patch_size": 14, "temporal_patch_size": 2}
    stored |= {"merge_size": 2, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(stored))
    assert read_preprocessor(path) == PreprocessorConfig(
        min_pixels=1, max_pixels=2, image_mean=(0, 0, 0), image_std=(1, 1, 1)
    )
    del stored["max_pixels"]
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="preprocessor_config.json: field 'max_pixels' is missing"):
        read_preprocessor(path)
    bounds = {"size": {"shortest_edge": 3, "longest_edge": 4}}
    newer = {k: v for k, v in stored.items() if k != "min_pixels"} | bounds
    path.write_text(json.dumps(newer))
    assert (read_preprocessor(path).min_pixels, read_preprocessor(path).max_pixels) == (3, 4)
    path.write_text(json.dumps(newer | {"min_pixels": 2, "max_pixels": None}))
    assert (read_preprocessor(path).min_pixels, read_preprocessor(path).max_pixels) == (2, 4)
    path.write_text("{")
    with pytest.raises(ValueError, match="not a readable JSON file"):
        read_preprocessor(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": "14"}, "patch_size is '14': expected an integer from 1"),
        ({"merge_size": 0}, "merge_size is 0: expected an integer from 1"),
        ({"min_pixels": 9}, "min_pixels is 9: expected at most max_pixels, 2"),
        ({"image_mean": [0, 0]}, r"image_mean is \[0, 0\]: expected three numbers"),
        ({"image_mean": 0.5}, "image_mean is 0.5: expected three numbers"),
        ({"image_std": [0, 1, 1]}, "expected numbers above 0"),
        ({"max_pixels": None}, "field 'max_pixels' is missing"),
    ],
)
def test_a_preprocessor_that_makes_no_sense_is_refused(tmp_path, change, message):
    stored = {"min_pixels": 1, "max_pixels": 2, "patch_size": 14, "temporal_patch_size": 2}
    stored |= {"merge_size": 2, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(stored | change))
    with pytest.raises(ValueError, match=f"preprocessor_config.json: .*{message}"):
        read_preprocessor(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="preprocessor_config.json: .*expected an object"):
        read_preprocessor(path)


def test_frames_of_several_sizes_are_refused():
    frames = [np.zeros((28, 28, 3), np.uint8), np.zeros((56, 28, 3), np.uint8)]
    with pytest.raises(ValueError, match="video is ragged: expected frames of one size"):
        video_patches(frames, GOLDEN_CONFIG)


def test_resizing_to_nothing_or_from_floats_is_refused():
    with pytest.raises(ValueError, match="new size is 0 x 7 px"):
        resize_bicubic(np.zeros((5, 5, 3), np.uint8), 0, 7)
    with pytest.raises(ValueError, match="image is float32"):
        resize_bicubic(np.zeros((5, 5, 3), np.float32), 7, 7)
