"""The standardisation table: one function per public data set, one keyword per contradiction.

Each row says its source of truth (`truth`): the letters are those of data.md 3.2. Where public
sources contradict each other, or say nothing, the row has an option; its first value is what we
believe, and nothing is chosen in silence. Keys are the source's own: tf.train.Example's for RLDS,
LeRobot's, or paths inside HDF5. Actions of most sets are step-to-step deltas and are not used: a
chunk's targets are the poses that were achieved (data.md 3.3).
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

from gear_jax.data.rows import ArmRow, Gripper, Pose, Row, ViewRow

_OBS = "steps/observation/"
_BRIDGE_TURN = (0.0, 0.0, 1.0, 0.0, 1.0, 0.0, -1.0, 0.0, 0.0)


def bridge_dataset(*, frame: Literal["base", "top_down"] = "base") -> Row:
    """BridgeData V2; `frame`: "top_down" leaves rotations relative to the default pose."""
    turn = _BRIDGE_TURN if frame == "base" else None
    pose = Pose(f"{_OBS}state[0:3]", f"{_OBS}state[3:6]", "euler_xyz_extrinsic", turn=turn)
    arm = ArmRow(
        pose=pose,
        grip_open=Gripper(f"{_OBS}state[6]", 0.0, 1.0),
        grip_cmd=Gripper("steps/action[6]", 0.0, 1.0, "settle"),
    )
    return Row(
        "bridge_dataset",
        "widowx",
        5.0,
        {"right": arm},
        {"head": ViewRow(f"{_OBS}image_0")},
        ("steps/language_instruction",),
        needs_instruction=True,
        skip_first=1,
        truth="fps [R][A]; euler of a top-down default pose, turned back [Z]; action 1 = open, "
        "binarised over settled steps, first step left out [V]; has_image_* are wrong [F]",
    )


def bridge_oxe(*, frame: Literal["base", "top_down"] = "base") -> Row:
    """The Open X-Embodiment copy of Bridge, with its dictionary of actions."""
    turn = _BRIDGE_TURN if frame == "base" else None
    pose = Pose(f"{_OBS}state[0:3]", f"{_OBS}state[3:6]", "euler_xyz_extrinsic", turn=turn)
    arm = ArmRow(
        pose=pose,
        grip_open=Gripper(f"{_OBS}state[6]", 0.0, 1.0),
        grip_cmd=Gripper("steps/action/open_gripper", 0.0, 1.0, "settle"),
    )
    return Row(
        "bridge_oxe",
        "widowx",
        5.0,
        {"right": arm},
        {"head": ViewRow(f"{_OBS}image")},
        (f"{_OBS}natural_language_instruction",),
        needs_instruction=True,
        skip_first=1,
        truth="as bridge_dataset; action/open_gripper is a flag [V]",
    )


def droid(
    *,
    head: Literal["exterior_image_1_left", "exterior_image_2_left"] = "exterior_image_1_left",
    success_only: Literal["yes", "no"] = "yes",
) -> Row:
    """DROID 1.0; the gripper's raw sense is 0 open, 1 closed."""
    arm = ArmRow(
        pose=Pose(
            f"{_OBS}cartesian_position[0:3]",
            f"{_OBS}cartesian_position[3:6]",
            "euler_xyz_extrinsic",
        ),
        joints=f"{_OBS}joint_position",
        grip_open=Gripper(f"{_OBS}gripper_position", 1.0, 0.0),
        grip_cmd=Gripper("steps/action_dict/gripper_position", 1.0, 0.0),
    )
    return Row(
        "droid",
        "franka",
        15.0,
        {"right": arm},
        {"head": ViewRow(f"{_OBS}{head}"), "right_wrist": ViewRow(f"{_OBS}wrist_image_left")},
        tuple(f"steps/language_instruction{n}" for n in ("", "_2", "_3")),
        keep_text=("episode_metadata/file_path", "success") if success_only == "yes" else None,
        truth="extrinsic scipy xyz euler, base frame [D code]; gripper 1 = closed [V][R]; success "
        "by file_path [openpi]; `steps/action` is of unknown meaning and not used",
    )


