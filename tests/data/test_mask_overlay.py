import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gear_jax.data.mask_overlay import COLOURS, decode_mask, encode_mask, overlay


def test_marked_pixels_are_half_colour_and_the_rest_is_grey():
    image = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [10, 20, 30]]], np.uint8)
    mask = np.array([[True, False], [False, True]])
    got = overlay(image, mask, "cyan")
    # greys: 76.245, 149.685, 29.07, 18.15
    assert got.tolist() == [
        [[38, 166, 166], [150, 150, 150]],
        [[29, 29, 29], [9, 137, 137]],
    ]


def test_every_half_is_rounded_up():
    levels = np.arange(256, dtype=np.uint8)
    image = np.repeat(levels[None, :, None], 3, axis=2)
    for name, colour in COLOURS.items():
        marked = overlay(image, np.ones((1, 256), bool), name)
        wanted = (levels[:, None].astype(int) + colour + 1) // 2
        np.testing.assert_array_equal(marked[0], wanted)
    np.testing.assert_array_equal(overlay(image, np.zeros((1, 256), bool), "red"), image)


def test_eight_colours_and_no_others():
    assert len(set(COLOURS.values())) == 8
    image = np.zeros((2, 2, 3), np.uint8)
    with pytest.raises(ValueError, match="colour 'pink'"):
        overlay(image, np.ones((2, 2), bool), "pink")
    with pytest.raises(ValueError, match="mask is \\(2, 3\\)"):
        overlay(image, np.ones((2, 3), bool), "red")


def test_run_lengths_go_down_the_columns():
    mask = decode_mask({"size": [2, 3], "counts": [1, 2, 3]})
    assert mask.tolist() == [[False, True, False], [True, False, False]]


@given(hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12)))
def test_masks_come_back(mask):
    np.testing.assert_array_equal(decode_mask(encode_mask(mask)), mask)


@pytest.mark.parametrize(
    "stored",
    [
        {}, {"size": [2, 2]}, {"size": [2], "counts": [4]}, {"size": [2, 2], "counts": "4"},
        {"size": [2, 2], "counts": [5]}, {"size": [2, 2], "counts": [-1, 5]},
        {"size": [0, 2], "counts": []}, {"size": [2, 2], "counts": [4.0]},
    ],
)  # fmt: skip
def test_runs_that_do_not_fill_the_mask_are_refused(stored):
    with pytest.raises(ValueError, match="mask: "):
        decode_mask(stored)


@given(st.sampled_from(list(COLOURS)), st.integers(0, 255))
def test_an_overlay_never_leaves_the_range(colour, level):
    image = np.full((3, 3, 3), level, np.uint8)
    got = overlay(image, np.ones((3, 3), bool), colour)
    wanted = 0.5 * level + 0.5 * np.array(COLOURS[colour])
    np.testing.assert_allclose(got[1, 1], wanted, atol=0.5001)
