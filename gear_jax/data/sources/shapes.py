"""Procedural video: coloured shapes that move together among grey ones that do not.

Like the links of an arm, the coloured shapes share one velocity, which lasts for a while, reverses
at once, or gives way to another. The grey shapes and the flickering light are what a latent action
should not speak of. The true velocity is given, so that what codes mean can be measured. Nothing to
download.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gear_jax.data.tfrecord import DataError
from gear_jax.types import Image

VIDEO, VELOCITY = "video", "velocity"
_COLOURS = ((230, 60, 60), (60, 200, 60), (70, 90, 240), (230, 200, 50))  # of the mover
_SMOOTH = 1.0  # width of a shape's edge, pixels


@dataclasses.dataclass(frozen=True)
class ShapesSource:
    """Episodes that are drawn when they are read, each a function of its number and the seed.

    Attributes:
        num_episodes: how many.
        num_steps: of each.
        fps: frames a second.
        image_size: side of the square frames, pixels.
        num_movers: coloured shapes.
        num_distractors: grey shapes that stand still.
        speed: greatest speed, in sides of the frame per second.
        spread: how far from the middle a mover may begin, in sides of the frame.
        reach: how far it may go from there, in sides of the frame.
        reversal: chance at each step that the velocity changes its sign.
        turn: chance at each step of an entirely new velocity.
        flicker: greatest change of brightness from frame to frame, of 255.
        seed: of it all.
    """

    num_episodes: int = 2000
    num_steps: int = 12
    fps: float = 5.0
    image_size: int = 32
    num_movers: int = 1
    num_distractors: int = 2
    speed: float = 1.25
    spread: float = 0.1
    reach: float = 0.3
    reversal: float = 0.15
    turn: float = 0.15
    flicker: float = 4.0
    seed: int = 0

    def __len__(self) -> int:
        """Number of episodes."""
        return self.num_episodes

    def episode(self, number: int) -> "_Drawn":
        """One of them; frames are drawn on access."""
        if not 0 <= number < self.num_episodes:
            raise DataError(f"shapes: no episode {number} of {self.num_episodes}")
        return _Drawn(self, number)

    def keys(self) -> Mapping[str, str]:
        """The one view, and the true velocity."""
        return {VIDEO: "drawn frames", VELOCITY: "x, y in sides of the frame per second"}

    def fingerprint(self) -> str:
        """Hash of all that the drawings depend on."""
        text = json.dumps(["shapes", 2, dataclasses.asdict(self)])
        return hashlib.sha256(text.encode()).hexdigest()


class _Drawn:
    """One episode as a RawEpisode."""

    def __init__(self, source: ShapesSource, number: int):
        self.source, self.number = source, number
        self.where = f"shapes, episode {number}"
        self.episode_id = f"shapes {source.seed}/{number}"
        self.num_steps, self.fps = source.num_steps, source.fps

    def has(self, key: str) -> bool:
        return key in (VIDEO, VELOCITY)

    def read(self, key: str) -> np.ndarray:
        """Velocity float[E, 2] from each step to the next; the last is repeated."""
        if key != VELOCITY:
            raise DataError(f"{self.where}: key {key!r} has no numbers")
        moves = np.diff(self._path, axis=0) * self.fps / self.source.image_size
        return np.concatenate([moves, moves[-1:]])

    def text(self, key: str) -> str:
        raise DataError(f"{self.where}: key {key!r}: drawings have no text")

    def images(self, key: str) -> Sequence[Image]:
        if key != VIDEO:
            raise DataError(f"{self.where}: key {key!r} has no images")
        return _Frames(self)

    @functools.cached_property
    def _path(self) -> np.ndarray:
        """How far the movers are from where they began, float[E, 2], pixels."""
        s = self.source
        rng = np.random.default_rng([s.seed, self.number, 0])
        limit, greatest = s.reach * s.image_size, s.speed * s.image_size / s.fps
        place, velocity = np.zeros(2), rng.uniform(-greatest, greatest, 2)
        path = [place]
        for _ in range(s.num_steps - 1):
            chance = rng.uniform()
            if chance < s.reversal:
                velocity = -velocity
            elif chance < s.reversal + s.turn:
                velocity = rng.uniform(-greatest, greatest, 2)
            velocity = np.where(np.abs(place + velocity) > limit, -velocity, velocity)
            place = place + velocity
            path.append(place)
        return np.stack(path)

    @functools.cached_property
    def _scene(self) -> tuple[np.ndarray, list[tuple], np.ndarray]:
        """What stands still, what moves (kind, start, radius, colour), and the light per frame."""
        s = self.source
        rng = np.random.default_rng([s.seed, self.number, 1])
        size = s.image_size
        ground = np.full((size, size, 3), 40.0)
        for _ in range(s.num_distractors):
            shape = rng.integers(3), rng.uniform(0, size, 2), rng.uniform(0.06, 0.12) * size
            ground = _paint(ground, *shape, rng.uniform(80, 170))
        movers = [
            (
                rng.integers(3),
                (0.5 + rng.uniform(-s.spread, s.spread, 2)) * size,
                rng.uniform(0.09, 0.14) * size,
                np.array(_COLOURS[rng.integers(len(_COLOURS))]),
            )
            for _ in range(s.num_movers)
        ]
        return ground, movers, rng.uniform(-s.flicker, s.flicker, s.num_steps)

    def draw(self, step: int) -> Image:
        """One frame uint8[S, S, 3]."""
        frame, movers, light = self._scene
        for kind, start, radius, colour in movers:
            frame = _paint(frame, kind, start + self._path[step], radius, colour)
        return np.clip(np.rint(frame + light[step]), 0, 255).astype(np.uint8)


class _Frames(Sequence):
    """Frames of an episode, each drawn when it is asked for."""

    def __init__(self, episode: _Drawn):
        self.episode = episode

    def __len__(self) -> int:
        return self.episode.num_steps

    def __getitem__(self, step: Any) -> Any:
        if not 0 <= step < len(self):
            raise IndexError(f"{self.episode.where}: no frame {step} of {len(self)}")
        return self.episode.draw(int(step))


def _paint(canvas, kind, place, radius, colour):
    """The canvas with a disc (0), square (1) or triangle (2) on it, its edges smooth."""
    x, y = np.meshgrid(*[np.arange(canvas.shape[0]) - centre for centre in place], indexing="xy")
    distance = (
        np.hypot(x, y),
        np.maximum(np.abs(x), np.abs(y)) * 1.13,  # of about the disc's area
        np.maximum(y, 0.87 * np.abs(x) - 0.5 * y) * 1.3,
    )[kind]
    inside = np.clip((radius - distance) / _SMOOTH + 0.5, 0, 1)[..., None]
    return canvas * (1 - inside) + inside * colour
