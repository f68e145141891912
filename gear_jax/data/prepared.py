"""A data set made ready for training: its numbers in canonical form, its images where they lie.

`prepare` reads every episode's numbers once, standardises and checks them, and writes about 70
bytes a step and arm beside nothing else; images stay in the untouched source. A sample then costs
a slice of a memory-mapped array and the images of one step, whatever the format.

On disk (whole or not at all):

    manifest.json      version, row, source's fingerprint, totals, faults
    episodes.npy       EPISODE[E]
    tracks.bin         float32[sum of steps, R, 17]: position 3, quaternion 4, joints 8, openings 2
    texts.bin          UTF-8: episode_id and instruction of each episode
"""

import concurrent.futures
import copy
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gear_jax.data.faults import FaultError, FaultLog
from gear_jax.data.rlds_features import load_json
from gear_jax.data.rows import Row, row_from_json, row_to_json
from gear_jax.data.sources.base import Source
from gear_jax.data.standardize import standard_episode
from gear_jax.data.tfrecord import DataError
from gear_jax.types import ARMS, MAX_JOINTS, VIEWS, Arm, Episode

VERSION = 1
EPISODE = np.dtype(
    [
        ("source", "<u4"),  # number in the source
        ("steps", "<u4"),
        ("start", "<u8"),  # row of tracks.bin
        ("text", "<u8"),  # byte of texts.bin
        ("id_length", "<u4"),
        ("text_length", "<u4"),
        ("fps", "<f4"),
        ("views", "u1"),  # bit i: has VIEWS[i]
        ("fields", "u1", (len(ARMS),)),  # bit i: has _FIELDS[i]
        ("joints", "u1", (len(ARMS),)),
        ("held", "?", (len(ARMS),)),
    ]
)
_FIELDS = {
    "ee_pos": slice(0, 3),
    "ee_quat": slice(3, 7),
    "joint_pos": slice(7, 7 + MAX_JOINTS),
    "grip_open": slice(15, 16),
    "grip_cmd": slice(16, 17),
}
_WIDTH = 17
_CHUNK = 32  # episodes handed to a worker at a time


def prepare(
    source: Source,
    row: Row,
    target: str | os.PathLike,
    *,
    budget: float = 0.01,
    num_workers: int = 1,
    report: Callable[[int], None] = lambda episodes: None,
) -> pathlib.Path:
    """Standardise and check every episode's numbers once.

    Args:
        source: where the data lie.
        row: what its keys mean.
        target: directory to make; one that is there is replaced.
        budget: greatest fraction of episodes that may be dropped for damage.
        num_workers: processes.
        report: called with the number of episodes done so far.

    Returns:
        The directory.

    Raises:
        DataError: a fatal fault, a view that the data set does not know, more dropped than the
            budget, or nothing left; nothing is written.
    """
    known = source.keys()
    for view, how in row.views.items():
        if how.key not in known and not how.key.endswith(".mp4"):
            raise DataError(
                f"row {row.name!r}: view {view!r}: key {how.key!r} is none of the data set's: "
                f"{sorted(known)}"
            )
    target = pathlib.Path(target)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        log, episodes, steps, text_bytes = FaultLog(), [], 0, 0
        with (
            (partial / "tracks.bin").open("wb") as tracks,
            (partial / "texts.bin").open("wb") as texts,
        ):
            for part in _parts(source, row, num_workers):
                log.merge(part.log)
                part.episodes["start"] += steps
                part.episodes["text"] += text_bytes
                tracks.write(part.tracks.tobytes())
                texts.write(part.texts)
                steps += len(part.tracks)
                text_bytes += len(part.texts)
                episodes.append(part.episodes)
                report(log.seen)
        log.check(budget, row.name)
        table = np.concatenate([np.zeros(0, EPISODE), *episodes])
        if not len(table):
            counts = dict(log.counts)
            raise DataError(f"{row.name}: no episode is left of {len(source)}: {counts}")
        np.save(partial / "episodes.npy", table)
        manifest = {
            "version": VERSION,
            "row": row_to_json(row),
            "source": source.fingerprint(),
            "episodes": len(table),
            "steps": steps,
            "tracks_sha256": _sha256(partial / "tracks.bin"),
            "faults": log.to_json(),
        }
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclasses.dataclass
class _Part:
    """Some episodes, ready to be appended."""

    episodes: np.ndarray
    tracks: np.ndarray
    texts: bytes
    log: FaultLog


