"""Episodes of a simulator -> what `data/rlds_writer.py` writes, under LIBERO's field names.

    Recorder.add(observation, action), step by step -> columns(), Recorder.episode() -> RldsWriter
    CutRun.add(...), CutRun.cut() where the robot is pushed -> CutRun.episodes() -> RldsWriter

The keys, and how images lie in them, are those of the public RLDS copies of LIBERO
(`modified_libero_rlds`): row `libero` of data/standard_rows.py reads both. Those copies keep the
simulator's OpenGL image (bottom row first) turned by 180 degrees; what is left of that is a picture
with left and right exchanged. It is stored so here too, and the row undoes it.
"""

import io
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import simplejpeg
from PIL import Image as PilImage

from gear_jax import geometry
from gear_jax.data.rlds_writer import Column
from gear_jax.types import ARMS, Image, Observation, State

FINGER_OPEN = 0.04  # metres that each finger of LIBERO's gripper is away from the middle when open
_OBS = "steps/observation/"
_IMAGES = {f"{_OBS}image": "head", f"{_OBS}wrist_image": "right_wrist"}
_RIGHT = ARMS.index("right")
_JPEG_QUALITY = 95
_SHORTEST = 8  # control steps of a part that is kept


def columns(num_joints: int = 7, encoding: Literal["jpeg", "png"] = "jpeg") -> dict[str, Column]:
    """What a demonstration set has, for `RldsWriter`.

    Args:
        num_joints: of the arm; LIBERO's Panda has 7.
        encoding: of the images; png keeps every pixel.
    """
    image = Column("image", (None, None, 3), encoding=encoding)
    flag, number = Column("tensor", (), "bool"), Column("tensor", (), "float32")
    return {
        **dict.fromkeys(_IMAGES, image),
        f"{_OBS}state": Column("tensor", (8,)),
        f"{_OBS}joint_state": Column("tensor", (num_joints,)),
        "steps/action": Column("tensor", (7,)),
        "steps/discount": number,
        "steps/reward": number,
        "steps/is_first": flag,
        "steps/is_last": flag,
        "steps/is_terminal": flag,
        "steps/language_instruction": Column("text"),
        "episode_metadata/file_path": Column("text"),
    }


COLUMNS = columns()


class Recorder:
    """One episode of a single-arm robot, whose arm is "right"."""

    def __init__(self, source: str, *, num_joints: int = 7, encoding: str = "jpeg"):
        """Empty.

        Args:
            source: where it comes from, unique within the set, such as "libero_spatial/3/init-0".
            num_joints: as in `columns`.
            encoding: as in `columns`.
        """
        self.source, self.num_joints, self.encoding = source, num_joints, encoding
        self.instruction = ""
        self._images: dict[str, list[bytes]] = {key: [] for key in _IMAGES}
        self._states: list[State] = []
        self._fingers: list[np.ndarray] = []
        self._actions: list[np.ndarray] = []

    def __len__(self) -> int:
        """Steps so far."""
        return len(self._actions)

    def add(self, observation: Observation, action, fingers=None) -> None:
        """Keep one control step, unless nothing was told to the robot (`is_no_op`).

        Args:
            observation: before the step; upright images of both views.
            action: float[7] in [-1, 1]: position, rotation vector, gripper -1 open, 1 close.
            fingers: float[2], metres, as LIBERO says them, (0.04, -0.04) is open; None: by the
                state's opening.
        """
        action = np.asarray(action, np.float32)
        if is_no_op(action, self._actions[-1] if self._actions else None):
            return
        state = observation.state
        if fingers is None:
            fingers = FINGER_OPEN * state["grip_open"][_RIGHT] * np.array([1.0, -1.0])
        self.instruction = observation.instruction
        for key, view in _IMAGES.items():
            self._images[key].append(encode(observation.images[view], self.encoding))
        self._states.append(state)
        self._fingers.append(np.asarray(fingers, np.float32))
        self._actions.append(action)

    def episode(self, *, success: bool = True) -> dict[str, Any]:
        """A value for each of `columns`.

        Args:
            success: whether the task ends with the last step.

        Raises:
            ValueError: no step was kept.
        """
        num_steps = len(self)
        if not num_steps:
            raise ValueError(f"demonstration {self.source!r} has no step, expected some")
        poses = np.stack([state["ee_pose"][_RIGHT] for state in self._states])
        joints = np.stack([state["joint_pos"][_RIGHT] for state in self._states])
        last = np.arange(num_steps) == num_steps - 1
        turns = continuous_rotvec(poses[:, :3, :3])
        return {
            **self._images,
            f"{_OBS}state": np.concatenate(
                [poses[:, :3, 3], turns, np.stack(self._fingers)], axis=1
            ).astype(np.float32),
            f"{_OBS}joint_state": joints[:, : self.num_joints],
            "steps/action": np.stack(self._actions),
            "steps/discount": np.ones(num_steps, np.float32),
            "steps/reward": (last & success).astype(np.float32),
            "steps/is_first": np.arange(num_steps) == 0,
            "steps/is_last": last,
            "steps/is_terminal": last & success,
            "steps/language_instruction": [self.instruction] * num_steps,
            "episode_metadata/file_path": self.source,
        }


