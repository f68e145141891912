import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation, Slerp

from gear_jax import geometry
from gear_jax.data.windows import (
    chunk_times,
    clip_steps,
    gripper_at,
    make_chunks,
    make_window,
    mirror_single_arm,
    poses_at,
    target_poses,
)
from gear_jax.types import ActionSpec, Arm, Episode

SPEC = ActionSpec()
QUARTER = np.pi / 2


def _arm(steps, seed=0, **changes):
    rng = np.random.default_rng(seed)
    turns = Rotation.from_rotvec(np.cumsum(0.2 * rng.standard_normal((steps, 3)), axis=0))
    quat = geometry.continuous_quat(turns.as_quat(scalar_first=True))
    tracks = {
        "ee_pos": np.cumsum(0.02 * rng.standard_normal((steps, 3)), axis=0).astype(np.float32),
        "ee_quat": quat.astype(np.float32),
        "joint_pos": rng.standard_normal((steps, 7)).astype(np.float32),
        "grip_open": rng.random(steps).astype(np.float32),
        "grip_cmd": (np.arange(steps) % 5 > 2).astype(np.float32),
        "grip_held": True,
    }
    return Arm(**(tracks | changes))


def _episode(steps, fps=15.0, arms=None):
    views = {"head": [b"h%d" % i for i in range(steps)], "right_wrist": [b"w"] * steps}
    arms = {"right": _arm(steps)} if arms is None else arms
    return Episode("toy", "episode-1", "robot", steps, fps, "pick", arms, views)


def test_times_and_masks_at_the_end_of_an_episode():
    spec = dataclasses.replace(SPEC, chunk_len=5)
    times, inside = chunk_times(4, 15.0, 1, spec)  # half a step a row; the last step is 3
    assert times.tolist() == [1.5, 2.0, 2.5, 3.0, 3.0]
    assert inside.tolist() == [True, True, True, True, False]
    times, inside = chunk_times(4, 15.0, 3, spec)
    assert times.tolist() == [3.0] * 5
    assert not inside.any()


def test_a_window_in_numbers():
    # one turn of 90 degrees about z and 0.1 m along x of the base, from step 0 to step 1
    quat = Rotation.from_rotvec([[0, 0, 0], [0, 0, QUARTER]]).as_quat(scalar_first=True)
    arm = Arm(
        ee_pos=np.array([[0, 0, 0], [0.1, 0, 0]]),
        ee_quat=quat,
        grip_cmd=np.array([1.0, 0.0]),
        grip_held=True,
    )
    window = make_window(
        _episode(2, 15.0, {"right": arm}), 0, dataclasses.replace(SPEC, chunk_len=3)
    )
    half = np.sqrt(0.5)
    right = [
        [0.05, 0, 0, half, half, 0, -half, half, 0, 1],
        [0.1, 0, 0, 0, 1, 0, -1, 0, 0, 0],
        [0.1, 0, 0, 0, 1, 0, -1, 0, 0, 0],
    ]
    np.testing.assert_allclose(window.action[:, 10:], right, atol=1e-7)
    assert window.action_mask[:, 10:].all(axis=1).tolist() == [True, True, False]
    np.testing.assert_array_equal(window.action[:, :10], [[0, 0, 0, 1, 0, 0, 0, 1, 0, 0]] * 3)
    assert not window.action_mask[:, :10].any()
    assert window.images == {"head": b"h0", "right_wrist": b"w"}
    assert window.state["arm_mask"].tolist() == [False, True]


def test_rotations_between_steps_are_scipys_slerp():
    arm = _arm(20)
    times = np.linspace(0, 19, 77)
    oracle = Slerp(np.arange(20), Rotation.from_quat(arm.ee_quat, scalar_first=True))(times)
    poses = poses_at(arm, times)
    np.testing.assert_allclose(poses[:, :3, :3], oracle.as_matrix(), atol=1e-6)
    for axis in range(3):
        line = np.interp(times, np.arange(20), arm.ee_pos[:, axis])
        np.testing.assert_allclose(poses[:, axis, 3], line, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 60),
    fps=st.sampled_from([3.0, 5.0, 10.0, 12.5, 15.0, 20.0, 30.0, 50.0]),
    place=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_a_chunk_gives_the_track_back_and_nothing_past_the_end_is_unmasked(steps, fps, place, seed):
    step = min(int(place * steps), steps - 1)
    arms = {"left": _arm(steps, seed), "right": _arm(steps, seed + 10)}
    window = make_window(_episode(steps, fps, arms), step, SPEC)
    rows = np.arange(1, 31)
    inside = step + rows * fps / 30 <= steps - 1 + 1e-6
    assert np.array_equal(window.action_mask, np.repeat(inside[:, None], 20, axis=1))
    poses, grippers = target_poses(
        window.action.astype(np.float64), window.state["ee_pose"].astype(np.float64), SPEC
    )
    times = np.minimum(step + rows * fps / 30, steps - 1)
    for index, name in enumerate(("left", "right")):
        np.testing.assert_allclose(poses[index], poses_at(arms[name], times), atol=1e-6)
        held = arms[name].grip_cmd[np.floor(times).astype(int)]
        np.testing.assert_array_equal(grippers[index], held)


