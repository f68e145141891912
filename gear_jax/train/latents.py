"""Stage `latents`: train the latent-action tokenizer on any source with video.

    clips of the head view -> tokenizer -> a directory that `launch.extract` reads

Source: GEAR-VLA 3.2, systems.md 2.4. What is watched: per group perplexity, used codes and entropy,
gain over copying the first frame, and whether codes of another clip are worse than a clip's own.
A run whose codes have collapsed is stopped, not left to finish.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from gear_jax.data.catalog import DatasetConfig, open_prepared
from gear_jax.data.mixtures import Phase
from gear_jax.data.pipeline import Stream, StreamConfig
from gear_jax.data.prepared import Prepared, hold_out
from gear_jax.data.rlds_features import load_json
from gear_jax.data.tfrecord import DataError
from gear_jax.systems import latents
from gear_jax.systems.latents import LatentLossConfig
from gear_jax.towers.latent_action import LatentActionConfig
from gear_jax.train import exits, sharding
from gear_jax.train.exits import StopRunError
from gear_jax.train.loop import Evaluator, Stage
from gear_jax.train.optim import OptimConfig
from gear_jax.train.run_checkpoints import RunCheckpoints

RULES = (
    (r"(encoder|decoder)/(place|time|query|order|slot)", (None, None)),
    (r"(encoder|decoder)/.*(proj|from_\w+)/kernel", (None, "fsdp")),
    (r"(encoder|decoder)/.*(to_\w+|fc1)/kernel", ("fsdp", None)),
    (r"(encoder|decoder)/.*norm/(scale|bias)", (None,)),
    (r"(encoder|decoder)/.*/(q|k|v)/kernel", ("fsdp", None, None)),
    (r"(encoder|decoder)/.*/(q|k|v)/bias", (None, None)),
    (r"(encoder|decoder)/.*fc2/kernel", (None, "fsdp")),
    (r"(encoder|decoder)/.*(proj|from_\w+|to_\w+|fc1|fc2)/bias", (None,)),
)


def stage(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> Stage:
    """The stage of a config like configs/latents.py.

    Raises:
        DataError: a data set cannot be used.
        ValueError: the config makes no sense.
    """
    cfg = model_config(config.model)
    loss_config = LatentLossConfig(**config.loss)
    train, held = open_sets(config.data)
    phases = _phases(config.data)
    options = StreamConfig(
        batch_size=config.data.batch_size,
        num_samples=config.optim.num_steps * config.data.batch_size,
        image_size=cfg.image_size,
        augment=None,
        seed=config.seed,
        content="clips",
        clip_frames=cfg.num_frames,
    )
    host = {"host": jax.process_index(), "num_hosts": jax.process_count()}

    def loss(params, codebook, batch, rng):
        frames, mask = _prepare(cfg, batch)
        return latents.loss(params, cfg, codebook, frames, mask, loss_config, rng)

    def open_stream(state):
        workers = config.data.num_workers
        return Stream(train, phases, options, state=state, num_workers=workers, **host)

    def open_held():
        again = dataclasses.replace(options, seed=config.seed + 1)
        return Stream(held, phases, again, **host)

    return Stage(
        name="latents",
        init=functools.partial(latents.init, cfg),
        loss=loss,
        optim=OptimConfig(**config.optim, partitions=((".*", "tokenizer"),)),
        rules=RULES,
        open_stream=open_stream,
        arrays=arrays,
        evaluators={
            "held_out": Evaluator(
                config.monitor.every, Monitor(cfg, config.monitor, open_held, mesh).run
            )
        },
    )


def model_config(fields: Mapping[str, Any]) -> LatentActionConfig:
    """The tokenizer's config from plain values: lists for tuples, names for dtypes."""
    plain: dict[str, Any] = {}
    for key, value in fields.items():
        plain[key] = tuple(value) if isinstance(value, list) else value
        if key.endswith("dtype"):
            plain[key] = jnp.dtype(value)
    return LatentActionConfig(**plain)


def open_sets(data) -> tuple[dict[str, Prepared], dict[str, Prepared]]:
    """Data sets to train on and their held-out episodes, by name.

    Args:
        data: ConfigDict with sets {name: fields of DatasetConfig, and weight} and hold_out.
    """
    train, held = {}, {}
    for name, fields in data.sets.items():
        fields = {key: value for key, value in fields.to_dict().items() if key != "weight"}
        prepared = open_prepared(DatasetConfig(**fields), num_workers=max(1, data.num_workers))
        train[name], held[name] = hold_out(prepared, data.hold_out)
    return train, held


