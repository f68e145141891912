"""HDF5 recordings as AgiBot World, RoboMIND, robomimic and LIBERO publish them.

A layout says where episodes, numbers, images and texts lie; keys are paths inside the file, such as
"puppet/end_effector". Images are raw arrays, encoded bytes, or mp4 files beside the HDF5 file.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import h5py
import numpy as np

from gear_jax.data.rlds_features import load_json
from gear_jax.data.sources.video import VideoFrames
from gear_jax.data.tfrecord import DataError
from gear_jax.types import Image

INSTRUCTION = "instruction"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one publisher lays out HDF5 files.

    Attributes:
        files: glob pattern of the files, below the root.
        episodes: regular expression of the groups that are episodes; "" where a file is one.
        steps: path, in an episode, of what has a row per step.
        instruction: (root, file, group) -> text of the episode; "" if none is published.
        fps: steps per second, or None if the publisher does not say.
        videos: path of the mp4 of a key ending in ".mp4", relative to the root, from the file's
            own path relative to the root.
    """

    files: str
    episodes: str
    steps: str
    instruction: Callable[[pathlib.Path, pathlib.Path, h5py.Group], str]
    fps: float | None = None
    videos: Callable[[pathlib.Path, str], pathlib.Path] | None = None


def _agibot_instruction(root: pathlib.Path, file: pathlib.Path, group: h5py.Group) -> str:
    """task_info/task_{task}.json names every episode's task."""
    task, episode = file.parts[-3:-1]
    path = root / "task_info" / f"task_{task}.json"
    try:
        names = {str(entry["episode_id"]): entry["task_name"] for entry in load_json(path)}
        return names[episode]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: has no task_name of episode {episode}") from error


def _agibot_video(file: pathlib.Path, name: str) -> pathlib.Path:
    task, episode = file.parts[-3:-1]
    return pathlib.Path("observations", task, episode, "videos", name)


def _robomind_instruction(root: pathlib.Path, file: pathlib.Path, group: h5py.Group) -> str:
    """The file's own text where it has one, else the task's folder in words."""
    if "language_raw" in group:
        return _as_text(group["language_raw"][...].ravel()[0])
    above = [part for part in file.parts if part == "success_episodes"]
    if not above:
        raise DataError(f"{file}: expected TASK/success_episodes/... or a key 'language_raw'")
    return file.parts[file.parts.index("success_episodes") - 1].replace("_", " ")


def _libero_instruction(root: pathlib.Path, file: pathlib.Path, group: h5py.Group) -> str:
    try:
        return json.loads(group.parent.attrs["problem_info"])["language_instruction"].strip('"')
    except (KeyError, ValueError) as error:
        raise DataError(f"{file}: data.attrs['problem_info'] gives no instruction") from error


LAYOUTS = {
    "agibot": Layout(
        "proprio_stats/*/*/proprio_stats.h5",
        "",
        "state/joint/position",
        _agibot_instruction,
        30.0,
        _agibot_video,
    ),
    "robomind": Layout("**/trajectory.hdf5", "", "puppet/joint_position*", _robomind_instruction),
    "robomimic": Layout("**/*.hdf5", r"data/demo_\d+", "actions", lambda root, file, group: ""),
    "libero": Layout("**/*.hdf5", r"data/demo_\d+", "actions", _libero_instruction, 20.0),
}


