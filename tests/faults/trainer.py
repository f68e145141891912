"""A run that starts and steps fast, through the real door, with faults to order.

    python tests/faults/trainer.py --config tests/faults/trainer.py --workdir DIR

One matrix learns from drawn clips. The environment variable FAULT is JSON:
slow: seconds added to a step. compile: seconds added to tracing. nan, huge: steps whose rows are
not finite, or are 1e6 times too large. sample: number that a worker cannot read. log: file for the
samples that each host sends to its devices. die: end at the n-th removal or renaming of a file
below `checkpoints`, as a kill there would. blind: do not look for free space. file_bytes: no file
may grow larger.
"""

import json
import os
import resource
import sys
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from gear_jax.data import pipeline
from gear_jax.data.catalog import DatasetConfig, open_prepared
from gear_jax.data.mixtures import Phase
from gear_jax.data.pipeline import Stream, StreamConfig
from gear_jax.data.tfrecord import DataError
from gear_jax.train.loop import Stage
from gear_jax.train.optim import OptimConfig
from gear_jax.train.run_checkpoints import RunCheckpoints

FAULT = json.loads(os.environ.get("FAULT", "{}"))
_PIXELS = 16 * 16 * 3


def get_config():
    """A run of 12 steps."""
    config = ml_collections.ConfigDict()
    config.stage = "tiny"
    config.seed = 7
    config.width = 64
    config.mesh = {"data": -1, "fsdp": 1}
    config.optim = {"lr": 0.01, "warmup_steps": 2, "num_steps": 12}
    config.data = {"work": "", "batch_size": 8, "num_workers": 0, "episodes": 20}
    config.loop = {
        "log_every": 1, "checkpoint_every": 3, "keep": 3, "resume": "auto", "max_bad_steps": 3,
        "watchdog_minutes": 10.0, "checkpoint_minutes": 20.0,
    }  # fmt: skip
    return config


def dataset(config):
    drawing = {"num_episodes": config.data.episodes, "num_steps": 30, "image_size": 16, "seed": 0}
    return open_prepared(
        DatasetConfig("shapes", "shapes", config.data.work, format="shapes", drawing=drawing)
    )


def init(width, rng):
    return {"w": 0.01 * jax.random.normal(rng, (_PIXELS, width))}, {"seen": jnp.zeros(())}


def loss(params, extra, batch, rng):
    time.sleep(FAULT.get("compile", 0))  # while it is traced
    pixels = batch["images"].astype(jnp.float32).reshape(-1, _PIXELS) / 255
    rows = len(batch["scale"])
    wanted = jax.random.normal(rng, (rows, params["w"].shape[1]))
    error = (pixels[:: len(pixels) // rows] @ params["w"] - wanted) * batch["scale"][:, None]
    return (error**2).mean(), ({"seen": extra["seen"] + 1}, {"error": jnp.abs(error).mean()})


def optim(config):
    return OptimConfig(**config.optim, partitions=((".*", "all"),))


def stage(config, mesh):
    sets = {"shapes": dataset(config)}
    rows = config.data.batch_size
    options = StreamConfig(
        rows, config.optim.num_steps * rows, image_size=16, augment=None, content="clips",
        clip_frames=2,
    )  # fmt: skip

    def open_stream(state):
        return Stream(
            sets, [Phase(0.0, {"shapes": 1.0})], options, state=state,
            host=jax.process_index(), num_hosts=jax.process_count(),
            num_workers=config.data.num_workers,
        )  # fmt: skip

    def arrays(batch):
        time.sleep(FAULT.get("slow", 0))
        samples = batch["sample"]
        if "log" in FAULT:
            with open(f"{FAULT['log']}-{jax.process_index()}", "a") as file:
                file.write(json.dumps(samples.tolist()) + "\n")
        step = int(samples[0]) // rows + 1
        scale = np.nan if step in FAULT.get("nan", ()) else 1e6 ** (step in FAULT.get("huge", ()))
        return {"images": batch["images"], "scale": np.full(len(samples), scale, np.float32)}

    return Stage(
        name="tiny",
        init=lambda rng: init(config.width, rng),
        loss=loss,
        optim=optim(config),
        rules=(("w", ("fsdp", None)),),
        open_stream=open_stream,
        arrays=arrays,
        ema_decay=0.9,
    )


def _unreadable(load, element, original=pipeline._Load.map):
    begin = load.first + element * load.rows
    if begin <= FAULT["sample"] < begin + load.rows:
        raise DataError(f"shapes, sample {FAULT['sample']}: damaged [test]")
    return original(load, element)


def _die(event, arguments, seen=[0]):  # noqa: B006
    if event not in ("os.remove", "os.rmdir", "os.rename", "shutil.rmtree"):
        return
    inside = "checkpoints" in str(arguments[0]) or any(n not in (-1, None) for n in arguments[1:])
    seen[0] += inside
    if seen[0] == FAULT["die"]:
        os._exit(9)


if "sample" in FAULT and "main" in __name__:  # the workers' name is __mp_main__
    pipeline._Load.map = _unreadable

if __name__ == "__main__":
    from absl import app

    from launch import train

    if "die" in FAULT:
        sys.addaudithook(_die)
    if "blind" in FAULT:
        RunCheckpoints._free = lambda self: 1 << 60
    if "file_bytes" in FAULT:
        resource.setrlimit(resource.RLIMIT_FSIZE, (FAULT["file_bytes"],) * 2)
    train.STAGES["tiny"] = stage
    app.run(train.main)
