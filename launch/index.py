"""Index RLDS data sets in place, so that training reads only the bytes it needs.

    python -m launch.index DATASET_DIR --split train --workers 8
    python -m launch.index DATASET_DIR --split train --verify      # compare every record's checksum

DATASET_DIR holds features.json, dataset_info.json and the TFRecord shards, as downloaded; nothing
in it is changed but for the folder `.gear_index` (elsewhere with --target). Exit codes: 0 done; 4 a
data set that cannot be used, said in one sentence.
"""

import argparse
import pathlib
import sys
import time

from rich.console import Console
from rich.progress import Progress

from gear_jax.data import tfrecord_index
from gear_jax.data.rlds_features import list_shards
from gear_jax.data.tfrecord import DataError


def main(argv=None):
    """Build the index, or verify the data behind it; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.index", description=__doc__.split("\n")[0]
    )
    parser.add_argument("dataset", type=pathlib.Path)
    parser.add_argument("--split", default="train")
    parser.add_argument("--target", type=pathlib.Path, help="directory of the index")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--verify", action="store_true", help="check the data of an existing index")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            said = _verify(args, progress) if args.verify else _build(args, progress)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    print(f"{said}, {time.perf_counter() - start:.1f} s")
    return 0


def _build(args, progress):
    shards, _ = list_shards(args.dataset, args.split)
    task = progress.add_task("shards", total=len(shards))
    where = tfrecord_index.build(
        args.dataset,
        args.split,
        args.target,
        num_workers=args.workers,
        report=lambda shard: progress.advance(task),
    )
    index = tfrecord_index.Index(args.dataset, args.split, args.target)
    steps = int(index.episodes["steps"].sum())
    return f"{len(index)} episodes, {steps} steps in {len(shards)} shards -> {where}"


def _verify(args, progress):
    index = tfrecord_index.Index(args.dataset, args.split, args.target)
    task = progress.add_task("episodes", total=len(index))
    index.verify(report=lambda episode: progress.advance(task))
    return f"{len(index)} episodes verified"


if __name__ == "__main__":
    sys.exit(main())
