import dataclasses
import json

import numpy as np
import pytest

from gear_jax.data.faults import POLICY, FaultError, FaultLog
from gear_jax.data.kinematics import Kinematics
from gear_jax.data.rows import (
    ArmRow,
    Gripper,
    Pose,
    Row,
    ViewRow,
    choose_row,
    row_from_json,
    row_to_json,
    with_kinematics,
)
from gear_jax.data.standard_rows import ROWS
from gear_jax.data.standardize import standard_episode
from gear_jax.data.tfrecord import DataError
from tests.data.raw import Raw

ROW = Row(
    "toy",
    "franka",
    10.0,
    {
        "right": ArmRow(
            Pose("pose[0:3]", "pose[3:7]", "wxyz"),
            "joints",
            Gripper("grip", 0.0, 1.0),
            Gripper("cmd", 0.0, 1.0),
        )
    },
    {"head": ViewRow("image")},
    ("text",),
    clock="time",
    truth="made by hand",
)


def _raw(steps=6, **numbers):
    pose = np.zeros((steps, 7))
    pose[:, 0] = 0.01 * np.arange(steps)
    pose[:, 3] = 1
    made = {
        "pose": pose,
        "joints": np.zeros((steps, 7)),
        "grip": np.full((steps, 1), 0.5),
        "cmd": np.ones(steps),
        "time": np.arange(steps) / 10,
    }
    return Raw(steps, made | numbers, {"text": "pick"}, {"image": [b""] * steps})


def _changed(key, step, value):
    values = np.array(_raw().numbers[key], float)
    values[step] = value
    return _raw(**{key: values})


DROPPED = [
    (_raw(0), "no_steps", "has no steps"),
    (_raw(1), "one_step", "has 1 steps"),
    (_changed("pose", 3, np.nan), "not_finite", "step 3: 'pose\\[0:3\\]' is \\[nan"),
    (_changed("joints", 2, np.inf), "not_finite", "step 2"),
    (_changed("joints", 2, 1e30), "out_of_range", "step 2: .* up to 1e6"),
    (_changed("pose", 4, [500, 0, 0, 1, 0, 0, 0]), "out_of_range", "step 4: position"),
    (_changed("pose", 5, [0, 0, 0, 0, 0, 0, 0]), "bad_quaternion", "step 5: .* of norm 0"),
    (_changed("pose", 5, [0, 0, 0, 0.5, 0, 0, 0]), "bad_quaternion", "of norm 0.5, expected 1"),
    (_changed("pose", 2, [2, 0, 0, 1, 0, 0, 0]), "jump", "step 2: end effector moves 1.99 m"),
    (_changed("time", 3, 0.1), "time_goes_back", "step 3: time does not grow"),
    (_raw(cmd=np.ones(5)), "wrong_length", "key 'cmd' has 5 rows, expected 6"),
]


@pytest.mark.parametrize(("raw", "code", "sentence"), DROPPED)
def test_what_is_wrong_is_dropped_and_named_with_file_episode_and_step(raw, code, sentence):
    with pytest.raises(FaultError, match=f"file-00000, episode 7.*{sentence}") as caught:
        standard_episode(raw, ROW, FaultLog())
    assert caught.value.code == code
    assert POLICY[code] == "drop"
    with pytest.raises(FaultError) as again:
        standard_episode(raw, ROW, FaultLog())
    assert str(again.value) == str(caught.value)  # a function of the record alone


def test_texts_that_are_no_instruction_are_dropped():
    for text, code in [
        ("x" * (1 << 20), "long_text"),
        (b"\xff\xfe", "bad_text"),
    ]:
        raw = _raw()
        raw.texts["text"] = text
        with pytest.raises(FaultError) as caught:
            standard_episode(raw, ROW, FaultLog())
        assert caught.value.code == code
    del raw.texts["text"]
    assert standard_episode(raw, ROW, FaultLog()).instruction == ""
    del raw.numbers["joints"]
    with pytest.raises(FaultError, match="key 'joints' is missing"):
        standard_episode(raw, ROW, FaultLog())


def test_a_gripper_out_of_range_is_clamped_and_counted():
    log = FaultLog()
    arm = standard_episode(_changed("grip", 4, 1.7), ROW, log).arms["right"]
    assert arm.grip_open.tolist() == [0.5, 0.5, 0.5, 0.5, 1.0, 0.5]
    assert log.counts == {"gripper_range": 1}
    assert (
        "step 4: 'grip' is 1.7, expected 0.0 closed .. 1.0 open" in log.examples["gripper_range"][0]
    )


def test_a_missing_camera_is_counted_and_the_episode_kept():
    raw, log = _raw(), FaultLog()
    raw.pictures = {}
    assert standard_episode(raw, ROW, log).views == {}
    assert log.counts == {"missing_view": 1}
    flagged = dataclasses.replace(ROW, views={"head": ViewRow("image", "has_image")})
    raw = _raw(has_image=np.array([False]))
    assert standard_episode(raw, flagged, log).views == {}


def test_quaternions_keep_their_hemisphere_and_are_normalised():
    raw = _raw()
    raw.numbers["pose"][2:4, 3] = -1.01
    quat = standard_episode(raw, ROW, FaultLog()).arms["right"].ee_quat
    np.testing.assert_allclose(quat, np.tile([1, 0, 0, 0], (6, 1)))


