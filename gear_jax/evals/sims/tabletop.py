"""The embedded tabletop: coloured blocks, a gripper on a gantry, and an instruction that names one.

A small stand-in for LIBERO that needs MuJoCo and nothing to download: the same cameras (head and
right wrist), rate and controller (`OscServo`), real contacts. It is a toy: its success rates belong
in no table beside published ones.

Initial states are a function of their number alone. Those below `NUM_INITS` are for evaluation;
demonstrations use numbers from there on (tabletop_expert.py). Perturbations carry the names of
LIBERO-Plus's seven axes.
"""

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gear_jax import geometry
from gear_jax.data.windows import empty_state
from gear_jax.evals.sims.base import Target, Task
from gear_jax.evals.sims.rendering import choose_backend
from gear_jax.evals.sims.tabletop_scene import (
    BLOCK,
    COLOURS,
    FINGER_OPEN,
    IMAGE_SIZE,
    Look,
    apply_look,
    scene_xml,
)
from gear_jax.policy.servo import OscServo
from gear_jax.types import Observation

RATE_HZ = 20.0
NUM_INITS = 1000  # for evaluation
MAX_STEPS = 120
LIFTED = 0.06  # metres of the block's centre above its place on the table
AXES = ("camera", "robot", "language", "light", "background", "noise", "layout")
OPTIONS = {"instruct": ("named", "other"), "noisy_view": ("head", "right_wrist")}
_TIMESTEPS = 20  # of 2.5 ms, in a control step
_SETTLE = 4  # control steps
_SPREAD = 0.085  # metres from the middle that a block may lie
_APART = 0.075  # metres between blocks
_START = np.array([0.0, 0.0, 0.08])  # the hand's mean start: the head camera sees it
PHRASES = ("pick up the {} block", "lift the {} block", "grab the {} block and lift it",
            "take the {} block")  # fmt: skip
_REPHRASED = ("get me the {} one", "raise that {} cube off the table", "I want the {} block, up!",
              "could you please pick the {} cube", "hoist the block that is {}")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scene:
    """One initial state.

    Attributes:
        colours: of the blocks, the named one first.
        places: float[n, 3] of each: x, y in metres, yaw.
        hand: float[4], x, y, z, yaw.
        instruction: names the first block.
    """

    colours: tuple[str, ...]
    places: np.ndarray
    hand: np.ndarray
    instruction: str


def draw_scene(colour: str, init: int, num_blocks: int = 3) -> Scene:
    """The initial state of a number; the same on every machine."""
    rng = np.random.default_rng([list(COLOURS).index(colour), init])
    hand = np.append(_START, 0) + rng.uniform(-1, 1, 4) * (0.09, 0.09, 0.015, 0.2)
    phrase = PHRASES[rng.integers(len(PHRASES))]
    others = rng.permutation([one for one in COLOURS if one != colour])[: num_blocks - 1]
    places: list[np.ndarray] = []
    while len(places) < num_blocks:
        place = rng.uniform(-_SPREAD, _SPREAD, 2)
        if all(np.linalg.norm(place - other[:2]) > _APART for other in places):
            places.append(np.append(place, rng.uniform(-0.3, 0.3)))
    return Scene((colour, *others.tolist()), np.stack(places), hand, phrase.format(colour))


