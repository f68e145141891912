"""A data set as a page that a person looks at, and as a rerun recording.

`prepared_page` shows what training will see: views, the chunk in 3D and per dimension with its
mask, instruction, statistics, and what was dropped. `raw_page` shows a recording that has no row
yet. Both write one HTML file with everything inside. Needs the extra `report`.
"""

import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np

from gear_jax.data.images import BadImageError, decode
from gear_jax.data.measure import Measured
from gear_jax.data.prepared import Prepared
from gear_jax.data.sources.base import Source
from gear_jax.data.statistics import check, report
from gear_jax.data.tfrecord import DataError
from gear_jax.data.windows import make_chunks, target_poses
from gear_jax.report import html_parts
from gear_jax.types import ARMS, VIEWS, ActionSpec, Episode

mpl.use("Agg")

import matplotlib.pyplot as plt

_COLOURS = ("#1f77b4", "#2ca02c", "#d62728")
_LINES = {  # how each dim of an arm's action is drawn
    "position": [*zip("xyz", _COLOURS, strict=True)],
    "rmat6d": [*zip(("x of x", "y of x", "z of x", "x of y", "y of y", "z of y"),
                    ("#1f77b4", "#6baed6", "#c6dbef", "#2ca02c", "#74c476", "#c7e9c0"),
                    strict=True)],
    "gripper": [("opening", "#444444")],
}  # fmt: skip
_STILLS = 6  # steps of an episode that are shown


def prepared_page(
    prepared: Prepared,
    measured: Measured,
    episodes: Sequence[int],
    target: pathlib.Path,
) -> None:
    """Write the page of a data set that is ready for training.

    Args:
        prepared: the data set.
        measured: its statistics.
        episodes: numbers of those to show.
        target: the HTML file.
    """
    row, spec = prepared.row, measured.spec
    faults = prepared.faults
    facts = {
        "embodiment": row.embodiment,
        "episodes, steps": f"{len(prepared)}, {prepared.num_steps}",
        "steps a second": ", ".join(f"{rate:g}" for rate in sorted(measured.rates)),
        "arms": ", ".join(row.arms) or "none: video",
        "views": ", ".join(f"{view} from {how.key}" for view, how in row.views.items()),
        "source of truth": row.truth,
        "records looked at": f"{faults.seen}, of which {faults.dropped} dropped for damage",
        "digest": prepared.digest[:16],
    }
    parts = [html_parts.table(facts), _faults(faults)]
    parts += [_episode(prepared.episode(number), number, spec) for number in episodes]
    if row.arms:
        statistics = measured.statistics(row.name)
        parts += [
            "<h2>Statistics</h2>",
            '<p class="note">Of all chunks and states; no image is read. A single arm counts on '
            "both sides, since training puts it on either.</p>",
            _gate(check(statistics, spec)),
            html_parts.figure(
                _horizon_figure(measured, spec), "spread of positions over the chunk"
            ),
            f"<pre>{html.escape(report(statistics))}</pre>",
        ]
    html_parts.write(target, f"{row.name}: what training sees", parts)


def _episode(episode: Episode, number: int, spec: ActionSpec) -> str:
    said = html.escape(episode.instruction) or '<span class="note">no instruction</span>'
    parts = [
        f"<h2>Episode {number}</h2>",
        f'<p class="say">{said}</p>',
        f'<p class="note">{html.escape(episode.episode_id)}, {episode.num_steps} steps at '
        f"{episode.fps:g} Hz = {episode.num_steps / episode.fps:.1f} s</p>",
        _strip(episode.views, episode.num_steps, VIEWS, episode.fps),
    ]
    if episode.arms:
        step = episode.num_steps // 3
        parts.append(
            html_parts.figure(
                _tracks_figure(episode, step, spec), "the episode's tracks and the chunk"
            )
        )
        parts.append(
            html_parts.figure(_chunk_figure(episode, step, spec), "the chunk per dimension")
        )
    return "\n".join(parts)


