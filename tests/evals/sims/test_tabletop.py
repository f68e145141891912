import collections
import re

import cv2
import numpy as np
import pytest

from configs.quickstart import TABLETOP
from gear_jax import geometry
from gear_jax.data.catalog import DatasetConfig, open_prepared
from gear_jax.data.images import decode
from gear_jax.data.record_pool import Pool
from gear_jax.data.rlds_writer import RldsWriter
from gear_jax.data.windows import make_window
from gear_jax.evals.sims import tabletop_data
from gear_jax.evals.sims.recording import columns
from gear_jax.evals.sims.tabletop import (
    AXES,
    COLOURS,
    MAX_STEPS,
    TabletopSimulator,
    draw_scene,
)
from gear_jax.evals.sims.tabletop_expert import Pushes, TabletopExpert
from gear_jax.policy.execution import targets
from gear_jax.types import ActionSpec


@pytest.fixture(scope="module")
def simulator():
    made = TabletopSimulator()
    yield made
    made.close()


def _expert_lifts(simulator):
    expert = TabletopExpert(simulator)
    for step in range(MAX_STEPS):
        simulator.act(expert.act())
        if simulator.solved():
            return step
    return None


@pytest.mark.parametrize("task", ["pick_red", "pick_green", "pick_blue", "pick_yellow"])
def test_the_expert_lifts_the_block_that_is_named(simulator, task):
    for init in range(3):
        simulator.reset(task, init)
        assert not simulator.solved()
        assert _expert_lifts(simulator) is not None


def test_the_hand_is_down_and_at_rest_before_it_closes(simulator):
    for init in range(3):
        simulator.reset("pick_green", init)
        expert, heights = TabletopExpert(simulator), []
        for _ in range(MAX_STEPS):
            heights.append(simulator.pose()[2, 3])
            action = expert.act()
            if action[6] > 0:
                break
            simulator.act(action)
        assert action[6] > 0
        assert heights[-1] < 0.0195  # 2.1 cm where it closes as soon as it is nearly there
        assert max(heights[-4:]) - min(heights[-4:]) < 0.005


def test_an_initial_state_is_a_function_of_its_number(simulator):
    seen = []
    for task, init in (("pick_red", 3), ("pick_blue", 3), ("pick_red", 3)):
        simulator.reset(task, init)
        seen.append(simulator.observe())
    one, other, again = seen
    assert one.instruction == again.instruction
    np.testing.assert_array_equal(one.images["head"], again.images["head"])
    np.testing.assert_array_equal(one.state["ee_pose"], again.state["ee_pose"])
    assert (one.images["head"] != other.images["head"]).any()
    first, second = draw_scene("red", 0), draw_scene("red", 1)
    assert (first.places != second.places).all()


def test_the_head_view_shows_a_block_where_its_pixel_says(simulator):
    simulator.place("red", 5, np.random.default_rng(1))
    image = simulator.observe().images["head"].astype(int)
    red = image[..., 0] - image[..., 1:].max(axis=-1) > 60
    rows, cols = np.nonzero(red)
    assert len(rows) > 20
    x, y = simulator.pixel(0)
    assert abs(cols.mean() - x) < 1.5
    assert abs(rows.mean() - y) < 2.0


def test_the_pose_is_where_the_finger_tips_are_and_looks_down(simulator):
    simulator.reset("pick_red", 0)
    pose = simulator.pose()
    np.testing.assert_allclose(pose[:3, 2], [0, 0, -1], atol=1e-9)
    np.testing.assert_allclose(pose[:3, 3], simulator._data.qpos[:3], atol=1e-9)
    assert np.linalg.det(pose[:3, :3]) == pytest.approx(1)


