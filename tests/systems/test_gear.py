"""Exact tests of GEAR-VLA at debug size: E1, E2, E4, E7, E8, E9, E10 and E12 of systems.md 2.13."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import port_proof
from gear_jax.data.sequences import STATE, WRIST, Question, SequenceConfig, token_rows
from gear_jax.porting import models
from gear_jax.systems import gear, vlm
from gear_jax.systems.gear import GearConfig
from gear_jax.towers.action_expert import ActionExpertConfig
from gear_jax.towers.state_projector import StateProjectorConfig
from gear_jax.train import optim, sharding
from gear_jax.train.optim import OptimConfig

CONFIG = port_proof.get_config().to_dict()
SIDE, ROWS, FIRST = 56, 4, 320
SEQUENCE = SequenceConfig(length=88, view_grid=(2, 2), fast_length=12)


class _Tokenizer:
    """Ids below 512: words 10 .., la_0 at 320, fast_0000 at 340."""

    _MARKS = ("<|vision_start|>", "<|vision_end|>", "<|view_head|>", "<|view_left|>",
              "<|view_right|>", "<|state_start|>", "<|state_pad|>", "<|state_end|>",
              "<|la_start|>", "<|la_end|>", "<|fast_start|>", "<|fast_end|>",
              "<|im_end|>", "<|view_ref|>")  # fmt: skip

    def encode(self, text):
        return [10 + sum(map(ord, word)) % 200 for word in text.split()]

    def id(self, token):
        fixed = {"<|image_pad|>": 500, "<la_0>": FIRST, "<fast_0000>": 340}
        return fixed[token] if token in fixed else 400 + self._MARKS.index(token)

    def check_user_text(self, text):
        pass


@pytest.fixture(scope="module")
def cfg():
    qwen = models.describe("qwen2_5_vl", CONFIG["qwen2_5_vl"]).cfg
    vggt = models.describe("vggt", CONFIG["vggt"]).cfg
    projector = dataclasses.replace(qwen.projector, geometry_width=2 * vggt.width)
    joined = dataclasses.replace(qwen, geometry=vggt, projector=projector)
    language = joined.language
    return GearConfig(
        vlm=joined,
        state=StateProjectorConfig(num_embodiments=3, hidden_dim=16, width=language.width),
        expert=ActionExpertConfig(
            depth=language.depth, width=32, num_heads=2, num_kv_heads=language.num_kv_heads,
            head_dim=language.head_dim, mlp_dim=48, chunk_len=6, rope_theta=language.rope_theta,
        ),
        latent_ids=(FIRST, 16),
    )  # fmt: skip


@pytest.fixture(scope="module")
def params(cfg):
    made = jax.jit(lambda: gear.init(cfg, jax.random.key(0)))()

    # zero-initialised gates would hide what they gate
    def shake(path, x):
        key = jax.random.fold_in(jax.random.key(1), len(path) + x.size)
        return x + 0.05 * jax.random.normal(key, x.shape)

    made["expert"] = jax.tree_util.tree_map_with_path(shake, made["expert"])
    made["projector"] = jax.tree_util.tree_map_with_path(shake, made["projector"])
    return made


def _stream_batch(seed=0):
    rng = np.random.default_rng(seed)
    arms = np.array([[False, True], [True, True], [False, True], [False, False]])
    return {
        "images": rng.integers(0, 256, (ROWS, 3, SIDE, SIDE, 3), dtype=np.uint8),
        "view_mask": np.array([[1, 0, 1], [1, 1, 1], [1, 0, 1], [1, 0, 0]], bool),
        "instruction": ["pick the cup", "fold", "open it", "watch"],
        "questions": [[] for _ in range(ROWS)],
        "embodiment_id": np.array([0, 2, 0, 1], np.int32),
        "state": {
            "ee": rng.normal(size=(ROWS, 2, 9)).astype(np.float32),
            "ee_mask": arms,
            "joints": rng.normal(size=(ROWS, 2, 9)).astype(np.float32),
            "joint_mask": np.repeat(arms[..., None], 9, axis=2),
            "arm_mask": arms,
        },
        "latent_ids": rng.integers(0, 8, (ROWS, 5, 4)) + np.array([0, 0, 8, 8]),
        "latent_mask": np.array([[1] * 5, [1] * 5, [1, 1, 1, 0, 0], [1] * 5], bool),
        "action": rng.normal(size=(ROWS, 6, 20)).astype(np.float32),
        "action_mask": np.repeat(np.repeat(arms, 10, axis=1)[:, None], 6, axis=1),
    }


def _rows(batch, fast=None, **config):
    fast = fast or [np.array([3, 1, 4]), np.array([1, 5]), np.array([9, 2, 6, 5]), None]
    made = token_rows(batch, _Tokenizer(), dataclasses.replace(SEQUENCE, **config), fast)
    arrays = {k: v for k, v in batch.items() if k not in ("instruction", "questions")}
    return jax.tree.map(jnp.asarray, {**arrays, **made})


@pytest.fixture(scope="module")
def batch():
    return _rows(_stream_batch())


@pytest.fixture(scope="module")
def prefill(cfg):
    return jax.jit(lambda params, batch, drops: gear.prefill(params, cfg, batch, drops))


@pytest.fixture(scope="module")
def shallow(cfg, params):
    """Config and parameters of one layer of language."""
    language = dataclasses.replace(cfg.vlm.language, depth=1)
    one = dataclasses.replace(cfg, vlm=dataclasses.replace(cfg.vlm, language=language),
                              expert=dataclasses.replace(cfg.expert, depth=1))  # fmt: skip
    layers = jax.tree.map(lambda x: x[:1], params["language"]["layers"])
    return one, {**params, "language": {**params["language"], "layers": layers}}


NONE = jnp.zeros(ROWS, jnp.int32)
VLM = ("vision", "geometry", "projector", "language", "state")


def _flow(cfg):
    def value(params, batch):
        _, kv = gear.prefill(params, cfg, batch)
        cached = gear.latent_cache(cfg, kv, batch)
        return gear.flow_loss(params, cfg, batch, cached, jax.random.key(3))

    return value


def test_fast_tokens_that_see_the_latents_alone(shallow, batch):
    """With one layer there is no way round: the prompt has no influence, the latents have."""
    cfg, first = shallow
    batch = {**batch, "latent_valid": batch["latent_valid"].at[2].set(False)}
    latents = batch["acts"] == 1
    others = {
        "prompt": {**batch, "images": batch["images"] // 2},
        "latents": {**batch, "tokens": jnp.where(latents, batch["tokens"] + 1, batch["tokens"])},
    }
    behind = (batch["acts"] == 2) & batch["latent_valid"].any(axis=1)[:, None]
    rest = (batch["acts"] == 2) & ~behind
    assert behind.any()
    assert rest.any()
    for sees, name, moved in (
        ("latents", "prompt", False), ("latents", "latents", True), ("all", "prompt", True),
    ):  # fmt: skip
        one = dataclasses.replace(cfg, fast_sees=sees)
        run = jax.jit(lambda batch, one=one: gear.prefill(first, one, batch)[0])
        same = (run(batch) == run(others[name])).all(axis=-1)
        assert not same[behind].all() if moved else same[behind].all(), (sees, name)
        if name == "prompt":  # a row without latents has nothing else to see
            assert not same[rest].any()
    with pytest.raises(ValueError, match="fast_sees is 'nothing'"):
        dataclasses.replace(cfg, fast_sees="nothing")


def test_scrambled_rows_read_random_answers_and_learn_the_true_ones(cfg, params):
    stream = _stream_batch()
    stream["questions"][3] = [Question("where is it", "left of the cup", (0,))]
    stream["instruction"][3] = ""
    many = _rows(stream)
    many = jax.tree.map(lambda x: jnp.concatenate([x] * 16, axis=int(x.shape[0] == 3)), many)
    half = dataclasses.replace(cfg, scrambled=0.5)
    tokens = np.asarray(gear.scramble(half, many, jax.random.key(0)))
    before, learned = np.asarray(many["tokens"]), np.asarray(many["labels"]) >= 0
    codes = np.zeros_like(learned)
    np.put_along_axis(codes, np.asarray(many["latent_index"]), many["latent_valid"], axis=1)
    answers = codes | (learned & (np.asarray(many["acts"]) == 0))
    changed = tokens != before
    assert not changed[~answers].any()  # FAST tokens and prompts stay
    hit = changed.any(axis=1)
    assert 20 < hit.sum() < 44  # of 64
    assert changed[answers & hit[:, None]].mean() > 0.8  # one code of eight is drawn again
    kinds = (tokens - FIRST).reshape(len(tokens), -1)[:, :]
    for row in np.flatnonzero(hit & codes.any(axis=1)):
        said = kinds[row][np.asarray(many["latent_index"])[row]].reshape(5, 4)
        there = np.asarray(many["latent_valid"])[row].reshape(5, 4)
        assert ((said // 8 == np.array([0, 0, 1, 1])) | ~there).all()
    assert len(np.unique(tokens[codes & hit[:, None]])) == 16

    stream["questions"][3] = [Question("where is it", "left", (0, 2), robot=True)]
    asked = _rows(stream, through_latents=True)
    few, rng = dataclasses.replace(cfg, scrambled=1e-9), jax.random.key(2)
    tokens = np.asarray(gear.scramble(few, asked, jax.random.key(0)))
    moved = (tokens != np.asarray(asked["tokens"])).any(axis=1)
    assert moved.tolist() == [False, False, False, True]  # its codes are nobody's: always drawn
    stream["latent_mask"][0] = False
    moved = np.asarray(gear.scramble(few, asked := _rows(stream, through_latents=True), rng))
    moved = (moved != np.asarray(asked["tokens"])).any(axis=1)
    assert moved.tolist() == [True, False, False, True]  # nor has a robot's row without ids any

    whole = dataclasses.replace(cfg, scrambled=1.0)
    by_hand = {**many, "tokens": gear.scramble(whole, many, jax.random.fold_in(rng, 2))}
    run = jax.jit(gear.loss, static_argnums=1)
    np.testing.assert_allclose(run(params, whole, many, rng)[0], run(params, cfg, by_hand, rng)[0])
    assert run(params, whole, many, rng)[0] != run(params, cfg, many, rng)[0]


def test_more_draws_are_the_mean_over_repeated_rows(cfg, params, batch):
    """Each chunk noised three times; the VLM runs once."""
    thrice = dataclasses.replace(cfg, flow_draws=3)
    _, kv = gear.prefill(params, cfg, batch)
    cache, mask = gear.latent_cache(cfg, kv, batch)
    rows = {
        key: jnp.repeat(batch[key], 3, axis=0)
        for key in ("action", "action_mask", "chunk_position", "embodiment_id")
    }
    repeated = [jnp.repeat(x, 3, axis=1) for x in cache], jnp.repeat(mask, 3, axis=0)
    key = jax.random.key(5)
    once = gear.flow_loss(params, cfg, rows, repeated, key)
    made = gear.flow_loss(params, thrice, batch, (cache, mask), key)
    np.testing.assert_array_equal(made, once)
    assert made != gear.flow_loss(params, cfg, batch, (cache, mask), key)


@pytest.fixture(scope="module")
def flow_grads(cfg, params, batch):
    open_cfg = dataclasses.replace(cfg, joint_grad=True)
    return [jax.jit(jax.grad(_flow(c)))(params, batch) for c in (cfg, open_cfg)]


def test_e1_the_flow_loss_sends_no_gradient_into_the_vlm(flow_grads):
    stopped, joint = flow_grads
    for tower in VLM:
        for path, leaf in jax.tree_util.tree_leaves_with_path(stopped[tower]):
            assert not np.asarray(leaf).any(), (tower, jax.tree_util.keystr(path))
    for path, leaf in jax.tree_util.tree_leaves_with_path(stopped["expert"]):
        assert np.asarray(leaf).any(), jax.tree_util.keystr(path)
    for tower in VLM:  # the ablation without the boundary
        assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(joint[tower])), tower


def test_e1_the_compiled_flow_gradient_holds_no_backward_of_the_vlm(cfg, params, batch):
    """FLOPs of the whole gradient, less the VLM's forward, are those of the expert alone."""

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    _, kv = jax.eval_shape(lambda p, b: gear.prefill(p, cfg, b), params, batch)

    def alone(expert, batch, kv):
        cached = gear.latent_cache(cfg, kv, batch)
        return gear.flow_loss({"expert": expert}, cfg, batch, cached, jax.random.key(3))

    whole = flops(jax.grad(_flow(cfg)), params, batch)
    forward = flops(lambda p, b: gear.prefill(p, cfg, b)[1], params, batch)
    expert = flops(jax.grad(alone), params["expert"], batch, kv)
    assert whole - forward < 1.1 * expert


