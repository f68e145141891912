"""Batches from a worker process to the trainer through memory that is used again.

Grain hands each array over in a shared-memory segment of its own, whose pages the kernel must find
and clear every time; for a batch of images that costs as much as decoding them. Here a worker keeps
a few segments: it fills a free one, images in place and the rest pickled behind them, and sends its
name; the reader hands out the images where they lie, and the segment is free again when nobody
holds them any more. Messages stay below a pipe's size whatever the batch.
"""

import dataclasses
import math
import multiprocessing
import pickle
import weakref
from multiprocessing import resource_tracker, shared_memory
from typing import Any

import numpy as np

_HEADER = 64  # bytes before the data; the first is 1 while the segment waits to be read
_SPARE = 1 << 15  # bytes a row for all but its images; more goes into a larger segment


@dataclasses.dataclass(frozen=True)
class Handle:
    """What is sent in place of a batch: a segment, and how much of it is images and the rest."""

    name: str
    shape: tuple[int, ...]
    rest: int


class Buffers:
    """Segments of one process that makes batches, filled in turns."""

    def __init__(self):
        """None yet; they come with the first batches."""
        self._segments: list[shared_memory.SharedMemory] = []

    def __reduce__(self):
        return Buffers, ()

    def images(self, shape: tuple[int, ...]) -> np.ndarray:
        """An array uint8[shape] of anything, to be filled; ordinary memory in the main process."""
        if multiprocessing.parent_process() is None:
            return np.empty(shape, np.uint8)
        self._current = self._free(math.prod(shape) + _SPARE * shape[0])
        return _view(self._current, _HEADER, shape)

    def pack(self, batch: dict[str, Any]) -> dict[str, Any] | Handle:
        """What to send in place of a batch whose "images" are the last that were given out."""
        images = batch["images"]
        if multiprocessing.parent_process() is None:
            return batch
        segment, end = self._current, _HEADER + images.nbytes
        rest = pickle.dumps({k: v for k, v in batch.items() if k != "images"}, protocol=5)
        if end + len(rest) > segment.size:
            segment = self._free(images.nbytes + len(rest))
            _view(segment, _HEADER, images.shape)[:] = images
        segment.buf[end : end + len(rest)] = rest
        segment.buf[0] = 1
        return Handle(segment.name, images.shape, len(rest))

    def _free(self, size: int) -> Any:
        for segment in self._segments:
            if segment.size >= size + _HEADER and not segment.buf[0]:
                return segment
        segment = shared_memory.SharedMemory(create=True, size=size + _HEADER)
        # the reader unlinks it: this process's tracker would complain about it
        resource_tracker.unregister("/" + segment.name, "shared_memory")
        self._segments.append(segment)
        return segment


class Reader:
    """The trainer's side: hands batches out, and frees their segments when they are let go."""

    def __init__(self):
        """Segments are attached when they are first seen."""
        self._segments: dict[str, Any] = {}

    def take(self, sent: dict[str, Any] | Handle) -> dict[str, Any]:
        """The batch; the worker fills its memory again once "images" and its views are gone."""
        if not isinstance(sent, Handle):
            return sent
        if sent.name not in self._segments:
            self._segments[sent.name] = shared_memory.SharedMemory(sent.name)
        segment = self._segments[sent.name]
        images = _view(segment, _HEADER, sent.shape)
        end = _HEADER + images.nbytes
        rest = pickle.loads(segment.buf[end : end + sent.rest])  # our own worker's bytes
        weakref.finalize(images, _free, segment)
        return {**rest, "images": images}

    def close(self) -> None:
        """Give the memory back; batches that are still held keep theirs."""
        for segment in self._segments.values():
            segment.unlink()
        self._segments.clear()


def _free(segment: Any) -> None:
    segment.buf[0] = 0


def _view(segment: Any, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.ndarray(shape, np.uint8, segment.buf, offset)
