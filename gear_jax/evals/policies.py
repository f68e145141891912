"""Policies by name: a trained run is a path; the others are floors that a trained one must beat."""

import pathlib
from collections.abc import Sequence

import numpy as np

from gear_jax.evals.episodes import Answer, ChunkPolicy, Query, noise_seed
from gear_jax.types import ActionSpec

_NO_IDS = np.zeros(0, np.int32)


class HoldPolicy:
    """Stays where it is, with open grippers: what a task gives for nothing."""

    def __init__(self, seed: int = 0):
        """No noise: the seed is not used."""
        del seed
        self.spec = ActionSpec()

    def identity(self):
        """Its name."""
        return {"name": "hold", "spec": self.spec.digest()}

    def __call__(self, queries: Sequence[Query]) -> Sequence[Answer]:
        """The same chunk for all."""
        return [Answer(_chunk(self.spec, np.zeros(3), 1.0), _NO_IDS) for _ in queries]


class NoisePolicy:
    """Wanders: a straight line at 0.3 m/s in a direction drawn for each query."""

    def __init__(self, seed: int = 0):
        """Draw from `seed`."""
        self.spec, self.seed = ActionSpec(), seed

    def identity(self):
        """Its name; the seed is part of the protocol."""
        return {"name": "noise", "spec": self.spec.digest(), "metres_per_second": 0.3}

    def __call__(self, queries: Sequence[Query]) -> Sequence[Answer]:
        """A chunk for each."""
        out = []
        for query in queries:
            rng = np.random.default_rng(noise_seed(query, self.seed))
            way = rng.standard_normal(3)
            way *= 0.3 / np.linalg.norm(way)
            out.append(Answer(_chunk(self.spec, way, float(rng.integers(2))), _NO_IDS))
        return out


POLICIES = {"hold": HoldPolicy, "noise": NoisePolicy}


def open_policy(
    name: str,
    seed: int = 0,
    mask_guided: str | None = None,
    *,
    replan: int = 10,
    temperature: float = 1.0,
    device_batch: int = 8,
) -> ChunkPolicy:
    """A policy by its name, or the newest checkpoint of a run by its folder.

    Args:
        name: one of `POLICIES`, replay:ROW:FOLDER:WORK (evals/replay.py), a run's folder, or
            untrained:RUN, its model with random parameters.
        seed: of the noise.
        mask_guided: segmenter of the mask-guided mode (policy/mask_guided.py), or None.
        replan: rows of a chunk until the next query; a replay keeps time by it.
        temperature: factor of a trained run's noise, 0 .. 1.
        device_batch: rows that a device sees at a time, of a trained run.

    Raises:
        ValueError: neither a name nor a folder, a floor that is to be mask-guided or to have a
            temperature, a temperature outside 0 .. 1, or no rows.
    """
    replayed = name.startswith("replay:")
    if (name in POLICIES or replayed) and mask_guided is not None:
        raise ValueError(f"policy {name!r} sees nothing to mask: expected a run's folder")
    if (name in POLICIES or replayed) and temperature != 1:
        raise ValueError(f"policy {name!r} has no temperature: expected a run's folder")
    if name in POLICIES:
        return POLICIES[name](seed)
    if replayed:
        from gear_jax.evals import replay  # the data pipeline

        return replay.open_replay(name, replan)
    run = pathlib.Path(name.removeprefix("untrained:"))
    if not run.is_dir():
        raise ValueError(
            f"policy {name!r} is unknown: expected a run's folder or one of {sorted(POLICIES)}"
        )
    from gear_jax.policy import policy  # JAX and the towers: not for a floor

    made = policy.open_policy(
        run, seed=seed, temperature=temperature, device_batch=device_batch,
        untrained=name.startswith("untrained:"),
    )  # fmt: skip
    if mask_guided is None:
        return made
    from gear_jax.policy.mask_guided import guided

    return guided(made, mask_guided)


def _chunk(spec, velocity, opening):
    """Both arms along `velocity` in metres per second of their own frames, without a turn."""
    action = np.zeros((spec.chunk_len, spec.action_dim), np.float32)
    times = np.arange(1, spec.chunk_len + 1)[:, None] / spec.rate_hz
    for arm in spec.arms:
        action[:, spec.dims(arm, "position")] = velocity * times
        action[:, spec.dims(arm, "rmat6d")] = (1, 0, 0, 0, 1, 0)
        action[:, spec.dims(arm, "gripper")] = opening
    return action