def _phases(data):
    weights = {name: fields.weight for name, fields in data.sets.items()}
    total = sum(weights.values())
    return [Phase(0.0, {name: weight / total for name, weight in weights.items()})]


def arrays(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What goes to the devices."""
    return {"images": batch["images"], "clip_mask": batch["clip_mask"]}


def _prepare(cfg, batch):
    """Frames float32[B, F, H, W, 3] in -1 .. 1 and mask bool[B, T] of a batch of clips."""
    mask = batch["clip_mask"]
    if cfg.mode == "lapa":  # one transition, which needs them all
        mask = mask.all(axis=1, keepdims=True)
    return batch["images"].astype(jnp.float32) / 127.5 - 1, mask


class Monitor:
    """Measures held-out clips, and stops a run whose codes have collapsed."""

    def __init__(self, cfg, config, open_held, mesh):
        """Keep what is needed.

        Args:
            cfg: LatentActionConfig.
            config: batches, first (step of the first alarm), patience (measurements in a row that
                are bad), perplexity (least, as a fraction of the codes) and shuffled (least).
            open_held: -> stream of held-out clips, always the same.
            mesh: of the run.
        """
        self.cfg, self.config, self.open_held, self.mesh = cfg, config, open_held, mesh
        self.bad = 0
        self._measure = jax.jit(self._sums)

    def _sums(self, params, codebook, batch):
        frames, mask = _prepare(self.cfg, batch)
        return latents.measure(params, self.cfg, codebook, frames, mask)

    def run(self, state) -> dict[str, Any]:
        """The monitors of `latents.summary`.

        Raises:
            StopRunError: collapsed, `patience` times in a row.
        """
        stream, sums = self.open_held(), None
        rows = sharding.batch_sharding(self.mesh)
        try:
            for _ in range(self.config.batches):
                batch = {
                    key: jax.make_array_from_process_local_data(rows, value)
                    for key, value in arrays(next(stream)).items()
                }
                new = self._measure(state.params, state.extra, batch)
                sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
        finally:
            stream.close()
        seen = {key: np.asarray(x).tolist() for key, x in latents.summary(sums).items()}
        self._alarm(int(state.step), seen)
        return seen

    def _alarm(self, step, seen):
        least = self.config.perplexity * self.cfg.codes_per_group
        faults = [
            f"group {group} uses {value:.2f} of {self.cfg.codes_per_group} codes (perplexity), "
            f"expected at least {least:g}"
            for group, value in enumerate(seen["perplexity"])
            if value < least
        ]
        if seen["shuffled"] < self.config.shuffled:
            faults.append(
                f"codes of another clip give {seen['shuffled']:.3f} of the error, expected at "
                f"least {self.config.shuffled:g}: the decoder does not read them"
            )
        self.bad = self.bad + 1 if faults and step >= self.config.first else 0
        if self.bad >= self.config.patience:
            raise StopRunError(
                exits.COLLAPSED,
                f"step {step}: the latent actions have collapsed: {'; '.join(faults)}; see "
                "docs/latents.md for what helps",
            )


def load(workdir) -> tuple[LatentActionConfig, Any, Any, dict[str, Any]]:
    """A trained tokenizer: its config, params, codebook, and where it comes from.

    Args:
        workdir: of a run of this stage; its newest checkpoint is read, without the optimiser.

    Returns:
        config; params; codebook; {"step", "digest"}, the digest being of the checkpoint's files.

    Raises:
        DataError: no run of this stage, or none of its checkpoints can be used.
    """
    workdir = pathlib.Path(workdir)
    config = load_json(workdir / "config.json")
    if config.get("stage") != "latents":
        raise DataError(f"{workdir}: its stage is {config.get('stage')!r}, expected 'latents'")
    cfg = model_config(config["model"])
    params, codebook = jax.eval_shape(functools.partial(latents.init, cfg), jax.random.key(0))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    targets = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        {"params": params, "extra": codebook},
    )
    checkpoints = RunCheckpoints(workdir / "checkpoints", read_only=True)
    try:
        restored = checkpoints.restore_part(targets)
    finally:
        checkpoints.close()
    return cfg, restored.state["params"], restored.state["extra"], {
        "step": restored.step,
        "digest": restored.digest,
    }  # fmt: skip
