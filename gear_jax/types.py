"""The data contract: what each arrow of the pipeline carries, with axes, units and frames.

    record -> Episode -> Window -> Example -> Batch -> train step
    robot, simulator -> Observation -> Policy -> action chunk

Axes: E episode steps, V views (`VIEWS`), R arms (`ARMS`), J joints (`MAX_JOINTS`), A chunk steps, a
action dims, T tokens, M latent tokens, B batch, H and W pixels. Metres, radians, seconds;
quaternions wxyz; images are RGB; gripper 0 closed .. 1 open; `T_base_ee` reads "ee in base", the
base being the robot's own. Masks are True where there is something real; what they hide is zero,
except that a hidden pose is the identity.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict

import numpy as np

VIEWS = ("head", "left_wrist", "right_wrist")
ARMS = ("left", "right")
MAX_JOINTS = 8  # of one arm, gripper not counted

# One arm's share of an action: which entries are what.
ARM_PARTS = {"position": slice(0, 3), "rmat6d": slice(3, 9), "gripper": slice(9, 10)}
ARM_DIM = 10

Image = np.ndarray  # uint8[H, W, 3], RGB


@dataclasses.dataclass(frozen=True, eq=False)
class Arm:
    """One arm's tracks over an episode; None where the data set has none.

    Attributes:
        ee_pos: float32[E, 3], end effector in the base frame, metres.
        ee_quat: float32[E, 4], end effector in the base frame, unit wxyz, signs continuous.
        joint_pos: float32[E, n], radians, base to wrist, n <= MAX_JOINTS; without the gripper.
        grip_open: float32[E], achieved opening, 0 closed .. 1 open.
        grip_cmd: float32[E], commanded opening, 0 closed .. 1 open.
        grip_held: the chunk's gripper track is only 0 or 1 all episode long: held between steps,
            not interpolated.
    """

    ee_pos: np.ndarray | None = None
    ee_quat: np.ndarray | None = None
    joint_pos: np.ndarray | None = None
    grip_open: np.ndarray | None = None
    grip_cmd: np.ndarray | None = None
    grip_held: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Episode:
    """One demonstration in standard form, at the data set's own rate; images stay encoded.

    Attributes:
        dataset: name in the standardisation table.
        episode_id: unique within the data set.
        embodiment: name in data/embodiments.py.
        num_steps: E.
        fps: steps per second.
        instruction: raw text; "" if there is none.
        arms: of `ARMS`; a single-arm robot is "right", video without actions has none.
        views: of `VIEWS`; E images each, read on access, encoded or as uint8[H, W, 3]. The wrist
            camera of a single-arm robot is "right_wrist".
    """

    dataset: str
    episode_id: str
    embodiment: str
    num_steps: int
    fps: float
    instruction: str
    arms: Mapping[str, Arm]
    views: Mapping[str, Sequence[bytes | Image]]


class State(TypedDict):
    """Proprioception at one time, in physical units."""

    ee_pose: np.ndarray  # float32[R, 4, 4], T_base_ee, metres
    ee_mask: np.ndarray  # bool[R]
    joint_pos: np.ndarray  # float32[R, J], radians
    joint_mask: np.ndarray  # bool[R, J]
    grip_open: np.ndarray  # float32[R], 0 closed .. 1 open
    grip_mask: np.ndarray  # bool[R]
    arm_mask: np.ndarray  # bool[R]


class NormalizedState(TypedDict):
    """Proprioception as the state projector reads it, by the embodiment's statistics."""

    ee: np.ndarray  # float32[R, 9], position -1 .. 1, then rmat6d by columns, base frame
    ee_mask: np.ndarray  # bool[R]
    joints: np.ndarray  # float32[R, J + 1], -1 .. 1, gripper opening last
    joint_mask: np.ndarray  # bool[R, J + 1]
    arm_mask: np.ndarray  # bool[R]


@dataclasses.dataclass(frozen=True, eq=False)
class Window:
    """What one step t of an episode teaches: the present and the following chunk.

    Attributes:
        dataset: as in Episode.
        episode_id: as in Episode.
        embodiment: as in Episode.
        step: t, index into the episode, 0 .. E-1.
        instruction: as in Episode.
        images: views present at t; encoded or uint8[H, W, 3].
        state: at t.
        action: float32[A, a] in the units of `ActionSpec`, not normalised; poses relative to the
            end effector at t (GEAR-VLA eq. 4), at t + 1/30 .. t + A/30 s. Past the episode's end
            the last pose is repeated.
        action_mask: bool[A, a], False past the episode's end, for an absent arm, and for a
            dimension that the data set does not record.
    """

    dataset: str
    episode_id: str
    embodiment: str
    step: int
    instruction: str
    images: Mapping[str, bytes | Image]
    state: State
    action: np.ndarray
    action_mask: np.ndarray


class Example(TypedDict):
    """A window as numbers: decoded, resized, augmented, normalised; no batch axis, no tokens."""

    images: np.ndarray  # uint8[V, H, W, 3], RGB, H = W = 448; zeros where view_mask is False
    view_mask: np.ndarray  # bool[V]
    instruction: str
    embodiment_id: int  # index in data/embodiments.py
    state: NormalizedState
    action: np.ndarray  # float32[A, a], normalised: gripper -1 closed .. 1 open
    action_mask: np.ndarray  # bool[A, a]
    latent_ids: NotRequired[np.ndarray]  # int32[5, 4], transition by code, 0 .. 15
    latent_mask: NotRequired[np.ndarray]  # bool[5], transitions inside the episode
    ref_image: NotRequired[np.ndarray]  # uint8[H, W, 3], RGB: the marked first frame


