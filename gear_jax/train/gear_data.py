"""The data of a GEAR-VLA run: sets, pools, weights, statistics, tokenizers, held-out episodes.

config.data -> {name: Prepared or Pool}, phases, Normalizer, RowMaker -> Stream
"""

import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from gear_jax.data import mixtures
from gear_jax.data.catalog import DatasetConfig, open_prepared
from gear_jax.data.images import AugmentConfig
from gear_jax.data.latent_ids import LatentIds
from gear_jax.data.measure import Measured, measure
from gear_jax.data.mixtures import Phase
from gear_jax.data.normalizer import Normalizer
from gear_jax.data.pipeline import Stream, StreamConfig
from gear_jax.data.prepared import Prepared, hold_out
from gear_jax.data.record_packs import Packed, Room
from gear_jax.data.record_pool import Pool
from gear_jax.data.sequences import RowMaker, SequenceConfig, question_tokens
from gear_jax.data.statistics import require_valid
from gear_jax.data.tfrecord import DataError
from gear_jax.data.vision_language import TYPES
from gear_jax.data.windows import make_chunks
from gear_jax.tokenizers import text
from gear_jax.tokenizers.fast import FastTokenizer
from gear_jax.tokenizers.small import small_tokenizer
from gear_jax.types import VIEWS, ActionSpec

# Tokenizers that need no file, for models that are trained from nothing.
BUILT_IN = {"bytes": text.byte_tokenizer, "small": small_tokenizer}
_NOT_TOLD = ("id", "type", "images", "views", "state", "mask")  # of a record
_OWN_KEYS = ("weight", "group", "latents")  # of a set, beside the fields of DatasetConfig


@dataclasses.dataclass(frozen=True)
class GearData:
    """Everything a stream is made of.

    Attributes:
        train: {name: data set}.
        held: held-out episodes of robots and video; empty where `data.hold_out` is 0.
        phases: weights of `train`.
        normalizer: of actions and states.
        latents: {name: latent action ids}.
        rows: makes token rows.
    """

    train: Mapping[str, Prepared | Packed]
    held: Mapping[str, Prepared]
    phases: Sequence[Phase]
    normalizer: Normalizer
    latents: Mapping[str, LatentIds]
    rows: RowMaker

    def open_train(
        self, config: ml_collections.ConfigDict, state: Mapping[str, Any] | None
    ) -> Stream:
        """The training stream of this host, from a state or from the beginning."""
        return self._open(self.train, self.phases, stream_config(config), state=state,
                          num_workers=config.data.num_workers)  # fmt: skip

    def open_held(self, config: ml_collections.ConfigDict) -> Stream:
        """Held-out examples of this host, without augmentation; always the same."""
        weights = {name: 1 / len(self.held) for name in self.held}
        options = dataclasses.replace(
            stream_config(config), augment=None, random_side=False, seed=config.seed + 1
        )
        return self._open(self.held, [Phase(0.0, weights)], options)

    def _open(self, sets, phases, options, **how):
        ids = {name: one for name, one in self.latents.items() if name in sets}
        host = {"host": jax.process_index(), "num_hosts": jax.process_count()}
        return Stream(
            sets, phases, options, self.normalizer, latents=ids, rows=self.rows, **host, **how
        )


def stream_config(config: ml_collections.ConfigDict) -> StreamConfig:
    """What the training stream makes of its sets."""
    data = config.data
    return StreamConfig(
        batch_size=data.batch_size,
        num_samples=config.optim.num_steps * data.batch_size,
        image_size=config.model.image_size,
        fit=data.fit,
        augment=AugmentConfig(**data.augment) if data.augment is not None else None,
        random_side=data.random_side,
        seed=config.seed,
        bad_images=data.bad_images,
    )