def test_e2_the_weight_of_the_flow_loss_leaves_the_vlm_bitwise_the_same(cfg, params, batch):
    table = (("expert/.*", "expert"), ("vision/.*", None), (".*", "vlm"))

    def train(weight):
        one = dataclasses.replace(cfg, flow_weight=weight)
        tx = optim.make_tx(params, OptimConfig(1e-3, 0, 10, table))

        @jax.jit
        def step(params, opt_state, rng):
            grads = jax.grad(lambda p: gear.loss(p, one, batch, rng)[0])(params)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        made, opt_state = params, tx.init(params)
        for index in range(5):
            made, opt_state = step(made, opt_state, jax.random.key(index))
        return made

    one, thirty = train(1.0), train(30.0)
    for tower in VLM:
        jax.tree.map(np.testing.assert_array_equal, one[tower], thirty[tower])
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), one, params))
    assert sum(moved) > len(moved) // 2


def test_e4_what_is_dropped_is_hidden_from_the_action_tokens_directly(shallow, batch):
    """With one layer of language there is no way round: a dropped view has no influence."""
    cfg, first = shallow
    changed = {
        WRIST: {**batch, "images": batch["images"].at[:, 1:].add(60)},
        STATE: {**batch, "state": {**batch["state"], "joints": batch["state"]["joints"] + 1.0}},
    }
    # VGGT mixes the views, so the head view is not independent of the wrists: leave it out
    flat = dataclasses.replace(cfg, vlm=dataclasses.replace(cfg.vlm, geometry=None))
    run = jax.jit(lambda batch, drops: gear.prefill(first, flat, batch, drops)[0])
    acts = np.asarray(batch["acts"]).astype(bool)
    for group, other in changed.items():
        same = run(batch, NONE + group), run(other, NONE + group)
        np.testing.assert_array_equal(np.asarray(same[0])[acts], np.asarray(same[1])[acts])
        kept = run(batch, NONE), run(other, NONE)
        assert (np.asarray(kept[0])[acts] != np.asarray(kept[1])[acts]).any()
        context = np.asarray(batch["segments"] == 1) & ~acts
        np.testing.assert_array_equal(
            np.asarray(run(batch, NONE))[context], np.asarray(same[0])[context]
        )


