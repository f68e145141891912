import contextlib
import dataclasses

import numpy as np
import pytest

from gear_jax.evals import remote, runner
from gear_jax.evals.episodes import Answer
from gear_jax.evals.ledger import Ledger, finish, read
from gear_jax.evals.policies import HoldPolicy, NoisePolicy, open_policy
from gear_jax.evals.runner import Runner, RunnerConfig
from gear_jax.evals.sims.base import Task
from gear_jax.evals.sims.point import PointSimulator
from gear_jax.evals.videos import Keeper, file_name
from gear_jax.policy import execution

TASKS = PointSimulator().tasks()
POINT, ONE = remote.WorkerConfig("point"), RunnerConfig()
EPISODES = runner.work_list(TASKS, range(5))


class Policy(NoisePolicy):
    """Noise that remembers its batches and calls `then` after each."""

    def __init__(self, then=lambda count: None):
        super().__init__(seed=1)
        self.batches, self.then = [], then

    def __call__(self, queries):
        self.batches.append([(one.task, one.init, one.number) for one in queries])
        self.then(len(self.batches))
        return super().__call__(queries)


def evaluate(
    folder, policy=None, *, episodes=EPISODES, config=ONE, keeper=None, host=0, lines=None
):
    policy = policy or Policy()
    with contextlib.closing(Ledger(folder, {}, dict(policy.identity()), host=host)) as book:
        one = Runner(
            policy, POINT, TASKS, 20.0, 7, book, config, keeper or Keeper(folder / "videos"),
            (lambda line: None) if lines is None else lines.append,
        )  # fmt: skip
        policy.runner = one
        one.run(episodes)
    return one


