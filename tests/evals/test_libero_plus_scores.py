import pytest

from gear_jax.evals.episodes import Episode
from gear_jax.evals.ledger import Ledger, merge
from gear_jax.evals.libero_plus_scores import MAY_DIFFER, by_axis, of, table
from gear_jax.evals.sims.libero_plus_tasks import AXES, SUITES, TASKS
from gear_jax.evals.statistics import summarize

END = {
    "camera": "view_{}_0_100_0_0_initstate_0",
    "robot": "view_0_0_100_0_0_initstate_{}",
    "language": "language_{}_view_0_0_100_0_0_initstate_0",
    "light": "light_{}",
    "background": "tb_{}",
    "noise": "view_0_0_100_0_0_initstate_0_noise_{}",
    "layout": "add_{}",
}


def episode(axis, suite, number):
    return Episode(suite, f"go_{END[axis].format(number + 1)}", 0)


def everything(won):
    """All 10,030, of which the first `won[axis]` of each axis and suite succeed."""
    return {
        episode(axis, suite, number): {"success": number < won.get(axis, 0)}
        for axis in AXES
        for suite, tasks in zip(SUITES, TASKS[axis], strict=True)
        for number in range(tasks)
    }


def test_a_complete_run_has_a_total_that_weighs_tasks_and_a_mean_of_the_axes():
    found = by_axis(everything({"camera": 100, "layout": 300}))
    assert found["complete"]
    assert (found["success"], found["episodes"], found["tasks"]) == (1600, 10_030, 10_030)
    assert found["axes"]["camera"] == {"success": 400, "episodes": 1599, "tasks": 1599}
    assert found["axes"]["robot"] == {"success": 0, "episodes": 1550, "tasks": 1550}
    assert found["suites"]["libero_plus_10"] == {"success": 400, "episodes": 2519, "tasks": 2519}
    assert found["weighted_total"] == pytest.approx(0.159521, abs=1e-6)  # 1600 / 10030
    assert found["mean_of_axes"] == pytest.approx(0.148148, abs=1e-6)  # (400/1599 + 1200/1525) / 7
    assert found["says"] == ("all 10030 tasks: weighted total 15.95 %, mean of the axes 14.81 %")


def test_a_run_that_lacks_one_task_has_counts_and_no_score():
    rows = everything({"noise": 10})
    del rows[episode("light", SUITES[0], 5)]
    found = by_axis(rows)
    assert not found["complete"]
    assert found["weighted_total"] is found["mean_of_axes"] is None
    assert found["axes"]["light"] == {"success": 0, "episodes": 1141, "tasks": 1142}
    assert found["says"] == (
        "40 successes in 10029 of 10030 tasks, incomplete: light; no score of LIBERO-Plus can be "
        "given"
    )
    for said in (found["says"], table(found)):
        assert "average" not in said
        assert "mean" not in said


def test_counts_of_a_few_episodes_stand_in_the_table_and_in_the_summary():
    rows = {
        episode("robot", SUITES[0], 0): {"success": True},
        episode("robot", SUITES[2], 0): {"success": False},
        episode("noise", SUITES[0], 0): {"success": True},
    }
    lines = table(by_axis(rows)).splitlines()
    assert lines[AXES.index("robot")].split() == [
        "robot",
        "1/2",
        "50.0",
        "%",
        "of",
        "1550",
        "tasks",
    ]
    assert lines[AXES.index("light")].split() == ["light", "0/0", "-", "of", "1142", "tasks"]
    assert lines[7].split()[:2] == ["libero_plus_spatial", "2/2"]
    assert summarize(rows)["libero_plus"]["success"] == 2
    assert "libero_plus" not in summarize({Episode("libero_spatial", "a", 0): {"success": True}})
    assert of(rows)
    assert not of({})


def test_what_cannot_be_in_a_run_is_refused():
    with pytest.raises(ValueError, match="is no episode of LIBERO-Plus: expected init 0"):
        by_axis({Episode(SUITES[0], "go_light_1", 1): {"success": True}})
    with pytest.raises(ValueError, match="'libero_spatial', 'go_light_1', 0.* is no episode"):
        by_axis(
            {
                Episode("libero_spatial", "go_light_1", 0): {"success": True},
            }
        )
    rows = everything({})
    rows[Episode(SUITES[1], "stay_light_1", 0)] = {"success": True}
    with pytest.raises(ValueError, match="light has 1143 episodes: expected at most 1142"):
        by_axis(rows)


def folder(path, suite, *, policy="a", prompt="clean", won=True):
    """A ledger of one episode."""
    said = {"suite": suite, "max_steps": len(suite), "prompt": prompt}
    simulator = {"name": suite, "options": {"axes": ["light"]}, "is": said}
    protocol = {"seed": 0, "tasks": {suite: {}}, "simulator": simulator}
    book = Ledger(path, protocol, {"name": policy})
    book.add(Episode(suite, "go_light_1", 0), success=won, steps=9, queries=1)
    book.close()
    return path


def test_folders_of_several_suites_are_put_together_if_policy_and_protocol_are_the_same(tmp_path):
    first = folder(tmp_path / "1", SUITES[0])
    second = folder(tmp_path / "2", SUITES[1], won=False)
    rows = merge([first, second], MAY_DIFFER)
    assert [(one.suite, row["success"]) for one, row in rows.items()] == [
        (SUITES[0], True), (SUITES[1], False),
    ]  # fmt: skip
    for words, other in (
        ('name is "a" in the first and "b" in the second', {"policy": "b"}),
        ('simulator.prompt is "clean" in the first', {"prompt": "as_released"}),
    ):
        with pytest.raises(ValueError, match=words):
            merge([first, folder(tmp_path / words[:4], SUITES[1], **other)], MAY_DIFFER)
    again = folder(tmp_path / "again", SUITES[0], won=False)
    with pytest.raises(ValueError, match="'go_light_1' 0 ended in two ways"):
        merge([first, again], MAY_DIFFER)
