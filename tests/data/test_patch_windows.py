import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gear_jax.data.patch_windows import EMPTY, patch_windows


def test_a_border_window_is_filled_with_empty_slots():
    # 2 x 3 merged units of one patch each, windows of 2 x 2 units
    layout = patch_windows([(1, 2, 3)], window=2, merge=1)
    assert layout.source.tolist() == [[0, 1, 3, 4], [2, 5, EMPTY, EMPTY]]
    assert layout.segments.tolist() == [[0, 0, 0, 0], [0, 0, EMPTY, EMPTY]]
    assert layout.positions[0].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert layout.positions[1, :2].tolist() == [[0, 2], [1, 2]]
    assert layout.tokens.tolist() == [0, 1, 4, 2, 3, 5]


def test_patches_of_a_unit_stay_together_and_frames_are_segments():
    layout = patch_windows([(2, 2, 2), (1, 2, 4)], window=1, merge=2)
    assert layout.source.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert layout.segments[:, 0].tolist() == [0, 1, 2, 2]
    assert layout.positions[3].tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]


@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3
    ),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_every_patch_has_one_slot_and_every_token_its_unit(grids, window, extra):
    grids = [(t, 2 * h, 2 * w) for t, h, w in grids]
    count = sum(t * h * w for t, h, w in grids)
    least = len(patch_windows(grids, window=window).source)
    layout = patch_windows(grids, window=window, num_windows=least + extra)
    filled = layout.source[layout.source != EMPTY]
    assert sorted(filled.tolist()) == list(range(count))
    assert np.array_equal(layout.source == EMPTY, layout.segments == EMPTY)
    # token m is the unit that the reference's raster order puts m-th: patches 4m .. 4m+3
    units = layout.source.reshape(-1, 4)[layout.tokens]
    assert np.array_equal(units, np.arange(count).reshape(-1, 4))
    pixels = np.arange(count, dtype=np.float32)[:, None] + 1
    gathered = layout.gather(pixels)
    assert np.array_equal(gathered[..., 0] == 0, layout.source == EMPTY)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="grid 1 is 1 x 3 x 4 patches: expected positive ones"):
        patch_windows([(1, 2, 2), (1, 3, 4)], window=2)
    with pytest.raises(ValueError, match="images need 2 windows, num_windows is 1"):
        patch_windows([(1, 4, 8)], window=2, num_windows=1)


def test_no_image_is_an_empty_row():
    layout = patch_windows(np.zeros((0, 3), int), window=2)
    assert layout.source.shape == (0, 16)
    assert layout.tokens.shape == (0,)