class Hdf5Source:
    """Episodes of the HDF5 files below a folder, ordered by path and number."""

    def __init__(self, root: str | os.PathLike, layout: str):
        """List files and episodes.

        Args:
            root: folder of the published data set.
            layout: a key of `LAYOUTS`.

        Raises:
            DataError: unknown layout, no file, or one that is no HDF5.
        """
        if layout not in LAYOUTS:
            raise DataError(f"HDF5 layout {layout!r}: expected one of {sorted(LAYOUTS)}")
        self.root, self.name = pathlib.Path(root), layout
        self.files = sorted(self.root.glob(LAYOUTS[layout].files))
        if not self.files:
            raise DataError(f"{self.root}: no file matches {LAYOUTS[layout].files!r}")
        self.places: list[tuple[int, str]] = []
        for number, path in enumerate(self.files):
            self.places += [(number, group) for group in self._groups(path)]

    def _groups(self, path: pathlib.Path) -> list[str]:
        pattern = LAYOUTS[self.name].episodes
        if not pattern:
            return [""]
        with _open(path) as file:
            parent = pattern.rsplit("/", 1)[0]
            if parent not in file:
                raise DataError(f"{path}: has no group {parent!r}")
            names = [f"{parent}/{name}" for name in file[parent]]
        names = [name for name in names if re.fullmatch(pattern, name)]
        return sorted(names, key=lambda name: int(name.rsplit("_", 1)[1]))

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.places)

    def episode(self, number: int) -> "_Episode":
        """One episode; nothing is read yet."""
        file, group = self.places[number]
        return _Episode(self, self.files[file], group)

    def keys(self) -> Mapping[str, str]:
        """{key: dtype and shape} of the first episode."""
        found = {INSTRUCTION: "text"}
        if self.places:
            file, group = self.places[0]
            with _open(self.files[file]) as opened:
                root = opened[group] if group else opened

                def note(name, node):
                    if isinstance(node, h5py.Dataset):
                        found[name] = f"{node.dtype}{list(node.shape)}"

                root.visititems(note)
        return found

    def fingerprint(self) -> str:
        """Hash of names and sizes."""
        files = [(p.relative_to(self.root).as_posix(), p.stat().st_size) for p in self.files]
        return hashlib.sha256(json.dumps([self.name, files, self.places]).encode()).hexdigest()


class _Episode:
    """One group, or file, as a RawEpisode. A file is open only while something is read."""

    def __init__(self, source: Hdf5Source, path: pathlib.Path, group: str):
        self.source, self.path, self.group = source, path, group
        self.layout = LAYOUTS[source.name]
        self.fps = self.layout.fps
        self.file = path.relative_to(source.root)
        self.episode_id = f"{self.file.as_posix()}:{group}" if group else self.file.as_posix()
        self.where = f"{self.file}, {group or 'whole file'}"

    @functools.cached_property
    def num_steps(self) -> int:
        with _open(self.path) as file:
            node = self._node(file)
            parent, _, name = self.layout.steps.rpartition("/")
            parent = node[parent] if parent and parent in node else node
            name = name.rstrip("*")
            for key in parent:
                if key.startswith(name) and isinstance(parent[key], h5py.Dataset):
                    return len(parent[key])
        raise DataError(f"{self.where}: has no {self.layout.steps!r} to count its steps by")

    def _node(self, file: h5py.File) -> Any:
        return file[self.group] if self.group else file

    def has(self, key: str) -> bool:
        if key == INSTRUCTION:
            return True
        if key.endswith(".mp4"):
            return self._video(key).is_file()
        with _open(self.path) as file:
            return key in self._node(file)

    def read(self, key: str) -> np.ndarray:
        with _open(self.path) as file:
            node = self._node(file)
            if key not in node or not isinstance(node[key], h5py.Dataset):
                raise DataError(f"{self.where}: key {key!r} is missing")
            return node[key][...]

    def text(self, key: str) -> str:
        with _open(self.path) as file:
            node = self._node(file)
            if key == INSTRUCTION:
                return self.layout.instruction(self.source.root, self.file, node)
            return _as_text(node[key][...].ravel()[0])

    def images(self, key: str) -> Sequence[bytes | Image]:
        if key.endswith(".mp4"):
            if self.fps is None:
                raise DataError(f"{self.where}: {key}: the layout does not say a rate")
            return VideoFrames(self._video(key), self.num_steps, self.fps)
        return _Images(self, key)

    def _video(self, key: str) -> pathlib.Path:
        if self.layout.videos is None:
            raise DataError(f"{self.where}: key {key!r}: this layout has no videos")
        return self.source.root / self.layout.videos(self.file, key)


class _Images(Sequence):
    """Images of one view in an HDF5 data set, one read each."""

    def __init__(self, episode: _Episode, key: str):
        self.episode, self.key = episode, key

    def __len__(self) -> int:
        return self.episode.num_steps

    def __getitem__(self, step):
        if not 0 <= step < len(self):
            raise IndexError(step)
        with _open(self.episode.path) as file:
            value = self.episode._node(file)[self.key][step]
        if isinstance(value, np.ndarray) and value.ndim == 3:
            return value
        # encoded: a byte string, or uint8[n] padded with zeros behind the end of the image
        return value.tobytes() if isinstance(value, np.ndarray) else bytes(value)


def _as_text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _open(path: pathlib.Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: not a readable HDF5 file: {error}") from error
