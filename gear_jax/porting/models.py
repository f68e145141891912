"""The published models we port, behind one door: directory -> config, key table, shapes."""

import dataclasses
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from gear_jax.porting import files, qwen2_5_vl, table, vggt
from gear_jax.systems import vlm
from gear_jax.towers.vggt import Vggt

MODELS = ("qwen2_5_vl", "vggt")


@dataclasses.dataclass(frozen=True)
class Model:
    """A published model of a certain size.

    Attributes:
        name: one of `MODELS`.
        cfg: VlmConfig or VggtConfig.
        table: its key table.
        targets: {path: ShapeDtypeStruct} of all parameters, carried ones too.
    """

    name: str
    cfg: Any
    table: table.Table
    targets: dict[str, jax.ShapeDtypeStruct]

    @property
    def entries(self) -> list[table.Entry]:
        """Every foreign tensor, in the table's order."""
        return table.entries(self.table, self.parameters)

    @property
    def parameters(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The targets that a tower reads."""
        return {path: x for path, x in self.targets.items() if path not in self.table.carried}


def describe(
    name: str, config: dict, config_name: str = "config.json", patch_embed: str | None = None
) -> Model:
    """The model of a parsed config.json.

    Args:
        name: one of `MODELS`.
        config: the parsed file.
        config_name: its name, for messages.
        patch_embed: for VGGT, "dino" or "conv"; by default what the config says.

    Raises:
        CheckpointError: unknown model, or a config that is not its.
    """
    if name == "qwen2_5_vl":
        cfg = qwen2_5_vl.read_config(config, config_name)
        rows = qwen2_5_vl.table(cfg)
        shapes = jax.eval_shape(lambda: vlm.init(cfg, jax.random.key(0)))
    elif name == "vggt":
        cfg = vggt.read_config(config, config_name, patch_embed)
        rows = vggt.table(cfg)
        image = jnp.zeros((1, 1, cfg.patch_size, cfg.patch_size, 3))
        shapes = jax.eval_shape(lambda: Vggt(cfg).init(jax.random.key(0), image))
        shapes = {"geometry": shapes["params"]}
    else:
        raise files.CheckpointError(
            f"model {name!r} is unknown: expected one of {', '.join(MODELS)}"
        )
    targets = table.flatten(shapes)
    targets |= {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in rows.carried.items()}
    return Model(name, cfg, rows, targets)


def open_source(
    name: str,
    source: str | os.PathLike,
    config_name: str = "config.json",
    patch_embed: str | None = None,
) -> tuple[Model, dict, dict[str, files.Tensor]]:
    """A checkpoint directory -> (Model, parsed config, {key: Tensor}).

    Raises:
        CheckpointError: any fault of the directory.
    """
    source = pathlib.Path(source)
    parts = None
    if name == "vggt" and (source / "aggregator.safetensors").exists():
        parts = ["aggregator.safetensors", _patch_embed_file(source, patch_embed)]
        patch_embed = parts[1].removeprefix("patch_embed_").removesuffix(".safetensors")
    tensors = files.open_directory(source, parts)
    config = files.load_json(files.inside(source, config_name))
    return describe(name, config, config_name, patch_embed), config, tensors


def _patch_embed_file(source: pathlib.Path, patch_embed: str | None) -> str:
    """The file of the patch embedding, where a checkpoint keeps it apart."""
    kinds = [k for k in ("dino", "conv") if (source / f"patch_embed_{k}.safetensors").exists()]
    if patch_embed is None and len(kinds) == 1:
        patch_embed = kinds[0]
    if patch_embed not in kinds:
        raise files.CheckpointError(
            f"{source}: patch embeddings {kinds} are there, and {patch_embed} is asked for: "
            "choose with --patch-embed"
        )
    return f"patch_embed_{patch_embed}.safetensors"
