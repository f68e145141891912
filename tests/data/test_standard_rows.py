import inspect

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from gear_jax.data.faults import FaultError, FaultLog
from gear_jax.data.images import decode
from gear_jax.data.rows import choose_row
from gear_jax.data.sources.hdf5 import Hdf5Source
from gear_jax.data.sources.lerobot import LeRobotSource
from gear_jax.data.sources.rlds import RldsSource
from gear_jax.data.standard_rows import ROWS
from gear_jax.data.standardize import standard_episode
from gear_jax.data.tfrecord_index import build
from tests.data.raw import Raw
from tests.data.sources.test_hdf5 import write_agibot, write_libero, write_robomind

NEEDED = {"agibot_world": {"gripper_open_mm": 120.0}, "galaxea": {"fps": 15.0}}
T = 4
OBS = "steps/observation/"


def _row(name, **options):
    return choose_row(ROWS, name, **(NEEDED.get(name, {}) | options))


def _standard(name, raw, **options):
    return standard_episode(raw, _row(name, **options), FaultLog())


def _tiled(*values):
    return np.tile(np.array(values, float), (T, 1))


def _rotation(arm, step=0):
    return Rotation.from_quat(arm.ee_quat[step], scalar_first=True)


@pytest.mark.parametrize("name", ROWS)
def test_every_row_says_its_source_of_truth_and_its_choices(name):
    row = _row(name)
    assert row.name == name
    assert row.truth
    assert set(row.views) <= {"head", "left_wrist", "right_wrist"}
    for parameter in inspect.signature(ROWS[name]).parameters.values():
        assert parameter.kind is parameter.KEYWORD_ONLY


def test_options_are_checked():
    with pytest.raises(ValueError, match="'nope' has no row: expected one of"):
        choose_row(ROWS, "nope")
    with pytest.raises(ValueError, match="option 'grip' is unknown, expected one of"):
        choose_row(ROWS, "taco_play", grip="x")
    with pytest.raises(ValueError, match="option 'gripper' is 'x', expected one of"):
        choose_row(ROWS, "taco_play", gripper="x")
    with pytest.raises(ValueError, match="option 'fps' must be given"):
        choose_row(ROWS, "galaxea")


def test_bridge_turns_rotations_back_from_the_default_pose_and_settles_the_gripper():
    state = np.tile([0.3, 0.0, 0.2, 0.0, 0.0, 0.5, 0.9], (6, 1))
    action = np.zeros((6, 7))
    action[:, 6] = [0, 1, 1, 0.5, 0.02, 0]
    raw = Raw(
        6,
        {f"{OBS}state": state, "steps/action": action},
        {"steps/language_instruction": "put carrot on plate"},
        {f"{OBS}image_0": [b"%d" % i for i in range(6)]},
    )
    episode = _standard("bridge_dataset", raw)
    assert (episode.num_steps, episode.fps) == (5, 5.0)  # the first step is left out
    assert list(episode.views["head"]) == [b"1", b"2", b"3", b"4", b"5"]
    arm = episode.arms["right"]
    assert arm.grip_cmd.tolist() == [1, 1, 0, 0, 0]  # 0.5 waits for the next settled one
    assert arm.grip_held
    turn = np.array([[0, 0, 1], [0, 1, 0], [-1, 0, 0]])
    wanted = Rotation.from_euler("xyz", [0, 0, 0.5]).as_matrix() @ turn
    np.testing.assert_allclose(_rotation(arm).as_matrix(), wanted, atol=1e-6)
    plain = _standard("bridge_dataset", raw, frame="top_down").arms["right"]
    np.testing.assert_allclose(_rotation(plain).as_rotvec(), [0, 0, 0.5], atol=1e-6)
    raw.texts = {"steps/language_instruction": " "}
    with pytest.raises(FaultError, match="no_instruction"):
        _standard("bridge_dataset", raw)


def _absolute(quat):
    return np.concatenate([_tiled(0.5, 0.1, 0.2), np.tile(quat, (T, 1))], axis=1)