def _strip(views: Mapping[str, Any], num_steps: int, names: Sequence[str], fps: float) -> str:
    """Rows of pictures, a view each, at a few steps."""
    steps = np.unique(np.linspace(0, num_steps - 1, _STILLS).round().astype(int)).tolist()
    times = "".join(f"<td>step {step}, {step / fps:.1f} s</td>" for step in steps)
    rows = [f"<tr><th></th>{times}</tr>"]
    for name in names:
        if name not in views:
            rows.append(f'<tr><th>{html.escape(name)}</th><td class="note">absent</td></tr>')
            continue
        cells = "".join(f"<td>{_still(views[name], step)}</td>" for step in steps)
        rows.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    return f'<table class="strip">{"".join(rows)}</table>'


def _still(images: Any, step: int) -> str:
    try:
        picture = decode(images[step])
    except (BadImageError, DataError) as error:
        return f'<span class="bad">{html.escape(str(error))}</span>'
    return html_parts.photo(picture)


def _tracks_figure(episode, step, spec):
    """End-effector paths in 3D with one chunk, positions and grippers over time."""
    arms = list(episode.arms)
    figure = plt.figure(figsize=(11.5, 3.7 * len(arms)), layout="constrained")
    times = np.arange(episode.num_steps) / episode.fps
    for place, name in enumerate(arms):
        arm = episode.arms[name]
        space = figure.add_subplot(len(arms), 3, 3 * place + 1, projection="3d")
        if arm.ee_pos is not None:
            path = np.asarray(arm.ee_pos)
            space.plot(*path.T, color="0.7", lw=1, label="episode")
            _, mask, ee_pose, poses = _chunk(episode, step, spec)
            chunk = poses[ARMS.index(name), mask[:, spec.dims(name, "position")][:, 0]]
            space.plot(*chunk[:, :3, 3].T, color="#d62728", lw=2, label="chunk, 1 s")
            now = ee_pose[ARMS.index(name)]
            reach = 0.25 * max(np.ptp(path, axis=0).max(), 0.05)
            for axis in range(3):
                space.quiver(*now[:3, 3], *now[:3, axis] * reach, color=_COLOURS[axis], lw=1.5)
            space.set_aspect("equal")
            space.legend(fontsize=8, loc="upper left")
        else:
            space.text2D(0.1, 0.5, "no end-effector pose", transform=space.transAxes)
        space.set_title(f"{name} arm, base frame, m", fontsize=10)
        space.tick_params(labelsize=7)
        position = figure.add_subplot(len(arms), 3, 3 * place + 2)
        if arm.ee_pos is not None:
            for axis, label in enumerate("xyz"):
                position.plot(times, arm.ee_pos[:, axis], color=_COLOURS[axis], label=label)
            position.set_title("position, m", fontsize=10)
        elif arm.joint_pos is not None:
            position.plot(times, arm.joint_pos)
            position.set_title("joints, rad", fontsize=10)
        position.axvspan(step / episode.fps, step / episode.fps + 1, color="0.93")
        position.legend(fontsize=8) if arm.ee_pos is not None else None
        gripper = figure.add_subplot(len(arms), 3, 3 * place + 3)
        for track, label in ((arm.grip_open, "achieved"), (arm.grip_cmd, "commanded")):
            if track is not None:
                gripper.plot(times, track, drawstyle="steps-post", label=label)
                gripper.legend(fontsize=8)
        gripper.set_ylim(-0.08, 1.08)
        gripper.set_title("gripper, 0 closed .. 1 open", fontsize=10)
        gripper.axvspan(step / episode.fps, step / episode.fps + 1, color="0.93")
        for axes in (position, gripper):
            axes.set_xlabel("s", fontsize=9)
            axes.tick_params(labelsize=8)
    return figure


def _chunk(episode, step, spec):
    """Action [A, a], mask [A, a], poses now [R, 4, 4] and in the chunk [R, A, 4, 4]."""
    action, mask, state = make_chunks([episode], [step], spec)
    poses, _ = target_poses(action[0], state["ee_pose"][0], spec)
    return action[0], mask[0], state["ee_pose"][0], poses


