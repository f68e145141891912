"""An evaluation as a page: success with intervals, videos, what the policy wanted, the protocol.

Reads the folder that launch/eval.py writes, finished or not. Everything is inside one HTML file.
Needs the extra `report`.
"""

import html
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np

from gear_jax.data.windows import target_poses
from gear_jax.evals import ledger, statistics
from gear_jax.report import html_parts
from gear_jax.types import ARMS, ActionSpec

mpl.use("Agg")

import matplotlib.pyplot as plt

_COLOURS = ("#1f77b4", "#2ca02c", "#d62728")
_MOST_BARS = 60  # beyond that, suites instead of tasks
_MOST_VIDEO = 24 << 20  # bytes inside the page


def write(folder: pathlib.Path, target: pathlib.Path) -> None:
    """Write the page of an evaluation.

    Args:
        folder: of the ledger.
        target: the HTML file.

    Raises:
        ValueError: no evaluation there, or no episode yet.
    """
    record = ledger.open_record(folder)
    rows, torn = ledger.read(folder)
    if not rows:
        raise ValueError(f"{folder} has no episode yet")
    found = statistics.summarize(rows)
    protocol = record["protocol"]
    inits = protocol.get("inits", [0, 0])
    planned = sum(map(len, protocol.get("tasks", {}).values())) * (inits[1] - inits[0])
    facts = {
        "success": _said(found["total"]),
        "episodes": f"{len(rows)} of {planned}" + (f", {torn} torn lines left out" if torn else ""),
        **{f"suite {suite}": _said(one) for suite, one in found["suites"].items()},
        "protocol digest": record["digests"]["protocol"][:16],
        "policy digest": record["digests"]["policy"][:16],
    }
    if "libero_plus" in found:
        facts |= {"LIBERO-Plus": found["libero_plus"]["says"]} | {
            f"axis {axis}": f"{one['success']}/{one['episodes']}, of {one['tasks']} tasks"
            for axis, one in found["libero_plus"]["axes"].items()
        }
    parts = [html_parts.table(facts), "<h2>Success by task</h2>", *_success(found)]
    parts += ["<h2>Steps of the episodes</h2>", *_steps(rows, protocol)]
    parts += [*_timings(folder), *_kept(folder, protocol)]
    parts += [
        "<h2>Policy</h2>",
        html_parts.table(_flat(record["policy"])),
        "<h2>Protocol</h2>",
        '<p class="note">Results are comparable under equal protocol digests only.</p>',
        html_parts.table(_flat(protocol)),
    ]
    name = protocol.get("simulator", {}).get("name", "a simulator")
    html_parts.write(target, f"Evaluation in {name}", parts)


def _said(count: Mapping[str, Any]) -> str:
    return (
        f"{count['success']}/{count['episodes']} = {100 * count['rate']:.1f} % "
        f"(95 %: {100 * count['low']:.1f} .. {100 * count['high']:.1f})"
    )


def _success(found) -> list[str]:
    """Bars with Wilson intervals, and the counts."""
    bars = [(task, one) for tasks in found["tasks"].values() for task, one in tasks.items()]
    if len(bars) > _MOST_BARS:
        bars = list(found["suites"].items())
    names, counts = zip(*bars, strict=True)
    rates = np.array([one["rate"] for one in counts])
    ends = np.array([[one["low"], one["high"]] for one in counts]).T
    figure, axes = plt.subplots(figsize=(9.5, 0.9 + 0.32 * len(bars)), layout="constrained")
    places = np.arange(len(bars))[::-1]
    axes.barh(places, rates, color="#9ecae1")
    axes.errorbar(rates, places, xerr=np.abs(ends - rates), fmt="none", ecolor="0.25", capsize=3)
    labels = [name if len(name) <= 60 else name[:57] + "..." for name in names]
    axes.set_yticks(places, labels, fontsize=8)
    axes.set_xlim(0, 1)
    axes.set_xlabel("success rate, with Wilson's 95 % interval", fontsize=9)
    shown = html_parts.table({name: _said(one) for name, one in bars})
    return [html_parts.figure(figure, "success rate by task"), shown]


def _steps(rows, protocol) -> list[str]:
    """When episodes ended well; failures go to the limit."""
    figure, axes = plt.subplots(figsize=(9.5, 2.6), layout="constrained")
    won: dict[str, list[int]] = {}
    for episode, row in rows.items():
        if row["success"]:
            won.setdefault(episode.suite, []).append(row["steps"])
    if not won:
        plt.close(figure)
        return ['<p class="note">No episode succeeded.</p>']
    names = list(won)
    axes.hist([won[name] for name in names], bins=30, stacked=True, label=names)
    axes.legend(fontsize=8)
    axes.set_xlabel(
        f"control steps until success, at {protocol.get('rate_hz', 0):g} Hz", fontsize=9
    )
    axes.set_ylabel("episodes", fontsize=9)
    every = [steps for one in won.values() for steps in one]
    note = f"{len(every)} successes; median {np.median(every):g} steps"
    return [html_parts.figure(figure, "steps until success"), f'<p class="note">{note}</p>']


