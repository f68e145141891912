"""Token rows and the patches of their images -> the batch that systems/vlm.py reads.

Each row of the batch gets the patches of its own images, so that rows can be split over devices.
"""

import numpy as np

from gear_jax.data.mrope import IMAGE, TEXT, VIDEO
from gear_jax.data.patch_windows import patch_windows


def vlm_batch(tokens, token_types, valid, positions, images=None, videos=None, *, window, merge=2):
    """Join rows of tokens with their patches.

    Args:
        tokens: int[B, T].
        token_types: int[B, T], `TEXT`, `IMAGE` or `VIDEO`.
        valid: bool[B, T], False for padding.
        positions: int[3, B, T], from `mrope_positions`.
        images: (patches float32[N, P], grids int[n, 3]) of all rows' images, in order, or None.
        videos: likewise.
        window: merged units along one side of an attention window.
        merge: patches along one side of a merged unit.

    Returns:
        dict of arrays, see systems/vlm.py; "visual" and "insert_index" are there if there are
        images or videos. All rows have as many windows as the fullest one.

    Raises:
        ValueError: a row whose image or video tokens are not those of the next grids, or grids left
            over.
    """
    batch = {
        "tokens": np.asarray(tokens, np.int32),
        "positions": np.asarray(positions, np.int32),
        "segments": np.asarray(valid, np.int32),
    }
    queues = {
        kind: _Queue(name, *media, merge)
        for kind, name, media in ((IMAGE, "image", images), (VIDEO, "video", videos))
        if media is not None
    }
    if not queues:
        return batch
    types = np.where(valid, token_types, TEXT)
    rows = [
        {
            kind: queue.take(row, np.count_nonzero(types[row] == kind))
            for kind, queue in queues.items()
        }
        for row in range(len(types))
    ]
    for queue in queues.values():
        queue.finish()
    layouts = [
        patch_windows(
            np.concatenate([grids for _, grids in row.values()]), window=window, merge=merge
        )
        for row in rows
    ]
    most = max(len(layout.source) for layout in layouts)
    insert_index = np.full(types.shape, -1, np.int32)
    visual = {"patches": [], "positions": [], "segments": []}
    for index, (row, layout) in enumerate(zip(rows, layouts, strict=True)):
        place = 0
        for kind in row:
            here = types[index] == kind
            insert_index[index, here] = layout.tokens[place : place + here.sum()]
            place += here.sum()
        patches = layout.gather(np.concatenate([patches for patches, _ in row.values()]))
        fill = most - len(layout.source)
        for name, x, value in (
            ("patches", patches, 0),
            ("positions", layout.positions, 0),
            ("segments", layout.segments, -1),
        ):
            widths = [(0, fill)] + [(0, 0)] * (x.ndim - 1)
            visual[name].append(np.pad(x, widths, constant_values=value))
    batch["insert_index"] = insert_index
    batch["visual"] = {name: np.stack(parts) for name, parts in visual.items()}
    return batch


class _Queue:
    """Images or videos waiting for the row whose tokens ask for them."""

    def __init__(self, name, patches, grids, merge):
        self.name, self.patches, self.grids, self.unit = (
            name,
            patches,
            np.asarray(grids),
            merge * merge,
        )
        self.next_grid = self.next_patch = 0

    def take(self, row, num_tokens):
        """Patches and grids whose merged units are exactly `num_tokens`."""
        start, first, needed = self.next_patch, self.next_grid, num_tokens * self.unit
        while self.next_patch - start < needed and self.next_grid < len(self.grids):
            self.next_patch += int(np.prod(self.grids[self.next_grid]))
            self.next_grid += 1
        if self.next_patch - start != needed or self.next_patch > len(self.patches):
            raise ValueError(
                f"row {row} has {num_tokens} {self.name} tokens, but the next {self.name} grids "
                f"{self.grids[first : self.next_grid].tolist()} give "
                f"{(self.next_patch - start) // self.unit}"
            )
        return self.patches[start : self.next_patch], self.grids[first : self.next_grid]

    def finish(self):
        """Every grid and patch must have been used."""
        if self.next_grid != len(self.grids) or self.next_patch != len(self.patches):
            raise ValueError(
                f"{len(self.grids) - self.next_grid} {self.name} grids and "
                f"{len(self.patches) - self.next_patch} patches belong to no row"
            )
