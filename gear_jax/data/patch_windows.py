"""Images of any size -> one row of attention windows: the layout that the vision tower reads.

Qwen2.5-VL attends inside windows of 112 px; at an image's border they are smaller. Here every
window has the same number of slots, partial ones leave slots empty, so the tower needs no ragged
code.
Source: ported_models.md A4; the order of windows and units is that of `window_index` there.
"""

import dataclasses

import numpy as np

EMPTY = -1


@dataclasses.dataclass(frozen=True)
class PatchWindows:
    """Where the patches of one row of images lie.

    Attributes:
        source: int32[W, S], row of `pixel_values` in a slot, `EMPTY` when there is none.
        positions: int32[W, S, 2], row and column of the patch in its image.
        segments: int32[W, S], one number per image frame, `EMPTY` when there is no patch.
        tokens: int32[M], for each merged token, in the order of the image tokens, its place among
            the W * S / merge^2 merged slots.
    """

    source: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    tokens: np.ndarray

    def gather(self, pixel_values):
        """Rows float32[N, P] -> slots float32[W, S, P]; empty slots are zero."""
        filled = self.source != EMPTY
        return np.where(filled[..., None], pixel_values[self.source], np.float32(0))


def patch_windows(grids, *, window, merge=2, num_windows=None):
    """Lay out the patches of several images or videos, first to last.

    Args:
        grids: int[n, 3], frames, patch rows and patch columns of each; `pixel_values` holds their
            patches one after the other in merge-block order (data/qwen_images.py).
        window: merged units along one side of an attention window (4 for Qwen2.5-VL).
        merge: patches along one side of a merged unit.
        num_windows: W, to which the row is filled up with empty windows; by default as many as
            needed.

    Returns:
        PatchWindows.

    Raises:
        ValueError: a grid that merging does not divide, or more windows than `num_windows`.
    """
    unit, slots = merge * merge, (window * merge) ** 2
    inside = np.arange(unit)
    windows, tokens, base, frame = [], [], 0, 0
    for index, (frames, rows, columns) in enumerate(np.asarray(grids).reshape(-1, 3).tolist()):
        if min(frames, rows, columns) < 1 or rows % merge or columns % merge:
            raise ValueError(
                f"grid {index} is {frames} x {rows} x {columns} patches: expected positive ones, "
                f"rows and columns multiples of {merge}"
            )
        height, width = rows // merge, columns // merge
        for _ in range(frames):
            place = np.empty((height, width), np.int32)  # of each merged unit among merged slots
            for top in range(0, height, window):
                for left in range(0, width, window):
                    row, column = (
                        x.ravel()
                        for x in np.mgrid[
                            top : min(top + window, height), left : min(left + window, width)
                        ]
                    )
                    used = len(row) * unit
                    source = np.full(slots, EMPTY, np.int32)
                    source[:used] = base + ((row * width + column)[:, None] * unit + inside).ravel()
                    position = np.zeros((slots, 2), np.int32)
                    position[:used, 0] = (row[:, None] * merge + inside // merge).ravel()
                    position[:used, 1] = (column[:, None] * merge + inside % merge).ravel()
                    place[row, column] = len(windows) * (slots // unit) + np.arange(len(row))
                    windows.append((source, position, np.where(source == EMPTY, EMPTY, frame)))
            tokens.append(place.ravel())
            base += rows * columns
            frame += 1
    if num_windows is not None and len(windows) > num_windows:
        raise ValueError(f"images need {len(windows)} windows, num_windows is {num_windows}")
    for _ in range((num_windows or len(windows)) - len(windows)):
        none = np.full(slots, EMPTY, np.int32)
        windows.append((none, np.zeros((slots, 2), np.int32), none))
    if not windows:
        windows = [(np.zeros((0, slots)), np.zeros((0, slots, 2)), np.zeros((0, slots)))]
        source, position, segments = (x.astype(np.int32) for x in windows[0])
    else:
        source, position, segments = (
            np.stack(x).astype(np.int32) for x in zip(*windows, strict=True)
        )
    return PatchWindows(
        source, position, segments, np.concatenate(tokens or [np.zeros(0, np.int32)])
    )