class Batch(TypedDict):
    """What a train step reads; data/sequences.py makes the token rows. Text-only rows drop views.

    The keys that `systems/vlm.py` names mean the same here.
    """

    tokens: np.ndarray  # int32[B, T]
    positions: np.ndarray  # int32[3, B, T], m-rope: time, row, column
    segments: np.ndarray  # int32[B, T], 0 padding, 1 the sequence
    labels: np.ndarray  # int32[B, T], the token itself, or losses.IGNORE
    row_groups: np.ndarray  # int32[B, T], as query: context or action prediction
    col_groups: np.ndarray  # int32[B, T], as key: other, head, wrist, state or ref
    latent_index: NotRequired[np.ndarray]  # int32[B, M], where in the row the latent tokens stand
    insert_index: np.ndarray  # int32[B, T], row of the visual and state embeddings, -1 for text
    embodiment_id: np.ndarray  # int32[B]
    images: NotRequired[np.ndarray]  # uint8[B, V, H, W, 3], RGB
    view_mask: NotRequired[np.ndarray]  # bool[B, V]
    ref_image: NotRequired[np.ndarray]  # uint8[B, H, W, 3], RGB
    ref_mask: NotRequired[np.ndarray]  # bool[B]
    state: NotRequired[NormalizedState]  # arrays with a leading B
    action: NotRequired[np.ndarray]  # float32[B, A, a], normalised
    action_mask: NotRequired[np.ndarray]  # bool[B, A, a]


@dataclasses.dataclass(frozen=True, eq=False)
class Observation:
    """What a robot or simulator hands to the policy.

    Attributes:
        images: views present; uint8[H, W, 3], RGB, any size.
        instruction: raw text.
        embodiment: name in data/embodiments.py.
        state: now; the answer's poses are relative to `state["ee_pose"]`.
        ref_image: uint8[H, W, 3], RGB, the marked first frame of a mask-guided policy, or None.
    """

    images: Mapping[str, Image]
    instruction: str
    embodiment: str
    state: State
    ref_image: Image | None = None


@dataclasses.dataclass(frozen=True)
class ActionSpec:
    """What the numbers of an action chunk float32[A, a] mean (GEAR-VLA eq. 4-5).

    Per arm [dx, dy, dz, r6(6), g]: `ARM_PARTS`; the left arm's ten come first. Row i is the target
    at (i + 1) / rate_hz seconds from now; every pose is relative to the same, current end effector.
    A spec is plain JSON: `ActionSpec(**json.loads(text)) == spec` after `dataclasses.asdict`.

    Attributes:
        chunk_len: A.
        action_dim: a, ten per arm.
        rate_hz: rows per second.
        arms: order of the arms.
        rmat6d: "columns" or "rows" of the rotation matrix.
        frame: of position and rotation.
        position_unit: of dx, dy, dz.
        gripper: sense of g.

    Raises:
        ValueError: all faults in one sentence.
    """

    chunk_len: int = 30
    action_dim: int = 20
    rate_hz: float = 30.0
    arms: tuple[str, ...] = ARMS
    rmat6d: str = "columns"
    frame: str = "relative to current end effector"
    position_unit: str = "metre"
    gripper: str = "0 closed, 1 open"

    def __post_init__(self):
        """Check every field; lists become tuples and whole rates floats, for equal digests."""
        faults = []
        if type(self.chunk_len) is not int or self.chunk_len < 1:
            faults.append(f"chunk_len is {self.chunk_len!r}, expected a positive int")
        if type(self.rate_hz) not in (int, float) or not 0 < self.rate_hz < math.inf:
            faults.append(f"rate_hz is {self.rate_hz!r}, expected a positive finite number")
        else:
            object.__setattr__(self, "rate_hz", float(self.rate_hz))
        if isinstance(self.arms, list):
            object.__setattr__(self, "arms", tuple(self.arms))
        for field, accepted in {
            "action_dim": (ARM_DIM * len(ARMS),),
            "arms": (ARMS,),
            "rmat6d": ("columns", "rows"),
            "frame": ("relative to current end effector",),
            "position_unit": ("metre",),
            "gripper": ("0 closed, 1 open",),
        }.items():
            value = getattr(self, field)
            if not any(type(value) is type(one) and value == one for one in accepted):
                one_of = " or ".join(repr(one) for one in accepted)
                faults.append(f"{field} is {value!r}, expected {one_of}")
        if faults:
            raise ValueError(f"ActionSpec: {'; '.join(faults)}")

    def dims(self, arm, part):
        """Slice of the action dims that hold one part (a key of `ARM_PARTS`) of one arm."""
        start = self.arms.index(arm) * ARM_DIM
        part = ARM_PARTS[part]
        return slice(start + part.start, start + part.stop)

    def digest(self):
        """Hex sha256 over canonical JSON: equal specs, equal digests, on any machine."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