def fractal20220817_data() -> Row:
    """RT-1: absolute pose xyzw; gripper commands are changes."""
    arm = ArmRow(
        pose=Pose(
            f"{_OBS}base_pose_tool_reached[0:3]", f"{_OBS}base_pose_tool_reached[3:7]", "xyzw"
        ),
        grip_open=Gripper(f"{_OBS}gripper_closed", 1.0, 0.0),
        grip_cmd=Gripper("steps/action/gripper_closedness_action", 1.0, -1.0, "change"),
    )
    return Row(
        "fractal20220817_data",
        "google_robot",
        3.0,
        {"right": arm},
        {"head": ViewRow(f"{_OBS}image")},
        (f"{_OBS}natural_language_instruction",),
        truth="fps [R][A]; xyzw [Z][R]; +1 closes, -1 opens, 0 keeps, open at the start [O][V]; "
        "state 1 = closed [C]",
    )


def kuka() -> Row:
    """QT-Opt: zlib-compressed state tensors, no useful language, successful episodes only."""
    state = f"{_OBS}clip_function_input/base_pose_tool_reached"
    arm = ArmRow(
        pose=Pose(f"{state}[0:3]", f"{state}[3:7]", "xyzw"),
        grip_open=Gripper(f"{_OBS}gripper_closed", 1.0, 0.0),
        grip_cmd=Gripper("steps/action/gripper_closedness_action", 1.0, -1.0, "change"),
    )
    return Row(
        "kuka",
        "kuka_iiwa",
        10.0,
        {"right": arm},
        {"head": ViewRow(f"{_OBS}image")},
        keep="success",
        truth="fps [R][A]; xyz + xyzw [R]; zlib tensors [O]; language blanked [O][V]; `success`",
    )


def language_table() -> Row:
    """Planar pushing: its state is a point in the plane, so it is read as video with language."""
    return Row(
        "language_table",
        "xarm",
        10.0,
        {},
        {"head": ViewRow(f"{_OBS}rgb")},
        (f"{_OBS}instruction",),
        truth="effector_translation has two numbers and no rotation [C]: no end-effector pose; "
        "instruction is an array of code points [O]",
    )


def taco_play(
    *,
    gripper: Literal["minus_1_open", "minus_1_closed"] = "minus_1_open",
    euler: Literal["xyz", "zyx"] = "xyz",
) -> Row:
    """TACO: 15 numbers of robot_obs; signs and order of angles are disputed.

    `gripper`: the catalogue and RDT say -1 is open, Octo and OpenVLA the contrary. `euler`: RDT
    reads the state in order; the catalogue speaks of yaw, pitch, roll.
    """
    obs = f"{_OBS}robot_obs"
    closed, opened = (1.0, -1.0) if gripper == "minus_1_open" else (-1.0, 1.0)
    angles = "euler_xyz_extrinsic" if euler == "xyz" else "euler_zyx_intrinsic"
    arm = ArmRow(
        pose=Pose(f"{obs}[0:3]", f"{obs}[3:6]", angles),
        joints=f"{obs}[7:14]",
        grip_open=Gripper(f"{obs}[6]", 0.0, 1 / 12.3843),
        grip_cmd=Gripper(f"{obs}[14]", closed, opened),
    )
    return Row(
        "taco_play",
        "franka",
        15.0,
        {"right": arm},
        {"head": ViewRow(f"{_OBS}rgb_static"), "right_wrist": ViewRow(f"{_OBS}rgb_gripper")},
        (f"{_OBS}natural_language_instruction",),
        truth="gripper width is index 6, 1 / 12.3843 m open [R]; index 7 is joint 0, which [O][V]"
        "[A] take for the gripper; -1 open [C][R] against [O][V]",
    )


