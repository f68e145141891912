"""Train one stage from a config.

    python -m launch.train --config configs/latents.py:shapes --workdir runs/shapes

Killed or stopped, the same command goes on from the newest checkpoint of --workdir, to the bit.
Exit codes: 0 done; 3 no usable checkpoint; 4 data or config that cannot be used; 5 too many steps
that were not finite; 6 a checkpoint could not be written; 7 latent actions collapsed.
"""

import functools
import json
import os
import pathlib
import sys

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from gear_jax.data.tfrecord import DataError
from gear_jax.train import exits, latents, loop, sharding
from gear_jax.train.exits import StopRunError

STAGES = {"latents": latents.stage}

_CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/NAME.py or NAME.py:SIZE")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of this run", required=True)


def main(_):
    """Run the stage; the exit code says how it ended."""
    logging.set_verbosity(logging.WARNING)
    try:
        state = train(_CONFIG.value, pathlib.Path(_WORKDIR.value))
    except StopRunError as error:
        return _end(error.code, error)
    except (DataError, ValueError) as error:
        return _end(exits.DATA, error)
    print(json.dumps({"ok": True, "step": int(state.step), "workdir": _WORKDIR.value}))
    return _end(exits.DONE)


def train(config, workdir):
    """Train to the end; returns the last state.

    Args:
        config: ConfigDict with stage, seed, mesh, loop and what the stage asks for.
        workdir: folder of the run.

    Raises:
        StopRunError: with the exit code that fits.
        ValueError: the config cannot be used.
        DataError: the data cannot be used.
    """
    if config.stage not in STAGES:
        raise ValueError(f"stage {config.stage!r} is unknown: expected one of {sorted(STAGES)}")
    config = config.lock()
    mesh = sharding.make_mesh(_fill(config.mesh))
    stage = STAGES[config.stage](config, mesh)
    record = json.loads(config.to_json())
    for key in ("loop", "mesh"):  # how it is run, not what is learned
        del record[key]
    loop_config = loop.LoopConfig(**config.loop)
    say = functools.partial(print, flush=True)
    return loop.run(stage, loop_config, workdir, mesh, seed=config.seed, record=record, say=say)


def _fill(sizes):
    """Mesh sizes with the one that is -1 set to what is left."""
    sizes = dict(sizes)
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    return {key: jax.device_count() // known if n == -1 else n for key, n in sizes.items()}


def _end(code, error=None):
    if error is not None:
        print(f"error: {error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # workers and collectives of a run that failed must not hold it up


if __name__ == "__main__":
    app.run(main)
