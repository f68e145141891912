"""Look at data sets, measure them, and time the pipeline.

    python -m launch.data inspect bridge_dataset/1.0.0 --row bridge_dataset --out runs/bridge
    python -m launch.data inspect my_robot --out runs/my_robot           # no row yet: its keys
    python -m launch.data stats droid/1.0.0 --row droid --out runs/droid --workers 8
    python -m launch.data merge runs/*/measured.npz --out runs/all.json   # exact, in any order
    python -m launch.data bench droid/1.0.0 --row droid --out runs/droid --size 448 --workers 4
    python -m launch.data check-records pool.jsonl                        # vision-language records

`inspect` writes page.html and episode_N.rrd; `stats` writes measured.npz and statistics.json and
says whether they are fit to train on. What is derived from a data set goes below --out; its own
folder is never written to. Exit codes: 0 done; 4 data that cannot be used, said in one sentence.
"""

import argparse
import json
import os
import pathlib
import sys
import time
import typing

from rich.console import Console
from rich.progress import Progress

from gear_jax.data.catalog import DatasetConfig, Format, open_prepared, open_source, row_options
from gear_jax.data.measure import Measured, measure
from gear_jax.data.mixtures import Phase
from gear_jax.data.pipeline import Stream, StreamConfig
from gear_jax.data.record_pool import Pool
from gear_jax.data.statistics import check, report
from gear_jax.data.tfrecord import DataError
from gear_jax.types import ActionSpec


def main(argv=None):
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, words in (
        ("inspect", "a page and recordings to look at"),
        ("stats", "exact statistics and the validity gate"),
        ("bench", "samples a second of the pipeline"),
    ):
        command = commands.add_parser(name, help=words)
        command.add_argument("path", help="folder of the data set")
        command.add_argument("--row", help="name of the table's row, or a JSON file with your own")
        command.add_argument("--format", choices=typing.get_args(Format))
        command.add_argument("--layout", help="of HDF5: agibot, robomind, robomimic or libero")
        command.add_argument("--split", default="train")
        command.add_argument("--option", action="append", default=[], help="of the row: KEY=VALUE")
        command.add_argument("--kinematics", help="JSON: {arm: {model, base, tip, joints}}")
        command.add_argument("--budget", type=float, default=0.01, help="fraction that may be lost")
        command.add_argument("--out", type=pathlib.Path, required=True)
        command.add_argument("--workers", type=int, default=0)
        if name == "inspect":
            command.add_argument("--episodes", type=int, nargs="*", help="numbers; the first two")
        if name == "stats":
            command.add_argument("--every", type=int, default=1, help="take each n-th step")
        if name == "bench":
            command.add_argument("--batch", type=int, default=32)
            command.add_argument("--size", type=int, default=448)
            command.add_argument("--seconds", type=float, default=10)
    command = commands.add_parser("merge", help="statistics of several data sets or hosts as one")
    command.add_argument("measured", type=pathlib.Path, nargs="+")
    command.add_argument("--out", type=pathlib.Path, required=True)
    command = commands.add_parser("check-records", help="faults of vision-language records")
    command.add_argument("pool", type=pathlib.Path)
    args = parser.parse_args(argv)
    run = {"inspect": _inspect, "stats": _stats, "bench": _bench, "merge": _merge,
           "check-records": _check_records}[args.command]  # fmt: skip
    try:
        return run(args)
    except (DataError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 4


def _config(args):
    kinematics = json.loads(pathlib.Path(args.kinematics).read_text()) if args.kinematics else {}
    return DatasetConfig(
        args.path,
        args.row or "",
        str(args.out),
        format=args.format,
        split=args.split,
        layout=args.layout,
        options=row_options(args.option),
        kinematics=kinematics,
        budget=args.budget,
    )


def _progress():
    return Progress(console=Console(stderr=True), transient=True)


def _open(args, progress):
    """The prepared data set, with a bar while it is made."""
    if not args.row:
        raise DataError(f"{args.path}: this command needs --row")
    task = progress.add_task("prepare", total=None)
    return open_prepared(
        _config(args),
        num_workers=max(1, args.workers),
        report=lambda done, total: progress.update(task, completed=done, total=total),
    )


def _measure(prepared, every, progress):
    task = progress.add_task("measure", total=prepared.num_steps)
    return measure(
        prepared, ActionSpec(), every=every, report=lambda n: progress.update(task, completed=n)
    )


def _inspect(args):
    try:
        from gear_jax.report import data_page
    except ImportError as error:
        raise DataError(f"pages need: pip install 'gear_jax[report]' ({error})") from error
    page = args.out / "page.html"
    with _progress() as progress:
        if not args.row:
            source = open_source(_config(args))
            data_page.raw_page(source, _chosen(args, len(source)), page)
            print(f"{len(source)} episodes, no row: {page}")
            return 0
        prepared = _open(args, progress)
        chosen = _chosen(args, len(prepared))
        measured = _measure(prepared, max(1, prepared.num_steps // 200_000), progress)
        data_page.prepared_page(prepared, measured, chosen, page)
        task = progress.add_task("record", total=len(chosen))
        for number in chosen:
            target = args.out / f"episode_{number}.rrd"
            data_page.recording(prepared.episode(number), measured.spec, target)
            progress.advance(task)
    print(f"{len(prepared)} episodes, {prepared.num_steps} steps: {page}")
    return 0


def _chosen(args, count):
    chosen = args.episodes if args.episodes else list(range(min(2, count)))
    wrong = [number for number in chosen if not 0 <= number < count]
    if wrong:
        raise DataError(f"{args.path}: episodes {wrong}: expected 0 .. {count - 1}")
    return chosen


def _stats(args):
    with _progress() as progress:
        prepared = _open(args, progress)
        measured = _measure(prepared, args.every, progress)
    measured.save(args.out / "measured.npz")
    return _report(measured, prepared.row.name, args.out / "statistics.json")


def _merge(args):
    merged = Measured(ActionSpec())
    for path in args.measured:
        merged.merge(Measured.load(path, merged.spec))
    return _report(merged, "all" if len(merged.embodiments) > 1 else "".join(merged.embodiments),
                   args.out)  # fmt: skip


def _report(measured, name, target):
    statistics = measured.statistics(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    statistics.save(target)
    print(report(statistics))
    faults = check(statistics, measured.spec)
    for fault in faults:
        print(f"not fit to train on: {fault}", file=sys.stderr)
    print(f"{'NOT fit' if faults else 'fit'} to train on -> {target}")
    return 4 if faults else 0


def _bench(args):
    with _progress() as progress:
        prepared = _open(args, progress)
    config = StreamConfig(args.batch, 10**6, image_size=args.size)
    stream = Stream({"set": prepared}, [Phase(0.0, {"set": 1.0})], config, num_workers=args.workers)
    begin = time.perf_counter()
    next(stream)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < args.seconds:
        next(stream)
        count += args.batch
    rate = count / (time.perf_counter() - started)
    print(f"{rate:.0f} samples/s at {args.size} px, augmented, {args.workers} workers on "
          f"{os.cpu_count()} cores; first batch after {started - begin:.1f} s")  # fmt: skip
    stream.close()
    return 0


def _check_records(args):
    pool = Pool(args.pool)
    faults = 0
    with _progress() as progress:
        for fault in progress.track(pool.check(), description="records", total=len(pool)):
            print(fault)
            faults += 1
    print(f"{len(pool)} records, {faults} faults")
    return 4 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
