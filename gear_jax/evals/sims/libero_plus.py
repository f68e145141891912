"""LIBERO-Plus: 10,030 perturbed tasks of LIBERO, one episode each (arXiv 2510.13626).

The benchmark is a fork of LIBERO; an episode begins as one of LIBERO's with initial state 0. What
its own evaluation does without saying so, and is kept unless an option says otherwise:

* The instruction of every task but those of axis `language` ends with the perturbation's numbers,
  such as "... on the plate view 344 0 100 0 0 initstate 0"; `prompt="clean"` leaves them out.
* On axis `robot` the initial state puts the arm back where it always is. What perturbs is the
  controller's goal, set before that: in the ten steps of settling it pulls the arm away, but not
  to the task's joints. `robot="perturbed"` begins with the joints that the task asks for.
* Noise is on the head's picture alone, in its bottom-up order, and is made for 256 pixels. The
  benchmark draws it unseeded; here it is a function of (seed, task, control step).

Many tasks need files that the package does not hold; `audit` says which. The package goes on with
another task's description where it cannot read a task's own: here that is a fault.
"""

import contextlib
import functools
import importlib
import os
import pickle
import sys
import tempfile
import types
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gear_jax.evals.sims import libero_plus_tasks as names
from gear_jax.evals.sims.base import Task
from gear_jax.evals.sims.libero import MAX_STEPS, LiberoSimulator, _global_random, _off_stdout
from gear_jax.types import Image

NOISES = ("motion_blur", "gaussian_blur", "zoom_blur", "fog", "glass_blur")  # ten strengths each
NOISE_SIZE = 256
# what a task's description calls the ground it is played on; no objects
_GROUNDS = {"table", "floor", "kitchen_table", "living_room_table", "study_table", "coffee_table"}


