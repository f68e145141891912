import numpy as np
import pytest

from gear_jax.data.mrope import IMAGE, TEXT, VIDEO, mrope_positions, token_types

I, V, _ = IMAGE, VIDEO, TEXT  # noqa: E741
NONE = np.zeros((0, 3), int)


def _call(types, images=NONE, videos=NONE, **options):
    types = np.array(types)
    valid = types >= 0
    return mrope_positions(np.where(valid, types, TEXT), valid, images, videos, **options)


def test_pads_tell_what_a_token_stands_for():
    assert token_types(np.array([[7, 5, 5, 6, 7]]), 5, 6).tolist() == [[_, I, I, V, _]]


def test_an_image_spreads_over_its_grid_and_text_goes_on_after_its_longer_side():
    positions, delta = _call([[_, _, I, I, I, I, I, I, _]], [(1, 4, 6)])
    assert positions[:, 0].tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 2, 2, 3, 3, 3, 5],
        [0, 1, 2, 3, 4, 2, 3, 4, 5],
    ]
    assert delta.tolist() == [-3]


def test_padding_on_either_side_moves_nothing():
    left, delta_left = _call([[-1, -1, _, I, _]], [(1, 2, 2)])
    right, delta_right = _call([[_, I, _, -1, -1]], [(1, 2, 2)])
    np.testing.assert_array_equal(left[:, 0, 2:], right[:, 0, :3])
    assert delta_left.tolist() == delta_right.tolist() == [0]


def test_two_images_side_by_side_are_told_apart_by_their_grids():
    positions, _delta = _call([[I, I, I]], [(1, 2, 4), (1, 2, 2)])
    assert positions[:, 0].tolist() == [[0, 0, 2], [0, 0, 2], [0, 1, 2]]


def test_video_time_counts_seconds():
    options = {"tokens_per_second": 2.0, "seconds_per_grid": [1.25]}
    positions, _delta = _call([[_, V, V, V, _]], videos=[(3, 2, 2)], **options)
    # floor(frame * 2.5); afterwards the longer side counts, not the time
    assert positions[0, 0].tolist() == [0, 1, 3, 6, 2]


def test_positions_are_those_of_the_reference(golden):
    for path in sorted(golden.glob("qwen2_5_vl_tiny*/case_*.npz")):
        stored = np.load(path)
        valid = stored["attention_mask"].astype(bool)
        positions, delta = mrope_positions(
            stored["mm_token_type_ids"],
            valid,
            stored.get("image_grid_thw", NONE),
            stored.get("video_grid_thw", NONE),
            tokens_per_second=2.0,
            seconds_per_grid=stored.get("second_per_grid_ts", None),
        )
        assert np.array_equal(positions[:, valid], stored["position_ids"][:, valid]), path.name
        assert np.array_equal(delta[:, None], stored["rope_deltas"]), path.name


@pytest.mark.parametrize(
    ("types", "grids", "message"),
    [
        ([[I, _]], [(1, 4, 4)], "row 0 has 1 image tokens where its next grid gives 4"),
        ([[_], [I]], [], "row 1 has 1 image tokens left, expected 0: no image grid"),
        ([[_]], [(1, 2, 2)], "1 image grids belong to no row"),
        ([[I, I]], [(1, 2, 2)], "row 0 has 1 image tokens left, expected 0: no image grid"),
    ],
)
def test_tokens_and_grids_must_agree(types, grids, message):
    with pytest.raises(ValueError, match=message):
        _call(types, grids)


@pytest.mark.parametrize("grid", [(1, 3, 4), (1, 1, 1), (0, 2, 2)])
def test_grids_that_do_not_merge_are_refused(grid):
    with pytest.raises(ValueError, match=r"image grid is \[.*\]: expected .* multiples of 2"):
        _call([[I, _]], [grid, (1, 2, 2)])


def test_unknown_token_types_and_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="row 1 has token type 3: expected 0 for text"):
        _call([[_, _], [_, 3]])
    with pytest.raises(ValueError, match=r"token_types is \[1, 3\] and valid \[1, 2\]"):
        mrope_positions(np.zeros((1, 3), int), np.ones((1, 2), bool), NONE, NONE)


def test_a_row_of_padding_alone_has_no_positions():
    positions, delta = _call([[-1, -1]])
    assert positions.tolist() == [[[0, 0]]] * 3
    assert delta.tolist() == [0]


def test_videos_need_their_seconds():
    with pytest.raises(ValueError, match="1 videos but 0 seconds_per_grid"):
        _call([[V]], videos=[(1, 2, 2)])
