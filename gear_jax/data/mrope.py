"""Where the tokens of a row stand in time, height and width: the positions of m-rope.

token types, grids of images and videos -> positions int32[3, B, T]
"""

import math

import numpy as np

TEXT, IMAGE, VIDEO = 0, 1, 2


def token_types(tokens, image_token, video_token):
    """`TEXT`, `IMAGE` or `VIDEO` for each of tokens int[...], by the ids of the two pads."""
    return np.where(tokens == image_token, IMAGE, np.where(tokens == video_token, VIDEO, TEXT))


def mrope_positions(
    token_types,
    valid,
    image_grids,
    video_grids,
    *,
    spatial_merge=2,
    tokens_per_second=2.0,
    seconds_per_grid=None,
):
    """Time, height and width position of every token (Qwen2.5-VL's get_rope_index).

    Text counts up on all three axes. An image or video starts there and spreads over its merged
    grid; the next token starts max(rows, columns) of merged units later.

    Args:
        token_types: int[B, T], `TEXT`, `IMAGE` or `VIDEO`.
        valid: bool[B, T], False for padding, on either side.
        image_grids: int[n, 3], frames, patch rows and columns of all rows' images in order.
        video_grids: int[m, 3], likewise of videos.
        spatial_merge: patches along one side of a merged unit.
        tokens_per_second: positions on the time axis that one second of video takes.
        seconds_per_grid: float[m], seconds between two frame groups of each video; needed for
            videos.

    Returns:
        positions int32[3, B, T], 0 at padding; delta int32[B], the position of the first token to
        come minus the number of valid tokens.

    Raises:
        ValueError: the image or video tokens of a row are not those of the next grids, grids are
            left over, or a shape, a token type or a grid is none of the above.
    """
    token_types, valid = np.asarray(token_types), np.asarray(valid, bool)
    if token_types.ndim != 2 or token_types.shape != valid.shape:
        raise ValueError(
            f"token_types is {list(token_types.shape)} and valid {list(valid.shape)}: expected "
            "[B, T] of both"
        )
    for row, unknown in np.argwhere(valid & ~np.isin(token_types, (TEXT, IMAGE, VIDEO))):
        raise ValueError(
            f"row {row} has token type {token_types[row, unknown]}: expected {TEXT} for text, "
            f"{IMAGE} for an image, {VIDEO} for a video"
        )
    positions = np.zeros((3, *token_types.shape), np.int32)
    delta = np.zeros(len(token_types), np.int32)
    waiting = {
        IMAGE: [(grid, 1.0) for grid in np.asarray(image_grids).reshape(-1, 3).tolist()],
        VIDEO: _timed(video_grids, tokens_per_second, seconds_per_grid),
    }
    for row, (types, here) in enumerate(zip(token_types, valid, strict=True)):
        kinds = types[here]
        parts, start, index = [], 0, 0
        while index < len(kinds):
            if kinds[index] == TEXT:
                count = next(
                    (i for i, k in enumerate(kinds[index:]) if k != TEXT), len(kinds) - index
                )
                parts.append(np.broadcast_to(np.arange(start, start + count), (3, count)))
                start += count
            else:
                kind = int(kinds[index])
                name = "image" if kind == IMAGE else "video"
                if not waiting[kind]:
                    found = np.count_nonzero(kinds[index:] == kind)
                    raise ValueError(
                        f"row {row} has {found} {name} tokens left, expected 0: no {name} grid is "
                        "left"
                    )
                count, part, step = _grid(waiting[kind], start, spatial_merge, name)
                found = np.count_nonzero(kinds[index : index + count] == kind)
                if found != count:
                    raise ValueError(
                        f"row {row} has {found} {name} tokens where its next grid gives {count}"
                    )
                parts.append(part)
                start += step
            index += count
        if parts:
            joined = np.concatenate(parts, axis=1)
            positions[:, row, here] = joined
            delta[row] = joined.max() + 1 - len(kinds)
    for kind, name in ((IMAGE, "image"), (VIDEO, "video")):
        if waiting[kind]:
            raise ValueError(f"{len(waiting[kind])} {name} grids belong to no row")
    return positions, delta


def _timed(grids, tokens_per_second, seconds_per_grid):
    """(grid, positions between two frame groups) of each video."""
    grids = np.asarray(grids).reshape(-1, 3).tolist()
    seconds = [] if seconds_per_grid is None else np.asarray(seconds_per_grid).ravel().tolist()
    if len(seconds) != len(grids) and grids:
        raise ValueError(f"{len(grids)} videos but {len(seconds)} seconds_per_grid")
    return [(grid, tokens_per_second * s) for grid, s in zip(grids, seconds, strict=True)]


def _grid(waiting, start, merge, name):
    """(tokens, positions [3, tokens], advance) of the next image or video."""
    (frames, rows, columns), step = waiting.pop(0)
    if min(frames, rows, columns) < 1 or rows % merge or columns % merge:
        raise ValueError(
            f"{name} grid is {[frames, rows, columns]}: expected frames from 1, rows and columns "
            f"multiples of {merge}"
        )
    height, width = rows // merge, columns // merge
    t, h, w = np.mgrid[:frames, :height, :width].reshape(3, -1)
    t = np.array([math.floor(i * step) for i in range(frames)])[t]
    return frames * height * width, start + np.stack([t, h, w]), max(height, width)
