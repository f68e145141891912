"""What the stages pretrain, policy and adapt share: model, data, loss and evaluators of a config.

    configs/*.py -> GearConfig, data -> Stage -> train/loop.py

The stages differ in what is trained, not in code: pretrain has no expert, policy adds it, adapt
trains the state projectors alone and then everything lightly. Source: systems.md 2.3 to 2.10.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from gear_jax.data.embodiments import EMBODIMENTS
from gear_jax.data.sequences import SequenceConfig
from gear_jax.systems import gear
from gear_jax.systems.gear import GearConfig
from gear_jax.systems.vlm import VlmConfig
from gear_jax.tokenizers import text
from gear_jax.towers.action_expert import ActionExpertConfig
from gear_jax.towers.dinov2 import Dinov2Config
from gear_jax.towers.projector import ProjectorConfig
from gear_jax.towers.qwen_language import QwenLanguageConfig
from gear_jax.towers.qwen_vision import QwenVisionConfig
from gear_jax.towers.state_projector import StateProjectorConfig
from gear_jax.towers.vggt import VggtConfig
from gear_jax.train import lora, plan, sharding, start
from gear_jax.train.gear_batch import arrays, expected_arrays, nested
from gear_jax.train.gear_data import BUILT_IN, open_data
from gear_jax.train.gear_eval import HeldOut
from gear_jax.train.loop import Evaluator, Stage
from gear_jax.train.lora import LoraConfig
from gear_jax.train.optim import OptimConfig, stop_frozen


@dataclasses.dataclass(frozen=True)
class GearModel:
    """What a config trains, without data or devices.

    Attributes:
        cfg: all towers.
        sequence: token rows.
        optim: the optimiser.
        lora: low-rank adaptation, or None.
        init: rng -> params, extra.
        loss: params, extra, batch, rng -> loss, (extra, metrics); batch as `gear_batch.arrays`.
    """

    cfg: GearConfig
    sequence: SequenceConfig
    optim: OptimConfig
    lora: LoraConfig | None
    init: Callable
    loss: Callable

    def row(self, config: ml_collections.ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a batch of one row, for tracing without data."""
        return expected_arrays(self.cfg, self.sequence, 1, config.model.image_size)

    def sequence_for_prompts(self) -> SequenceConfig:
        """Token rows that end where a policy goes on: without a chunk's room."""
        return dataclasses.replace(self.sequence, prompt_only=True)


def make_model(config: ml_collections.ConfigDict) -> GearModel:
    """The model of a config.

    Raises:
        ValueError: the config makes no sense, or trains nothing.
    """
    plan.validate(config)
    cfg, optim = model_config(config.model), OptimConfig(**config.optim)
    adapters = None if config.lora is None else LoraConfig(**_plain(config.lora))

    def init(rng):
        params = gear.init(cfg, rng)
        if adapters is not None:
            params["lora"] = lora.init(params, adapters, jax.random.fold_in(rng, 1))
        return params, ()

    def loss(params, extra, batch, rng):
        params = lora.merge(stop_frozen(params, optim.partitions), adapters)
        batch = nested(batch)
        value, metrics = gear.loss(params, cfg, batch, rng)
        metrics["padding"] = jnp.mean(batch["segments"] == 0)
        return value, (extra, metrics)

    return GearModel(cfg, sequence_config(config.model), optim, adapters, init, loss)