class LiberoPlusSimulator(LiberoSimulator):
    """A Simulator of one suite."""

    package = "liberoplus.liberoplus"
    needs = "LIBERO-Plus needs a virtual environment of its own, see docs/evaluate.md"

    def __init__(
        self,
        suite: str,
        *,
        image_size: int = NOISE_SIZE,
        quality: Literal["full", "fast"] = "full",
        seed: int = 7,
        servo: str = "unit_mass",
        prompt: Literal["as_released", "clean"] = "as_released",
        robot: Literal["as_released", "perturbed"] = "as_released",
        axes: Sequence[str] = names.AXES,
        missing: Literal["refuse", "leave_out"] = "refuse",
    ):
        """Import the benchmark; no environment is made yet.

        Args:
            suite: LIBERO's, the one that is perturbed.
            image_size: pixels, both sides of both cameras; axis `noise` needs 256.
            quality: as in LIBERO.
            seed: of the fixtures' places and of the noise.
            servo: as in LIBERO.
            prompt: "clean" leaves the perturbation's numbers out of the instruction.
            robot: "perturbed" begins with the joints that tasks of axis `robot` ask for.
            axes: which ones to list.
            missing: what to do about tasks whose files are not there: refuse to list any, or leave
                these out.

        Raises:
            ValueError: unknown suite or option, or the installed benchmark has other tasks.
            ImportError: LIBERO-Plus is not installed.
        """
        for name, value, accepted in (
            ("prompt", prompt, ("as_released", "clean")),
            ("robot", robot, ("as_released", "perturbed")),
            ("missing", missing, ("refuse", "leave_out")),
        ):
            if value not in accepted:
                raise ValueError(f"LIBERO-Plus's {name} is {value!r}: expected one of {accepted}")
        if not axes or isinstance(axes, str) or not set(axes) <= set(names.AXES):
            raise ValueError(f"LIBERO-Plus's axes are {axes!r}: expected some of {names.AXES}")
        if "noise" in axes and image_size != NOISE_SIZE:
            raise ValueError(
                f"LIBERO-Plus's image_size is {image_size}: axis noise is made for {NOISE_SIZE}; "
                "expected that, or axes without it"
            )
        super().__init__(suite, image_size=image_size, quality=quality, seed=seed, servo=servo)
        self.prompt, self.robot, self.missing = prompt, robot, missing
        self.axes = [axis for axis in names.AXES if axis in axes]
        self.label = suite.replace("libero_", "libero_plus_")
        self._numbers = {name: number for number, name in enumerate(self._tasks)}
        self._files = _Files(self.package)
        self._noise = self._steps = 0
        found = Counter(names.axis_of(name) for name in self._tasks)
        expected = {axis: names.num_tasks(axis, self.label) for axis in names.AXES}
        if found != expected:
            raise ValueError(f"{self.label} has {dict(found)} tasks: expected {expected}")

    def tasks(self) -> Sequence[Task]:
        """Those of the axes asked for, in the benchmark's order.

        Raises:
            ValueError: files are missing, and `missing` does not say to leave their tasks out.
        """
        lacking = self._lacking
        if lacking and self.missing == "refuse":
            raise ValueError(
                f"{len(lacking)} of {self.label}'s {len(self._asked())} tasks lack files, such as "
                f"{next(iter(lacking.values()))[0]}: see launch.eval audit; expected them, axes "
                'without these tasks, or {"missing": "leave_out"}'
            )
        limit = MAX_STEPS[self.suite]
        return [
            Task(self.label, name, self._instruction(name), 1, limit)
            for name in self._asked()
            if name not in lacking
        ]

    def audit(self) -> Mapping[str, Any]:
        """How many tasks of each axis asked for have all files, and which folders lack some."""
        lacking = self._lacking
        asked = Counter(map(names.axis_of, self._asked()))
        absent = Counter(map(names.axis_of, lacking))
        folders = Counter(
            folder
            for files in lacking.values()
            for folder in {"/".join(Path(one).parts[:2]) for one in files}
        )
        return {
            "suite": self.label,
            "axes": {
                axis: {"tasks": asked[axis], "available": asked[axis] - absent[axis]}
                for axis in self.axes
            },
            "missing": dict(folders.most_common()),
        }

    def protocol(self) -> Mapping[str, Any]:
        """What the numbers depend on."""
        left_out = Counter(map(names.axis_of, self._lacking))
        return {
            **super().protocol(),
            "simulator": "libero_plus",
            "prompt": self.prompt,
            "robot": self.robot,
            "noise": "a function of (seed, task, control step)",
            "axes": self.axes,
            "left_out": dict(sorted(left_out.items())),
        }

    def reset(self, task: str, init: int) -> None:
        """Begin an episode, and let it settle: part of the perturbation on axis `robot`.

        Raises:
            ValueError: no such task or initial state, or its files are missing.
        """
        self._steps = 0
        super().reset(task, init)

    def act(self, action: np.ndarray) -> bool:
        """One control step of the benchmark's own action, float[7] in [-1, 1]; whether done."""
        self._steps += 1
        return super().act(action)

    @property
    def instruction(self) -> str:
        """Of the present task."""
        return self._instruction(self._task)

    def _instruction(self, task):
        if self.prompt == "as_released" or names.axis_of(task) == "language":
            return self._tasks[task].language
        original = names.split(task)[0]
        return self._libero["benchmark"].grab_language_from_filename(self.suite, f"{original}.bddl")

    def _asked(self):
        return [name for name in self._tasks if names.axis_of(name) in self.axes]

    @functools.cached_property
    def _lacking(self) -> dict[str, list[str]]:
        """Files that are not there, by the task that needs them."""
        with _off_stdout():
            found = {name: self._lacks(name) for name in self._asked()}
        return {name: files for name, files in found.items() if files}

    def _lacks(self, task):
        lacking = self._files.lacking(self._description(task))
        try:
            self._init_states(task)
        except FileNotFoundError as error:
            lacking = [*lacking, self._files.relative(error.filename)]
        return lacking

    def _description(self, task) -> Path:
        """Its file, for which the benchmark, too, cuts off what is no part of the scene."""
        folder = Path(self._libero["get_libero_path"]("bddl_files"))
        return folder / self._tasks[task].problem_folder / f"{task.split('_view_')[0]}.bddl"

    def _init_states(self, task):
        number = self._numbers[task]
        return np.asarray(self._suite.get_task_init_states(number))[:1]

    def _make(self, task):
        lacking = self._lacks(task)
        if lacking:
            raise ValueError(f"{self.label}'s {task!r} lacks {lacking[0]}: see launch.eval audit")
        super()._make(task)
        self._noise = names.noise_of(task)
        self._env.noise = 0  # else it spoils pictures that nobody has drawn

    def _start(self, state):
        seen = super()._start(state)
        if self.robot == "as_released":
            return seen
        arm = self._env.env.robots[0]
        self._env.sim.data.qpos[arm._ref_joint_pos_indexes] = arm.init_qpos
        return super()._start(self._env.get_sim_state())

    def _draw(self) -> dict[str, Image]:
        images = super()._draw()
        if self._noise:
            images["head"] = self._spoil(images["head"])
        return images

    def _spoil(self, image):
        """The task's noise on an upright picture."""
        pillow: Any = importlib.import_module("PIL.Image")
        wrapper = importlib.import_module(f"{self.package}.envs.env_wrapper")
        kind, strength = divmod(self._noise - 1, 10)
        with _global_random():
            np.random.seed(zlib.crc32(f"{self.seed} {self._task} {self._steps}".encode()))
            spoil = getattr(wrapper, NOISES[kind])
            spoilt = spoil(pillow.fromarray(image[::-1]), severity=strength + 1)
        return np.asarray(spoilt).astype(np.uint8)[::-1].copy()

    def _import(self):
        with _own_folder(), _without_torch(), _off_stdout():
            return super()._import()


