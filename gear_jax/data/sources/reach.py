"""A procedural robot: it reaches for the disc of the colour it is told, and closes its gripper.

Everything that a robot's recording has, drawn when it is read: a head view from above, a wrist
view, end-effector poses, joints, gripper commands and an instruction. Nothing to download; what the
tests and the debug configs train on. The hand is a white ring in the head view, wider the higher it
is.
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

COLOURS = {
    "red": (220, 50, 50),
    "green": (50, 180, 60),
    "blue": (60, 80, 235),
    "yellow": (230, 200, 40),
}
HEAD, WRIST = "head", "wrist"
_NUMBERS = {"pose": "x, y, z metres, qw, qx, qy, qz", "joints": "three, radians", "grip": "1 open"}
_CENTRE = np.array([0.5, 0.0])  # of the table, metres in the base frame
_SIDE = 0.5  # of the table and of the head view, metres
_WRIST_SIDE = 0.2  # of the wrist view, metres
_RADIUS = 0.04  # of a disc, metres
_SPREAD = 0.18  # discs and starting places lie so far from the centre at most, metres
_APART = 0.13  # least distance of two discs, metres
_HEIGHTS = (0.03, 0.30)  # of the hand, metres
_GROUND = 70.0


@dataclasses.dataclass(frozen=True)
class ReachSource:
    """Episodes that are drawn when they are read, each a function of its number and the seed.

    Attributes:
        num_episodes: how many.
        num_targets: discs on the table.
        image_size: side of the square views, pixels.
        fps: steps a second.
        seconds: that the way takes.
        hold: seconds that the gripper closes for.
        joint_order: which of the hand's x, y, z each joint follows.
        joint_scale: radians per metre of that.
        seed: of it all.
    """

    num_episodes: int = 200
    num_targets: int = 2
    image_size: int = 56
    fps: float = 10.0
    seconds: float = 1.5
    hold: float = 0.5
    joint_order: tuple[int, ...] = (0, 1, 2)
    joint_scale: float = 3.0
    seed: int = 0

    def __len__(self) -> int:
        """Number of episodes."""
        return self.num_episodes

    def episode(self, number: int) -> "ReachEpisode":
        """One of them."""
        if not 0 <= number < self.num_episodes:
            raise DataError(f"reach: no episode {number} of {self.num_episodes}")
        return ReachEpisode(self, number)

    def keys(self) -> Mapping[str, str]:
        """What an episode has."""
        return {**_NUMBERS, HEAD: "from above", WRIST: "below the hand", "instruction": "text"}

    def fingerprint(self) -> str:
        """Hash of all that the drawings depend on."""
        text = json.dumps(["reach", 1, dataclasses.asdict(self)])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Scene:
    """What one episode is about.

    Attributes:
        colours: of the discs.
        places: float[n, 2], of the discs, metres in the base frame.
        named: number of the disc that the instruction names.
        start: float[3], of the hand.
        yaw: of the hand at the start, radians; 0 at the end.
    """

    colours: tuple[str, ...]
    places: np.ndarray
    named: int
    start: np.ndarray
    yaw: float

    @property
    def instruction(self) -> str:
        """What the robot is told."""
        return f"reach the {self.colours[self.named]} disc"


class ReachEpisode:
    """One episode as a RawEpisode."""

    def __init__(self, source: ReachSource, number: int):
        """Keep which."""
        self.source, self.number = source, number
        self.where = f"reach, episode {number}"
        self.episode_id = f"reach {source.seed}/{number}"
        self.fps = source.fps
        self.num_steps = round((source.seconds + source.hold) * source.fps)

    def has(self, key: str) -> bool:
        """Whether the key is one of `ReachSource.keys`."""
        return key in {**_NUMBERS, HEAD: 0, WRIST: 0, "instruction": 0}

    def read(self, key: str) -> np.ndarray:
        """Numbers of every step."""
        position, yaw, opening = self._path
        if key == "pose":
            # the hand looks down (a half turn about x), then turns about the vertical
            half = yaw / 2
            quaternion = np.stack([0 * half, np.cos(half), np.sin(half), 0 * half], axis=1)
            return np.concatenate([position, quaternion], axis=1)
        if key == "joints":
            centred = position - np.array([*_CENTRE, 0.15])
            return self.source.joint_scale * centred[:, list(self.source.joint_order)]
        if key == "grip":
            return opening[:, None]
        raise DataError(f"{self.where}: key {key!r} has no numbers")

    def text(self, key: str) -> str:
        """The instruction."""
        if key != "instruction":
            raise DataError(f"{self.where}: key {key!r} has no text")
        return self.scene.instruction

    def images(self, key: str) -> Sequence[Image]:
        """Frames of a view, each drawn when it is asked for."""
        if key not in (HEAD, WRIST):
            raise DataError(f"{self.where}: key {key!r} has no images")
        return _Frames(self, key)

    @functools.cached_property
    def scene(self) -> Scene:
        """The discs, the task and the start."""
        rng = np.random.default_rng([self.source.seed, self.number])
        places: list[np.ndarray] = []
        while len(places) < self.source.num_targets:
            place = _CENTRE + rng.uniform(-_SPREAD, _SPREAD, 2)
            if all(np.linalg.norm(place - other) > _APART for other in places):
                places.append(place)
        colours = rng.permutation(list(COLOURS))[: len(places)].tolist()
        start = np.append(_CENTRE + rng.uniform(-_SPREAD, _SPREAD, 2), rng.uniform(0.15, 0.28))
        named, yaw = int(rng.integers(len(places))), float(rng.uniform(-0.6, 0.6))
        return Scene(tuple(colours), np.stack(places), named, start, yaw)

    @functools.cached_property
    def _path(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Position float[E, 3], yaw float[E], opening float[E]: a minimum-jerk way, a grasp."""
        s = self.scene
        time = np.arange(self.num_steps) / self.fps
        part = np.clip(time / self.source.seconds, 0, 1)
        done = part**3 * (10 - 15 * part + 6 * part**2)
        goal = np.append(s.places[s.named], _HEIGHTS[0])
        position = s.start + done[:, None] * (goal - s.start)
        return position, s.yaw * (1 - done), (time < self.source.seconds).astype(float)

    def draw(self, view: str, step: int) -> Image:
        """One frame uint8[S, S, 3]."""
        position = self._path[0][step]
        return draw(self.scene, position, view, self.source.image_size)


