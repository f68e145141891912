"""A folder of mp4 files: human or robot video without actions, one episode a file."""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from gear_jax.data.sources.video import VideoFrames, probe
from gear_jax.data.tfrecord import DataError
from gear_jax.types import Image

VIDEO, INSTRUCTION = "video", "instruction"


class VideoFolderSource:
    """Clips below a folder, in order of their paths; one view, "video", and no numbers.

    `instructions.jsonl` in the folder may give texts: {"file": "a/b.mp4", "instruction": "..."}.
    """

    def __init__(self, folder: str | os.PathLike, pattern: str = "**/*.mp4"):
        """List the clips and read their lengths.

        Raises:
            DataError: no clips, one that is no video, or an instruction for a clip that is not
                there.
        """
        self.folder = pathlib.Path(folder)
        self.paths = sorted(self.folder.glob(pattern))
        if not self.paths:
            raise DataError(f"{self.folder}: no file matches {pattern!r}")
        self.probed = [probe(path) for path in self.paths]
        self.instructions = self._read_instructions(self.folder / "instructions.jsonl")

    def _read_instructions(self, path: pathlib.Path) -> dict[str, str]:
        if not path.is_file():
            return {}
        names, found = {self._name(p) for p in self.paths}, {}
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            try:
                entry = json.loads(line)
                file, text = entry["file"], entry["instruction"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f'{path}, line {number}: expected {{"file": ..., "instruction": ...}}'
                ) from error
            if file not in names or not isinstance(text, str):
                raise DataError(f"{path}, line {number}: no clip {file!r} here, or no text")
            found[file] = text
        return found

    def _name(self, path: pathlib.Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def __len__(self) -> int:
        """Number of clips."""
        return len(self.paths)

    def episode(self, number: int) -> "_Clip":
        """One clip; nothing is decoded yet."""
        path, (frames, fps) = self.paths[number], self.probed[number]
        name = self._name(path)
        return _Clip(path, name, frames, fps, self.instructions.get(name, ""))

    def keys(self) -> Mapping[str, str]:
        """The one view, and the text."""
        return {VIDEO: "video", INSTRUCTION: "text"}

    def fingerprint(self) -> str:
        """Hash of names, sizes and instructions."""
        files = [(self._name(path), path.stat().st_size) for path in self.paths]
        return hashlib.sha256(json.dumps([files, self.instructions]).encode()).hexdigest()


class _Clip:
    """One file as a RawEpisode."""

    def __init__(self, path: pathlib.Path, name: str, frames: int, fps: float, instruction: str):
        self.path, self.where, self.episode_id = path, str(path), name
        self.num_steps, self.fps, self.instruction = frames, fps, instruction

    def has(self, key: str) -> bool:
        return key in (VIDEO, INSTRUCTION)

    def read(self, key: str) -> np.ndarray:
        raise DataError(f"{self.where}: key {key!r}: a clip has no numbers")

    def text(self, key: str) -> str:
        return self.instruction

    def images(self, key: str) -> Sequence[Image]:
        return VideoFrames(self.path, self.num_steps, self.fps)
