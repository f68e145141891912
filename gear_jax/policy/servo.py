"""Absolute target poses -> the normalised action of an operational-space delta controller."""

import dataclasses

import numpy as np

from gear_jax import geometry


@dataclasses.dataclass(frozen=True)
class OscServo:
    """OSC_POSE of robosuite with `control_delta`, as LIBERO sets it.

    The controller's goal is the present pose plus the action, set anew each period; towards it the
    hand moves like a critically damped unit mass: x'' = stiffness (goal - x) - 2 w x', where
    w = sqrt(stiffness). So after one period T it will have gone A action + B velocity, with
    A = 1 - (1 + w T) exp(-w T) and B = T exp(-w T). Where the velocity is known, the action is the
    one that ends where it is wanted: a part of the way, `correction`, from where the present speed
    leads to the target. A target of constant speed is then followed all but without lag, whatever
    that part; all of it at once would make the hand ring, as the arm is no unit mass. Without the
    velocity the action is a gain times the error, which lags. Lag matters: the next chunk begins
    where the hand is, so what is missing at each query is missing for good.

    Attributes:
        position_scale: metres of an action of 1.
        rotation_scale: radians of an action of 1.
        gain: of the position error, where the velocity is not known.
        rotation_gain: of the rotation error, likewise.
        correction: of the position error in one period, 0 .. 1, where the velocity is known.
        rotation_correction: of the rotation error, likewise. What is missing of a turn at a query
            bends the whole chunk that begins there.
        stiffness: of the controller, 1 / s^2.
        period: seconds between actions.
    """

    position_scale: float = 0.05
    rotation_scale: float = 0.5
    gain: float = 2.5
    rotation_gain: float = 1.0
    correction: float = 0.6
    rotation_correction: float = 0.75
    stiffness: float = 150.0
    period: float = 0.05

    def action(self, pose, target, opening, velocity=None):
        """float32[7] in [-1, 1]: position, rotation vector, both in the base frame, gripper.

        Args:
            pose: float[4, 4], T_base_ee now, metres.
            target: float[4, 4], T_base_ee wanted at the end of the period.
            opening: of the gripper, 0 closed .. 1 open; the action is binary, -1 open, 1 close.
            velocity: float[6] of the hand in the base frame, m/s and rad/s, or None.
        """
        shift = target[:3, 3] - pose[:3, 3]
        turn = geometry.rotmat_to_rotvec(target[:3, :3] @ pose[:3, :3].T)
        if velocity is None:
            shift, turn = self.gain * shift, self.rotation_gain * turn
        else:
            shift = self._lead(shift, velocity[:3], self.correction)
            turn = self._lead(turn, velocity[3:], self.rotation_correction)
        out = np.empty(7, np.float32)
        out[:3] = shift / self.position_scale
        out[3:6] = turn / self.rotation_scale
        out[6] = 1.0 if opening < 0.5 else -1.0
        return np.clip(out, -1, 1)

    def _lead(self, error, velocity, part):
        """The step of the controller's goal that corrects a part of an error."""
        rate = np.sqrt(self.stiffness) * self.period
        fades = np.exp(-rate)
        reach, coast = 1 - (1 + rate) * fades, self.period * fades
        way = part * error + (1 - part) * self.period * velocity
        return (way - coast * velocity) / reach
