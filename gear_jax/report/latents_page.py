"""What the latent action ids of a data set look like, as a page for a person.

How often each code is chosen; clips with their codes; the transitions nearest to each code; and,
where the robot's poses are known, how much of its motion can be read from the codes. Needs the
extra `report`.
"""

import dataclasses
import functools
import html
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np

from gear_jax.data.latent_ids import LatentIds
from gear_jax.data.prepared import Prepared
from gear_jax.data.windows import clip_steps
from gear_jax.report import html_parts, probe
from gear_jax.systems import latents
from gear_jax.towers.latent_action import LatentEncoder
from gear_jax.train import extraction
from gear_jax.train.extraction import Tokenizer
from gear_jax.types import ARMS

mpl.use("Agg")

import matplotlib.pyplot as plt

_SAMPLE = 512  # clips that are looked at
_SHOWN = 8
_NEAREST = 6
_TALL = 72  # pixels of a picture on the page


@dataclasses.dataclass
class _Clips:
    """A sample of clips: where they begin, what they show, their ids and similarities."""

    numbers: list[int]
    steps: np.ndarray  # int[N, F]
    frames: np.ndarray  # uint8[N, F, S, S, 3]
    mask: np.ndarray  # bool[N, T]
    ids: np.ndarray  # int[N, T, C]
    similarity: np.ndarray  # float[N, T, C, K], of each latent to each code of its group
    monitors: dict[str, Any]


def write(target: pathlib.Path, tokenizer: Tokenizer, prepared: Prepared, ids: LatentIds) -> None:
    """Write the page.

    Args:
        target: the HTML file.
        tokenizer: that made the ids.
        prepared: the data set.
        ids: its ids, finished.
    """
    clips = _sample(tokenizer, prepared)
    cfg, seen = tokenizer.cfg, clips.monitors
    facts = {
        "clips": f"{ids.spec.steps}, one from every step",
        "ids of a clip": f"{ids.spec.transitions} transitions of {ids.spec.codes} codes, "
        f"groups {cfg.group_pattern} of {cfg.codes_per_group}",
        "outside an episode": f"{np.mean(ids.ids < 0):.1%} of all transitions",
        "tokenizer": ids.digest[:16],
        "error against copying the first frame": f"{seen['reconstruction']:.2f} "
        f"({seen['gain_db']:.1f} dB better)",
        "error with another clip's codes": f"{seen['shuffled']:.2f} times that of its own",
        "perplexity": ", ".join(f"{x:.2f}" for x in seen["perplexity"])
        + f" of {cfg.codes_per_group}",
    }
    parts = [
        html_parts.table(facts),
        "<h2>How often each code is chosen</h2>",
        html_parts.figure(_usage(cfg, ids.ids), "share of each code, by group"),
        "<h2>What the codes say of the arms</h2>",
        _motion(cfg, prepared, clips),
        "<h2>Clips and their codes</h2>"
        '<p class="note">Above each frame: the codes of the transition that ends there.</p>',
        _strips(clips),
        "<h2>The transitions nearest to each code</h2>"
        '<p class="note">Frame before, frame after, and what changed (grey: nothing).</p>',
        _nearest(cfg, clips),
    ]
    target.parent.mkdir(parents=True, exist_ok=True)
    html_parts.write(target, f"Latent actions of {prepared.row.name}", parts)


def _sample(tokenizer, prepared):
    """Clips from evenly spread steps that lie wholly inside their episode."""
    cfg, clips = tokenizer.cfg, []
    spread = np.linspace(0, prepared.num_steps - 1, 4 * _SAMPLE).astype(int)
    spread = np.random.default_rng(0).permutation(np.unique(spread))
    for index in spread:
        number, step = prepared.locate(int(index))
        episode = prepared.episode(number)
        steps, inside = clip_steps(episode.num_steps, episode.fps, step, num_frames=cfg.num_frames)
        if "head" not in episode.views or not inside.all():
            continue
        pictures = [extraction.load_frame(cfg.image_size, episode, int(i))[0] for i in steps]
        if all(picture is not None for picture in pictures):
            clips.append((number, steps, np.stack(pictures)))
        if len(clips) == _SAMPLE:
            break
    numbers, steps, frames = zip(*clips, strict=True)
    frames = np.stack(frames)
    ids, similarity, sums = _look(tokenizer, frames)
    monitors = jax.tree.map(np.asarray, latents.summary(sums))
    mask = np.ones(ids.shape[:2], bool)
    return _Clips(list(numbers), np.stack(steps), frames, mask, ids, similarity, monitors)


def _look(tokenizer, frames):
    """Ids, similarities and monitor sums of clips, in batches."""
    cfg, found, sums = tokenizer.cfg, [], None

    @functools.partial(jax.jit)
    def run(params, codebook, frames, mask):
        frames = frames.astype(jnp.float32) / 127.5 - 1
        _, z = LatentEncoder(cfg).apply({"params": params["encoder"]}, frames)
        z = latents.standardize(codebook, z)
        made, _, z = latents.quantize(cfg, codebook, z)
        return (
            made,
            latents.similarity(cfg, codebook, z),
            latents.measure(params, cfg, codebook, frames, mask),
        )

    size = tokenizer.batch_size
    for begin in range(0, len(frames), size):
        rows = frames[begin : begin + size]
        padded = np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), np.uint8)])
        mask = np.broadcast_to(np.arange(size)[:, None] < len(rows), (size, cfg.num_transitions))
        ids, near, new = run(tokenizer.params, tokenizer.codebook, padded, mask)
        found.append((np.asarray(ids)[: len(rows)], np.asarray(near)[: len(rows)]))
        sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
    ids, near = (np.concatenate(part) for part in zip(*found, strict=True))
    return ids, near, sums


