"""One step of an episode -> the chunk of motion that follows it, and back.

Tracks at a data set's own rate (3 to 50 Hz) are resampled to the chunk's 30 Hz: positions on
straight lines, rotations on shortest arcs, continuous grippers linearly, binary ones held. Every
pose of a chunk is relative to the same end effector, that of the current step, so a chunk does not
depend on where a robot's base stands (GEAR-VLA eq. 4-5). Decisions: systems.md 2.1 and 2.4, data.md
3.3.
"""

import dataclasses
from typing import cast

import numpy as np

from gear_jax import geometry
from gear_jax.types import ARM_PARTS, ARMS, MAX_JOINTS, ActionSpec, Arm, Episode, State, Window

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
    if not 0 <= step < episode.num_steps:
        raise IndexError(f"step {step} of episode {episode.episode_id!r}: expected 0 .. "
                         f"{episode.num_steps - 1}")  # fmt: skip
    times, inside = chunk_times(episode.num_steps, episode.fps, step, spec)
    action = np.zeros((spec.chunk_len, spec.action_dim), np.float32)
    mask = np.zeros(action.shape, bool)
    for name in ARMS:
        arm = episode.arms.get(name, Arm())
        has_pose = arm.ee_pos is not None and arm.ee_quat is not None
        poses = np.broadcast_to(np.eye(4), (spec.chunk_len, 4, 4))
        if has_pose:
            now = poses_at(arm, np.array([float(step)]))[0]
            poses = geometry.relative_chunk(now, poses_at(arm, times))
        action[:, spec.dims(name, "position")] = poses[:, :3, 3]
        action[:, spec.dims(name, "rmat6d")] = geometry.rotmat_to_rmat6d(
            poses[:, :3, :3], by=spec.rmat6d
        )
        track = arm.grip_cmd if arm.grip_cmd is not None else arm.grip_open
        if track is not None:
            action[:, spec.dims(name, "gripper")] = gripper_at(track, times)[:, None]
        for part in ARM_PARTS:
            present = track is not None if part == "gripper" else has_pose
            mask[:, spec.dims(name, part)] = (inside & present)[:, None]
    return Window(
        dataset=episode.dataset,
        episode_id=episode.episode_id,
        embodiment=episode.embodiment,
        step=step,
        instruction=episode.instruction,
        images={view: images[step] for view, images in episode.views.items()},
        state=state_at(episode, step),
        action=action,
        action_mask=mask,
    )


def chunk_times(num_steps, fps, step, spec):
    """When the rows of a chunk are, in steps of the episode.

    Returns:
        times float64[A], step + (i + 1) * fps / rate_hz, held at the last step; inside bool[A],
        False past the last step.
    """
    times = step + np.arange(1, spec.chunk_len + 1) * (fps / spec.rate_hz)
    inside = times <= num_steps - 1 + _EDGE
    return np.minimum(times, num_steps - 1), inside


def poses_at(arm, times):
    """T_base_ee at times float[n], in steps, of an `Arm` with poses: float64[n, 4, 4]."""
    before = np.floor(times).astype(int)
    after = np.minimum(before + 1, len(arm.ee_pos) - 1)
    fraction = times - before
    position = np.asarray(arm.ee_pos, np.float64)
    quat = np.asarray(arm.ee_quat, np.float64)
    position = position[before] + (position[after] - position[before]) * fraction[:, None]
    rotation = geometry.quat_to_rotmat(geometry.slerp(quat[before], quat[after], fraction))
    return geometry.make_pose(position, rotation)


def gripper_at(track, times):
    """Opening at times float[n], in steps: a track of only 0 and 1 is held, any other is linear."""
    before = np.floor(times).astype(int)
    if np.isin(track, (0, 1)).all():
        return np.asarray(track, np.float64)[before]
    return np.interp(times, np.arange(len(track)), track)


def state_at(episode, step) -> State:
    """Proprioception at one step; what an arm does not record is masked, its pose the identity."""
    state = empty_state()
    for index, name in enumerate(ARMS):
        arm = episode.arms.get(name)
        if arm is None:
            continue
        state["arm_mask"][index] = True
        if arm.ee_pos is not None and arm.ee_quat is not None:
            state["ee_pose"][index] = poses_at(arm, np.array([float(step)]))[0]
        if arm.joint_pos is not None:
            joints = arm.joint_pos[step]
            state["joint_pos"][index, : len(joints)] = joints
            state["joint_mask"][index, : len(joints)] = True
        if arm.grip_open is not None:
            state["grip_open"][index] = arm.grip_open[step]
    return state


def empty_state() -> State:
    """A state without arms."""
    arms = len(ARMS)
    return {
        "ee_pose": np.tile(np.eye(4, dtype=np.float32), (arms, 1, 1)),
        "joint_pos": np.zeros((arms, MAX_JOINTS), np.float32),
        "joint_mask": np.zeros((arms, MAX_JOINTS), bool),
        "grip_open": np.zeros(arms, np.float32),
        "arm_mask": np.zeros(arms, bool),
    }


def mirror_single_arm(window: Window, spec: ActionSpec) -> Window:
    """The same window with a single arm, and its wrist camera, on the other side.

    Nothing is reflected: poses are relative to the arm itself. Which samples are moved is the
    pipeline's draw, one in two (systems.md 2.1).

    Raises:
        ValueError: the window has two arms or none.
    """
    if window.state["arm_mask"].sum() != 1:
        raise ValueError(
            f"episode {window.episode_id!r} has arms {window.state['arm_mask'].tolist()}: only a "
            "single arm can change sides"
        )
    half = spec.action_dim // 2
    other = {"left_wrist": "right_wrist", "right_wrist": "left_wrist"}
    return dataclasses.replace(
        window,
        images={other.get(view, view): image for view, image in window.images.items()},
        state=cast(State, {key: np.asarray(x)[::-1] for key, x in window.state.items()}),
        action=np.roll(window.action, half, axis=1),
        action_mask=np.roll(window.action_mask, half, axis=1),
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
