"""Open-loop replay of a demonstration: what a task gives to a policy that does not look.

Its success says how much of a benchmark is solved by knowing the motion; a trained policy's belongs
beside it.
"""

import pathlib
from collections.abc import Sequence

import numpy as np

from gear_jax.data.catalog import DatasetConfig, open_prepared
from gear_jax.data.prepared import Prepared
from gear_jax.data.windows import make_window
from gear_jax.evals.episodes import Answer, Query
from gear_jax.types import ActionSpec, Episode


class ReplayPolicy:
    """Answers query k with a demonstration's chunk k replanning intervals after its start.

    The demonstration is the first with the query's instruction, or the first of all.
    """

    def __init__(self, prepared: Prepared, *, replan: int, most: int = 200):
        """Look for instructions among the first episodes.

        Args:
            prepared: demonstrations.
            replan: rows of a chunk until the next query, as the evaluation has it.
            most: episodes that are looked at.

        Raises:
            ValueError: demonstrations without actions.
        """
        if not prepared.row.arms:
            raise ValueError(f"data set {prepared.row.name!r} has no actions to replay")
        self.spec, self.replan, self._digest = ActionSpec(), replan, prepared.digest
        self._first: dict[str, Episode] = {}
        for number in range(min(most, prepared.num_episodes)):
            episode = prepared.episode(number, images=False)
            self._first.setdefault(episode.instruction, episode)

    def identity(self):
        """Which demonstrations."""
        return {"name": "replay", "data": self._digest, "spec": self.spec.digest()}

    def __call__(self, queries: Sequence[Query]) -> Sequence[Answer]:
        """A chunk for each."""
        return [Answer(self._chunk(query), np.zeros(0, np.int32)) for query in queries]

    def _chunk(self, query):
        told = query.observation.instruction
        episode = self._first.get(told) or next(iter(self._first.values()))
        step = round(query.number * self.replan / self.spec.rate_hz * episode.fps)
        window = make_window(episode, min(step, episode.num_steps - 1), self.spec)
        return window.action


def open_replay(name: str, replan: int) -> ReplayPolicy:
    """The policy "replay:ROW:FOLDER:WORK" (see launch.data for what they are).

    Raises:
        ValueError: another form.
    """
    parts = name.split(":")
    if len(parts) != 4:
        raise ValueError(f"policy {name!r}: expected replay:ROW:FOLDER:WORK")
    _, row, folder, work = parts
    prepared = open_prepared(DatasetConfig(folder, row, str(pathlib.Path(work))))
    return ReplayPolicy(prepared, replan=replan)
