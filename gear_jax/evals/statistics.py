"""Ledger rows -> success rates with intervals, and the paired test of two policies."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from scipy import stats

from gear_jax.evals import libero_plus_scores
from gear_jax.evals.episodes import Episode

_Z = 1.959963984540054  # of a two-sided 95 % interval


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927); 0 .. 1 for no trials.

    Raises:
        ValueError: not 0 <= successes <= trials.
    """
    if not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials: expected 0 .. {trials}")
    if trials == 0:
        return 0.0, 1.0
    rate, square = successes / trials, _Z * _Z / trials
    middle = rate + square / 2
    half = math.sqrt(square * (rate * (1 - rate) + square / 4))
    low = 0.0 if successes == 0 else (middle - half) / (1 + square)
    high = 1.0 if successes == trials else (middle + half) / (1 + square)
    return low, high


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p of McNemar's exact test: a fair coin for each pair that disagrees."""
    pairs = only_first + only_second
    tail = float(stats.binom.cdf(min(only_first, only_second), pairs, 0.5)) if pairs else 1.0
    return min(1.0, 2 * tail)


def count(outcomes: Iterable[bool]) -> dict[str, Any]:
    """Successes, episodes, rate and its interval."""
    outcomes = list(outcomes)
    low, high = wilson(sum(outcomes), len(outcomes))
    return {
        "success": sum(outcomes),
        "episodes": len(outcomes),
        "rate": sum(outcomes) / len(outcomes) if outcomes else None,
        "low": low,
        "high": high,
    }


def summarize(rows: Mapping[Episode, Mapping[str, Any]]) -> dict[str, Any]:
    """Success by task, by suite and in total.

    Args:
        rows: of a ledger.

    Returns:
        {"total": count, "suites": {suite: count}, "tasks": {suite: {task: count}}}; `count` is
        {success, episodes, rate, low, high}; the last two are Wilson's 95 %. For LIBERO-Plus
        also "libero_plus", `libero_plus_scores.by_axis`.
    """
    by_task: dict[str, dict[str, list[bool]]] = {}
    for episode, row in sorted(rows.items()):
        by_task.setdefault(episode.suite, {}).setdefault(episode.task, []).append(row["success"])
    plus = {"libero_plus": libero_plus_scores.by_axis(rows)} if libero_plus_scores.of(rows) else {}
    return plus | {
        "total": count(row["success"] for row in rows.values()),
        "suites": {
            suite: count(one for outcomes in tasks.values() for one in outcomes)
            for suite, tasks in by_task.items()
        },
        "tasks": {
            suite: {task: count(outcomes) for task, outcomes in tasks.items()}
            for suite, tasks in by_task.items()
        },
    }


def compare(first, second) -> dict[str, Any]:
    """Two policies on the episodes that both have run.

    Args:
        first: {Episode: row} of a ledger.
        second: likewise, under the same protocol.

    Returns:
        Counts of both on the shared episodes, the four cells of the paired table, McNemar's p, and
        how many episodes only one of them has.

    Raises:
        ValueError: they share no episode.
    """
    shared = sorted(first.keys() & second.keys())
    if not shared:
        raise ValueError(f"ledgers of {len(first)} and {len(second)} episodes share none")
    pairs = [(first[one]["success"], second[one]["success"]) for one in shared]
    cells = {
        "both": sum(a and b for a, b in pairs),
        "only_first": sum(a and not b for a, b in pairs),
        "only_second": sum(b and not a for a, b in pairs),
        "neither": sum(not a and not b for a, b in pairs),
    }
    return {
        "episodes": len(pairs),
        "first": count(a for a, _ in pairs),
        "second": count(b for _, b in pairs),
        **cells,
        "p": mcnemar(cells["only_first"], cells["only_second"]),
        "left_out": len(first) + len(second) - 2 * len(shared),
    }