def test_more_loss_than_the_budget_stops_the_run():
    log = FaultLog()
    for number in range(100):
        log.seen += 1
        if number % 25 == 0:
            fault = FaultError("not_finite", f"file, episode {number}", "is nan")
            log.drop(fault)
    log.check(0.04, "toy")
    message = "toy: 4 of 100 records dropped, more than the budget of 1.0%: 4 not_finite, such as"
    with pytest.raises(DataError, match=message):
        log.check(0.01, "toy")
    assert FaultLog.from_json(json.loads(json.dumps(log.to_json()))) == log
    by_design = FaultLog(10)
    for _ in range(9):
        by_design.drop(FaultError("not_kept", "file", "failed"))
    by_design.check(0.0, "toy")


@pytest.mark.parametrize("name", ["bridge_dataset", "droid", "agibot_world", "video"])
def test_a_row_is_plain_json_and_comes_back(name):
    options = {"gripper_open_mm": 120.0} if name == "agibot_world" else {}
    row = choose_row(ROWS, name, **options)
    assert row_from_json(json.loads(json.dumps(row_to_json(row)))) == row


def test_a_row_with_mistakes_is_refused_with_their_place():
    good = json.loads(json.dumps(row_to_json(ROW)))

    def changed(**changes):
        return json.loads(json.dumps(good | changes))

    arm = good["arms"]["right"]
    cases = [
        (changed(colour=1), "row: unknown fields \\['colour'\\]"),
        (changed(fps="ten"), "row.fps is 'ten', expected float"),
        (changed(fps=-1), "fps -1"),
        (changed(embodiment="r2d2"), "embodiment 'r2d2'"),
        (changed(views={"nose": {"key": "a"}}), "view 'nose'"),
        (changed(arms={"left": arm}), "arm 'left', which franka does not have"),
        (changed(arms={"right": arm | {"pose": {"position": "a"}}}), "row.arms.right.pose"),
        (
            changed(arms={"right": arm | {"pose": arm["pose"] | {"convention": "euler"}}}),
            "row.arms.right.pose.convention is 'euler', expected one of",
        ),
        (changed(instruction="text"), "row.instruction is 'text', expected a list"),
        ([], "row is \\[\\], expected an object"),
    ]
    for stored, message in cases:
        with pytest.raises(ValueError, match=message):
            row_from_json(stored)


URDF = """
<robot name="r"><link name="world"/><link name="base"/>
<joint name="mount" type="fixed"><parent link="world"/><child link="base"/>
  <origin xyz="1 2 3" rpy="0 0 1.0"/></joint>
<link name="upper"><visual><geometry><mesh filename="package://missing/a.stl"/></geometry></visual>
</link>
<joint name="j1" type="revolute"><parent link="base"/><child link="upper"/>
  <origin xyz="0 0 0.5"/><axis xyz="0 0 1"/><limit lower="-3" upper="3" effort="1" velocity="1"/>
</joint>
<link name="lower"/>
<joint name="j2" type="revolute"><parent link="upper"/><child link="lower"/>
  <origin xyz="1 0 0"/><axis xyz="0 1 0"/><limit lower="-3" upper="3" effort="1" velocity="1"/>
</joint>
<link name="hand"/>
<joint name="grip" type="fixed"><parent link="lower"/><child link="hand"/>
  <origin xyz="0.5 0 0"/></joint>
</robot>
"""


def test_joints_become_poses_by_the_users_model(tmp_path):
    path = tmp_path / "r.urdf"
    path.write_text(URDF)
    chain = Kinematics(str(path), "base", "hand", ("j1", "j2"))
    quarter = np.pi / 2
    poses = chain.poses(np.array([[0, 0], [quarter, 0], [0, quarter]]))
    np.testing.assert_allclose(
        poses[:, :3, 3], [[1.5, 0, 0.5], [0, 1.5, 0.5], [1, 0, 0]], atol=1e-7
    )
    np.testing.assert_allclose(poses[2, :3, :3], [[0, 0, 1], [0, 1, 0], [-1, 0, 0]], atol=1e-7)
    joints_only = dataclasses.replace(ROW, arms={"right": ArmRow(joints="joints")})
    row = with_kinematics(joints_only, {"right": chain})
    joints = np.zeros((6, 2))
    joints[:, 0] = 0.1 * np.arange(6)
    arm = standard_episode(_raw(joints=joints), row, FaultLog()).arms["right"]
    np.testing.assert_allclose(arm.ee_pos, chain.poses(joints)[:, :3, 3], atol=1e-6)
    with pytest.raises(DataError, match="has no 'j9': expected one of .*'j1', 'j2'"):
        dataclasses.replace(chain, joints=("j9",)).poses(np.zeros((1, 1)))
    with pytest.raises(DataError, match="expected 2 for"):
        chain.poses(np.zeros((4, 3)))
    with pytest.raises(DataError, match="no such robot description"):
        dataclasses.replace(chain, model="nowhere.urdf").poses(np.zeros((1, 2)))
    with pytest.raises(ValueError, match="arm 'right' is not one that records joints only"):
        with_kinematics(ROW, {"right": chain})
