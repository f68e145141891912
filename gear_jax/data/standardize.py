"""Raw names, frames, units, signs and colour order -> the canonical Episode, by one declared row.

A row says where each canonical track lies and in which convention; `standard_episode` does the
rest and names every fault. The rows of public data sets are in standard_rows.py; a row of one's own
is a JSON object with the same fields (`row_from_json`). Facts: data.md 3.2 and 3.3.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from gear_jax import geometry
from gear_jax.data import images as images_lib
from gear_jax.data.embodiments import embodiment
from gear_jax.data.faults import FaultError, FaultLog
from gear_jax.data.kinematics import Kinematics
from gear_jax.data.sources.base import RawEpisode, parse_column, read_column
from gear_jax.data.tfrecord import DataError
from gear_jax.types import MAX_JOINTS, VIEWS, Arm, Episode, Image

MAX_INSTRUCTION = 4096  # characters; the longest real ones have some hundred
_MAX_POSITION = 100.0  # metres from the base
_MAX_STEP = 0.75  # metres between steps; no arm moves so fast at 3 Hz
_QUAT_SLACK = 0.02  # of a recorded quaternion's norm
_GRIPPER_SLACK = 0.05

Rotation = Literal[
    "wxyz", "xyzw", "rotvec", "euler_xyz_extrinsic", "euler_xyz_intrinsic", "euler_zyx_intrinsic"
]


@dataclasses.dataclass(frozen=True)
class Pose:
    """Where an end-effector pose lies: columns, and what their numbers mean.

    Attributes:
        position: column of three numbers.
        rotation: column of three or four numbers.
        convention: how they say a rotation.
        metres: one unit of position in metres.
        turn: rotation matrix, row by row, applied on the right: R_base_ee = R_recorded @ turn.
    """

    position: str
    rotation: str
    convention: Rotation
    metres: float = 1.0
    turn: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Gripper:
    """Where an opening lies, and which numbers are closed and open.

    Attributes:
        column: of one number.
        closed: the number of a closed gripper.
        open: the number of an open one.
        sense: "absolute"; "change": closed and open are commands, anything near their middle keeps
            what was (RT-1); "settle": values between wait for the next settled one (Bridge).
    """

    column: str
    closed: float
    open: float
    sense: Literal["absolute", "change", "settle"] = "absolute"


@dataclasses.dataclass(frozen=True)
class ArmRow:
    """Where one arm's tracks lie; None for what is not recorded.

    Attributes:
        pose: achieved end-effector pose.
        joints: column of joint positions, radians.
        grip_open: achieved opening.
        grip_cmd: commanded opening.
        kinematics: of a robot that records joints only; the user gives the model.
    """

    pose: Pose | None = None
    joints: str | None = None
    grip_open: Gripper | None = None
    grip_cmd: Gripper | None = None
    kinematics: Kinematics | None = None


@dataclasses.dataclass(frozen=True)
class ViewRow:
    """Where one view's images lie.

    Attributes:
        key: of the images.
        present: key of a flag that says whether this episode has them.
        bgr: stored with red and blue exchanged.
        upside_down: stored turned by 180 degrees, or from the bottom row up (`flipped`).
        flipped: rows stored from the bottom up.
    """

    key: str
    present: str | None = None
    bgr: bool = False
    upside_down: bool = False
    flipped: bool = False

    def open(self, raw: RawEpisode, skip: int) -> Sequence[bytes | Image]:
        """Images of this view, RGB and upright, without the first `skip`."""
        images = raw.images(self.key)
        if not (skip or self.bgr or self.upside_down or self.flipped):
            return images
        return _StandardView(images, self, skip)


@dataclasses.dataclass(frozen=True)
class Row:
    """How one data set becomes canonical.

    Attributes:
        name: of the data set.
        embodiment: name in data/embodiments.py.
        fps: steps per second; None where the source itself says it (LeRobot, mp4).
        arms: {arm of `ARMS`: ArmRow}; none for video without actions.
        views: {view of `VIEWS`: ViewRow}.
        instruction: text keys; the first that is not empty counts.
        needs_instruction: leave out episodes without one.
        keep: key of a flag that an episode must have set, such as "success".
        keep_text: (text key, part that it must contain).
        skip_first: steps left out at the beginning.
        clock: key of time stamps, which must grow.
        truth: where each of these facts stands.
    """

    name: str
    embodiment: str
    fps: float | None
    arms: Mapping[str, ArmRow]
    views: Mapping[str, ViewRow]
    instruction: tuple[str, ...] = ()
    needs_instruction: bool = False
    keep: str | None = None
    keep_text: tuple[str, str] | None = None
    skip_first: int = 0
    clock: str | None = None
    truth: str = ""

    def __post_init__(self):
        """Names must be of the house's lists.

        Raises:
            ValueError: unknown arm, view, embodiment, or an arm that the robot does not have.
        """
        faults = [f"view {view!r}, expected {VIEWS}" for view in self.views if view not in VIEWS]
        try:
            robot = embodiment(self.embodiment)
            faults += [
                f"arm {arm!r}, which {robot.name} does not have: expected {list(robot.joints)}"
                for arm in self.arms
                if arm not in robot.joints
            ]
        except KeyError as error:
            faults.append(error.args[0])
        if self.fps is not None and not 0 < self.fps <= 1000:
            faults.append(f"fps {self.fps}, expected 0 .. 1000")
        if faults:
            raise ValueError(f"row {self.name!r}: {'; '.join(faults)}")


def standard_episode(raw: RawEpisode, row: Row, log: FaultLog) -> Episode:
    """The canonical form of one recorded episode.

    Args:
        raw: from any source.
        row: says what its keys mean.
        log: counts what is clamped.

    Returns:
        Episode; its images are read on access.

    Raises:
        FaultError: the policy leaves this episode out.
        DataError: fatal: the row does not fit the data set.
    """
    if raw.num_steps < 1:
        raise FaultError("no_steps", raw.where, "has no steps")
    steps = slice(row.skip_first, None)
    num_steps = raw.num_steps - row.skip_first
    if num_steps < 2:
        raise FaultError("one_step", raw.where, f"has {raw.num_steps} steps, expected more")
    _check_kept(raw, row)
    fps = row.fps if row.fps is not None else raw.fps
    if fps is None:
        raise DataError(f"{raw.where}: the source does not say a rate: row {row.name!r} needs fps")
    if row.clock is not None and (np.diff(_column(raw, row.clock, 1)[:, 0]) <= 0).any():
        step = int(np.argmax(np.diff(_column(raw, row.clock, 1)[:, 0]) <= 0)) + 1
        raise FaultError("time_goes_back", f"{raw.where}, step {step}", "time does not grow")
    views = {
        view: how.open(raw, row.skip_first)
        for view, how in row.views.items()
        if _has_view(raw, how, log)
    }
    return Episode(
        dataset=row.name,
        episode_id=raw.episode_id,
        embodiment=row.embodiment,
        num_steps=num_steps,
        fps=float(fps),
        instruction=_instruction(raw, row),
        arms={name: _arm(raw, how, steps, log) for name, how in row.arms.items()},
        views=views,
    )


def _check_kept(raw, row):
    if row.keep is not None and not np.all(raw.read(row.keep)):
        raise FaultError("not_kept", raw.where, f"{row.keep!r} is not set")
    if row.keep_text is not None:
        key, part = row.keep_text
        if part not in _text(raw, key):
            raise FaultError("not_kept", raw.where, f"{key!r} does not contain {part!r}")


def _instruction(raw, row):
    for key in row.instruction:
        if raw.has(key) and (text := _text(raw, key).strip()):
            if len(text) > MAX_INSTRUCTION:
                what = f"instruction of {len(text)} characters, expected up to {MAX_INSTRUCTION}"
                raise FaultError("long_text", raw.where, what)
            return text
    if row.needs_instruction:
        raise FaultError("no_instruction", raw.where, "has no instruction")
    return ""


def _text(raw, key):
    try:
        return raw.text(key)
    except (UnicodeDecodeError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise FaultError("bad_text", raw.where, f"{key!r} is not UTF-8") from error


def _has_view(raw, how, log):
    """Whether the episode has this view; one that is expected and missing is counted."""
    if raw.has(how.key) and (how.present is None or bool(np.all(raw.read(how.present)))):
        return True
    log.count("missing_view", f"{raw.where}: no images {how.key!r}")
    return False


def _arm(raw, how, steps, log):
    joints = None
    if how.joints is not None:
        joints = _column(raw, how.joints)[steps]
        if joints.shape[1] > MAX_JOINTS:
            raise DataError(
                f"{raw.where}: {how.joints!r} has {joints.shape[1]} joints, at most {MAX_JOINTS}"
            )
    position = quat = None
    if how.pose is not None:
        position, quat = _pose(raw, how.pose, steps)
    elif how.kinematics is not None and joints is not None:
        poses = how.kinematics.poses(joints)
        position, quat = poses[:, :3, 3], geometry.rotmat_to_quat(poses[:, :3, :3])
    if position is not None and quat is not None:
        _check_motion(raw, position, steps.start)
        quat = geometry.continuous_quat(quat)
    opened = how.grip_open and _gripper(raw, how.grip_open, steps, log)
    command = how.grip_cmd and _gripper(raw, how.grip_cmd, steps, log)
    track = command if command is not None else opened
    tracks = {
        "ee_pos": position,
        "ee_quat": quat,
        "joint_pos": joints,
        "grip_open": opened,
        "grip_cmd": command,
    }
    tracks = {k: None if x is None else np.asarray(x, np.float32) for k, x in tracks.items()}
    return Arm(**tracks, grip_held=track is not None and bool(np.isin(track, (0, 1)).all()))


def _column(raw, column, count=None):
    """Numbers of a column, one row per step and all finite."""
    key, _ = parse_column(column)
    if not raw.has(key):
        raise FaultError("missing_key", raw.where, f"key {key!r} is missing")
    values = read_column(raw, column)
    if len(values) != raw.num_steps:
        what = f"key {key!r} has {len(values)} rows, expected {raw.num_steps}"
        raise FaultError("wrong_length", raw.where, what)
    if count is not None and values.shape[1] != count:
        raise DataError(f"{raw.where}: {column!r} has {values.shape[1]} numbers, expected {count}")
    finite = np.isfinite(values).all(1)
    if not finite.all():
        step = int(np.argmin(finite))
        what = f"{column!r} is {values[step].tolist()}, expected finite numbers"
        raise FaultError("not_finite", f"{raw.where}, step {step}", what)
    large = np.abs(values).max(1, initial=0) > 1e6
    if large.any():
        step = int(np.argmax(large))
        what = f"{column!r} is {values[step].tolist()}, expected numbers up to 1e6"
        raise FaultError("out_of_range", f"{raw.where}, step {step}", what)
    return values


def _pose(raw, how, steps):
    """Position in metres and unit quaternion wxyz in the base frame."""
    position = _column(raw, how.position, 3)[steps] * how.metres
    values = _column(raw, how.rotation, 4 if how.convention in ("wxyz", "xyzw") else 3)[steps]
    far = np.abs(position).max(1) > _MAX_POSITION
    if far.any():
        step = int(np.argmax(far))
        what = f"position {position[step].tolist()} m, expected within {_MAX_POSITION} m"
        raise FaultError("out_of_range", f"{raw.where}, step {step + steps.start}", what)
    if how.convention in ("wxyz", "xyzw"):
        norms = np.linalg.norm(values, axis=1)
        bad = np.abs(norms - 1) > _QUAT_SLACK
        if bad.any():
            step = int(np.argmax(bad))
            what = f"quaternion {values[step].tolist()} of norm {norms[step]:.3g}, expected 1"
            raise FaultError("bad_quaternion", f"{raw.where}, step {step + steps.start}", what)
        quat = values / norms[:, None]
        quat = geometry.quat_from_xyzw(quat) if how.convention == "xyzw" else quat
    elif how.convention == "rotvec":
        quat = geometry.rotvec_to_quat(values)
    else:
        _, axes, sense = how.convention.split("_")
        quat = geometry.rotmat_to_quat(geometry.euler_to_rotmat(values, axes, sense))
    if how.turn is not None:
        turn = geometry.rotmat_to_quat(np.reshape(how.turn, (3, 3)).astype(np.float64))
        quat = geometry.quat_multiply(quat, np.broadcast_to(turn, quat.shape))
    return position, quat


def _check_motion(raw, position, first):
    lengths = np.linalg.norm(np.diff(position, axis=0), axis=1)
    if (lengths > _MAX_STEP).any():
        step = int(np.argmax(lengths > _MAX_STEP)) + 1 + first
        what = f"end effector moves {lengths.max():.2f} m in one step, expected up to {_MAX_STEP}"
        raise FaultError("jump", f"{raw.where}, step {step}", what)


def _gripper(raw, how, steps, log):
    """Opening 0 closed .. 1 open."""
    track = _column(raw, how.column, 1)[:, 0]
    opening = (track - how.closed) / (how.open - how.closed)
    if how.sense == "change":
        opening = _changes(opening)
    elif how.sense == "settle":
        opening = _settled(opening)
    opening = opening[steps]
    outside = (opening < -_GRIPPER_SLACK) | (opening > 1 + _GRIPPER_SLACK)
    if outside.any():
        step = int(np.argmax(outside)) + steps.start
        log.count(
            "gripper_range",
            f"{raw.where}, step {step}: {how.column!r} is {track[step]:.4g}, expected "
            f"{how.closed} closed .. {how.open} open [gripper_range]",
        )
    return np.clip(opening, 0, 1)


def _changes(opening):
    """Commands to close (0) or open (1) -> what they lead to; near 0.5 nothing changes.

    Starts open until the first command, as RT-1's readers do.
    """
    said = np.abs(opening - 0.5) > 0.05
    last = np.maximum.accumulate(np.where(said, np.arange(len(opening)), -1))
    return np.where(last < 0, 1.0, (opening[last] > 0.5).astype(float))


def _settled(opening):
    """0 below 0.05, 1 above 0.95; between, what the next settled step says (Bridge)."""
    settled = (opening > 0.95) | (opening < 0.05)
    if not settled.any():
        return (opening > 0.5).astype(float)
    steps = np.arange(len(opening))
    following = np.minimum.accumulate(np.where(settled, steps, len(opening))[::-1])[::-1]
    following = np.where(following == len(opening), steps[settled][-1], following)
    return (opening[following] > 0.5).astype(float)


class _StandardView(Sequence):
    """Images of one view, RGB and upright; decoded only where a correction needs it."""

    def __init__(self, images: Sequence[bytes | Image], how: ViewRow, skip: int):
        self.images, self.how, self.skip = images, how, skip

    def __len__(self) -> int:
        return len(self.images) - self.skip

    def __getitem__(self, step):
        if not 0 <= step < len(self):
            raise IndexError(step)
        image = self.images[step + self.skip]
        how = self.how
        if not (how.bgr or how.upside_down or how.flipped):
            return image
        image = images_lib.decode(image)
        if how.upside_down:
            image = image[::-1, ::-1]
        if how.flipped:
            image = image[::-1]
        return np.ascontiguousarray(image[..., ::-1] if how.bgr else image)


# Choosing and making rows


def choose_row(rows: Mapping[str, Callable[..., Row]], name: str, **options: Any) -> Row:
    """The row of a data set, with its options.

    Args:
        rows: {name: function of its options}.
        name: of the data set.
        **options: what the row leaves open; accepted values are those of its `Literal`s.

    Raises:
        ValueError: unknown data set, option or value, or one that must be given and is not.
    """
    if name not in rows:
        raise ValueError(f"data set {name!r} has no row: expected one of {sorted(rows)}")
    hints = typing.get_type_hints(rows[name])
    hints.pop("return", None)
    needed = set(hints) - set(rows[name].__kwdefaults__ or {})
    faults = [f"option {key!r} is unknown, expected one of {sorted(hints)}"
              for key in options if key not in hints]  # fmt: skip
    faults += [f"option {key!r} must be given" for key in sorted(needed - set(options))]
    for key in set(options) & set(hints):
        accepted = typing.get_args(hints[key])
        if typing.get_origin(hints[key]) is Literal and options[key] not in accepted:
            faults.append(f"option {key!r} is {options[key]!r}, expected one of {accepted}")
    if faults:
        raise ValueError(f"data set {name!r}: {'; '.join(faults)}")
    return rows[name](**options)


def with_kinematics(row: Row, chains: Mapping[str, Kinematics]) -> Row:
    """The same row with forward kinematics for arms that record joints only.

    Raises:
        ValueError: an arm that the row does not have, or that has poses or no joints.
    """
    arms = dict(row.arms)
    for name, chain in chains.items():
        if name not in arms or arms[name].joints is None or arms[name].pose is not None:
            raise ValueError(f"row {row.name!r}: arm {name!r} is not one that records joints only")
        arms[name] = dataclasses.replace(arms[name], kinematics=chain)
    return dataclasses.replace(row, arms=arms)


def row_from_json(stored: Any) -> Row:
    """A row written as JSON: the fields of `Row`, `ArmRow`, `ViewRow`, `Pose`, `Gripper`.

    Raises:
        ValueError: unknown or missing fields, or values of another kind, with their path.
    """
    return _from_json(Row, stored, "row")


def row_to_json(row: Row) -> dict[str, Any]:
    """The inverse of `row_from_json`."""
    return dataclasses.asdict(row)


def _from_json(kind, stored, path):
    """Plain data -> an instance of `kind`, a type annotation of the rows' fields."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if stored is None and type(None) in args:
            return None
        return _from_json(next(a for a in args if a is not type(None)), stored, path)
    if dataclasses.is_dataclass(kind):
        if not isinstance(stored, Mapping):
            raise ValueError(f"{path} is {stored!r}, expected an object")
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(stored) - set(hints))
        if unknown:
            raise ValueError(f"{path}: unknown fields {unknown}, expected some of {list(hints)}")
        values = {k: _from_json(hints[k], v, f"{path}.{k}") for k, v in stored.items()}
        try:
            return typing.cast(Any, kind)(**values)
        except TypeError as error:
            raise ValueError(f"{path}: {error}") from error
    if origin is Literal:
        if stored not in args:
            raise ValueError(f"{path} is {stored!r}, expected one of {args}")
        return stored
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(stored, Mapping):
            raise ValueError(f"{path} is {stored!r}, expected an object")
        return {k: _from_json(args[1], v, f"{path}.{k}") for k, v in stored.items()}
    if origin is tuple:
        if not isinstance(stored, Sequence) or isinstance(stored, str):
            raise ValueError(f"{path} is {stored!r}, expected a list")
        kinds = args[:1] * len(stored) if args[-1] is ... else args
        if len(kinds) != len(stored):
            raise ValueError(f"{path} has {len(stored)} entries, expected {len(kinds)}")
        return tuple(_from_json(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, stored, strict=True)))  # fmt: skip # noqa: E501
    if kind is float and type(stored) is int:
        return float(stored)
    if not isinstance(stored, kind) or (kind is not bool and isinstance(stored, bool)):
        raise ValueError(f"{path} is {stored!r}, expected {kind.__name__}")
    return stored
