"""Absolute target poses -> the normalised action of an operational-space delta controller."""

import dataclasses

import numpy as np
import scipy.linalg
import scipy.optimize

from gear_jax import geometry

LEVER = 0.2  # metres of place that weigh as much as a radian of turn, where both can't be had
EFFORT = 0.0005  # metres of error that an action of 1 must save


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

    A stretched arm is far from a unit mass: the controller reckons force and torque each as if the
    other were not there (`uncouple_pos_ori`), so that a push to the front tilts the hand, and some
    ways are six times as slow as others. With `coupled` the servo knows how the arm answers and
    solves for all six entries at once (see `coupling`).

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
        coupled: whether the servo reckons with `coupling`.
    """

    position_scale: float = 0.05
    rotation_scale: float = 0.5
    gain: float = 2.5
    rotation_gain: float = 1.0
    correction: float = 0.6
    rotation_correction: float = 0.75
    stiffness: float = 150.0
    period: float = 0.05
    coupled: bool = False

    def action(self, pose, target, opening, velocity=None, answer=None):
        """float32[7] in [-1, 1]: position, rotation vector, both in the base frame, gripper.

        Args:
            pose: float[4, 4], T_base_ee now, metres.
            target: float[4, 4], T_base_ee wanted at the end of the period.
            opening: of the gripper, 0 closed .. 1 open; the action is binary, -1 open, 1 close.
            velocity: float[6] of the hand in the base frame, m/s and rad/s, or None.
            answer: float[6, 6], `coupling` of the arm as it stands; needed if `coupled`.
        """
        shift = target[:3, 3] - pose[:3, 3]
        turn = geometry.rotmat_to_rotvec(target[:3, :3] @ pose[:3, :3].T)
        out = np.empty(7, np.float32)
        out[6] = 1.0 if opening < 0.5 else -1.0
        if self.coupled:
            out[:6] = self._solve(np.append(shift, turn), velocity, answer)
            return out
        if velocity is None:
            shift, turn = self.gain * shift, self.rotation_gain * turn
        else:
            shift = self._lead(shift, velocity[:3], self.correction)
            turn = self._lead(turn, velocity[3:], self.rotation_correction)
        out[:3] = shift / self.position_scale
        out[3:6] = turn / self.rotation_scale
        return np.clip(out, -1, 1)

    def _lead(self, error, velocity, part):
        """The step of the controller's goal that corrects a part of an error."""
        rate = np.sqrt(self.stiffness) * self.period
        fades = np.exp(-rate)
        reach, coast = 1 - (1 + rate) * fades, self.period * fades
        way = part * error + (1 - part) * self.period * velocity
        return (way - coast * velocity) / reach

    def _solve(self, error, velocity, answer):
        """The six entries whose period ends nearest to where it should, float[6] in [-1, 1]."""
        still, whole = np.zeros((6, 6)), np.eye(6)
        pull, brake = self.stiffness * answer, 2 * np.sqrt(self.stiffness) * answer
        motion = np.block([[still, whole, still], [-pull, -brake, pull], [still, still, still]])
        after = scipy.linalg.expm(motion * self.period)[:6]  # of place, velocity, goal
        part = np.repeat([self.correction, self.rotation_correction], 3)
        way = part * error + (1 - part) * self.period * velocity
        weight = np.repeat([1.0, LEVER], 3)
        scale = np.repeat([self.position_scale, self.rotation_scale], 3)
        effects = np.vstack([weight[:, None] * after[:, 12:] * scale, EFFORT * whole])
        wanted = np.append(weight * (way - after[:, 6:12] @ velocity), np.zeros(6))
        return scipy.optimize.lsq_linear(effects, wanted, bounds=(-1, 1), method="bvls").x


def coupling(jacobian, mass):
    """The accelerations that come of those that OSC asks for, float[6, 6]; the identity is best.

    With L the inertia that the hand feels, (J M^-1 J')^-1, the controller asks for forces L_place a
    and torques L_turn b, by L's inverse for place alone and turn alone; what comes is
    L^-1 diag(L_place, L_turn) (a, b).

    Args:
        jacobian: float[6, joints], of the hand's place and turn.
        mass: float[joints, joints], of the arm.
    """
    inverse = jacobian @ np.linalg.solve(mass, jacobian.T)
    blocks = np.linalg.inv(inverse[:3, :3]), np.linalg.inv(inverse[3:, 3:])
    return inverse @ scipy.linalg.block_diag(*blocks)


SERVOS = {  # by name
    "unit_mass": OscServo(),
    "coupled": OscServo(coupled=True, correction=0.8, rotation_correction=0.8),
}
