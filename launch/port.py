"""Port checkpoints between Hugging Face and gear_jax, and prove the port.

    python -m launch.port inspect --model qwen2_5_vl --source HF_DIR
    python -m launch.port convert --model qwen2_5_vl --source HF_DIR --target ORBAX_DIR
    python -m launch.port export  --source ORBAX_DIR --target HF_DIR
    python -m launch.port check   --model vggt --source HF_DIR --cases DIR

Exit codes: 0 done; 1 a check fell short; 4 a file or option that cannot be used, said in one
sentence.
"""

import argparse
import json
import math
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import gear_jax
from gear_jax.porting import files, models, table
from gear_jax.train import sharding

# Small files that users expect beside the weights; they travel unread.
ASSETS = (
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
_MANIFEST = "port.json"
_CASTS = {"keep": None, "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def main(argv=None):
    """Run one subcommand; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except (files.CheckpointError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 4


def inspect(args):
    """Print what a checkpoint holds and whether it fits; reads no tensor."""
    model, _, tensors = models.open_source(args.model, args.source, args.config, args.patch_embed)
    pairs = table.match(model.table, model.parameters, tensors, cast=True)
    shown = Table("parameter", "shape", "dtype", "from")
    by_path = {}
    for entry, tensor in pairs:
        by_path.setdefault(entry.ours, []).append((entry, tensor))
    for path, sources in by_path.items():
        entry, tensor = sources[0]
        dtypes = ", ".join(sorted({t.dtype for _, t in sources}))
        shown.add_row(path, str(list(model.targets[path].shape)), dtypes, entry.row.foreign)
    Console(width=160).print(shown)
    count = sum(math.prod(t.shape) for _, t in pairs)
    skipped = len(tensors) - len(pairs)
    print(
        f"{len(pairs)} tensors, {count:,} parameters, each used once; {skipped} of parts not built"
    )
    return 0


def convert(args):
    """HF directory -> Orbax directory."""
    from gear_jax.train import checkpoint

    _apart(args)
    with checkpoint.new_directory(args.target) as target:
        model, config, tensors = models.open_source(
            args.model, args.source, args.config, args.patch_embed
        )
        cast = _CASTS[args.dtype]
        pairs = table.match(model.table, model.parameters, tensors, cast=cast is not None)
        params = _load(model, pairs, files.DTYPES.get(cast), _mesh(args.mesh))
        checkpoint.save_params(target, params)
        manifest = {
            "gear_jax": gear_jax.__version__,
            "model": model.name,
            "patch_embed": _patch_embed(model),
            "config": config,
            "dtypes": {entry.key: tensor.dtype for entry, tensor in pairs},
        }
        (target / _MANIFEST).write_text(json.dumps(manifest, indent=1))
        _copy_assets(pathlib.Path(args.source), target)
        checkpoint.write_digests(target)
    print(f"{len(pairs)} tensors -> {args.target}")
    return 0


def export(args):
    """Orbax directory -> HF directory, with the tensors' released names, shapes and dtypes."""
    from gear_jax.train import checkpoint

    _apart(args)
    source = pathlib.Path(args.source)
    with checkpoint.new_directory(args.target) as target:
        manifest = files.load_json(source / _MANIFEST)
        if missing := {"model", "config", "patch_embed", "dtypes"} - manifest.keys():
            raise files.CheckpointError(
                f"{source / _MANIFEST}: fields {sorted(missing)} are missing"
            )
        model = models.describe(
            manifest["model"], manifest["config"], _MANIFEST, manifest["patch_embed"]
        )
        mesh = _mesh(args.mesh)
        shardings = sharding.param_shardings(table.unflatten(model.targets), mesh)
        stored = checkpoint.stored_dtypes(source)
        wanted = {
            path: jax.ShapeDtypeStruct(x.shape, stored[path], sharding=s)
            for (path, x), s in zip(
                model.targets.items(), table.flatten(shardings).values(), strict=True
            )
        }
        params = table.flatten(checkpoint.restore_params(source, table.unflatten(wanted)))
        shards = _plan_shards(model, manifest["dtypes"], args.max_shard_gb * 1e9)
        index = {"metadata": {"total_size": 0}, "weight_map": {}}
        sums = []
        for number, entries in enumerate(shards, 1):
            name = "model.safetensors"
            if len(shards) > 1:
                name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            files.write_file(target / name, [_foreign(e, model, params, manifest) for e in entries])
            sums.append(f"{files.sha256(target / name)}  {name}\n")
            for entry in entries:
                index["weight_map"][entry.key] = name
                index["metadata"]["total_size"] += _bytes(entry, manifest["dtypes"])
        if len(shards) > 1:
            (target / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        (target / "SHA256SUMS").write_text("".join(sums))
        (target / "config.json").write_text(json.dumps(manifest["config"], indent=1))
        _copy_assets(source, target)
    print(f"{len(index['weight_map'])} tensors in {len(shards)} file(s) -> {args.target}")
    return 0


def check(args):
    """Run stored cases of the reference through the port and print every difference."""
    from gear_jax.porting import golden

    cases = sorted(pathlib.Path(args.cases).glob("*.npz"))
    if not cases:
        raise files.CheckpointError(f"{args.cases}: no .npz case is there")
    opened, compared = {}, []
    with jax.default_matmul_precision("highest"):
        for path in cases:
            arrays = golden.read_case(path)
            kind = args.patch_embed or _case_patch_embed(args.model, path, arrays, args.source)
            if kind not in opened:
                model, _, tensors = models.open_source(args.model, args.source, args.config, kind)
                pairs = table.match(model.table, model.parameters, tensors, cast=True)
                opened[kind] = model, _load(model, pairs, jnp.float32, _mesh({}))
            model, params = opened[kind]
            if args.model == "vggt":
                compared += golden.check_vggt(path.stem, arrays, params, model.cfg)
            else:
                compared += golden.check_qwen(
                    path.stem, arrays, params, model.cfg, model.entries, model.table.sizes
                )
    return _report(compared, len(cases), golden)


def _report(compared, num_cases, golden):
    shown = Table("case", "output", "shape", "error", "passed")
    for c in compared:
        verdict = ("yes" if c.passed else "NO") + (f" ({c.note})" if c.note else "")
        shown.add_row(c.case, c.output, str(list(c.shape)), f"{c.error:.1e}", verdict)
    Console(width=160).print(shown)
    failed = sum(not c.passed for c in compared)
    print(
        f"{len(compared)} outputs of {num_cases} cases, {failed} fall short "
        f"(float32, atol {golden.ATOL}, rtol {golden.RTOL}; gradients rtol {golden.GRADIENT_RTOL}; "
        "integers exact)"
    )
    return 1 if failed else 0


def _case_patch_embed(model, path, arrays, source):
    """Which of VGGT's patch embeddings a case was made with, when the source has both."""
    if model != "vggt" or not (pathlib.Path(source) / "aggregator.safetensors").exists():
        return None
    prefix = path.stem.split("_")[0]
    if prefix in ("dino", "conv"):
        return prefix
    return "dino" if "pos_embed_interpolated" in arrays else "conv"


def _load(model, pairs, dtype, mesh):
    """Parameters as a tree, with a progress line."""
    shardings = table.flatten(sharding.param_shardings(table.unflatten(model.targets), mesh))
    columns = (
        *Progress.get_default_columns()[:3],
        TextColumn("{task.fields[key]}"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("tensors", total=len(pairs), key="")
        arrays = table.load(
            pairs,
            model.targets,
            model.table.sizes,
            shardings,
            dtype,
            report=lambda tensor: progress.update(task, advance=1, key=tensor.key),
        )
    return table.unflatten(arrays)


def _mesh(sizes):
    devices = jax.devices()
    return sharding.make_mesh(sizes, devices if sizes else devices[:1])


def _mesh_argument(text):
    try:
        return {axis: int(size) for axis, size in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected e.g. fsdp=4,tensor=2") from None


def _patch_embed(model):
    return None if model.name != "vggt" else "conv" if model.cfg.dino is None else "dino"


def _bytes(entry, dtypes):
    return math.prod(entry.shape) * files.DTYPES[dtypes[entry.key]].itemsize


def _plan_shards(model, dtypes, limit):
    """Entries in file order, split so that no file with several tensors exceeds `limit` bytes."""
    shards, size = [[]], 0
    for entry in model.entries:
        more = _bytes(entry, dtypes)
        if shards[-1] and size + more > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += more
    return shards


def _foreign(entry, model, params, manifest):
    dtype = manifest["dtypes"][entry.key]

    def read():
        array = table.to_foreign(entry, params[entry.ours], model.table.sizes)
        return np.ascontiguousarray(array).astype(files.DTYPES[dtype])

    return entry.key, dtype, entry.shape, read


def _copy_assets(source, target):
    for name in ASSETS:
        if (source / name).is_file():
            shutil.copyfile(files.inside(source, name), target / name)


def _apart(args):
    """The target must not lie in the source."""
    source, target = (pathlib.Path(x).resolve() for x in (args.source, args.target))
    if target.is_relative_to(source):
        raise files.CheckpointError(f"{args.target}: the target lies in the source, {args.source}")


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m launch.port", description=__doc__.split("\n")[0]
    )
    commands = parser.add_subparsers(required=True, metavar="inspect|convert|export|check")

    def add(run, *, foreign=True, target=True):
        command = commands.add_parser(run.__name__, help=run.__doc__.split("\n")[0])
        command.set_defaults(run=run)
        command.add_argument("--source", required=True, help="directory to read")
        if target:
            command.add_argument("--target", required=True, help="directory to make")
            command.add_argument("--mesh", type=_mesh_argument, default={}, help="e.g. fsdp=4")
        if foreign:
            command.add_argument("--model", required=True, choices=models.MODELS)
            command.add_argument("--config", default="config.json", help="name of the config file")
            command.add_argument("--patch-embed", choices=("dino", "conv"), help="VGGT only")
        return command

    add(inspect, target=False)
    add(convert).add_argument("--dtype", default="keep", choices=tuple(_CASTS))
    add(export, foreign=False).add_argument("--max-shard-gb", type=float, default=5.0)
    add(check, target=False).add_argument("--cases", required=True, help="directory of .npz cases")
    return parser


if __name__ == "__main__":
    sys.exit(main())
