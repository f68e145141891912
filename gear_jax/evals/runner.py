"""Episodes of a work list through workers and one policy, into a ledger.

One thread: workers step while the policy thinks about others. A batch goes to the policy when it is
full or nobody is left to wait for; it always has the same size, so that nothing is compiled twice.
No outcome depends on workers, batches, hosts, or on how often anything was killed.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gear_jax.evals import remote, statistics
from gear_jax.evals.episodes import Answer, ChunkPolicy, Episode, Query
from gear_jax.evals.ledger import Ledger
from gear_jax.evals.remote import RemoteSimulator, WorkerConfig, WorkerError, WorkerGoneError
from gear_jax.evals.sims.base import Task
from gear_jax.evals.videos import Keeper
from gear_jax.policy import execution
from gear_jax.types import Observation

_SAY_EVERY = 15.0  # seconds


@dataclasses.dataclass(frozen=True)
class RunnerConfig:
    """How the work is done; none of it changes a result.

    Attributes:
        num_workers: simulators at a time.
        batch_size: of the policy; None for half of the workers, so that the others step meanwhile.
        restarts: of a worker between two episodes that end well.
    """

    num_workers: int = 1
    batch_size: int | None = None
    restarts: int = 3


@dataclasses.dataclass(eq=False)
class _Slot:
    """A worker and the episode it is in."""

    number: int
    simulator: RemoteSimulator
    failures: int = 0
    episode: Episode | None = None
    observation: Observation | None = None  # waits for an answer
    steps: int = 0
    begun: float = 0.0
    queries: list = dataclasses.field(default_factory=list)  # what the keeper asked to see
    num_queries: int = 0
    seconds: dict = dataclasses.field(default_factory=dict)


class Runner:
    """Runs episodes; `seconds` says where the time went."""

    def __init__(
        self,
        policy: ChunkPolicy,
        workers: WorkerConfig,
        tasks: Sequence[Task],
        rate_hz: float,
        steps_per_query: int,
        ledger: Ledger,
        config: RunnerConfig,
        keeper: Keeper,
        say: Callable[[str], None] = print,
    ):
        """Everything that an evaluation needs.

        Args:
            policy: answers queries.
            workers: how they are started.
            tasks: of the simulator, by whose names the episodes go.
            rate_hz: control steps per second.
            steps_per_query: control steps between two queries.
            ledger: opened under the protocol that all this is.
            config: how the work is done.
            keeper: of videos.
            say: takes lines of progress.
        """
        self.policy, self.workers, self.ledger, self.config = policy, workers, ledger, config
        self.tasks = {(task.suite, task.name): task for task in tasks}
        self.rate_hz, self.steps_per_query = rate_hz, steps_per_query
        self.keeper, self.say = keeper, say
        self.batch_size = config.batch_size or max(1, config.num_workers // 2)
        self.seconds = dict.fromkeys(("physics", "render", "policy", "idle", "wall"), 0.0)
        self._slots: list[_Slot] = []

    def run(self, episodes: Sequence[Episode], first: RemoteSimulator | None = None) -> None:
        """Run those that the ledger has not.

        Args:
            episodes: of this host.
            first: a worker that is running already, to be used and ended.

        Raises:
            WorkerError: a simulator failed, or a worker died too often.
            ValueError: a simulator or the policy said something that cannot be.
        """
        queue = collections.deque(one for one in episodes if one not in self.ledger.rows)
        self._begun, self._said, self._outcomes = time.monotonic(), time.monotonic(), []
        self._total = len(queue)
        try:
            for number in range(min(self.config.num_workers, len(queue))):
                taken = first if number == 0 else None
                taken = taken or RemoteSimulator(self.workers, number)
                self._slots.append(_Slot(number, taken))
            while True:
                for slot in self._slots:
                    if slot.episode is None and queue:
                        self._begin(slot, queue.popleft())
                asking = [slot for slot in self._slots if slot.observation is not None]
                busy = [one for one in self._slots if one.episode and one.observation is None]
                if asking and (len(asking) >= self.batch_size or not busy):
                    self._answer(asking[: self.batch_size])
                elif busy:
                    self._wait(busy)
                else:
                    break
        finally:
            for slot in self._slots:
                slot.simulator.close()
            self._slots = []
            self.seconds["wall"] += time.monotonic() - self._begun

    def _begin(self, slot, episode):
        slot.episode, slot.observation = episode, None
        slot.steps, slot.num_queries, slot.queries = 0, 0, []
        slot.begun = time.monotonic()
        slot.seconds = dict.fromkeys(("physics", "render", "policy"), 0.0)
        slot.simulator.ask("reset", task=episode.task, init=episode.init)

    def _wait(self, busy):
        begun = time.monotonic()
        ready = remote.wait([slot.simulator for slot in busy])
        self.seconds["idle"] += time.monotonic() - begun
        for slot in busy:
            if slot.simulator in ready:
                try:
                    reply = slot.simulator.take()
                except WorkerGoneError as error:
                    self._restart(slot, error)
                else:
                    self._hear(slot, reply)

    def _restart(self, slot, error):
        """A new worker, and the episode from its beginning: it will go the same way."""
        slot.simulator.close()
        slot.failures += 1
        if slot.failures > self.config.restarts:
            raise WorkerError(f"{error}; given up after {self.config.restarts} new starts")
        self.say(f"{error}; starting it again")
        slot.simulator = RemoteSimulator(self.workers, slot.number)
        self._begin(slot, slot.episode)

    def _hear(self, slot, reply):
        for name, value in reply["seconds"].items():
            slot.seconds[name] += value
            self.seconds[name] += value
        slot.steps += reply.get("steps", 0)
        slot.observation = remote.observation_of(reply)
        if slot.observation is None:
            self._end(slot, success=reply["done"])

    def _end(self, slot, *, success):
        episode, slot.episode, slot.failures = slot.episode, None, 0
        self.keeper.keep(episode, success, slot.queries)
        self.ledger.add(episode, success=success, steps=slot.steps, queries=slot.num_queries)
        wall = time.monotonic() - slot.begun
        self.ledger.add_timing(episode, slot.seconds | {"wall": wall})
        self._outcomes.append(success)
        now = time.monotonic()
        if now - self._said > _SAY_EVERY or len(self._outcomes) == self._total:
            self._said = now
            self.say(progress(self._outcomes, self._total, now - self._begun))

    def _answer(self, asking):
        """One batch to the policy, padded with its last query; chunks to the workers."""
        begun = time.monotonic()
        queries = [Query(one.observation, *one.episode, one.num_queries) for one in asking]
        padded = queries + queries[-1:] * (self.batch_size - len(queries))
        answers = list(self.policy(padded))[: len(queries)]
        spent = time.monotonic() - begun
        self.seconds["policy"] += spent
        for slot, query, answer in zip(asking, queries, answers, strict=True):
            slot.seconds["policy"] += spent
            if self.keeper.wants(slot.episode):
                slot.queries.append(self.keeper.shrink(query, answer))
            slot.num_queries += 1
            limit = self.tasks[slot.episode[:2]].max_steps - slot.steps
            targets = execution.targets(
                _checked(answer, self.policy.spec, query),
                query.observation.state,
                self.policy.spec,
                rate_hz=self.rate_hz,
                num_steps=min(self.steps_per_query, limit),
            )
            slot.observation = None
            slot.simulator.ask("run", targets=targets, observe=len(targets) < limit)


def work_list(tasks: Sequence[Task], inits: range) -> list[Episode]:
    """All episodes in their fixed order, task by task.

    Raises:
        ValueError: a task has not that many initial states.
    """
    for task in tasks:
        if not 0 <= inits.start < inits.stop <= task.num_inits:
            raise ValueError(
                f"initial states {inits.start}:{inits.stop} of {task.name!r}: expected within "
                f"0:{task.num_inits}"
            )
    return [Episode(task.suite, task.name, init) for task in tasks for init in inits]


def host_slice(episodes: Sequence[Episode], host: int, hosts: int) -> list[Episode]:
    """What one host runs, by position in the whole list: whatever its ledger holds already."""
    return list(episodes[host::hosts])


def progress(outcomes: Sequence[bool], total: int, seconds: float) -> str:
    """One line on how it goes."""
    found = statistics.count(outcomes)
    return (
        f"{len(outcomes)}/{total} episodes, success {found['success']}/{len(outcomes)} = "
        f"{100 * found['rate']:.1f} % ({100 * found['low']:.1f} .. {100 * found['high']:.1f}), "
        f"{3600 * len(outcomes) / max(seconds, 1e-9):.0f} episodes/h"
    )


def protocol_record(
    hello: Mapping[str, Any],
    workers: WorkerConfig,
    tasks: Sequence[Task],
    inits: range,
    *,
    replan: int,
    steps_per_query: int,
    seed: int,
) -> dict[str, Any]:
    """Everything that two policies must have in common for their results to be compared."""
    named: dict[str, dict[str, Any]] = {}
    for task in tasks:
        about = {"instruction": task.instruction, "max_steps": task.max_steps}
        named.setdefault(task.suite, {})[task.name] = about
    return {
        "version": 1,
        "simulator": {
            "name": workers.sim,
            "options": dict(workers.options),
            "is": hello["protocol"],
        },
        "versions": hello["versions"],
        "rate_hz": hello["rate_hz"],
        "replan_rows": replan,
        "steps_per_query": steps_per_query,
        "seed": seed,
        "tasks": named,
        "inits": [inits.start, inits.stop],
    }


def steps_between(replan: int, chunk_rate_hz: float, rate_hz: float) -> int:
    """Control steps in which `replan` rows of a chunk are carried out, at least one."""
    return max(1, round(replan / chunk_rate_hz * rate_hz))


def _checked(answer: Answer, spec, query) -> np.ndarray:
    action = np.asarray(answer.action)
    if action.shape != (spec.chunk_len, spec.action_dim) or not np.isfinite(action).all():
        raise ValueError(
            f"the policy's answer to query {query.number} of {query.task!r} {query.init} has shape "
            f"{action.shape}: expected {(spec.chunk_len, spec.action_dim)}, finite"
        )
    return action