def _chunk_figure(episode, step, spec):
    """Each dimension of one chunk; what the mask hides is hatched."""
    action, mask, _, _ = _chunk(episode, step, spec)
    arms = list(episode.arms)
    figure, grid = plt.subplots(
        len(arms), 3, figsize=(11.5, 2.6 * len(arms)), layout="constrained", squeeze=False
    )
    times = np.arange(1, spec.chunk_len + 1) / spec.rate_hz
    titles = {"position": "relative position, m", "rmat6d": "relative rotation, rmat6d",
              "gripper": "gripper"}  # fmt: skip
    for line, name in zip(grid, arms, strict=True):
        for axes, (part, title) in zip(line, titles.items(), strict=True):
            dims = spec.dims(name, part)
            for dim, (label, colour) in zip(range(*dims.indices(999)), _LINES[part], strict=True):
                axes.plot(times, action[:, dim], color=colour, label=label, lw=1.2)
            hidden = ~mask[:, dims].all(axis=1)
            if hidden.any():
                axes.fill_between(
                    times, *axes.get_ylim(), where=hidden, step="mid", hatch="///", alpha=0.15,
                    color="0.3", label="masked",
                )  # fmt: skip
            axes.legend(fontsize=7, ncols=2 if part == "rmat6d" else 1)
            axes.set_title(f"{name}: {title}", fontsize=10)
            axes.set_xlabel(f"s after step {step}", fontsize=9)
            axes.tick_params(labelsize=8)
            if part == "gripper":
                axes.set_ylim(-0.08, 1.08)
    return figure


def _horizon_figure(measured, spec):
    """q01 .. q99 of positions at each row of the chunk."""
    summary = measured.action.summary()
    times = np.arange(1, spec.chunk_len + 1) / spec.rate_hz
    figure, grid = plt.subplots(1, 2, figsize=(11.5, 2.8), layout="constrained", sharey=True)
    for axes, name in zip(grid, ARMS, strict=True):
        for axis, label in enumerate("xyz"):
            dim = spec.dims(name, "position").start + axis
            low, high = summary.q01[:, dim], summary.q99[:, dim]
            axes.fill_between(times, low, high, alpha=0.18, color=_COLOURS[axis])
            axes.plot(times, summary.mean[:, dim], color=_COLOURS[axis], label=label)
        axes.set_title(f"{name}: mean and q01 .. q99 of relative position, m", fontsize=10)
        axes.set_xlabel("s ahead", fontsize=9)
        axes.legend(fontsize=8)
    return figure


def _faults(faults) -> str:
    if not faults.counts:
        return "<p>No faults.</p>"
    rows = {
        f"{count} {code}": "<br>".join(html.escape(text) for text in faults.examples[code][:3])
        for code, count in faults.counts.most_common()
    }
    return "<h2>Faults</h2>" + html_parts.table(rows, escape=False)


def _gate(found: Sequence[str]) -> str:
    if not found:
        return "<p>Fit to train on: every check passed.</p>"
    items = "".join(f"<li>{html.escape(text)}</li>" for text in found)
    return f'<p class="bad">Not fit to train on as it is:</p><ul class="bad">{items}</ul>'


def raw_page(source: Source, episodes: Sequence[int], target: pathlib.Path) -> None:
    """Write the page of recordings that no row explains yet: keys, numbers and pictures.

    Args:
        source: any.
        episodes: numbers of those to show.
        target: the HTML file.
    """
    parts = [
        '<p>No row says what these keys mean: <a href="#keys">write one</a> and give it with '
        "<code>--row my_row.json</code>. Until then nothing here is in a frame or a unit.</p>",
        f'<h2 id="keys">Keys of {len(source)} episodes</h2>',
        html_parts.table(dict(source.keys())),
    ]
    for number in episodes:
        raw = source.episode(number)
        where = html.escape(raw.where)
        parts.append(f"<h2>Episode {number}</h2>")
        parts.append(f'<p class="note">{where}, {raw.num_steps} steps</p>')
        numbers, pictures, texts = _sorted_keys(raw, source.keys())
        parts.append(html_parts.table(texts))
        if pictures:
            parts.append(_strip(pictures, raw.num_steps, list(pictures), raw.fps or 1.0))
        if numbers:
            parts.append(html_parts.figure(_numbers_figure(numbers), "numbers as they are stored"))
    html_parts.write(target, "Recordings as they are", parts)