def _usage(cfg, ids):
    """Bars of each group's codes, by place in the transition."""
    figure, axes = plt.subplots(1, cfg.num_groups, figsize=(5 * cfg.num_groups, 2.4), squeeze=False)
    for group, axis in enumerate(axes[0]):
        bottom = np.zeros(cfg.codes_per_group)
        for place in np.flatnonzero(np.array(cfg.group_pattern) == group):
            values = ids[..., place]
            counts = np.bincount(
                values[values >= 0] - group * cfg.codes_per_group, minlength=cfg.codes_per_group
            )
            share = counts / max(counts.sum(), 1) / cfg.group_pattern.count(group)
            axis.bar(range(cfg.codes_per_group), share, bottom=bottom, label=f"place {place}")
            bottom += share
        names = [group * cfg.codes_per_group + code for code in range(cfg.codes_per_group)]
        axis.set_xticks(range(cfg.codes_per_group), names)
        axis.set_title(f"group {group}", fontsize=10)
        axis.axhline(1 / cfg.codes_per_group, color="#999", lw=0.8, ls="--")
        axis.set_ylim(top=1.35 * bottom.max())  # room for the legend
        axis.legend(fontsize=8, frameon=False, ncols=2, loc="upper left")
    return figure


def _motion(cfg, prepared, clips):
    """R^2 of a linear map from codes to each arm's motion, and each code's mean motion."""
    parts, vocabulary = [], cfg.num_groups * cfg.codes_per_group
    for arm in ARMS:
        moves = [
            probe.arm_motion(prepared.episode(n, images=False), arm, steps[cfg.ends()])
            for n, steps in zip(clips.numbers, clips.steps, strict=True)
        ]
        if any(move is None for move in moves):
            continue
        moved = np.stack(moves).reshape(-1, 3)
        ids = clips.ids.reshape(len(moved), -1)
        if len(moved) < 10 or not moved.std(axis=0).any():
            continue
        r2 = probe.linear_probe(probe.one_hot(ids, vocabulary), moved)
        figure, axis = plt.subplots(figsize=(8, 2.6))
        mean = np.array(
            [
                moved[(ids == code).any(axis=1)].mean(axis=0)
                if (ids == code).any()
                else np.zeros(3)
                for code in range(vocabulary)
            ]
        )
        for column, name in enumerate("xyz"):
            axis.bar(np.arange(vocabulary) + 0.25 * (column - 1), 1000 * mean[:, column], 0.25,
                     label=name)  # fmt: skip
        axis.set_xticks(range(vocabulary))
        axis.set_xlabel("code")
        axis.set_ylabel("mean motion, mm")
        axis.legend(fontsize=8, frameon=False)
        parts.append(
            f"<p>{arm} arm: a linear map from the codes to its motion in 0.2 s explains "
            f"{r2:.0%} of the variance on clips held out.</p>"
        )
        parts.append(html_parts.figure(figure, "mean motion by code"))
    return "".join(parts) or '<p class="note">No arm has known poses in these clips.</p>'


def _strips(clips):
    rows = []
    for index in range(min(_SHOWN, len(clips.frames))):
        cells = ["<td></td>"] + [
            f"<td>{' '.join(map(str, codes))}</td>" for codes in clips.ids[index]
        ]
        if len(cells) < clips.frames.shape[1]:  # one transition: its codes stand over the last
            cells = ["<td></td>"] * (clips.frames.shape[1] - 1) + cells[1:]
        shown = [f"<td>{_image(frame)}</td>" for frame in clips.frames[index]]
        rows.append(f"<tr>{''.join(cells)}</tr><tr>{''.join(shown)}</tr>")
    return f'<table class="strip small">{"".join(rows)}</table>'


def _nearest(cfg, clips):
    ends = cfg.ends()
    rows = []
    for code in range(cfg.num_groups * cfg.codes_per_group):
        group, local = divmod(code, cfg.codes_per_group)
        places = np.flatnonzero(np.array(cfg.group_pattern) == group)
        near = clips.similarity[:, :, places, local].max(axis=-1)
        chosen = (clips.ids == code).any(axis=-1)
        near = np.where(chosen, near, -np.inf)
        order = np.argsort(near, axis=None)[::-1][:_NEAREST]
        cells, taken = [], 0
        for flat in order:
            clip, transition = np.unravel_index(flat, near.shape)
            if not np.isfinite(near[clip, transition]):
                break
            before, after = clips.frames[clip, ends[transition : transition + 2]]
            change = np.clip(128 + after.astype(int) - before, 0, 255).astype(np.uint8)
            cells.append("<td>" + "".join(map(_image, (before, after, change))) + "</td>")
            taken += 1
        nothing = '<td class="note">never chosen in this sample</td>'
        name = html.escape(f"code {code}")
        rows.append(f"<tr><th>{name}</th>{''.join(cells) if taken else nothing}</tr>")
    return f'<table class="strip small">{"".join(rows)}</table>'


def _image(picture):
    """An img tag of a picture, enlarged without smoothing where it is small."""
    times = max(1, round(_TALL / len(picture)))
    picture = np.repeat(np.repeat(picture, times, axis=0), times, axis=1)
    return html_parts.photo(picture, (2 * _TALL, 2 * _TALL))
