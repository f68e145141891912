"""A gripper in empty space that is to reach a goal: NumPy alone, milliseconds an episode.

No robot is simulated. It is there to try an evaluation from end to end, and for its tests: some
episodes are won by wandering about, others not, and each depends on every number it was given.
"""

import time

import numpy as np

from gear_jax.evals.sims.base import Target, Task
from gear_jax.types import ARMS, MAX_JOINTS, Observation

_SIZE = 32  # pixels
_SPEED = 0.02  # metres a step
_REACH = 0.5  # metres, of the space


class PointSimulator:
    """Tasks "near" and "far": how far the goal is from the start."""

    rate_hz = 20.0
    _DISTANCE = {"near": 0.06, "far": 0.12}  # noqa: RUF012

    def __init__(self, max_steps: int = 40, num_inits: int = 50, pace: float = 0.0):
        """A world at rest.

        Args:
            max_steps: of an episode.
            num_inits: of each task.
            pace: seconds that a step takes at least, as a slower simulator would.
        """
        self.max_steps, self.num_inits, self.pace = max_steps, num_inits, pace
        self.place = self.goal = np.zeros(3)

    def tasks(self):
        """Both tasks."""
        return [
            Task("point", name, f"reach the {name} goal", self.num_inits, self.max_steps)
            for name in self._DISTANCE
        ]

    def protocol(self):
        """Sizes and rate."""
        return {"size": _SIZE, "speed": _SPEED, "tolerance": 0.04, "rate_hz": self.rate_hz}

    def reset(self, task: str, init: int) -> None:
        """Draw start and goal."""
        if task not in self._DISTANCE or not 0 <= init < self.num_inits:
            raise ValueError(
                f"task {task!r}, initial state {init}: expected one of {sorted(self._DISTANCE)} "
                f"and 0 .. {self.num_inits - 1}"
            )
        rng = np.random.default_rng([list(self._DISTANCE).index(task), init])
        way = rng.standard_normal(3)
        self.task, self.place = task, rng.uniform(-0.2, 0.2, 3)
        self.goal = self.place + self._DISTANCE[task] * way / np.linalg.norm(way)

    def observe(self) -> Observation:
        """Both points from above, the height as brightness."""
        picture = np.full((_SIZE, _SIZE, 3), 32, np.uint8)
        for channel, point in ((1, self.goal), (0, self.place)):
            column, row, height = ((point / _REACH + 1) / 2).clip(0, 1)
            at = slice(max(0, int(row * _SIZE) - 2), int(row * _SIZE) + 3)
            picture[at, max(0, int(column * _SIZE) - 2) : int(column * _SIZE) + 3, channel] = (
                128 + int(127 * height)
            )
        right = ARMS.index("right")
        mask = np.arange(len(ARMS)) == right
        pose = np.tile(np.eye(4, dtype=np.float32), (len(ARMS), 1, 1))
        pose[right, :3, 3] = self.place
        return Observation(
            images={"head": picture},
            instruction=f"reach the {self.task} goal",
            embodiment="franka",
            state={
                "ee_pose": pose,
                "ee_mask": mask,
                "joint_pos": np.zeros((len(ARMS), MAX_JOINTS), np.float32),
                "joint_mask": np.zeros((len(ARMS), MAX_JOINTS), bool),
                "grip_open": mask.astype(np.float32),
                "grip_mask": mask,
                "arm_mask": mask,
            },
        )

    def step(self, target: Target) -> bool:
        """Go there, no faster than it can; done within 4 cm of the goal."""
        time.sleep(self.pace)
        way = target["right"][0][:3, 3] - self.place
        self.place = self.place + way * min(1.0, _SPEED / max(np.linalg.norm(way), 1e-9))
        return bool(np.linalg.norm(self.goal - self.place) < 0.04)

    def close(self) -> None:
        """Nothing to give up."""