def berkeley_autolab_ur5() -> Row:
    """UR5: xyzw pose; both gripper numbers mean closed; the wrist camera is BGR."""
    state = f"{_OBS}robot_state"
    arm = ArmRow(
        pose=Pose(f"{state}[6:9]", f"{state}[9:13]", "xyzw"),
        joints=f"{state}[0:6]",
        grip_open=Gripper(f"{state}[13]", 1.0, 0.0),
        grip_cmd=Gripper("steps/action/gripper_closedness_action", 1.0, -1.0, "change"),
    )
    return Row(
        "berkeley_autolab_ur5",
        "ur5",
        5.0,
        {"right": arm},
        {
            "head": ViewRow(f"{_OBS}image"),
            "right_wrist": ViewRow(f"{_OBS}hand_image", bgr=True),
        },
        (f"{_OBS}natural_language_instruction",),
        truth="joints 6, xyz 3, xyzw 4, gripper_is_closed [R]; [O][V] take it for openness; "
        "hand_image is BGR [A]",
    )


def fmb(*, head: Literal["image_side_1", "image_side_2"] = "image_side_1") -> Row:
    """FMB: xyzw pose, BGR images; the action's meaning is disputed and not used."""
    arm = ArmRow(
        pose=Pose(f"{_OBS}eef_pose[0:3]", f"{_OBS}eef_pose[3:7]", "xyzw"),
        joints=f"{_OBS}joint_pos",
        grip_open=Gripper(f"{_OBS}state_gripper_pose", 1.0, 0.0),
    )
    return Row(
        "fmb",
        "franka",
        10.0,
        {"right": arm},
        {
            "head": ViewRow(f"{_OBS}{head}", bgr=True),
            "right_wrist": ViewRow(f"{_OBS}image_wrist_1", bgr=True),
        },
        ("steps/language_instruction",),
        truth="xyz + xyzw, open = 1 - state_gripper_pose [R]; images BGR [A]; action pose [R] or "
        "delta [O]: not used",
    )


def aloha_static() -> Row:
    """ALOHA on a table: joints only; give `kinematics` with a ViperX model for poses."""
    return _aloha("aloha_static")


def aloha_mobile() -> Row:
    """Mobile ALOHA: joints only; the base's two numbers are not used."""
    return _aloha("aloha_mobile")


def _aloha(name):
    arms = {
        arm: ArmRow(
            joints=f"{_OBS}state[{first}:{first + 6}]",
            grip_open=Gripper(f"{_OBS}state[{first + 6}]", 0.0, 1.0),
            grip_cmd=Gripper(f"steps/action[{first + 6}]", 0.0, 1.0),
        )
        for arm, first in (("left", 0), ("right", 7))
    }
    views = {
        "head": ViewRow(f"{_OBS}cam_high"),
        "left_wrist": ViewRow(f"{_OBS}cam_left_wrist"),
        "right_wrist": ViewRow(f"{_OBS}cam_right_wrist"),
    }
    return Row(
        name,
        "aloha",
        50.0,
        arms,
        views,
        ("steps/language_instruction",),
        truth="50 Hz, left 6 + gripper, right 6 + gripper, large = open [R]; no end-effector pose",
    )


def libero(*, fps: float = 20.0, joint_state: Literal["unused", "used"] = "unused") -> Row:
    """LIBERO as RLDS (`libero_*_no_noops`); 20 is the simulator's rate, some writers say 10.

    `joint_state`: not every copy has joint positions; what `launch.demos` writes does.
    """
    arm = ArmRow(
        pose=Pose(f"{_OBS}state[0:3]", f"{_OBS}state[3:6]", "rotvec"),
        joints=f"{_OBS}joint_state" if joint_state == "used" else None,
        grip_open=Gripper(f"{_OBS}state[6]", 0.0, 0.04),
        grip_cmd=Gripper("steps/action[6]", 1.0, -1.0),
    )
    return Row(
        "libero",
        "franka",
        fps,
        {"right": arm},
        {
            "head": ViewRow(f"{_OBS}image", upside_down=True, flipped=True),
            "right_wrist": ViewRow(f"{_OBS}wrist_image", upside_down=True, flipped=True),
        },
        ("steps/language_instruction",),
        truth="rotation vector, not euler (quat2axisangle) [F]; -1 open, +1 close [V]; images are "
        "the simulator's, from the bottom row up, turned by 180 degrees: left and right are "
        "exchanged (compared with its renderer); OSC deltas are not used",
    )


