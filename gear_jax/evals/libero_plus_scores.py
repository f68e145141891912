"""Ledger rows of LIBERO-Plus -> successes by axis; a score of the benchmark only when all is run.

The benchmark's total weighs every task alike: successes by tasks. The mean of its seven axes is
given beside it, for papers print either. Both are of 10,030 tasks or they are not given.
"""

from collections.abc import Mapping
from typing import Any

from gear_jax.evals.episodes import Episode
from gear_jax.evals.sims import libero_plus_tasks as names

# of a simulator's protocol, where a suite or a part of one was run by itself
MAY_DIFFER = frozenset({"suite", "max_steps", "axes", "left_out"})


def of(rows: Mapping[Episode, Any]) -> bool:
    """Whether episodes are LIBERO-Plus's."""
    return any(episode.suite in names.SUITES for episode in rows)


def by_axis(rows: Mapping[Episode, Mapping[str, Any]]) -> dict[str, Any]:
    """Successes and episodes by axis and suite, and the scores if nothing is missing.

    Args:
        rows: of one policy's ledgers, all under one protocol; {Episode: {"success": bool, ...}}.

    Returns:
        {"axes": {axis: {success, episodes, tasks}}, "suites": likewise, "success", "episodes",
        "tasks": 10030, "complete": bool, "weighted_total" and "mean_of_axes": 0 .. 1, or None
        unless complete, "says": str, one sentence}.

    Raises:
        ValueError: an episode that is none of LIBERO-Plus, or a task with a second episode.
    """
    cells = {(axis, suite): [0, 0] for axis in names.AXES for suite in names.SUITES}
    for episode, row in rows.items():
        if episode.suite not in names.SUITES or episode.init:
            raise ValueError(f"{tuple(episode)} is no episode of LIBERO-Plus: expected init 0")
        cell = cells[names.axis_of(episode.task), episode.suite]
        cell[0] += bool(row["success"])
        cell[1] += 1
    axes = {
        axis: _sum((cells[axis, suite], names.num_tasks(axis, suite)) for suite in names.SUITES)
        for axis in names.AXES
    }
    suites = {
        suite: _sum((cells[axis, suite], names.num_tasks(axis, suite)) for axis in names.AXES)
        for suite in names.SUITES
    }
    over = [(name, one) for name, one in (axes | suites).items() if one["episodes"] > one["tasks"]]
    if over:
        raise ValueError(f"{over[0][0]} has {over[0][1]['episodes']} episodes: expected at most "
                         f"{over[0][1]['tasks']}")  # fmt: skip
    success, episodes = (sum(one[key] for one in axes.values()) for key in ("success", "episodes"))
    complete = episodes == names.TOTAL
    found = {
        "axes": axes,
        "suites": suites,
        "success": success,
        "episodes": episodes,
        "tasks": names.TOTAL,
        "complete": complete,
        "weighted_total": success / episodes if complete else None,
        "mean_of_axes": (
            sum(one["success"] / one["tasks"] for one in axes.values()) / len(axes)
            if complete
            else None
        ),
    }
    return found | {"says": _sentence(found)}


def table(found: Mapping[str, Any]) -> str:
    """`by_axis` in a few lines, counts beside every rate."""
    lines = []
    for part in ("axes", "suites"):
        for name, one in found[part].items():
            rate = f"{100 * one['success'] / one['episodes']:5.1f} %" if one["episodes"] else "-"
            counts = f"{one['success']}/{one['episodes']}"
            lines.append(f"{name:20} {counts:>11} {rate:>8}   of {one['tasks']} tasks")
    return "\n".join([*lines, found["says"]])


def _sum(cells):
    success, episodes, tasks = 0, 0, 0
    for (won, run), of in cells:
        success, episodes, tasks = success + won, episodes + run, tasks + of
    return {"success": success, "episodes": episodes, "tasks": tasks}


def _sentence(found):
    if found["complete"]:
        return (
            f"all {found['tasks']} tasks: weighted total {100 * found['weighted_total']:.2f} %, "
            f"mean of the axes {100 * found['mean_of_axes']:.2f} %"
        )
    short = [axis for axis, one in found["axes"].items() if one["episodes"] < one["tasks"]]
    return (
        f"{found['success']} successes in {found['episodes']} of {found['tasks']} tasks, "
        f"incomplete: {', '.join(short)}; no score of LIBERO-Plus can be given"
    )