def _parts(source: Source, row: Row, num_workers: int) -> Iterator[_Part]:
    ranges = [range(i, min(i + _CHUNK, len(source))) for i in range(0, len(source), _CHUNK)]
    work = functools.partial(_prepare_part, source, row)
    if num_workers <= 1:
        yield from map(work, ranges)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        yield from pool.map(work, ranges)


def _prepare_part(source: Source, row: Row, numbers: range) -> _Part:
    log, table, tracks, texts, size = FaultLog(), [], [], [], 0
    for number in numbers:
        log.seen += 1
        try:
            episode = standard_episode(source.episode(number), row, log)
        except FaultError as fault:
            log.drop(fault)
            continue
        entry, track = np.zeros((), EPISODE), np.zeros((episode.num_steps, len(row.arms), _WIDTH))
        for place, name in enumerate(_arm_names(row)):
            arm, index = episode.arms[name], ARMS.index(name)
            for bit, (field, columns) in enumerate(_FIELDS.items()):
                values = getattr(arm, field)
                if values is not None:
                    entry["fields"][index] |= 1 << bit
                    values = values.reshape(len(values), -1)
                    track[:, place, columns.start : columns.start + values.shape[1]] = values
            if arm.joint_pos is not None:
                entry["joints"][index] = arm.joint_pos.shape[1]
            entry["held"][index] = arm.grip_held
        for bit, view in enumerate(VIEWS):
            entry["views"] |= (view in episode.views) << bit
        name, text = episode.episode_id.encode("utf-8", "replace"), episode.instruction.encode()
        entry["source"], entry["steps"], entry["fps"] = number, episode.num_steps, episode.fps
        entry["start"], entry["text"] = sum(map(len, tracks)), size
        entry["id_length"], entry["text_length"] = len(name), len(text)
        size += len(name) + len(text)
        table.append(entry)
        tracks.append(track.astype(np.float32))
        texts += [name, text]
    empty = np.zeros((0, len(row.arms), _WIDTH), np.float32)
    return _Part(np.array(table, EPISODE), np.concatenate([empty, *tracks]), b"".join(texts), log)


def _arm_names(row: Row) -> list[str]:
    return [arm for arm in ARMS if arm in row.arms]


