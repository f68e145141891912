"""Scripted demonstrations in LIBERO: take the object, carry it over its place, put it down.

The expert reads objects' places and shapes from the simulator (libero_grasps.py) and answers with
the benchmark's own actions. It knows tasks whose goals are all "on" or "in": drawers, doors, knobs
and pushing are beyond it.
"""

import dataclasses
import enum
from typing import Any

import numpy as np

from gear_jax import geometry
from gear_jax.evals.sims.libero_grasps import (
    body_id,
    clutter_points,
    object_points,
    plan_grasp,
)
from gear_jax.policy.servo import OscServo

MAX_TRIES = 3  # after the first
_SLOW_TURN = 0.6  # of an action's rotation
_HAND_ABOVE = 0.10  # metres over the grasp before the hand goes down
_CLEAR = 0.07  # metres over what stands in the way
_DOWN = np.array([0.0, 0.0, -1.0])


class Phase(enum.Enum):
    """What the hand is about; in this order."""

    REACH = enum.auto()
    DESCEND = enum.auto()
    CLOSE = enum.auto()
    LIFT = enum.auto()
    CARRY = enum.auto()
    LOWER = enum.auto()
    OPEN = enum.auto()
    RETREAT = enum.auto()


_LONGEST = {  # control steps after which a phase ends anyway
    Phase.REACH: 70,
    Phase.DESCEND: 35,
    Phase.CLOSE: 9,
    Phase.LIFT: 40,
    Phase.CARRY: 80,
    Phase.LOWER: 35,
    Phase.OPEN: 9,
    Phase.RETREAT: 15,
}
_HOLDING = (Phase.CLOSE, Phase.LIFT, Phase.CARRY, Phase.LOWER)