def _timings(folder) -> list[str]:
    """Where the seconds of an episode went; a torn last line is no loss here."""
    lines = []
    for path in sorted(folder.glob("timings-*.jsonl")):
        for line in path.read_text(errors="replace").split("\n")[:-1]:
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
    if not lines:
        return []
    means = {
        f"{name}, s": f"{np.mean([one.get(name, 0.0) for one in lines]):.3f}"
        for name in ("physics", "render", "policy", "wall")
    }
    note = "Mean of an episode. Workers overlap, and a policy's batch counts for each in it."
    return ["<h2>Time</h2>", f'<p class="note">{note}</p>', html_parts.table(means)]


def _kept(folder, protocol) -> list[str]:
    """Videos, failures first, and the chunks of the first of them."""
    videos = sorted(
        folder.glob("videos/*/*.mp4"), key=lambda path: (not html_parts.failed(path), path)
    )
    if not videos:
        return ['<p class="note">No videos were kept (--video failures).</p>']
    parts, budget = ["<h2>Episodes as the policy saw them</h2>"], _MOST_VIDEO
    parts.append('<p class="note">One frame for each query, views side by side.</p>')
    for path in videos:
        budget -= path.stat().st_size
        if budget < 0:
            parts.append(f'<p class="note">and more in {html.escape(str(folder))}/videos</p>')
            break
        words = f"{path.parent.name}: {path.stem}"
        parts.append(html_parts.film(path, words, 'controls height="160"'))
    codes = []
    for number, path in enumerate(path for path in videos if path.with_suffix(".npz").exists()):
        with np.load(path.with_suffix(".npz")) as kept:
            codes.append(kept["latent_ids"].ravel())
            if number == 0:
                drawn = _chunks_figure(dict(kept), protocol)
                parts += [f"<h2>What it wanted in {html.escape(path.stem)}</h2>"]
                parts += [html_parts.figure(drawn, "chunks over the path that was gone")]
    ids = np.concatenate(codes) if codes else np.zeros(0, int)
    return parts + (_codes(ids) if ids.size else [])


def _chunks_figure(kept, protocol):
    """Where the end effector was at each query, and where each chunk would have taken it."""
    spec = ActionSpec()
    arms = [index for index in range(len(ARMS)) if kept["arm_mask"][:, index].any()]
    poses, grippers = target_poses(kept["action"].astype(float), kept["ee_pose"], spec)
    begun = np.arange(len(poses)) * protocol["steps_per_query"] / protocol["rate_hz"]
    ahead = np.arange(1, spec.chunk_len + 1) / spec.rate_hz
    figure, grid = plt.subplots(
        len(arms), 4, figsize=(11.5, 2.7 * len(arms)), layout="constrained", squeeze=False
    )
    for line, arm in zip(grid, arms, strict=True):
        for axis, (axes, colour) in enumerate(zip(line[:3], _COLOURS, strict=True)):
            axes.plot(begun, kept["ee_pose"][:, arm, axis, 3], "k.-", lw=1, ms=4, label="was")
            for query, start in enumerate(begun):
                label = "wanted" if query == 0 else None
                chunk = poses[query, arm, :, axis, 3]
                axes.plot(start + ahead, chunk, color=colour, lw=1, alpha=0.6, label=label)
            axes.set_title(f"{ARMS[arm]}: {'xyz'[axis]}, base frame, m", fontsize=9)
            axes.legend(fontsize=7)
        for query, start in enumerate(begun):
            line[3].plot(start + ahead, grippers[query, arm], color="#444444", lw=1, alpha=0.5)
        line[3].set_ylim(-0.08, 1.08)
        line[3].set_title("gripper wanted, 0 closed .. 1 open", fontsize=9)
        for axes in line:
            axes.set_xlabel("s", fontsize=8)
            axes.tick_params(labelsize=7)
    return figure


def _codes(ids: np.ndarray) -> list[str]:
    """How often each latent action id was decoded."""
    counts = np.bincount(ids)
    figure, axes = plt.subplots(figsize=(9.5, 2.4), layout="constrained")
    axes.bar(np.arange(len(counts)), counts, color="#756bb1")
    axes.set_xlabel("latent action id", fontsize=9)
    axes.set_ylabel("times decoded", fontsize=9)
    share = counts[counts > 0] / counts.sum()
    perplexity = float(np.exp(-(share * np.log(share)).sum()))
    note = f"{len(share)} different ids, perplexity {perplexity:.1f}, in the episodes above."
    drawn = html_parts.figure(figure, "use of latent action ids")
    return ["<h2>Latent action ids</h2>", drawn, f'<p class="note">{note}</p>']


def _flat(value: Any, name: str = "") -> dict[str, str]:
    """Nested JSON by dotted names; long lists of tasks are cut."""
    if isinstance(value, Mapping) and value:
        lines: dict[str, str] = {}
        for key, one in value.items():
            lines |= _flat(one, f"{name}.{key}" if name else str(key))
            if len(lines) > 200:
                return lines | {f"{name} ...": "more in protocol.json"}
        return lines
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = ", ".join(map(str, value))
    return {name: str(value)[:400]}