def test_fractal_reads_xyzw_and_gripper_commands_as_changes():
    raw = Raw(
        T,
        {
            f"{OBS}base_pose_tool_reached": _absolute([0, 0, 1.0, 0]),
            f"{OBS}gripper_closed": np.ones((T, 1)),
            "steps/action/gripper_closedness_action": np.array([[0.0], [1], [0], [-1]]),
        },
        {f"{OBS}natural_language_instruction": "pick"},
        {f"{OBS}image": [b""] * T},
    )
    arm = _standard("fractal20220817_data", raw).arms["right"]
    np.testing.assert_allclose(np.abs(_rotation(arm).as_rotvec()), [0, 0, np.pi], atol=1e-6)
    assert arm.grip_cmd.tolist() == [1, 0, 0, 1]  # open at the start; 0 keeps
    assert arm.grip_open.tolist() == [0, 0, 0, 0]  # the state says closed


def test_kuka_keeps_successful_episodes_only():
    state = f"{OBS}clip_function_input/base_pose_tool_reached"
    numbers = {
        state: _absolute([0, 0, 0, 1.0]),
        f"{OBS}gripper_closed": np.zeros((T, 1)),
        "steps/action/gripper_closedness_action": np.zeros((T, 1)),
        "success": np.array([True]),
    }
    raw = Raw(T, numbers, pictures={f"{OBS}image": [b""] * T})
    assert _standard("kuka", raw).instruction == ""
    raw.numbers["success"] = np.array([False])
    with pytest.raises(FaultError, match="'success' is not set"):
        _standard("kuka", raw)


def test_taco_reads_the_gripper_at_index_6_and_joints_behind_it():
    obs = np.zeros((T, 15))
    obs[:, 3:6] = [0.1, 0.2, 0.3]
    obs[:, 6] = 0.5 / 12.3843
    obs[:, 7:14] = np.arange(7)
    obs[:, 14] = [-1, -1, 1, 1]
    raw = Raw(T, {f"{OBS}robot_obs": obs}, {}, {})
    arm = _standard("taco_play", raw).arms["right"]
    np.testing.assert_allclose(arm.grip_open, 0.5, atol=1e-6)
    assert arm.grip_cmd.tolist() == [1, 1, 0, 0]
    assert arm.joint_pos[0].tolist() == list(range(7))
    wanted = Rotation.from_euler("xyz", [0.1, 0.2, 0.3])
    assert (_rotation(arm) * wanted.inv()).magnitude() < 1e-6
    other = _standard("taco_play", raw, gripper="minus_1_closed", euler="zyx").arms["right"]
    assert other.grip_cmd.tolist() == [0, 0, 1, 1]
    wanted = Rotation.from_euler("ZYX", [0.1, 0.2, 0.3])
    assert (_rotation(other) * wanted.inv()).magnitude() < 1e-6


def test_ur5_is_closed_where_it_says_so_and_its_wrist_camera_is_bgr():
    state = np.concatenate([np.zeros((T, 6)), _absolute([0, 0, 0, 1.0]), _tiled(1, 0)], axis=1)
    red = np.zeros((T, 8, 8, 3), np.uint8)
    red[..., 0] = 255
    raw = Raw(
        T,
        {
            f"{OBS}robot_state": state,
            "steps/action/gripper_closedness_action": np.array([0, 1, 0, 0.0]),
        },
        {},
        {f"{OBS}image": list(red), f"{OBS}hand_image": list(red)},
    )
    episode = _standard("berkeley_autolab_ur5", raw)
    assert episode.arms["right"].grip_open.tolist() == [0] * T
    assert episode.arms["right"].grip_cmd.tolist() == [1, 0, 0, 0]
    assert episode.views["head"][0][0, 0].tolist() == [255, 0, 0]
    assert episode.views["right_wrist"][0][0, 0].tolist() == [0, 0, 255]


