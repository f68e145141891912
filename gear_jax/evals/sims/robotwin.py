"""RoboTwin 2.0 as a worker: two arms of six joints, asked for by pose, told by joint angles.

Not run against RoboTwin: its assets were not available. What is relied on is the interface of
`robotwin.envs.vector_env.VectorEnv` (package rlinf-robotwin-runtime), to which tests hold a
stand-in:

    VectorEnv(task_config, n_envs, env_seeds, instruction_type)
    reset(env_idx, env_seeds)
    get_obs() -> [{full_image, left_wrist_image, right_wrist_image, state[14], instruction}]
    step(float[n, chunk, 14]) -> obs, reward, terminated, truncated, info
    state, action: left joints 6, left gripper, right joints 6, right gripper; radians, 0 .. 1 open

It tells no pose of an end effector, so poses come from a robot description (data/kinematics.py,
which needs MuJoCo beside RoboTwin), both ways. Initial state k of a task is the k-th seed that
RoboTwin's own expert solves: `solvable_seeds` finds them, once; its evaluation counts no others.
"""

import importlib
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gear_jax import geometry
from gear_jax.evals.sims.base import Target, Task
from gear_jax.types import ARMS, MAX_JOINTS, Observation

_JOINTS = 6  # of an arm
_PARTS = {"left": slice(0, 6), "right": slice(7, 13)}
_GRIPPERS = {"left": 6, "right": 13}
_VIEWS = {
    "head": "full_image",
    "left_wrist": "left_wrist_image",
    "right_wrist": "right_wrist_image",
}
_INSTRUCTIONS = ("seen", "unseen")


class RobotwinSimulator:
    """A Simulator of RoboTwin's tasks; one process runs one environment."""

    def __init__(
        self,
        tasks: Mapping[str, Mapping[str, Any]] | str,
        task_config: Mapping[str, Any] | str,
        arms: Mapping[str, Mapping[str, Any]],
        instruction_type: str = "seen",
        rate_hz: float = 250 / 15,
        *,
        make: Callable[..., Any] | None = None,
    ):
        """Nothing is opened before the first `reset`.

        Args:
            tasks: {name: {"seeds": those its expert solves, "max_steps": its step limit}}, or a
                JSON file of that.
            task_config: RoboTwin's `demo_clean` or `demo_randomized`, or a JSON file of it.
            arms: for "left" and "right", the fields of `data.kinematics.Kinematics`.
            instruction_type: "seen" or "unseen".
            rate_hz: actions a second. RoboTwin gives an action the time that its planner wants;
                this is the rate of its recordings.
            make: of the environment, in place of VectorEnv.

        Raises:
            ValueError: options that cannot be.
        """
        if instruction_type not in _INSTRUCTIONS or set(arms) != set(ARMS):
            raise ValueError(
                f"instruction_type {instruction_type!r}, arms {sorted(arms)}: expected one of "
                f"{_INSTRUCTIONS}, and {sorted(ARMS)}"
            )
        self._tasks, self._config = _opened(tasks), _opened(task_config)
        self._instruction_type, self.rate_hz = instruction_type, float(rate_hz)
        self._arms, self._make = arms, make
        self._chains = {arm: _chain(arms[arm]) for arm in ARMS}
        self._env: Any = None
        self._task, self._seen, self._joints = "", {}, np.zeros(14)

    def tasks(self) -> Sequence[Task]:
        """Every task for which there are seeds; its instruction is drawn with the seed."""
        return [
            Task("robotwin", name, "", len(one["seeds"]), int(one["max_steps"]))
            for name, one in self._tasks.items()
        ]

    def protocol(self) -> Mapping[str, Any]:
        """Configuration, seeds and versions."""
        return {
            "task_config": self._config,
            "seeds": {name: list(one["seeds"]) for name, one in self._tasks.items()},
            "instruction_type": self._instruction_type,
            "actions": "joint angles by inverse kinematics",
            "versions": _versions(),
        }

    def reset(self, task: str, init: int) -> None:
        """Begin the episode of a task's `init`-th seed."""
        if task not in self._tasks or not 0 <= init < len(self._tasks[task]["seeds"]):
            raise ValueError(f"task {task!r}, initial state {init}: expected one of `tasks`")
        seed = int(self._tasks[task]["seeds"][init])
        np.random.seed(seed)  # RoboTwin draws the instruction from it
        if task != self._task:
            self.close()
            config = {**self._config, "task_name": task}
            config["step_lim"] = int(self._tasks[task]["max_steps"])
            make = self._make or _vector_env()
            self._env = make(config, 1, env_seeds=[seed], instruction_type=self._instruction_type)
            self._task = task
            np.random.seed(seed)  # opening drew from it too
        self._env.reset(env_idx=[0], env_seeds=[seed])
        self._see(self._env.get_obs()[0])
        self._joints = self._state()

    def observe(self) -> Observation:
        """What it rendered after the last step: it renders at each."""
        state = self._state()
        joints = np.zeros((len(ARMS), MAX_JOINTS), np.float32)
        joints[:, :_JOINTS] = [state[_PARTS[arm]] for arm in ARMS]
        poses = [self._chains[arm](state[_PARTS[arm]][None])[0] for arm in ARMS]
        there = np.ones(len(ARMS), bool)
        return Observation(
            images={view: np.asarray(self._seen[key]) for view, key in _VIEWS.items()},
            instruction=str(self._seen["instruction"]),
            embodiment="agilex_cobot_magic",
            state={
                "ee_pose": np.asarray(poses, np.float32),
                "ee_mask": there,
                "joint_pos": joints,
                "joint_mask": np.tile(np.arange(MAX_JOINTS) < _JOINTS, (len(ARMS), 1)),
                "grip_open": np.array([state[_GRIPPERS[arm]] for arm in ARMS], np.float32),
                "grip_mask": there,
                "arm_mask": there,
            },
        )

    def step(self, target: Target) -> bool:
        """One action of both arms; an arm without a target stays where it was told to be."""
        for arm, (pose, opening) in target.items():
            part = _PARTS[arm]
            self._joints[part] = solve(self._chains[arm], self._joints[part], np.asarray(pose))
            self._joints[_GRIPPERS[arm]] = min(max(float(opening), 0.0), 1.0)
        action = self._joints.astype(np.float32)[None, None]
        seen, _, terminated, _, info = self._env.step(action)
        self._see(seen[0])
        return bool(np.any(info[0].get("success", np.any(terminated[0]))))

    def close(self) -> None:
        """Give up the environment."""
        if self._env is not None:
            self._env.close()
        self._env, self._task = None, ""

    def _see(self, seen):
        state = np.asarray(seen["state"])
        if state.shape != (14,):
            raise ValueError(
                f"state of shape {state.shape}: expected 14 numbers of two 6-joint arms"
            )
        self._seen = seen

    def _state(self):
        return np.array(self._seen["state"], np.float64)


