"""A trained run as a policy: Observation -> action chunk, through the transforms of its training.

    images, instruction, state -> rows that a policy goes on from -> gear.act -> units of ActionSpec
    images, question -> rows that an answer goes on from -> vlm.generate -> text

Everything comes from the run's folder: config.json, normalizer.json, and the newest whole
checkpoint, of the averaged parameters where there are some. Source: GEAR-VLA 3.4, systems.md 2.6.
"""

import dataclasses
import functools
import hashlib
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import jax
import numpy as np

from gear_jax.data import images as images_lib
from gear_jax.data.embodiments import embodiment_id
from gear_jax.data.normalizer import Normalizer
from gear_jax.data.sequences import Question, SequenceConfig, ref_tokens, token_rows
from gear_jax.data.tfrecord import DataError
from gear_jax.data.windows import empty_state
from gear_jax.evals.episodes import Answer, Query, noise_seed
from gear_jax.systems import gear, vlm
from gear_jax.tokenizers.text import TextTokenizer
from gear_jax.train import lora, sharding, trained
from gear_jax.train.gear import make_model
from gear_jax.train.gear_batch import nested
from gear_jax.train.gear_data import open_tokenizer
from gear_jax.types import VIEWS, Image, Observation, State

_STATE = ("ee", "ee_mask", "joints", "joint_mask", "arm_mask")
_ROWS = ("tokens", "segments", "groups", "acts", "insert_index", "positions", "latent_index",
         "latent_valid", "scenes", "chunk_position")  # fmt: skip


