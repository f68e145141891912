"""The joined towers at the port proof's size."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import port_proof
from gear_jax.losses import next_token_loss
from gear_jax.porting import models
from gear_jax.systems import vlm
from gear_jax.train import sharding

CONFIG = port_proof.get_config().to_dict()
BATCH, VIEWS, SIDE = 4, 3, CONFIG["image_size"]


@pytest.fixture(scope="module")
def cfg():
    qwen = models.describe("qwen2_5_vl", CONFIG["qwen2_5_vl"]).cfg
    vggt = models.describe("vggt", CONFIG["vggt"]).cfg
    projector = dataclasses.replace(qwen.projector, geometry_width=2 * vggt.width)
    return dataclasses.replace(qwen, geometry=vggt, projector=projector)


@pytest.fixture(scope="module")
def params(cfg):
    return jax.jit(lambda: vlm.init(cfg, jax.random.key(0)))()


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    visual, length = VIEWS * (SIDE // 28) ** 2, VIEWS * (SIDE // 28) ** 2 + 8
    index = np.full((BATCH, length), -1, np.int32)
    index[:, 2 : 2 + visual] = np.arange(visual)
    return {
        "images": rng.integers(0, 256, (BATCH, VIEWS, SIDE, SIDE, 3), dtype=np.uint8),
        "scenes": np.array([[1, 1, 1], [1, 0, 1], [1, 1, 0], [1, 0, 0]], np.int32) - 1,
        "tokens": rng.integers(0, 400, (BATCH, length), dtype=np.int32),
        "positions": np.ascontiguousarray(
            np.broadcast_to(np.arange(length, dtype=np.int32), (3, BATCH, length))
        ),
        "segments": np.ones((BATCH, length), np.int32),
        "insert_index": index,
    }


def _logits(params, batch, cfg):
    inserts = vlm.view_embeddings(params, cfg, batch["images"], batch["scenes"])
    return vlm.logits(params, vlm.forward(params, cfg, batch, inserts)[0])


def _loss(params, batch, cfg):
    return next_token_loss(_logits(params, batch, cfg), batch["tokens"])


def test_e3_the_3d_branch_is_bitwise_invisible_at_the_start(params, batch, cfg):
    flat = dataclasses.replace(cfg, geometry=None)
    with_branch = jax.jit(_logits, static_argnums=2)(params, batch, cfg)
    without = jax.jit(_logits, static_argnums=2)(params, batch, flat)
    np.testing.assert_array_equal(with_branch, without)


def test_vggt_gets_no_gradient_at_step_0_and_some_in_every_leaf_at_step_1(params, batch, cfg):
    gradient = jax.jit(jax.grad(_loss), static_argnums=2)
    first = gradient(params, batch, cfg)
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(first["geometry"]))
    assert np.any(np.asarray(first["projector"]["geometry_kernel"]) != 0)
    updates, _ = optax.sgd(0.1).update(first, optax.sgd(0.1).init(params))
    second = gradient(optax.apply_updates(params, updates), batch, cfg)
    silent = [
        jax.tree_util.keystr(path)
        for path, x in jax.tree_util.tree_leaves_with_path(second["geometry"])
        if not np.any(np.asarray(x) != 0)
    ]
    assert silent == []


def test_eight_devices_equal_one_on_forward_and_gradients(params, batch, cfg):
    mesh = sharding.make_mesh(CONFIG["mesh"])
    # the zero block would hide the 3D branch
    rng = jax.random.key(1)
    kernel = 0.02 * jax.random.normal(rng, params["projector"]["geometry_kernel"].shape)
    params = params | {"projector": params["projector"] | {"geometry_kernel": kernel}}

    def both(params, batch):
        gradients = jax.grad(_loss)(params, batch, cfg)
        return _logits(params, batch, cfg), gradients

    alone = jax.jit(both)(params, batch)
    placed = jax.device_put(params, sharding.param_shardings(params, mesh))
    by_batch, by_second = (
        sharding.batch_sharding(mesh),
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, sharding.BATCH_AXES)),
    )
    split = {
        key: jax.device_put(x, by_second if key == "positions" else by_batch)
        for key, x in batch.items()
    }
    together = jax.jit(both)(placed, split)
    for tree in (
        placed,
        together[1],
    ):  # neither parameters nor gradients are copied to every device
        gate = tree["language"]["layers"]["gate"]["kernel"]
        assert {shard.data.shape for shard in gate.addressable_shards} == {(4, 32, 48)}
    np.testing.assert_allclose(together[0], alone[0], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), together[1], alone[1])


def test_absent_views_change_nothing_that_real_tokens_say(params, batch, cfg):
    noisy = batch["images"].copy()
    noisy[batch["scenes"] < 0] = 7
    # what the language tower sees of absent views is decided by the sequence; here: nothing
    segments, real = (
        batch["segments"].copy(),
        np.repeat(batch["scenes"] >= 0, (SIDE // 28) ** 2, axis=1),
    )
    segments[:, 2 : 2 + real.shape[1]] = np.where(real, 1, 0)
    run = jax.jit(_logits, static_argnums=2)
    quiet = batch | {"segments": segments}
    before, after = run(params, quiet, cfg), run(params, quiet | {"images": noisy}, cfg)
    np.testing.assert_array_equal(
        np.asarray(before)[segments == 1], np.asarray(after)[segments == 1]
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_is_the_argmax_of_the_whole_sequence_whatever_the_padding(params, cfg, side):
    plain = dataclasses.replace(cfg, geometry=None)
    prompts, new = [[5, 6, 7, 8, 9], [10, 11, 12]], 4
    expected = []
    run = jax.jit(lambda params, batch: vlm.logits(params, vlm.forward(params, plain, batch)[0]))
    for prompt in prompts:
        row = list(prompt)
        for _ in range(new):
            padded = np.array([row + [0] * (9 - len(row))], np.int32)
            scores = run(params, _text(padded, np.arange(9)[None] < len(row)))
            row.append(int(np.argmax(scores[0, len(row) - 1])))
        expected.append(row[len(prompt) :])
    valid = np.array(
        [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1] if side == "left" else [1, 1, 1, 0, 0]], bool
    )
    tokens = np.zeros((2, 5), np.int32)
    tokens[valid] = prompts[0] + prompts[1]
    generate = jax.jit(
        vlm.generate,
        static_argnums=1,
        static_argnames=("max_new_tokens", "stop_tokens", "vocab_used"),
    )
    ours, _ = generate(params, plain, _text(tokens, valid), max_new_tokens=new)
    assert ours.tolist() == expected
    stop = expected[0][1]
    stopped, _ = generate(
        params, plain, _text(tokens, valid), max_new_tokens=new, stop_tokens=(stop, 1)
    )
    assert stopped[0].tolist() == [expected[0][0], stop, stop, stop]
    used = max(map(max, expected))  # the greatest of them is no token
    kept, _ = generate(params, plain, _text(tokens, valid), max_new_tokens=new, vocab_used=used)
    assert int(kept.max()) < used


def _text(tokens, valid):
    positions = np.maximum(np.cumsum(valid, axis=1) - 1, 0)
    return {
        "tokens": jnp.asarray(tokens),
        "positions": jnp.asarray(np.stack([positions] * 3), jnp.int32),
        "segments": jnp.asarray(valid, jnp.int32),
    }


def test_decoding_goes_on_from_the_last_token_even_after_a_video_that_ran_ahead(params, cfg):
    plain = dataclasses.replace(cfg, geometry=None)
    prompt = np.array([[5, 6, 7, 8, 9]], np.int32)
    places = [0, 1, 30, 2, 3]  # the third token's time axis is far ahead of the text after it

    def batch(tokens, positions):
        ahead = np.array(positions, np.int32)[None, None]
        text = np.where(ahead == 30, 1, ahead)
        return _text(tokens, np.ones(tokens.shape, bool)) | {
            "positions": jnp.asarray(np.concatenate([ahead, text, text]))
        }

    ours, _ = jax.jit(vlm.generate, static_argnums=1, static_argnames="max_new_tokens")(
        params, plain, batch(prompt, places), max_new_tokens=3
    )
    whole = np.concatenate([prompt, ours], axis=1)
    hidden, _, _ = vlm.forward(params, plain, batch(whole, [*places, 4, 5, 6]))
    expected = np.argmax(vlm.logits(params, hidden)[:, 4:7], axis=-1)
    assert ours.tolist() == expected.tolist()
