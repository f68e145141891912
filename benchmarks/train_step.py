"""A step of the policy stage: what it costs, and what the loop costs around it.

    python -m benchmarks.train_step --size debug
    python -m benchmarks.train_step --size 100m --steps 12
    python -m benchmarks.train_step --size 3b --batch 2        # an accelerator; random batches
    python -m benchmarks.train_step --size quickstart --batch 16 --remat none attention full

The loop and the bare compiled step run the same program on the same state by turns; the rest of the
loop's time (data, metrics, logging) is "outside". 3b and 7b have no data to read and are measured
bare, with frozen and trainable VGGT; so are two stages of the quickstart. MFU counts neither remat
nor padding.
"""

import argparse
import json
import math
import pathlib
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import reach_ids
from configs import policy_gear, quickstart
from gear_jax.train import gear, loop, plan, sharding
from gear_jax.train.gear_batch import expected_arrays
from gear_jax.train.log import peak_flops
from gear_jax.train.optim import make_tx
from gear_jax.train.state import make_train_step, new_state, state_shardings
from gear_jax.types import VIEWS

_100M = {
    "language": {
        "depth": 12, "width": 640, "num_heads": 10, "num_kv_heads": 2, "head_dim": 64,
        "mlp_dim": 1728, "vocab_size": 2432, "rope_sections": (8, 12, 12),
    },
    "expert": {"width": 512, "num_heads": 10, "mlp_dim": 1376},
    "geometry": {
        "depth": 4, "width": 192, "num_heads": 6, "mlp_dim": 768,
        "dino": {"depth": 4, "width": 192, "num_heads": 6, "mlp_dim": 768, "pos_embed_grid": 4},
    },
    "vision": {
        "depth": 4, "width": 192, "num_heads": 6, "mlp_dim": 512, "window_size": 56,
        "full_attention_layers": (1, 3),
    },
}  # fmt: skip


