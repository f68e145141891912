"""Scripted episodes in LIBERO as records of a demonstration set."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gear_jax.evals.sims.libero import LiberoSimulator
from gear_jax.evals.sims.libero_expert import LiberoExpert
from gear_jax.evals.sims.recording import CutRun
from gear_jax.evals.sims.tabletop_expert import Pushes
from gear_jax.types import Observation


def episodes(
    simulator: LiberoSimulator,
    tasks: Sequence[int],
    inits: Sequence[int],
    *,
    speed: float = 0.8,
    noise: float = 0.0,
    seed: int = 0,
    encoding: str = "jpeg",
    look: Callable[[], Observation] | None = None,
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """One episode after the other: its source, and the record or None where the expert failed.

    Args:
        simulator: of a suite.
        tasks: numbers in its order.
        inits: numbers of initial states, of each task.
        speed: of the expert; at full speed nothing that follows the recorded path could catch up.
        noise: strength of the pushes that what is executed gets, 0 .. 1 (as in DART, arXiv
            1703.09327); a run is cut there into several episodes, so that all that is recorded was
            meant.
        seed: of the pushes; an episode depends on it, on the task and the initial state alone.
        encoding: of images, "jpeg" or "png".
        look: what is recorded, if not what the simulator shows.

    Raises:
        ValueError: no such task or initial state.
    """
    known = simulator.tasks()
    for number in tasks:
        if not 0 <= number < len(known):
            raise ValueError(
                f"{simulator.suite} has no task {number}: expected 0 .. {len(known) - 1}"
            )
        task = known[number]
        for init in inits:
            simulator.reset(task.name, init)
            source = f"{task.suite}/{task.name}/init_{init}"
            run = CutRun(source, encoding=encoding)
            push = Pushes(np.random.default_rng([seed, number, init]), size=noise)
            expert, done = LiberoExpert(simulator, speed=speed), False
            for _ in range(task.max_steps):
                action = expert.act()
                pushed = push(action) if noise else action
                if np.array_equal(pushed, action):
                    run.add((look or simulator.observe)(), action, simulator.fingers())
                else:
                    run.cut()
                done = simulator.act(pushed)
                if done:
                    break
            if done:
                yield from run.episodes()
            else:
                yield source, None
