"""Starts trainers, hurts them, and reads what they leave."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from gear_jax.train import checkpoint, latents
from gear_jax.train.optim import make_tx
from gear_jax.train.run_checkpoints import RunCheckpoints
from gear_jax.train.state import new_state
from tests.faults import trainer

ROOT = pathlib.Path(__file__).parents[2]
LONG = "FAULTS_LONG" in os.environ
PATIENCE = 600 if LONG else 180  # seconds, on a busy machine


@dataclasses.dataclass
class Trainer:
    """A process, and the file of all that it said."""

    process: subprocess.Popen
    output: pathlib.Path

    def said(self):
        return self.output.read_text()

    def wait(self, seconds=PATIENCE):
        return self.process.wait(seconds)

    def until(self, true, seconds=PATIENCE):
        """Wait until `true()`; the process must be alive then."""
        begun = time.monotonic()
        while not true():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() - begun < seconds, self.said()
            time.sleep(0.02)
        return self


@dataclasses.dataclass
class Place:
    """A working directory, its data, and the options of its runs."""

    workdir: pathlib.Path
    data: pathlib.Path
    options: dict

    def command(self, options):
        trainer = ROOT / "tests/faults/trainer.py"
        options = {"data.work": self.data, **options}
        return [sys.executable, trainer, "--config", trainer], options

    def start(self, *flags, devices=2, fault=None, **options):
        command, options = self.command({**self.options, **options})
        command += ["--workdir", self.workdir, *flags]
        command += [f"--config.{key}={value}" for key, value in options.items()]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
            "--xla_cpu_multi_thread_eigen=false",
            "FAULT": json.dumps(fault or {}),
        }
        self.workdir.parent.mkdir(parents=True, exist_ok=True)
        output = self.workdir.with_name(f"{self.workdir.name}-{time.monotonic_ns()}.txt")
        with output.open("w") as file:
            process = subprocess.Popen(
                [str(word) for word in command], cwd=ROOT, env=environment, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        STARTED.append(process)
        return Trainer(process, output)

    def pair(self, heartbeat=5, devices=4, **options):
        """Two processes, as on two hosts."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        return [
            self.start("--coordinator", address, "--num_processes", 2, "--process_id", number,
                       "--heartbeat", heartbeat, devices=devices, **options)
            for number in range(2)
        ]  # fmt: skip

    def run(self, code=0, **options):
        """Run to the end, which must be the one that is expected."""
        made = self.start(**options)
        assert made.wait() == code, made.said()
        return made.said()

    def rows(self):
        path = self.workdir / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def reached(self, step):
        return lambda: any(row["step"] >= step for row in self.rows())

    def losses(self):
        return [(row["step"], row["loss"]) for row in self.rows() if "loss" in row]

    def steps(self):
        """Steps that a reader would be offered; each must be what was written."""
        reader = RunCheckpoints(self.workdir / "checkpoints", read_only=True)
        found = reader.steps()
        for step in found:
            checkpoint.verify_digests(reader.path(step))
        return found

    def leftovers(self):
        return list((self.workdir / "checkpoints").glob("*tmp*"))

    def state(self):
        """Step and state of the newest checkpoint, on one device."""
        config = trainer.get_config()
        config.update_from_flattened_dict(self.options)
        first = functools.partial(trainer.init, config.width)
        params, _ = jax.eval_shape(first, jax.random.key(0))
        tx = make_tx(params, trainer.optim(config))
        shapes = jax.eval_shape(functools.partial(new_state, first, tx, config.seed, ema=True))
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        targets = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes
        )
        return RunCheckpoints(self.workdir / "checkpoints", read_only=True).restore(targets)

    def digest(self):
        """Hash over every bit of the newest state, with its step."""
        restored = self.state()
        return restored.step, sha256(restored.state)


class Latents(Place):
    """The same for the stage `latents`."""

    def command(self, options):
        command = [sys.executable, "-m", "launch.train", "--config", "configs/latents.py:debug"]
        return command, options

    def digest(self):
        """The newest step, and a hash over its parameters and codebook."""
        newest = self.steps()[-1]
        _, params, codebook, _ = latents.load(self.workdir)
        return newest, sha256((params, codebook))


@dataclasses.dataclass
class Gear(Place):
    """The same for a stage of GEAR-VLA, by the config of its debug size."""

    config: str = ""

    def command(self, options):
        return [sys.executable, "-m", "launch.train", "--config", f"configs/{self.config}"], options

    def digest(self):
        """The newest step, and a hash over every array of its checkpoint."""
        newest = self.steps()[-1]
        path = RunCheckpoints(self.workdir / "checkpoints", read_only=True).path(newest)
        with ocp.PyTreeCheckpointer() as checkpointer:
            there = checkpointer.metadata(path / "state").item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), there)
            return newest, sha256(checkpointer.restore(path / "state", restore_args=as_numpy))


STARTED: list[subprocess.Popen] = []


def sha256(tree):
    """Hash over every bit of a tree, keys of random numbers too."""
    made = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        made.update(np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes())
    return made.hexdigest()


def family(process):
    """{pid: command} of all that still lives in a trainer's session, itself apart (Linux)."""
    found = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            after_name = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if int(after_name[3]) == process.pid and after_name[0] != "Z":
                found[int(folder.name)] = command
    found.pop(process.pid, None)
    return found


def workers(process):
    """Pids of the data workers of a trainer."""
    return [pid for pid, command in family(process).items() if "resource_tracker" not in command]
