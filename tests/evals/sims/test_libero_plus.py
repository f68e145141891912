"""LIBERO-Plus's adapter on a stand-in for the package, and on the package itself where it is.

The package wants an older NumPy than JAX does, so the real one is reached through a worker: set
GEAR_JAX_LIBERO_PLUS to the Python of its virtual environment.
"""

import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from gear_jax.evals import remote
from gear_jax.evals.sims import libero_plus
from gear_jax.evals.sims import libero_plus_tasks as names
from gear_jax.evals.sims.libero_plus import LiberoPlusSimulator, read_arrays
from gear_jax.geometry import make_pose

BOWL, LIGHT = "put_the_bowl_away", "put_the_bowl_away_light_1"
ENDS = {
    "camera": "view_{}_0_100_0_0_initstate_0",
    "robot": "view_0_0_100_0_0_initstate_{}",
    "language": "language_{}_view_0_0_100_0_0_initstate_0",
    "light": "light_{}",
    "background": "table_{}",
    "noise": "view_0_0_100_0_0_initstate_0_noise_{}",
    "layout": "add_{}",
}
ALL = [
    f"{BOWL}_{ENDS[axis].format(number + 1)}"
    for axis in names.AXES
    for number in range(names.num_tasks(axis, "libero_plus_spatial"))
]

# What the adapter touches of the package. A description is a file of words: the problem's class,
# then the objects. Light 1 lacks its scene, layout 2 an object, background 3 the floor's texture;
# layout 4 has no initial state and layout 5 a description that cannot be read.
PACKAGE = {
    "__init__.py": "",
    "liberoplus/__init__.py": """
import pathlib
def get_libero_path(key):
    return str(pathlib.Path(__file__).parent / key)
""",
    "liberoplus/benchmark/__init__.py": """
import torch
from liberoplus.liberoplus.benchmark.names import NAMES
from types import SimpleNamespace
def grab_language_from_filename(suite, name):
    return " ".join(name.split("_"))[: -len(".bddl")]
class Suite:
    tasks = [
        SimpleNamespace(
            name=one, problem_folder="libero_spatial",
            language="say it" if "_language_" in one else " ".join(one.split("_")),
        )
        for one in NAMES
    ]
    def get_task_init_states(self, number):
        if NAMES[number].endswith("_add_4"):
            open(__file__.replace("benchmark/__init__.py", "init_states/4"))
        return torch.load(__file__.replace("benchmark/__init__.py", "init_states/all"))
def get_benchmark(name):
    return Suite
""",
    "liberoplus/envs/__init__.py": "",
    "liberoplus/envs/env_wrapper.py": "ControlEnv = None",
    "liberoplus/envs/bddl_utils.py": """
import pathlib
def robosuite_parse_problem(path):
    problem, *objects = pathlib.Path(path).read_text().split()
    return {"problem_name": problem, "fixtures": ["table"], "objects": objects}
""",
    "liberoplus/envs/bddl_base_domain.py": """
import pathlib
DIR_PATH = str(pathlib.Path(__file__).parent)
class BDDLBaseDomain:
    def __init__(self, *args, **kwargs):
        raise AssertionError("an environment was made")
class Plain(BDDLBaseDomain):
    floor, scene = "gray", "scenes/plain.xml"
    def __init__(self, bddl_file_name, **kwargs):
        style = {"floor_style": self.floor, "wall_style": "white"}
        super().__init__(bddl_file_name, scene_xml=self.scene, scene_properties=style)
class Light(Plain):
    scene = "scenes/lights/light_1.xml"
class Marble(Plain):
    floor = "marble"
TASK_MAPPING = {"plain": Plain, "light": Light, "marble": Marble}
""",
    "liberoplus/envs/base_object.py": """
import pathlib
class Bowl:
    file = str(pathlib.Path(__file__).parents[1] / "assets/bowl.xml")
    def __init__(self, name):
        open(self.file).close()
class Yogurt(Bowl):
    file = Bowl.file.replace("bowl.xml", "new_objects/yogurt/yogurt.xml")
OBJECTS_DICT = {"bowl": Bowl, "yogurt": Yogurt}
""",
    "liberoplus/envs/arenas/__init__.py": "",
    "liberoplus/envs/arenas/style.py": """
def get_texture_filename(type, style):
    return f"{style}_{type}.png"
""",
    "liberoplus/assets/scenes/plain.xml": (
        '<mujoco><asset><texture name="texplane" file="../textures/any.png"/>'
        '<texture name="tex-wall" file="../textures/any.png"/></asset></mujoco>'
    ),
    "liberoplus/assets/textures/gray_floor.png": "",
    "liberoplus/assets/textures/white_wall.png": "",
    "liberoplus/assets/bowl.xml": '<mujoco><mesh file="bowl.stl"/></mujoco>',
    "liberoplus/assets/bowl.stl": "",
}
SPECIAL = {"light_1": "light bowl", "table_3": "marble bowl", "add_2": "plain yogurt", "add_5": ""}


