"""The quickstart: GEAR-VLA at a size that two cores train in minutes, on the embedded tabletop.

    make quickstart                                                          # all of it
    python -m launch.train --config configs/quickstart.py:policy --workdir runs/quickstart/policy

Stages, each beginning where the one before ended: "single", "pairs", "vlm" (small 2D, 3D and
language towers learn to point, among one, two, three blocks), "single_ways", "ways" (and to say
where things are from the hand: one block, three), "spatial" (and how it moves, all through latent
tokens; such a VLM ships as configs/quickstart_vlm, in the place of the released Qwen2.5-VL and
VGGT), "latents", "pretrain", "policy". Towers, losses and loop are those of the full size. A
variant of gear_base.py may follow: `:policy,wo_latent`.
"""

import dataclasses

from configs import gear_base, latents
from gear_jax.tokenizers.small import NUM_FAST, small_tokenizer

QUESTION_STAGES = ("single", "pairs", "vlm", "single_ways", "ways")  # learn from questions alone
STAGES = (*QUESTION_STAGES, "spatial", "latents", "pretrain", "policy")
DEPTH = 5  # of language; up to stage "vlm" it has the first three


@dataclasses.dataclass(frozen=True)
class World:
    """What one quickstart trains on.

    Attributes:
        config: file that says it.
        root: folder of all that it writes.
        name: of its demonstration set.
        row: standardisation row of that set.
        vlm: folder of the VLM that "pretrain" begins with; `launch.publish` wrote it.
        options: of the row.
        questions: pools below <root>/questions.
    """

    config: str
    root: str
    name: str
    row: str
    vlm: str
    options: dict[str, str] = dataclasses.field(default_factory=dict)
    questions: tuple[str, ...] = ()

    @property
    def path(self):
        """Folder of the demonstration set."""
        return f"{self.root}/data/{self.name}/1.0.0"


TABLETOP = World(
    "configs/quickstart.py", "runs/quickstart", "tabletop", "tabletop", "configs/quickstart_vlm",
    questions=("points", "scenes", "names", "single", "pairs", "single_ways", "ways", "offsets"),
)  # fmt: skip
LIBERO = World(
    "configs/quickstart_libero.py", "runs/quickstart_libero", "libero_spatial_scripted", "libero",
    "configs/quickstart_libero_vlm",
    options={"joint_state": "used"},
)  # fmt: skip


def get_config(arg="policy", world=TABLETOP):
    """ConfigDict of one stage.

    Args:
        arg: stage and variant.
        world: what it trains on.
    """
    words = arg.split(",")
    stage = next((word for word in words if word in STAGES), None)
    if stage is None:
        raise ValueError(f"configs/quickstart.py: {arg!r}: expected one of {STAGES}")
    if stage in QUESTION_STAGES and not world.questions:
        raise ValueError(
            f"{world.config}: stage {stage!r} learns from questions, and there are none"
        )
    if stage == "latents":
        return _latents(world)
    _, variant, _ = gear_base.parse(
        ",".join(word for word in words if word != stage), "configs/quickstart.py"
    )
    config = gear_base.base("debug")
    config.model.update(_MODEL)
    config.mesh.update(data=-1, fsdp=1)
    config.data.sets = {world.name: _robot(world)}
    config.data.pools = {
        name: {"path": f"{world.root}/questions/{name}.jsonl", "weight": 1.0}
        for name in world.questions
    }
    config.data.augment = None
    config.data.update(
        hold_out=0.05, num_workers=1, random_side=False,
        # coarse: a fine scale has 80 tokens for one second's x, most of them hardly ever seen
        fast={"path": f"{world.root}/fast", "num_chunks": 4000, "vocab_size": 512, "scale": 2.0},
    )  # fmt: skip
    config.loop.update(log_every=50, checkpoint_every=500, keep=1)
    config.monitor.update(every=300, batches=4)
    _STAGES[stage](config, world)
    gear_base.VARIANTS[variant](config)
    config.model.through_latents &= config.model.latents == "codes"
    return config