def draw(scene: Scene, position: np.ndarray, view: str, size: int) -> Image:
    """A view uint8[size, size, 3] of a scene with the hand at float[3]; rows are x, columns y."""
    side, centre = (_SIDE, _CENTRE) if view == HEAD else (_WRIST_SIDE, position[:2])
    axis = ((np.arange(size) + 0.5) / size - 0.5) * side
    x, y = np.meshgrid(centre[0] + axis, centre[1] + axis, indexing="ij")
    canvas = np.full((size, size, 3), _GROUND)
    edge = side / size

    def paint(canvas, distance, radius, colour):
        inside = np.clip((radius - distance) / edge + 0.5, 0, 1)[..., None]
        return canvas * (1 - inside) + inside * np.asarray(colour)

    for place, colour in zip(scene.places, scene.colours, strict=True):
        canvas = paint(canvas, np.hypot(x - place[0], y - place[1]), _RADIUS, COLOURS[colour])
    if view == HEAD:
        ring = 0.02 + 0.1 * position[2]
        distance = np.abs(np.hypot(x - position[0], y - position[1]) - ring)
        canvas = paint(canvas, distance, 0.006, (255, 255, 255))
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


class _Frames(Sequence):
    """Frames of one view."""

    def __init__(self, episode: ReachEpisode, view: str):
        self.episode, self.view = episode, view

    def __len__(self) -> int:
        return self.episode.num_steps

    def __getitem__(self, step: Any) -> Any:
        if not 0 <= step < len(self):
            raise IndexError(f"{self.episode.where}: no frame {step} of {len(self)}")
        return self.episode.draw(self.view, int(step))