def saved(value):
    """What torch.save makes of NumPy arrays, as far as it is read."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("states/data.pkl", pickle.dumps(value))
        archive.writestr("states/version", "3")
    return data.getvalue()


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    root = tmp_path_factory.mktemp("site") / "liberoplus"
    files = PACKAGE | {"liberoplus/benchmark/names.py": f"NAMES = {ALL!r}"}
    for name in {one.split("_view_")[0] for one in ALL}:
        text = SPECIAL.get(name.removeprefix(f"{BOWL}_"), "plain bowl")
        files[f"liberoplus/bddl_files/libero_spatial/{name}.bddl"] = text
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "liberoplus/init_states").mkdir()
    (root / "liberoplus/init_states/all").write_bytes(saved(np.arange(6.0).reshape(3, 2)))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root.parent)
        patch.setenv("MUJOCO_GL", "egl")
        patch.setattr(libero_plus, "find_spec", lambda name: None)
        patch.delitem(sys.modules, "torch", raising=False)
        yield root / "liberoplus"
        for name in [one for one in sys.modules if one.partition(".")[0] == "liberoplus"]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def simulator(package):
    return LiberoPlusSimulator("libero_spatial", missing="leave_out")


def test_an_audit_counts_by_axis_what_has_all_its_files_and_makes_no_environment(simulator):
    found = simulator.audit()
    assert found["suite"] == "libero_plus_spatial"
    assert found["axes"]["camera"] == {"tasks": 376, "available": 376}
    assert found["axes"]["light"] == {"tasks": 292, "available": 291}
    assert found["axes"]["background"] == {"tasks": 258, "available": 257}
    assert found["axes"]["layout"] == {"tasks": 385, "available": 382}
    assert found["missing"] == {
        "assets/scenes": 1, "assets/textures": 1, "assets/new_objects": 1, "init_states/4": 1,
        "bddl_files/libero_spatial": 1,
    }  # fmt: skip
    lacking = simulator._lacking
    assert lacking[f"{BOWL}_table_3"] == ["assets/textures/marble_floor.png"]
    assert "cannot be read: not enough values" in lacking[f"{BOWL}_add_5"][0]


def test_tasks_without_their_files_are_refused_or_left_out(simulator):
    tasks = simulator.tasks()
    assert len(tasks) == 2402 - 5
    assert {(one.suite, one.num_inits, one.max_steps) for one in tasks} == {
        ("libero_plus_spatial", 1, 220)
    }
    assert simulator._lacks(LIGHT) == ["assets/scenes/lights/light_1.xml"]
    with pytest.raises(ValueError, match="'put_the_bowl_away_light_1' lacks assets/scenes/lights"):
        simulator.reset(LIGHT, 0)
    with pytest.raises(ValueError, match="initial state 1 of .*: expected 0 .. 0"):
        simulator.reset(ALL[0], 1)
    strict = LiberoPlusSimulator("libero_spatial", axes=["light", "noise"])
    with pytest.raises(ValueError, match=r"^1 of libero_plus_spatial's 643 tasks lack files, such"):
        strict.tasks()
    assert len(LiberoPlusSimulator("libero_spatial", axes=["noise"]).tasks()) == 351


def test_instructions_carry_the_numbers_as_released_unless_they_are_to_be_clean(simulator):
    def said(one):
        return {task.name: task.instruction for task in one.tasks()}

    camera, language = ALL[0], next(one for one in ALL if "_language_" in one)
    released = said(simulator)
    clean = said(LiberoPlusSimulator("libero_spatial", prompt="clean", missing="leave_out"))
    assert released[camera] == "put the bowl away view 1 0 100 0 0 initstate 0"
    assert clean[camera] == clean[f"{BOWL}_light_2"] == "put the bowl away"
    assert released[language] == clean[language] == "say it"


def test_the_package_leaves_no_torch_and_no_folder_behind(simulator):
    assert "torch" not in sys.modules
    np.testing.assert_array_equal(simulator._init_states(ALL[0]), [[0.0, 1.0]])
    folder = os.environ.get("LIBERO_CONFIG_PATH")
    LiberoPlusSimulator("libero_spatial")
    assert os.environ.get("LIBERO_CONFIG_PATH") == folder


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": "short"}, "LIBERO-Plus's prompt is 'short'"),
        ({"robot": "still"}, "LIBERO-Plus's robot is 'still'"),
        ({"missing": "ignore"}, "LIBERO-Plus's missing is 'ignore'"),
        ({"axes": ["weather"]}, r"axes are \['weather'\]"),
        ({"axes": "noise"}, "axes are 'noise'"),
        ({"axes": []}, r"axes are \[\]"),
        ({"image_size": 448}, "image_size is 448: axis noise is made for 256"),
    ],
)
def test_wrong_options_are_one_sentence_before_anything_is_imported(options, words):
    with pytest.raises(ValueError, match=words):
        LiberoPlusSimulator("libero_spatial", **options)


def test_a_benchmark_with_other_tasks_is_refused(package, monkeypatch):
    few = {**names.TASKS, "light": (293, 297, 279, 274)}
    monkeypatch.setattr(names, "TASKS", few)
    with pytest.raises(ValueError, match="libero_plus_spatial has .*'light': 292.*: expected"):
        LiberoPlusSimulator("libero_spatial")


def test_initial_states_are_read_without_torch_and_nothing_but_arrays(tmp_path):
    path, states = tmp_path / "x.pruned_init", np.arange(12.0).reshape(3, 4)
    path.write_bytes(saved(states))
    np.testing.assert_array_equal(read_arrays(path, weights_only=False), states, strict=True)
    path.write_bytes(saved(print))
    with pytest.raises(ValueError, match="builtins.print in a file of initial states"):
        read_arrays(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("other", "")
    with pytest.raises(ValueError, match="it has no data.pkl"):
        read_arrays(path)


PYTHON = os.environ.get("GEAR_JAX_LIBERO_PLUS")
real = pytest.mark.skipif(not PYTHON, reason="GEAR_JAX_LIBERO_PLUS names no Python that has it")

# one task of each axis through the package's own environment, as its evaluation makes and steps it
REFERENCE = """
import json, pathlib, sys, zlib
import numpy as np
from gear_jax.evals.sims import libero_plus_tasks as names
from gear_jax.evals.sims.libero import CAMERAS, SETTLE
from gear_jax.evals.sims.libero_plus import LiberoPlusSimulator

