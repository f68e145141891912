"""Data sets -> batches, through Grain; the whole state is one integer.

    sample number -> (data set, place) -> (episode, step) -> numbers and images -> batch

Everything up to the batch happens inside one `grain.MapDataset` over batch numbers, so the stream
is the same for any number of worker processes and hosts: step k of host h of H is batch k * H + h,
and the samples of a step do not depend on H. What a sample looks like depends on its number and the
seed alone. To resume is to begin at a sample number; `Stream.state` says which, with a digest of
all that the stream depends on. Measurements: data.md 4.
"""

import ctypes
import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import absl.flags
import grain
import numpy as np

from gear_jax.data import images as images_lib
from gear_jax.data.embodiments import embodiment_id
from gear_jax.data.faults import FaultError, FaultLog
from gear_jax.data.images import AugmentConfig, BadImageError
from gear_jax.data.latent_ids import LatentIds
from gear_jax.data.mask_overlay import overlay
from gear_jax.data.mixtures import Phase, Schedule
from gear_jax.data.normalizer import Normalizer
from gear_jax.data.prepared import Prepared
from gear_jax.data.record_packs import Packed
from gear_jax.data.record_pool import Pool
from gear_jax.data.record_state import read_state
from gear_jax.data.sequences import Question, RowMaker
from gear_jax.data.shared_buffers import Buffers, Handle, Reader
from gear_jax.data.tfrecord import DataError
from gear_jax.data.vision_language import make_sample
from gear_jax.data.windows import MIRRORED_VIEWS, clip_steps, empty_state, make_chunks, mirror_rows
from gear_jax.types import VIEWS, ActionSpec, Episode

_MASK = (1 << 64) - 1
_FIRST_CHECK = 2000  # samples before the fault budget is looked at


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """What a stream makes of its data sets.

    Attributes:
        batch_size: of all hosts together.
        num_samples: of the whole training; the curriculum's fractions are of this.
        image_size: side of a view, pixels.
        fit: how an image fills it; see `images.Fit`.
        augment: None for evaluation.
        random_side: put a single arm on either side by a fair coin; else it stays "right".
        seed: of order, sides and augmentation.
        bad_images: greatest fraction of images that may be unusable.
        content: "examples" of all views and the chunk, or "clips" of the head view for the latent
            action tokenizer.
        clip_frames: of a clip, at 5 Hz.
    """

    batch_size: int
    num_samples: int
    image_size: int = 448
    fit: Literal["pad", "stretch"] = "pad"
    augment: AugmentConfig | None = dataclasses.field(default_factory=AugmentConfig)
    random_side: bool = True
    seed: int = 42
    bad_images: float = 0.001
    content: Literal["examples", "clips"] = "examples"
    clip_frames: int = 6