@pytest.mark.parametrize("axis", AXES)
def test_every_perturbation_changes_what_it_is_named_after(axis):
    plain, other = TabletopSimulator(), TabletopSimulator(perturb={axis: 5})
    for simulator in (plain, other):
        simulator.reset("pick_green", 7)
    before, after = plain.observe(), other.observe()
    same_image = (before.images["head"] == after.images["head"]).all()
    same_hand = np.allclose(before.state["ee_pose"], after.state["ee_pose"], atol=1e-4)
    if axis == "language":
        assert before.instruction != after.instruction
        assert same_image
    elif axis == "robot":
        assert not same_hand
    else:
        assert not same_image
        assert same_hand
    if axis == "noise":
        np.testing.assert_array_equal(before.images["right_wrist"], after.images["right_wrist"])
    assert plain.protocol() != other.protocol()
    plain.close()
    other.close()


def test_another_block_can_be_named_while_success_stays_that_of_the_task():
    simulator = TabletopSimulator(instruct="other")
    simulator.reset("pick_red", 2)
    assert "red" not in simulator.observe().instruction
    assert simulator.scene.colours[1] in simulator.observe().instruction
    assert _expert_lifts(simulator) is not None  # the expert goes for the task's own
    simulator.close()


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="perturb 'fog' is 1: expected a level"):
        TabletopSimulator(perturb={"fog": 1})
    with pytest.raises(ValueError, match="perturb 'camera' is 9"):
        TabletopSimulator(perturb={"camera": 9})
    with pytest.raises(ValueError, match="instruct is 'none'"):
        TabletopSimulator(instruct="none")
    simulator = TabletopSimulator()
    with pytest.raises(ValueError, match="task 'pick_pink'"):
        simulator.reset("pick_pink", 0)
    with pytest.raises(ValueError, match="initial state -1"):
        simulator.reset("pick_red", -1)


def test_demonstrations_leave_the_initial_states_of_evaluations_alone():
    with pytest.raises(ValueError, match="initial state 999 is for evaluation"):
        next(tabletop_data.demonstrations([0], [999]))
    with pytest.raises(ValueError, match="no task 4"):
        next(tabletop_data.demonstrations([4], [1000]))


@pytest.mark.parametrize("turn", [0.0, 0.5])
def test_a_push_turns_the_hand_where_it_is_told_to(turn):
    push = Pushes(np.random.default_rng(0), chance=1.0, size=0.8, turn=turn)
    pushed = np.stack([push(np.zeros(7, np.float32)) for _ in range(50)])
    assert np.abs(pushed[:, :2]).max() > 0.5
    assert np.abs(pushed[:, 2]).max() <= 0.8 * 0.4 + 1e-6
    assert (np.abs(pushed[:, 3:6]).max(axis=0) > 0).all() == bool(turn)
    assert np.abs(pushed[:, 3:6]).max() <= 0.8 * turn + 1e-6
    assert not pushed[:, 6].any()


def test_a_run_is_cut_where_the_hand_was_pushed(monkeypatch):
    executed, meant = [], []
    act, decide = TabletopSimulator.act, TabletopExpert.act
    monkeypatch.setattr(
        TabletopSimulator, "act", lambda self, action: (executed.append(action), act(self, action))
    )
    monkeypatch.setattr(TabletopExpert, "act", lambda self: meant.append(decide(self)) or meant[-1])
    made = list(tabletop_data.demonstrations([0], range(1000, 1008), noise=0.7))
    assert all(record is not None for _, record in made)
    names = [source for source, _ in made]
    assert len({name.partition("#")[0] for name in names}) == 8 < len(names) == len(set(names))
    kept = {tuple(action) for _, record in made for action in record["steps/action"]}
    done = {tuple(action) for action in executed}
    pushed = [action for action in meant if tuple(action) not in done]
    assert pushed
    assert not kept & {tuple(action) for action in pushed}
    assert kept <= done
    assert kept <= {tuple(action) for action in meant}  # nor is anything from before the expert
    ends = []
    for source, record in made:
        assert len(record["steps/action"]) >= 8
        assert record["steps/is_last"][-1]
        assert record["steps/is_terminal"].any() == record["steps/reward"].any()
        if record["steps/is_terminal"].any():
            ends.append(source.partition("#")[0])
            assert source == max(name for name in names if name.startswith(f"{ends[-1]}#"))
    assert len(ends) == len(set(ends)) > 4


