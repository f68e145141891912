import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gear_jax.data.patch_windows import patch_windows
from gear_jax.towers.qwen_vision import (
    QwenVision,
    QwenVisionConfig,
    window_patches,
    windows_to_raster,
)

CFG = QwenVisionConfig(
    depth=2, width=16, num_heads=2, mlp_dim=24, full_attention_layers=(1,), window_size=56
)


@pytest.fixture(scope="module")
def params():
    patches = jnp.zeros((1, 1, 16, CFG.patch_dim))
    return QwenVision(CFG).init(jax.random.key(0), patches, jnp.zeros((1, 1, 16, 2), jnp.int32))


def _pixel_rows(image):
    """One image as the reference lays out its patches: merge-block order, two equal frames."""
    x = (image / np.float32(255) - np.float32(CFG.image_mean)) / np.float32(CFG.image_std)
    rows, columns = image.shape[0] // 14, image.shape[1] // 14
    x = x.transpose(2, 0, 1).reshape(3, rows // 2, 2, 14, columns // 2, 2, 14)
    x = x.transpose(1, 4, 2, 5, 0, 3, 6)
    x = np.stack([x, x], axis=5)
    return x.reshape(rows * columns, -1).astype(np.float32), (1, rows, columns)


def test_the_reshaped_path_equals_the_packed_one(params):
    images = np.random.default_rng(0).integers(0, 256, (2, 112, 56, 3), dtype=np.uint8)
    patches, positions = window_patches(images, CFG)
    assert patches.shape == (2, 2, 16, CFG.patch_dim // 2)
    static, _ = QwenVision(CFG).apply(params, patches, positions)
    rows, grids = zip(*(_pixel_rows(image) for image in images), strict=True)
    layout = patch_windows(grids, window=CFG.window, num_windows=7)
    packed, _ = QwenVision(CFG).apply(
        params,
        layout.gather(np.concatenate(rows))[None],
        layout.positions[None],
        layout.segments[None],
    )
    np.testing.assert_allclose(packed[0, :4].reshape(static.shape), static, atol=2e-5)


def test_neither_empty_slots_nor_other_images_are_seen(params):
    rng = np.random.default_rng(1)
    grids = [(1, 4, 6), (2, 4, 4)]
    layout = patch_windows(grids, window=CFG.window)
    pixels = rng.standard_normal((56, CFG.patch_dim)).astype(np.float32)
    patches = layout.gather(pixels)
    inputs = layout.positions[None], layout.segments[None]
    apply = jax.jit(lambda patches: QwenVision(CFG).apply(params, patches[None], *inputs)[0][0])
    before = apply(patches)
    for changed in (-1, 0, 1, 2):  # empty slots, the image, either frame of the video
        noise = np.where(
            (layout.segments == changed)[..., None], rng.standard_normal(patches.shape), 0
        )
        moved = np.any(np.asarray(apply(patches + noise.astype(np.float32))) != before, axis=-1)
        assert np.array_equal(moved, layout.segments == changed)


def test_only_full_attention_layers_see_beyond_a_window(params):
    images = np.zeros((1, 112, 56, 3), np.uint8)
    changed = images.copy()
    changed[:, :56] = 255  # the upper window
    _, taps = QwenVision(CFG).apply(params, *window_patches(images, CFG), taps=(0, 1))
    _, other = QwenVision(CFG).apply(params, *window_patches(changed, CFG), taps=(0, 1))
    moved = np.any(np.asarray(taps) != np.asarray(other), axis=(1, 3, 4))
    assert moved.tolist() == [[True, False], [True, True]]


def test_merged_tokens_return_to_raster_order():
    merged = jnp.arange(8).reshape(1, 2, 4, 1)  # two windows of 2 x 2 side by side
    raster = windows_to_raster(merged, 4, CFG)
    assert raster[0, :, 0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_sides_that_are_no_multiple_of_the_window_are_refused():
    with pytest.raises(
        ValueError, match="images of 112 x 84 px do not split into windows of 56 px"
    ):
        window_patches(np.zeros((1, 112, 84, 3), np.uint8), CFG)
