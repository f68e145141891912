"""The state of the robot that a vision-language record is about: JSON -> `types.State`.

    {"embodiment": "franka",
     "arms": {"right": {"ee_pos": [x, y, z], "ee_quat": [w, x, y, z],
                        "joint_pos": [...], "grip_open": 0.8}}}

An arm may leave out its end effector (both fields), its joints or its gripper; what is left out is
masked. Units are those of `types.Arm`.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gear_jax import geometry
from gear_jax.data.embodiments import EMBODIMENTS, embodiment
from gear_jax.data.vision_language import is_numbers
from gear_jax.data.windows import empty_state
from gear_jax.types import ARMS, State

_UNIT = 1e-3  # what the length of a quaternion may be off


def state_fault(value: Any) -> str | None:
    """What is wrong with a record's state, in words, or None."""
    if not isinstance(value, dict) or set(value) != {"embodiment", "arms"}:
        return "an object with 'embodiment' and 'arms'"
    robots = {one.name: one for one in EMBODIMENTS if one.joints}
    if not isinstance(value["embodiment"], str) or value["embodiment"] not in robots:
        return f"an 'embodiment' of {sorted(robots)}"
    arms, joints = value["arms"], robots[value["embodiment"]].joints
    if not isinstance(arms, dict) or not arms or not set(arms) <= set(joints):
        return f"'arms' with some of {sorted(joints)}"
    for name, arm in arms.items():
        if wrong := _arm_fault(arm, joints[name]):
            return f"arm {name!r} with {wrong}"
    return None


def _arm_fault(arm, num_joints):
    lengths = {"ee_pos": 3, "ee_quat": 4, "joint_pos": num_joints}
    if not isinstance(arm, dict) or not arm or not set(arm) <= {*lengths, "grip_open"}:
        return f"some of {[*lengths, 'grip_open']}"
    if ("ee_pos" in arm) != ("ee_quat" in arm):
        return "both of 'ee_pos' and 'ee_quat', or neither"
    for field, length in lengths.items():
        if field in arm and not is_numbers(arm[field], length):
            return f"{length} finite numbers in {field!r}"
    if "ee_quat" in arm and abs(math.hypot(*arm["ee_quat"]) - 1) > _UNIT:
        return "an 'ee_quat' of length 1"
    opening = arm.get("grip_open", 0.0)
    fine = is_numbers([opening], 1) and 0 <= opening <= 1
    return None if fine else "a 'grip_open' of 0 .. 1"


def read_state(value: Mapping[str, Any]) -> State:
    """A state without a leading axis, of what `state_fault` finds nothing wrong with."""
    state = empty_state()
    for name, arm in value["arms"].items():
        place = ARMS.index(name)
        state["arm_mask"][place] = True
        if "ee_pos" in arm:
            turn = geometry.quat_to_rotmat(np.array(arm["ee_quat"]))
            state["ee_pose"][place] = geometry.make_pose(np.array(arm["ee_pos"]), turn)
            state["ee_mask"][place] = True
        if "joint_pos" in arm:
            count = len(arm["joint_pos"])
            state["joint_pos"][place, :count] = arm["joint_pos"]
            state["joint_mask"][place, :count] = True
        if "grip_open" in arm:
            state["grip_open"][place] = arm["grip_open"]
            state["grip_mask"][place] = True
    return state


def write_state(name: str, state: State) -> dict[str, Any]:
    """The inverse: what a record says of a robot.

    Args:
        name: of the embodiment.
        state: without a leading axis.
    """
    arms = {}
    for arm, count in embodiment(name).joints.items():
        place = ARMS.index(arm)
        told: dict[str, Any] = {}
        if state["ee_mask"][place]:
            pose = np.asarray(state["ee_pose"][place], np.float64)
            told["ee_pos"] = _short(pose[:3, 3])
            told["ee_quat"] = _short(geometry.rotmat_to_quat(pose[:3, :3]))
        if state["joint_mask"][place].any():
            told["joint_pos"] = _short(state["joint_pos"][place, :count])
        if state["grip_mask"][place]:
            told["grip_open"] = round(float(state["grip_open"][place]), 6)
        if told:
            arms[arm] = told
    return {"embodiment": name, "arms": arms}


def _short(numbers):
    """To a micrometre, so that files stay small."""
    return [round(float(number), 6) for number in numbers]
