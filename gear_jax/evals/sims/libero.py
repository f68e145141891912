"""LIBERO: the benchmark's own tasks, initial states, controller and cameras (arXiv 2306.03310).

Everything goes through the import API that its distributions share (`libero.libero`). Two habits
of the benchmark decide what an episode is, and are kept:

* Fixtures without joints (cabinet, stove) are placed anew at each reset by NumPy's global
  generator, so the episode of initial state i begins with reset number i + 1 after seeding. Here
  that holds for any order of episodes. (The benchmark also compiles the model anew; what follows
  is the same to the bit without that.)
* Poses are in the simulator's world, whose axes are the robot base's; so are its data sets'.

Physics runs without cameras; a picture costs 40 to 150 ms and is drawn only by `observe`.
"""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import io
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gear_jax import geometry
from gear_jax.data.windows import empty_state
from gear_jax.evals.sims.base import Target, Task
from gear_jax.evals.sims.rendering import choose_backend
from gear_jax.policy.servo import SERVOS, coupling
from gear_jax.types import ARMS, Image, Observation, State

MAX_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
CAMERAS = {"head": "agentview", "right_wrist": "robot0_eye_in_hand"}
RATE_HZ = 20.0
SETTLE_STEPS = 10
SETTLE = np.array([0, 0, 0, 0, 0, 0, -1.0])
FINGER_OPEN = 0.04  # metres that each finger is away from the middle when open
_VISUAL_GROUP = 1  # of geoms; 0 are those that collide
_RIGHT = ARMS.index("right")


