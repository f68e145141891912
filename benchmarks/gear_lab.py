"""A small GEAR-VLA and its world: trained and tried as the real one is, in seconds.

    small_config(...) -> Lab -> train -> losses, measure, misses

Everything is the real path: the stage of a debug config, its stream over the reach source, the
optimiser and the train step. Made up are the latent ids (reach_ids.py), and what the views show:
how well a tiny tower learns to see is not what is tried here (a frozen random one cannot tell where
a sharp disc of any colour is: R^2 0.2 of a linear map from its features).
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import reach_ids
from configs import gear_base, policy_gear
from gear_jax.data.sequences import token_rows
from gear_jax.data.statistics import denormalize_action
from gear_jax.systems import gear
from gear_jax.towers.qwen_vision import window_patches
from gear_jax.train import gear as stages
from gear_jax.train import gear_data, gear_eval, sharding
from gear_jax.train.optim import make_tx
from gear_jax.train.state import make_train_step, new_state

SET = "reach"
ARM, HEIGHT = 1, 2  # place of the right arm in a state; of z in `ee` and, here, in `joints`
POSITION = slice(10, 13)  # of the right hand, in a chunk
FAR = 0.08  # metres to go from which a chunk counts


def small_config(
    folder, seed, *, steps, lr=3e-3, batch_size=16, robot="franka", change=None, **drawing
):
    """The debug config of stage `policy`, smaller and without 3D branch and FAST block.

    Args:
        folder: for what is derived from the data.
        seed: of parameters, order and drawings.
        steps: of the run; 5 % of them are warm-up, a cosine follows.
        lr: learning rate.
        batch_size: rows.
        robot: whose projector slot it uses.
        change: of the config, in place.
        drawing: fields of `ReachSource`.
    """
    config = policy_gear.get_config("debug")
    config.seed = seed
    config.init.update(run=None, fresh=(".*",))
    gear_base.optim(config, steps, lr, expert=True)
    config.optim.update(warmup_steps=max(1, steps // 20), schedule="cosine", b2=0.95)
    config.data.sets[SET].update(
        work=f"{folder}/{robot}", latents=f"{folder}/{robot}-ids", options={"embodiment": robot}
    )
    # one disc; a second's way and a second's rest, for chunks reach a second ahead
    config.data.sets[SET].drawing = {
        "num_targets": 1, "seconds": 1.0, "hold": 1.0, "seed": seed, **drawing
    }  # fmt: skip
    config.data.fast.update(path=f"{folder}/fast", num_chunks=2000, vocab_size=2048)
    config.data.update(batch_size=batch_size, random_side=False, hold_out=0.2)
    config.data.augment = None
    config.monitor.every = 0
    config.model.update(length=128, most_labels=24, with_fast=False)
    config.model.language.depth = config.model.vision.depth = 2
    config.model.geometry = None
    if change is not None:
        change(config)
    return config


def place_as_colour(batch):
    """A batch whose views are of one colour: red and green say where the head view's disc is."""
    images = batch["images"]
    disc = np.ptp(images[:, 0].astype(np.float32), axis=-1) > 60
    axis = (np.arange(images.shape[2]) + 0.5) / images.shape[2]
    count = np.maximum(disc.sum(axis=(1, 2)), 1)
    rows, columns = disc.sum(axis=2) @ axis / count, disc.sum(axis=1) @ axis / count
    return _painted(batch, [rows, columns, 0.5 + 0 * rows])


def height_as_brightness(batch, contrast=(1, 1, 1), channels=(0, 1, 2)):
    """A batch whose state does not tell the hand's height; views do, in some colour channels.

    Args:
        batch: of the stream.
        contrast: of each view, 0 .. 1.
        channels: of colour.
    """
    height = np.clip(batch["state"]["ee"][:, ARM, HEIGHT] / 3, -0.5, 0.5)
    for view, share in enumerate(contrast):
        told = [0.5 + share * height * (channel in channels) for channel in range(3)]
        batch = _painted(batch, told, (view,))
    state = {key: value.copy() for key, value in batch["state"].items()}
    state["ee"][..., HEIGHT] = state["joints"][..., HEIGHT] = 0
    return batch | {"state": state}