def test_runs_with_noise_begin_beyond_an_evaluations_hands_on_every_side(monkeypatch):
    """A policy that goes too far has to have seen somebody come back from there."""
    monkeypatch.setattr(TabletopSimulator, "_draw", lambda *_: np.zeros((8, 8, 3), np.uint8))

    def begins(noise):
        made = tabletop_data.demonstrations([2], range(1000, 1048), noise=noise)
        first = [record for source, record in made if source.endswith("#0")]
        return np.stack([record["steps/observation/state"][0, :2] for record in first])

    calm, wild = np.abs(begins(0.0)).max(axis=0), begins(0.7)
    assert (calm < 0.1).all()
    assert (wild.min(axis=0) < -0.1).all()
    assert (wild.max(axis=0) > 0.1).all()


def _begin(simulator, monkeypatch, begins, init):
    monkeypatch.setattr(tabletop_data, "_BEGINS", {begins: 1.0})
    simulator.reset("pick_blue", init)
    assert not simulator.holds()
    tabletop_data._wander(simulator, np.random.default_rng(init))


def test_who_begins_with_a_block_in_the_hand_goes_up_with_it(monkeypatch, simulator):
    """Beside its middle too; the fingers stay closed."""
    beside = []
    for init in range(1000, 1008):
        _begin(simulator, monkeypatch, "held", init)
        assert simulator.holds()
        beside.append(simulator.offset(0)[:2])
        expert = TabletopExpert(simulator)
        for _ in range(15):
            action = expert.act()
            assert action[6] > 0
            simulator.act(action)
        assert simulator.solved()
    assert np.abs(beside).max() > 0.005


def test_who_begins_about_a_block_closes_without_going_up_first(monkeypatch, simulator):
    """Higher and lower than the expert goes by itself."""
    heights = []
    for init in range(1000, 1008):
        _begin(simulator, monkeypatch, "about", init)
        heights.append(simulator.pose()[2, 3])
        expert = TabletopExpert(simulator)
        for _ in range(25):
            action = expert.act()
            if action[6] > 0:
                break
            simulator.act(action)
            assert simulator.pose()[2, 3] < 0.035
        assert action[6] > 0
    assert min(heights) < 0.014
    assert max(heights) > 0.022


def test_a_centimetre_beside_the_middle_the_fingers_close_as_soon_as_in_it(simulator):
    waits = []
    for beside in (0.0, 0.01):
        simulator.reset("pick_blue", 0)
        aim = (*simulator.block()[:2] + (beside, 0), 0.019)
        tabletop_data._go(simulator, aim + np.array([0, 0, 0.06]), -1, 40)
        tabletop_data._go(simulator, aim, -1, 25)
        assert abs(simulator.pose()[0, 3] - simulator.block()[0] - beside) < 0.001
        expert = TabletopExpert(simulator)
        for step in range(MAX_STEPS):
            action = expert.act()
            if action[6] > 0:
                waits.append(step)
                break
            simulator.act(action)
    assert waits == [5, 5]  # once it is seen to be there, and its rest


def test_an_expert_that_holds_nothing_opens_its_fingers(simulator):
    simulator.reset("pick_blue", 0)
    for _ in range(10):
        simulator.act(np.array([0, 0, 0, 0, 0, 0, 1.0]))
    assert simulator.observe().state["grip_open"][1] < 0.05
    assert not simulator.holds()
    assert TabletopExpert(simulator).act()[6] < 0


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tabletop")
    how = columns(tabletop_data.NUM_JOINTS, "png")
    with RldsWriter(folder, "tabletop", how) as writer:
        for _, record in tabletop_data.demonstrations(range(4), [1000], noise=0.0):
            writer.add(record)
    return open_prepared(
        DatasetConfig(path=str(folder / "tabletop/1.0.0"), row="tabletop", work=str(folder / "w"))
    )


