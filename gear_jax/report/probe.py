"""How much of a motion can be read from latent action ids by a linear map."""

import numpy as np

from gear_jax.types import Episode

_TRAIN = 0.7
_RIDGE = 1e-3


def one_hot(ids: np.ndarray, vocabulary: int) -> np.ndarray:
    """Ids int[N, ...] -> float64[N, n * vocabulary]."""
    return np.eye(vocabulary)[ids].reshape(len(ids), -1)


def linear_probe(features: np.ndarray, targets: np.ndarray) -> float:
    """R^2 of a linear map on rows that it was not fitted to: the last 30 %.

    Args:
        features: float[N, D]; a constant is added.
        targets: float[N, K].

    Returns:
        1 is perfect, 0 no better than the mean; over all K together.

    Raises:
        ValueError: fewer than 10 rows, or targets that do not vary.
    """
    if len(features) < 10:
        raise ValueError(f"{len(features)} rows: a probe needs at least 10")
    x = np.concatenate([features, np.ones((len(features), 1))], axis=1).astype(np.float64)
    cut = int(_TRAIN * len(x))
    gram = x[:cut].T @ x[:cut] + _RIDGE * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x[:cut].T @ targets[:cut])
    spread = np.square(targets[cut:] - targets[cut:].mean(axis=0)).sum()
    if spread == 0:
        raise ValueError("the targets are all the same")
    return float(1 - np.square(targets[cut:] - x[cut:] @ weights).sum() / spread)


def arm_motion(episode: Episode, arm: str, steps: np.ndarray) -> np.ndarray | None:
    """How far an end effector moves in each transition of a clip, in the base frame.

    Args:
        episode: with or without images.
        arm: of `types.ARMS`.
        steps: int[F], the clip's steps.

    Returns:
        float[F - 1, 3], metres; None without such an arm or its poses.
    """
    tracks = episode.arms.get(arm)
    if tracks is None or tracks.ee_pos is None:
        return None
    return np.diff(tracks.ee_pos[steps], axis=0)
