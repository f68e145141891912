"""Scripted demonstrations as RLDS, where no human ones are to be had.

    python -m launch.demos --sim libero_spatial --tasks 0:10 --inits 0:5 --target data/scripted
    python -m launch.demos --sim libero_object --tasks 3 --inits 0:50 --target data/scripted \
        --image-size 128 --quality fast --noise 0.5 --seed 1
    python -m launch.demos --sim tabletop --tasks 0:4 --inits 1000:1100 --target data --noise 0.7
    python -m launch.demos questions --target data/questions      # where is which block?

Makes <target>/<sim>_scripted/1.0.0 with LIBERO's field names; read it through row `libero` with the
option joint_state=used, the tabletop's through row `tabletop`. Only successes are kept. It appears
whole or not at all, and is the same for the same flags. Exit codes: 0 done; 4 something that cannot
be used, said in one sentence.
"""

import argparse
import functools
import multiprocessing
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import Progress

from gear_jax.data.rlds_writer import RldsWriter
from gear_jax.evals.sims.recording import columns

Episodes = Iterator[tuple[str, dict[str, Any] | None]]


def _libero(suite: str, args) -> Episodes:
    from gear_jax.evals.sims.libero import LiberoSimulator
    from gear_jax.evals.sims.libero_demos import episodes

    speed = {} if args.speed is None else {"speed": args.speed}
    simulator = LiberoSimulator(suite, image_size=args.image_size, quality=args.quality)
    try:
        yield from episodes(
            simulator,
            args.tasks,
            args.inits,
            noise=args.noise,
            seed=args.seed,
            repeats=args.repeats,
            encoding=args.encoding,
            **speed,
        )
    finally:
        simulator.close()


def _tabletop(args) -> Episodes:
    from gear_jax.evals.sims import tabletop_data

    yield from tabletop_data.demonstrations(
        args.tasks, args.inits, noise=args.noise, seed=args.seed, encoding=args.encoding
    )


# {--sim: flags -> (source, record or None where the expert failed), one episode after the other}
SIMULATORS: dict[str, Callable[[Any], Episodes]] = {
    suite: functools.partial(_libero, suite)
    for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10")
} | {"tabletop": _tabletop}
NUM_JOINTS = {"tabletop": 4}  # LIBERO's arms have 7
_INITS_AT_A_TIME = {"tabletop": 8, "libero": 13}  # in one worker; of LIBERO, of one task


def _episodes(args) -> Episodes:
    """All episodes, in the same order for any number of workers."""
    if args.workers == 1:
        yield from SIMULATORS[args.sim](args)
        return
    together = args.sim == "tabletop"  # all its tasks are one model
    size = _INITS_AT_A_TIME["tabletop" if together else "libero"]
    parts = [
        argparse.Namespace(
            **{**vars(args), "tasks": tasks, "inits": args.inits[first : first + size]}
        )
        for tasks in ([args.tasks] if together else [[task] for task in args.tasks])
        for first in range(0, len(args.inits), size)
    ]
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for made in pool.imap(_part, parts):
            yield from made


def _part(args) -> list:
    return list(SIMULATORS[args.sim](args))


def main(argv=None):
    """Write one demonstration set, or questions; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _questions(argv[1:]) if argv[:1] == ["questions"] else _write(_arguments(argv))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 4


def _questions(argv):
    """Pointing records about random scenes of the tabletop."""
    parser = argparse.ArgumentParser(prog="python -m launch.demos questions")
    parser.add_argument("--target", type=pathlib.Path, required=True, help="a folder")
    parser.add_argument("--scenes", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.scenes < 1 or args.seed < 0:
        raise ValueError(f"--scenes {args.scenes}, --seed {args.seed}: expected 1 and 0 or more")
    from gear_jax.evals.sims.tabletop_data import num_images, write_questions

    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("scenes", total=num_images(args.scenes))
        write_questions(
            args.target, args.scenes, seed=args.seed, progress=lambda done: progress.advance(bar)
        )
    print(f"{args.scenes} scenes: {args.target}")
    return 0


def _arguments(argv):
    parser = argparse.ArgumentParser(
        prog="python -m launch.demos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--sim", required=True, choices=sorted(SIMULATORS))
    parser.add_argument("--tasks", default="0:10", help="numbers: FIRST:END, or with commas")
    parser.add_argument("--inits", default="0:10", help="initial states of each task, likewise")
    parser.add_argument("--target", type=pathlib.Path, required=True, help="folder of data sets")
    parser.add_argument("--name", help="of the data set; <sim>_scripted")
    parser.add_argument("--image-size", type=int, default=256, help="pixels")
    parser.add_argument("--quality", choices=("full", "fast"), default="full")
    parser.add_argument("--encoding", choices=("jpeg", "png"), default="jpeg")
    parser.add_argument("--noise", type=float, default=0.0, help="0 .. 1, of executed actions")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument(
        "--repeats",
        type=int,
        default=1,
        help="LIBERO: runs of each initial state, each with the next seed",
    )
    parser.add_argument("--speed", type=float, help="LIBERO: of the hand, 0 .. 1; 0.8")  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, help="processes; the same episodes")
    args = parser.parse_args(argv)
    args.tasks, args.inits = _numbers("tasks", args.tasks), _numbers("inits", args.inits)
    if not 0 <= args.noise <= 1:
        raise ValueError(f"--noise {args.noise}: expected 0 .. 1")
    if args.seed < 0:
        raise ValueError(f"--seed {args.seed}: expected 0 or more")
    if args.sim == "tabletop" and (args.repeats != 1 or args.speed is not None):
        raise ValueError(
            "--repeats and --speed are of LIBERO: the tabletop has initial states enough"
        )
    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats}: expected 1 or more")
    if args.speed is not None and not 0 < args.speed <= 1:
        raise ValueError(f"--speed {args.speed}: expected more than 0, 1 at most")
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: expected 1 or more")
    return args


def _numbers(name, text):
    """0:3 or 0,1,2 -> [0, 1, 2]."""
    first, colon, end = text.partition(":")
    parts = (first, end) if colon else text.split(",")
    if all(part.isdecimal() for part in parts):
        numbers = list(range(int(first), int(end))) if colon else [int(part) for part in parts]
        if numbers:
            return numbers
    raise ValueError(f"--{name} {text!r}: expected FIRST:END or numbers with commas between them")


def _write(args):
    total = len(args.tasks) * len(args.inits) * args.repeats
    kept, steps, failed = 0, 0, []
    runs = set()
    writer = RldsWriter(
        args.target,
        args.name or f"{args.sim}_scripted",
        columns(NUM_JOINTS.get(args.sim, 7), args.encoding),
    )
    with writer, Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(args.sim, total=total)
        for source, record in _episodes(args):
            if record is None:
                failed.append(source)
            else:
                writer.add(record)
                kept, steps = kept + 1, steps + len(record["steps/action"])
            runs.add(source.partition("#")[0])  # a run may give several episodes
            progress.update(bar, completed=len(runs))
    for source in failed:
        print(f"the expert failed, left out: {source}", file=sys.stderr)
    print(
        f"{kept} episodes, {steps} steps, of {total - len(failed)} of {total} runs: {writer.target}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
