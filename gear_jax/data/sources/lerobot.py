"""LeRobot data sets, versions 2.x and 3.x: parquet columns and mp4 or embedded images.

Keys are LeRobot's own, such as "observation.state"; the text key "task" is the episode's task, and
a column of whole numbers read as text is looked up among the tasks. Binary columns are refused:
they may hold pickles.
"""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gear_jax.data.rlds_features import load_json
from gear_jax.data.sources.video import VideoFrames
from gear_jax.data.tfrecord import DataError
from gear_jax.types import Image

TASK = "task"


class LeRobotSource:
    """Episodes of one LeRobot data set."""

    def __init__(self, root: str | os.PathLike):
        """Read the metadata.

        Args:
            root: the folder that holds meta/, data/ and perhaps videos/.

        Raises:
            DataError: missing or contradictory metadata, or a version that is neither 2 nor 3.
        """
        self.root = pathlib.Path(root)
        info_path = self.root / "meta" / "info.json"
        info = load_json(info_path)
        try:
            version = str(info["codebase_version"])
            self.fps = float(info["fps"])
            self.features: dict[str, dict] = info["features"]
            self._data_path, self._video_path = info["data_path"], info.get("video_path")
            total = int(info["total_episodes"])
            reader = {"v2": self._read_v2, "v3": self._read_v3}.get(version[:2])
            if reader is None:
                raise DataError(f"{info_path}: codebase_version {version!r}: expected v2.x or v3.x")
            if not self.fps > 0:
                raise DataError(f"{info_path}: fps is {self.fps}: expected a number above 0")
            self.tasks, self.episodes = reader(info)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{info_path}: {error!r}: not LeRobot metadata") from error
        if len(self.episodes) != total:
            raise DataError(
                f"{info_path}: total_episodes is {total}, but {len(self.episodes)} are listed"
            )

    def _read_v2(self, info: dict) -> tuple[dict[int, str], list[dict]]:
        tasks = {t["task_index"]: t["task"] for t in self._lines("tasks.jsonl")}
        episodes = []
        for entry in self._lines("episodes.jsonl"):
            number = int(entry["episode_index"])
            place = {"episode_chunk": number // int(info["chunks_size"]), "episode_index": number}
            videos = {
                key: (self.root / self._video_path.format(video_key=key, **place), 0.0)
                for key in self._of_kind("video")
            }
            episodes.append(
                {
                    "number": number,
                    "length": int(entry["length"]),
                    "tasks": list(entry.get("tasks", ())),
                    "data": self.root / self._data_path.format(**place),
                    "videos": videos,
                }
            )
        return tasks, episodes

    def _read_v3(self, info: dict) -> tuple[dict[int, str], list[dict]]:
        table = _read_parquet(self.root / "meta" / "tasks.parquet").to_pydict()
        # the text is the pandas index, stored under this name
        texts = table.get("task", table.get("__index_level_0__"))
        if texts is None:
            raise DataError(f"{self.root / 'meta/tasks.parquet'}: has no column of tasks")
        tasks = dict(zip(table["task_index"], texts, strict=True))
        episodes = []
        for path in sorted((self.root / "meta" / "episodes").glob("*/*.parquet")):
            for row in _read_parquet(path, skip="stats/").to_pylist():
                videos = {}
                for key in self._of_kind("video"):
                    chunk, file = (row[f"videos/{key}/{x}_index"] for x in ("chunk", "file"))
                    if chunk is None or file is None:
                        continue
                    name = self._video_path.format(
                        video_key=key, chunk_index=chunk, file_index=file
                    )
                    videos[key] = (self.root / name, float(row[f"videos/{key}/from_timestamp"]))
                data = self._data_path.format(
                    chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
                )
                episodes.append(
                    {
                        "number": int(row["episode_index"]),
                        "length": int(row["length"]),
                        "tasks": list(row.get("tasks") or ()),
                        "data": self.root / data,
                        "videos": videos,
                    }
                )
        return tasks, episodes

    def _lines(self, name: str) -> list[dict]:
        path = self.root / "meta" / name
        try:
            lines = path.read_text("utf-8").splitlines()
            return [json.loads(line) for line in lines if line.strip()]
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error

    def _of_kind(self, kind: str) -> list[str]:
        return [key for key, feature in self.features.items() if feature["dtype"] == kind]

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.episodes)

    def episode(self, number: int) -> "_Episode":
        """One episode; nothing is read yet."""
        return _Episode(self, self.episodes[number])

    def keys(self) -> Mapping[str, str]:
        """{key: dtype and shape}, with the names of the numbers where they are given."""
        found = {TASK: "text"}
        for key, feature in self.features.items():
            names = feature.get("names")
            named = f" {names}" if names and feature["dtype"] not in ("video", "image") else ""
            found[key] = f"{feature['dtype']}{list(feature.get('shape', ()))}{named}"
        return found

    def fingerprint(self) -> str:
        """Hash of the metadata, and of the data files' names and sizes."""
        files = sorted({episode["data"] for episode in self.episodes})
        sizes = [(path.name, path.stat().st_size if path.is_file() else -1) for path in files]
        told = [self.fps, self.features, sorted(self.tasks.items()), sizes]
        told += [[e["number"], e["length"], e["tasks"]] for e in self.episodes]
        return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()


