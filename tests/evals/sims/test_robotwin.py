"""The adapter against a stand-in with VectorEnv's interface: RoboTwin itself was not available."""

import numpy as np
import pytest

from gear_jax.data.kinematics import Kinematics
from gear_jax.evals.sims import robotwin
from gear_jax.evals.sims.robotwin import RobotwinSimulator, solvable_seeds, solve

_AXES = ("0 0 1", "0 1 0", "0 1 0", "1 0 0", "0 1 0", "1 0 0")
_OFFSETS = ("0 0 .1", "0 0 .05", "0 0 .3", "0 0 .3", "0.05 0 0", "0.05 0 0")


class FakeVectorEnv:
    """Goes where it is told; done when the left gripper is closed at a joint angle above 0.5."""

    made = 0

    def __init__(self, task_config, n_envs, env_seeds=None, instruction_type="seen"):
        assert n_envs == len(env_seeds) == 1
        type(self).made += 1
        self.config, self.kind, self.closed, self.actions = task_config, instruction_type, 0, []
        np.random.random()

    def reset(self, env_idx=None, env_seeds=None):
        assert env_idx == [0]
        self.state = np.full(14, env_seeds[0] % 7 / 10, np.float32)
        self.instruction = f"{self.kind} {np.random.randint(1000)}"

    def get_obs(self):
        pictures = {
            name: np.full((240, 320, 3), shade, np.uint8)
            for shade, name in enumerate(("full_image", "left_wrist_image", "right_wrist_image"))
        }
        return [{**pictures, "state": self.state.copy(), "instruction": self.instruction}]

    def step(self, actions):
        assert actions.shape == (1, 1, 14)
        self.actions.append(actions[0, 0].copy())
        self.state = actions[0, 0].copy()
        done = self.state[6] < 0.5 and self.state[0] > 0.5
        info = [{"success": bool(done)}]
        return self.get_obs(), [np.array([done])], [np.array([done])], [np.array([0])], info

    def check_seeds(self, seeds):
        return [{"setup_demo_success": seed % 2 == 0, "play_once_success": seed % 3 == 0}
                for seed in seeds]  # fmt: skip

    def close(self):
        self.closed += 1


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    """A chain of six joints."""
    body = "".join(
        f'<body name="l{n}" pos="{offset}"><joint name="j{n}" axis="{axis}"/>'
        for n, (axis, offset) in enumerate(zip(_AXES, _OFFSETS, strict=True))
    )
    path = tmp_path_factory.mktemp("arm") / "arm.xml"
    path.write_text(
        f'<mujoco><compiler angle="radian"/><worldbody><body name="base">{body}'
        f"{'</body>' * 7}</worldbody></mujoco>"
    )
    joints = [f"j{n}" for n in range(6)]
    return {"model": str(path), "base": "base", "tip": "l5", "joints": joints}


@pytest.fixture
def simulator(arm):
    tasks = {
        "adjust_bottle": {"seeds": [100000, 100003], "max_steps": 400},
        "beat_block": {"seeds": [100001], "max_steps": 300},
    }
    return RobotwinSimulator(
        tasks, {"embodiment": ["aloha-agilex"]}, {"left": arm, "right": arm}, make=FakeVectorEnv
    )


def test_joints_that_are_solved_for_have_the_pose(arm):
    chain = Kinematics(arm["model"], "base", "l5", tuple(arm["joints"]))
    rng = np.random.default_rng(0)
    for _ in range(10):
        truth = rng.uniform(-0.8, 0.8, 6) + (0, 0.3, 0.6, 0, 0.5, 0)
        target = chain.poses(truth[None])[0]
        found = solve(chain.poses, truth + rng.uniform(-0.15, 0.15, 6), target)
        np.testing.assert_allclose(chain.poses(found[None])[0], target, atol=1e-5)


def test_a_target_out_of_reach_is_approached(arm):
    chain = Kinematics(arm["model"], "base", "l5", tuple(arm["joints"]))
    target = np.eye(4)
    target[:3, 3] = 5, 0, 0.5
    start = np.array([0, 0.3, 0.6, 0, 0.5, 0])
    found = solve(chain.poses, start, target)
    assert np.isfinite(found).all()
    assert chain.poses(found[None])[0][0, 3] > chain.poses(start[None])[0][0, 3] + 0.1


