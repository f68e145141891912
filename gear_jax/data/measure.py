"""Prepared data sets -> statistics of their chunks and states; no image byte is read."""

import dataclasses
import os
import pathlib
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, Self, cast

import numpy as np

from gear_jax.data.accumulator import Accumulator
from gear_jax.data.prepared import Prepared
from gear_jax.data.statistics import Statistics
from gear_jax.data.tfrecord import DataError
from gear_jax.data.windows import make_chunks, mirror_rows
from gear_jax.types import ARMS, MAX_JOINTS, ActionSpec

_STATES = {
    "ee_pos": (len(ARMS), 3),
    "joint_pos": (len(ARMS), MAX_JOINTS),
    "grip_open": (len(ARMS),),
}
_BLOCK = 2048  # windows at a time


@dataclasses.dataclass
class Measured:
    """What was counted over some data sets; merges exactly, in any order.

    Attributes:
        spec: of the chunks.
        sources: {data set: its digest}.
        embodiments: seen.
        rates: steps per second, seen.
        num_episodes: counted.
        num_steps: counted.
        action: per horizon step and dim [A, a].
        state: by part.
    """

    spec: ActionSpec
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    embodiments: set[str] = dataclasses.field(default_factory=set)
    rates: set[float] = dataclasses.field(default_factory=set)
    num_episodes: int = 0
    num_steps: int = 0
    action: Accumulator = dataclasses.field(init=False)
    state: dict[str, Accumulator] = dataclasses.field(init=False)

    def __post_init__(self):
        """Nothing is counted yet."""
        self.action = Accumulator((self.spec.chunk_len, self.spec.action_dim))
        self.state = {part: Accumulator(shape) for part, shape in _STATES.items()}

    def merge(self, other: Self) -> None:
        """Count in what another process or host has counted.

        Raises:
            DataError: another action spec.
        """
        if self.spec != other.spec:
            raise DataError("statistics of different action specs do not merge")
        self.sources |= other.sources
        self.embodiments |= other.embodiments
        self.rates |= other.rates
        self.num_episodes += other.num_episodes
        self.num_steps += other.num_steps
        self.action.merge(other.action)
        for part, accumulator in self.state.items():
            accumulator.merge(other.state[part])

    def statistics(self, name: str) -> Statistics:
        """The statistics of all that was counted."""
        return Statistics(
            name=name,
            spec_digest=self.spec.digest(),
            sources=dict(sorted(self.sources.items())),
            fps=next(iter(self.rates)) if len(self.rates) == 1 else None,
            num_episodes=self.num_episodes,
            num_steps=self.num_steps,
            action=self.action.summary(),
            action_all=self.action.pooled().summary(),
            state={part: one.summary() for part, one in self.state.items()},
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write everything to an .npz, for `load` on the host that merges; whole or not at all."""
        path = pathlib.Path(path)
        arrays = {"action." + k: v for k, v in self.action.to_arrays().items()}
        for part, one in self.state.items():
            arrays |= {f"{part}.{k}": v for k, v in one.to_arrays().items()}
        told = {
            "sources": np.array(sorted(self.sources.items())),
            "embodiments": np.array(sorted(self.embodiments)),
            "rates": np.array(sorted(self.rates)),
            "counts": np.array([self.num_episodes, self.num_steps]),
            "spec": np.array(self.spec.digest()),
        }
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("wb") as file:
            np.savez_compressed(file, **cast(Any, arrays | told))
        partial.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike, spec: ActionSpec) -> Self:
        """The inverse of `save`.

        Raises:
            DataError: unreadable, or of another action spec.
        """
        try:
            with pathlib.Path(path).open("rb") as file, np.load(file) as stored:
                if str(stored["spec"]) != spec.digest():
                    raise DataError(f"{path}: counted for another action spec")
                made = cls(spec)
                made.sources = dict(stored["sources"].tolist())
                made.embodiments = set(stored["embodiments"].tolist())
                made.rates = set(stored["rates"].tolist())
                made.num_episodes, made.num_steps = stored["counts"].tolist()
                for part in ("action", *_STATES):
                    arrays = {k.removeprefix(part + "."): stored[k] for k in stored.files
                              if k.startswith(part + ".")}  # fmt: skip
                    one = Accumulator.from_arrays(arrays)
                    if part == "action":
                        made.action = one
                    else:
                        made.state[part] = one
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: not what `Measured.save` wrote: {error}") from error
        return made


def measure(
    prepared: Prepared,
    spec: ActionSpec,
    *,
    every: int = 1,
    episodes: Sequence[int] | None = None,
    report: Callable[[int], None] = lambda steps: None,
) -> Measured:
    """Count the chunks and states of a data set.

    A single arm counts on both sides, since training puts it on either (systems.md 2.1).

    Args:
        prepared: the data set.
        spec: of the chunks.
        every: take each n-th step of an episode.
        episodes: which, for a part of the work; all by default.
        report: called with the number of steps looked at.
    """
    made = Measured(spec, {prepared.row.name: prepared.digest}, {prepared.row.embodiment})
    block, looked = [], 0
    for number in range(len(prepared)) if episodes is None else episodes:
        episode = prepared.episode(number)
        made.rates.add(episode.fps)
        made.num_episodes += 1
        looked += episode.num_steps
        block += [(episode, step) for step in range(0, episode.num_steps, every)]
        while len(block) >= _BLOCK:
            _count(made, block[:_BLOCK])
            block = block[_BLOCK:]
            report(looked)
    if block:
        _count(made, block)
    report(looked)
    return made


def _count(made, places):
    action, mask, state = make_chunks([e for e, _ in places], [s for _, s in places], made.spec)
    made.num_steps += len(places)
    single = np.flatnonzero(state["arm_mask"].sum(axis=1) == 1)
    for rows in (np.arange(len(places)), single):
        if not len(rows):
            continue
        if rows is single:
            mirror_rows(action, mask, state, single)
        made.action.add(action[rows], mask[rows])
        masks = {"ee_pos": "ee_mask", "joint_pos": "joint_mask", "grip_open": "grip_mask"}
        values = {**state, "ee_pos": state["ee_pose"][..., :3, 3]}
        for part, accumulator in made.state.items():
            value, known = values[part][rows], state[masks[part]][rows]
            if known.ndim < value.ndim:
                known = np.broadcast_to(known[..., None], value.shape)
            accumulator.add(value, known)