class _Episode:
    """One episode as a RawEpisode."""

    def __init__(self, source: LeRobotSource, entry: dict):
        self.source, self.entry = source, entry
        self.num_steps, self.fps = entry["length"], source.fps
        self.episode_id = f"episode_{entry['number']:06d}"
        self.where = f"{entry['data'].relative_to(source.root)}, episode {entry['number']}"

    def has(self, key: str) -> bool:
        if key == TASK:
            return bool(self.entry["tasks"]) or "task_index" in self.source.features
        if key in self.entry["videos"]:
            return self.entry["videos"][key][0].is_file()
        return key in self.source.features and key in self._columns

    def read(self, key: str) -> np.ndarray:
        column = self._column(key)
        if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            raise DataError(f"{self.where}: key {key!r} holds binary objects, which are not read")
        try:
            if pa.types.is_nested(column.type):
                return np.array(column.to_pylist())
            return column.to_numpy(zero_copy_only=False)
        except ValueError as error:
            raise DataError(f"{self.where}: key {key!r} has rows of different lengths") from error

    def text(self, key: str) -> str:
        if key == TASK and self.entry["tasks"]:
            return self.entry["tasks"][0]
        first = self._column("task_index" if key == TASK else key)[0].as_py()
        first = first[0] if isinstance(first, list) else first
        if isinstance(first, str):
            return first
        if first not in self.source.tasks:
            raise DataError(f"{self.where}: key {key!r}: task {first!r} is not listed")
        return self.source.tasks[first]

    def images(self, key: str) -> Sequence[bytes | Image]:
        if key in self.entry["videos"]:
            path, start = self.entry["videos"][key]
            return VideoFrames(path, self.num_steps, self.fps, start)
        return [image["bytes"] for image in self._column(key).to_pylist()]

    @functools.cached_property
    def _columns(self) -> set[str]:
        try:
            return set(pq.read_schema(self.entry["data"]).names)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.entry['data']}: not a readable parquet file") from error

    def _column(self, key: str) -> Any:
        if key not in self._columns:
            raise DataError(f"{self.where}: key {key!r} is missing")
        table = _read_parquet(
            self.entry["data"],
            columns=[key],
            filters=[("episode_index", "=", self.entry["number"])],
        )
        if len(table) != self.num_steps:
            raise DataError(
                f"{self.where}: {len(table)} rows, but the metadata say {self.num_steps}"
            )
        return table.column(key).combine_chunks()


def _read_parquet(path: pathlib.Path, skip: str | None = None, **kwargs) -> Any:
    """A table; columns whose name begins with `skip` are left out."""
    try:
        if skip:
            kwargs["columns"] = [n for n in pq.read_schema(path).names if not n.startswith(skip)]
        return pq.read_table(path, **kwargs)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error
