"""Our Qwen2.5-VL towers against transformers on the CPU: same weights, same inputs, one process.

    python -m benchmarks.towers_vs_transformers [--size tiny|116m] [--pairs 9]

Needs the extra `port-check`. A random model is made by transformers, saved, and loaded through our
own porter. Parity is printed first; without parity there is no ratio. Both sides get one thread on
one pinned core and are timed by CPU time, interleaved A B B A; a ratio whose quartiles are more
than 1.3 apart is not printed. Compilation is reported by itself.
"""

import os

if __name__ == "__main__":  # before any library starts its threads
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    os.environ["XLA_FLAGS"] = (
        "--xla_cpu_multi_thread_eigen=false " + os.environ.get("XLA_FLAGS", "")
    ).strip()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import argparse
import dataclasses
import json
import pathlib
import platform
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from gear_jax.data.patch_windows import patch_windows
from gear_jax.porting import models, table
from gear_jax.systems import vlm
from gear_jax.train import sharding

NEW_TOKENS = 20
LIMITS = {"tiny": 1.0, "116m": 1.3}  # CPU time of ours / theirs


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of the random model and of its inputs."""

    text: dict
    vision: dict
    image: int  # pixels; three images
    prompt: int = 256


SIZES = {
    "tiny": Size(
        text={"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "intermediate_size": 704, "vocab_size": 4096},
        vision={"hidden_size": 160, "depth": 4, "num_heads": 2, "intermediate_size": 428,
                "fullatt_block_indexes": [1, 3], "out_hidden_size": 256},
        image=224,
    ),
    "116m": Size(
        text={"hidden_size": 768, "num_hidden_layers": 10, "num_attention_heads": 12,
              "num_key_value_heads": 4, "intermediate_size": 2048, "vocab_size": 16384},
        vision={"hidden_size": 480, "depth": 8, "num_heads": 6, "intermediate_size": 1284,
                "fullatt_block_indexes": [1, 3, 5, 7], "out_hidden_size": 768},
        image=448,
    ),
}  # fmt: skip


def main():
    """Print parity, ratios and one JSON line; exit 1 when a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=tuple(SIZES), action="append")
    parser.add_argument("--pairs", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for name in args.size or SIZES:
        for work in _works(SIZES[name]):
            results.append(
                {"size": name, "limit": LIMITS[name], **_compare(*work, pairs=args.pairs)}
            )
            print(_line(results[-1]), flush=True)
    print(json.dumps({"versions": _versions(), "load": os.getloadavg(), "results": results}))
    missed = [r for r in results if r["ratio"] is None or r["ratio"] > r["limit"]]
    return 1 if missed else 0


def _works(size):
    """(name, ours, theirs, parity) of each piece of work; both callables return NumPy arrays."""
    theirs, cfg, params = _models(size)
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, size.text["vocab_size"], (1, size.prompt)).astype(np.int32)
    row = np.broadcast_to(np.arange(size.prompt, dtype=np.int32), (3, 1, size.prompt))
    batch = jax.tree.map(
        jnp.asarray, {"tokens": tokens, "positions": row, "segments": np.ones_like(tokens)}
    )
    ids = torch.from_numpy(tokens.astype(np.int64))

    @jax.jit
    def prefill(params, batch):
        hidden, _, _ = vlm.forward(params, cfg, batch)
        return vlm.logits(params, hidden)

    @jax.jit
    def greedy(params, batch):
        return vlm.generate(params, cfg, batch, max_new_tokens=NEW_TOKENS)[0]

    def their_greedy():
        out = theirs(input_ids=ids, use_cache=True, logits_to_keep=1)
        chosen = [out.logits[:, -1].argmax(-1, keepdim=True)]
        for _ in range(NEW_TOKENS - 1):
            out = theirs(input_ids=chosen[-1], past_key_values=out.past_key_values, use_cache=True)
            chosen.append(out.logits[:, -1].argmax(-1, keepdim=True))
        return torch.cat(chosen, 1).numpy()

    yield (
        f"prefill {size.prompt}, all logits",
        lambda: np.asarray(prefill(params, batch)),
        lambda: theirs(input_ids=ids, use_cache=False).logits.numpy(),
    )
    yield (
        f"prefill + {NEW_TOKENS} tokens",
        lambda: np.asarray(greedy(params, batch)),
        their_greedy,
    )

    side = size.image // cfg.vision.patch_size
    grids = np.array([[1, side, side]] * 3)
    pixels = rng.standard_normal((3 * side * side, cfg.vision.patch_dim), np.float32)
    layout = patch_windows(grids, window=cfg.vision.window)
    # three views of one size: one row each, and no segments, as the robot's cameras are
    split = [x.reshape(3, -1, *x.shape[1:]) for x in (layout.gather(pixels), layout.positions)]
    visual = {"patches": split[0], "positions": split[1], "segments": None}
    visual = jax.tree.map(jnp.asarray, visual)
    order = layout.tokens

    @jax.jit
    def see(params, visual):
        return vlm.visual_embeddings(params, cfg, visual)

    grid, flat = torch.from_numpy(grids), torch.from_numpy(pixels)
    yield (
        f"vision 3 x {size.image} px",
        lambda: np.asarray(see(params, visual)).reshape(len(order), -1)[order],
        lambda: theirs.model.visual(flat, grid_thw=grid).pooler_output.numpy(),
    )


