"""Scripted demonstrations on the tabletop: over the block, down, wait, close, up.

The expert reads the block's place from the simulator. What is executed is pushed off the clean
action now and then (as in DART), so that demonstrations show how to come back.
"""

import numpy as np

from gear_jax import geometry
from gear_jax.evals.sims.tabletop import looking_down

_OVER, _LIFT = 0.07, 0.12  # metres above the table, of the finger tips
_GRASP = 0.018
_CLOSE_ENOUGH = 0.012  # metres beside the block's middle: closing fingers do the rest
_REST_STEPS = 4  # at the bottom, so that a policy that closes a little early is there already
_CLOSE_STEPS = 6
_GAIN = 6.0
# of the controller's greatest, in each phase: a policy that is asked three times a second can
# follow, and the way to the block is as much of a run as the way up
_SPEEDS = (0.25, 0.4, 0.4, 0.4)


class TabletopExpert:
    """One episode's worth of decisions; `act` is called once a control step."""

    def __init__(self, simulator):
        """Begin above the block of the simulator's present episode, or where its grasp stands."""
        self.simulator = simulator
        pose, block = simulator.pose(), simulator.block()
        beside = np.hypot(*(pose[:2, 3] - block[:2]))
        about = beside < 0.015 and pose[2, 3] < 0.04 and simulator.opening() > 0.9
        self.phase, self.steps = 3 if simulator.holds() else 1 if about else 0, 0
        self._grasped = pose[:2, 3]

    def act(self) -> np.ndarray:
        """The next clean action, float32[7], of OscServo's kind."""
        pose, block = self.simulator.pose(), self.simulator.block()
        x, y = block[:2]
        height = (_OVER, _GRASP, _GRASP, _LIFT)[self.phase]
        # a block looks the same after a quarter turn
        yaw = (block[3] + np.pi / 4) % (np.pi / 2) - np.pi / 4
        near = np.hypot(*(pose[:2, 3] - block[:2]))
        if self.phase == 0:
            height = max(height, _GRASP + 0.04) if near < 0.01 else height
        if self.phase == 3:
            x, y = self._grasped
        target = looking_down(np.array([x, y, height]), yaw)
        action = self._servo(pose, target)
        closes = self.phase == 3 or (self.phase == 2 and self.steps >= _REST_STEPS)
        action[6] = 1.0 if closes else -1.0
        self.steps += 1
        if (
            (self.phase == 0 and near < 0.008 and pose[2, 3] < _OVER + 0.02)
            or (self.phase == 1 and near < _CLOSE_ENOUGH and pose[2, 3] < height + 0.006)
            or (self.phase == 2 and self.steps >= _REST_STEPS + _CLOSE_STEPS)
        ):
            self.phase, self.steps = self.phase + 1, 0
            self._grasped = pose[:2, 3].copy()
        if self.phase == 3 and self.steps > 12 and self.simulator.block()[2] < 0.03:
            self.phase, self.steps = 0, 0  # it slipped: again
        return action

    def _servo(self, pose, target):
        error, speed = target[:3, 3] - pose[:3, 3], _SPEEDS[self.phase]
        turn = geometry.rotmat_to_rotvec(target[:3, :3] @ pose[:3, :3].T)
        action = np.zeros(7, np.float32)
        action[:3] = np.clip(_GAIN * error / 0.05 * 0.35, -speed, speed)
        action[3:6] = np.clip(turn / 0.5, -1, 1)
        return action


class Pushes:
    """Disturbances of executed actions: now and then, for some steps, one direction."""

    def __init__(
        self,
        rng: np.random.Generator,
        *,
        chance: float = 0.02,
        size: float = 0.7,
        turn: float = 0.0,
    ):
        """How often a push begins, how strong it is at most, and what part of it turns the hand."""
        self.rng, self.chance, self.size, self.turn = rng, chance, size, turn
        self._left, self._push = 0, np.zeros(6)

    def __call__(self, action: np.ndarray) -> np.ndarray:
        """The action that is executed."""
        if not self._left and self.rng.random() < self.chance:
            self._left = int(self.rng.integers(2, 6))
            self._push = np.zeros(6)
            self._push[:3] = self.rng.uniform(-1, 1, 3) * self.size * (1, 1, 0.4)
            if self.turn:
                self._push[3:] = self.rng.uniform(-1, 1, 3) * self.size * self.turn
        pushed = action.copy()
        if self._left:
            self._left -= 1
            pushed[:6] = np.clip(pushed[:6] + self._push, -1, 1)
        return pushed