def test_an_absent_view_and_a_hidden_transition_change_nothing(cfg, params, batch, prefill):
    cache = _cache(cfg, prefill(params, batch, NONE)[1], batch)
    images = batch["images"].at[0, 1].set(255).at[3, 1:].set(7)
    ids = batch["tokens"]
    hidden = jnp.take_along_axis(batch["latent_index"], jnp.full((ROWS, 1), 19), axis=1)[2, 0]
    other = {**batch, "images": images, "tokens": ids.at[2, hidden].set(FIRST + 9)}
    after = _cache(cfg, prefill(params, other, NONE)[1], batch)
    there = np.asarray(batch["latent_valid"])
    for one, two in zip(cache, after, strict=True):
        np.testing.assert_array_equal(np.asarray(one)[:, there], np.asarray(two)[:, there])


def _cache(cfg, kv, batch):
    return gear.latent_cache(cfg, kv, batch)[0]


def test_a_marked_first_view_is_seen_where_there_is_one(cfg, params, prefill):
    stream = _stream_batch()
    ref = np.random.default_rng(7).integers(0, 256, (ROWS, SIDE, SIDE, 3), dtype=np.uint8)
    there = np.array([True, False, True, False])
    batch = _rows({**stream, "ref_image": ref, "ref_mask": there}, length=100)
    one = _cache(cfg, prefill(params, batch, NONE)[1], batch)[0]
    other = {**batch, "ref_image": 255 - batch["ref_image"]}
    two = _cache(cfg, prefill(params, other, NONE)[1], batch)[0]
    differs = np.asarray(one != two).any(axis=(0, 2, 3, 4))
    assert differs.tolist() == there.tolist()


