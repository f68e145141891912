"""What our relative-action path loses: scripted LIBERO episodes, replayed from their chunks.

    python -m benchmarks.libero_replay --inits 5 --replan 10 --folder runs/libero_replay

The expert's episodes are written as a demonstration set and read back as the pipeline reads them.
Then, at every query, the chunk that a perfect policy would answer (`make_window` at that time) is
made absolute and followed with the servo, open loop until the next query. Absolute from where the
simulated hand is now, as for a policy (`--anchor hand`): but a replay sees nothing, so what it is
behind at a query is missing for good. Or from where the recorded hand was (`--anchor record`): then
only chunks, rates and servo are left to lose something.
Needs 'gear_jax[libero]'; physics only, about 6 s of CPU an episode for both together.
"""

import argparse
import dataclasses
import tempfile

import numpy as np

from gear_jax.data.catalog import DatasetConfig, open_prepared
from gear_jax.data.rlds_writer import RldsWriter
from gear_jax.data.windows import make_window
from gear_jax.evals.runner import steps_between
from gear_jax.evals.sims.libero import LiberoSimulator
from gear_jax.evals.sims.libero_demos import episodes
from gear_jax.evals.sims.recording import columns
from gear_jax.evals.statistics import wilson
from gear_jax.policy.execution import targets
from gear_jax.policy.servo import SERVOS
from gear_jax.types import ActionSpec, Observation

_BLANK = np.zeros((16, 16, 3), np.uint8)  # nobody looks at these pictures


def write_demonstrations(simulator, folder, num_inits, speed):
    """Successes among 10 tasks x `num_inits`, written below `folder`."""

    def look():
        views = {"head": _BLANK, "right_wrist": _BLANK}
        return Observation(views, simulator.instruction, "franka", simulator.state())

    with RldsWriter(folder, "replay", columns()) as writer:
        for _, record in episodes(simulator, range(10), range(num_inits), speed=speed, look=look):
            if record is not None:
                writer.add(record)


def replay(simulator, episode, spec, num_steps, anchor):
    """Run one episode from its own chunks, absolute from `anchor`: "hand" or "record".

    Returns:
        Whether the task was done, and float64[steps] metres between the hand and its targets.
    """
    task, init = episode.episode_id.split("/")[-2:]
    simulator.reset(task, int(init.removeprefix("init_").partition("#")[0]))
    limit = next(one.max_steps for one in simulator.tasks() if one.name == task)
    errors, step = [], 0
    while step < limit:
        window = make_window(episode, min(step, episode.num_steps - 1), spec)
        way = targets(
            window.action,
            simulator.state() if anchor == "hand" else window.state,
            spec,
            rate_hz=simulator.rate_hz,
            num_steps=min(num_steps, limit - step),
        )
        for target in way:
            done = simulator.step(target)
            step += 1
            errors.append(np.linalg.norm(simulator.pose()[:3, 3] - target["right"][0][:3, 3]))
            if done:
                return True, np.array(errors)
    return False, np.array(errors)


def main(argv=None):
    """Print both counts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.libero_replay")
    parser.add_argument("--suite", default="libero_spatial")
    parser.add_argument("--inits", type=int, default=5, help="of each task")
    parser.add_argument("--replan", type=int, default=10, help="rows of a chunk until the next")
    parser.add_argument("--anchor", choices=("hand", "record"), default="hand")
    parser.add_argument("--folder", help="keeps the demonstrations; used again if they are there")
    parser.add_argument("--speed", type=float, default=0.8, help="of the expert, 0 .. 1")
    parser.add_argument("--servo", choices=tuple(SERVOS), default="unit_mass")
    parser.add_argument("--correction", type=float, help="of the servo, if not its own")
    args = parser.parse_args(argv)
    simulator, spec = LiberoSimulator(args.suite, servo=args.servo), ActionSpec()
    total = 10 * args.inits
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or temporary
        try:
            write_demonstrations(simulator, folder, args.inits, args.speed)
        except FileExistsError:
            print("demonstrations are there already")
        config = DatasetConfig(
            f"{folder}/replay/1.0.0",
            "libero",
            f"{folder}/work",
            options={"joint_state": "used"},
        )
        prepared = open_prepared(config)
        if args.correction is not None:
            simulator.servo = dataclasses.replace(simulator.servo, correction=args.correction)
        num_steps = steps_between(args.replan, spec.rate_hz, simulator.rate_hz)
        found, errors, missed = 0, [], []
        for number in range(len(prepared)):
            episode = prepared.episode(number)
            done, error = replay(simulator, episode, spec, num_steps, args.anchor)
            found += done
            errors.append(error)
            missed += [] if done else [episode.episode_id]
    print(f"expert: {len(prepared)} of {total}, {_interval(len(prepared), total)}")
    print(
        f"replay: {found} of {total}, {_interval(found, total)}; {num_steps} steps a query, from "
        f"the {args.anchor}"
    )
    error = 1000 * np.concatenate(errors)
    print(
        f"hand to target after each step: median {np.median(error):.1f} mm, 90 % within "
        f"{np.quantile(error, 0.9):.1f} mm; servo {simulator.servo}"
    )
    for one in missed:
        print(f"not done: {one}")
    simulator.close()


def _interval(count, total):
    low, high = wilson(count, total)
    return f"95 % interval {100 * low:.1f} .. {100 * high:.1f} %"


if __name__ == "__main__":
    main()
