import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gear_jax.systems import latents
from gear_jax.systems.latents import LatentLossConfig
from gear_jax.towers.latent_action import LatentActionConfig, LatentEncoder, patches, pixel_targets

CFG = LatentActionConfig(
    image_size=16, patch_size=8, width=32, num_heads=2, mlp_dim=48, encoder_depth=2, query_depth=1,
    decoder_depth=2, code_dim=6,
)  # fmt: skip
CONFIG = LatentLossConfig()


def _frames(num=3, seed=0):
    return jax.random.uniform(jax.random.key(seed), (num, 6, 16, 16, 3), minval=-1, maxval=1)


@pytest.fixture(scope="module")
def made():
    params, codebook = latents.init(CFG, jax.random.key(0))
    # the decoder starts at zero change: move it, or nothing it does could be seen
    head = params["decoder"]["to_target"]
    head["kernel"] = 0.1 * jax.random.normal(jax.random.key(9), head["kernel"].shape)
    return params, codebook


@pytest.fixture(scope="module")
def encode():
    return jax.jit(
        lambda params, frames: LatentEncoder(CFG).apply({"params": params["encoder"]}, frames)[1]
    )


@pytest.mark.parametrize("frame", range(6))
def test_e11_latents_of_transitions_that_end_before_a_frame_do_not_see_it(made, encode, frame):
    frames = _frames()
    before = encode(made[0], frames)
    after = encode(made[0], frames.at[:, frame].set(-0.3))
    changed = np.asarray((before != after).any(axis=(0, 2, 3)))
    # transition i ends at frame i + 1
    assert changed.tolist() == [i + 1 >= frame for i in range(5)]