def by_hand(policy, episode, max_steps=40):
    """One episode without workers."""
    simulator, steps, number = PointSimulator(), 0, 0
    simulator.reset(episode.task, episode.init)
    while steps < max_steps:
        seen = simulator.observe()
        (answer,) = policy([runner.Query(seen, *episode, number)])
        number += 1
        count = min(7, max_steps - steps)
        for target in execution.targets(
            answer.action, seen.state, policy.spec, rate_hz=20.0, num_steps=count
        ):
            steps += 1
            if simulator.step(target):
                return True, steps, number
    return False, steps, number


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Bytes of the ledger that one worker writes."""
    folder = tmp_path_factory.mktemp("expected")
    evaluate(folder)
    finish(folder)
    return (folder / "ledger.jsonl").read_bytes()


def test_success_steps_and_queries_are_those_of_the_episode_by_hand(tmp_path):
    evaluate(tmp_path)
    rows, _ = read(tmp_path)
    found = {one: (row["success"], row["steps"], row["queries"]) for one, row in rows.items()}
    assert found == {one: by_hand(Policy(), one) for one in EPISODES}
    assert 0 < sum(row["success"] for row in rows.values()) < len(rows)
    assert {row["steps"] for row in rows.values() if not row["success"]} == {40}


@pytest.mark.parametrize(
    "config", [RunnerConfig(3), RunnerConfig(2, batch_size=2), RunnerConfig(2, batch_size=5)]
)
def test_workers_and_batches_change_nothing_and_batches_have_one_size(tmp_path, config, expected):
    policy = Policy()
    evaluate(tmp_path, policy, config=config)
    finish(tmp_path)
    assert (tmp_path / "ledger.jsonl").read_bytes() == expected
    assert {len(batch) for batch in policy.batches} == {config.batch_size or 1}


def test_hosts_that_share_a_folder_give_the_ledger_of_one(tmp_path, expected):
    evaluate(tmp_path, episodes=runner.host_slice(EPISODES, 0, 2)[:2])  # killed after two
    for host in (1, 0):
        evaluate(tmp_path, episodes=runner.host_slice(EPISODES, host, 2), host=host)
    finish(tmp_path)
    assert (tmp_path / "ledger.jsonl").read_bytes() == expected
    files = [tmp_path / f"episodes-{host}.jsonl" for host in (0, 1)]
    assert [len(path.read_bytes().splitlines()) for path in files] == [5, 5]


def test_a_worker_killed_mid_episode_is_replaced_and_the_result_is_the_same(tmp_path, expected):
    def kill(count):
        if count in (3, 8, 9):
            policy.runner._slots[0].simulator.process.kill()

    policy, lines = Policy(kill), []
    evaluate(tmp_path, policy, config=RunnerConfig(2), lines=lines)
    finish(tmp_path)
    assert (tmp_path / "ledger.jsonl").read_bytes() == expected
    assert sum("ended with -9" in line and "starting it again" in line for line in lines) == 3


def test_a_worker_that_always_dies_ends_the_run_with_a_sentence(tmp_path):
    policy = Policy(lambda count: policy.runner._slots[0].simulator.process.kill())
    with pytest.raises(remote.WorkerError, match="worker 0 .*given up after 2 new starts"):
        evaluate(tmp_path, policy, config=RunnerConfig(restarts=2))
    assert read(tmp_path)[0] == {}


def test_what_the_ledger_holds_is_not_run_again(tmp_path):
    evaluate(tmp_path, episodes=EPISODES[:6])
    policy = Policy()
    evaluate(tmp_path, policy)
    assert {one[:2] for batch in policy.batches for one in batch} == {
        one[1:] for one in EPISODES[6:]
    }


def test_an_answer_that_cannot_be_is_refused(tmp_path):
    class Bad(HoldPolicy):
        def __call__(self, queries):
            return [Answer(np.full((30, 20), np.nan), np.zeros(0)) for _ in queries]

    with pytest.raises(ValueError, match="answer to query 0 of 'near' 0 has shape .*finite"):
        evaluate(tmp_path, Bad())


def test_time_is_split_and_said(tmp_path):
    lines = []
    one = evaluate(tmp_path, lines=lines)
    parts = {name: value for name, value in one.seconds.items() if name != "wall"}
    assert set(parts) == {"physics", "render", "policy", "idle"}
    assert all(value > 0 for value in parts.values())
    assert one.seconds["idle"] + one.seconds["policy"] <= one.seconds["wall"]
    assert lines[-1].startswith("10/10 episodes, success ")


def test_progress_is_one_line_with_the_interval():
    assert runner.progress([True] * 81 + [False] * 182, 500, 3600.0) == (
        "263/500 episodes, success 81/263 = 30.8 % (25.5 .. 36.6), 263 episodes/h"
    )


def test_videos_of_failures_are_kept_up_to_the_limit(tmp_path):
    import av

    evaluate(tmp_path, keeper=Keeper(tmp_path / "videos", "failures", 2))
    rows, _ = read(tmp_path)
    found = sorted(path.name for path in tmp_path.glob("videos/point/*.mp4"))
    failed = [one for one in EPISODES if not rows[one]["success"]]
    assert found == [file_name(one, False).split("/")[1] for one in failed[:2]]
    queries = rows[failed[0]]["queries"]
    with av.open(str(tmp_path / "videos/point" / found[0])) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert [frame.shape for frame in frames] == [(192, 192, 3)] * queries
    with np.load(tmp_path / "videos/point" / found[0].replace("mp4", "npz")) as kept:
        assert kept["action"].shape == (queries, 30, 20)
        first = Policy()([runner.Query(None, *failed[0], 0)])[0]
        np.testing.assert_array_equal(kept["action"][0], first.action)
    assert Keeper(tmp_path / "videos", "failures", 2).wants(EPISODES[0]) is False
    with pytest.raises(ValueError, match="video is 'some'"):
        Keeper(tmp_path, "some")


def test_tasks_with_awkward_names_get_files_of_their_own():
    tasks = ("a b", "a_b", "a/b", "..", "x" * 200)
    names = {file_name(runner.Episode("s", task, 0), True) for task in tasks}
    assert len(names) == 5
    assert all(name.count("/") == 1 and len(name) < 120 and ".." not in name for name in names)


def test_the_work_list_is_in_a_fixed_order_and_sliced_by_place():
    tasks = [Task("s", name, "", 3, 10) for name in "ba"]
    found = runner.work_list(tasks, range(1, 3))
    assert found == [("s", "b", 1), ("s", "b", 2), ("s", "a", 1), ("s", "a", 2)]
    assert runner.host_slice(found, 1, 3) == [("s", "b", 2)]
    for bad in (range(0, 4), range(2, 2)):
        with pytest.raises(ValueError, match="of 'b': expected within 0:3"):
            runner.work_list(tasks, bad)


def test_replanning_is_in_rows_of_the_chunk():
    assert runner.steps_between(10, 30.0, 20.0) == 7
    assert runner.steps_between(30, 30.0, 20.0) == 20
    assert runner.steps_between(1, 30.0, 5.0) == 1


def test_only_what_changes_results_is_in_the_protocol():
    hello = {"protocol": {"size": 32}, "versions": {"numpy": "2"}, "rate_hz": 20.0}
    workers = remote.WorkerConfig("point", {"pace": 0.0})
    record = runner.protocol_record(
        hello, workers, TASKS[:1], range(5), replan=10, steps_per_query=7, seed=3
    )
    assert record == {
        "version": 1,
        "simulator": {"name": "point", "options": {"pace": 0.0}, "is": {"size": 32}},
        "versions": {"numpy": "2"},
        "rate_hz": 20.0,
        "replan_rows": 10,
        "steps_per_query": 7,
        "seed": 3,
        "tasks": {"point": {"near": {"instruction": "reach the near goal", "max_steps": 40}}},
        "inits": [0, 5],
    }
    other = dataclasses.replace(workers, python="/elsewhere", timeout=1.0)
    assert record == runner.protocol_record(
        hello, other, TASKS[:1], range(5), replan=10, steps_per_query=7, seed=3
    )


def test_a_policy_is_a_known_name_or_a_folder(tmp_path):
    assert open_policy("hold").identity()["name"] == "hold"
    with pytest.raises(
        ValueError, match="policy 'best' is unknown: expected a run's folder or one"
    ):
        open_policy("best")
    with pytest.raises(ValueError, match="policy 'hold' has no temperature"):
        open_policy("hold", temperature=0.5)
