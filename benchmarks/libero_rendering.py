"""Episodes an hour in real LIBERO: pictures once a query against pictures at each step.

    python -m benchmarks.libero_rendering --episodes 3

Both run the scripted expert on the same libero_spatial tasks, full quality, both cameras, and take
turns; each step is what the benchmark's own environments do. Needs 'gear_jax[libero]'.
"""

import argparse
import os

os.environ.setdefault("LP_NUM_THREADS", "1")  # of Mesa's software renderer: one core, comparable

import time

from gear_jax.evals.sims.libero import LiberoSimulator
from gear_jax.evals.sims.libero_expert import LiberoExpert


def run(simulator, task, every):
    """One episode with a picture each `every` steps.

    Returns:
        Steps, pictures (of both cameras), wall and CPU seconds; making the environment, a cost of
        each task and not of each episode, is not counted.
    """
    simulator.reset(task.name, 0)
    simulator.observe()
    begun, used = time.perf_counter(), time.process_time()
    simulator.reset(task.name, 0)
    expert, done, step, pictures = LiberoExpert(simulator), False, 0, 0
    while not done and step < task.max_steps:
        if step % every == 0:
            simulator.observe()
            pictures += 1
        done = simulator.act(expert.act())
        step += 1
    return step, pictures, time.perf_counter() - begun, time.process_time() - used


def main(argv=None):
    """Print both rates and their ratio."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.libero_rendering")
    parser.add_argument("--episodes", type=int, default=3, help="each of another task")
    parser.add_argument("--every", type=int, default=7, help="control steps a query")
    parser.add_argument("--size", type=int, default=256)
    args = parser.parse_args(argv)
    simulator = LiberoSimulator("libero_spatial", image_size=args.size)
    wall, cpu = {args.every: 0.0, 1: 0.0}, {args.every: 0.0, 1: 0.0}
    for number, task in enumerate(simulator.tasks()[: args.episodes]):
        for every in (args.every, 1) if number % 2 else (1, args.every):
            steps, pictures, seconds, used = run(simulator, task, every)
            wall[every] += seconds
            cpu[every] += used
            print(
                f"task {number}, every {every}: {steps} steps, {pictures} pictures of both "
                f"cameras, {seconds:.1f} s, {used:.1f} s of CPU",
                flush=True,
            )
    for every in wall:
        print(
            f"a picture each {every} steps: {3600 * args.episodes / wall[every]:.0f} episodes an "
            f"hour, {3600 * args.episodes / cpu[every]:.0f} an hour of CPU"
        )
    print(
        f"ratio: {wall[1] / wall[args.every]:.1f} by the clock, "
        f"{cpu[1] / cpu[args.every]:.1f} in CPU time"
    )
    simulator.close()


if __name__ == "__main__":
    main()
