import numpy as np
import pytest

from gear_jax.data.mrope import IMAGE, TEXT, VIDEO
from gear_jax.data.vlm_batch import vlm_batch

I, V, _ = IMAGE, VIDEO, TEXT  # noqa: E741


def _call(types, images=None, videos=None):
    types = np.array(types)
    tokens, valid = np.arange(types.size).reshape(types.shape), types >= 0
    positions = np.zeros((3, *types.shape), int)
    return vlm_batch(tokens, types, valid, positions, images, videos, window=1)


def _media(*grids):
    count = sum(t * h * w for t, h, w in grids)
    return np.arange(1, count + 1, dtype=np.float32)[:, None], np.array(grids)


def test_each_row_gets_the_patches_of_its_own_images():
    batch = _call([[_, I, I, _], [I, _, -1, -1]], images=_media((1, 2, 4), (1, 2, 2)))
    visual = batch["visual"]
    assert visual["patches"][..., 0].tolist() == [
        [[1, 2, 3, 4], [5, 6, 7, 8]],
        [[9, 10, 11, 12], [0] * 4],
    ]
    assert visual["segments"][:, :, 0].tolist() == [[0, 0], [0, -1]]
    assert batch["insert_index"].tolist() == [[-1, 0, 1, -1], [0, -1, -1, -1]]
    assert batch["segments"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_images_and_videos_of_a_row_keep_their_own_tokens():
    batch = _call([[V, V, I, _]], images=_media((1, 2, 2)), videos=_media((2, 2, 2)))
    # images lie first, whatever the order of the tokens
    assert batch["insert_index"].tolist() == [[1, 2, 0, -1]]
    assert batch["visual"]["segments"][0, :, 0].tolist() == [0, 1, 2]


def test_text_alone_has_no_visual_part():
    assert set(_call([[_, _]])) == {"tokens", "positions", "segments"}


@pytest.mark.parametrize(
    ("types", "grids", "message"),
    [
        ([[I, I, I]], [(1, 2, 4)], r"row 0 has 3 image tokens, but the next image grids .* give 2"),
        ([[I]], [(1, 2, 4)], r"row 0 has 1 image tokens, but .* \[\[1, 2, 4\]\] give 2"),
        ([[I]], [(1, 2, 2), (1, 2, 2)], "1 image grids and 4 patches belong to no row"),
    ],
)
def test_tokens_and_grids_must_agree(types, grids, message):
    with pytest.raises(ValueError, match=message):
        _call(types, images=_media(*grids))
