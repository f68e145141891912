"""What the experiments with GEAR-VLA share: sizes, data, variants. Not an experiment itself.

The argument behind a config's name is a list: a size (7b, 3b, debug), a variant of `VARIANTS`, and
where the config has phases, one of them: `configs/policy_gear.py:3b,wo_latent`.
"""

import functools

import ml_collections

SIZES = ("7b", "3b", "debug")

# Every comparison of the paper is one change of the config (systems.md 2.12).
VARIANTS = {
    "full": lambda c: None,
    "wo_latent": lambda c: c.model.update(latents="learned"),
    "lapa": lambda c: c.model.update(transitions=1),
    "five_frames": lambda c: c.model.update(transitions=4),
    "wo_fast": lambda c: c.model.update(with_fast=False),
    "wo_both": lambda c: c.model.update(
        latents="none", with_fast=False, kv_sources=("image", "text", "state")
    ),
    "app_a": lambda c: c.model.update(kv_sources=("latent", "image", "state")),
    "wo_vggt": lambda c: _without_geometry(c),
    "frozen_vggt": lambda c: _freeze(c, "geometry/.*"),
    "random_proj": lambda c: c.model.projector.update(geometry_std=0.02),
    "trainable_vit": lambda c: _train_vision(c),
    "soft_prompt": lambda c: (c.model.update(prompt_tokens=32), _output_aware(c)),
    "output_aware": lambda c: _output_aware(c),
    "no_emb_canon": lambda c: c.model.state.update(shared=True),
    "no_drop": lambda c: c.model.update(drops="none"),
    "drop_wrist": lambda c: c.model.update(drops="wrist"),
    "drop_state": lambda c: c.model.update(drops="state"),
    "joint_grad": lambda c: c.model.update(joint_grad=True),
    "lora": lambda c: _lora(c),
    "fast_latents": lambda c: c.model.update(fast_sees="latents"),  # ours
}


def parse(arg, where, phases=("",)):
    """(size, variant, phase) of a config's argument; what is left out is the first of its kind.

    Raises:
        ValueError: a word that is none of them.
    """
    kinds = (SIZES, tuple(VARIANTS), phases)
    chosen = [kind[0] for kind in kinds]
    for word in filter(None, arg.split(",")):
        place = next((i for i, kind in enumerate(kinds) if word in kind), None)
        if place is None:
            known = [word for kind in kinds for word in kind if word]
            raise ValueError(f"{where}: {word!r} is unknown: expected some of {known}")
        chosen[place] = word
    return chosen


def base(size):
    """Model, data and loop of one size; the stage, optimiser and beginning are the experiment's."""
    config = ml_collections.ConfigDict()
    config.seed = 42
    # GPUs: fsdp inside a node, data across; a TPU pod: fsdp=-1, data=1
    config.mesh = {"replica": 1, "data": -1, "fsdp": 8, "tensor": 1}
    nothing = functools.partial(ml_collections.config_dict.placeholder, str)
    config.init = {
        "qwen2_5_vl": nothing(),  # folder that `launch.port convert` wrote
        "vggt": nothing(),  # likewise
        "published": nothing(),  # folder that `launch.publish` wrote
        "run": nothing(),  # workdir of an earlier stage
        "fresh": (),  # parameters that may begin at random
        "unused": ("unused/.*",),  # stored arrays that may lie idle
        "trained": (),  # embodiment slots of `run` that were trained; () is all
        "deeper": False,  # whether language layers may be added
        "rows_like": (),  # row, first and end of the vocabulary: begin as row and a little noise
        "fresh_rows": (),  # first and end of the vocabulary: at random though they are stored
    }
    config.model = _model(size)
    config.lora = None  # fields of train/lora.py's LoraConfig
    config.ema_decay = ml_collections.config_dict.placeholder(float)
    config.data = {
        "sets": _SETS if size != "debug" else _DEBUG_SETS,
        "pools": _POOLS if size != "debug" else {},
        "mixture": "weights",
        "keep_percent": 100,
        "batch_size": 8,
        "hold_out": 0.01,
        "num_workers": 16,
        "chunk_len": 30,
        "fit": "pad",
        "random_side": True,
        "bad_images": 0.001,
        "augment": {
            "crop": 0.9, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.05,
        },
        "fast": {"path": "runs/fast", "num_chunks": 200_000, "vocab_size": 2048, "scale": 10.0},
    }  # fmt: skip
    config.monitor = {"every": 5000, "batches": 16}
    config.loop = {
        "log_every": 50, "checkpoint_every": 10_000, "keep": 3, "keep_every": 10_000,
        "resume": "auto",
    }  # fmt: skip
    if size == "debug":
        config.mesh.update(fsdp=1)
        config.init.fresh = (".*",)
        config.data.update(hold_out=0.2, num_workers=0, batch_size=8)
        config.data.fast.update(path="runs/debug/fast", num_chunks=2000, vocab_size=400)
        config.monitor.update(every=4, batches=1)
        config.loop.update(log_every=1, checkpoint_every=4, keep_every=None)
    return config


def optim(config, num_steps, lr, *, expert):
    """AdamW as in the paper (systems.md 2.9): constant after 3 % of warm-up, clip by partition."""
    table = (("vision/.*", None), ("expert/.*", "expert"), (".*", "vlm"))
    config.optim = {
        "lr": lr,
        "warmup_steps": round(0.03 * num_steps),
        "num_steps": num_steps,
        "schedule": "constant",
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "clip": 1.0,
        "accumulate": 1,
        "partitions": table if expert else table[::2],
    }
    if not expert:
        config.model.expert = None