def test_demonstrations_read_back_as_the_simulator_showed_them(prepared, simulator):
    episode = prepared.episode(0)
    simulator.reset("pick_red", 1000)
    seen = simulator.observe()
    assert episode.instruction == seen.instruction
    for view, image in seen.images.items():
        np.testing.assert_array_equal(decode(episode.views[view][0]), image)
    arm = episode.arms["right"]
    np.testing.assert_allclose(arm.ee_pos[0], seen.state["ee_pose"][1, :3, 3], atol=1e-6)
    turn = geometry.quat_to_rotmat(arm.ee_quat[0])
    np.testing.assert_allclose(turn, seen.state["ee_pose"][1, :3, :3], atol=1e-5)
    np.testing.assert_allclose(arm.joint_pos[0], seen.state["joint_pos"][1, :4], atol=1e-6)
    assert arm.grip_open[0] == pytest.approx(1, abs=0.02)
    assert set(np.unique(arm.grip_cmd)) == {0, 1}


def test_demonstrations_go_on_to_the_top(prepared):
    """Success is 6 cm up; what a chunk asks for beyond the last step is masked."""
    for number in range(4):
        height = prepared.episode(number).arms["right"].ee_pos[:, 2]
        assert height[-1] - height.min() > 0.09


def test_the_chunks_of_demonstrations_lift_the_block_again(prepared, simulator):
    """State -> 30 Hz chunk -> targets -> servo: the whole action path, closed at every query."""
    spec = ActionSpec()
    for number in range(4):
        episode = prepared.episode(number)
        task = f"pick_{('red', 'green', 'blue', 'yellow')[number]}"
        simulator.reset(task, 1000)
        done, step = False, 0
        while not done and step < episode.num_steps - 1:
            window = make_window(episode, step, spec)
            pose = window.state["ee_pose"].astype(np.float64)
            now = simulator.observe().state
            assert np.linalg.norm(pose[1, :3, 3] - now["ee_pose"][1, :3, 3]) < 0.03
            for target in targets(window.action, window.state, spec, rate_hz=20.0, num_steps=7):
                done = done or simulator.step(target)
            step += 7
        assert done


def test_questions_are_records_that_the_pipeline_takes(tmp_path):
    tabletop_data.write_questions(tmp_path, 6)
    pools = [Pool(tmp_path / f"{name}.jsonl") for name in TABLETOP.questions]
    pool, scenes, names, _, _, _, ways, offsets = pools
    assert list(map(len, pools)) == [18, 6, 6, 2, 4, 2, 18, 6]
    assert not [fault for one in pools for fault in one.check()]
    records = [pool.record(number) for number in range(18)]
    points = np.array([record["points"][0] for record in records])
    assert ((points >= 0) & (points < 64)).all()
    assert np.ptp(points, axis=0).min() > 15
    for number in range(6):  # a description says what the three questions ask
        three = records[3 * number : 3 * number + 3]
        said = {f"{one['label']} {one['points'][0]}" for one in three}
        assert set(re.findall(r"\w+ block \[\d+, \d+\]", scenes.record(number)["answer"])) == said
        assert {one["images"][0] for one in three} == {scenes.record(number)["images"][0]}
        short = names.record(number)["answer"].removeprefix("a ").replace(", a ", ", ")
        assert short == re.sub(r" block \[(\d+, \d+)\]", r"\1", scenes.record(number)["answer"])
        assert names.record(number)["images"] == scenes.record(number)["images"]
        told = [ways.record(3 * number + block) for block in range(3)]
        assert {one["images"][0] for one in told} == {three[0]["images"][0]}
        assert {one["label"].split()[0] for one in three} == {
            colour for one in told for colour in COLOURS if colour in one["question"]
        }
        for one in told:
            assert one["views"] == ["head", "right_wrist"]
            opening = round(10 * one["state"]["arms"]["right"]["grip_open"])
            way = r"at \[[+-]\d\d [+-]\d\d [+-]\d\d\]"
            assert re.fullmatch(f"{way} open {opening:02}", one["answer"])
        whole = offsets.record(number)
        assert (whole["views"], whole["state"]) == (told[0]["views"], told[0]["state"])
        colours = [one["id"].rsplit("/", 1)[1] for one in told]
        pairs = zip(colours, told, strict=True)
        said = {
            one["answer"].partition(" open")[0].replace("at", f"{its} block") for its, one in pairs
        }
        assert set(whole["answer"].split(", ")) == said