def test_libero_reads_a_rotation_vector_and_undoes_the_mirrored_image():
    image = np.zeros((8, 8, 3), np.uint8)
    image[0, 0] = 255
    raw = Raw(
        T,
        {
            f"{OBS}state": _tiled(-0.21, -0.01, 1.17, 3.0, 0.0, 0.5, 0.04, -0.04),
            "steps/action": np.tile([0, 0, 0, 0, 0, 0, 1.0], (T, 1)),
        },
        {"steps/language_instruction": "open"},
        {f"{OBS}image": [image] * T, f"{OBS}wrist_image": [image] * T},
    )
    episode = _standard("libero", raw)
    arm = episode.arms["right"]
    np.testing.assert_allclose(_rotation(arm).as_rotvec(), [3.0, 0, 0.5], atol=1e-6)
    assert arm.grip_open[0] == 1
    assert arm.grip_cmd[0] == 0
    assert arm.joint_pos is None
    # two turns of the simulator's bottom-up image: its rows are right again, its columns exchanged
    assert episode.views["head"][0][0, 7].tolist() == [255] * 3
    assert episode.views["right_wrist"][0][0, 7].tolist() == [255] * 3


def test_droid_exchanges_the_gripper_and_keeps_successes():
    raw = Raw(
        T,
        {
            f"{OBS}cartesian_position": _tiled(0.4, 0, 0.3, 0.1, 0.2, 0.3),
            f"{OBS}joint_position": np.zeros((T, 7)),
            f"{OBS}gripper_position": np.zeros((T, 1)),
            "steps/action_dict/gripper_position": np.ones((T, 1)),
        },
        {
            "steps/language_instruction": "",
            "steps/language_instruction_2": "second",
            "episode_metadata/file_path": "r2d2/success/2023",
        },
    )
    episode = _standard("droid", raw)
    assert episode.instruction == "second"
    assert episode.arms["right"].grip_open[0] == 1
    assert episode.arms["right"].grip_cmd[0] == 0
    wanted = Rotation.from_euler("xyz", [0.1, 0.2, 0.3])
    assert (_rotation(episode.arms["right"]) * wanted.inv()).magnitude() < 1e-6
    raw.texts["episode_metadata/file_path"] = "r2d2/failure/2023"
    with pytest.raises(FaultError, match="not_kept"):
        _standard("droid", raw)
    assert _standard("droid", raw, success_only="no").num_steps == T


def test_aloha_has_joints_and_no_poses():
    state = np.tile(np.arange(14.0) / 10, (T, 1))
    raw = Raw(T, {f"{OBS}state": state, "steps/action": state})
    arms = _standard("aloha_static", raw).arms
    assert arms["left"].ee_pos is None
    np.testing.assert_allclose(arms["right"].joint_pos[0], np.arange(7, 13) / 10, rtol=1e-6)
    np.testing.assert_allclose(arms["left"].grip_open[0], 0.6, rtol=1e-6)


def test_agibot_from_its_files(tmp_path):
    source = Hdf5Source(write_agibot(tmp_path), "agibot")
    log = FaultLog()
    episode = standard_episode(source.episode(0), _row("agibot_world"), log)
    assert episode.instruction == "Pack in the supermarket"
    assert list(episode.views) == ["head", "left_wrist"]
    assert log.counts == {"missing_view": 1}
    left, right = episode.arms["left"], episode.arms["right"]
    assert (left.grip_open[0], left.grip_cmd[0]) == (1, 1)
    assert (right.grip_open[0], right.grip_cmd[0]) == (0, 0)
    np.testing.assert_allclose(left.ee_quat[0], [1, 0, 0, 0], atol=1e-7)
    raw = source.episode(0)
    np.testing.assert_allclose(right.ee_pos, raw.read("state/end/position")[:, 1], atol=1e-6)


