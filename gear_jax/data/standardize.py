"""Raw names, frames, units, signs and colour order -> the canonical Episode, by one declared row.

A row (rows.py) says where each canonical track lies and in which convention; `standard_episode`
does the rest and names every fault. Facts: data.md 3.2 and 3.3.
"""

import numpy as np

from gear_jax import geometry
from gear_jax.data.faults import FaultError, FaultLog
from gear_jax.data.rows import Row
from gear_jax.data.sources.base import RawEpisode, parse_column, read_column
from gear_jax.data.tfrecord import DataError
from gear_jax.types import MAX_JOINTS, Arm, Episode

MAX_INSTRUCTION = 4096  # characters; the longest real ones have some hundred
_MAX_POSITION = 100.0  # metres from the base
_MAX_STEP = 0.75  # metres between steps; no arm moves so fast at 3 Hz
_QUAT_SLACK = 0.02  # of a recorded quaternion's norm
_GRIPPER_SLACK = 0.05


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