def test_scenes_with_fewer_blocks_show_what_is_said_of_them(tmp_path):
    tabletop_data.write_questions(tmp_path, 64)
    single, pairs = (Pool(tmp_path / f"{name}.jsonl") for name in ("single", "pairs"))
    assert len(single) == len(pairs) == 32
    said, right = collections.Counter(), []
    for number in range(0, 32, 2):
        one, point = single.record(number), single.record(number + 1)
        long, short = pairs.record(number), pairs.record(number + 1)
        assert one["answer"] == f"{point['label']} {point['points'][0]}"
        assert one["images"] == point["images"]
        assert long["images"] == short["images"]
        blocks = re.findall(r"(\w+) block \[(\d+), (\d+)\]", long["answer"])
        assert re.findall(r"a ([a-z]+)(\d+), (\d+)", short["answer"]) == blocks
        said.update((2, colour) for colour, _, _ in blocks)
        said[1, point["label"].split()[0]] += 1
        shown = cv2.imread(str(tmp_path / long["images"][0]))[..., ::-1] / 255.0
        for colour, x, y in blocks:  # what is said is what stands there, if no hand hides it
            apart = {
                other: np.linalg.norm(shown[int(y), int(x)] - COLOURS[other]) for other in COLOURS
            }
            right.append(min(apart, key=apart.get) == colour)
    assert set(said) == {(count, colour) for count in (1, 2) for colour in COLOURS}
    assert np.mean(right) > 0.8


def test_the_way_to_the_only_block_is_said_as_among_three(tmp_path):
    tabletop_data.write_questions(tmp_path, 8)
    single, ways = (Pool(tmp_path / f"{name}.jsonl") for name in ("single", "single_ways"))
    assert len(single) == len(ways) == 8
    for number in range(0, 8, 2):
        seen, way, offset = single.record(number), ways.record(number), ways.record(number + 1)
        colour = seen["answer"].split()[0]
        assert colour in way["question"]
        said = way["answer"].partition(" open")[0].removeprefix("at ")
        assert offset["answer"] == f"{colour} block {said}"
        assert way["images"] == offset["images"]
        assert way["images"][0] == seen["images"][0]
        assert way["state"] == offset["state"]


def test_a_way_is_where_the_block_is_from_the_hand(tmp_path, simulator, monkeypatch):
    monkeypatch.setattr(TabletopSimulator, "offset", lambda self, block: (0.031, -0.124 * block, 0))
    tabletop_data.write_questions(tmp_path, 1)
    ways = Pool(tmp_path / "ways.jsonl")
    said = [ways.record(block)["answer"].partition(" open")[0] for block in range(3)]
    assert said == ["at [+03 +00 +00]", "at [+03 -12 +00]", "at [+03 -25 +00]"]


def test_hands_of_questions_are_open_and_closed_and_anything_between(tmp_path):
    """One that is never closed teaches to look past the fingers."""
    tabletop_data.write_questions(tmp_path, 40)
    ways = Pool(tmp_path / "ways.jsonl")
    said = [int(ways.record(3 * number)["answer"][-2:]) for number in range(40)]
    assert min(said) <= 1
    assert max(said) >= 9
    assert len(set(said)) > 6


def test_an_offset_is_seen_from_the_hand(simulator):
    """Along the hand's own axes, of which the third points down."""
    simulator.reset("pick_red", 3)
    offset = geometry.make_pose(simulator.offset(0), np.eye(3))
    place = geometry.compose(simulator.pose(), offset)
    np.testing.assert_allclose(place[:3, 3], simulator.block()[:3], atol=1e-9)
    assert simulator.offset(0)[2] > 0