class GearPolicy:
    """A `ChunkPolicy`: GEAR-VLA on this host's devices.

    An answer depends on its query, the seed and `device_batch` alone: a call is cut into batches of
    that size for each device, the last one filled up; queries with a marked first view have batches
    of their own, because its place in a row moves all that follows. Devices that split nothing but
    rows all run the program of one, so their number changes no bit of a chunk.
    """

    def __init__(
        self,
        cfg: gear.GearConfig,
        params: Any,
        normalizer: Normalizer,
        tokenizer: TextTokenizer,
        sequence: SequenceConfig,
        *,
        image_size: int,
        fit: Literal["pad", "stretch"],
        mesh: jax.sharding.Mesh,
        identity: Mapping[str, Any],
        seed: int = 0,
        temperature: float = 1.0,
        device_batch: int = 8,
    ):
        """Compile nothing yet.

        Args:
            cfg: all towers.
            params: placed on the mesh.
            normalizer: of the training.
            tokenizer: of text.
            sequence: token rows; `prompt_only`.
            image_size: pixels, that the model was trained on.
            fit: how an image fills it; see `images.Fit`.
            mesh: of this host's devices.
            identity: plain JSON, what this policy is.
            seed: of the noise.
            temperature: factor of the noise that a chunk begins with, 0 .. 1. Below 1 answers are
                nearer to the middle of what the policy thinks likely, which helps one that is
                unsure (low-temperature sampling, arXiv 2211.15657); 0 draws nothing.
            device_batch: rows that a device sees at a time.

        Raises:
            ValueError: the run has no action expert, a temperature outside 0 .. 1, or no rows.
        """
        _check_expert(cfg)
        if not 0 <= temperature <= 1:
            raise ValueError(f"temperature {temperature}: expected 0 .. 1")
        if device_batch < 1:
            raise ValueError(f"device_batch {device_batch}: expected at least 1")
        self.temperature = temperature
        self.spec, self.cfg, self.params = normalizer.spec, cfg, params
        self.normalizer, self.tokenizer, self.sequence = normalizer, tokenizer, sequence
        self.image_size, self.fit, self.mesh = image_size, fit, mesh
        self.seed = seed
        self.batch_size = device_batch * math.prod(mesh.shape[a] for a in sharding.BATCH_AXES)
        self._identity = dict(identity)
        self._rows = sharding.batch_sharding(mesh)
        self._act = jax.jit(functools.partial(_act, cfg))
        end = (tokenizer.id("<|im_end|>"),)
        self._say = jax.jit(functools.partial(_say, cfg, end), static_argnames="max_new_tokens")

    def identity(self) -> Mapping[str, Any]:
        """What this policy is: digests of checkpoint, statistics and spec, and how it is asked."""
        return self._identity

    def __call__(self, queries: Sequence[Query]) -> Sequence[Answer]:
        """One answer to each query.

        Raises:
            ValueError: an observation of a robot or text that the run cannot take.
        """
        shape = (self.spec.chunk_len, self.spec.action_dim)
        answers: dict[int, Answer] = {}
        marked = [query.observation.ref_image is not None for query in queries]
        for kind in (False, True):
            which = [place for place, one in enumerate(marked) if one == kind]
            for first in range(0, len(which), self.batch_size):
                places = which[first : first + self.batch_size]
                some = [queries[place] for place in places]
                noise = [
                    np.random.default_rng(noise_seed(query, self.seed)).standard_normal(shape)
                    for query in some
                ]
                noise = self.temperature * np.stack(noise)
                made = self.chunks([query.observation for query in some], noise)
                for place, chunk, said in zip(places, *made, strict=True):
                    answers[place] = Answer(chunk, said)
        return [answers[place] for place in range(len(queries))]

    def ask(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image]],
        *,
        max_new_tokens: int = 128,
    ) -> list[str]:
        """What the VLM says to vision-language questions, greedily.

        Args:
            prompts: n of them, as in `vision_language.TYPES`.
            images: of each question, one to three, in their order.
            max_new_tokens: longest answer; what is longer ends there.

        Returns:
            n answers; `vision_language.parse_answer` reads them.

        Raises:
            ValueError: too many images, or text that cannot be asked.
        """
        said = []
        for first in range(0, len(prompts), self.batch_size):
            some = slice(first, first + self.batch_size)
            texts, pictures = list(prompts[some]), list(images[some])
            count = len(texts)
            fill = self.batch_size - count
            flat = self.questions(texts + texts[-1:] * fill, pictures + pictures[-1:] * fill)
            with jax.set_mesh(self.mesh):
                placed = {key: jax.device_put(value, self._rows) for key, value in flat.items()}
                tokens = self._say(self.params, placed, max_new_tokens=max_new_tokens)
            tokens = jax.device_get(tokens)[:count].tolist()
            said += [self.tokenizer.decode(row, skip_special=True) for row in tokens]
        return said

    def chunks(self, observations: Sequence[Observation], noise: np.ndarray):
        """Chunks float32[n, A, a] in the units of `spec`, and latent ids int32[n, M].

        Args:
            observations: n of them, up to `batch_size`.
            noise: float[n, A, a], standard normal.
        """
        count = len(observations)
        full = [*observations, *[observations[-1]] * (self.batch_size - count)]
        noise = np.concatenate([noise, np.repeat(noise[-1:], self.batch_size - count, axis=0)])
        batch = self.batch(full) | {"noise": noise.astype(np.float32)}
        with jax.set_mesh(self.mesh):
            placed = {key: jax.device_put(value, self._rows) for key, value in batch.items()}
            chunks, ids = jax.device_get(self._act(self.params, placed))
        return self.normalizer.denormalize_action(chunks[:count]), ids[:count]

    def batch(self, observations: Sequence[Observation]) -> dict[str, np.ndarray]:
        """What the model reads: flat, every array with its leading axis over rows.

        Where one of them has a marked first view, all rows have its place, so they are longer.
        """
        rows = len(observations)
        images, mask = self._no_images(rows)
        for row, one in enumerate(observations):
            if unknown := set(one.images) - set(VIEWS):
                raise ValueError(f"views {sorted(unknown)}: expected some of {VIEWS}")
            for place, view in enumerate(VIEWS):
                if view in one.images:
                    images_lib.fit_into(images[row, place], one.images[view], self.fit)
                    mask[row, place] = True
        robots = np.array([self._robot(one) for one in observations], np.int32)
        state: dict[str, Any] = {
            key: np.stack([cast(dict[str, np.ndarray], one.state)[key] for one in observations])
            for key in State.__annotations__
        }
        marked = np.array([one.ref_image is not None for one in observations])
        refs = np.zeros((rows, *images.shape[2:]), np.uint8)
        for row, one in enumerate(observations):
            if one.ref_image is not None:
                images_lib.fit_into(refs[row], one.ref_image, self.fit)
        told = {
            "instruction": [one.instruction for one in observations],
            "questions": [[] for _ in observations],
            "view_mask": mask,
            "state": cast(State, state),
            "embodiment_id": robots,
        }
        if not marked.any():
            return self._flat(told, images, self.sequence)
        longer = self.sequence.length + ref_tokens(self.sequence)
        sequence = dataclasses.replace(self.sequence, length=longer)
        return self._flat(told | {"ref_mask": marked}, images, sequence) | {"ref_image": refs}

    def questions(
        self, prompts: Sequence[str], images: Sequence[Sequence[Image]]
    ) -> dict[str, np.ndarray]:
        """What the model reads of questions about images, one a row; as `batch`."""
        rows = len(prompts)
        slots, mask = self._no_images(rows)
        for row, pictures in enumerate(images):
            if not 1 <= len(pictures) <= len(VIEWS):
                raise ValueError(f"{len(pictures)} images: expected one to {len(VIEWS)}")
            for place, picture in enumerate(pictures):
                images_lib.fit_into(slots[row, place], picture, self.fit)
            mask[row, : len(pictures)] = True
        asked = [
            [Question(prompt, "", tuple(range(len(pictures))))]
            for prompt, pictures in zip(prompts, images, strict=True)
        ]
        told = {
            "instruction": [""] * rows,
            "questions": asked,
            "view_mask": mask,
            "state": empty_state((rows,)),
            "embodiment_id": np.zeros(rows, np.int32),
        }
        return self._flat(told, slots, self.sequence)

    def _no_images(self, rows):
        """Black images of a batch, and that none of them is there."""
        size = self.image_size
        shape = (rows, len(VIEWS), size, size, 3)
        return np.zeros(shape, np.uint8), np.zeros(shape[:2], bool)

    def _flat(self, told, images, sequence):
        """The batch of `token_rows`, with states of physical units normalised, on its way."""
        state = dict(self.normalizer.normalize_state(told["state"], told["embodiment_id"]))
        made = token_rows(told | {"state": state}, self.tokenizer, sequence, [None] * len(images))
        flat = {key: made[key] for key in _ROWS}
        flat |= {"images": images, "embodiment_id": told["embodiment_id"]}
        flat["positions"] = np.moveaxis(flat["positions"], 0, 1)
        return flat | {f"state/{key}": state[key] for key in _STATE}

    def _robot(self, observation):
        number = embodiment_id(observation.embodiment)
        if observation.embodiment not in self.normalizer.states:
            raise ValueError(
                f"robot {observation.embodiment!r} is unknown to the run: expected one of "
                f"{sorted(self.normalizer.states)}"
            )
        return number