def _single(config, world):
    """Pointing and descriptions, of scenes with one block: what there is, and where.

    With three blocks from the start, one of two runs learned the places of all alike, while their
    colours faded from what the towers tell, and never which was named: see
    docs/quickstart_findings.md.
    """
    config.stage = "pretrain"
    gear_base.optim(config, 300, 1.5e-3, expert=False)
    config.optim.partitions = (("state/.*", None), (".*", "vlm"))
    config.optim.update(warmup_steps=100, b2=0.98)
    config.model.update(train_vision=True, with_fast=False)
    config.model.update(scrambled=0.0, through_latents=False)
    config.model.projector.geometry_std = 0.07  # 3D features have nothing to disturb yet
    config.data.sets = {}
    _weigh(config, {"single": 1.0})
    config.model.length = 248  # three questions a row
    config.data.update(hold_out=0.0, batch_size=16)
    config.monitor.every = 0


def _pairs(config, world):
    """Descriptions of two blocks: which of them is named."""
    _single(config, world)
    config.optim.warmup_steps = 20
    _weigh(config, {"pairs": 1.0})
    config.init.update(run=f"{world.root}/single", fresh=())


def _vlm(config, world):
    """Pointing and descriptions, of three blocks."""
    _pairs(config, world)
    config.optim.num_steps = 1400
    _weigh(config, {"points": 0.2, "scenes": 0.4, "names": 0.4})
    config.init.run = f"{world.root}/pairs"


def _weigh(config, shares):
    """Shares of the pools; those that are not named have none."""
    for name, pool in config.data.pools.items():
        pool.weight = shares.get(name, 0.0)


def _single_ways(config, world):
    """Where a block is from the hand, where there is no other; descriptions go on beside it.

    A robot's layout for the first time, two views of one scene. The demonstrations are there for
    the statistics of the state alone.
    """
    sets = config.data.sets
    _vlm(config, world)
    config.optim.update(num_steps=500, warmup_steps=100)
    config.optim.partitions = ((".*", "vlm"),)
    config.model.length = 172
    config.model.language.depth = DEPTH
    sets[world.name].latents = None
    config.data.sets, config.data.batch_size = sets, 32
    _ask(config, world, {"scenes": 0.1, "names": 0.1, "single_ways": 0.8})
    config.init.update(run=f"{world.root}/vlm", fresh=(), deeper=True)


def _ways(config, world):
    """Where things are from the hand, of all three blocks and of the named one, as plain text."""
    _single_ways(config, world)
    config.optim.update(num_steps=1400, schedule="cosine")
    _ask(config, world, {"points": 0.1, "scenes": 0.1, "ways": 0.35, "offsets": 0.45})
    config.init.update(run=f"{world.root}/single_ways", deeper=False)


def _spatial(config, world):
    """The same, and how the hand moves; all behind latent tokens.

    Nobody knows their codes yet: they are drawn at random, and what follows them is learned. They
    begin as the bracket that opens a place, for that looks up the named block already. The towers
    see a block in the hand for the first time, and are never trained again.
    """
    sets = config.data.sets
    _vlm(config, world)
    config.optim.update(num_steps=2200, lr=1e-3, warmup_steps=100, schedule="cosine")
    config.optim.partitions = ((".*", "vlm"),)
    config.model.update(length=156, scrambled=0.5, through_latents=True, with_fast=True)
    config.model.language.depth = DEPTH
    sets[world.name].latents = None
    config.data.sets = sets
    config.data.update(batch_size=32, hold_out=0.05)
    config.monitor.update(every=500, batches=8)
    _ask(config, world, {"points": 0.05, "ways": 0.45})
    tokenizer = small_tokenizer()
    first, end = tokenizer.id("<la_0>"), tokenizer.id("<|la_start|>") + 1
    config.init.update(
        run=f"{world.root}/ways", fresh=(), fresh_rows=(first - NUM_FAST, first),
        rows_like=(tokenizer.encode("block [")[-1], first, end),
    )  # fmt: skip


