"""What the latent-action tokenizer learns on drawn video, by variant and seed.

    python -m benchmarks.latent_shapes --seeds 3

One coloured shape moves among grey ones, reverses and turns. For each run: error against copying
the first frame, error with another clip's codes, perplexity of each group (of 8), and how much of
the velocity of all five transitions a linear map reads from a clip's codes: from one-hots of single
codes ("clip") and of any two codes of a transition ("pairs"), since codes are words, not sums.
"reversals" counts only clips in which the velocity changes its sign. Nothing here is timed; a run
takes minutes.
"""

import argparse
import itertools
import json
import pathlib
import tempfile

import jax
import numpy as np

from configs import latents as configs
from gear_jax.data.sources.shapes import VELOCITY, ShapesSource
from gear_jax.report.probe import linear_probe, one_hot
from gear_jax.systems import latents as system
from gear_jax.train import latents, loop, sharding

VARIANTS = {
    "default": {},
    "adjacent": {"window": "adjacent"},
    "fsq": {"quantizer": "fsq"},
    "lapa": {"mode": "lapa"},
}
CLIPS = 12_000  # a map from pairs has 2,000 inputs


def main():
    """Train every variant with every seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of training; the config's by default")
    args = parser.parse_args()
    print(
        f"{'variant':10} seed  error  other's  perplexity    "
        "velocity R2: own  clip  pairs  reversals: clip  pairs"
    )
    for variant in args.variants:
        for seed in range(args.seeds):
            made = measure(variant, seed, args.steps)
            print(
                f"{variant:10} {seed:4}  {made['reconstruction']:5.2f}  {made['shuffled']:6.1f}x  "
                f"{' '.join(f'{x:5.2f}' for x in made['perplexity']):>10}  "
                f"{made['own']:16.2f} {made['clip']:5.2f} {made['pairs']:6.2f} "
                f"{made['reversals']:16.2f} {made['reversals_pairs']:6.2f}",
                flush=True,
            )
            print(json.dumps({"variant": variant, "seed": seed, **made}), flush=True)


def measure(variant, seed, steps):
    """Train one tokenizer and say what it learned."""
    config = configs.get_config("shapes")
    config.seed = seed
    config.model.update(VARIANTS[variant])
    if steps:
        config.optim.num_steps = steps
    with tempfile.TemporaryDirectory() as folder:
        config.data.sets.shapes.work = f"{folder}/data"
        mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
        state = loop.run(
            latents.stage(config, mesh), loop.LoopConfig(**config.loop),
            pathlib.Path(folder) / "run", mesh, seed=seed, record={}, say=lambda line: None,
        )  # fmt: skip
    return look(latents.model_config(config.model), state.params, state.extra, config)


def look(cfg, params, codebook, config):
    """Monitors and probes on clips that training did not see."""
    drawing = config.data.sets.shapes.drawing.to_dict()
    source = ShapesSource(**{**drawing, "num_episodes": CLIPS, "num_steps": 6, "seed": 10_000})
    episodes = [source.episode(number) for number in range(CLIPS)]
    frames = np.stack([np.stack(e.images("video")) for e in episodes])
    velocity = np.stack([e.read(VELOCITY)[:-1] for e in episodes])

    @jax.jit
    def run(frames):
        frames = frames.astype(np.float32) / 127.5 - 1
        mask = np.ones((len(frames), cfg.num_transitions), bool)
        return (
            system.encode(params, cfg, codebook, frames),
            system.measure(params, cfg, codebook, frames, mask),
        )

    ids, sums = zip(*[run(frames[i : i + 200]) for i in range(0, CLIPS, 200)], strict=True)
    ids = np.concatenate([np.asarray(x) for x in ids])
    seen = system.summary(jax.tree.map(lambda *x: sum(x), *sums))
    hot, both = one_hot(ids, 16), pairs(ids)
    flat = velocity.reshape(CLIPS, -1)
    turned = ((velocity[:, 1:] * velocity[:, :-1]).sum(axis=-1) < 0).any(axis=1)
    return {
        "reconstruction": float(seen["reconstruction"]),
        "shuffled": float(seen["shuffled"]),
        "perplexity": np.asarray(seen["perplexity"]).tolist(),
        "own": own_probe(ids, velocity),
        "clip": linear_probe(hot, flat),
        "pairs": linear_probe(both, flat),
        "reversals": linear_probe(hot[turned], flat[turned]),
        "reversals_pairs": linear_probe(both[turned], flat[turned]),
    }


def pairs(ids):
    """One-hots of single codes and of any two of a transition, those that occur: float32[N, D]."""
    first = np.eye(16, dtype=np.float32)[ids]
    parts = [first]
    for i, j in itertools.combinations(range(ids.shape[-1]), 2):
        parts.append(np.einsum("nta,ntb->ntab", first[:, :, i], first[:, :, j]))
    flat = np.concatenate([part.reshape(len(ids), -1) for part in parts], axis=1)
    return flat[:, flat.sum(axis=0) > 5]


def own_probe(ids, velocity):
    """Velocity of a transition from its own codes; of all five where there is one transition."""
    targets = velocity.reshape(len(ids) * ids.shape[1], -1)
    return linear_probe(one_hot(ids.reshape(-1, ids.shape[-1]), 16), targets)


if __name__ == "__main__":
    main()
