"""One step of an episode -> the chunk of motion that follows it, and back.

Tracks at a data set's own rate (3 to 50 Hz) are resampled to the chunk's 30 Hz: positions on
straight lines, rotations on shortest arcs, continuous grippers linearly, binary ones held. Every
pose of a chunk is relative to the same end effector, that of the current step, so a chunk does not
depend on where a robot's base stands (GEAR-VLA eq. 4-5). Decisions: systems.md 2.1 and 2.4, data.md
3.3.
"""

import dataclasses
from collections.abc import Sequence
from typing import cast

import numpy as np

from gear_jax import geometry
from gear_jax.types import ARMS, MAX_JOINTS, ActionSpec, Episode, State, Window

MIRRORED_VIEWS = {"left_wrist": "right_wrist", "right_wrist": "left_wrist"}

_NO_TURN = (1, 0, 0, 0, 1, 0)  # the identity as rmat6d, by columns and by rows
_EDGE = 1e-6  # steps; a time this close to the last step is still inside the episode


def make_window(episode: Episode, step: int, spec: ActionSpec) -> Window:
    """The present of one step and the chunk that follows.

    Args:
        episode: in standard form.
        step: t, 0 .. num_steps - 1.
        spec: rate, length and layout of the chunk.

    Returns:
        Window; its images are still encoded. A single arm is where the episode has it, "right".

    Raises:
        IndexError: no such step.
    """
    action, mask, state = make_chunks([episode], [step], spec)
    return Window(
        dataset=episode.dataset,
        episode_id=episode.episode_id,
        embodiment=episode.embodiment,
        step=step,
        instruction=episode.instruction,
        images={view: images[step] for view, images in episode.views.items()},
        state=cast(State, {key: cast(np.ndarray, value)[0] for key, value in state.items()}),
        action=action[0],
        action_mask=mask[0],
    )


def make_chunks(
    episodes: Sequence[Episode], steps: Sequence[int], spec: ActionSpec
) -> tuple[np.ndarray, np.ndarray, State]:
    """The numbers of many windows at once; what is drawn from disk is only the rows they need.

    Args:
        episodes: n of them, perhaps the same ones again.
        steps: t of each.
        spec: rate, length and layout of the chunks.

    Returns:
        action float32[n, A, a], mask bool[n, A, a], State with a leading n; as in `Window`.

    Raises:
        IndexError: no such step.
    """
    for episode, step in zip(episodes, steps, strict=True):
        if not 0 <= step < episode.num_steps:
            raise IndexError(f"step {step} of episode {episode.episode_id!r}: expected 0 .. "
                             f"{episode.num_steps - 1}")  # fmt: skip
    now = np.asarray(steps, np.float64)[:, None]
    last = np.array([episode.num_steps - 1 for episode in episodes])[:, None]
    fps = np.array([episode.fps for episode in episodes])[:, None]
    times, inside = chunk_times(last + 1, fps, now, spec)
    rows = np.concatenate([now, times], axis=1)
    before = np.floor(rows).astype(int)
    after, fraction = np.minimum(before + 1, last), rows - before
    action = np.zeros((len(rows), spec.chunk_len, spec.action_dim), np.float32)
    mask = np.zeros(action.shape, bool)
    state = empty_state((len(rows),))
    for index, name in enumerate(ARMS):
        arms = [(n, e.arms[name]) for n, e in enumerate(episodes) if name in e.arms]
        state["arm_mask"][[n for n, _ in arms], index] = True
        action[..., spec.dims(name, "rmat6d")] = _NO_TURN
        posed = [(n, arm) for n, arm in arms if arm.ee_pos is not None and arm.ee_quat is not None]
        if posed:
            which = [n for n, _ in posed]
            start, end, first, second = (
                np.stack([getattr(arm, field)[side[n]] for n, arm in posed])
                for field in ("ee_pos", "ee_quat")
                for side in (before, after)
            )
            position, quat = interpolate(start, end, first, second, fraction[which])
            R_now = geometry.quat_to_rotmat(quat[:, 0])
            turn = geometry.quat_multiply(geometry.quat_conjugate(quat[:, :1]), quat[:, 1:])
            rotation = geometry.quat_to_rotmat(turn)
            # geometry.relative_chunk, in the quaternions that tracks are made of (eq. 4)
            action[which, :, spec.dims(name, "position")] = (
                position[:, 1:] - position[:, :1]
            ) @ R_now
            action[which, :, spec.dims(name, "rmat6d")] = geometry.rotmat_to_rmat6d(
                rotation, by=spec.rmat6d
            )
            mask[which, :, spec.dims(name, "position")] = inside[which, :, None]
            mask[which, :, spec.dims(name, "rmat6d")] = inside[which, :, None]
            state["ee_pose"][which, index, :3, :3] = R_now
            state["ee_pose"][which, index, :3, 3] = position[:, 0]
            state["ee_mask"][which, index] = True
        for n, arm in arms:
            track = arm.grip_cmd if arm.grip_cmd is not None else arm.grip_open
            if track is not None:
                opening = gripper_at(track, times[n], held=arm.grip_held)
                action[n, :, spec.dims(name, "gripper")] = opening[:, None]
                mask[n, :, spec.dims(name, "gripper")] = inside[n, :, None]
            if arm.joint_pos is not None:
                joints = arm.joint_pos[steps[n]]
                state["joint_pos"][n, index, : len(joints)] = joints
                state["joint_mask"][n, index, : len(joints)] = True
            if arm.grip_open is not None:
                state["grip_open"][n, index] = arm.grip_open[steps[n]]
                state["grip_mask"][n, index] = True
    return action, mask, state