def test_an_observation_has_both_arms_three_views_and_the_drawn_instruction(simulator, arm):
    simulator.reset("adjust_bottle", 0)
    seen = simulator.observe()
    assert {view: image[0, 0, 0] for view, image in seen.images.items()} == {
        "head": 0, "left_wrist": 1, "right_wrist": 2,
    }  # fmt: skip
    angle = np.float32(100000 % 7 / 10)
    chain = Kinematics(arm["model"], "base", "l5", tuple(arm["joints"]))
    pose = chain.poses(np.full((1, 6), angle))[0]
    np.testing.assert_allclose(seen.state["ee_pose"], [pose, pose], atol=1e-6)
    np.testing.assert_allclose(seen.state["joint_pos"], [[angle] * 6 + [0, 0]] * 2)
    assert seen.state["joint_mask"].tolist() == [[True] * 6 + [False] * 2] * 2
    assert seen.state["grip_open"].tolist() == [angle, angle]
    assert seen.embodiment == "agilex_cobot_magic"
    simulator.reset("adjust_bottle", 1)
    other = simulator.observe().instruction
    simulator.reset("beat_block", 0)
    simulator.reset("adjust_bottle", 0)
    assert simulator.observe().instruction == seen.instruction != other


def test_targets_become_absolute_joint_angles_and_grippers(simulator):
    simulator.reset("adjust_bottle", 1)
    chain = simulator._chains["left"]
    start = np.full(6, np.float32(100003 % 7 / 10), np.float64)
    wanted = start + 0.02
    assert not simulator.step({"left": (chain(wanted[None])[0], 0.9)})
    (action,) = simulator._env.actions
    np.testing.assert_allclose(action[:6], wanted, atol=1e-4)
    np.testing.assert_allclose(action[7:], np.full(7, start[0]), atol=1e-6)  # right: as it was
    assert action[6] == np.float32(0.9)
    pose = simulator.observe().state["ee_pose"][0]
    np.testing.assert_allclose(pose, chain(wanted[None])[0], atol=1e-4)


def test_success_is_what_robotwin_says_and_an_environment_serves_one_task(simulator):
    FakeVectorEnv.made = 0
    simulator.reset("adjust_bottle", 1)
    first, chain = simulator._env, simulator._chains["left"]
    assert first.config["task_name"] == "adjust_bottle"
    assert first.config["step_lim"] == 400
    near = np.full(6, 0.55)
    assert not simulator.step({"left": (chain(near[None])[0], 1.0)})
    assert simulator.step({"left": (chain(near[None])[0], -0.2)})
    simulator.reset("adjust_bottle", 0)
    assert FakeVectorEnv.made == 1
    simulator.reset("beat_block", 0)
    assert (FakeVectorEnv.made, first.closed) == (2, 1)
    simulator.close()


def test_tasks_protocol_and_what_cannot_be(simulator, arm):
    assert [(one.name, one.num_inits, one.max_steps) for one in simulator.tasks()] == [
        ("adjust_bottle", 2, 400), ("beat_block", 1, 300),
    ]  # fmt: skip
    assert simulator.protocol()["seeds"] == {
        "adjust_bottle": [100000, 100003], "beat_block": [100001],
    }  # fmt: skip
    for task, init in (("adjust_bottle", 2), ("other", 0)):
        with pytest.raises(ValueError, match="expected one of `tasks`"):
            simulator.reset(task, init)
    with pytest.raises(ValueError, match="instruction_type 'all'"):
        RobotwinSimulator({}, {}, {"left": arm, "right": arm}, "all")
    with pytest.raises(ValueError, match="arms \\['left'\\]"):
        RobotwinSimulator({}, {}, {"left": arm})


def test_seeds_are_those_that_the_expert_solves():
    env = FakeVectorEnv({}, 1, [0])
    assert list(solvable_seeds(env, 100000, 3)) == [100002, 100008, 100014]
    with pytest.raises(ValueError, match="1 of 5 seeds from 100000 on are solvable: expected 2"):
        list(solvable_seeds(env, 100000, 2, most=5))


def test_the_package_is_named_where_it_is_missing(monkeypatch):
    with pytest.raises(ImportError, match="robotwin"):
        robotwin._vector_env()