class Prepared:
    """Episodes of a prepared data set; cheap to hand to worker processes."""

    def __init__(self, directory: str | os.PathLike, source: Source):
        """Open what `prepare` made.

        Raises:
            DataError: not there, of another version, or made from other files than `source` has.
        """
        self.directory, self.source = pathlib.Path(directory), source
        manifest = load_json(self.directory / "manifest.json")
        if manifest.get("version") != VERSION:
            raise DataError(f"{self.directory}: made by another version; prepare it again")
        if manifest["source"] != source.fingerprint():
            raise DataError(f"{self.directory}: the data have changed; prepare them again")
        self.row = row_from_json(manifest["row"])
        self.num_episodes, self.num_steps = manifest["episodes"], manifest["steps"]
        self.faults = FaultLog.from_json(manifest["faults"])
        self.digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
        self.whole_digest = self.digest  # of the data set that a part was taken from
        self._shape = (self.num_steps, len(self.row.arms), _WIDTH)
        self._chosen: np.ndarray | None = None
        expected = 4 * int(np.prod(self._shape))
        if (self.directory / "tracks.bin").stat().st_size != expected:
            raise DataError(f"{self.directory}/tracks.bin: expected {expected} bytes")
        self._open()

    def _open(self) -> None:
        self._table = np.load(self.directory / "episodes.npy", mmap_mode="r").view(np.ndarray)
        path = self.directory / "tracks.bin"
        empty = not int(np.prod(self._shape))  # an empty file cannot be mapped
        self._tracks = (
            np.zeros(self._shape, np.float32)
            if empty
            else np.memmap(path, "<f4", "r", shape=self._shape).view(np.ndarray)
        )
        self._texts = np.memmap(self.directory / "texts.bin", np.uint8, "r").view(np.ndarray)
        if self._chosen is not None:
            self._table = self._table[self._chosen]
        ends = np.cumsum(self._table["steps"], dtype=np.uint64)
        self._starts = np.concatenate([np.zeros(1, np.uint64), ends[:-1]])

    def only(self, numbers: Sequence[int] | np.ndarray) -> "Prepared":
        """The same data set with some of its episodes, renumbered from 0.

        Raises:
            ValueError: no episode.
        """
        if not len(numbers):
            raise ValueError(f"{self.directory}: no episode is chosen")
        part = copy.copy(self)
        part._chosen = np.arange(len(self)) if self._chosen is None else self._chosen
        part._chosen = part._chosen[np.asarray(numbers)]
        part._open()
        part.num_episodes, part.num_steps = len(numbers), int(part._table["steps"].sum())
        text = f"{self.digest} {part._chosen.tolist()}"
        part.digest = hashlib.sha256(text.encode()).hexdigest()
        return part

    def __getstate__(self):
        opened = {"_table", "_tracks", "_texts", "_starts"}
        return {key: value for key, value in self.__dict__.items() if key not in opened}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        """Number of episodes."""
        return self.num_episodes

    def locate(self, step: int) -> tuple[int, int]:
        """(episode, step within it) of a step counted over all episodes.

        Raises:
            IndexError: no such step.
        """
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step}: {self.directory} has {self.num_steps}")
        episode = int(np.searchsorted(self._starts, np.uint64(step), side="right")) - 1
        return episode, step - int(self._starts[episode])

    def row_of(self, number: int, step: int) -> int:
        """A step's number in the whole data set, from which a part may have been taken."""
        return int(self._table["start"][number]) + step

    def episode(self, number: int, *, images: bool = True) -> Episode:
        """One episode; tracks are slices of the mapped file, images are read on access."""
        entry = self._table[number]
        steps, start = int(entry["steps"]), int(entry["start"])
        arms = {}
        for place, name in enumerate(_arm_names(self.row)):
            index, tracks = ARMS.index(name), self._tracks[start : start + steps, place]
            fields: dict[str, Any] = {}
            for bit, (field, columns) in enumerate(_FIELDS.items()):
                if entry["fields"][index] >> bit & 1:
                    values = tracks[:, columns]
                    fields[field] = values[:, 0] if field.startswith("grip") else values
            if "joint_pos" in fields:
                fields["joint_pos"] = fields["joint_pos"][:, : entry["joints"][index]]
            arms[name] = Arm(**fields, grip_held=bool(entry["held"][index]))
        text, split = int(entry["text"]), int(entry["id_length"])
        said = self._texts[text : text + split + int(entry["text_length"])].tobytes()
        return Episode(
            dataset=self.row.name,
            episode_id=said[:split].decode(),
            embodiment=self.row.embodiment,
            num_steps=steps,
            fps=round(float(entry["fps"]), 4),
            instruction=said[split:].decode(),
            arms=arms,
            views=self._views(int(entry["source"]), int(entry["views"])) if images else {},
        )

    def _views(self, number: int, bits: int) -> Mapping[str, Any]:
        raw, row = self.source.episode(number), self.row
        return {
            view: row.views[view].open(raw, row.skip_first)
            for bit, view in enumerate(VIEWS)
            if bits >> bit & 1
        }


def hold_out(prepared: Prepared, fraction: float) -> tuple[Prepared, Prepared]:
    """The data set without the episodes held out, and these; an episode's id alone decides.

    Parts of one recording, called <recording>#<n>, stay together: they show the same scene.

    Raises:
        ValueError: one of the two would be empty.
    """
    held = np.array(
        [
            _fraction(prepared.episode(number, images=False).episode_id.partition("#")[0])
            < fraction
            for number in range(len(prepared))
        ]
    )
    if held.all() or not held.any():
        raise ValueError(
            f"{prepared.directory}: holding out {fraction:g} of {len(prepared)} episodes leaves "
            f"{np.count_nonzero(~held)} and {np.count_nonzero(held)}: expected some of both"
        )
    return prepared.only(np.flatnonzero(~held)), prepared.only(np.flatnonzero(held))


def _fraction(text: str) -> float:
    """A number in 0 .. 1 that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64


class _NoImages:
    """A source that is not there: its numbers are known, its images are not."""

    def __init__(self, fingerprint: str):
        self._fingerprint = fingerprint

    def __len__(self) -> int:
        return 0

    def episode(self, number: int) -> Any:
        raise DataError("only the prepared numbers are open, not the recordings")

    def keys(self) -> Mapping[str, str]:
        return {}

    def fingerprint(self) -> str:
        return self._fingerprint


def stored_episodes(directory: str | os.PathLike) -> list[Episode]:
    """Episodes of a prepared data set without their images; the recordings need not be there.

    Raises:
        DataError: not there, or of another version.
    """
    manifest = load_json(pathlib.Path(directory) / "manifest.json")
    prepared = Prepared(directory, _NoImages(manifest.get("source", "")))
    return [prepared.episode(number, images=False) for number in range(len(prepared))]
