"""The latent-action tokenizer: a causal VQ-VAE over video (GEAR-VLA 3.2).

    python -m launch.train --config configs/latents.py --workdir runs/latents            # full size
    python -m launch.train --config configs/latents.py:shapes --workdir runs/shapes      # a laptop

"full" trains on the data sets of `config.data.sets`; name yours on the command line:

    --config.data.sets.bridge.path=/data/bridge_dataset/1.0.0

or in a config file of your own that calls this one's `get_config`. "shapes" draws its video, needs
no download, and is done in seven minutes on two cores; "debug" is the same, smaller still; "reach"
is "debug" on the procedural robot that the other stages' debug configs train on (docs/train.md).
"""

import ml_collections

SIZES = ("full", "shapes", "debug", "reach")


def get_config(size="full"):
    """ConfigDict of the stage `latents`.

    Args:
        size: one of `SIZES`.

    Raises:
        ValueError: another size.
    """
    if size not in SIZES:
        raise ValueError(f"configs/latents.py: size {size!r}: expected one of {SIZES}")
    config = ml_collections.ConfigDict()
    config.stage = "latents"
    config.seed = 42
    config.mesh = ml_collections.ConfigDict({"replica": 1, "data": -1, "fsdp": 1, "tensor": 1})
    config.model = {
        "image_size": 224,
        "patch_size": 14,
        "num_frames": 6,
        "width": 512,
        "num_heads": 8,
        "mlp_dim": 2048,
        "encoder_depth": 8,
        "query_depth": 2,
        "decoder_depth": 8,
        "codes_per_transition": 4,
        "group_pattern": (0, 0, 1, 1),
        "codes_per_group": 8,
        "code_dim": 32,
        "window": "cumulative",
        "mode": "transitions",
        "quantizer": "ema",
        "target_pool": 1,
        "attention": "xla",
        "remat": "attention",
        "dtype": "bfloat16",
    }
    config.loss = {
        "commitment": 0.05,
        "entropy": 0.05,
        "temperature": 0.1,
        "decay": 0.99,
        "spread_decay": 0.8,
        "restart_usage": 0.1,
        "restart_steps": 50,
        "standardize": True,
        "fade_steps": 5000,
    }
    config.optim = {
        "lr": 1e-4,
        "warmup_steps": 1000,
        "num_steps": 100_000,
        "schedule": "cosine",
        "clip": 1.0,
    }
    config.data = {
        "sets": {"bridge": _set("data/bridge_dataset/1.0.0", "bridge_dataset")},
        "batch_size": 256,
        "hold_out": 0.02,
        "num_workers": 8,
    }
    config.monitor = {
        "every": 1000,
        "batches": 8,
        "first": 20_000,
        "patience": 3,
        "perplexity": 0.5,
        "shuffled": 1.1,
    }
    config.loop = {"log_every": 50, "checkpoint_every": 2000, "keep": 3, "resume": "auto"}
    if size != "full":
        _small(config)
    if size in ("debug", "reach"):
        config.model.update(width=32, encoder_depth=1)
        config.loss.fade_steps = 2
        config.optim.update(num_steps=8, warmup_steps=2)
        config.data.sets.shapes.drawing.num_episodes = 60
        config.data.update(batch_size=8)
        config.monitor.update(every=4, batches=1)
        config.loop.update(log_every=1, checkpoint_every=4)
    if size == "reach":
        config.data.sets = {
            "reach": {
                "path": "reach", "row": "reach", "work": "runs/debug/reach", "weight": 1.0,
                "format": "reach", "drawing": {"num_episodes": 40},
            }
        }  # fmt: skip
        config.data.hold_out = 0.2
    return config


def _set(path, row):
    return {"path": path, "row": row, "work": f"runs/data/{row}", "weight": 1.0}


def _small(config):
    config.model.update(
        image_size=16, patch_size=4, width=64, num_heads=2, mlp_dim=128, encoder_depth=2,
        query_depth=1, decoder_depth=2, code_dim=4, remat="none", dtype="float32",
    )  # fmt: skip
    config.loss.fade_steps = 1000
    config.optim.update(lr=3e-3, warmup_steps=50, num_steps=4500)
    config.data.sets = {
        "shapes": {
            **_set("shapes", "shapes"),
            "format": "shapes",
            "drawing": {"num_episodes": 1000, "num_steps": 30, "image_size": 16, "seed": 0},
        }
    }
    config.data.update(batch_size=12, hold_out=0.1, num_workers=0)
    config.monitor.update(every=500, batches=40, first=3000, patience=2)
    config.loop.update(log_every=100, checkpoint_every=500)