class LiberoSimulator:
    """A Simulator of one suite; its environment is made at the first `reset` of a task."""

    rate_hz = RATE_HZ
    package = "libero.libero"
    needs = "LIBERO needs: pip install 'gear_jax[libero]'"

    def __init__(
        self,
        suite: str = "libero_spatial",
        *,
        image_size: int = 256,
        quality: Literal["full", "fast"] = "full",
        seed: int = 7,
        servo: str = "unit_mass",
    ):
        """Import the benchmark; no environment is made yet.

        Args:
            suite: a key of `MAX_STEPS`.
            image_size: pixels, both sides of both cameras.
            quality: "full" gives the benchmark's own pictures; "fast" leaves out shadows,
                reflections and anti-aliasing, 2 to 4 times faster: not for reported numbers.
            seed: of the fixtures' places.
            servo: from target poses to actions, a key of `SERVOS`. "coupled" follows them four
                times as closely (benchmarks/RESULTS.md); one trained policy did equally well with
                both (docs/quickstart_findings.md).

        Raises:
            ValueError: unknown suite or option.
            ImportError: LIBERO is not installed.
        """
        for name, value, accepted in (
            ("suite", suite, tuple(MAX_STEPS)),
            ("quality", quality, ("full", "fast")),
            ("servo", servo, tuple(SERVOS)),
        ):
            if value not in accepted:
                raise ValueError(f"LIBERO's {name} is {value!r}: expected one of {accepted}")
        if image_size < 8:
            raise ValueError(f"LIBERO's image_size is {image_size}: expected 8 or more pixels")
        self.suite, self.image_size, self.quality = suite, image_size, quality
        self.seed, self.servo = seed, SERVOS[servo]
        self._libero = self._import()
        with _off_stdout():
            self._suite = self._libero["benchmark"].get_benchmark(suite)()
        self._tasks = {one.name: one for one in self._suite.tasks}
        self._inits: dict[str, np.ndarray] = {}
        self._env: Any = None
        self._renderer: Any = None
        self._task = ""

    def tasks(self) -> Sequence[Task]:
        """Those of the suite, in its order."""
        limit = MAX_STEPS[self.suite]
        return [
            Task(self.suite, name, one.language, len(self._init_states(name)), limit)
            for name, one in self._tasks.items()
        ]

    def protocol(self) -> Mapping[str, Any]:
        """What the numbers depend on."""
        version = importlib.metadata.version
        return {
            "simulator": "libero",
            "suite": self.suite,
            "distribution": _distribution(self.package.split(".")[0]),
            "mujoco": version("mujoco"),
            "robosuite": version("robosuite"),
            "renderer": os.environ.get("MUJOCO_GL", ""),
            "quality": self.quality,
            "cameras": {
                view: [camera, self.image_size, self.image_size] for view, camera in CAMERAS.items()
            },
            "rate_hz": RATE_HZ,
            "max_steps": MAX_STEPS[self.suite],
            "settle_steps": SETTLE_STEPS,
            "seed": self.seed,
            "servo": dataclasses.asdict(self.servo),
        }

    def reset(self, task: str, init: int) -> None:
        """Begin an episode from an official initial state, and let it settle.

        Raises:
            ValueError: no such task or initial state.
        """
        if task not in self._tasks:
            raise ValueError(
                f"{self.suite} has no task {task!r}: expected one of {list(self._tasks)}"
            )
        states = self._init_states(task)
        if not 0 <= init < len(states):
            raise ValueError(f"initial state {init} of {task!r}: expected 0 .. {len(states) - 1}")
        with _off_stdout():
            if task != self._task:
                self._make(task)
            self._place_fixtures(init)
            self._obs = self._start(states[init])
            for _ in range(SETTLE_STEPS):
                self.act(SETTLE)

    def observe(self) -> Observation:
        """Both views and the state; the only call that renders."""
        return Observation(self._draw(), self.instruction, "franka", self.state())

    def state(self) -> State:
        """What `observe` says of the robot, without a picture."""
        obs, state = self._obs, empty_state()
        turn = geometry.quat_to_rotmat(geometry.quat_from_xyzw(obs["robot0_eef_quat"]))
        state["ee_pose"][_RIGHT] = geometry.make_pose(obs["robot0_eef_pos"], turn)
        state["joint_pos"][_RIGHT, :7] = obs["robot0_joint_pos"]
        state["joint_mask"][_RIGHT, :7] = True
        state["grip_open"][_RIGHT] = np.clip(obs["robot0_gripper_qpos"][0] / FINGER_OPEN, 0, 1)
        for name in ("ee_mask", "grip_mask", "arm_mask"):
            state[name][_RIGHT] = True
        return state

    def fingers(self) -> np.ndarray:
        """Both fingers' places as the benchmark says them, float[2], metres."""
        return np.asarray(self._obs["robot0_gripper_qpos"])

    def pose(self) -> np.ndarray:
        """T_base_ee at present, float64[4, 4]: place of the grip site, turn of the hand."""
        site, hand = self.data.site("gripper0_grip_site"), self.data.body("robot0_right_hand")
        return geometry.make_pose(site.xpos.copy(), geometry.quat_to_rotmat(hand.xquat))

    def velocity(self) -> np.ndarray:
        """Of the hand at present, float64[6] in the base frame, m/s and rad/s."""
        mujoco: Any = importlib.import_module("mujoco")
        found, kind = np.zeros(6), mujoco.mjtObj.mjOBJ_SITE
        site = self.data.site("gripper0_grip_site").id
        mujoco.mj_objectVelocity(self.model, self.data, kind, site, found, 0)
        return np.concatenate([found[3:], found[:3]])

    def coupling(self) -> np.ndarray:
        """How the arm answers its controller, float64[6, 6] (policy/servo.py)."""
        controller = self._env.env.robots[0].controller
        return coupling(controller.J_full, controller.mass_matrix)

    def step(self, target: Target) -> bool:
        """One control step towards the right arm's target; whether the task is done."""
        pose, opening = target["right"]
        answer = self.coupling() if self.servo.coupled else None
        return self.act(self.servo.action(self.pose(), pose, opening, self.velocity(), answer))

    def act(self, action: np.ndarray) -> bool:
        """One control step of the benchmark's own action, float[7] in [-1, 1]; whether done."""
        self._obs, _, done, _ = self._env.step(np.asarray(action, np.float64))
        return bool(done)

    @property
    def instruction(self) -> str:
        """Of the present task."""
        return self._tasks[self._task].language

    @property
    def model(self) -> Any:
        """The present task's `mujoco.MjModel`; for experts, not for policies."""
        model = self._env.sim.model
        return getattr(model, "_model", model)

    @property
    def data(self) -> Any:
        """Its `mujoco.MjData`."""
        data = self._env.sim.data
        return getattr(data, "_data", data)

    def goals(self) -> list[tuple[str, ...]]:
        """The task's goal, a conjunction such as [("on", "bowl_1", "plate_1")]."""
        return [tuple(one) for one in self._env.env.parsed_problem["goal_state"]]

    def holds(self, goal: tuple[str, ...]) -> bool:
        """Whether one of `goals` is true at present."""
        return bool(self._env.env._eval_predicate(list(goal)))

    def close(self) -> None:
        """Give up the renderer and the environment."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        if self._env is not None:
            self._env.close()
            self._env, self._task = None, ""

    def _init_states(self, task: str) -> np.ndarray:
        if task not in self._inits:
            with _off_stdout():
                number = list(self._tasks).index(task)
                self._inits[task] = np.asarray(self._suite.get_task_init_states(number))
        return self._inits[task]

    def _start(self, state: np.ndarray) -> Any:
        """Put everything where an initial state has it; what is observed then."""
        return self._env.set_init_state(state)

    def _import(self) -> dict[str, Any]:
        return _import_libero(self.package, self.needs)

    def _make(self, task: str) -> None:
        self.close()
        one = self._tasks[task]
        folder = Path(self._libero["get_libero_path"]("bddl_files"))
        self._env = self._libero["ControlEnv"](
            bddl_file_name=str(folder / one.problem_folder / one.bddl_file),
            use_camera_obs=False,
            has_renderer=False,
            has_offscreen_renderer=False,
        )
        self._env.env.hard_reset = False
        self._task = task
        with _global_random():
            self._env.seed(self.seed)
            self._random = [np.random.get_state()]  # before reset number i + 1

    def _place_fixtures(self, init: int) -> None:
        """Reset number `init` + 1 after seeding."""
        for robot in self._env.env.robots:
            robot.gripper.current_action = np.zeros(robot.gripper.dof)  # else kept over resets
        with _global_random():
            for number in range(min(init, len(self._random) - 1), init + 1):
                np.random.set_state(self._random[number])
                self._env.reset()
                if number + 1 == len(self._random):
                    self._random.append(np.random.get_state())

    def _draw(self) -> dict[str, Image]:
        """Upright pictures of the present, uint8[H, W, 3]."""
        if self._renderer is None:
            self._renderer = self._open_renderer()
        images = {}
        for view, camera in CAMERAS.items():
            self._renderer.update_scene(self.data, camera, self._visual)
            images[view] = self._renderer.render().copy()
        return images

    def _open_renderer(self) -> Any:
        mujoco: Any = importlib.import_module("mujoco")  # after the backend is chosen
        model, size = self.model, self.image_size
        screen = model.vis.global_
        screen.offwidth, screen.offheight = max(screen.offwidth, size), max(screen.offheight, size)
        if self.quality == "fast":
            model.vis.quality.offsamples = 0
        renderer = mujoco.Renderer(model, size, size)
        if self.quality == "fast":
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                renderer.scene.flags[flag] = 0
        self._visual = mujoco.MjvOption()
        self._visual.geomgroup[:] = 0
        self._visual.geomgroup[_VISUAL_GROUP] = 1
        return renderer


def _import_libero(package: str, needs: str) -> dict[str, Any]:
    """The shared import API; the benchmark writes no file into the user's home."""
    choose_backend()
    if "LIBERO_CONFIG_PATH" not in os.environ:
        os.environ["LIBERO_CONFIG_PATH"] = tempfile.mkdtemp(prefix="libero-")
    try:
        with _off_stdout():
            libero = importlib.import_module(package)
            benchmark = importlib.import_module(f"{package}.benchmark")
            envs = importlib.import_module(f"{package}.envs.env_wrapper")
    except ImportError as error:
        raise ImportError(f"{needs} ({error})") from error
    return {
        "benchmark": benchmark,
        "get_libero_path": libero.get_libero_path,
        "ControlEnv": envs.ControlEnv,
    }


def _distribution(module: str) -> str:
    """Name and version of the installed package that holds a module."""
    names = importlib.metadata.packages_distributions().get(module, ["unknown"])
    return " ".join(
        [names[0], *(importlib.metadata.version(n) for n in names[:1] if n != "unknown")]
    )


@contextlib.contextmanager
def _off_stdout():
    """What is printed goes to stderr, and a question about folders is answered with no."""
    stdin, sys.stdin = sys.stdin, io.StringIO("n\n" * 9)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdin = stdin


@contextlib.contextmanager
def _global_random():
    """NumPy's global generator is as it was afterwards."""
    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)