def strange_wrist(batch):
    """A batch whose wrist views are of a brightness that says nothing."""
    rng = np.random.default_rng(batch["sample"])
    return _painted(batch, [rng.uniform(0, 1, len(batch["sample"]))] * 3, (1, 2))


def no_wrist(batch):
    """A batch without wrist views, as from a robot that lost these cameras; rows are to be made."""
    mask = batch["view_mask"].copy()
    mask[:, 1:] = False
    return _painted(batch, [np.zeros(len(mask))] * 3, (1, 2)) | {"view_mask": mask}


def _painted(batch, colour, views=(0, 1, 2)):
    """Some views in a colour for each row: three float[b], 0 .. 1."""
    images = batch["images"].copy()
    painted = np.rint(255 * np.stack(colour, axis=-1))[:, None, None]
    for view in views:
        there = batch["view_mask"][:, view, None, None, None]
        images[:, view] = painted * there
    return batch | {"images": images}


def blind(params, cfg, channel=2):
    """Parameters whose 2D tower does not see a colour channel; it is frozen, so it stays blind."""
    size = cfg.vlm.vision.window_size
    dark = np.zeros((1, size, size, 3), np.uint8)
    lit = dark.copy()
    lit[..., channel] = 255
    one, two = (np.asarray(window_patches(x, cfg.vlm.vision)[0]) for x in (dark, lit))
    seen = (one != two).any(axis=(0, 1, 2))  # of one frame's values: channels, then pixels
    kernel = params["vision"]["patch_embed"]
    kept = kernel.reshape(3, -1, seen.size // 3, kernel.shape[-1])
    kept = kept * ~seen.reshape(3, 1, -1, 1)
    return params | {"vision": params["vision"] | {"patch_embed": kept.reshape(kernel.shape)}}


def pick(batch, rows):
    """Some rows of a batch."""

    def one(key, value):
        if isinstance(value, dict):
            return {name: part[rows] for name, part in value.items()}
        if isinstance(value, list):
            return [value[row] for row in rows]
        return value[:, rows] if key == "positions" else value[rows]

    return {key: one(key, value) for key, value in batch.items()}


def whole(batch):
    """Numbers of the rows whose clip and chunk end within the episode."""
    return np.flatnonzero(batch["latent_mask"].all(axis=1) & batch["action_mask"].any(2).all(1))


def ending(batch):
    """Numbers of the rows whose clip goes beyond the episode, but not all of it."""
    there = batch["latent_mask"]
    return np.flatnonzero(there.any(axis=1) & ~there.all(axis=1))


def others_latents(batch):
    """A batch whose rows say the latent tokens of the next row; all must be whole."""
    tokens, places = batch["tokens"].copy(), batch["latent_index"]
    said = np.take_along_axis(tokens, places, axis=1)
    np.put_along_axis(tokens, places, np.roll(said, 1, axis=0), axis=1)
    return batch | {"tokens": tokens}


class Lab:
    """One config, ready to train."""

    def __init__(self, config):
        """Make what the config's data need, and open it."""
        self.config = config
        one = config.data.sets[SET]
        reach_ids.write(one.to_dict(), one.latents, config.model.transitions)
        self.mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
        self.stage = stages.build(config, self.mesh)
        self.cfg = stages.model_config(config.model)
        self.data = gear_data.open_data(config, stages.sequence_config(config.model))
        key = json.dumps([config.model.to_dict(), config.optim.to_dict()], default=str)
        self.programs = _programs(key, _Aside(self.stage, self.cfg))

    def begin(self, params=None):
        """The state before the first step, at random or from parameters."""
        state = self.programs.begin(self.config.seed)
        if params is None:
            return state
        return state.replace(params=jax.tree.map(lambda x: jax.numpy.array(x), params))

    def batches(self, change=lambda batch: batch):
        """Endless training batches of the stream."""
        stream = self.stage.open_stream(None)
        while True:
            yield change(next(stream))

    def held(self, num, change=lambda batch: batch, choose=whole):
        """Some batches of held-out episodes, of chosen rows alone, always the same."""
        stream = self.data.open_held(self.config)
        return [change(self.gather(stream, choose)) for _ in range(num)]

    def gather(self, stream, choose=whole):
        """A batch of chosen rows alone."""
        rows, size = [], self.config.data.batch_size
        while len(rows) < size:
            batch = next(stream)
            rows += [pick(batch, [row]) for row in choose(batch)]
        return _joined(rows[:size])

    def train(self, state, batches, steps):
        """The state after some steps."""
        for _, batch in zip(range(steps), batches, strict=False):
            state, _ = self.programs.step(state, self.stage.arrays(batch))
        return state

    def losses(self, params, batches):
        """Means of the training loss and its parts, nothing being trained."""
        made = [
            self.programs.loss(params, (), self.stage.arrays(batch), jax.random.key(number))[1][1]
            for number, batch in enumerate(batches)
        ]
        return jax.tree.map(lambda *x: float(np.mean(x)), *made)

    def measure(self, params, batches):
        """What `gear_eval.HeldOut` measures, {name: mean}."""
        held = gear_eval.HeldOut(self.cfg, self.config, self.data, self.mesh)
        sums = [
            self.programs.measure(params, batch=held._arrays(batch), rng=jax.random.key(number))
            for number, batch in enumerate(batches)
        ]
        total = jax.tree.map(lambda *x: float(sum(x)), *sums)
        return {name: value / max(weight, 1e-9) for name, (value, weight) in total.items()}

    def act(self, params, batch, seed=(0,)):
        """Sampled chunks of a batch, normalised, from its prompts alone."""
        maker = self.data.rows
        short = dataclasses.replace(maker.config, prompt_only=True)
        made = token_rows(batch, maker.tokenizer, short, [None] * len(batch["sample"]))
        seen = {key: batch[key] for key in ("images", "view_mask", "embodiment_id", "state")}
        rng = functools.reduce(jax.random.fold_in, seed, jax.random.key(0))
        chunk, _ = self.programs.act(params, seen | made, rng)
        return np.asarray(chunk)

    def misses(self, params, batches, samples=4):
        """Metres float[n, 3] between the ends of sampled and recorded chunks, in the hand's frame.

        Ours is the mean of some samples: what is tried is what the policy knows, not how little
        noise so short a training leaves. Only of chunks whose hand has more than `FAR` to go: else
        standing still would do.
        """
        normal, found = self.data.normalizer, []
        for number, batch in enumerate(batches):
            chunk = np.mean([self.act(params, batch, (number, k)) for k in range(samples)], axis=0)
            ours, theirs = (
                denormalize_action(x, normal.action, normal.spec)[:, -1, POSITION]
                for x in (chunk, batch["action"])
            )
            found.append((ours - theirs)[np.linalg.norm(theirs, axis=-1) > FAR])
        return np.concatenate(found)


def _joined(rows):
    """One batch of batches."""

    def one(key, *values):
        if isinstance(values[0], dict):
            return {name: np.concatenate([v[name] for v in values]) for name in values[0]}
        if isinstance(values[0], list):
            return list(itertools.chain(*values))
        return np.concatenate(values, axis=1 if key == "positions" else 0)

    return {key: one(key, *[row[key] for row in rows]) for key in rows[0]}


@dataclasses.dataclass(frozen=True)
class _Aside:
    """What a cache must not compare."""

    stage: Any
    cfg: Any

    def __eq__(self, other):
        return isinstance(other, _Aside)

    def __hash__(self):
        return 0


@dataclasses.dataclass(frozen=True)
class Programs:
    """What is compiled once for each model and optimiser, whatever the seed and the data."""

    begin: Callable
    step: Callable
    loss: Callable
    act: Callable
    measure: Callable


def _act(cfg, params, batch, rng):
    shape = (len(batch["tokens"]), cfg.expert.chunk_len, cfg.expert.action_dim)
    return gear.act(params, cfg, batch, jax.random.normal(rng, shape))


@functools.lru_cache(maxsize=8)
def _programs(key, aside):
    del key
    stage, cfg = aside.stage, aside.cfg
    shapes, _ = jax.eval_shape(stage.init, jax.random.key(0))
    tx = make_tx(shapes, stage.optim)
    return Programs(
        begin=jax.jit(functools.partial(new_state, stage.init, tx, ema=False)),
        step=jax.jit(make_train_step(stage.loss, tx), donate_argnums=0),
        loss=jax.jit(stage.loss),
        act=jax.jit(functools.partial(_act, cfg)),
        measure=jax.jit(functools.partial(gear_eval.measure, cfg=cfg)),
    )