class _Files:
    """Which files a task's description needs, without making its environment."""

    def __init__(self, package):
        part = lambda name: importlib.import_module(f"{package}.envs.{name}")  # noqa: E731
        parser, self._base = part("bddl_utils"), part("bddl_base_domain")
        self._objects, self._style = part("base_object").OBJECTS_DICT, part("arenas.style")
        # the package's own reader falls back on another task's description
        self._read = getattr(
            parser, "_core_robosuite_parse_problem", parser.robosuite_parse_problem
        )
        self._root = Path(self._base.DIR_PATH).resolve().parent
        self._known: dict[Any, list[str]] = {}

    def lacking(self, description: Path) -> list[str]:
        """Files that are not there, relative to the package."""
        if not description.exists():
            return [self.relative(description)]
        try:
            problem = self._read(str(description))
        except Exception as error:
            return [f"{self.relative(description)} (which cannot be read: {error})"]
        kinds = {*problem["fixtures"], *problem["objects"]} - _GROUNDS
        found = [*self._once(self._scene, problem["problem_name"])]
        for kind in sorted(kinds):
            found += self._once(self._object, kind)
        return found

    def relative(self, path) -> str:
        """As it is called within the package."""
        path = Path(os.path.abspath(path))
        return str(path.relative_to(self._root) if path.is_relative_to(self._root) else path)

    def _once(self, method, name):
        if (method.__name__, name) not in self._known:
            self._known[method.__name__, name] = list(method(name))
        return self._known[method.__name__, name]

    def _scene(self, name) -> Iterable[str]:
        if name not in self._base.TASK_MAPPING:
            return [f"class {name}"]
        asked = _asked_of(self._base.TASK_MAPPING[name], self._base.BDDLBaseDomain)
        wanted = asked.get("scene_properties") or {}
        styles = {
            texture: self._style.get_texture_filename(type=kind, style=wanted[f"{kind}_style"])
            for texture, kind in (("texplane", "floor"), ("tex-wall", "wall"))
            if f"{kind}_style" in wanted
        }
        return self._with_references(self._root / "assets" / asked["scene_xml"], styles)

    def _object(self, kind) -> Iterable[str]:
        if kind.lower() not in self._objects:
            return [f"class {kind}"]
        try:
            made = self._objects[kind.lower()](name="audited")
        except FileNotFoundError as error:
            return [self.relative(error.filename)]
        file = getattr(made, "file", None)  # boxes and the like have none
        return self._with_references(Path(file), {}) if file else []

    def _with_references(self, path, textures):
        """An XML and what it refers to, as far as it is not there."""
        if not path.exists():
            return [self.relative(path)]
        found = []
        for element in ElementTree.parse(path).iter():
            if "file" in element.attrib:
                other = path.parent / element.attrib["file"]
                other = other.with_name(textures.get(element.get("name"), other.name))
                found += [] if other.exists() else [self.relative(other)]
        return found


def _asked_of(problem, base) -> dict[str, Any]:
    """What a class of problems hands to its base when it is made, without making it."""
    asked = {}

    class Instead(base):
        def __init__(self, *args, **kwargs):
            asked.update(kwargs)

    view = dict.fromkeys(
        ("horizon_view", "vertical_view", "end_point_rot", "end_point_vertical"), 0
    )
    made = type("Asked", (problem, Instead), {})
    made(bddl_file_name="", robots=["Panda"], init_state=0, scale_factor=1.0, **view)
    return asked


@contextlib.contextmanager
def _own_folder():
    """The package writes its paths into a folder of its own, not into the user's home."""
    before = os.environ.get("LIBERO_CONFIG_PATH")
    os.environ["LIBERO_CONFIG_PATH"] = tempfile.mkdtemp(prefix="libero-plus-")
    try:
        yield
    finally:
        del os.environ["LIBERO_CONFIG_PATH"]
        if before is not None:
            os.environ["LIBERO_CONFIG_PATH"] = before


@contextlib.contextmanager
def _without_torch():
    """Where torch is not installed, a module of that name for the one thing it is used for."""
    if "torch" in sys.modules or find_spec("torch"):
        yield
        return
    module: Any = types.ModuleType("torch")
    module.load = read_arrays
    sys.modules["torch"] = module
    try:
        yield
    finally:
        del sys.modules["torch"]


class _Arrays(pickle.Unpickler):
    def find_class(self, module, name):
        if module.split(".")[0] != "numpy" and (module, name) != ("_codecs", "encode"):
            raise ValueError(f"{module}.{name} in a file of initial states: expected arrays alone")
        return super().find_class(module, name)


def read_arrays(path, **_) -> Any:
    """What `torch.save` wrote of NumPy arrays, as the benchmark's initial states are.

    Raises:
        ValueError: it holds something else.
    """
    with zipfile.ZipFile(path) as archive:
        data = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(data) != 1:
            raise ValueError(f"{path} was not written by torch.save: it has no data.pkl")
        with archive.open(data[0]) as file:
            return _Arrays(file).load()