def _act(cfg, params, flat):
    batch = nested(flat)
    return gear.act(params, cfg, batch, batch.pop("noise"))


def _say(cfg, end, params, flat, *, max_new_tokens):
    batch = nested(flat)
    inserts = gear.encode(params, cfg, batch)
    return vlm.generate(
        params, cfg.vlm, batch, inserts, max_new_tokens=max_new_tokens, stop_tokens=end,
        vocab_used=cfg.vocab_used,
    )[0]  # fmt: skip


def _check_expert(cfg):
    if cfg.expert is None:
        raise ValueError("the run has no action expert: expected one of stage policy or adapt")


def open_policy(
    workdir: str | pathlib.Path,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    device_batch: int = 8,
    mesh: Mapping[str, int] | None = None,
    untrained: bool = False,
) -> GearPolicy:
    """The newest whole checkpoint of a run of stage `policy` or `adapt`.

    Args:
        workdir: of the run.
        seed: of the noise.
        temperature: factor of the noise, 0 .. 1; see `GearPolicy`.
        device_batch: observations that a device sees at a time.
        mesh: sizes of the axes, over this host's devices; by default rows over all of them.
        untrained: random parameters in place of the checkpoint's: a floor.

    Raises:
        DataError: a file of the run is missing or was changed, or no checkpoint can be used.
        ValueError: the run has no action expert, a temperature outside 0 .. 1, or no rows.
    """
    workdir = pathlib.Path(workdir)
    config = trained.read_config(workdir)
    normalizer = Normalizer.from_json(
        trained.read_text(workdir / "normalizer.json"), str(workdir / "normalizer.json")
    )
    model = make_model(config)
    _check_expert(model.cfg)
    sizes = mesh or {"replica": 1, "data": -1, "fsdp": 1, "tensor": 1}
    devices = sharding.make_mesh(sizes, jax.local_devices())
    if untrained:
        params, origin = trained.untrained(model, devices, seed), {"parameters": "random"}
    else:
        found = trained.load(workdir, config, model, devices)
        parts = found.meta["data"]["parts"]
        if parts["statistics"] != normalizer.digest():
            raise DataError(
                f"{workdir}/normalizer.json is {normalizer.digest()[:12]}, step {found.step} was "
                f"trained with {parts['statistics'][:12]}: not of this run"
            )
        params = lora.merge(found.params, model.lora)
        origin = {"parameters": found.key, "checkpoint": found.digest, "step": found.step}
    sequence = model.sequence_for_prompts()
    identity = {
        "name": str(config.stage),
        **origin,
        "statistics": normalizer.digest(),
        "spec": normalizer.spec.digest(),
        "config": hashlib.sha256(config.to_json(sort_keys=True).encode()).hexdigest(),
        "flow_steps": model.cfg.flow_steps,
        "temperature": temperature,
        "device_batch": device_batch,
        "image_size": config.model.image_size,
        "fit": config.data.fit,
        "jax": jax.__version__,
    }
    return GearPolicy(
        model.cfg, params, normalizer, open_tokenizer(config.model.tokenizer), sequence,
        image_size=config.model.image_size, fit=config.data.fit, mesh=devices, identity=identity,
        seed=seed, temperature=temperature, device_batch=device_batch,
    )  # fmt: skip
