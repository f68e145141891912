"""Latent action ids of whole data sets: prepared episodes -> tokenizer -> int8 beside the data.

Every step of every episode is the start of a clip. A frame is decoded once, whatever the number of
clips that show it. Parts are fixed ranges of steps: any process may make any part, and a part made
twice is the same to the bit.
"""

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gear_jax.data import images as images_lib
from gear_jax.data.faults import FaultError, FaultLog
from gear_jax.data.images import BadImageError
from gear_jax.data.latent_ids import NONE, LatentSpec, LatentWriter
from gear_jax.data.prepared import Prepared
from gear_jax.data.windows import clip_steps
from gear_jax.systems import latents
from gear_jax.towers.latent_action import LatentActionConfig
from gear_jax.train import sharding


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A trained tokenizer, ready to encode batches of one size on a mesh."""

    cfg: LatentActionConfig
    params: Any
    codebook: Any
    digest: str
    batch_size: int
    mesh: jax.sharding.Mesh

    @functools.cached_property
    def _run(self):
        def run(params, codebook, frames):
            frames = frames.astype(jnp.float32) / 127.5 - 1
            return latents.encode(params, self.cfg, codebook, frames).astype(jnp.int8)

        return jax.jit(run)

    def encode(self, frames: np.ndarray) -> jax.Array:
        """Ids int8[B, T, C] of clips uint8[B, F, S, S, 3], B being the batch size; not awaited."""
        rows = sharding.batch_sharding(self.mesh)
        return self._run(self.params, self.codebook, jax.device_put(frames, rows))


@dataclasses.dataclass
class Extracted:
    """What extraction did, and where its time went, seconds of this thread."""

    clips: int = 0
    decode: float = 0.0
    encode: float = 0.0
    log: FaultLog = dataclasses.field(default_factory=FaultLog)


def spec_of(tokenizer: Tokenizer, prepared: Prepared, part_steps: int = 4096) -> LatentSpec:
    """What the ids of a data set will be."""
    cfg = tokenizer.cfg
    return LatentSpec(
        data=prepared.whole_digest,
        tokenizer=tokenizer.digest,
        steps=prepared.num_steps,
        transitions=cfg.num_transitions,
        codes=cfg.codes_per_transition,
        vocabulary=cfg.num_groups * cfg.codes_per_group,
        part_steps=part_steps,
    )


def extract(
    tokenizer: Tokenizer,
    prepared: Prepared,
    writer: LatentWriter,
    *,
    host: int = 0,
    num_hosts: int = 1,
    num_threads: int = 4,
    budget: float = 0.001,
    report: Callable[[int], None] = lambda clips: None,
) -> Extracted:
    """Make the parts of this host that are missing, and join all parts when it was the last.

    Args:
        tokenizer: that makes the ids.
        prepared: a whole data set.
        writer: made with `spec_of`.
        host: number of this process among those that share the work; each runs by itself.
        num_hosts: how many share it.
        num_threads: that decode images.
        budget: greatest fraction of images that may be unusable; their clips get no ids.
        report: called with the clips done so far.

    Raises:
        DataError: more bad images than the budget.
    """
    done = Extracted()
    with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
        for part in writer.missing():
            if writer.spec.parts.index(part) % num_hosts != host:
                continue
            ids = np.full((len(part), *writer.spec.shape), NONE, np.int8)
            waiting = None  # encoded while the next batch is decoded
            for batch in _batches(tokenizer, prepared, part, pool, done):
                begun = time.perf_counter()
                rows, mask, frames = batch
                encoded = tokenizer.encode(frames)
                if waiting is not None:
                    _store(ids, *waiting)
                waiting = rows, mask, encoded
                done.encode += time.perf_counter() - begun
            begun = time.perf_counter()
            if waiting is not None:
                _store(ids, *waiting)
            done.encode += time.perf_counter() - begun
            done.log.check(budget, f"images of {prepared.row.name}")
            writer.write(part, ids)
            done.clips += len(part)
            report(done.clips)
    writer.finish()
    return done


def _store(ids, rows, mask, encoded):
    encoded = np.asarray(encoded)[: len(rows)]
    ids[rows] = np.where(mask[..., None], encoded, NONE)


def _batches(tokenizer, prepared, part, pool, done) -> Iterator[tuple]:
    """(rows within the part, mask bool[n, T], frames uint8[B, F, S, S, 3]) of a part's clips."""
    cfg, size = tokenizer.cfg, tokenizer.batch_size
    shape = (size, cfg.num_frames, cfg.image_size, cfg.image_size, 3)
    frames, rows, masks = np.zeros(shape, np.uint8), [], []
    for clip in _clips(cfg, prepared, part, pool, done, size):
        row, mask, pictures = clip
        frames[len(rows)] = pictures
        rows.append(row)
        masks.append(mask)
        if len(rows) == size:
            yield np.array(rows), np.stack(masks), frames
            frames, rows, masks = np.zeros(shape, np.uint8), [], []
    if rows:
        yield np.array(rows), np.stack(masks), frames


def _clips(cfg, prepared, part, pool, done, ahead) -> Iterator[tuple]:
    """(row, mask bool[T], pictures) of each step of a part that has a transition to encode."""
    first, within = prepared.locate(part.start)
    row = 0
    for number in range(first, len(prepared)):
        episode = prepared.episode(number)
        begin = within if number == first else 0
        end = min(episode.num_steps, begin + len(part) - row)
        if "head" in episode.views:
            yield from _episode(cfg, episode, range(begin, end), row - begin, pool, done, ahead)
        row += end - begin
        if row == len(part):
            return


def _episode(cfg, episode, steps, shift, pool, done, ahead):
    """Clips of some steps of an episode; frames are kept while a later clip shows them."""
    pictures: dict[int, np.ndarray | None] = {}
    for begin in range(steps.start, steps.stop, ahead):
        chosen = range(begin, min(begin + ahead, steps.stop))
        shown, inside = zip(
            *(
                clip_steps(episode.num_steps, episode.fps, step, num_frames=cfg.num_frames)
                for step in chosen
            ),
            strict=True,
        )
        begun = time.perf_counter()
        needed = sorted(set(np.concatenate(shown).tolist()))
        pictures = {step: pictures[step] for step in needed if step in pictures}
        fresh = [step for step in needed if step not in pictures]
        load = functools.partial(load_frame, cfg.image_size, episode)
        for step, (picture, fault) in zip(fresh, pool.map(load, fresh), strict=True):
            pictures[step] = picture
            done.log.seen += 1
            if fault is not None:
                done.log.count(*fault)
                done.log.dropped += 1
        done.decode += time.perf_counter() - begun
        for step, frames, mask in zip(chosen, shown, inside, strict=True):
            if cfg.mode == "lapa":
                mask = mask.all(keepdims=True)
            if not mask.any() or any(pictures[int(i)] is None for i in frames):
                continue
            yield shift + step, mask, np.stack([pictures[int(i)] for i in frames])


def load_frame(size, episode, step):
    """One head image as the tokenizer sees it.

    Returns:
        picture uint8[size, size, 3], None where it is damaged; (code, sentence) of the fault.
    """
    picture = np.zeros((size, size, 3), np.uint8)
    try:
        images_lib.fit_into(picture, images_lib.decode(episode.views["head"][step]), "pad")
    except (BadImageError, FaultError) as error:
        where = f"{episode.dataset}, {episode.episode_id}, step {step}, view 'head'"
        return None, (error.code, f"{where}: {error} [{error.code}]")
    return picture, None