def test_an_adjacent_window_sees_its_past_through_the_encoder_only(made):
    assert dataclasses.replace(CFG, window="adjacent").visible_frames().tolist() == [
        [1, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]  # fmt: skip
    assert CFG.visible_frames()[1].tolist() == [1, 1, 1, 0, 0, 0]
    lapa = dataclasses.replace(CFG, mode="lapa")
    assert lapa.visible_frames().tolist() == [[1, 0, 0, 0, 0, 1]]
    assert (lapa.num_transitions, lapa.targets().tolist()) == (1, [5])


def test_a_frame_to_come_is_decoded_from_the_first_and_from_codes_up_to_it(made):
    params, _ = made
    rng = jax.random.key(1)
    first = jax.random.normal(rng, (2, 4, 32))
    base = patches(_frames(2)[:, 0], 8)
    codes = jax.random.normal(rng, (2, 5, 4, 6))
    decode = jax.jit(lambda c: latents.decode(params, CFG, first, base, c))
    before, after = decode(codes), decode(codes.at[:, 2].add(1.0))
    changed = np.asarray((before != after).any(axis=(0, 2, 3)))
    assert changed.tolist() == [False, False, True, True, True]


def test_a_coarse_target_is_the_mean_of_squares_of_pixels():
    cfg = dataclasses.replace(CFG, target_pool=4)
    frames = np.asarray(_frames(2))
    made = np.asarray(pixel_targets(cfg, frames))
    assert made.shape == (2, 6, 4, cfg.output_dim) == (2, 6, 4, 12)
    for patch, square in ((0, 0), (1, 3), (3, 2)):  # row by row, in patches and within
        (row, column), (down, right) = divmod(patch, 2), divmod(square, 2)
        top, left = 8 * row + 4 * down, 8 * column + 4 * right
        mean = frames[:, :, top : top + 4, left : left + 4].mean(axis=(2, 3))
        found = made[:, :, patch, 3 * square : 3 * square + 3]
        np.testing.assert_allclose(found, mean, atol=1e-6)
    np.testing.assert_array_equal(pixel_targets(CFG, frames), patches(frames, 8))


def test_a_tokenizer_of_coarse_targets_learns_and_is_measured_on_them():
    cfg = dataclasses.replace(CFG, target_pool=4)
    params, codebook = latents.init(cfg, jax.random.key(0))
    mask = jnp.ones((3, 5), bool)
    value, _ = latents.loss(params, cfg, codebook, _frames(), mask, CONFIG, jax.random.key(1))
    assert np.isfinite(value)
    sums = latents.measure(params, cfg, codebook, _frames(), mask)
    assert latents.summary(sums)["reconstruction"] == pytest.approx(1, abs=0.05)  # it copies


def test_at_the_start_the_decoder_copies_the_first_frame():
    params, codebook = latents.init(CFG, jax.random.key(3))
    mask = jnp.ones((3, 5), bool)
    _, (_, metrics) = latents.loss(
        params, CFG, codebook, _frames(), mask, CONFIG, jax.random.key(0)
    )
    assert float(metrics["reconstruction"]) == 1.0


def test_each_place_chooses_from_its_group():
    codebook = latents.init_codebook(CFG, jax.random.key(0))
    z = codebook["codes"][jnp.array([0, 0, 1, 1]), jnp.array([3, 7, 0, 5])]
    ids, codes, _ = latents.quantize(CFG, codebook, 2.5 * z[None, None])
    assert ids.tolist() == [[[3, 7, 8, 13]]]
    np.testing.assert_allclose(codes[0, 0], z, atol=1e-6)
    legal = latents.legal_ids(CFG)
    assert legal.shape == (20, 16)
    assert legal[0].tolist() == [True] * 8 + [False] * 8
    assert legal[2].tolist() == [False] * 8 + [True] * 8
    random, _, _ = latents.quantize(
        CFG, codebook, jax.random.normal(jax.random.key(1), (9, 5, 4, 6))
    )
    assert legal[np.arange(20)[None], np.asarray(random).reshape(9, 20)].all()


def test_fsq_has_no_codebook_and_eight_codes():
    cfg = dataclasses.replace(CFG, quantizer="fsq")
    z = jnp.array([[-1, -1, -1], [1, -1, -1], [-1, 1, -1], [1, 1, 1.0]])
    ids, codes, _ = latents.quantize(cfg, {}, z[None])
    assert ids.tolist() == [[0, 1, 8 + 2, 8 + 7]]
    np.testing.assert_allclose(codes[0], np.sign(z), atol=1e-6)
    params, codebook = latents.init(cfg, jax.random.key(0))
    assert sorted(codebook) == ["mean", "steps", "var", "weight"]
    assert latents.encode(params, cfg, codebook, _frames()).shape == (3, 5, 4)


def test_gradients_reach_every_parameter_and_go_straight_through_the_codes(made):
    params, codebook = made
    mask = jnp.ones((3, 5), bool)

    def objective(params):
        return latents.loss(params, CFG, codebook, _frames(), mask, CONFIG, jax.random.key(0))[0]

    grads = jax.jit(jax.grad(objective))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert bool(jnp.any(leaf != 0)), jax.tree_util.keystr(path)


def test_what_is_masked_teaches_nothing(made):
    params, codebook = made
    mask = jnp.ones((3, 5), bool).at[:, 3:].set(False)

    def objective(frames):
        return latents.loss(params, CFG, codebook, frames, mask, CONFIG, jax.random.key(0))[0]

    frames = _frames()
    value = jax.jit(objective)
    assert float(value(frames)) == float(value(frames.at[:, 4:].set(0.5)))


def test_the_codebook_is_the_moving_average_of_what_chose_it():
    config = LatentLossConfig(decay=0.9)
    codebook = latents.init_codebook(CFG, jax.random.key(0))
    z = latents._unit(jax.random.normal(jax.random.key(1), (4, 5, 4, 6)))
    ids, _, _ = latents.quantize(CFG, codebook, z)
    mask = jnp.ones((4, 5), bool).at[0, 2].set(False)
    after = latents.update_codebook(CFG, config, codebook, ids, z, mask, jax.random.key(2))
    for group, places in ((0, (0, 1)), (1, (2, 3))):
        for code in range(8):
            rows = [np.asarray(z[b, t, c]) for b in range(4) for t in range(5) for c in places
                    if mask[b, t] and int(ids[b, t, c]) == 8 * group + code]  # fmt: skip
            total = 0.9 * codebook["sum"][group, code] + 0.1 * np.sum(rows, axis=0)
            np.testing.assert_allclose(after["sum"][group, code], total, atol=1e-6)
            np.testing.assert_allclose(
                after["count"][group, code], 0.9 + 0.1 * len(rows), atol=1e-6
            )
            wanted = total / np.linalg.norm(total)
            np.testing.assert_allclose(after["codes"][group, code], wanted, atol=1e-5)


def test_a_code_that_nobody_chooses_restarts_at_a_vector_of_the_batch():
    config = LatentLossConfig(decay=0.5, restart_steps=3)
    codebook = latents.init_codebook(CFG, jax.random.key(0))
    one = latents._unit(jax.random.normal(jax.random.key(1), (6,)))
    z = jnp.broadcast_to(one, (4, 5, 4, 6))
    mask = jnp.ones((4, 5), bool)
    update = jax.jit(
        lambda state, key: latents.update_codebook(
            CFG, config, state, latents.quantize(CFG, state, z)[0], z, mask, key
        )
    )
    dead = dataclasses.replace(config, restart_steps=0)
    state = codebook
    for step in range(12):
        state = update(state, jax.random.key(step))
    near = jnp.einsum("gkd,d->gk", state["codes"], one)
    assert bool((near > 0.999).all())
    state = codebook
    for step in range(12):
        ids = latents.quantize(CFG, state, z)[0]
        state = latents.update_codebook(CFG, dead, state, ids, z, mask, jax.random.key(step))
    assert int((jnp.einsum("gkd,d->gk", state["codes"], one) > 0.999).sum()) == 2


def test_the_codebook_is_the_same_on_one_device_and_on_eight(made):
    params, codebook = made
    frames, mask = _frames(8), jnp.ones((8, 5), bool)

    def step(frames):
        rng = jax.random.key(0)
        _, (state, _) = latents.loss(params, CFG, codebook, frames, mask, CONFIG, rng)
        return latents.encode(params, CFG, codebook, frames), state

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    one = jax.jit(step)(frames)
    eight = jax.jit(step)(jax.device_put(frames, spread))
    np.testing.assert_array_equal(one[0], eight[0])
    for key, value in one[1].items():
        np.testing.assert_allclose(value, eight[1][key], atol=1e-5)
    single = jnp.concatenate([latents.encode(params, CFG, codebook, frames[i : i + 1])
                              for i in range(8)])  # fmt: skip
    np.testing.assert_array_equal(one[0], single)


def test_usage_tells_a_collapsed_group():
    ids = jnp.stack([jnp.arange(8), jnp.arange(8), jnp.full(8, 8), jnp.full(8, 8)], axis=-1)[
        :, None
    ]
    seen = latents.usage(latents.counts(CFG, ids, jnp.ones((8, 1), bool)))
    np.testing.assert_allclose(seen["perplexity"], [8.0, 1.0], rtol=1e-5)
    np.testing.assert_allclose(seen["entropy"], [3.0, 0.0], atol=1e-5)
    assert seen["used"].tolist() == [8, 1]
    half = latents.usage(latents.counts(CFG, ids, jnp.arange(8)[:, None] < 4))
    np.testing.assert_allclose(half["perplexity"], [4.0, 1.0], rtol=1e-5)


def test_latents_are_standardised_by_their_moving_averages_and_masked_ones_do_not_count():
    codebook = latents.init_codebook(CFG, jax.random.key(0))
    z = 3 + 2 * jax.random.normal(jax.random.key(1), (64, 5, 4, 6))
    mask = jnp.ones((64, 5), bool).at[0].set(False)
    np.testing.assert_array_equal(latents.standardize(codebook, z), z)
    for _ in range(3):
        moments = latents._moments(z.at[0].set(1e6), mask)
        codebook |= latents._averaged(codebook, *moments, 0.9)
    out = np.asarray(latents.standardize(codebook, z))[1:]
    np.testing.assert_allclose(out.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(out.std(axis=0), 1, atol=1e-4)


def test_monitors_of_two_batches_are_those_of_both_together(made):
    params, codebook = made
    frames, mask = _frames(4), jnp.ones((4, 5), bool).at[3, 2:].set(False)
    measure = jax.jit(lambda f, m: latents.measure(params, CFG, codebook, f, m))
    whole = measure(frames, mask)
    halves = jax.tree.map(jnp.add, measure(frames[:2], mask[:2]), measure(frames[2:], mask[2:]))
    for key in ("number", "error", "copied", "counts"):
        np.testing.assert_allclose(whole[key], halves[key], rtol=1e-5)
    seen = latents.summary(whole)
    ratio = whole["error"] / whole["copied"]
    np.testing.assert_allclose(seen["reconstruction"], ratio, rtol=1e-5)
    np.testing.assert_allclose(seen["gain_db"], -10 * np.log10(ratio), rtol=1e-5)
    # codes that the decoder does not read cannot be missed
    deaf = jax.tree.map(jnp.zeros_like, params["decoder"]["from_codes"])
    silent = params | {"decoder": params["decoder"] | {"from_codes": deaf}}
    seen = latents.summary(latents.measure(silent, CFG, codebook, frames, mask))
    np.testing.assert_allclose(seen["shuffled"], 1.0, rtol=1e-6)


def test_choices_that_make_no_sense_are_refused():
    for changes, sentence in [
        ({"window": "all"}, "window is 'all', expected one of"),
        ({"mode": "x"}, "mode is 'x'"),
        ({"quantizer": "vq"}, "quantizer is 'vq'"),
        ({"group_pattern": (0, 1)}, "expected 4 entries"),
        ({"group_pattern": (0, 0, 2, 2)}, "expected groups 0, 1"),
        ({"image_size": 17}, "image_size must be patches"),
        ({"quantizer": "fsq", "codes_per_group": 6}, "a power of two codes"),
        ({"num_frames": 1}, "num_frames is 1"),
        ({"target_pool": 3}, "target_pool is 3, expected a divisor of 8"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            dataclasses.replace(CFG, **changes)


def test_quantisation_commitment_and_entropy_are_faded_in(made):
    params, codebook = made
    mask = jnp.ones((3, 5), bool)

    @jax.jit
    def run(steps):
        config = dataclasses.replace(CONFIG, fade_steps=10, entropy=0.0)
        state = codebook | {"steps": steps}
        return latents.loss(params, CFG, state, _frames(), mask, config, jax.random.key(0))

    total, (state, metrics) = run(0.0)
    assert float(total) == float(metrics["reconstruction"])
    assert float(state["steps"]) == 1.0
    total, (_, half) = run(5.0)
    wanted = half["reconstruction"] + 0.5 * CONFIG.commitment * half["commitment"]
    np.testing.assert_allclose(total, wanted, rtol=1e-6)
    hard = dataclasses.replace(CONFIG, entropy=0.0)
    plain = latents.loss(params, CFG, codebook, _frames(), mask, hard, jax.random.key(0))
    np.testing.assert_allclose(run(10.0)[0], plain[0], rtol=1e-6)
    assert float(metrics["reconstruction"]) != float(plain[1][1]["reconstruction"])
