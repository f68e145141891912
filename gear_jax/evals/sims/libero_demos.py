"""Scripted episodes in LIBERO as records of a demonstration set."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gear_jax import geometry
from gear_jax.evals.sims.libero import LiberoSimulator
from gear_jax.evals.sims.libero_expert import LiberoExpert
from gear_jax.evals.sims.recording import CutRun
from gear_jax.evals.sims.tabletop_expert import Pushes
from gear_jax.types import Observation

_PUSHED = 0.03  # chance that a push begins, each control step
_TURNED = 0.5  # of a push's place, its turn
_ABOUT = np.array([0.08, 0.08, 0.15])  # metres from the grasp: aside, aside, above
_MISSED = np.array([0.025, 0.025, 0.01])  # metres from the grasp, standard deviation
_TILT = 0.15  # radians
_REST = 4  # control steps; see LiberoExpert
_AFTER = 16  # control steps recorded after success: fingers open, hand up


def episodes(
    simulator: LiberoSimulator,
    tasks: Sequence[int],
    inits: Sequence[int],
    *,
    speed: float = 0.8,
    noise: float = 0.0,
    seed: int = 0,
    repeats: int = 1,
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
            meant. Two runs of three also begin elsewhere: the hand somewhere about the object,
            tilted, open or closed; or closed beside the grasp, as if that had missed. With noise
            the object is also held at its place before the fingers open, and the record goes on
            for a while after success.
        seed: of the noise; an episode depends on it, on the task and the initial state alone.
        repeats: runs of each initial state, with seeds `seed`, `seed` + 1, ...
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
            for repeat in range(repeats):
                simulator.reset(task.name, init)
                source = f"{task.suite}/{task.name}/init_{init}" + f"_again_{repeat}" * bool(repeat)
                rng = np.random.default_rng([seed + repeat, number, init])
                if noise:
                    _wander(simulator, rng)
                run = CutRun(source, encoding=encoding)
                push = Pushes(rng, chance=_PUSHED, size=noise, turn=_TURNED)
                expert = LiberoExpert(simulator, speed=speed, rest=_REST if noise else 0)
                done, left = False, _AFTER if noise else 0
                for _ in range(task.max_steps + left):
                    action = expert.act()
                    pushed = push(action) if noise and not done else action
                    if np.array_equal(pushed, action):
                        run.add((look or simulator.observe)(), action, simulator.fingers())
                    else:
                        run.cut()
                    done = simulator.act(pushed) or done
                    if done and not left:
                        break
                    left -= done
                if done:
                    yield from run.episodes()
                else:
                    yield source, None


def _wander(simulator, rng):
    """What the expert finds: all as it was, the hand about the object, or a grasp that missed.

    None of it is recorded.
    """
    kind, opening = rng.integers(3), float(rng.integers(2))
    if kind == 0:
        return
    aside = _ABOUT * rng.uniform((-1, -1, 0.1), 1)
    if kind == 2:
        aside, opening = rng.normal(0, _MISSED), 0.0
    tilt = geometry.rotvec_to_rotmat(rng.normal(0, _TILT, 3))
    place = LiberoExpert(simulator).grasp.place + aside
    target = geometry.make_pose(place, tilt @ simulator.pose()[:3, :3])
    for _ in range(int(rng.integers(5, 35))):
        simulator.step({"right": (target, opening)})