class CutRun:
    """One run of an expert as episodes: each push ends one, and what follows begins the next.

    Chunks are made of poses that were reached, so only what was meant may lie within an episode.
    """

    def __init__(self, source: str, *, num_joints: int = 7, encoding: str = "jpeg"):
        """Empty; arguments as `Recorder`'s. Part n is called "<source>#<n>"."""
        self.source = source
        self._how = {"num_joints": num_joints, "encoding": encoding}
        self._parts: list[Recorder] = []
        self._cut = True

    def add(self, observation: Observation, action, fingers=None) -> None:
        """As `Recorder.add`."""
        if self._cut:
            self._parts.append(Recorder(f"{self.source}#{len(self._parts)}", **self._how))
            self._cut = False
        self._parts[-1].add(observation, action, fingers)

    def cut(self) -> None:
        """The robot is about to do something that nobody meant."""
        self._cut = True

    def episodes(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Source and record of each part that is long enough; the last ends in success."""
        for part in self._parts:
            if len(part) >= _SHORTEST:
                yield part.source, part.episode(success=part is self._parts[-1])


def is_no_op(action: np.ndarray, previous: np.ndarray | None) -> bool:
    """Whether an action tells the robot nothing: no motion, and the gripper as before.

    The rule by which `modified_libero_rlds` was cleaned (OpenVLA, regenerate_libero_dataset.py).
    """
    still = bool(np.linalg.norm(action[:6]) < 1e-4)
    return still and (previous is None or bool(action[6] == previous[6]))


def continuous_rotvec(rotmat: np.ndarray) -> np.ndarray:
    """Rotation vectors float64[E, 3] of float[E, 3, 3], as continuous as their quaternions.

    Angles may pass pi, as LIBERO's do: a hand that looks down is always near it.
    """
    quat = geometry.continuous_quat(geometry.rotmat_to_quat(rotmat.astype(np.float64)))
    sine = np.linalg.norm(quat[:, 1:], axis=1, keepdims=True)
    angle = 2 * np.arctan2(sine, quat[:, :1])
    return quat[:, 1:] * np.where(sine > 1e-8, angle / np.maximum(sine, 1e-8), 2.0)


def encode(image: Image, encoding: str = "jpeg") -> bytes:
    """An upright picture as the data set stores it: left and right exchanged, encoded."""
    stored = np.ascontiguousarray(image[:, ::-1])
    if encoding == "jpeg":
        return simplejpeg.encode_jpeg(stored, quality=_JPEG_QUALITY)
    buffer = io.BytesIO()
    PilImage.fromarray(stored).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