def test_questions_that_share_a_row_are_answered_as_if_each_came_alone(cfg, params, prefill):
    stream = _stream_batch()
    one, two, three = (
        Question(text, f"{text} yes", (place,)) for place, text in enumerate(["a b", "c", "d e f"])
    )
    images = stream["images"]
    stream["view_mask"][:] = [[1, 1, 1], [1, 0, 0], [1, 0, 0], [1, 0, 0]]
    stream["instruction"] = [""] * ROWS
    for row, place in ((1, 0), (2, 1), (3, 2)):
        images[row, 0] = images[0, place]
    alone = [[dataclasses.replace(q, views=(0,))] for q in (one, two, three)]
    batch = _rows({**stream, "questions": [[one, two, three], *alone]}, fast=[None] * ROWS)
    hidden = np.asarray(prefill(params, batch, NONE)[0])
    segments = np.asarray(batch["segments"])
    for row in (1, 2, 3):
        ours, theirs = hidden[0][segments[0] == row], hidden[row][segments[row] == 1]
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_e7_the_latent_cache_does_not_know_the_fast_tokens(cfg, params, batch, prefill):
    other = _rows(_stream_batch(), fast=[np.array([8, 8]), np.array([2]), None, None])
    for one, two in zip(
        _cache(cfg, prefill(params, batch, NONE)[1], batch),
        _cache(cfg, prefill(params, other, NONE)[1], other),
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)


