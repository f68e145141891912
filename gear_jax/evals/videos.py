"""What is kept of some episodes to look at: frames that the policy saw, and its answers.

videos/<suite>/<task>-<init>-<success|failure>.mp4    a frame for each query, views side by side
videos/<suite>/<task>-<init>-<success|failure>.npz    actions, latent_ids, ee_pose of each query
"""

import dataclasses
import hashlib
import pathlib
import re

import av
import cv2
import numpy as np

from gear_jax.evals.episodes import Answer, Episode, Query
from gear_jax.types import VIEWS, State

WHICH = ("failures", "all", "none")
_HEIGHT = 192  # pixels
_RATE = 3  # frames a second


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """One query, made small.

    Attributes:
        frame: uint8[192, W, 3], views side by side.
        state: as the policy saw it.
        answer: what it wanted.
    """

    frame: np.ndarray
    state: State
    answer: Answer


class Keeper:
    """Keeps videos of failures, of all or of no episodes, up to a limit."""

    def __init__(self, directory, which: str = "none", limit: int = 20):
        """Keep under `directory`.

        Raises:
            ValueError: `which` is not one of `WHICH`.
        """
        if which not in WHICH:
            raise ValueError(f"video is {which!r}: expected one of {WHICH}")
        self.directory, self.which, self.limit = pathlib.Path(directory), which, limit
        self.count = len(list(self.directory.glob("*/*.mp4")))

    def wants(self, episode: Episode) -> bool:
        """Whether the queries of this episode may still be needed."""
        del episode
        return self.which != "none" and self.count < self.limit

    def shrink(self, query: Query, answer: Answer) -> Seen:
        """What is kept of a query until its episode ends."""
        shown = [
            query.observation.images[view] for view in VIEWS if view in query.observation.images
        ]
        sizes = [(max(1, round(one.shape[1] * _HEIGHT / one.shape[0])), _HEIGHT) for one in shown]
        views = [cv2.resize(one, size, interpolation=cv2.INTER_AREA)
                 for one, size in zip(shown, sizes, strict=True)]  # fmt: skip
        frame = np.concatenate(views or [np.zeros((_HEIGHT, _HEIGHT, 3), np.uint8)], axis=1)
        return Seen(frame, query.observation.state, answer)

    def keep(self, episode: Episode, success: bool, seen: list[Seen]) -> None:
        """Write an episode that ended, if it is one of those to keep."""
        if not seen or not self.wants(episode) or (success and self.which == "failures"):
            return
        self.count += 1
        path = self.directory / file_name(episode, success)
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            path.with_suffix(".npz"),
            action=np.stack([one.answer.action for one in seen]).astype(np.float32),
            latent_ids=np.stack([one.answer.latent_ids for one in seen]).astype(np.int32),
            ee_pose=np.stack([one.state["ee_pose"] for one in seen]).astype(np.float32),
            arm_mask=np.stack([one.state["arm_mask"] for one in seen]),
        )
        write_video(path, [one.frame for one in seen])


def file_name(episode: Episode, success: bool) -> str:
    """Where an episode's video is, of letters that any file system takes."""
    task = re.sub(r"[^A-Za-z0-9_.]+", "_", episode.task).strip("._")
    if task != episode.task or len(task) > 80:  # two names must not become one
        task = f"{task[:80]}_{hashlib.sha256(episode.task.encode()).hexdigest()[:6]}"
    suite = re.sub(r"[^A-Za-z0-9_]+", "_", episode.suite)
    return f"{suite}/{task}-{episode.init:04d}-{'success' if success else 'failure'}.mp4"


def write_video(path: pathlib.Path, frames: list[np.ndarray]) -> None:
    """An mp4 that browsers play, of frames uint8[H, W, 3] of one size, cut to even sides."""
    height, width = (side // 2 * 2 for side in frames[0].shape[:2])
    partial = path.with_name(f".{path.name}")
    with av.open(str(partial), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=_RATE, options={"crf": "28", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(
                np.ascontiguousarray(frame[:height, :width]), format="rgb24"
            )
            for packet in stream.encode(picture):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    partial.replace(path)
