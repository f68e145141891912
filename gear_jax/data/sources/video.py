"""Frames out of mp4 files by number, through PyAV (AV1 included): decode only what is asked for."""

import os
import pathlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import av
import numpy as np

from gear_jax.data.faults import FaultError
from gear_jax.data.tfrecord import DataError
from gear_jax.types import Image

_NEAR = 60  # frames that are decoded on the way rather than sought


class VideoFrames(Sequence):
    """Frames of one stretch of a video file, at a fixed rate.

    Frame i is the one shown at `start + i / fps` seconds. Indexing seeks to the keyframe before it
    and decodes from there, or goes on from the last index where that is not far ahead; iterating
    decodes each frame once.
    """

    def __init__(self, path: str | os.PathLike, num_frames: int, fps: float, start: float = 0.0):
        """Nothing is opened until a frame is asked for."""
        self.path, self.num_frames = pathlib.Path(path), num_frames
        self.fps, self.start = float(fps), float(start)
        self._lock, self._next = threading.Lock(), 0
        self._frames_ahead: Iterator[av.VideoFrame] | None = None

    def __getstate__(self):
        return {**self.__dict__, "_lock": None, "_frames_ahead": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.num_frames

    def __getitem__(self, step: Any) -> Any:
        """uint8[H, W, 3], RGB.

        Raises:
            IndexError: no such frame.
            FaultError: the file cannot be decoded, or ends before this frame.
        """
        if not 0 <= step < self.num_frames:
            raise IndexError(f"frame {step} of {self.path}: it has {self.num_frames}")
        with self._lock:
            if self._frames_ahead is None or not 0 <= step - self._next < _NEAR:
                self._frames_ahead, self._next = self._frames(step), step
            ahead, self._frames_ahead = self._frames_ahead, None  # lost if decoding fails
            for frame in ahead:
                self._next += 1
                if self._next > step:
                    self._frames_ahead = ahead
                    return frame.to_ndarray(format="rgb24")
        raise AssertionError("a video that ends early raises")

    def __iter__(self) -> Iterator[Image]:
        return (frame.to_ndarray(format="rgb24") for frame in self._frames(0))

    def _frames(self, first: int) -> Iterator[av.VideoFrame]:
        step = first
        try:
            with av.open(str(self.path)) as container:
                stream = _video_stream(container, self.path)
                base = float(stream.time_base or 0)
                begin = (stream.start_time or 0) * base
                wanted = begin + self.start + step / self.fps
                if wanted > begin:
                    container.seek(int(wanted / base), stream=stream)
                for frame in container.decode(stream):
                    # the frame on display at `wanted`: half a frame of slack for rounded stamps
                    while frame.pts is not None and frame.pts * base >= wanted - 0.5 / self.fps:
                        yield frame
                        step += 1
                        if step == self.num_frames:
                            return
                        wanted = begin + self.start + step / self.fps
        except (av.FFmpegError, OSError) as error:
            what = f"cannot be decoded: {error.strerror}"
            raise FaultError("bad_image", f"{self.path}, frame {step}", what) from error
        what = f"the video ends before, expected {self.num_frames} frames"
        raise FaultError("bad_image", f"{self.path}, frame {step}", what)


def probe(path: str | os.PathLike) -> tuple[int, float]:
    """(number of frames, frames per second) of a video file.

    Raises:
        DataError: not a video, or one that does not say its rate.
    """
    try:
        with av.open(str(path)) as container:
            stream = _video_stream(container, path)
            count = stream.frames or sum(1 for _ in container.demux(stream) if _.pts is not None)
            rate = float(stream.average_rate or 0)
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{path}: not a readable video: {error}") from error
    if not count or not np.isfinite(rate) or rate <= 0:
        raise DataError(f"{path}: {count} frames at {rate} a second; expected both above 0")
    return count, rate


def _video_stream(container: Any, path: str | os.PathLike) -> Any:
    if not container.streams.video:
        raise DataError(f"{path}: has no video stream")
    stream = container.streams.video[0]
    stream.thread_count = 1  # one frame at a time: more threads only cost
    return stream