def test_e8_with_the_cache_held_another_image_gives_the_same_velocity(cfg, params, batch, prefill):
    noisy, tau = batch["action"], jnp.full(ROWS, 0.3)
    run = jax.jit(
        lambda params, cache: gear.velocity(
            params, cfg, cache, noisy, tau, batch["chunk_position"], batch["latent_valid"],
            batch["embodiment_id"],
        )
    )  # fmt: skip
    cache = _cache(cfg, prefill(params, batch, NONE)[1], batch)
    broken = {**params, **jax.tree.map(jnp.zeros_like, {t: params[t] for t in VLM})}
    np.testing.assert_array_equal(run(params, cache), run(broken, cache))
    other = {**batch, "images": 255 - batch["images"]}
    seen = run(params, _cache(cfg, prefill(params, other, NONE)[1], other))
    assert (np.asarray(seen) != np.asarray(run(params, cache))).any()


def test_e9_the_cache_of_decoding_is_that_of_teacher_forcing_with_the_same_ids(
    cfg, params, prefill
):
    stream = _stream_batch()
    stream["latent_mask"][:] = True
    prompt = _rows(stream, prompt_only=True)
    hidden, kv = prefill(params, prompt, NONE)
    said = jax.jit(lambda p, b, h, kv: gear.say_latents(p, cfg, b, h, kv))
    ids, memory, grown = said(params, prompt, hidden, kv)
    codes = np.asarray(ids).reshape(ROWS, 5, 4)
    assert ((codes[..., :2] < 8) & (codes[..., 2:] >= 8)).all()
    forced = _rows({**stream, "latent_ids": codes})
    hidden, kv = prefill(params, forced, NONE)
    for one, two in zip(_cache(cfg, memory, grown), _cache(cfg, kv, forced), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)
    np.testing.assert_array_equal(grown["chunk_position"], forced["chunk_position"])
    scores = np.asarray(vlm.logits(params, hidden))[..., FIRST : FIRST + 16]
    for row in range(ROWS):
        for place, column in enumerate(np.asarray(forced["latent_index"])[row]):
            legal = slice(0, 8) if place % 4 < 2 else slice(8, 16)
            best = np.argmax(scores[row, column - 1][legal]) + legal.start
            assert best == codes.reshape(ROWS, -1)[row, place]
    noise = jax.random.normal(jax.random.key(0), (ROWS, 6, 20))
    chunk, again = jax.jit(lambda p, b: gear.act(p, cfg, b, noise))(params, prompt)
    np.testing.assert_array_equal(again, ids)
    assert chunk.shape == (ROWS, 6, 20)
    assert bool(jnp.isfinite(chunk).all())


