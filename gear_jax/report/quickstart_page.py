"""The quickstart's report: success beside its floors, what each step cost, curves, films.

Reads a folder as launch/quickstart.py leaves it. Needs matplotlib (extra `report`).
"""

import collections
import html
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np

from gear_jax.report import eval_page, html_parts

mpl.use("Agg")

import matplotlib.pyplot as plt

_WORDS = {
    "named": "trained policy",
    "other": "told of another block",
    "untrained": "untrained policy",
    "replay": "replayed demonstration",
}
# What the words above leave open.
_NOTES = {
    "other": "Told of another block, the trained policy should fail: success is to take the block "
    "of the task, not the one that the instruction names.",
    "replay": "A replayed demonstration does not look: its own initial state was another.",
}
# What is drawn of each stage that ran: keys of metrics.jsonl, and held-out ones beside them.
_CURVES = {
    **dict.fromkeys(("single", "pairs", "vlm", "single_ways", "ways"), ("text",)),
    "spatial": ("text", "fast", "held_out/fast"),
    "latents": ("reconstruction", "held_out/reconstruction"),
    "pretrain": ("text", "latent", "fast", "held_out/latent", "held_out/fast"),
    "policy": ("flow", "held_out/flow", "held_out/flow_predicted"),
}


def write(
    run: pathlib.Path,
    found: Mapping[str, Any],
    seconds: Mapping[str, float],
    *,
    title: str,
    note: str,
) -> None:
    """Write report.html, and a page for each evaluation.

    Args:
        run: folder of the quickstart.
        found: {evaluation: count} as `evals/statistics.py` counts.
        seconds: {step: seconds} of the steps that ran; those that train have their curves drawn.
        title: of the page.
        note: what is to be said of its numbers.
    """
    parts = [
        f'<p class="note">{html.escape(note)}</p>',
        "<h2>Success</h2>",
        _success(found),
        html_parts.table({_WORDS[name]: _said(count) for name, count in found.items()}),
        *(f'<p class="note">{_NOTES[name]}</p>' for name in found if name in _NOTES),
        "<h2>Episodes</h2>",
        *_films(run / "eval" / "named" / "videos"),
        "<h2>Training</h2>",
        *(
            _curve(run / stage / "metrics.jsonl", stage, keys)
            for stage, keys in _CURVES.items()
            if stage in seconds
        ),
        "<h2>What it cost</h2>",
        _cost(seconds),
        "<h2>More</h2>",
        "<ul>",
    ]
    for name in found:
        eval_page.write(run / "eval" / name, run / "eval" / name / "page.html")
        parts.append(
            f'<li><a href="eval/{name}/page.html">{_WORDS[name]}</a>: steps, chunks, '
            "latent codes, protocol</li>"
        )
    if (run / "ids" / "page.html").is_file():
        parts.append('<li><a href="ids/page.html">latent actions</a>: codes and what they do</li>')
    html_parts.write(run / "report.html", title, [*parts, "</ul>"])


def _said(count):
    return (
        f"{count['success']} of {count['episodes']} = {100 * count['rate']:.0f} % "
        f"(95 %: {100 * count['low']:.0f} .. {100 * count['high']:.0f})"
    )


def _success(found):
    counts = list(found.values())[::-1]
    names = [_WORDS[name] for name in found][::-1]
    rates = np.array([count["rate"] for count in counts])
    ends = np.array([[count["low"], count["high"]] for count in counts]).T
    figure, axes = plt.subplots(figsize=(11, 2.4), layout="constrained")
    axes.barh(names, rates, color="#9ecae1")
    axes.errorbar(rates, names, xerr=np.abs(ends - rates), fmt="none", ecolor="0.25", capsize=3)
    axes.set_xlim(0, 1)
    axes.set_xlabel("success rate, with Wilson's 95 % interval")
    return html_parts.figure(figure, "success of the policy and its floors")


def _curve(path, stage, keys):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(11, 2.6), layout="constrained")
    for key in keys:
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        points = [(step, value) for step, value in points if value > 0]
        if points:
            style = "o--" if key.startswith("held_out") else "-"
            axes.plot(*zip(*points, strict=True), style, markersize=3, label=key)
    axes.set_yscale("log")
    for places in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        places(_number)
    axes.tick_params(axis="y", which="both", labelsize=8)
    axes.set(xlabel=f"step of {stage}", ylabel="loss")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(alpha=0.3)
    return html_parts.figure(figure, f"losses of {stage}")


def _number(value, place):
    """Label of a logarithmic axis: 0.03, 0.1, 2; nothing where labels would touch."""
    del place
    return f"{value:g}" if f"{value:.0e}"[0] in "12357" else ""


def _cost(seconds):
    figure, axes = plt.subplots(figsize=(11, 0.6 + 0.27 * len(seconds)), layout="constrained")
    names = list(seconds)[::-1]
    bars = axes.barh(names, [seconds[name] for name in names], color="#c7e9c0")
    axes.bar_label(bars, fmt="%.0f s", fontsize=8)
    axes.set_xlabel(f"seconds; {sum(seconds.values()) / 60:.0f} minutes together")
    return html_parts.figure(figure, "seconds of each step")


def _films(folder):
    """Up to a dozen films of what the policy saw: the first initial states of every task."""
    tasks = collections.defaultdict(list)
    for path in sorted(folder.glob("*/*.mp4")):
        tasks[path.stem.rsplit("-", 2)[0]].append(path)  # see evals/videos.py
    if not tasks:
        return ['<p class="note">No films were kept.</p>']
    note = (
        "What the policy saw, a frame for each query: the head camera and the wrist camera, of the "
        "first initial states of every task."
    )
    shown = [path for films in tasks.values() for path in films[: max(1, 12 // len(tasks))]]
    look = 'autoplay muted playsinline width="275"'
    return [
        f'<p class="note">{note}</p>',
        *(html_parts.film(path, path.stem, look) for path in shown),
    ]