MOVES = np.array([[0.8, 0.5, -0.6, 0.1, 0, 0.3, -1]] * 3 + [[-0.5, 0.6, 0.2, 0, 0.2, -0.3, 1]] * 3)
simulator = LiberoPlusSimulator("libero_spatial", missing="leave_out")
from liberoplus.liberoplus.envs import OffScreenRenderEnv
folder = pathlib.Path(simulator._libero["get_libero_path"]("bddl_files")) / "libero_spatial"
listed, found = [task.name for task in simulator.tasks()], {}
for axis in ("camera", "robot", "layout", "noise"):
    task = next(one for one in listed if names.axis_of(one) == axis)
    env = OffScreenRenderEnv(
        bddl_file_name=str(folder / f"{task}.bddl"), camera_heights=256, camera_widths=256
    )
    env.seed(7)
    env.reset()
    env.set_init_state(simulator._suite.get_task_init_states(simulator._numbers[task])[0])
    for move in [SETTLE] * 10 + list(MOVES):
        env.step(move)
    state = env.get_sim_state()
    pictures = {
        view: np.asarray(env.sim.render(camera_name=camera, width=256, height=256))
        for view, camera in CAMERAS.items()
    }
    np.random.seed(zlib.crc32(f"7 {task} {10 + len(MOVES)}".encode()))
    env.env.step = lambda action: ({"agentview_image": pictures["head"]},)
    pictures["head"] = env.step(None)[0]["agentview_image"]  # with the package's own noise
    env.close()
    simulator.reset(task, 0)
    simulator.act(MOVES[0])
    simulator.reset(task, 0)  # what came before must not matter
    for move in MOVES:
        simulator.act(move)
    seen = simulator.observe()
    found[axis] = {"state": bool(np.array_equal(simulator._env.get_sim_state(), state))}
    for view, picture in pictures.items():
        found[axis][view] = bool(np.array_equal(seen.images[view], picture[::-1]))
    simulator.close()
