"""What passes between the evaluation and a policy: queries in, answers out.

    Query(observation, who asks) -> ChunkPolicy -> Answer(chunk) -> policy/execution.targets

An answer is a function of its own query and of the seed, never of the queries that happen to share
its batch: so a result does not depend on order, batch size, workers or hosts.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from gear_jax.types import ActionSpec, Observation


class Episode(NamedTuple):
    """One episode of an evaluation; what a row of the ledger is about."""

    suite: str
    task: str
    init: int


@dataclasses.dataclass(frozen=True, eq=False)
class Query:
    """One question to the policy.

    Attributes:
        observation: what the robot sees and feels now.
        suite: of the task.
        task: its name.
        init: number of the initial state.
        number: of the query within its episode, from 0.
    """

    observation: Observation
    suite: str
    task: str
    init: int
    number: int


@dataclasses.dataclass(frozen=True, eq=False)
class Answer:
    """What the policy wants done.

    Attributes:
        action: float32[A, a] in the units of the policy's `ActionSpec`: denormalised, poses
            relative to the end effector of the query's observation.
        latent_ids: int32[M], the latent action ids that it decoded on the way; may be empty.
    """

    action: np.ndarray
    latent_ids: np.ndarray


class ChunkPolicy(Protocol):
    """Anything that answers queries in batches.

    Attributes:
        spec: what the numbers of its chunks mean.
    """

    spec: ActionSpec

    def identity(self) -> Mapping[str, Any]:
        """What it is, as plain JSON: digests of checkpoint, statistics and spec, flow steps."""
        ...

    def __call__(self, queries: Sequence[Query]) -> Sequence[Answer]:
        """One answer to each query, in their order; noise by `noise_seed`."""
        ...


def noise_seed(query: Query, seed: int) -> int:
    """0 .. 2**31 - 1, of (suite, task, init, number, seed) alone; the same on any machine."""
    digest = _sha256([query.suite, query.task, query.init, query.number, seed])
    return int.from_bytes(digest[:4], "big") >> 1


def canonical(value: Any) -> str:
    """Plain JSON as one text: equal values, equal texts.

    Raises:
        ValueError: something that JSON cannot say, or NaN.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except TypeError as error:
        raise ValueError(f"{value!r} is not plain JSON: {error}") from error


def json_digest(value: Any) -> str:
    """Hex sha256 of `canonical`."""
    return _sha256(value).hex()


def _sha256(value):
    return hashlib.sha256(canonical(value).encode()).digest()
