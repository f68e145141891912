"""Latent action ids that are true: read off the hand's path instead of off video.

    reach data set -> position of the hand -> four codes a transition -> LatentWriter

What a perfect latent action tokenizer would say of `data/sources/reach.py`, so that what is learned
from ids can be measured without a trained tokenizer. The direction sideways is told by two codes of
the first group; how far to the side, and down, by two of the second.
"""

import numpy as np

from gear_jax.data.catalog import DatasetConfig, open_prepared
from gear_jax.data.latent_ids import NONE, LatentSpec, LatentWriter
from gear_jax.data.windows import clip_steps

GROUP = 8  # ids of each of the two groups
_FAR = (0.01, 0.03, 0.06, 0.1, 0.14, 0.19, 0.25)  # metres since the first frame


def codes(start, there):
    """Codes int[..., 4] of where the hand has got to, float[..., 3] metres, since it was at start.

    Like those that the tokenizer of systems/latents.py learns, they say where things are and not
    how fast they go. An id means nearly the same in both places of its group: a reader need not
    tell the places apart.
    """
    moved = there - start
    turn = np.arctan2(moved[..., 1], moved[..., 0]) / (2 * np.pi) * GROUP
    direction = np.floor(np.stack([turn, turn + 0.5], axis=-1)).astype(int) % GROUP
    far = np.stack([np.linalg.norm(moved[..., :2], axis=-1), -moved[..., 2]], axis=-1)
    return np.concatenate([direction, GROUP + np.digitize(far, _FAR)], axis=-1)


def write(fields, folder, transitions=5):
    """Write the ids of a whole reach data set.

    Args:
        fields: of `DatasetConfig`, and perhaps the other keys of `config.data.sets`.
        folder: where `config.data.sets.*.latents` says.
        transitions: of a clip.
    """
    others = ("weight", "group", "latents")
    prepared = open_prepared(DatasetConfig(**{k: v for k, v in fields.items() if k not in others}))
    spec = LatentSpec(prepared.whole_digest, "reach", prepared.num_steps, transitions, 4, 2 * GROUP)
    ids = np.full((prepared.num_steps, *spec.shape), NONE)
    for number in range(len(prepared)):
        episode = prepared.episode(number, images=False)
        path = episode.arms["right"].ee_pos
        for step in range(episode.num_steps):
            steps, inside = clip_steps(
                episode.num_steps, episode.fps, step, num_frames=transitions + 1
            )
            made = codes(path[step], path[steps[1:]])
            ids[prepared.row_of(number, step)] = np.where(inside[:, None], made, NONE)
    writer = LatentWriter(folder, spec)
    for part in writer.missing():
        writer.write(part, ids[part.start : part.stop])
    writer.finish()
