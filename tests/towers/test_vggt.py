import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gear_jax.towers.dinov2 import Dinov2Config, resize_pos_embed
from gear_jax.towers.vggt import Vggt, VggtConfig

CFG = VggtConfig(depth=2, width=16, num_heads=2, mlp_dim=24, dino=None)
IMAGES = np.random.default_rng(0).random((2, 3, 28, 42, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    made = Vggt(CFG).init(jax.random.key(0), IMAGES)
    # LayerScale starts at 0.01: turn it up, so that what should not mix would show
    return jax.tree.map(lambda x: x + 0.5 if x.ndim == 2 and x.shape == (2, 16) else x, made)


def test_absent_views_are_invisible_to_the_others(params):
    scenes = jnp.asarray([[0, 0, -1], [0, -1, 0]])
    apply = jax.jit(lambda images, scenes: Vggt(CFG).apply(params, images, scenes)[0])
    before = apply(IMAGES, scenes)
    noise = np.where(np.asarray(scenes)[..., None, None, None] < 0, 1, 0).astype(np.float32)
    after = apply(IMAGES + noise, scenes)
    real = np.asarray(scenes) >= 0
    np.testing.assert_array_equal(np.asarray(after)[real], np.asarray(before)[real])
    assert np.all(np.isfinite(after))
    assert np.any(np.asarray(after)[~real] != np.asarray(before)[~real])


def test_e5_a_scene_with_absent_views_equals_the_scene_without_them(params):
    scenes = jnp.asarray([[0, -1, -1], [0, -1, -1]])
    masked = Vggt(CFG).apply(params, IMAGES, scenes)[0, :, :1]
    alone = Vggt(CFG).apply(params, IMAGES[:, :1])[0]
    np.testing.assert_allclose(masked, alone, atol=1e-5)


def test_views_of_other_scenes_are_as_if_each_scene_came_alone(params):
    scenes = jnp.asarray([[0, 1, 2], [0, 1, 0]])
    made = Vggt(CFG).apply(params, IMAGES, scenes)[0]
    for row, views in ((0, [0]), (0, [1]), (0, [2]), (1, [0, 2]), (1, [1])):
        alone = Vggt(CFG).apply(params, IMAGES[row : row + 1, views])[0, 0]
        np.testing.assert_allclose(made[row, np.array(views)], alone, atol=1e-5)


def test_taps_count_from_either_end_and_the_default_is_the_last(params):
    every = Vggt(CFG).apply(params, IMAGES, taps=(0, 1))
    assert every.shape == (2, 2, 3, 5 + 6, 32)
    np.testing.assert_array_equal(Vggt(CFG).apply(params, IMAGES)[0], every[1])
    np.testing.assert_array_equal(Vggt(CFG).apply(params, IMAGES, taps=(-2,))[0], every[0])
    with pytest.raises(ValueError, match=r"taps \[2\] are no layers"):
        Vggt(CFG).apply(params, IMAGES, taps=(2,))


def test_the_first_view_has_camera_and_register_tokens_of_its_own(params):
    same = np.stack([IMAGES[:, 0]] * 3, axis=1)
    large = jax.tree.map(lambda x: x * 1e6 if x.ndim == 3 and x.shape[0] == 2 else x, params)
    out = Vggt(CFG).apply(large, same)[0]
    np.testing.assert_allclose(out[:, 1], out[:, 2], atol=1e-5)
    assert np.abs(out[:, 0] - out[:, 1]).max() > 0.1


def test_dino_patches_enter_in_row_order():
    dino = Dinov2Config(depth=1, width=16, num_heads=2, mlp_dim=24, pos_embed_grid=3)
    cfg = dataclasses.replace(CFG, dino=dino)
    shapes = jax.eval_shape(lambda: Vggt(cfg).init_with_output(jax.random.key(0), IMAGES))
    assert shapes[0].shape == (1, 2, 3, 5 + 6, 32)


def test_position_embeddings_are_kept_when_the_grid_fits_and_resized_when_not():
    table = jnp.asarray(np.random.default_rng(1).standard_normal((1 + 16, 3)), jnp.float32)
    np.testing.assert_array_equal(resize_pos_embed(table, 4, 4), table)
    constant = jnp.concatenate([table[:1], jnp.full((16, 3), 2.5)])
    resized = resize_pos_embed(constant, 2, 7)
    np.testing.assert_array_equal(resized[0], table[0])
    np.testing.assert_allclose(resized[1:], 2.5, rtol=1e-6)


def test_sides_that_are_no_multiple_of_a_patch_are_refused(params):
    with pytest.raises(ValueError, match="images of 28 x 40 px do not split into patches of 14 px"):
        Vggt(CFG).apply(params, IMAGES[:, :, :, :40])


def test_dino_places_begin_as_wide_as_the_config_says():
    def made(**changes):
        dino = Dinov2Config(depth=1, width=64, num_heads=2, mlp_dim=64, pos_embed_grid=8, **changes)
        cfg = dataclasses.replace(CFG, width=64, dino=dino)
        tree = Vggt(cfg).init(jax.random.key(0), jnp.zeros((1, 1, 14, 14, 3)))["params"]
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    plain, wide = made(), made(pos_embed_std=0.5)
    changed = [name for name in plain if not np.array_equal(plain[name], wide[name])]
    assert changed
    for name in changed:
        assert "pos_embed" in name
        assert np.std(plain[name]) == pytest.approx(0.02, rel=0.1)
        np.testing.assert_allclose(wide[name], 25 * plain[name], rtol=1e-5)