def _models(size):
    """A random transformers model, and its weights in our towers through the porter."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    config = transformers.Qwen2_5_VLConfig(
        text_config=size.text | {"rope_parameters": rope, "rms_norm_eps": 1e-6,
                                 "use_sliding_window": False},
        vision_config=size.vision | {"tokens_per_second": 2},
        image_token_id=5, video_token_id=6, vision_start_token_id=3, vision_end_token_id=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model, _, tensors = models.open_source("qwen2_5_vl", pathlib.Path(folder))
        pairs = table.match(model.table, model.parameters, tensors)
        mesh = sharding.make_mesh({})
        shardings = sharding.param_shardings(table.unflatten(model.targets), mesh)
        params = table.load(pairs, model.targets, model.table.sizes, table.flatten(shardings))
    count = sum(p.numel() for p in theirs.parameters())
    print(f"# {count / 1e6:.1f} million parameters", flush=True)
    return theirs, model.cfg, table.unflatten(params)


@torch.inference_mode()
def _compare(name, ours, theirs, pairs):
    """First calls, parity, then interleaved CPU times."""
    first = {}
    for side, call in (("ours", ours), ("theirs", theirs)):
        start = time.perf_counter()
        first[side] = (call(), time.perf_counter() - start)
    a, b = first["ours"][0], first["theirs"][0]
    error = float(np.max(np.abs(a - b)))
    result = {
        "work": name,
        "first_call_s": [round(first[side][1], 2) for side in ("ours", "theirs")],
        "max_abs_error": error,
        "of": float(np.max(np.abs(b))),
        "ratio": None,
    }
    if error > (0 if a.dtype.kind in "iu" else 1e-3):
        return result
    for call in (ours, theirs, ours, theirs):
        call()
    ratios, wall, times = [], [], {ours: [], theirs: []}
    for pair in range(pairs):
        spent = {}
        for call in (ours, theirs) if pair % 2 == 0 else (theirs, ours):
            cpu, clock = time.process_time(), time.perf_counter()
            call()
            spent[call] = time.process_time() - cpu, time.perf_counter() - clock
            times[call].append(spent[call][0])
        ratios.append(spent[ours][0] / spent[theirs][0])
        wall.append(spent[ours][1] / spent[theirs][1])
    low, ratio, high = statistics.quantiles(ratios, n=4)
    result |= {
        "quartiles": [round(low, 3), round(high, 3)],
        "cpu_ms": [round(1e3 * statistics.median(times[call]), 1) for call in (ours, theirs)],
        "min_ratio": round(min(times[ours]) / min(times[theirs]), 3),
        "wall_ratio": round(statistics.median(wall), 3),
    }
    if high / low <= 1.3:
        result["ratio"] = round(ratio, 3)
    return result


def _line(r):
    parity = f"max abs difference {r['max_abs_error']:.1e} of {r['of']:.3g}"
    if "quartiles" not in r:
        return f"{r['size']:>5} {r['work']:<24} NO PARITY: {parity}"
    ratio = "too noisy" if r["ratio"] is None else f"{r['ratio']:.2f}"
    return (
        f"{r['size']:>5} {r['work']:<24} CPU time ours/theirs {ratio} {r['quartiles']} "
        f"limit {r['limit']}; ms {r['cpu_ms']}; {parity}; first call s {r['first_call_s']}"
    )


def _versions():
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "xla_flags": os.environ.get("XLA_FLAGS"),
        "cpu": platform.processor() or platform.machine(),
    }


if __name__ == "__main__":
    raise SystemExit(main())