print(json.dumps(found))
"""


@real
def test_an_episode_of_each_axis_is_the_packages_own_to_the_bit():
    environment = {**os.environ, "PYTHONPATH": os.fspath(remote._ROOT)}
    ran = subprocess.run(
        [PYTHON, "-c", REFERENCE], env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    whole = {"state": True, "head": True, "right_wrist": True}
    assert found == dict.fromkeys(("camera", "robot", "layout", "noise"), whole)


@pytest.fixture
def worker():
    with contextlib.ExitStack() as stack:

        def start(name, **options):
            config = remote.WorkerConfig(name, options, PYTHON)
            return stack.enter_context(contextlib.closing(remote.RemoteSimulator(config)))

        yield start


@real
def test_noise_spoils_the_heads_picture_alone_and_the_same_way_each_time(worker):
    there = worker("libero_plus_spatial", axes=["language", "noise"])
    listed = [task.name for task in remote.tasks_of(there.call("hello"))]
    assert len(listed) == 390 + 351
    noise = next(one for one in listed if names.noise_of(one) == 45)
    plain = next(one for one in listed if one.startswith(names.split(noise)[0] + "_language_"))
    seen = [
        remote.observation_of(there.call("reset", task=one, init=0)).images
        for one in (noise, plain, noise)
    ]
    np.testing.assert_array_equal(seen[0]["head"], seen[2]["head"])
    np.testing.assert_array_equal(seen[0]["right_wrist"], seen[1]["right_wrist"])
    assert np.abs(seen[0]["head"].astype(int) - seen[1]["head"]).mean() > 3
    # and the noise of the next step is another one
    target = {"right": (make_pose(np.array([-0.1, 0, 1.2]), np.eye(3)), 1.0)}
    later = remote.observation_of(there.call("run", targets=[target], observe=True)).images
    assert np.abs(seen[0]["head"].astype(int) - later["head"]).max() > 3


@real
def test_the_robots_joints_are_the_tasks_own_only_if_asked_for(worker):
    """Of MountedPanda499, which the package makes 0.5 rad from its usual ones."""
    found, task = {}, None
    for robot in ("as_released", "perturbed"):
        there = worker("libero_plus_spatial", axes=["robot"], robot=robot)
        hello = there.call("hello")
        assert hello["protocol"]["robot"] == robot
        listed = [one.name for one in remote.tasks_of(hello)]
        task = task or max(listed, key=lambda one: int(one.rsplit("_", 1)[1]))
        seen = remote.observation_of(there.call("reset", task=task, init=0))
        usual = np.array([0, -0.161037389, 0, -2.44459747, 0, 2.2267522, np.pi / 4])
        found[robot] = np.linalg.norm(seen.state["joint_pos"][1, :7] - usual)
    assert found["perturbed"] == pytest.approx(0.5, abs=0.02)
    assert 0.1 < found["as_released"] < 0.48