def tabletop(*, fps: float = 20.0) -> Row:
    """The embedded tabletop's demonstrations: LIBERO's field names, another robot."""
    return dataclasses.replace(
        libero(fps=fps, joint_state="used"), name="tabletop", embodiment="tabletop_gantry",
        truth="evals/sims/recording.py writes it",
    )  # fmt: skip


def libero_hdf5(*, fps: float = 20.0) -> Row:
    """LIBERO's own HDF5 demonstrations; images lie bottom row first."""
    arm = ArmRow(
        pose=Pose("obs/ee_states[0:3]", "obs/ee_states[3:6]", "rotvec"),
        joints="obs/joint_states",
        grip_open=Gripper("obs/gripper_states[0]", 0.0, 0.04),
        grip_cmd=Gripper("actions[6]", 1.0, -1.0),
    )
    return Row(
        "libero_hdf5",
        "franka",
        fps,
        {"right": arm},
        {
            "head": ViewRow("obs/agentview_rgb", flipped=True),
            "right_wrist": ViewRow("obs/eye_in_hand_rgb", flipped=True),
        },
        ("instruction",),
        truth="as libero; OpenGL images are stored from the bottom up",
    )


def robomimic(
    *,
    fps: float = 20.0,
    head: Literal["agentview_image", "frontview_image"] = "agentview_image",
) -> Row:
    """Robomimic HDF5 with images; one task a file, no language."""
    arm = ArmRow(
        pose=Pose("obs/robot0_eef_pos", "obs/robot0_eef_quat", "xyzw"),
        joints="obs/robot0_joint_pos",
        grip_open=Gripper("obs/robot0_gripper_qpos[0]", 0.0, 0.04),
        grip_cmd=Gripper("actions[6]", 1.0, -1.0),
    )
    return Row(
        "robomimic",
        "franka",
        fps,
        {"right": arm},
        {
            "head": ViewRow(f"obs/{head}"),
            "right_wrist": ViewRow("obs/robot0_eye_in_hand_image"),
        },
        truth="robosuite: 20 Hz, xyzw quaternions, +1 closes",
    )


def agibot_world(*, gripper_open_mm: float) -> Row:
    """AgiBot World (HDF5 and mp4): flange poses xyzw; say how wide your gripper opens, in mm."""
    arms = {
        arm: ArmRow(
            pose=Pose(
                f"state/end/position[{3 * n}:{3 * n + 3}]",
                f"state/end/orientation[{4 * n}:{4 * n + 4}]",
                "xyzw",
            ),
            joints=f"state/joint/position[{7 * n}:{7 * n + 7}]",
            grip_open=Gripper(f"state/effector/position[{n}]", 0.0, gripper_open_mm),
            grip_cmd=Gripper(f"action/effector/position[{n}]", 1.0, 0.0),
        )
        for n, arm in enumerate(("left", "right"))
    }
    views = {
        "head": ViewRow("head_color.mp4"),
        "left_wrist": ViewRow("hand_left_color.mp4"),
        "right_wrist": ViewRow("hand_right_color.mp4"),
    }
    return Row(
        "agibot_world",
        "agibot_g1",
        30.0,
        arms,
        views,
        ("instruction",),
        truth="flange pose xyzw, state in mm of opening, action 0 open .. 1 closed (public loader)",
    )


def robomind_franka(
    *, gripper: Literal["unknown", "1_open", "1_closed"] = "unknown", fps: float = 30.0
) -> Row:
    """RoboMIND franka_3rgb: BGR images; the gripper's sense is not published."""
    return _robomind("robomind_franka", "franka", 7, fps, gripper, bgr=True)