def _model(size):
    model = {
        "tokenizer": "checkpoints/qwen2_5_vl",
        "image_size": 448,
        "length": 1280,
        "real_tokens": 944,  # of a row, for the MFU
        "language": {"vocab_size": 153_856},
        "vision": {"window_size": 112},
        "geometry": {"dino": {}},
        "projector": {"expand": "first", "geometry_std": 0.0},
        "state": {"hidden_dim": 512, "shared": False},
        "expert": {
            "width": 1024, "num_heads": 8, "mlp_dim": 4096, "mlp": "swiglu", "output_aware": False,
        },
        "latents": "codes",
        "transitions": 5,
        "codes": 4,
        "latent_pattern": (0, 0, 1, 1),
        "with_fast": True,
        "fast_length": 256,
        "most_labels": 512,
        "prompt_tokens": 0,
        "kv_sources": ("latent",),
        "drops": "mixed",
        "scrambled": 0.0,
        "through_latents": False,
        "fast_sees": "all",
        "flow_weight": 1.0,
        "flow_draws": 1,
        "flow_steps": 10,
        "joint_grad": False,
        "train_vision": False,
        "attention": "xla",
        "remat": "attention",
        "dtype": "bfloat16",
    }  # fmt: skip
    if size == "3b":
        model["language"] |= {
            "depth": 36, "width": 2048, "num_heads": 16, "num_kv_heads": 2, "mlp_dim": 11_008,
            "tied_head": True,
        }  # fmt: skip
    if size == "debug":
        model |= {
            "tokenizer": "bytes", "image_size": 56, "length": 384, "real_tokens": 200,
            "remat": "none", "dtype": "float32",
            "language": {
                "depth": 4, "width": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
                "mlp_dim": 128, "vocab_size": 2432, "rope_sections": (2, 3, 3),
            },
            "vision": {
                "depth": 2, "width": 32, "num_heads": 2, "mlp_dim": 64, "window_size": 56,
                "full_attention_layers": (1,),
            },
            "geometry": {
                "depth": 2, "width": 32, "num_heads": 2, "mlp_dim": 64,
                "dino": {
                    "depth": 1, "width": 32, "num_heads": 2, "mlp_dim": 64, "pos_embed_grid": 4,
                },
            },
            "state": {"hidden_dim": 32, "shared": False},
            "expert": {
                "width": 64, "num_heads": 4, "mlp_dim": 128, "mlp": "swiglu",
                "output_aware": False,
            },
        }  # fmt: skip
    return model


def _set(path, row, group=None, weight=1.0, **more):
    """A data set in folder data/`path`; its latent ids are where launch.extract is told to."""
    return {
        "path": f"data/{path}", "row": row, "work": f"runs/data/{row}", "group": group,
        "latents": f"runs/ids/{row}", "weight": weight, **more,
    }  # fmt: skip


# Table 5, as far as the standardisation table goes; `group` is the set's name there. Add yours.
_SETS = {
    "bridge_v2": _set("bridge_dataset/1.0.0", "bridge_dataset"),
    "droid": _set("droid/1.0.0", "droid"),
    "fractal": _set("fractal20220817_data/0.1.0", "fractal20220817_data", "oxe", 0.54),
    "kuka": _set("kuka/0.1.0", "kuka", "oxe", 0.83),
    "taco_play": _set("taco_play/0.1.0", "taco_play", "oxe", 2.0),
    "ur5": _set("berkeley_autolab_ur5/0.1.0", "berkeley_autolab_ur5", "oxe", 2.0),
    "language_table": _set("language_table/0.0.1", "language_table", "oxe", 0.1),
    "agibot": _set("agibot_world/1.0.0", "agibot_world"),
    "robomind": _set("robomind_franka/1.0.0", "robomind_franka"),
    "galaxea": _set("galaxea/1.0.0", "galaxea"),
    "ego4d": {**_set("ego4d", "video", format="video"), "work": "runs/data/ego4d",
              "latents": "runs/ids/ego4d"},
}  # fmt: skip

# Table 4: a folder of JSONL for each kind of vision-language data.
_POOLS = {
    name: {"path": f"data/vision_language/{name}"}
    for name in (
        "general_vqa", "understanding_qa", "planning_qa", "traj2d", "traj3d", "ground2d",
        "ground3d", "space_point", "object_point", "affordance", "mask_track",
    )
}  # fmt: skip

# Drawn when they are read: nothing to download. The ids come from `launch.extract`, see
# docs/train.md.
_DEBUG_SETS = {
    "reach": {
        "path": "reach",
        "row": "reach",
        "work": "runs/debug/reach",
        "group": None,
        "latents": "runs/debug/ids",
        "weight": 1.0,
        "format": "reach",
        "drawing": {"num_episodes": 40},
    }
}


def _without_geometry(config):
    config.model.geometry = None
    config.init.unused = (*config.init.unused, "geometry/.*", "projector/geometry_kernel")


def _freeze(config, pattern):
    config.optim.partitions = ((pattern, None), *config.optim.partitions)


def _train_vision(config):
    config.model.train_vision = True
    config.optim.partitions = tuple(
        pair for pair in config.optim.partitions if pair[0] != "vision/.*"
    )


def _lora(config):
    config.lora = {"rank": 16, "alpha": 16.0}
    config.init.fresh = (*config.init.fresh, "lora/.*")
    _freeze(config, "language/.*")


def _output_aware(config):
    if config.model.expert is not None:
        config.model.expert.output_aware = True
