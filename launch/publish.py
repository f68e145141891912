"""The parameters of a trained run alone, for others to begin with: no optimiser, no data state.

    python -m launch.publish --run runs/quickstart/vlm --target checkpoints/mine --dtype bfloat16
    python -m launch.publish --run runs/policy --target checkpoints/vlm --only '(?!expert/).*'

The newest whole checkpoint is taken, its averaged parameters where there are some. A config names
the folder as `init.published`. Beside them lies fast/, the action tokenizer that they were trained
with, for `data.fast.path`. It appears whole or not at all, with a digest of every file. Exit
codes: 0 done; 4 something that cannot be used, said in one sentence.
"""

import argparse
import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp

import gear_jax
from gear_jax.data.tfrecord import DataError
from gear_jax.tokenizers.fast import FastTokenizer
from gear_jax.train import checkpoint, sharding, trained
from gear_jax.train.gear import make_model

DTYPES = {"as_trained": None, "float32": jnp.float32, "bfloat16": jnp.bfloat16}


def main(argv=None):
    """Write one folder; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.publish",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=pathlib.Path, required=True, help="workdir of a stage")
    parser.add_argument("--target", type=pathlib.Path, required=True, help="a new folder")
    parser.add_argument("--only", default=".*", help="regex of whole parameter names")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="as_trained")
    try:
        count = publish(**vars(parser.parse_args(argv)))
    except (DataError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 4
    print(json.dumps({"ok": True, **count}))
    return 0


def publish(run, target, only, dtype):
    """Returns {"parameters", "step"}."""
    config = trained.read_config(run)
    mesh = sharding.make_mesh({"data": -1}, jax.local_devices())
    found = trained.load(run, config, make_model(config), mesh)
    kept = _chosen(found.params, only, DTYPES[dtype])
    fast = FastTokenizer.load(config.data.fast.path) if config.model.with_fast else None
    manifest = {
        "gear_jax": gear_jax.__version__,
        "stage": config.stage,
        "step": found.step,
        "only": only,
        "dtype": dtype,
        "model": json.loads(config.model.to_json()),
    }
    with checkpoint.new_directory(target) as folder:
        checkpoint.save_params(folder, kept)
        if fast is not None:
            fast.save(folder / "fast")
        for mark in folder.rglob("commit_success.txt"):  # Orbax writes this machine's path into it
            mark.write_text("Checkpoint commit was successful")
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
        checkpoint.write_digests(folder)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(kept)),
        "step": found.step,
    }


def _chosen(params, only, dtype):
    """The nested dictionary without what the regex does not name."""
    kept: dict = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [entry.key for entry in path]
        if not re.fullmatch(only, "/".join(names)):
            continue
        place = kept
        for name in names[:-1]:
            place = place.setdefault(name, {})
        place[names[-1]] = leaf if dtype is None else leaf.astype(dtype)
    if not kept:
        raise ValueError(f"--only {only!r} names no parameter of the run")
    return kept


if __name__ == "__main__":
    sys.exit(main())