def solve(poses: Callable, joints: np.ndarray, target: np.ndarray, *, rounds: int = 20):
    """Joints float64[n] whose pose is nearest to the target, near those given.

    Args:
        poses: float[B, n] -> T_base_ee float[B, 4, 4].
        joints: float[n], to begin from, radians.
        target: float[4, 4], T_base_ee.
        rounds: of damped least squares; a target out of reach is approached.
    """
    joints, small = np.array(joints, np.float64), 1e-5
    nudges = small * np.eye(len(joints))
    for _ in range(rounds):
        here, *moved = poses(np.vstack([joints, joints + nudges]))
        error = _difference(here, target)
        if np.abs(error).max() < 1e-6:
            break
        slope = np.stack([_difference(here, one) for one in moved], axis=1) / small
        damping = 1e-8 + 1e-2 * min(1.0, error @ error)  # little where it is nearly there
        square = slope.T @ slope + damping * np.eye(len(joints))
        joints = joints + np.clip(np.linalg.solve(square, slope.T @ error), -0.3, 0.3)
    return joints


def solvable_seeds(env: Any, first: int, count: int, *, most: int = 10_000) -> Iterator[int]:
    """The first `count` seeds from `first` on that RoboTwin's own expert solves.

    Args:
        env: a VectorEnv of one environment.
        first: 100000 * (1 + seed) in RoboTwin's evaluation.
        count: 100 there.
        most: seeds to try.

    Raises:
        ValueError: not that many among them.
    """
    found = 0
    for seed in range(first, first + most):
        if found == count:
            return
        (one,) = env.check_seeds([seed])
        if one["setup_demo_success"] and one["play_once_success"]:
            found += 1
            yield seed
    if found < count:
        raise ValueError(f"{found} of {most} seeds from {first} on are solvable: expected {count}")


def _difference(here, there):
    """float64[6], metres and radians, from one pose to another, in the base frame."""
    turn = geometry.rotmat_to_rotvec(there[:3, :3] @ here[:3, :3].T)
    return np.concatenate([there[:3, 3] - here[:3, 3], turn])


def _chain(arm):
    if callable(arm):
        return arm
    from gear_jax.data.kinematics import Kinematics

    return Kinematics(arm["model"], arm["base"], arm["tip"], tuple(arm["joints"])).poses


def _opened(value):
    return json.loads(pathlib.Path(value).read_text()) if isinstance(value, str) else dict(value)


def _vector_env():
    return importlib.import_module("robotwin.envs.vector_env").VectorEnv


def _versions():
    from importlib import metadata

    names = ("rlinf-robotwin-runtime", "sapien", "mujoco")
    found = {one.metadata["Name"]: one.version for one in metadata.distributions()}
    return {name: found.get(name) for name in names}