def robomind_ur(
    *, gripper: Literal["unknown", "1_open", "1_closed"] = "unknown", fps: float = 30.0
) -> Row:
    """RoboMIND ur_1rgb: BGR images; the gripper's sense is not published."""
    return _robomind("robomind_ur", "ur5", 6, fps, gripper, bgr=True)


def _robomind(name, robot, joints, fps, gripper, *, bgr):
    arm = ArmRow(
        pose=Pose("puppet/end_effector[0:3]", "puppet/end_effector[3:6]", "euler_xyz_extrinsic"),
        joints=f"puppet/joint_position[0:{joints}]",
        grip_open=_sense(f"puppet/joint_position[{joints}]", gripper),
        grip_cmd=_sense(f"master/joint_position[{joints}]", gripper),
    )
    return Row(
        name,
        robot,
        fps,
        {"right": arm},
        {"head": ViewRow("observations/rgb_images/camera_top", bgr=bgr)},
        ("instruction",),
        truth="30 Hz, xyz + rpy (order unstated: taken as extrinsic xyz), gripper is the last "
        "joint entry with unstated sense, franka and ur images are BGR (any4lerobot)",
    )


def robomind_agilex(
    *, gripper: Literal["unknown", "1_open", "1_closed"] = "unknown", fps: float = 30.0
) -> Row:
    """RoboMIND agilex_3rgb: two arms, poses xyz + xyzw."""
    arms = {
        arm: ArmRow(
            pose=Pose(f"puppet/end_effector_{arm}[0:3]", f"puppet/end_effector_{arm}[3:7]", "xyzw"),
            joints=f"puppet/joint_position_{arm}[0:6]",
            grip_open=_sense(f"puppet/joint_position_{arm}[6]", gripper),
            grip_cmd=_sense(f"master/joint_position_{arm}[6]", gripper),
        )
        for arm in ("left", "right")
    }
    views = {
        "head": ViewRow("observations/rgb_images/camera_front"),
        "left_wrist": ViewRow("observations/rgb_images/camera_left_wrist"),
        "right_wrist": ViewRow("observations/rgb_images/camera_right_wrist"),
    }
    return Row(
        "robomind_agilex",
        "agilex_cobot_magic",
        fps,
        arms,
        views,
        ("instruction",),
        truth="xyz + rx, ry, rz, rw = xyzw (any4lerobot)",
    )


def robomind_tienkung(*, fps: float = 30.0) -> Row:
    """RoboMIND tienkung: 16 joints and no pose; give `kinematics` for poses."""
    arms = {
        arm: ArmRow(joints=f"puppet/joint_position[{first}:{first + 7}]")
        for arm, first in (("left", 0), ("right", 8))
    }
    return Row(
        "robomind_tienkung",
        "tienkung",
        fps,
        arms,
        {"head": ViewRow("observations/rgb_images/camera_top")},
        ("instruction",),
        truth="joints 16 only: seven and a hand per arm (any4lerobot); needs forward kinematics",
    )


def _sense(column, gripper):
    """The gripper of a set that does not publish its sense; "unknown" masks it."""
    if gripper == "unknown":
        return None
    return Gripper(column, 0.0, 1.0) if gripper == "1_open" else Gripper(column, 1.0, 0.0)


def galaxea(*, fps: float) -> Row:
    """Galaxea Open-World (RLDS): joints only; its rate is unpublished and must be given."""
    arms = {
        arm: ArmRow(
            joints=f"{_OBS}joint_position_arm_{arm}",
            grip_open=Gripper(f"{_OBS}gripper_state_{arm}", 0.0, 100.0),
        )
        for arm in ("left", "right")
    }
    views = {
        "head": ViewRow(f"{_OBS}image_camera_head"),
        "left_wrist": ViewRow(f"{_OBS}image_camera_wrist_left"),
        "right_wrist": ViewRow(f"{_OBS}image_camera_wrist_right"),
    }
    return Row(
        "galaxea",
        "r1_lite",
        fps,
        arms,
        views,
        ("steps/language_instruction",),
        truth="0 close, 100 open; no end-effector pose: forward kinematics of R1 Lite "
        "(open-galaxea dataset.md); often quoted as 15 Hz, unverified",
    )