class LiberoExpert:
    """One episode's worth of decisions; `act` is called once a control step."""

    def __init__(
        self,
        simulator: Any,
        *,
        speed: float = 1.0,
        rng: np.random.Generator | None = None,
        noise: float = 0.0,
        rest: int = 0,
    ):
        """Plan the first grasp of the simulator's present episode.

        Args:
            simulator: a `LiberoSimulator` after `reset`.
            speed: greatest action of the position, 0 .. 1. Below 1 it leaves room to catch up
                for whoever follows the recorded path.
            rng: of the noise.
            noise: standard deviation of the grasp's place, metres.
            rest: control steps that the object is held at its place before the fingers open, so
                that a policy that opens them a little early is there already.

        Raises:
            ValueError: a goal that is not "on" or "in".
        """
        self.simulator, self.speed, self.noise, self.rest = simulator, speed, noise, rest
        self.rng = rng or np.random.default_rng(0)
        self.servo = OscServo()
        goals = simulator.goals()
        unknown = [one for one in goals if len(one) != 3 or one[0].lower() not in ("on", "in")]
        if unknown:
            raise ValueError(
                f"the scripted expert does not know goals {unknown}: expected 'on' and 'in' only"
            )
        self._straight = _straight_down(simulator.pose()[:3, :3])
        self.tries = 0
        self._begin(goals[0])

    def act(self) -> np.ndarray:
        """The next clean action, float32[7]."""
        pose = self.simulator.pose()
        hand, place = pose[:3, 3], self._target(pose[:3, 3])
        turn = geometry.rotvec_to_rotmat(np.array([0, 0, self.grasp.yaw])) @ self._straight
        opening = 0.0 if self.phase in _HOLDING else 1.0
        action = self.servo.action(pose, geometry.make_pose(place, turn), opening)
        action[:3] = np.clip(action[:3], -self.speed, self.speed)
        action[3:6] = np.clip(action[3:6], -_SLOW_TURN, _SLOW_TURN)
        twist = np.linalg.norm(geometry.rotmat_to_rotvec(turn @ pose[:3, :3].T))
        self.steps += 1
        self._advance(hand, place - hand, float(twist))
        return action

    def lifted(self) -> bool:
        """Whether the object is 2 cm above where it was taken."""
        return bool(self.simulator.data.xpos[self.body][2] - self._origin[2] >= 0.02)

    def release_place(self) -> np.ndarray:
        """Where the hand would let go of the object that it holds, float64[3], metres."""
        thing = self.simulator.data.xpos[self.body]
        wanted = np.append(self._goal_place(), self._release + self._below)
        return self.simulator.pose()[:3, 3] + wanted - thing

    def _begin(self, goal: tuple[str, ...]) -> None:
        """Plan how to take the goal's object, and how to let go of it."""
        model, data = self.simulator.model, self.simulator.data
        self.goal = goal
        self.body = body_id(model, goal[1])
        points = object_points(model, data, self.body)
        self._clutter = clutter_points(model, data, self.body)
        base = data.body("robot0_base").xpos[:2]
        grasp = plan_grasp(points, self._clutter, base)
        shift = self.rng.normal(0, self.noise, 3) * (1, 1, 0.5)
        self.grasp = dataclasses.replace(grasp, place=grasp.place + shift)
        self._origin = data.xpos[self.body].copy()
        self._below = self._origin[2] - points[:, 2].min()  # of the object's own origin
        self._release, self._clear = self._heights(self.grasp.place[2] - points[:, 2].min())
        self._enter(Phase.REACH)

    def _heights(self, hold: float) -> tuple[float, float]:
        """Where the object's bottom is let go, and what it must be carried over, metres.

        Args:
            hold: the hand's height over the object's bottom.
        """
        model, data = self.simulator.model, self.simulator.data
        site = _site_id(model, self.goal[2])
        if site < 0:
            bottom = object_points(model, data, body_id(model, self.goal[2]))[:, 2].min()
            return bottom + 0.03, bottom + 0.03
        if "contain" not in self.goal[2]:
            height = data.site_xpos[site][2] + 0.02
            return height, height
        # as low as the fingers may go: the object just over the floor, the hand above the rim
        container = object_points(model, data, model.site_bodyid[site])[:, 2]
        release = max(container.min() + 0.02, container.max() - 0.02 - hold)
        return release, max(release, container.max())

    def _goal_place(self) -> np.ndarray:
        """Over which point of the table the object belongs, float64[2]."""
        model, data = self.simulator.model, self.simulator.data
        site = _site_id(model, self.goal[2])
        if site >= 0:
            return data.site_xpos[site][:2].copy()
        return data.xpos[body_id(model, self.goal[2])][:2].copy()

    def _target(self, hand: np.ndarray) -> np.ndarray:
        """Where the hand should be, float64[3]."""
        grasp = self.grasp.place
        if self.phase is Phase.REACH:
            way = _tallest_between(self._clutter, hand[:2], grasp[:2])
            height = max(grasp[2] + _HAND_ABOVE, way + _CLEAR)
            low = hand[2] < height - 0.03 and np.linalg.norm(hand[:2] - grasp[:2]) > 0.03
            return np.append(hand[:2] if low else grasp[:2], height)  # up first, then over
        if self.phase in (Phase.DESCEND, Phase.CLOSE):
            return grasp
        if self.phase is Phase.LIFT:
            return np.append(self._taken, self._carry_height)
        if self.phase in (Phase.CARRY, Phase.LOWER):
            place = self.release_place()
            return place if self.phase is Phase.LOWER else np.append(place[:2], self._carry_height)
        return self._let_go + np.array([0, 0, 0.08 if self.phase is Phase.RETREAT else 0])

    def _advance(self, hand: np.ndarray, error: np.ndarray, twist: float) -> None:
        """Go on to the next phase, or begin again, where this one is over.

        Args:
            hand: float64[3], before this step's action.
            error: float64[3], from there to its target.
            twist: angle to the grasp's, radians.
        """
        thing = self.simulator.data.xpos[self.body]
        far, aside = np.linalg.norm(error), np.linalg.norm(error[:2])
        missed = self.phase is Phase.LIFT and self.steps > 14 and not self.lifted()
        lost = self.phase is Phase.CARRY and np.linalg.norm(thing - hand) > 0.16
        if (missed or lost) and self.tries < MAX_TRIES:
            self.tries += 1
            self._begin(self.goal)
            return
        over = self.steps >= _LONGEST[self.phase] or {
            Phase.REACH: far < 0.018
            and np.linalg.norm(hand[:2] - self.grasp.place[:2]) < 0.02
            and twist < 0.12,
            Phase.DESCEND: far < 0.008 and twist < 0.12,
            Phase.LIFT: far < 0.03,
            Phase.CARRY: aside < 0.012,
            Phase.LOWER: abs(error[2]) < 0.012 and aside < 0.015,
        }.get(self.phase, False)
        self._there += bool(over)
        if not over or (self.phase is Phase.LOWER and self._there <= self.rest):
            return
        if self.phase is Phase.REACH and np.linalg.norm(thing - self._origin) > 0.003:
            self._begin(self.goal)  # it was still coming to rest
            return
        if self.phase is Phase.CLOSE:
            self._taken = hand[:2].copy()
            hold = hand[2] - (thing[2] - self._below)
            self._carry_height = max(hand[2] + 0.10, self._clear + hold + 0.05)
        elif self.phase is Phase.LOWER:
            self._let_go = hand.copy()
        if self.phase is not Phase.RETREAT:
            self._enter(Phase(self.phase.value + 1))
            return
        wanting = [one for one in self.simulator.goals() if not self.simulator.holds(one)]
        if wanting and (self.goal not in wanting or self.tries < MAX_TRIES):
            self.tries += self.goal in wanting
            self._begin(self.goal if self.goal in wanting else wanting[0])

    def _enter(self, phase: Phase) -> None:
        self.phase, self.steps, self._there = phase, 0, 0


def _straight_down(turn: np.ndarray) -> np.ndarray:
    """The rotation nearest to a hand's that looks down and opens along y, float64[3, 3]."""
    forward = turn[:, 0] * (1, 1, 0)
    forward /= np.linalg.norm(forward)
    across = np.cross(_DOWN, forward)
    yaw = np.arctan2(-across[0], across[1])
    yaw = (yaw + np.pi / 2) % np.pi - np.pi / 2  # fingers look the same from either side
    back = geometry.rotvec_to_rotmat(np.array([0, 0, -yaw]))
    return back @ np.stack([forward, across, _DOWN], 1)


def _site_id(model: Any, name: str) -> int:
    """The number of a site, or -1."""
    try:
        return model.site(name).id
    except KeyError:
        return -1


def _tallest_between(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> float:
    """Height of what stands within a hand's width of the way over the table; -1 for nothing."""
    way = end - start
    along = np.clip((points[:, :2] - start) @ way / max(way @ way, 1e-6), 0, 1)
    near = np.linalg.norm(points[:, :2] - (start + along[:, None] * way), axis=1) < 0.12
    return float(points[near, 2].max(initial=-1.0))
