r"""Write the latent action ids of a data set beside its prepared numbers, for training to read.

    python -m launch.extract --tokenizer runs/latents --path bridge_dataset/1.0.0 \
        --row bridge_dataset --work runs/data/bridge_dataset --out runs/ids/bridge_dataset

Run it once on each of several machines with --host 0 --hosts 8, --host 1 --hosts 8 and so on: the
last to finish joins the parts. Killed, the same command goes on; finished, it has nothing to do.
--page also writes page.html: what is chosen how often, clips with their codes, and what each code
looks like. The last line is one JSON object. Exit codes: 0 done; 4 data that cannot be used.
"""

import argparse
import json
import pathlib
import sys
import time

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gear_jax.data.catalog import DatasetConfig, open_prepared, row_options
from gear_jax.data.latent_ids import LatentIds, LatentWriter
from gear_jax.data.tfrecord import DataError
from gear_jax.train import extraction, latents, sharding
from gear_jax.train.run_checkpoints import NoCheckpointError


def main(argv=None):
    """Extract; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.extract",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokenizer", type=pathlib.Path, required=True, help="run of `latents`")
    parser.add_argument("--path", required=True, help="folder of the data set")
    parser.add_argument("--row", required=True, help="as in launch.data")
    parser.add_argument("--option", action="append", default=[], help="of the row: KEY=VALUE")
    parser.add_argument("--work", required=True, help="folder of the index and prepared numbers")
    parser.add_argument("--format", help="as in launch.data")
    parser.add_argument("--split", default="train")
    parser.add_argument("--layout")
    parser.add_argument("--drawing", type=json.loads, default={}, help="JSON, for shapes")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the ids")
    parser.add_argument("--batch", type=int, default=64, help="clips, divided among the devices")
    parser.add_argument("--part", type=int, default=4096, help="steps of a part")
    parser.add_argument("--threads", type=int, default=4, help="that decode images")
    parser.add_argument("--bad-images", type=float, default=0.001, help="fraction that may be bad")
    parser.add_argument("--host", type=int, default=0)
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args(argv)
    try:
        return _extract(args)
    except (DataError, NoCheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 4


def _extract(args):
    if not 0 <= args.host < args.hosts or args.batch % jax.local_device_count():
        raise ValueError(
            f"--host {args.host} of {args.hosts}, --batch {args.batch} on "
            f"{jax.local_device_count()} devices: expected a host below --hosts, and a batch that "
            "the devices divide"
        )
    config = DatasetConfig(
        args.path, args.row, args.work, format=args.format, split=args.split, layout=args.layout,
        options=row_options(args.option), drawing=args.drawing,
    )  # fmt: skip
    prepared = open_prepared(config)
    cfg, params, codebook, source = latents.load(args.tokenizer)
    mesh = sharding.make_mesh({"data": jax.local_device_count()}, jax.local_devices())
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params, codebook = jax.device_put((params, codebook), everywhere)
    tokenizer = extraction.Tokenizer(cfg, params, codebook, source["digest"], args.batch, mesh)
    writer = LatentWriter(args.out, extraction.spec_of(tokenizer, prepared, args.part))
    begun = time.perf_counter()
    with _progress() as progress:
        missing = sum(len(part) for part in writer.missing())
        task = progress.add_task("clips", total=missing)
        done = extraction.extract(
            tokenizer,
            prepared,
            writer,
            host=args.host,
            num_hosts=args.hosts,
            num_threads=args.threads,
            budget=args.bad_images,
            report=lambda clips: progress.update(task, completed=clips),
        )
    if args.page:
        _page(args, tokenizer, prepared, writer)
    seconds = time.perf_counter() - begun
    said = {
        "ok": True,
        "finished": writer.done,
        "clips": done.clips,
        "clips_per_second": round(done.clips / seconds, 1),
        "decode_share": round(done.decode / max(done.decode + done.encode, 1e-9), 3),
        "bad_images": done.log.dropped,
        "tokenizer_step": source["step"],
        "out": str(args.out),
    }
    print(json.dumps(said))
    return 0


def _page(args, tokenizer, prepared, writer):
    """The page of figures; only the process that finds all parts done makes it."""
    if not writer.done:
        print("some parts are missing: no page yet", file=sys.stderr)
        return
    try:
        from gear_jax.report import latents_page
    except ImportError as error:
        raise DataError(f"pages need: pip install 'gear_jax[report]' ({error})") from error
    page = args.out / "page.html"
    latents_page.write(page, tokenizer, prepared, LatentIds(args.out, prepared))
    print(f"page: {page}", file=sys.stderr)


def _progress():
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