def test_a_chunk_does_not_depend_on_the_base_frame():
    arm, base = (
        _arm(30),
        geometry.make_pose(
            np.array([3.0, -2.0, 1.0]), Rotation.from_rotvec([0.3, 2.0, -1.0]).as_matrix()
        ),
    )
    moved = geometry.compose(base, poses_at(arm, np.arange(30.0)))
    quat = geometry.continuous_quat(geometry.rotmat_to_quat(moved[:, :3, :3]))
    other = dataclasses.replace(arm, ee_pos=moved[:, :3, 3], ee_quat=quat)
    one, two = (make_window(_episode(30, arms={"right": a}), 4, SPEC).action for a in (arm, other))
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_a_binary_gripper_is_held_and_a_continuous_one_is_not():
    times = np.array([0.0, 0.5, 1.0, 1.9])
    assert gripper_at(np.array([0.0, 1.0, 0.0]), times, held=True).tolist() == [0, 0, 1, 1]
    between = gripper_at(np.array([0.0, 0.8, 0.0]), times, held=False)
    np.testing.assert_allclose(between, [0, 0.4, 0.8, 0.08])


def test_what_an_arm_does_not_record_is_masked():
    joints_only = _arm(9, ee_pos=None, ee_quat=None)
    window = make_window(_episode(9, arms={"right": joints_only}), 0, SPEC)
    assert not window.action_mask[:, SPEC.dims("right", "position")].any()
    assert not window.action_mask[:, SPEC.dims("right", "rmat6d")].any()
    assert window.action_mask[0, SPEC.dims("right", "gripper")].all()
    assert window.state["joint_mask"].sum(axis=1).tolist() == [0, 7]
    no_gripper = _arm(9, grip_open=None, grip_cmd=None)
    window = make_window(_episode(9, arms={"right": no_gripper}), 0, SPEC)
    assert not window.action_mask[:, SPEC.dims("right", "gripper")].any()
    assert window.action_mask[0, SPEC.dims("right", "position")].all()


def test_a_single_arm_changes_sides_with_its_camera_and_comes_back():
    window = make_window(_episode(9), 2, SPEC)
    moved = mirror_single_arm(window)
    np.testing.assert_array_equal(moved.action[:, :10], window.action[:, 10:])
    np.testing.assert_array_equal(moved.action_mask[:, :10], window.action_mask[:, 10:])
    np.testing.assert_array_equal(moved.state["ee_pose"][0], window.state["ee_pose"][1])
    assert moved.state["arm_mask"].tolist() == [True, False]
    assert set(moved.images) == {"head", "left_wrist"}
    again = mirror_single_arm(moved)
    np.testing.assert_array_equal(again.action, window.action)
    assert again.images == window.images
    both = make_window(_episode(9, arms={"left": _arm(9), "right": _arm(9)}), 2, SPEC)
    with pytest.raises(ValueError, match="only a single arm can change sides"):
        mirror_single_arm(both)


def test_many_windows_at_once_equal_one_at_a_time():
    episodes = [
        _episode(9, 5.0),
        _episode(40, 30.0, {"left": _arm(40, 1), "right": _arm(40, 2, grip_held=False)}),
        _episode(7, arms={}),
        _episode(9, arms={"right": _arm(9, 3, ee_pos=None, ee_quat=None)}),
    ]
    steps = [8, 25, 3, 0]
    action, mask, state = make_chunks(episodes, steps, SPEC)
    for n, (episode, step) in enumerate(zip(episodes, steps, strict=True)):
        window = make_window(episode, step, SPEC)
        np.testing.assert_array_equal(action[n], window.action)
        np.testing.assert_array_equal(mask[n], window.action_mask)
        for key, value in window.state.items():
            np.testing.assert_array_equal(state[key][n], value)


def test_clips_show_a_second_at_5_hz_and_say_what_lies_outside():
    steps, inside = clip_steps(40, 15.0, 20)
    assert steps.tolist() == [20, 23, 26, 29, 32, 35]
    assert inside.all()
    steps, inside = clip_steps(30, 15.0, 20)
    assert steps.tolist() == [20, 23, 26, 29, 29, 29]
    assert inside.tolist() == [True, True, True, False, False]
    assert not clip_steps(30, 3.0, 0)[1].any()


def test_a_step_that_is_not_there_is_refused():
    for step in (-1, 9):
        with pytest.raises(
            IndexError, match=f"step {step} of episode 'episode-1': expected 0 .. 8"
        ):
            make_window(_episode(9), step, SPEC)
