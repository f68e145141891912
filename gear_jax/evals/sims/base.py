"""What an evaluation needs of a simulator, whichever it is and whichever process it runs in.

    reset(task, init) -> observe() -> policy -> targets -> step(target), step(target), ...
                            ^-------------------------------------------------'

Targets are absolute poses in the robot's base frame at the simulator's own control rate; turning
them into its controller's action is the adapter's part (policy/servo.py). NumPy only: an adapter
may run in a virtual environment without JAX.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from gear_jax.types import Observation

# For each arm: T_base_ee float[4, 4], metres, and the gripper's opening, 0 closed .. 1 open.
Target = Mapping[str, tuple[np.ndarray, float]]


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of a suite.

    Attributes:
        suite: such as "libero_spatial".
        name: unique within the suite.
        instruction: what the robot is told.
        num_inits: initial states; the numbers below it are valid.
        max_steps: control steps until the episode counts as failed, settling not counted.
    """

    suite: str
    name: str
    instruction: str
    num_inits: int
    max_steps: int


class Simulator(Protocol):
    """One world. What follows `reset` is a function of (task, init) and the targets alone."""

    rate_hz: float

    def tasks(self) -> Sequence[Task]:
        """Every task it can run."""
        ...

    def protocol(self) -> Mapping[str, Any]:
        """What the numbers depend on, as plain JSON: versions, physics, renderer, cameras."""
        ...

    def reset(self, task: str, init: int) -> None:
        """Begin an episode, and let it settle.

        Raises:
            ValueError: no such task or initial state.
        """
        ...

    def observe(self) -> Observation:
        """What the policy sees now; the only call that renders."""
        ...

    def step(self, target: Target) -> bool:
        """One control step towards a target; whether the task is done."""
        ...

    def close(self) -> None:
        """Give up windows and memory."""
        ...
