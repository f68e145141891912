"""Latent ids of a data set: clips per CPU second, ours against reading every clip by itself.

    python -m benchmarks.latent_extraction --path bridge_dataset/1.0.0 --row bridge_dataset

Both sides encode the same clips with the same random tokenizer and must give the same ids. The
naive side reads the six frames of each clip as a training pipeline would; ours decodes each frame
once. "decode" and "encode" are shares of our wall time in the thread that drives the device.
"""

import argparse
import json
import statistics
import tempfile
import time

import jax
import numpy as np

from gear_jax.data.catalog import DatasetConfig, open_prepared
from gear_jax.data.latent_ids import LatentIds, LatentWriter
from gear_jax.data.windows import clip_steps
from gear_jax.systems import latents as system
from gear_jax.towers.latent_action import LatentActionConfig
from gear_jax.train import extraction, sharding

SIZES = {
    "small": LatentActionConfig(
        image_size=64, patch_size=8, width=64, num_heads=2, mlp_dim=128, encoder_depth=2,
        query_depth=1, decoder_depth=1,
    ),
    "full": LatentActionConfig(),
}  # fmt: skip


def main():
    """Print one line a round, then medians, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", required=True)
    parser.add_argument("--row", required=True)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepared = open_prepared(DatasetConfig(args.path, args.row, folder))
        tokenizer = random_tokenizer(SIZES[args.size], args.batch)
        rounds = [one_round(tokenizer, prepared, args.threads) for _ in range(args.rounds + 1)][1:]
    names = ("ours", "naive", "decode", "encode")
    middle = {name: statistics.median(r[name] for r in rounds) for name in names}
    ratio = statistics.median(r["ours"] / r["naive"] for r in rounds)
    device = jax.devices()[0].device_kind
    print(
        f"{middle['ours']:.0f} clips per CPU second, naive {middle['naive']:.0f}: {ratio:.2f}x; "
        f"decode {middle['decode']:.0%}, encode {middle['encode']:.0%} of our time on {device}"
    )
    print(json.dumps({"size": args.size, "device": device, "ratio": ratio, **middle}))


def random_tokenizer(cfg, batch):
    """A tokenizer that was never trained; its cost is that of a trained one."""
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    params, codebook = jax.jit(lambda: system.init(cfg, jax.random.key(0)))()
    return extraction.Tokenizer(cfg, params, codebook, "random", batch, mesh)


def one_round(tokenizer, prepared, threads):
    """Clips per CPU second of both, whose ids must be equal."""
    with tempfile.TemporaryDirectory() as folder:
        writer = LatentWriter(folder, extraction.spec_of(tokenizer, prepared))
        begun, wall = time.process_time(), time.perf_counter()
        done = extraction.extract(tokenizer, prepared, writer, num_threads=threads)
        ours, wall = time.process_time() - begun, time.perf_counter() - wall
        ids = np.array(LatentIds(folder, prepared).ids)
    begun = time.process_time()
    naive = by_itself(tokenizer, prepared)
    theirs = time.process_time() - begun
    assert (ids == naive).all(), "the two sides disagree: no ratio"
    count = prepared.num_steps
    print(f"ours {count / ours:.0f}, naive {count / theirs:.0f} clips per CPU second", flush=True)
    return {"ours": count / ours, "naive": count / theirs, "decode": done.decode / wall,
            "encode": done.encode / wall}  # fmt: skip


def by_itself(tokenizer, prepared):
    """Ids of all steps, each clip's frames read anew."""
    cfg, size = tokenizer.cfg, tokenizer.batch_size
    ids = np.full((prepared.num_steps, cfg.num_transitions, cfg.codes_per_transition), -1, np.int8)
    for begin in range(0, prepared.num_steps, size):
        frames = np.zeros((size, cfg.num_frames, cfg.image_size, cfg.image_size, 3), np.uint8)
        mask = np.zeros((size, cfg.num_transitions), bool)
        for row, index in enumerate(range(begin, min(begin + size, prepared.num_steps))):
            number, step = prepared.locate(index)
            episode = prepared.episode(number)
            if "head" not in episode.views:
                continue
            steps, mask[row] = clip_steps(episode.num_steps, episode.fps, step)
            for place, shown in enumerate(steps):
                frames[row, place] = extraction.load_frame(cfg.image_size, episode, int(shown))[0]
        made = np.asarray(tokenizer.encode(frames))
        rows = slice(begin, begin + size)
        ids[rows] = np.where(mask[..., None], made, -1)[: len(ids[rows])]
    return ids


if __name__ == "__main__":
    main()
