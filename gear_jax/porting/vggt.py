"""VGGT's aggregator on Hugging Face <-> gear_jax: config.json, key table. ported_models.md B."""

import dataclasses

from gear_jax.porting.config import Fields
from gear_jax.porting.table import Row, Table
from gear_jax.towers.dinov2 import Dinov2Config
from gear_jax.towers.vggt import VggtConfig

_BLOCK = (
    ("norm1.weight", "attn_norm/scale", "d -> d"),
    ("norm1.bias", "attn_norm/bias", "d -> d"),
    ("attn.qkv.weight", "qkv/kernel", "(three n head) d -> d three n head"),
    ("attn.qkv.bias", "qkv/bias", "(three n head) -> three n head"),
    ("attn.proj.weight", "proj/kernel", "d (n head) -> n head d"),
    ("attn.proj.bias", "proj/bias", "d -> d"),
    ("ls1.gamma", "attn_scale", "d -> d"),
    ("norm2.weight", "mlp_norm/scale", "d -> d"),
    ("norm2.bias", "mlp_norm/bias", "d -> d"),
    ("mlp.fc1.weight", "fc1/kernel", "f d -> d f"),
    ("mlp.fc1.bias", "fc1/bias", "f -> f"),
    ("mlp.fc2.weight", "fc2/kernel", "d f -> f d"),
    ("mlp.fc2.bias", "fc2/bias", "d -> d"),
    ("ls2.gamma", "mlp_scale", "d -> d"),
)
_QK_NORM = tuple(
    (f"attn.{x}_norm.{a}", f"{x}_norm/{b}", "head -> head")
    for x in "qk"
    for a, b in (("weight", "scale"), ("bias", "bias"))
)
_DINO_BLOCK = tuple((a, b, pattern.replace("head", "dino_head")) for a, b, pattern in _BLOCK)
_CONV = "patch_tokens/linear/proj"
_DINO = "patch_tokens/dino"
_MASK_TOKEN = "unused/dino_mask_token"  # in the released file, read by no forward pass


def _blocks(foreign, ours, rows):
    return tuple(Row(f"{foreign}.{{i}}.{a}", f"{ours}/{b}", pattern) for a, b, pattern in rows)


def _patches(foreign, ours):
    return (
        Row(f"{foreign}.weight", f"{ours}/kernel", "d c p q -> (p q c) d"),
        Row(f"{foreign}.bias", f"{ours}/bias", "d -> d"),
    )


def table(cfg: VggtConfig) -> Table:
    """The key table of one config; ours lie under "geometry", but for the unused mask token."""
    pre = "aggregator."
    carried: dict[str, tuple[int, ...]] = {}
    rows = (
        Row(pre + "camera_token", "camera", "1 r t d -> r t d"),
        Row(pre + "register_token", "registers", "1 r t d -> r t d"),
        *_blocks(pre + "frame_blocks", "layers/frame", _BLOCK + _QK_NORM),
        *_blocks(pre + "global_blocks", "layers/global", _BLOCK + _QK_NORM),
    )
    pre += "patch_embed."
    if cfg.dino is None:
        rows += _patches(pre + "proj", _CONV)
    else:
        rows += (
            Row(pre + "cls_token", f"{_DINO}/cls_token", "1 t d -> t d"),
            Row(pre + "pos_embed", f"{_DINO}/pos_embed", "1 t d -> t d"),
            Row(pre + "register_tokens", f"{_DINO}/registers", "1 t d -> t d"),
            *_patches(pre + "patch_embed.proj", f"{_DINO}/patch_embed/proj"),
            *_blocks(pre + "blocks", f"{_DINO}/layers", _DINO_BLOCK),
            Row(pre + "norm.weight", f"{_DINO}/norm/scale", "d -> d"),
            Row(pre + "norm.bias", f"{_DINO}/norm/bias", "d -> d"),
        )
    rows = tuple(dataclasses.replace(row, ours=f"geometry/{row.ours}") for row in rows)
    if cfg.dino is not None:
        rows += (Row(pre + "mask_token", _MASK_TOKEN, "1 d -> d"),)
        carried = {_MASK_TOKEN: (cfg.dino.width,)}
    return Table(
        rows=rows,
        sizes={
            "three": 3,
            "head": cfg.width // cfg.num_heads,
            "dino_head": cfg.dino.width // cfg.dino.num_heads if cfg.dino else 1,
            "c": 3,
            "p": cfg.patch_size,
            "q": cfg.patch_size,
        },
        ignored=(r"(camera|point|depth|track)_head\..*",),
        carried=carried,
    )


def read_config(
    config: dict, name: str = "config.json", patch_embed: str | None = None
) -> VggtConfig:
    """config.json -> VggtConfig.

    The released file names only img_size, patch_size and embed_dim; what it leaves out is the
    release's own default (VGGT-1B), and the shapes in the checkpoint are compared with it.

    Args:
        config: the parsed file: the released flat layout, or {"aggregator": {...}, "dino": {...}}.
        name: its name, for messages.
        patch_embed: "dino" or "conv"; by default what the config says, else "dino".

    Raises:
        CheckpointError: an option we do not build, or sizes that do not fit together.
    """
    top = Fields(config, name)
    aggregator = top.section("aggregator", default=config)
    dino = top.section("dino", default={})
    aggregator.only("aa_order", ["frame", "global"], default=["frame", "global"])
    aggregator.only("aa_block_size", 1, default=1)
    for key in ("qk_norm", "qkv_bias", "proj_bias", "ffn_bias"):
        aggregator.only(key, True, default=True)
    dino.only("interpolate_antialias", True, default=True)
    dino.only("interpolate_offset", 0, 0.0, default=0.0)
    dino.only("block_chunks", 0, default=0)
    kind = patch_embed or aggregator.get("patch_embed", default="dino")
    if kind not in ("conv", "dino") and not str(kind).startswith("dinov2"):
        aggregator.refuse("patch_embed", kind, "'conv', 'dino' or a 'dinov2_..' model")
    cfg = VggtConfig(depth=aggregator.count("depth", most=1024, default=24), dino=None)
    cfg = dataclasses.replace(
        cfg,
        num_registers=aggregator.count("num_register_tokens", default=4),
        rope_theta=aggregator.positive("rope_freq", default=100),
        **_widths(aggregator, heads_of=4),
    )
    if kind == "conv":
        return cfg
    for key, ours in (("embed_dim", cfg.width), ("patch_size", cfg.patch_size)):
        dino.only(key, ours, default=ours)
    image = dino if "img_size" in dino else aggregator
    widths = _widths(dino, heads_of=1, embed_dim=cfg.width, patch_size=cfg.patch_size)
    return dataclasses.replace(
        cfg,
        dino=Dinov2Config(
            depth=dino.count("depth", most=1024, default=24),
            pos_embed_grid=image.count("img_size", default=518) // cfg.patch_size,
            num_registers=dino.count("num_register_tokens", default=4),
            **widths,
        ),
    )


def _widths(fields: Fields, heads_of: int, embed_dim: int = 1024, patch_size: int = 14) -> dict:
    """Width, heads, MLP and patch of the aggregator or of DINOv2."""
    width = fields.count("embed_dim", default=embed_dim)
    heads = fields.count("num_heads", default=16)
    if width % (heads * heads_of):
        fields.refuse("num_heads", heads, f"a divisor of {width // heads_of}")
    return {
        "width": width,
        "num_heads": heads,
        "mlp_dim": int(width * fields.positive("mlp_ratio", most=64, default=4.0)),
        "patch_size": fields.count("patch_size", default=patch_size),
    }