def test_robomind_from_its_files_masks_a_gripper_of_unknown_sense(tmp_path):
    source = Hdf5Source(write_robomind(tmp_path), "robomind")
    episode = standard_episode(source.episode(0), _row("robomind_franka"), FaultLog())
    assert episode.arms["right"].grip_open is None
    np.testing.assert_allclose(_rotation(episode.arms["right"]).as_rotvec(), [0, 0, np.pi / 2])
    red = decode(episode.views["head"][0])[4, 4]  # stored with red and blue exchanged
    assert red[0] > 200
    assert red[2] < 60
    known = standard_episode(
        source.episode(0), _row("robomind_franka", gripper="1_open"), FaultLog()
    )
    np.testing.assert_allclose(known.arms["right"].grip_open, 0.8, atol=1e-6)


def test_libero_hdf5_from_its_files(tmp_path):
    source = Hdf5Source(write_libero(tmp_path / "l"), "libero")
    episode = standard_episode(source.episode(0), _row("libero_hdf5"), FaultLog())
    assert episode.instruction == "open the drawer"
    assert episode.views["head"][0][-1, 0].tolist() == [255] * 3  # the lowest row is last again
    np.testing.assert_allclose(_rotation(episode.arms["right"]).as_rotvec(), [np.pi, 0, 0])


def test_the_franka_sample_is_the_same_as_lerobot_and_as_rlds(samples, tmp_path):
    folder = samples / "derived_rlds_franka" / "1.0.0"
    build(folder, "train", tmp_path / "ix")
    rlds = RldsSource(folder, "train", tmp_path / "ix")
    lerobot = LeRobotSource(samples / "internvla_m1_sim_franka" / "sim_pick_place")
    shared = 0
    for number in range(4):
        raw = rlds.episode(number)
        first = int(raw.episode_id.split("[")[1].split(":")[0])
        short = _standard("franka_sim_pick", raw)
        long = _standard("internvla_m1_sim_franka", lerobot.episode(number))
        assert short.instruction == long.instruction
        a, b = short.arms["right"], long.arms["right"]
        part = slice(first, first + short.num_steps)
        shared += short.num_steps
        np.testing.assert_allclose(a.ee_pos, b.ee_pos[part], atol=1e-5)
        dots = np.abs(np.sum(a.ee_quat * b.ee_quat[part], axis=1))
        assert (2 * np.arccos(np.minimum(dots, 1)) < 1e-3).all()  # float32's arccos at 1
        np.testing.assert_allclose(np.minimum(dots, 1), 1, atol=1e-6)
        np.testing.assert_allclose(a.joint_pos, b.joint_pos[part], atol=1e-5)
        np.testing.assert_allclose(a.grip_open, b.grip_open[part], atol=1e-5)
        np.testing.assert_array_equal(a.grip_cmd, b.grip_cmd[part])
    assert shared == 240


def test_quaternions_and_eulers_of_the_franka_sample_agree(samples):
    lerobot = LeRobotSource(samples / "internvla_m1_sim_franka" / "sim_pick_place")
    worst = 0.0
    for number in range(4):
        raw = lerobot.episode(number)
        quat = Rotation.from_quat(raw.read("state.eef_quaternion"), scalar_first=True)
        euler = Rotation.from_euler("xyz", raw.read("state.eef_rotation"))
        worst = max(worst, (quat * euler.inv()).magnitude().max())
    assert worst < 1e-4


def test_real_bridge_episodes_move_as_their_actions_say(samples, tmp_path):
    folder = samples / "bridge_dataset_octo" / "bridge_dataset" / "1.0.0"
    build(folder, "train", tmp_path / "ix")
    source = RldsSource(folder, "train", tmp_path / "ix")
    moved, said = [], []
    for number in range(len(source)):
        episode = _standard("bridge_dataset", source.episode(number))
        position = episode.arms["right"].ee_pos
        assert np.linalg.norm(np.diff(position, axis=0), axis=1).max() < 0.2
        moved.append(np.diff(position, axis=0))
        said.append(source.episode(number).read("steps/action")[1:-1, :3])
    moved, said = np.concatenate(moved), np.concatenate(said)
    for axis in range(3):
        assert np.corrcoef(moved[:, axis], said[:, axis])[0, 1] > 0.8