def open_data(config: ml_collections.ConfigDict, sequence: SequenceConfig) -> GearData:
    """Open everything; what is derived from a set and is not there yet is made in its work folder.

    Raises:
        DataError: data that cannot be used, latent ids that are missing, or statistics that are not
            fit to train on.
        ValueError: weights or names that make no sense.
    """
    data, spec = config.data, ActionSpec(chunk_len=config.data.chunk_len)
    workers = max(1, data.num_workers)
    whole = {
        name: open_prepared(DatasetConfig(**_fields(fields)), num_workers=workers)
        for name, fields in data.sets.items()
    }
    normalizer = open_normalizer(
        {name: (one, data.sets[name].work) for name, one in whole.items()}, spec
    )
    train: dict[str, Prepared | Packed] = dict(whole)
    held = {}
    for name, one in whole.items() if data.hold_out else ():
        train[name], held[name] = hold_out(one, data.hold_out)
    tokenizer = open_tokenizer(config.model.tokenizer)
    for name, pool in _open_pools(config, tokenizer, sequence).items():
        if name in train:
            raise ValueError(f"{name!r} is both a data set and a pool: choose another name")
        train[name] = pool
    fast = open_fast(data.fast, whole, normalizer, spec) if config.model.with_fast else None
    if fast is not None and data.fast.vocab_size > (room := num_fast(tokenizer)):
        raise ValueError(
            f"data.fast.vocab_size is {data.fast.vocab_size}: the text tokenizer has {room} "
            "tokens for FAST codes"
        )
    digest = hashlib.sha256(tokenizer.backend.to_str().encode())
    digest.update(b"" if fast is None else fast.bpe.to_str().encode())
    return GearData(
        train=train,
        held=held,
        phases=open_phases(config, list(train)),
        normalizer=normalizer,
        latents=_open_latents(config, whole, sequence) if config.model.latents == "codes" else {},
        rows=RowMaker(tokenizer, fast, sequence, digest.hexdigest()),
    )


def _open_latents(config, sets, sequence):
    """{name: latent action ids} of robots and video."""
    made = {}
    for name, one in sets.items():
        fields = config.data.sets[name]
        path, unused = fields.get("latents"), not fields.get("weight", 1.0)
        if path is None and (unused or sequence.through_latents):
            continue
        if path is None:
            raise DataError(
                f"data.sets.{name}.latents is None: expected the folder of its latent action ids; "
                "make them with launch.extract, or set model.through_latents"
            )
        made[name] = LatentIds(path, one)
        found, wanted = made[name].spec.shape, (sequence.transitions, sequence.codes)
        if found != wanted:
            raise DataError(f"{path}: {found} transitions and codes, the model has {wanted}")
    return made


def _open_pools(config, tokenizer, sequence):
    """{name: vision-language records, packed into rows}."""
    longest = {
        name: max(len(tokenizer.encode(prompt)) for prompt in kind.prompts)
        for name, kind in TYPES.items()
    }
    turns = question_tokens(tokenizer)

    def count(record):
        """More tokens than its question and answer have: all that they are made from, as JSON."""
        told = {key: value for key, value in record.items() if key not in _NOT_TOLD}
        return turns + longest[record["type"]] + len(tokenizer.encode(json.dumps(told)))

    room = Room(
        tokens=sequence.length,
        images=len(VIEWS),
        image_tokens=math.prod(sequence.view_grid) + 2,
        count=count,
    )
    keep = config.data.keep_percent
    return {
        name: Packed(Pool(fields.path, types=fields.get("types"), keep_percent=keep), room,
                     config.seed)
        for name, fields in config.data.pools.items()
    }  # fmt: skip


def _fields(fields: ml_collections.ConfigDict) -> dict[str, Any]:
    return {key: value for key, value in fields.to_dict().items() if key not in _OWN_KEYS}


def open_tokenizer(path: str) -> text.TextTokenizer:
    """The text tokenizer of a folder, or one of `BUILT_IN`; with all added tokens."""
    if path in BUILT_IN:
        return BUILT_IN[path]()
    return text.extend(text.load_tokenizer(path))


def num_fast(tokenizer: text.TextTokenizer) -> int:
    """FAST codes that a text tokenizer has tokens for."""
    return tokenizer.id("<la_0>") - tokenizer.id("<fast_0000>")