class Stream(Iterator):
    """Batches of one host, for ever; a dictionary of arrays with a leading axis of b rows.

    Examples: images uint8[b, V, S, S, 3]; view_mask bool[b, V]; state, a `types.NormalizedState`;
    embodiment_id int32[b]; action float32[b, A, a] and action_mask; instruction, a list of b texts;
    questions, b lists of `sequences.Question`, none for robots and video; source int32[b], the data
    set; sample int64[b]; with `rows` also the token rows. Without a normalizer, action and state (a
    `types.State`) are in physical units.
    Clips of F frames: images uint8[b, F, S, S, 3]; clip_mask bool[b, F - 1]; source; sample.
    """

    def __init__(
        self,
        sets: Mapping[str, Prepared | Pool | Packed],
        phases: Sequence[Phase],
        config: StreamConfig,
        normalizer: Normalizer | None = None,
        *,
        state: Mapping[str, Any] | None = None,
        host: int = 0,
        num_hosts: int = 1,
        num_workers: int = 0,
        spec: ActionSpec | None = None,
        latents: Mapping[str, LatentIds] | None = None,
        rows: RowMaker | None = None,
    ):
        """Lay out the stream; workers start at the first batch.

        Args:
            sets: {name: data set}, in a fixed order.
            phases: shares of the sets; see `mixtures`.
            config: what to make.
            normalizer: None for physical units.
            state: where to go on, from `Stream.state`; None for the beginning.
            host: number of this host.
            num_hosts: that read the stream together; divides the batch size.
            num_workers: processes; 0 reads in this one.
            spec: of the chunk where there is no normalizer.
            latents: {name: latent action ids} of the sets that have them.
            rows: makes the token rows of examples; None leaves them out.

        Raises:
            DataError: `state` is of another stream; says what changed.
            ValueError: sizes that do not divide, empty sets, or weights that are no shares.
        """
        if config.batch_size % num_hosts or not 0 <= host < num_hosts:
            raise ValueError(
                f"batch size {config.batch_size}, host {host} of {num_hosts}: expected hosts that "
                "divide the batch"
            )
        empty = [name for name, one in sets.items() if not _size(one)]
        if empty:
            raise ValueError(f"data sets without a sample: {empty}")
        self.config, self.num_hosts = config, num_hosts
        spec = normalizer.spec if normalizer else spec or ActionSpec()
        latents = latents or {}
        if odd := set(latents) - set(sets):
            raise ValueError(f"latent ids of {sorted(odd)}: expected some of {list(sets)}")
        if len({(one.spec.shape, one.digest) for one in latents.values()}) > 1:
            raise DataError(f"latent ids of {list(latents)} are not all of one tokenizer")
        self._parts = _parts(sets, phases, config, normalizer, spec)
        self._parts |= {f"latent ids of {name!r}": one.digest for name, one in latents.items()}
        if rows is not None:
            said = dataclasses.asdict(rows.config)
            self._parts["token rows"] = _hash([rows.digest, said])
        self._samples = self._begin(state)
        self.log, self._reader = FaultLog(), Reader()
        schedule = Schedule(list(sets), phases, config.num_samples)
        count = config.batch_size // num_hosts
        load = _Load(sets, schedule, config, normalizer, spec, count, self._samples, latents, rows)
        batches = grain.MapDataset.range(sys.maxsize // 2)[host::num_hosts].map(load)
        if num_workers:
            absl.flags.FLAGS.mark_as_parsed()  # or Grain's workers refuse to start
            options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
            workers = grain.MultiprocessingOptions(
                num_workers=num_workers, per_worker_buffer_size=1
            )
            stream = batches.to_iter_dataset(options).mp_prefetch(workers, _die_with_parent)
        else:
            stream = batches.to_iter_dataset(
                grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
            )
        self._batches = iter(stream)

    def __next__(self) -> dict[str, Any]:
        """The next batch of this host.

        Raises:
            DataError: data that can no longer be trusted, or more bad images than the budget.
        """
        batch = self._reader.take(next(self._batches))
        self._samples += self.config.batch_size
        for code, sentence in batch.pop("faults"):
            self.log.count(code, sentence)
            self.log.dropped += 1
        self.log.seen += int(batch.pop("num_images"))
        if self.log.seen >= _FIRST_CHECK:
            self.log.check(self.config.bad_images, "images")
        return batch

    def state(self) -> dict[str, Any]:
        """Where the stream is: JSON, and the same on every host.

        "samples" is the number of samples that came before, of all hosts; "digest" is of all that
        the stream depends on, and "parts" holds its components, to say what changed.
        """
        return {"samples": self._samples, "digest": _hash(self._parts), "parts": self._parts}

    def _begin(self, state: Mapping[str, Any] | None) -> int:
        if state is None:
            return 0
        if state["digest"] != _hash(self._parts):
            changed = [
                name
                for name in sorted({*state["parts"], *self._parts})
                if state["parts"].get(name) != self._parts.get(name)
            ]
            raise DataError(
                f"the data state at sample {state['samples']} is of another stream: changed "
                f"{', '.join(changed)}; go on with what it was made with, or begin anew"
            )
        return int(state["samples"])

    def close(self) -> None:
        """Stop the workers."""
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()
        self._reader.close()


def _size(one: Prepared | Pool | Packed) -> int:
    return one.num_steps if isinstance(one, Prepared) else len(one)


def _parts(sets, phases, config, normalizer, spec) -> dict[str, Any]:
    """Everything that the stream depends on, by name; batch size, hosts and workers are not."""
    config = dataclasses.asdict(config)
    del config["batch_size"], config["bad_images"]
    return {
        **{f"data set {name!r}": one.digest for name, one in sets.items()},
        "list of data sets": list(sets),
        "weights": _hash([[p.start, sorted(p.weights.items())] for p in phases]),
        "statistics": normalizer.digest() if normalizer else None,
        "action spec": spec.digest(),
        **{key: json.loads(json.dumps(value)) for key, value in config.items()},
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _die_with_parent(worker: int, count: int) -> None:
    """A killed trainer must not leave its workers behind (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # killed before that was said
        os._exit(1)


class _Load(grain.transforms.Map):
    """Batch number -> batch. Runs in worker processes."""

    def __init__(self, sets, schedule, config, normalizer, spec, rows, first, latents, row_maker):
        self.sets, self.schedule, self.config = list(sets.values()), schedule, config
        self.normalizer, self.spec, self.rows, self.first = normalizer, spec, rows, first
        self.row_maker = row_maker
        self.names, self.buffers = list(sets), Buffers()
        self.latents = [latents.get(name) for name in sets]
        self.orders = [
            grain.MapDataset.range(_size(one)).seed(_seed(config.seed, name)).shuffle().repeat()
            for name, one in sets.items()
        ]

    def map(self, element: int) -> dict[str, Any] | Handle:
        begin = self.first + element * self.rows
        samples = range(begin, begin + self.rows)
        places = [self.schedule.locate(sample) for sample in samples]
        batch: dict[str, Any] = {
            "sample": np.arange(begin, begin + self.rows, dtype=np.int64),
            "source": np.array([source for source, _ in places], np.int32),
            "faults": [],
            "num_images": np.int64(0),
        }
        chosen = [int(self.orders[source][place]) for source, place in places]
        clips = self.config.content == "clips"
        fill = self._clips if clips else self._examples
        return self.buffers.pack(fill(batch, chosen))

    # Examples

    def _examples(self, batch, chosen):
        rows, size = self.rows, self.config.image_size
        batch["images"] = self.buffers.images((rows, len(VIEWS), size, size, 3))
        batch["view_mask"] = np.zeros((rows, len(VIEWS)), bool)
        batch["instruction"], batch["questions"] = [""] * rows, [[] for _ in range(rows)]
        batch["embodiment_id"] = np.zeros(rows, np.int32)
        shape = (rows, self.spec.chunk_len, self.spec.action_dim)
        action, mask = np.zeros(shape, np.float32), np.zeros(shape, bool)
        state = empty_state((rows,))
        if (shape := self._latent_shape()) is not None:
            batch["latent_ids"] = np.zeros((rows, *shape), np.int32)
            batch["latent_mask"] = np.zeros((rows, shape[0]), bool)
        windows = []  # row, episode, step
        for row, (source, index) in enumerate(zip(batch["source"], chosen, strict=True)):
            one = self.sets[source]
            if isinstance(one, Pool | Packed):
                self._vision_language(batch, row, one, index, state)
                continue
            number, step = one.locate(index)
            windows.append((row, one.episode(number), step))
            if (ids := self.latents[source]) is not None:
                found = ids.read(one.row_of(number, step))
                batch["latent_ids"][row], batch["latent_mask"][row] = found
        if windows:
            which = [row for row, _, _ in windows]
            made = make_chunks([e for _, e, _ in windows], [s for _, _, s in windows], self.spec)
            action[which], mask[which] = made[:2]
            for key, value in made[2].items():
                state[key][which] = value
        moved = []
        for row, episode, step in windows:
            if (
                self.config.random_side
                and state["arm_mask"][row].sum() == 1
                and _coin(self.config.seed, int(batch["sample"][row]))
            ):
                moved.append(row)
            batch["instruction"][row] = episode.instruction
            batch["embodiment_id"][row] = embodiment_id(episode.embodiment)
            self._views(batch, row, episode, step, row in moved)
        mirror_rows(action, mask, state, moved)
        batch |= self._normalized(action, mask, state, batch["embodiment_id"])
        return batch if self.row_maker is None else self.row_maker(batch)

    def _latent_shape(self):
        """Transitions and codes, or None where nobody speaks of them."""
        if (found := next((one for one in self.latents if one is not None), None)) is not None:
            return found.spec.shape
        rows = self.row_maker
        return None if rows is None else (rows.config.transitions, rows.config.codes)

    def _rng(self, sample):
        """What a sample draws from: a function of the seed and its number."""
        return np.random.Generator(np.random.Philox(key=[self.config.seed, int(sample)]))

    def _views(self, batch, row, episode: Episode, step, mirrored):
        augment = self.config.augment
        rng = self._rng(batch["sample"][row]) if augment else None
        for place, view in enumerate(VIEWS):
            augmentation = images_lib.draw(augment, rng) if augment and rng else None
            slot = VIEWS.index(MIRRORED_VIEWS.get(view, view)) if mirrored else place
            if view not in episode.views:
                batch["images"][row, slot] = 0
                continue
            batch["num_images"] += 1
            try:
                self._fill(batch["images"][row, slot], episode.views[view][step], augmentation)
            except (BadImageError, FaultError) as error:
                where = f"{episode.dataset}, {episode.episode_id}, step {step}, view {view!r}"
                batch["faults"].append((error.code, f"{where}: {error} [{error.code}]"))
                batch["images"][row, slot] = 0
                continue
            batch["view_mask"][row, slot] = True

    def _fill(self, slot, image, augmentation):
        """Decode, crop and resize one image into its place in the batch."""
        image = images_lib.decode(image)
        if augmentation is not None:
            image = images_lib.crop(image, augmentation)
        fit = images_lib.fit_into(slot, image, self.config.fit)
        if augmentation is not None:
            top, left, height, width = fit.box
            part = slot[top : top + height, left : left + width]
            images_lib.change_colours(part, augmentation)
        return fit

    def _vision_language(self, batch, row, pool, index, state):
        """Questions of one row; their images take the views' places in order.

        No crop: the answer's coordinates are those of the whole image.
        """
        batch["images"][row] = 0
        rng = self._rng(batch["sample"][row])
        for number in pool.pack(index):
            record = pool.record(number)
            pictures = self._pictures(batch, pool, number, record)
            if pictures is None:
                continue  # without its images the record asks nothing
            fits = [images_lib.Fit(*picture.shape[:2], self.config.image_size, self.config.fit)
                    for picture in pictures]  # fmt: skip
            sample = make_sample(record, fits, rng)
            if sample.overlay is not None:
                pictures[0] = overlay(pictures[0], *sample.overlay)
            first, views = int(batch["view_mask"][row].sum()), record.get("views")
            slots = tuple(range(first, first + len(pictures)))
            if views is not None:  # the pack is this record alone
                slots = tuple(VIEWS.index(view) for view in views)
            if "state" in record:
                self._state(batch, row, record["state"], state, pool.where(number))
            for slot, picture in zip(slots, pictures, strict=True):
                images_lib.fit_into(batch["images"][row, slot], picture, self.config.fit)
                batch["view_mask"][row, slot] = True
            question = Question(sample.prompt, sample.answer, slots, robot=views is not None)
            batch["questions"][row].append(question)

    def _state(self, batch, row, told, state, where):
        """What a record says of its robot, beside the states of windows."""
        robot = told["embodiment"]
        if self.normalizer is not None and robot not in self.normalizer.states:
            raise DataError(
                f"{where}: field 'state' is of {robot!r}: expected a robot of the data sets, whose "
                f"statistics are known: {sorted(self.normalizer.states)}"
            )
        batch["embodiment_id"][row] = embodiment_id(robot)
        for key, value in read_state(told).items():
            state[key][row] = value

    def _pictures(self, batch, pool, number, record):
        """Decoded images of a record, or None where one is bad."""
        paths = pool.image_paths(record)
        if len(paths) > len(VIEWS):
            raise DataError(f"{pool.where(number)}: {len(paths)} images, at most {len(VIEWS)}")
        pictures = []
        for path in paths:
            batch["num_images"] += 1
            try:
                pictures.append(images_lib.decode(path.read_bytes()).copy())
            except (OSError, BadImageError) as error:
                code = error.code if isinstance(error, BadImageError) else "bad_image"
                batch["faults"].append((code, f"{path}: {error} [{code}]"))
                return None
        return pictures

    def _normalized(self, action, mask, state, embodiments):
        normal = self.normalizer
        if normal is None:
            return {"action": action, "action_mask": mask, "state": state}
        return {
            "action": normal.normalize_action(action, mask),
            "action_mask": mask,
            "state": normal.normalize_state(state, embodiments),
        }

    # Clips

    def _clips(self, batch, chosen):
        size, frames = self.config.image_size, self.config.clip_frames
        batch["images"] = self.buffers.images((self.rows, frames, size, size, 3))
        batch["clip_mask"] = np.zeros((self.rows, frames - 1), bool)
        for row, (source, index) in enumerate(zip(batch["source"], chosen, strict=True)):
            one = self.sets[source]
            if not isinstance(one, Prepared):
                raise DataError(f"data set {self.names[source]!r} has no video to take clips from")
            number, step = one.locate(index)
            episode = one.episode(number)
            batch["images"][row] = 0
            if "head" not in episode.views:
                continue
            steps, inside = clip_steps(episode.num_steps, episode.fps, step, num_frames=frames)
            batch["clip_mask"][row] = inside
            for place, shown in enumerate(steps):
                batch["num_images"] += 1
                try:
                    image = episode.views["head"][int(shown)]
                    self._fill(batch["images"][row, place], image, None)
                except (BadImageError, FaultError) as error:
                    where = f"{episode.dataset}, {episode.episode_id}, step {shown}, view 'head'"
                    batch["faults"].append((error.code, f"{where}: {error} [{error.code}]"))
                    batch["clip_mask"][row] = False
        return batch


def _seed(seed: int, name: str) -> int:
    """A seed of its own for each data set, whatever its place in the list."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little") & 0x7FFFFFFF


def _coin(seed: int, sample: int) -> bool:
    """A fair coin for each sample (splitmix64)."""
    x = (seed * 0xD1342543DE82EF95 + sample * 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK
    return bool((x ^ x >> 31) & 1)
