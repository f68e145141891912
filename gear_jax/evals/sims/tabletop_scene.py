"""The tabletop as a MuJoCo model: one table, some blocks, a gripper with two coupled fingers."""

import dataclasses

import numpy as np

from gear_jax import geometry

COLOURS = {
    "red": (0.85, 0.1, 0.1),
    "green": (0.1, 0.65, 0.15),
    "blue": (0.12, 0.25, 0.9),
    "yellow": (0.95, 0.85, 0.1),
}
BLOCK = 0.02  # half its side, metres
FINGER_OPEN = 0.045  # from the middle to a finger's inside
IMAGE_SIZE = 64
_HEAD = (np.array([-0.20, 0.0, 0.40]), np.array([0.0, 0.0, 0.01]))  # from where, to where it looks

_XML = """
<mujoco model="tabletop">
  <compiler angle="radian"/>
  <option timestep="0.0025" integrator="implicitfast" cone="elliptic" impratio="10"/>
  <visual>
    <quality offsamples="0" shadowsize="0"/>
    <headlight specular="0 0 0"/>
    <map znear="0.02" zfar="20"/>
  </visual>
  <worldbody>
    <light name="lamp" pos="0 0 1.5" dir="0 0 -1" castshadow="false"/>
    <geom name="table" type="box" size="0.6 0.6 0.05" pos="0 0 -0.05"
          friction="1 0.005 0.0001"/>
    <camera name="head" fovy="30"/>
    <body name="gantry_x" gravcomp="1">
      <inertial pos="0 0 0" mass="0.3" diaginertia="3e-3 3e-3 3e-3"/>
      <joint name="x" type="slide" axis="1 0 0" range="-0.25 0.25"/>
      <body name="gantry_y" gravcomp="1">
        <inertial pos="0 0 0" mass="0.3" diaginertia="3e-3 3e-3 3e-3"/>
        <joint name="y" type="slide" axis="0 1 0" range="-0.25 0.25"/>
        <body name="gantry_z" gravcomp="1">
          <inertial pos="0 0 0" mass="0.3" diaginertia="3e-3 3e-3 3e-3"/>
          <joint name="z" type="slide" axis="0 0 1" range="0.008 0.35"/>
          <body name="hand" gravcomp="1">
            <joint name="yaw" type="hinge" axis="0 0 1" range="-2 2" armature="0.005"/>
            <geom name="palm" type="box" size="0.002 0.05 0.002" pos="0 0 0.054" mass="0.1"
                  rgba="0.25 0.25 0.25 1"/>
            <geom name="body" type="box" size="0.022 0.022 0.008" pos="0 0 0.066" mass="0.1"
                  rgba="0.95 0.95 0.95 1"/>
            <camera name="right_wrist" pos="-0.075 0 0.10" xyaxes="0 -1 0 0.8 0 0.6" fovy="70"/>
            {fingers}
          </body>
        </body>
      </body>
    </body>
    {blocks}
  </worldbody>
  <equality><joint joint1="right_finger" joint2="left_finger" solref="0.02 1"/></equality>
  <actuator>
    <position joint="x" kp="1000" kv="140" ctrlrange="-0.22 0.22"/>
    <position joint="y" kp="1000" kv="140" ctrlrange="-0.22 0.22"/>
    <position joint="z" kp="1000" kv="140" ctrlrange="0.01 0.30"/>
    <position joint="yaw" kp="40" kv="4" ctrlrange="-1.5 1.5"/>
    <position joint="left_finger" kp="300" kv="20" ctrlrange="0 {opened}" forcerange="-5 5"/>
  </actuator>
</mujoco>
"""
_FINGER = """
            <body name="{name}" pos="0 {side}0.006 0" gravcomp="1">
              <joint name="{name}" type="slide" axis="0 {side}1 0" range="0 {opened}"/>
              <geom type="box" size="0.012 0.005 0.028" pos="0 0 0.022" mass="0.05" condim="4"
                    friction="1.5 0.02 0.0001" rgba="0.25 0.25 0.25 1"/>
            </body>"""
_BLOCK = """
    <body name="block{number}">
      <freejoint/>
      <geom name="block{number}" type="box" size="{size} {size} {size}" mass="0.05" condim="4"
            friction="1.2 0.01 0.0001"/>
    </body>"""


def scene_xml(num_blocks: int) -> str:
    """The model's XML. Joints in order: x, y, z, yaw, two fingers, then seven numbers a block."""
    blocks = "".join(_BLOCK.format(number=number, size=BLOCK) for number in range(num_blocks))
    fingers = "".join(
        _FINGER.format(name=f"{name}_finger", side=side, opened=FINGER_OPEN)
        for name, side in (("left", ""), ("right", "-"))
    )
    return _XML.format(blocks=blocks, fingers=fingers, opened=FINGER_OPEN)


@dataclasses.dataclass(frozen=True, eq=False)
class Look:
    """How a scene is seen.

    Attributes:
        camera_shift: float[3], metres, of the head camera.
        camera_turn: float[3], radians, a rotation vector in the base frame.
        light: factor of the brightness.
        lamp: float[2], metres, where the lamp hangs.
        table: float[3], its colour.
    """

    camera_shift: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(3))
    camera_turn: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(3))
    light: float = 1.0
    lamp: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(2))
    table: np.ndarray = dataclasses.field(default_factory=lambda: np.array([0.55, 0.5, 0.45]))


def apply_look(model, colours, look: Look) -> None:
    """Paint a model of `scene_xml` and place its camera and lamp, in place."""
    for number, colour in enumerate(colours):
        model.geom(f"block{number}").rgba[:3] = COLOURS[colour]
    model.geom("table").rgba[:3] = look.table
    place, view = _HEAD
    back = (place - view) / np.linalg.norm(place - view)
    right = np.array([0.0, -1.0, 0.0])
    frame = np.stack([right, np.cross(back, right), back], axis=1)
    turned = geometry.rotvec_to_rotmat(look.camera_turn) @ frame
    model.camera("head").pos[:] = place + look.camera_shift
    model.camera("head").quat[:] = geometry.rotmat_to_quat(turned)
    model.vis.headlight.ambient[:] = 0.35 * look.light
    model.vis.headlight.diffuse[:] = 0.3 * look.light
    model.light("lamp").diffuse[:] = 0.45 * look.light
    model.light("lamp").pos[:2] = look.lamp