def open_normalizer(sets: Mapping[str, tuple[Prepared, str]], spec: ActionSpec) -> Normalizer:
    """Statistics over all sets that have actions: one action space, states by embodiment.

    Args:
        sets: {name: (data set, its work folder)}; what is not measured yet is, and is kept there.
        spec: of the chunks.

    Raises:
        DataError: sets without actions, or statistics that are not fit to train on.
    """
    everything, robots = Measured(spec), {}
    for name, (prepared, work) in sets.items():
        if not prepared.row.arms:
            continue
        path = pathlib.Path(work) / f"measured-{spec.digest()[:8]}.npz"
        if not path.is_file():
            measure(prepared, spec).save(path)
        counted = Measured.load(path, spec)
        if prepared.digest not in counted.sources.values():
            measure(prepared, spec).save(path)  # of what lay here before
            counted = Measured.load(path, spec)
        require_valid(counted.statistics(name), spec)
        everything.merge(counted)
        robot = prepared.row.embodiment
        robots.setdefault(robot, Measured(spec)).merge(counted)
    if sets and not robots:
        raise DataError(f"none of the data sets {list(sets)} has actions: nothing to normalise by")
    states = {robot: counted.statistics(robot) for robot, counted in robots.items()}
    return Normalizer(everything.statistics("all") if robots else None, states, spec)


def open_fast(
    options: ml_collections.ConfigDict,
    sets: Mapping[str, Prepared],
    normalizer: Normalizer,
    spec: ActionSpec,
) -> FastTokenizer:
    """The FAST tokenizer of a folder; fitted on these sets, and kept there, if there is none yet.

    Args:
        options: path; num_chunks to fit on; vocab_size; scale, steps per unit of a coefficient.
        sets: robots and video.
        normalizer: of the actions.
        spec: of the chunks.
    """
    path = pathlib.Path(options.path)
    if not (path / "tokenizer.json").is_file():
        robots = [one for one in sets.values() if one.row.arms]
        rng, chunks = np.random.default_rng(0), []
        for one in robots:
            count = min(one.num_steps, -(-options.num_chunks // len(robots)))
            steps = [one.locate(int(i)) for i in rng.choice(one.num_steps, count, replace=False)]
            episodes = [one.episode(number, images=False) for number, _ in steps]
            action, mask, _ = make_chunks(episodes, [step for _, step in steps], spec)
            known = np.broadcast_to(mask.any(axis=1, keepdims=True), mask.shape)
            chunks.append(np.clip(normalizer.normalize_action(action, known), -1, 1))
        made = FastTokenizer.fit(
            np.concatenate(chunks), vocab_size=options.vocab_size, scale=options.scale
        )
        made.save(path)
    fast = FastTokenizer.load(path, chunk_len=spec.chunk_len, action_dim=spec.action_dim)
    if fast.scale != options.scale:
        raise ValueError(f"{path}: its scale is {fast.scale}, data.fast.scale is {options.scale}")
    return fast


def open_phases(config: ml_collections.ConfigDict, names: Sequence[str]) -> Sequence[Phase]:
    """Shares of the sets: by the paper's tables, along its curriculum, or as the config says.

    A set's `group` is its name in the tables, by default its own; `weight` divides a group among
    its members, or is the share itself when the mixture is "weights".
    """
    data, mixture = config.data, config.data.mixture
    entries = {**data.sets, **data.pools}
    weight = {name: float(entries[name].get("weight", 1.0)) for name in names}
    if mixture == "weights":
        total = sum(weight.values())
        return [Phase(0.0, {name: value / total for name, value in weight.items()})]
    group = {name: entries[name].get("group") or name for name in names}
    groups = list(dict.fromkeys(group.values()))
    if mixture in ("su_sp", "sp_su", "mixed"):
        phases = mixtures.curriculum(groups, mixture)
    elif mixture in ("pretrain", "policy"):
        phases = [Phase(0.0, mixtures.stage_weights(mixture, groups))]
    else:
        raise ValueError(
            f"data.mixture is {mixture!r}: expected weights, su_sp, sp_su, mixed, pretrain or "
            "policy"
        )
    totals = {one: sum(weight[n] for n in names if group[n] == one) for one in groups}
    return [
        Phase(phase.start, {
            name: phase.weights.get(group[name], 0.0) * weight[name] / totals[group[name]]
            for name in names
        })
        for phase in phases
    ]  # fmt: skip