def chunk_times(num_steps, fps, step, spec):
    """When the rows of a chunk are, in steps of the episode; arguments broadcast against [A].

    Returns:
        times float64[..., A], step + (i + 1) * fps / rate_hz, held at the last step; inside
        bool[..., A], False past the last step.
    """
    times = step + np.arange(1, spec.chunk_len + 1) * (fps / spec.rate_hz)
    inside = times <= num_steps - 1 + _EDGE
    return np.minimum(times, num_steps - 1), inside


def interpolate(start, end, first, second, fraction):
    """Between two poses: positions on the line, rotations on the shortest arc.

    Args:
        start: float[..., 3], metres, at fraction 0.
        end: float[..., 3], at fraction 1.
        first: float[..., 4], unit quaternion wxyz, at fraction 0.
        second: float[..., 4], at fraction 1.
        fraction: float[...].

    Returns:
        float64[..., 3] and float64[..., 4].
    """
    start, first, second = (x.astype(np.float64) for x in (start, first, second))
    return start + (end - start) * fraction[..., None], geometry.slerp(first, second, fraction)


def poses_at(arm, times):
    """T_base_ee at times float[n], in steps, of an `Arm` with poses: float64[n, 4, 4]."""
    before = np.floor(times).astype(int)
    after = np.minimum(before + 1, len(arm.ee_pos) - 1)
    start, end = arm.ee_pos[before], arm.ee_pos[after]
    first, second = arm.ee_quat[before], arm.ee_quat[after]
    position, quat = interpolate(start, end, first, second, times - before)
    return geometry.make_pose(position, geometry.quat_to_rotmat(quat))


def gripper_at(track, times, *, held):
    """Opening at times float[n], in steps: `held` from the step before, or linear between steps."""
    before = np.floor(times).astype(int)
    start = np.asarray(track[before], np.float64)
    if held:
        return start
    end = track[np.minimum(before + 1, len(track) - 1)]
    return start + (end - start) * (times - before)


def empty_state(lead: tuple[int, ...] = ()) -> State:
    """States without arms, with leading axes `lead`."""
    arms = len(ARMS)
    return {
        "ee_pose": np.tile(np.eye(4, dtype=np.float32), (*lead, arms, 1, 1)),
        "ee_mask": np.zeros((*lead, arms), bool),
        "joint_pos": np.zeros((*lead, arms, MAX_JOINTS), np.float32),
        "joint_mask": np.zeros((*lead, arms, MAX_JOINTS), bool),
        "grip_open": np.zeros((*lead, arms), np.float32),
        "grip_mask": np.zeros((*lead, arms), bool),
        "arm_mask": np.zeros((*lead, arms), bool),
    }


def mirror_rows(action, mask, state, rows):
    """Exchange left and right in some rows of what `make_chunks` made, in place.

    Nothing is reflected: poses are relative to the arm itself. Which single-arm samples are moved
    is the pipeline's draw, one in two (systems.md 2.1); their views follow `MIRRORED_VIEWS`.
    """
    half = action.shape[-1] // 2
    for array in (action, mask):
        array[rows] = np.roll(array[rows], half, axis=-1)
    for array in state.values():
        array[rows] = array[rows][:, ::-1]


def mirror_single_arm(window: Window) -> Window:
    """The same window with a single arm, and its wrist camera, on the other side.

    Raises:
        ValueError: the window has two arms or none.
    """
    if window.state["arm_mask"].sum() != 1:
        raise ValueError(
            f"episode {window.episode_id!r} has arms {window.state['arm_mask'].tolist()}: only a "
            "single arm can change sides"
        )
    action, mask = window.action[None].copy(), window.action_mask[None].copy()
    state = {key: np.array([value]) for key, value in window.state.items()}
    mirror_rows(action, mask, state, [0])
    return dataclasses.replace(
        window,
        images={MIRRORED_VIEWS.get(view, view): image for view, image in window.images.items()},
        state=cast(State, {key: cast(np.ndarray, value)[0] for key, value in state.items()}),
        action=action[0],
        action_mask=mask[0],
    )


def target_poses(action, ee_pose, spec: ActionSpec):
    """Absolute targets of a chunk: the inverse of `make_window`.

    Args:
        action: float[..., A, a], in the units of `spec`.
        ee_pose: float[..., R, 4, 4], T_base_ee of both arms when the chunk was asked for.
        spec: the layout.

    Returns:
        poses float[..., R, A, 4, 4], T_base_ee, metres; grippers float[..., R, A], 0 closed .. 1
        open.
    """
    poses, grippers = [], []
    for index, name in enumerate(spec.arms):
        rotation = geometry.rmat6d_to_rotmat(action[..., spec.dims(name, "rmat6d")], by=spec.rmat6d)
        chunk = geometry.make_pose(action[..., spec.dims(name, "position")], rotation)
        poses.append(geometry.absolute_chunk(ee_pose[..., index, :, :], chunk))
        grippers.append(action[..., spec.dims(name, "gripper")][..., 0])
    return np.stack(poses, axis=-4), np.stack(grippers, axis=-2)


def clip_steps(num_steps, fps, step, *, num_frames=6, rate_hz=5.0):
    """Which steps the latent-action tokenizer's clip shows (systems.md 2.4).

    Returns:
        steps int[num_frames], the nearest to step + k * fps / rate_hz, held at the last step;
        inside bool[num_frames - 1], transitions within the episode; none when the episode is slower
        than the clip, since its frames would repeat.
    """
    times = np.rint(step + np.arange(num_frames) * (fps / rate_hz)).astype(int)
    inside = (times[1:] <= num_steps - 1) & (fps >= rate_hz)
    return np.minimum(times, num_steps - 1), inside