def build(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> Stage:
    """What all three stages are made of; process 0 prints the plan.

    Args:
        config: like those of configs/.
        mesh: of the run.

    Raises:
        DataError: a data set cannot be used.
        ValueError: the config makes no sense, or trains nothing.
    """
    model = make_model(config)
    data = open_data(config, model.sequence)
    said = plan.describe(config, model.optim, model.init, model.loss, model.row(config), mesh)
    if jax.process_index() == 0:
        print(said, flush=True)
    evaluators = {}
    if config.monitor.every:
        held = HeldOut(model.cfg, config, data, mesh, model.lora)
        evaluators["held_out"] = Evaluator(config.monitor.every, held.run)
    return Stage(
        name=config.stage,
        init=model.init,
        loss=model.loss,
        optim=model.optim,
        rules=sharding.RULES,
        open_stream=functools.partial(data.open_train, config),
        arrays=arrays,
        evaluators=evaluators,
        ema_decay=config.ema_decay,
        load=start.loader(config.init, first_new_row(config.model)),
        flops_per_sample=plan.flops_per_sample(
            model.cfg, model.sequence, config.model.real_tokens, model.optim.partitions
        ),
        files={"normalizer.json": data.normalizer.to_json()},
    )


def model_config(model: Mapping[str, Any]) -> GearConfig:
    """The config of all towers from plain values.

    Args:
        model: as in configs/gear.py.
    """
    model = _plain(model)
    kinds = {"attention": model["attention"], "dtype": jnp.dtype(model["dtype"])}
    saved = {**kinds, "remat": model["remat"]}
    language = QwenLanguageConfig(**model["language"], **saved)
    vision = QwenVisionConfig(
        **model["vision"], **kinds, remat=model["remat"] if model["train_vision"] else "none"
    )
    geometry = None
    if model["geometry"] is not None:
        fields = dict(model["geometry"])
        dino = fields.pop("dino")
        dino = None if dino is None else Dinov2Config(**dino, **saved)
        geometry = VggtConfig(**fields, dino=dino, **saved)
    projector = ProjectorConfig(
        vision_width=vision.width,
        geometry_width=None if geometry is None else 2 * geometry.width,
        merge=vision.spatial_merge**2,
        width=language.width,
        dtype=kinds["dtype"],
        **model["projector"],
    )
    robots = len(EMBODIMENTS)
    state = StateProjectorConfig(
        robots, width=language.width, dtype=kinds["dtype"], **model["state"]
    )
    expert = None
    if model["expert"] is not None:
        fields = dict(model["expert"])
        own_maps = fields.pop("output_aware")
        expert = ActionExpertConfig(
            depth=language.depth,
            num_kv_heads=language.num_kv_heads,
            head_dim=language.head_dim,
            rope_theta=language.rope_theta,
            num_embodiments=robots if own_maps else 0,
            **fields,
            **saved,
        )
    first, used = _latent_range(model["tokenizer"])
    if language.vocab_size < used:
        raise ValueError(
            f"model.language.vocab_size is {language.vocab_size}: the tokenizer needs {used} rows"
        )
    return GearConfig(
        vlm=VlmConfig(vision, projector, language, geometry),
        state=state,
        expert=expert,
        num_latents=model["transitions"] * model["codes"],
        latent_ids=(first, len(text.LATENT)),
        vocab_used=used,
        **{key: model[key] for key in (
            "latents", "latent_pattern", "prompt_tokens", "kv_sources", "drops", "scrambled",
            "fast_sees", "flow_weight", "flow_draws", "flow_steps", "most_labels", "joint_grad")},
    )  # fmt: skip


def sequence_config(model: Mapping[str, Any]) -> SequenceConfig:
    """Lengths and blocks of the token rows, from the same plain values."""
    vision = QwenVisionConfig(**_plain(model)["vision"])
    side = model["image_size"] // (vision.patch_size * vision.spatial_merge)
    return SequenceConfig(
        length=model["length"],
        view_grid=(side, side),
        transitions=model["transitions"],
        codes=model["codes"],
        most_labels=model["most_labels"],
        fast_length=model["fast_length"],
        latents=model["latents"],
        with_fast=model["with_fast"],
        prompt_tokens=model["prompt_tokens"],
        through_latents=model["through_latents"],
    )


def first_new_row(model: Mapping[str, Any]) -> int:
    """Rows of the vocabulary from here on are GEAR-VLA's, not Qwen's."""
    if model["tokenizer"] in BUILT_IN:
        return BUILT_IN[model["tokenizer"]]().id("<fast_0000>")
    return text.FAST.start


def _latent_range(tokenizer: str) -> tuple[int, int]:
    """Id of the first latent token, and number of all tokens."""
    if tokenizer in BUILT_IN:
        made = BUILT_IN[tokenizer]()
        return made.id("<la_0>"), len(made)
    return text.LATENT.start, text.CONTROL.stop


def _plain(value: Any) -> Any:
    """ConfigDicts as dictionaries, lists as tuples."""
    if isinstance(value, ml_collections.ConfigDict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value