def _sorted_keys(raw, keys):
    """Numbers that change, views that decode, texts."""
    numbers, pictures, texts = {}, {}, {}
    for key in keys:
        if not raw.has(key):
            continue
        try:
            images = raw.images(key)
            if isinstance(images[0], bytes | np.ndarray):
                decode(images[0])
                pictures[key] = images
                continue
        except (DataError, BadImageError, KeyError, TypeError, ValueError, AttributeError):
            pass
        try:
            values = np.asarray(raw.read(key))
            if values.dtype.kind in "fiub" and len(values) == raw.num_steps:
                numbers[key] = values.reshape(len(values), -1).astype(float)
                continue
        except (DataError, KeyError, ValueError, TypeError):
            pass
        try:
            texts[key] = raw.text(key)[:300]
        except (DataError, KeyError, ValueError, TypeError, AttributeError):
            texts[key] = "(not read)"
    return numbers, pictures, texts


def _numbers_figure(numbers):
    columns = 3
    lines = -(-len(numbers) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(11.5, 1.9 * lines), layout="constrained", squeeze=False
    )
    for axes in grid.ravel()[len(numbers) :]:
        axes.axis("off")
    for axes, (key, values) in zip(grid.ravel(), numbers.items(), strict=False):
        axes.plot(values, lw=1)
        axes.set_title(f"{key} [{values.shape[1]}]", fontsize=8)
        axes.tick_params(labelsize=7)
    return figure


def recording(episode: Episode, spec: ActionSpec, target: pathlib.Path) -> None:
    """Write one episode as a rerun recording: views, poses, the chunk at each step, grippers.

    Args:
        episode: in standard form.
        spec: of the chunks.
        target: the .rrd file; `rerun FILE` shows it.
    """
    import rerun as rr

    target.parent.mkdir(parents=True, exist_ok=True)
    with rr.RecordingStream(f"gear_jax: {episode.dataset}") as stream:
        stream.save(str(target))
        stream.log("instruction", rr.TextDocument(episode.instruction or "no instruction"),
                   static=True)  # fmt: skip
        for name, arm in episode.arms.items():
            if arm.ee_pos is not None:
                path = rr.LineStrips3D([np.asarray(arm.ee_pos)], colors=[180, 180, 180])
                stream.log(f"base/{name}/episode", path, static=True)
        for step in range(episode.num_steps):
            stream.set_time("step", sequence=step)
            stream.set_time("time", duration=step / episode.fps)
            for view, images in episode.views.items():
                try:
                    picture = decode(images[step])
                except (BadImageError, DataError) as error:
                    stream.log(f"views/{view}/fault", rr.TextLog(str(error)))
                    continue
                stream.log(f"views/{view}", rr.Image(picture).compress(jpeg_quality=85))
            _log_step(rr, stream, episode, step, spec)


def _log_step(rr, stream, episode, step, spec):
    if not episode.arms:
        return
    _, mask, ee_pose, poses = _chunk(episode, step, spec)
    for name, arm in episode.arms.items():
        index = ARMS.index(name)
        if arm.ee_pos is not None:
            now = ee_pose[index]
            pose = rr.Transform3D(translation=now[:3, 3], mat3x3=now[:3, :3])
            stream.log(f"base/{name}/ee", pose, rr.TransformAxes3D(0.08))
            inside = mask[:, spec.dims(name, "position")][:, 0]
            chunk = rr.LineStrips3D([poses[index, inside, :3, 3]], colors=[214, 39, 40])
            stream.log(f"base/{name}/chunk", chunk)
        for field in ("grip_open", "grip_cmd"):
            track = getattr(arm, field)
            if track is not None:
                stream.log(f"gripper/{name}/{field}", rr.Scalars(float(track[step])))