class TabletopSimulator:
    """A Simulator. Its tasks are "pick_<colour>"."""

    rate_hz = RATE_HZ

    def __init__(
        self,
        *,
        image_size: int = IMAGE_SIZE,
        perturb: Mapping[str, int] | None = None,
        instruct: str = "named",
        noisy_view: str = "head",
    ):
        """Nothing is built before the first episode.

        Args:
            image_size: pixels, of both cameras.
            perturb: {axis of `AXES`: level 1 .. 5}.
            instruct: "other": the instruction names another block that lies there; success is still
                that of the task's own. A policy that follows instructions fails.
            noisy_view: which camera the axis "noise" disturbs.

        Raises:
            ValueError: an unknown axis, level or option.
        """
        self.perturb = dict(perturb or {})
        for axis, level in self.perturb.items():
            if axis not in AXES or level not in range(1, 6):
                raise ValueError(
                    f"perturb {axis!r} is {level!r}: expected a level 1 .. 5 of {AXES}"
                )
        for name, value in (("instruct", instruct), ("noisy_view", noisy_view)):
            if value not in OPTIONS[name]:
                raise ValueError(f"{name} is {value!r}: expected one of {OPTIONS[name]}")
        self.backend = choose_backend()
        self.image_size, self.instruct, self.noisy_view = image_size, instruct, noisy_view
        self.servo = OscServo()
        self._renderer: Any = None
        self._model: Any = None

    def tasks(self) -> Sequence[Task]:
        """One for each colour."""
        return [
            Task("tabletop", f"pick_{colour}", PHRASES[0].format(colour), NUM_INITS, MAX_STEPS)
            for colour in COLOURS
        ]

    def protocol(self) -> Mapping[str, Any]:
        """What the numbers depend on."""
        mujoco = _mujoco()
        return {
            "simulator": "gear_jax tabletop 3",
            "mujoco": mujoco.__version__,
            "renderer": self.backend,
            "cameras": {view: [self.image_size] * 2 for view in ("head", "right_wrist")},
            "rate_hz": RATE_HZ,
            "max_steps": MAX_STEPS,
            "servo": dataclasses.asdict(self.servo),
            "perturb": dict(sorted(self.perturb.items())),
            "instruct": self.instruct,
            "noisy_view": self.noisy_view,
        }

    def reset(self, task: str, init: int) -> None:
        """Begin an episode.

        Raises:
            ValueError: no such task or initial state.
        """
        names = [one.name for one in self.tasks()]
        if task not in names:
            raise ValueError(f"tabletop task {task!r}: expected one of {names}")
        if init < 0:
            raise ValueError(f"tabletop initial state {init}: expected 0 or more")
        colour = task.removeprefix("pick_")
        rng = np.random.default_rng([list(COLOURS).index(colour), init, 1])  # of what is perturbed
        scene = draw_scene(colour, init, 3 + (self._level("layout") > 2))
        self.scene = self._disturbed(scene, rng)
        self._build(rng)
        self._noise = np.random.default_rng([list(COLOURS).index(colour), init, 2])
        for _ in range(_SETTLE):
            self._advance(np.zeros(7))
        self._rest = self._block_height()

    def place(self, colour: str, init: int, rng: np.random.Generator, num_blocks: int = 3) -> None:
        """A scene with the hand anywhere above it, open or closed; nothing moves."""
        mujoco = _mujoco()
        self.scene = draw_scene(colour, init, num_blocks)
        self._build(rng)
        self._data.qpos[:4] = rng.uniform((-0.16, -0.16, 0.02, -0.4), (0.16, 0.16, 0.14, 0.4))
        self._data.qpos[4:6] = rng.uniform(0, 1) * FINGER_OPEN
        mujoco.mj_forward(self._model, self._data)

    def observe(self) -> Observation:
        """Both views and the state."""
        state = empty_state()
        state["ee_pose"][1] = self.pose()
        state["joint_pos"][1, :4] = self._data.qpos[:4]
        state["joint_mask"][1, :4] = True
        state["grip_open"][1] = self.opening()
        for name in ("ee_mask", "grip_mask", "arm_mask"):
            state[name][1] = True
        return Observation(
            {view: self._draw(view) for view in ("head", "right_wrist")},
            self.scene.instruction, "tabletop_gantry", state,
        )  # fmt: skip

    def step(self, target: Target) -> bool:
        """One control step towards the right arm's target; whether the block is lifted."""
        pose, opening = target["right"]
        self.act(self.servo.action(self.pose(), pose, opening))
        return self.solved()

    def act(self, action: np.ndarray) -> None:
        """One control step of the controller's own action, float[7] in [-1, 1] (see OscServo)."""
        self._advance(np.clip(action, -1, 1))

    def pose(self) -> np.ndarray:
        """T_base_ee float64[4, 4]: between the finger tips, looking down."""
        x, y, z, yaw = self._data.qpos[:4]
        return looking_down(np.array([x, y, z]), yaw)

    def block(self) -> np.ndarray:
        """The named block's x, y, z and yaw, float64[4]: for the expert, not for a policy."""
        start = 6
        position, quat = self._data.qpos[start : start + 3], self._data.qpos[start + 3 : start + 7]
        return np.append(position, 2 * np.arctan2(quat[3], quat[0]))

    def solved(self) -> bool:
        """Whether the named block is off the table, and in the hand."""
        held = np.linalg.norm(self.block()[:3] - self._data.qpos[:3]) < 2 * BLOCK
        return bool(held and self._block_height() - self._rest > LIFTED)

    def opening(self) -> float:
        """Of the fingers, 0 .. 1."""
        return float(np.clip(self._data.qpos[4] / FINGER_OPEN, 0, 1))

    def holds(self) -> bool:
        """Whether the fingers were closed, and the named block keeps them apart."""
        apart = self._data.qpos[4] > BLOCK / 2
        near = np.linalg.norm(self.block()[:3] - self._data.qpos[:3]) < BLOCK
        return bool(self._data.ctrl[4] == 0 and apart and near)

    def pixel(self, block: int) -> np.ndarray:
        """Where a block's centre is in the head view, float64[2]: x right, y down, in pixels."""
        camera = self._model.camera("head").id
        rotation = self._data.cam_xmat[camera].reshape(3, 3)
        start = 6 + 7 * block
        seen = rotation.T @ (self._data.qpos[start : start + 3] - self._data.cam_xpos[camera])
        focal = 0.5 / np.tan(np.deg2rad(self._model.cam_fovy[camera]) / 2)
        return self.image_size * (0.5 + focal * np.array([seen[0], -seen[1]]) / -seen[2])

    def offset(self, block: int) -> np.ndarray:
        """Where a block's centre is from the hand, float64[3], metres along the hand's own axes."""
        start, hand = 6 + 7 * block, self.pose()
        return (self._data.qpos[start : start + 3] - hand[:3, 3]) @ hand[:3, :3]

    def close(self) -> None:
        """Give the renderer back."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def _level(self, axis: str) -> int:
        return self.perturb.get(axis, 0)

    def _disturbed(self, scene: Scene, rng: np.random.Generator) -> Scene:
        instruction, hand, places = scene.instruction, scene.hand.copy(), scene.places.copy()
        if self._level("language"):
            instruction = _REPHRASED[self._level("language") - 1].format(scene.colours[0])
        if self.instruct == "other":
            instruction = instruction.replace(scene.colours[0], scene.colours[1])
        if self._level("robot"):
            hand += 0.2 * self._level("robot") * rng.uniform(-1, 1, 4) * (0.08, 0.08, 0.03, 0.3)
        if self._level("layout"):
            places[:, 2] = rng.uniform(-0.25, 0.25, len(places)) * self._level("layout")
        return Scene(scene.colours, places, hand, instruction)

    def _build(self, rng: np.random.Generator) -> None:
        """The model with this scene's blocks, hand and looks; compiled once."""
        mujoco = _mujoco()
        count = len(self.scene.colours)
        if self._model is None or self._model.nq != 6 + 7 * count:
            self.close()
            self._model = mujoco.MjModel.from_xml_string(scene_xml(count))
            self._data = mujoco.MjData(self._model)
        look: dict[str, Any] = {}
        if self._level("camera"):
            look["camera_shift"] = 0.012 * self._level("camera") * rng.uniform(-1, 1, 3)
            look["camera_turn"] = 0.03 * self._level("camera") * rng.uniform(-1, 1, 3)
        if self._level("light"):
            look["light"] = 1 + 0.15 * self._level("light") * rng.choice([-1, 1])
            look["lamp"] = 0.3 * self._level("light") * rng.uniform(-1, 1, 2)
        if self._level("background"):
            mix = 0.2 * self._level("background")
            look["table"] = (1 - mix) * Look().table + mix * rng.uniform(0, 1, 3)
        apply_look(self._model, self.scene.colours, Look(**look))
        mujoco.mj_resetData(self._model, self._data)
        self._data.qpos[:4] = self.scene.hand
        self._data.qpos[4:6] = FINGER_OPEN
        for number, (x, y, yaw) in enumerate(self.scene.places):
            start = 6 + 7 * number
            quat = [np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]
            self._data.qpos[start : start + 7] = [x, y, BLOCK, *quat]
        self._data.ctrl[:] = [*self.scene.hand, FINGER_OPEN]
        mujoco.mj_forward(self._model, self._data)

    def _advance(self, action: np.ndarray) -> None:
        mujoco = _mujoco()
        scale = np.array([self.servo.position_scale] * 3 + [self.servo.rotation_scale])
        wish = self._data.qpos[:4] + scale * action[[0, 1, 2, 5]]
        low, high = self._model.actuator_ctrlrange[:4].T
        self._data.ctrl[:4] = np.clip(wish, low, high)
        if action[6]:
            self._data.ctrl[4] = FINGER_OPEN if action[6] < 0 else 0.0
        mujoco.mj_step(self._model, self._data, _TIMESTEPS)

    def _block_height(self) -> float:
        return float(self._data.qpos[8])

    def _draw(self, view: str) -> np.ndarray:
        mujoco = _mujoco()
        if self._renderer is None:
            self._renderer = mujoco.Renderer(self._model, self.image_size, self.image_size)
            for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
                self._renderer.scene.flags[flag] = 0
        self._renderer.update_scene(self._data, view)
        image = self._renderer.render()
        strength = self._level("noise")
        if strength and view == self.noisy_view:
            noise = self._noise.normal(0, 12.0 * strength, image.shape)
            image = np.clip(np.rint(image + noise), 0, 255).astype(np.uint8)
        return image


def looking_down(position: np.ndarray, yaw: float) -> np.ndarray:
    """A pose float64[4, 4] whose z axis points down; the expert asks for many."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    turn = np.array([[cos, sin, 0.0], [sin, -cos, 0.0], [0.0, 0.0, -1.0]])
    return geometry.make_pose(position, turn)


def _mujoco() -> Any:
    """The library, imported after the renderer is chosen."""
    return importlib.import_module("mujoco")