def test_e10_the_projector_of_a_robot_that_is_not_in_the_batch_gets_no_gradient(cfg, params, batch):
    one = {**batch, "embodiment_id": jnp.array([0, 2, 0, 2], jnp.int32)}
    grads = jax.jit(jax.grad(lambda p: gear.loss(p, cfg, one, jax.random.key(0))[1]["tokens"]))(
        params
    )["state"]
    for leaf in jax.tree.leaves(grads):
        assert not np.asarray(leaf[1]).any()
        assert np.asarray(leaf[0]).any()


def test_e12_drops_come_as_often_as_the_paper_says():
    drawn = np.asarray(gear.draw_drops(jax.random.key(0), 10_000))
    for group, odds in gear.DROPS["mixed"]:
        assert abs(np.mean(drawn == group) - odds) < 0.015


def test_rows_without_actions_or_latents_teach_the_expert_nothing(cfg, params, batch, prefill):
    _, kv = prefill(params, batch, NONE)

    @jax.jit
    def value(b):
        cached = gear.latent_cache(cfg, kv, b)
        return gear.flow_loss(params, cfg, b, cached, jax.random.key(3))

    other = {**batch, "action": batch["action"].at[3].set(1e6)}  # a video of people
    np.testing.assert_array_equal(value(batch), value(other))
    none = {**batch, "latent_valid": batch["latent_valid"].at[2].set(False)}
    other = {**none, "action": none["action"].at[2].set(1e6)}
    np.testing.assert_array_equal(value(none), value(other))


def test_every_parameter_has_a_sharding_and_eight_devices_equal_one(cfg, params, batch):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = jax.device_put(params, sharding.param_shardings(params, mesh))
    rows = sharding.batch_sharding(mesh)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    split = {k: jax.device_put(x, everywhere if k == "positions" else rows)
             for k, x in batch.items()}  # fmt: skip
    run = jax.jit(lambda p, b: gear.loss(p, cfg, b, jax.random.key(0)))
    one, eight = run(params, batch), run(placed, split)
    np.testing.assert_allclose(one[0], eight[0], rtol=1e-5)


def test_an_expert_that_cannot_read_the_cache_is_refused(cfg):
    with pytest.raises(ValueError, match=r"expert\.depth is 3, the language tower's is 4"):
        dataclasses.replace(cfg, expert=dataclasses.replace(cfg.expert, depth=3))
