"""Latent action ids beside a prepared data set: one clip's ids for every step of every episode.

On disk (whole or not at all; parts/ holds what is done while it is being made):

    manifest.json   version, digest of the data and of the tokenizer, sizes
    ids.bin         int8[steps, T, C], steps counted over all episodes; -1 outside the episode

The part files are fixed ranges of steps, so any number of processes may make them in any order, and
a killed one loses only the part in hand. GEAR-VLA 3.2: the ids that the VLM learns to say.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

import numpy as np

from gear_jax.data.prepared import Prepared
from gear_jax.data.rlds_features import load_json
from gear_jax.data.tfrecord import DataError

VERSION = 1
NONE = -1


@dataclasses.dataclass(frozen=True)
class LatentSpec:
    """What a directory of ids holds.

    Attributes:
        data: digest of the prepared data set.
        tokenizer: digest of the checkpoint that made them.
        steps: of the data set.
        transitions: T, of a clip.
        codes: C, of a transition.
        vocabulary: number of different ids.
        part_steps: steps of a part.
    """

    data: str
    tokenizer: str
    steps: int
    transitions: int
    codes: int
    vocabulary: int
    part_steps: int = 4096

    def __post_init__(self):
        """Check that ids fit int8.

        Raises:
            ValueError: they do not.
        """
        if not 0 < self.vocabulary <= 127:
            raise ValueError(f"vocabulary of {self.vocabulary} ids: int8 holds up to 127")

    @property
    def parts(self) -> list[range]:
        """Ranges of steps, in order."""
        return [
            range(begin, min(begin + self.part_steps, self.steps))
            for begin in range(0, self.steps, self.part_steps)
        ]

    @property
    def shape(self) -> tuple[int, int]:
        """(T, C)."""
        return self.transitions, self.codes


class LatentWriter:
    """Writes parts, and joins them when all are there."""

    def __init__(self, directory: str | os.PathLike, spec: LatentSpec):
        """Begin, or go on with what is there.

        Raises:
            DataError: the directory holds ids of other data or of another tokenizer.
        """
        self.directory, self.spec = pathlib.Path(directory), spec
        self._parts = self.directory / "parts"
        manifest = self.directory / "manifest.json"
        self.done = manifest.is_file()
        for path in (manifest, self._parts / "manifest.json"):
            if path.is_file() and (found := load_json(path)) != self._manifest():
                odd = [key for key, value in self._manifest().items() if found.get(key) != value]
                raise DataError(
                    f"{self.directory}: holds latent ids with another {', '.join(odd)}; choose "
                    "another folder or remove it"
                )
        if not self.done:
            self._parts.mkdir(parents=True, exist_ok=True)
            self._write(self._parts / "manifest.json", json.dumps(self._manifest()).encode())

    def _manifest(self) -> dict[str, Any]:
        return {"version": VERSION, **dataclasses.asdict(self.spec)}

    def missing(self) -> list[range]:
        """Parts that are not there yet."""
        if self.done:
            return []
        return [part for part in self.spec.parts if not self._path(part).is_file()]

    def write(self, part: range, ids: np.ndarray) -> None:
        """One part, ids int[steps of the part, T, C], `NONE` where there is none.

        Raises:
            ValueError: another shape, or an id outside the vocabulary.
        """
        expected = (len(part), *self.spec.shape)
        if ids.shape != expected or ids.min() < NONE or ids.max() >= self.spec.vocabulary:
            raise ValueError(
                f"ids {ids.shape} from {ids.min()} to {ids.max()}: expected {expected} and ids "
                f"below {self.spec.vocabulary}"
            )
        self._write(self._path(part), ids.astype(np.int8).tobytes())

    def finish(self) -> bool:
        """Join the parts; False while some are missing."""
        if self.done:
            return True
        if self.missing():
            return False
        joined = self.directory / f".ids.bin.{os.getpid()}"
        with joined.open("wb") as file:
            for part in self.spec.parts:
                file.write(self._path(part).read_bytes())
            file.flush()
            os.fsync(file.fileno())
        joined.rename(self.directory / "ids.bin")
        self._write(self.directory / "manifest.json", json.dumps(self._manifest()).encode())
        shutil.rmtree(self._parts, ignore_errors=True)
        self.done = True
        return True

    def _path(self, part: range) -> pathlib.Path:
        return self._parts / f"{part.start:012d}.bin"

    @staticmethod
    def _write(path: pathlib.Path, content: bytes) -> None:
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                partial.unlink()


class LatentIds:
    """Reads the ids of a data set; cheap to hand to worker processes."""

    def __init__(self, directory: str | os.PathLike, prepared: Prepared):
        """Open finished ids.

        Raises:
            DataError: not finished, of another version, or of other data.
        """
        self.directory = pathlib.Path(directory)
        path = self.directory / "manifest.json"
        if not path.is_file():
            raise DataError(f"{self.directory}: no finished latent ids; run launch.extract")
        manifest = load_json(path)
        if manifest.pop("version", None) != VERSION:
            raise DataError(f"{self.directory}: made by another version; extract again")
        self.spec = LatentSpec(**manifest)
        if self.spec.data != prepared.whole_digest:
            raise DataError(f"{self.directory}: latent ids of other data; extract again")
        expected = self.spec.steps * self.spec.transitions * self.spec.codes
        if (self.directory / "ids.bin").stat().st_size != expected:
            raise DataError(f"{self.directory}/ids.bin: expected {expected} bytes")
        self._open()

    def _open(self) -> None:
        shape = (self.spec.steps, *self.spec.shape)
        path = self.directory / "ids.bin"
        self.ids = np.memmap(path, np.int8, "r", shape=shape).view(np.ndarray)

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "ids"}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._open()

    @property
    def digest(self) -> str:
        """Of the tokenizer that made them."""
        return self.spec.tokenizer

    def read(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32[T, C] of one step, 0 where masked, and mask bool[T].

        Args:
            row: step counted over all episodes, from `Prepared.row_of`.
        """
        ids = self.ids[row].astype(np.int32)
        mask = (ids != NONE).all(axis=-1)
        return np.where(mask[:, None], ids, 0), mask
