"""Robots: arms, joints and cameras, and the slot each has in the state projector bank.

A robot is a body, not a data set: Franka arms of different labs share a slot. The order is part of
every checkpoint: append, never insert. Sources: data.md 3.2.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Embodiment:
    """One kind of robot.

    Attributes:
        name: as in `types.Episode.embodiment`.
        joints: {arm: number of its joints, gripper not counted}; empty for video without a robot.
        note: what it is.
    """

    name: str
    joints: Mapping[str, int]
    note: str


def _single(joints):
    return {"right": joints}


def _bimanual(joints):
    return {"left": joints, "right": joints}


EMBODIMENTS = (
    Embodiment("human", {}, "people in video: no state, no actions"),
    Embodiment("widowx", _single(6), "WidowX 250 (Bridge)"),
    Embodiment("franka", _single(7), "Franka Emika Panda or FR3"),
    Embodiment("google_robot", _single(7), "Everyday Robots (RT-1)"),
    Embodiment("kuka_iiwa", _single(7), "Kuka LBR iiwa (QT-Opt)"),
    Embodiment("xarm", _single(6), "UFactory xArm (Language-Table)"),
    Embodiment("ur5", _single(6), "Universal Robots UR5 or UR5e"),
    Embodiment("aloha", _bimanual(6), "two ViperX 300 arms (ALOHA)"),
    Embodiment("agibot_g1", _bimanual(7), "AgiBot G1, grippers"),
    Embodiment("agilex_cobot_magic", _bimanual(6), "AgileX Cobot Magic, two Piper arms"),
    Embodiment("franka_bimanual", _bimanual(7), "two Franka arms (RoboMIND fr3 dual)"),
    Embodiment("tienkung", _bimanual(7), "Tien Kung humanoid, arms only"),
    Embodiment("r1_lite", _bimanual(6), "Galaxea R1 Lite"),
    Embodiment("gr1", _bimanual(7), "Fourier GR-1 humanoid, arms only"),
    Embodiment("tabletop_gantry", _single(4), "the embedded tabletop's hand on a gantry"),
)

_BY_NAME = {robot.name: number for number, robot in enumerate(EMBODIMENTS)}


def embodiment_id(name: str) -> int:
    """Slot of a robot in the state projector bank.

    Raises:
        KeyError: none of this name.
    """
    if name not in _BY_NAME:
        raise KeyError(f"embodiment {name!r}: expected one of {sorted(_BY_NAME)}")
    return _BY_NAME[name]


def embodiment(name: str) -> Embodiment:
    """The robot of a name.

    Raises:
        KeyError: none of this name.
    """
    return EMBODIMENTS[embodiment_id(name)]
