"""What is recorded reads back through row `libero` as what was observed."""

import numpy as np
import pytest

from gear_jax import geometry
from gear_jax.data import images
from gear_jax.data.catalog import DatasetConfig, open_prepared
from gear_jax.data.rlds_writer import RldsWriter
from gear_jax.data.windows import empty_state
from gear_jax.evals.sims import recording
from gear_jax.types import Observation


def _observation(step, rng):
    """A hand that looks down and turns through half a circle, with pictures of noise."""
    state = empty_state()
    turn = geometry.euler_to_rotmat(np.array([0.2 * step - 1, 0.05, np.pi]), "zyx", "intrinsic")
    state["ee_pose"][1] = geometry.make_pose(np.array([0.01 * step, -0.1, 1.1]), turn)
    state["joint_pos"][1, :7] = np.linspace(-1, 1, 7) + 0.01 * step
    state["grip_open"][1] = 1 - 0.1 * step
    for name in ("ee_mask", "grip_mask", "arm_mask"):
        state[name][1] = True
    views = {v: rng.integers(0, 255, (9, 12, 3)).astype(np.uint8) for v in ("head", "right_wrist")}
    return Observation(views, "pick up the bowl", "franka", state)


def _action(step):
    return np.array([0.3, 0, -0.1 * step, 0, 0, 0.2, -1 if step < 3 else 1], np.float32)


def test_what_is_written_reads_back_as_what_was_observed(tmp_path):
    rng = np.random.default_rng(0)
    seen = [_observation(step, rng) for step in range(10)]
    recorder = recording.Recorder("suite/task/init-4", encoding="png")
    for step, observation in enumerate(seen):
        recorder.add(observation, _action(step))
    with RldsWriter(tmp_path, "scripted", recording.columns(encoding="png")) as writer:
        writer.add(recorder.episode())

    config = DatasetConfig(
        str(tmp_path / "scripted/1.0.0"), "libero", str(tmp_path / "work"),
        options={"joint_state": "used"},
    )  # fmt: skip
    episode = open_prepared(config).episode(0)
    arm = episode.arms["right"]
    assert episode.num_steps == 10
    assert episode.fps == 20
    assert episode.instruction == "pick up the bowl"
    assert "suite/task/init-4" in episode.episode_id
    state = {key: np.stack([one.state[key][1] for one in seen]) for key in seen[0].state}
    poses = geometry.make_pose(arm.ee_pos, geometry.quat_to_rotmat(arm.ee_quat))
    np.testing.assert_allclose(poses, state["ee_pose"], atol=2e-6)
    np.testing.assert_allclose(arm.joint_pos, state["joint_pos"][:, :7])
    np.testing.assert_allclose(arm.grip_open, state["grip_open"], atol=1e-6)
    assert arm.grip_cmd.tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    for view in ("head", "right_wrist"):
        for step in (0, 9):
            picture = images.decode(episode.views[view][step])
            np.testing.assert_array_equal(picture, seen[step].images[view])


def test_episodes_carry_the_marks_of_a_success():
    recorder = recording.Recorder("a")
    rng = np.random.default_rng(0)
    for step in range(4):
        recorder.add(_observation(step, rng), _action(step), fingers=(0.03, -0.02))
    episode = recorder.episode()
    assert set(episode) == set(recording.COLUMNS)
    assert episode["steps/is_first"].tolist() == [True, False, False, False]
    assert episode["steps/is_last"].tolist() == [False, False, False, True]
    assert episode["steps/is_terminal"].tolist() == [False, False, False, True]
    assert episode["steps/reward"].tolist() == [0, 0, 0, 1]
    np.testing.assert_allclose(episode["steps/observation/state"][0, 6:], [0.03, -0.02])


def test_no_ops_are_left_out_as_in_the_public_copies():
    still = np.zeros(7, np.float32)
    opening, closing = still.copy(), still.copy()
    opening[6], closing[6] = -1, 1
    moving = opening + np.eye(7, dtype=np.float32)[0] * 2e-4
    assert recording.is_no_op(opening, None)
    assert recording.is_no_op(opening, opening)
    assert not recording.is_no_op(closing, opening)
    assert not recording.is_no_op(moving, opening)
    recorder = recording.Recorder("a")
    rng = np.random.default_rng(0)
    for action in (opening, moving, opening, closing, closing):
        recorder.add(_observation(0, rng), action)
    assert recorder.episode()["steps/action"].tolist() == [moving.tolist(), closing.tolist()]


def test_rotation_vectors_pass_pi_without_a_jump():
    angles = np.linspace(2.8, 3.5, 30)
    axis = np.array([0.6, 0.8, 0.0])
    turns = geometry.rotvec_to_rotmat(angles[:, None] * axis)
    np.testing.assert_allclose(
        recording.continuous_rotvec(turns), angles[:, None] * axis, atol=1e-6
    )
    still = recording.continuous_rotvec(np.eye(3)[None])
    np.testing.assert_array_equal(still, np.zeros((1, 3)))


def test_a_demonstration_without_steps_is_refused():
    with pytest.raises(ValueError, match="'a' has no step"):
        recording.Recorder("a").episode()
