"""Train one stage from a config.

    python -m launch.train --config configs/latents.py:shapes --workdir runs/shapes

Killed or stopped, the same command goes on from the newest checkpoint of --workdir, to the bit.
On a pod the same command runs on every host; Slurm and TPU pods are recognised (docs/run.md).
Exit codes: 0 done; 3 no usable checkpoint; 4 data or config that cannot be used; 5 too many steps
that were not finite; 6 a checkpoint could not be written; 7 latent actions collapsed; 42 preempted
and saved, 70 something broke, 134 (SIGABRT) another process is gone: launch again.
"""

import functools
import json
import pathlib
import sys
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from gear_jax.data.tfrecord import DataError
from gear_jax.train import adapt, exits, hosts, latents, loop, policy, pretrain, sharding
from gear_jax.train.exits import StopRunError

STAGES = {
    "latents": latents.stage,
    "pretrain": pretrain.stage,
    "policy": policy.stage,
    "adapt": adapt.stage,
}

_CONFIG = config_flags.DEFINE_config_file("config", help_string="configs/NAME.py or NAME.py:SIZE")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of this run", required=True)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, inside the pod")
_PROCESSES = flags.DEFINE_integer("num_processes", None, "of the run, one a host")
_PROCESS = flags.DEFINE_integer("process_id", None, "of this process, from 0")
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat", hosts.HEARTBEAT, "seconds after which a silent process ends the run", 1
)


def main(_):
    """Run the stage; the exit code says how it ended."""
    logging.set_verbosity(logging.WARNING)
    try:
        hosts.join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _HEARTBEAT.value)
        state = train(_CONFIG.value, pathlib.Path(_WORKDIR.value))
    except StopRunError as error:
        return _end(error.code, error)
    except (DataError, ValueError) as error:
        return _end(exits.DATA, error)
    except Exception as error:
        traceback.print_exc()
        return _end(exits.INTERNAL, error)
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
    mesh = sharding.make_mesh(config.mesh)
    with hosts.leader_first("stage"):  # it prepares the data sets
        stage = STAGES[config.stage](config, mesh)
    record = json.loads(config.to_json())
    for path in ("loop", "mesh", "data.num_workers", "optim.accumulate"):
        *folders, key = path.split(".")  # how it is run, not what is learned
        functools.reduce(dict.get, folders, record).pop(key, None)
    loop_config = loop.LoopConfig(**config.loop)
    say = functools.partial(print, flush=True)
    return loop.run(stage, loop_config, workdir, mesh, seed=config.seed, record=record, say=say)


def _end(code, error=None):
    if error is not None:
        print(f"{'' if code == exits.PREEMPTED else 'error: '}{error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    hosts.end(code, together=code in (exits.DONE, exits.PREEMPTED))


if __name__ == "__main__":
    app.run(main)
