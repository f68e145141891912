"""VGGT's aggregator on Hugging Face <-> gear_jax: config.json, key table. ported_models.md B."""

import dataclasses

from gear_jax.porting.files import CheckpointError
from gear_jax.porting.table import Row, Table
from gear_jax.towers.dinov2 import Dinov2Config
from gear_jax.towers.vggt import VggtConfig

_BLOCK = (
    ("norm1.weight", "attn_norm/scale", "d -> d"),
    ("norm1.bias", "attn_norm/bias", "d -> d"),
    ("attn.qkv.weight", "qkv/kernel", "(three n h) d -> d three n h"),
    ("attn.qkv.bias", "qkv/bias", "(three n h) -> three n h"),
    ("attn.proj.weight", "proj/kernel", "d (n h) -> n h d"),
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
    (f"attn.{x}_norm.{a}", f"{x}_norm/{b}", "h -> h")
    for x in "qk"
    for a, b in (("weight", "scale"), ("bias", "bias"))
)
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
            *_blocks(pre + "blocks", f"{_DINO}/layers", _BLOCK),
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
            "h": cfg.width // cfg.num_heads,
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
    aggregator = config.get("aggregator", config)
    dino = config.get("dino", {})
    if not isinstance(aggregator, dict) or not isinstance(dino, dict):
        raise CheckpointError(f"{name}: expected objects under 'aggregator' and 'dino'")
    for section, fixed in (
        (aggregator, {"aa_order": ["frame", "global"], "aa_block_size": 1, "qk_norm": True}),
        (aggregator, {"qkv_bias": True, "proj_bias": True, "ffn_bias": True}),
        (dino, {"interpolate_antialias": True, "interpolate_offset": 0.0, "block_chunks": 0}),
    ):
        for key, value in fixed.items():
            if section.get(key, value) != value:
                raise CheckpointError(f"{name}: {key} is {section[key]!r}, only {value!r} is built")
    kind = patch_embed or str(aggregator.get("patch_embed", "dino"))
    width = aggregator.get("embed_dim", 1024)
    sizes = {
        "width": width,
        "num_heads": aggregator.get("num_heads", 16),
        "patch_size": aggregator.get("patch_size", 14),
    }
    cfg = VggtConfig(
        depth=aggregator.get("depth", 24),
        mlp_dim=int(width * aggregator.get("mlp_ratio", 4.0)),
        num_registers=aggregator.get("num_register_tokens", 4),
        rope_theta=float(aggregator.get("rope_freq", 100)),
        dino=None,
        **sizes,
    )
    if width % cfg.num_heads or (width // cfg.num_heads) % 4:
        raise CheckpointError(
            f"{name}: embed_dim {width} does not split into {cfg.num_heads} heads"
        )
    if kind.startswith("conv"):
        return cfg
    image = dino.get("img_size", aggregator.get("img_size", 518))
    sizes |= {"num_heads": dino.get("num_heads", 16)}
    if (
        dino.get("embed_dim", width) != width
        or dino.get("patch_size", cfg.patch_size) != cfg.patch_size
    ):
        raise CheckpointError(
            f"{name}: DINO's embed_dim or patch_size differs from the aggregator's"
        )
    return dataclasses.replace(
        cfg,
        dino=Dinov2Config(
            depth=dino.get("depth", 24),
            mlp_dim=int(width * dino.get("mlp_ratio", 4.0)),
            pos_embed_grid=image // cfg.patch_size,
            num_registers=dino.get("num_register_tokens", 4),
            **sizes,
        ),
    )