def internvla_m1_sim_franka(*, head: Literal["base_view_2", "base_view"] = "base_view_2") -> Row:
    """InternVLA-M1's simulated Franka with a Robotiq gripper, as LeRobot; ego_view is the wrist."""
    arm = ArmRow(
        pose=Pose("state.eef_position", "state.eef_quaternion", "wxyz"),
        joints="state.joints",
        grip_open=Gripper("state.gripper_width[0]", 0.7853, 0.0),
        grip_cmd=Gripper("action.gripper_close", 1.0, -1.0),
    )
    return Row(
        "internvla_m1_sim_franka",
        "franka",
        None,
        {"right": arm},
        {"head": ViewRow(f"video.{head}"), "right_wrist": ViewRow("video.ego_view")},
        ("task",),
        clock="timestamp",
        truth="wxyz equals the extrinsic xyz euler within 1e-5; joint of the gripper 0 open .. "
        "0.7853 rad closed; action -1 open, +1 close [F]",
    )


def franka_sim_pick(*, head: Literal["image_base_2", "image_base"] = "image_base_2") -> Row:
    """The same robot written as RLDS."""
    view = head.removeprefix("image_")
    arm = ArmRow(
        pose=Pose(f"{_OBS}eef_pos", f"{_OBS}eef_quat_wxyz", "wxyz"),
        joints=f"{_OBS}joint_pos",
        grip_open=Gripper(f"{_OBS}gripper_width", 0.7853, 0.0),
        grip_cmd=Gripper("steps/action[7]", 1.0, -1.0),
    )
    return Row(
        "franka_sim_pick",
        "franka",
        30.0,
        {"right": arm},
        {
            "head": ViewRow(f"{_OBS}{head}", f"episode_metadata/has_image_{view}"),
            "right_wrist": ViewRow(f"{_OBS}image_ego", "episode_metadata/has_image_ego"),
        },
        ("steps/language_instruction",),
        truth="written from internvla_m1_sim_franka [F]",
    )


def video() -> Row:
    """A folder of mp4 files: one view, no robot."""
    return Row(
        "video",
        "human",
        None,
        {},
        {"head": ViewRow("video")},
        ("instruction",),
        truth="rate and length are the file's",
    )


def reach(*, embodiment: Literal["franka", "ur5"] = "franka") -> Row:
    """The procedural robot of sources/reach.py; `embodiment`: whose state projector it uses."""
    arm = ArmRow(
        pose=Pose("pose[0:3]", "pose[3:7]", "wxyz"),
        joints="joints",
        grip_open=Gripper("grip", 0.0, 1.0),
        grip_cmd=Gripper("grip", 0.0, 1.0),
    )
    views = {"head": ViewRow("head"), "right_wrist": ViewRow("wrist")}
    return Row("reach", embodiment, None, {"right": arm}, views, ("instruction",), truth="drawn")


def shapes() -> Row:
    """Drawn clips of sources/shapes.py."""
    return Row("shapes", "human", None, {}, {"head": ViewRow("video")}, (), truth="drawn")


ROWS: dict[str, Callable[..., Row]] = {
    row.__name__: row
    for row in (
        agibot_world,
        aloha_mobile,
        aloha_static,
        berkeley_autolab_ur5,
        bridge_dataset,
        bridge_oxe,
        droid,
        fmb,
        fractal20220817_data,
        franka_sim_pick,
        galaxea,
        internvla_m1_sim_franka,
        kuka,
        language_table,
        libero,
        libero_hdf5,
        robomimic,
        robomind_agilex,
        robomind_franka,
        robomind_tienkung,
        robomind_ur,
        reach,
        shapes,
        tabletop,
        taco_play,
        video,
    )
}
