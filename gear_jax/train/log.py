"""What a run says: metrics.jsonl, an event file for TensorBoard, a line now and then."""

import json
import re
import time

import jax
import numpy as np

from gear_jax.train import exits
from gear_jax.train.event_file import EventFile
from gear_jax.train.exits import StopRunError

# dense bfloat16 FLOP/s of one device, by jax's device_kind; vendors' data sheets
PEAKS = (
    (r"NVIDIA (H100 80GB HBM3|H200|GH200.*)", 989e12),
    (r"NVIDIA A100.*", 312e12),
    (r"TPU v4", 275e12),
    (r"TPU v5 ?(lite|e)", 197e12),
    (r"TPU v5p?", 459e12),
    (r"TPU v6 ?(lite|e)", 918e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device, or None where the table does not have it."""
    return next((peak for kind, peak in PEAKS if re.fullmatch(kind, device_kind)), None)


class Log:
    """One line for a person now and then, one JSON line per logged step for programs."""

    def __init__(self, workdir, begun, num_steps, config, flops_per_sample, say):
        """Open the files; of what is there, lines after the step `begun` go.

        Args:
            workdir: folder of the run.
            begun: step at which the run goes on.
            num_steps: of the whole run.
            config: LoopConfig.
            flops_per_sample: of one sample's step, or None.
            say: prints a line.
        """
        path = workdir / "metrics.jsonl"
        peak = peak_flops(jax.devices()[0].device_kind)
        known = flops_per_sample is not None and peak is not None
        self.samples_to_mfu = flops_per_sample / (jax.device_count() * peak) if known else None
        self.num_steps, self.config, self.say = num_steps, config, say
        self.waited, self.rows, self.started, self.last = 0.0, 0, time.perf_counter(), begun
        self.leads = jax.process_index() == 0
        if self.leads:
            kept = [
                line
                for line in (path.read_text().splitlines() if path.exists() else [])
                if line.endswith("}") and json.loads(line)["step"] <= begun
            ]
            path.write_text("".join(f"{line}\n" for line in kept))
            self.file = path.open("a")
            self.events = EventFile(workdir / "tensorboard", begun)

    def step(self, step, metrics, samples):
        """Metrics of a step that is done; raises when too many were not finite."""
        self.rows += len(samples) * jax.process_count()
        if int(metrics["bad_steps"]) >= self.config.max_bad_steps:
            raise StopRunError(
                exits.NOT_FINITE,
                f"step {step}: loss or gradient was not finite {int(metrics['bad_steps'])} times "
                f"in a row, last for samples {int(samples[0])} to {int(samples[-1])}; nothing of "
                "it was applied",
            )
        if step % self.config.log_every and step != self.num_steps:
            return
        values = {key: np.asarray(value).tolist() for key, value in sorted(metrics.items())}
        passed = time.perf_counter() - self.started
        speed = {
            "samples_per_second": self.rows / passed,
            "data_wait": self.waited / passed,
        }
        if self.samples_to_mfu is not None:
            speed["mfu"] = speed["samples_per_second"] * self.samples_to_mfu
        left = passed / max(step - self.last, 1) * (self.num_steps - step)
        self.waited, self.rows, self.started, self.last = 0.0, 0, time.perf_counter(), step
        self._write({"step": step, **values, **speed})
        self._say(step, {**values, **speed, "minutes_left": left / 60})

    def evaluated(self, step, names, evaluators, state):
        """Run evaluators and write what they say."""
        for name in names:
            began = time.perf_counter()
            values = {f"{name}/{key}": value for key, value in evaluators[name].run(state).items()}
            self.started += time.perf_counter() - began  # not the training's time
            self._write({"step": step, **values})
            self._say(step, values)

    def _write(self, row):
        if self.leads:
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
            self.events.add(row["step"], _flat(row))

    def _say(self, step, values):
        if self.leads:
            shown = "  ".join(f"{key} {_short(value)}" for key, value in values.items())
            self.say(f"step {step}/{self.num_steps}  {shown}")

    def close(self):
        """Close the file."""
        if self.leads:
            self.file.close()
            self.events.close()


def _flat(row):
    """{tag: number} without the step; a list becomes one tag for each place."""
    flat = {}
    for key, value in row.items():
        if isinstance(value, list):
            flat |= {f"{key}/{place}": one for place, one in enumerate(value)}
        elif key != "step":
            flat[key] = value
    return flat


def _short(value):
    return " ".join(map(_short, value)) if isinstance(value, list) else f"{value:.4g}"
