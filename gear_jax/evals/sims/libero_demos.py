"""Scripted episodes in LIBERO as records of a demonstration set."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from gear_jax import geometry
from gear_jax.evals.sims.libero import LiberoSimulator
from gear_jax.evals.sims.libero_expert import LiberoExpert, Phase
from gear_jax.evals.sims.recording import CutRun
from gear_jax.evals.sims.tabletop_expert import Pushes
from gear_jax.types import Observation

# where a noisy record begins, and how often: the initial state, the hand about the object, a grasp
# that missed, the object in the hand about its goal
_BEGINS = {"initial": 0.1, "about": 0.3, "missed": 0.3, "carried": 0.3}
_PUSHED = 0.03  # chance that a push begins, each control step
_TURNED = 0.5  # of a push's place, its turn
_ABOUT = np.array([0.08, 0.08, 0.15])  # metres from the grasp: aside, aside, above
_MISSED = np.array([0.025, 0.025, 0.01])  # metres from the grasp, standard deviation
_OVER_GOAL = np.array([0.08, 0.08, 0.10])  # metres from where it is let go: aside, aside, above
_UNTIL_CARRIED = 150  # control steps, at most
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
            meant. Nine runs of ten also begin elsewhere: the hand somewhere about the object,
            tilted, open or closed; closed beside the grasp, as if that had missed; or with the
            object in it, somewhere about its goal. With noise the object is also held at its place
            before the fingers open, and the record goes on for a while after success.
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
                plan = functools.partial(
                    LiberoExpert, simulator, speed=speed, rest=_REST if noise else 0
                )
                expert = _wander(simulator, plan, rng) if noise else plan()
                run = CutRun(source, encoding=encoding)
                push = Pushes(rng, chance=_PUSHED, size=noise, turn=_TURNED)
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


def _wander(simulator, plan, rng):
    """Go to where a record begins; the expert that goes on from there. None of it is recorded.

    It begins on every side of the object and of its goal: whoever has only seen the hand come from
    one side does not know when it is too far, and goes there.
    """
    expert = plan()
    begins = rng.choice(list(_BEGINS), p=list(_BEGINS.values()))
    opening, steps = float(rng.integers(2)), rng.integers(5, 35)
    if begins == "initial":
        return expert
    place = expert.grasp.place + _ABOUT * rng.uniform((-1, -1, 0.1), 1)
    if begins == "missed":
        place, opening = expert.grasp.place + rng.normal(0, _MISSED), 0.0
    if begins == "carried":
        for _ in range(_UNTIL_CARRIED):
            if expert.phase is Phase.CARRY:
                break
            simulator.act(expert.act())
        place = expert.release_place() + _OVER_GOAL * rng.uniform((-1, -1, 0.2), 1)
        opening, steps = 0.0, steps + 30
    tilt = geometry.rotvec_to_rotmat(rng.normal(0, _TILT, 3))
    target = geometry.make_pose(place, tilt @ simulator.pose()[:3, :3])
    for _ in range(steps):
        simulator.step({"right": (target, opening)})
    return expert if begins == "carried" and expert.lifted() else plan()
