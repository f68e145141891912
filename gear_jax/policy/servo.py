"""Absolute target poses -> the normalised action of an operational-space delta controller."""

import dataclasses

import numpy as np

from gear_jax import geometry


@dataclasses.dataclass(frozen=True)
class OscServo:
    """OSC_POSE of robosuite with `control_delta`, as LIBERO sets it (simulators.md 2).

    The controller adds a limited step to the current pose and lags behind; the gain makes up for it.

    Attributes:
        position_scale: metres of an action of 1.
        rotation_scale: radians of an action of 1.
        gain: of the position error.
        rotation_gain: of the rotation error.
    """

    position_scale: float = 0.05
    rotation_scale: float = 0.5
    gain: float = 2.5
    rotation_gain: float = 1.0

    def action(self, pose, target, opening):
        """float32[7] in [-1, 1]: position, rotation vector, both in the base frame, gripper.

        Args:
            pose: float[4, 4], T_base_ee now, metres.
            target: float[4, 4], T_base_ee wanted.
            opening: of the gripper, 0 closed .. 1 open; the action is binary, -1 open, 1 close.
        """
        turn = geometry.rotmat_to_rotvec(target[:3, :3] @ pose[:3, :3].T)
        out = np.empty(7, np.float32)
        out[:3] = self.gain * (target[:3, 3] - pose[:3, 3]) / self.position_scale
        out[3:6] = self.rotation_gain * turn / self.rotation_scale
        out[6] = 1.0 if opening < 0.5 else -1.0
        return np.clip(out, -1, 1)