def _ask(config, world, shares):
    """Shares of the questions, where a world has any; the rest is demonstrations."""
    _weigh(config, shares)
    asked = sum(pool.weight for pool in config.data.pools.values())
    config.data.sets[world.name].weight = round(1 - asked, 6)


def _pretrain(config, world):
    """Latent and FAST tokens; slowly, for what the layers know would soon be forgotten."""
    config.stage = "pretrain"
    gear_base.optim(config, 350, 1e-3, expert=False)
    config.optim.update(schedule="cosine", warmup_steps=50)
    config.optim.lr_scale = (("language/(layers|final_norm)/.*|(geometry|projector)/.*", 0.1),)
    config.model.language.depth = DEPTH
    config.data.batch_size = 16
    _ask(config, world, {"points": 0.05, "ways": 0.35})
    config.data.fast.path = f"{world.vlm}/fast"
    config.init.update(published=world.vlm, fresh=("learned/.*",))


def _policy(config, world):
    """The expert alone: a step costs half, for the VLM stays as it is."""
    config.stage = "policy"
    gear_base.optim(config, 1400, 1e-3, expert=True)
    config.optim.update(schedule="cosine", warmup_steps=100)
    config.optim.partitions = (("expert/.*", "expert"), (".*", None))
    config.model.language.depth = DEPTH
    config.model.update(with_fast=False, length=128)  # shorter without FAST tokens
    config.data.batch_size, config.data.pools = 16, {}
    config.init.update(run=f"{world.root}/pretrain", fresh=("expert/.*",))


_STAGES = {
    "single": _single, "pairs": _pairs, "vlm": _vlm, "single_ways": _single_ways, "ways": _ways,
    "spatial": _spatial, "pretrain": _pretrain, "policy": _policy,
}  # fmt: skip

_MODEL = {
    "tokenizer": "small", "image_size": 64, "length": 156, "real_tokens": 120,
    "fast_length": 40, "most_labels": 96, "flow_draws": 4, "fast_sees": "latents",
    "remat": "attention", "scrambled": 0.5, "through_latents": True, "drops": "none",
    "language": {
        "depth": 3, "width": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 24,
        "mlp_dim": 256, "vocab_size": 1088, "rope_sections": (4, 4, 4), "tied_head": True,
        "embed_std": 0.1, "residual_scale": 0.3,
    },
    "vision": {
        "depth": 3, "width": 64, "num_heads": 2, "mlp_dim": 192, "patch_size": 8,
        "window_size": 32, "full_attention_layers": (2,),
        # the table's colour becomes 0: what stands on it is all that the patches show
        "image_mean": (0.58, 0.53, 0.47), "image_std": (0.2, 0.2, 0.2),
    },
    "geometry": {
        "depth": 2, "width": 48, "num_heads": 2, "mlp_dim": 96, "patch_size": 8,
        "dino": {
            "depth": 1, "width": 48, "num_heads": 2, "mlp_dim": 96, "patch_size": 8,
            "pos_embed_grid": 8, "pos_embed_std": 0.5,
        },
    },
    "state": {"hidden_dim": 64, "shared": False},
    "expert": {
        "width": 96, "num_heads": 2, "mlp_dim": 256, "mlp": "swiglu", "output_aware": False,
    },
}  # fmt: skip


def _robot(world):
    return {
        "path": world.path, "row": world.row, "work": f"{world.root}/data/work",
        "group": None, "latents": f"{world.root}/ids", "weight": 1.0, "options": world.options,
    }  # fmt: skip


def _latents(world):
    config = latents.get_config("shapes")
    config.model.update(image_size=32, patch_size=8, target_pool=4)
    config.optim.update(num_steps=1000)
    config.loss.fade_steps = 400
    config.data.sets = {world.name: {
        key: value for key, value in _robot(world).items() if key not in ("group", "latents")
    }}  # fmt: skip
    config.data.update(batch_size=16, hold_out=0.05, num_workers=1)
    config.monitor.update(every=500, batches=10, first=1000)
    config.loop.update(log_every=50, checkpoint_every=500, keep=1)
    return config
