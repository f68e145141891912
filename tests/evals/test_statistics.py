import pytest

from gear_jax.evals.episodes import Episode
from gear_jax.evals.statistics import compare, mcnemar, summarize, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_gives_the_published_intervals(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_at_the_ends_is_exact_and_nonsense_is_refused():
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(20, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)
    assert wilson(20, 20)[1] == 1.0
    with pytest.raises(ValueError, match="21 successes in 20 trials: expected 0 .. 20"):
        wilson(21, 20)


def test_mcnemar_gives_the_published_p():
    assert mcnemar(9, 2) == pytest.approx(0.06543, abs=5e-6)  # Fay, exact2x2 vignette
    assert mcnemar(1, 9) == pytest.approx(22 / 1024)
    assert mcnemar(0, 5) == pytest.approx(1 / 16)
    assert mcnemar(4, 4) == mcnemar(0, 0) == 1.0


def ledger(**outcomes):
    return {
        Episode("s" if task < "c" else "t", task, init): {"success": flag == "1"}
        for task, flags in outcomes.items()
        for init, flag in enumerate(flags)
    }


def test_success_is_counted_by_task_suite_and_in_total():
    found = summarize(ledger(a="110", b="00", c="1"))
    assert {key: found["total"][key] for key in ("success", "episodes", "rate")} == {
        "success": 3, "episodes": 6, "rate": 0.5,
    }  # fmt: skip
    assert (found["suites"]["s"]["success"], found["suites"]["s"]["episodes"]) == (2, 5)
    assert (found["tasks"]["s"]["b"]["success"], found["tasks"]["s"]["b"]["episodes"]) == (0, 2)
    assert found["tasks"]["t"]["c"]["high"] == 1.0
    assert summarize({})["total"]["rate"] is None


def test_two_ledgers_are_compared_episode_by_episode():
    found = compare(ledger(a="11100", b="1"), ledger(a="10010"))
    assert [found[key] for key in ("both", "only_first", "only_second", "neither")] == [1, 2, 1, 1]
    assert (found["episodes"], found["left_out"], found["p"]) == (5, 1, 1.0)
    assert (found["first"]["success"], found["second"]["success"]) == (3, 2)
    with pytest.raises(ValueError, match="ledgers of 1 and 1 episodes share none"):
        compare(ledger(a="1"), ledger(b="1"))