def main():
    """Print a line for each measurement, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = ("debug", "100m", "quickstart", "3b", "7b")
    parser.add_argument("--size", choices=sizes, default=sizes[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40, help="of each turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--remat", nargs="*", default=["attention"], help="where it is bare")
    args = parser.parse_args()
    if args.size in ("debug", "100m"):
        with tempfile.TemporaryDirectory() as folder:
            made = with_loop(args, pathlib.Path(folder))
    else:
        stages = ("pretrain", "policy")
        variants = stages if args.size == "quickstart" else ("frozen_vggt", "full")
        made = [bare(args, variant, remat) for variant in variants for remat in args.remat]
    device = jax.devices()[0].device_kind
    print(json.dumps({"size": args.size, "device": device, "jax": jax.__version__, "made": made}))


# Small sizes: the loop beside its step


def small_config(args, folder):
    """The debug config, or one of about 100 million parameters, on the procedural robot."""
    config = policy_gear.get_config("debug")
    if args.size == "100m":
        for tower, fields in _100M.items():
            config.model[tower].update(fields)
    fields = config.data.sets.reach
    fields.work, fields.latents = str(folder / "reach"), str(folder / "ids")
    config.data.fast.path = str(folder / "fast")
    config.data.update(batch_size=args.batch, num_workers=args.workers)
    config.init.update(run=None, fresh=(".*",))
    config.monitor.every = 0
    config.optim.num_steps = args.steps
    config.optim.warmup_steps = 1
    reach_ids.write(fields.to_dict(), fields.latents, config.model.transitions)
    return config


def with_loop(args, folder):
    """Seconds a step in the loop and bare, by turns, and the share that is outside the step."""
    config = small_config(args, folder)
    mesh = sharding.make_mesh({"data": len(jax.devices())})
    stage = gear.build(config, mesh)
    step, state, batch = _program(stage, mesh)
    count = sum(x.size for x in jax.tree.leaves(state.params))
    pairs = []
    for turn in range(args.turns + 1):
        inside, state = _bare_seconds(step, state, batch, args.steps)
        around = _loop_seconds(stage, mesh, folder / str(turn), args.batch)
        pairs.append((inside, around))
        print(f"turn {turn}: step {inside:.4f} s, loop {around:.4f} s", flush=True)
    pairs = pairs[1:]
    inside, around = (statistics.median(x) for x in zip(*pairs, strict=True))
    outside = statistics.median(1 - a / b for a, b in pairs)
    speed = args.batch * stage.flops_per_sample / inside
    print(
        f"{count / 1e6:.1f}M parameters, batch {args.batch}: step {inside:.4f} s, loop "
        f"{around:.4f} s, outside the step {outside:.1%}, {speed / 1e9:.1f} GFLOP/s of the model"
    )
    return {"parameters": count, "step": inside, "loop": around, "outside": outside}


def _loop_seconds(stage, mesh, workdir, batch):
    """Median seconds a step of the loop, by its own log, without the first steps."""
    options = loop.LoopConfig(log_every=5, checkpoint_every=10**9, checkpoint_minutes=10**9)
    loop.run(stage, options, workdir, mesh, seed=0, record={}, say=lambda line: None)
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return batch / statistics.median(r["samples_per_second"] for r in rows if r["step"] > 5)


def _program(stage, mesh):
    params, _ = jax.eval_shape(stage.init, jax.random.key(0))
    tx = make_tx(params, stage.optim)
    shapes = jax.eval_shape(lambda: new_state(stage.init, tx, 0, ema=False))
    where = state_shardings(shapes, mesh, stage.rules)
    state = jax.jit(lambda: new_state(stage.init, tx, 0, ema=False), out_shardings=where)()
    stream = stage.open_stream(None)
    batch = jax.device_put(stage.arrays(next(stream)), sharding.batch_sharding(mesh))
    stream.close()
    step = jax.jit(make_train_step(stage.loss, tx), donate_argnums=0)
    return step, state, batch


def _bare_seconds(step, state, batch, steps):
    """Median seconds of a compiled step, and the state after."""
    state, _ = jax.block_until_ready(step(state, batch))
    seconds = []
    for _ in range(steps):
        begun = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch))
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds), state


# Full sizes on one accelerator, and the quickstart's


def bare(args, variant, remat):
    """One step of a model on random rows: seconds, MFU and peak memory."""
    if args.size == "quickstart":
        config = quickstart.get_config(variant)
    else:
        config = policy_gear.get_config(f"{args.size},{variant}")
    config.model.remat = remat
    model = gear.make_model(config)
    tx = make_tx(jax.eval_shape(model.init, jax.random.key(0))[0], model.optim)
    state = jax.jit(lambda: new_state(model.init, tx, 0, ema=False))()
    batch = _random_rows(config, model, args.batch)
    step = jax.jit(make_train_step(model.loss, tx), donate_argnums=0)
    begun = time.perf_counter()
    state, _ = jax.block_until_ready(step(state, batch))
    compiled = time.perf_counter() - begun
    seconds, state = _bare_seconds(step, state, batch, args.steps)
    flops = plan.flops_per_sample(
        model.cfg, model.sequence, config.model.real_tokens, model.optim.partitions
    )
    device = jax.devices()[0]
    peak = peak_flops(device.device_kind)
    mfu = args.batch * flops / seconds / peak if peak else None
    memory = (device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
    shown = "unknown" if mfu is None else f"{mfu:.1%}"
    print(
        f"{args.size} {variant} remat {remat}: first {compiled:.0f} s, step {seconds:.3f} s, MFU "
        f"{shown}, peak {memory:.1f} GiB",
        flush=True,
    )
    return {"variant": variant, "remat": remat, "step": seconds, "mfu": mfu, "peak_gib": memory}


def _random_rows(config, model, rows):
    """A batch of the right shapes whose rows are full of labelled text."""
    rng = np.random.default_rng(0)
    shapes = expected_arrays(model.cfg, model.sequence, rows, config.model.image_size)
    tokens = config.model.real_tokens
    answer = min(130, tokens // 2)  # tokens from the latent block on
    pictures = math.prod(model.sequence.view_grid) * len(VIEWS)
    made = {}
    for name, one in shapes.items():
        if one.dtype == jnp.bool_:
            value = np.ones(one.shape)
        elif one.dtype == jnp.uint8:
            value = rng.integers(0, 256, one.shape)
        elif one.dtype == jnp.float32:
            value = rng.normal(size=one.shape)
        else:
            value = np.zeros(one.shape)
        made[name] = value
    place = np.arange(model.sequence.length)
    there = place < tokens
    made["segments"][:] = there
    made["positions"][:] = place
    made["insert_index"][:] = np.where(place < pictures, place, -1)
    made["tokens"][:] = np.where(there, rng.integers(0, 1000, place.shape), 0)
    learned = there & (place >= tokens - answer)
    made["labels"][:] = np.where(learned, made["tokens"], -100)
    made["latent_index"][:] = tokens - answer + np.arange(model.cfg.num_latents)
    made["chunk_position"][:] = tokens - answer + model.cfg.num_latents
    return {name: jnp.asarray(value, shapes[name].dtype) for name, value in made.items()}


if __name__ == "__main__":
    main()
