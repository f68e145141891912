"""Physical units <-> what the model reads and says, by the statistics of a run's data.

Training and policy go through the same methods; a run keeps its normaliser as normalizer.json.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping

import numpy as np

from gear_jax.data import statistics
from gear_jax.data.embodiments import EMBODIMENTS
from gear_jax.data.statistics import Statistics
from gear_jax.data.tfrecord import DataError
from gear_jax.types import MAX_JOINTS, ActionSpec, NormalizedState, State

VERSION = 2  # of what is done with the statistics; 1 did not scale rotations


@dataclasses.dataclass(frozen=True)
class Normalizer:
    """The statistics that turn physical units into what the model reads.

    Attributes:
        action: of all data sets together: one action space for every robot. None where there is
            none, and vision-language records alone are read.
        states: by embodiment.
        spec: what the actions mean.
    """

    action: Statistics | None
    states: Mapping[str, Statistics]
    spec: ActionSpec

    def digest(self) -> str:
        """Hash over all of it."""
        parts = {name: one.digest() for name, one in self.states.items()}
        told = [VERSION, self.action and self.action.digest(), parts, self.spec.digest()]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def normalize_action(self, action: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Chunks float32[..., A, a] without units, zero where the mask is False."""
        if self.action is not None:
            action = statistics.normalize_action(action, self.action, self.spec)
        return np.where(mask, action, np.float32(0))

    def denormalize_action(self, action: np.ndarray) -> np.ndarray:
        """The inverse: chunks float32[..., A, a] in the units of `spec`.

        Raises:
            DataError: there are no statistics of actions.
        """
        if self.action is None:
            raise DataError("the run has no statistics of actions: it was trained without robots")
        return statistics.denormalize_action(action, self.action, self.spec)

    def normalize_state(self, state: State, embodiments: np.ndarray) -> NormalizedState:
        """States of rows, by the statistics of each row's robot; zero where there are none.

        Args:
            state: arrays with a leading axis of rows.
            embodiments: int[rows].
        """
        rows, arms = state["arm_mask"].shape
        known = np.concatenate([state["joint_mask"], state["grip_mask"][..., None]], axis=-1)
        out: NormalizedState = {
            "ee": np.zeros((rows, arms, 9), np.float32),
            "ee_mask": state["ee_mask"],
            "joints": np.zeros((rows, arms, MAX_JOINTS + 1), np.float32),
            "joint_mask": known,
            "arm_mask": state["arm_mask"],
        }
        for number in np.unique(embodiments):
            name = EMBODIMENTS[number].name
            if name in self.states:
                _fill(out, state, embodiments == number, self.states[name])
        return out

    def to_json(self) -> str:
        """Plain JSON with its digest; `from_json` is the inverse."""
        return json.dumps(
            {
                "version": VERSION,
                "spec": dataclasses.asdict(self.spec),
                "action": self.action and json.loads(self.action.to_json()),
                "states": {name: json.loads(one.to_json()) for name, one in self.states.items()},
                "digest": self.digest(),
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str, where: str = "normalizer") -> "Normalizer":
        """The inverse of `to_json`.

        Raises:
            DataError: one sentence that begins with `where`.
        """
        try:
            raw = json.loads(text)
            if (version := raw.get("version", 1)) != VERSION:
                raise DataError(
                    f"{where}: version {version}, expected {VERSION}: it scales rotations "
                    "otherwise, so what was trained with it has to be trained anew"
                )
            made = cls(
                raw["action"] and Statistics.from_json(json.dumps(raw["action"]), where),
                {
                    name: Statistics.from_json(json.dumps(one), f"{where}, {name!r}")
                    for name, one in raw["states"].items()
                },
                ActionSpec(**raw["spec"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{where}: not a normaliser: {error!r}") from error
        if raw.get("digest") != made.digest():
            raise DataError(f"{where}: its digest is {raw.get('digest')!r}, but of what is there "
                            f"{made.digest()!r}: changed by hand")  # fmt: skip
        return made


def _fill(out, state, rows, its):
    """Rows of a normalised state by one embodiment's statistics."""
    pose = state["ee_pose"][rows]
    position = statistics.normalize_state(pose[..., :3, 3], its.state["ee_pos"])
    turn = np.swapaxes(pose[..., :3, :2], -1, -2).reshape(*pose.shape[:-2], 6)
    ee = np.concatenate([position, turn], axis=-1)
    out["ee"][rows] = np.where(out["ee_mask"][rows][..., None], ee, 0)
    joints = statistics.normalize_state(state["joint_pos"][rows], its.state["joint_pos"])
    joints = np.concatenate([joints, 2 * state["grip_open"][rows][..., None] - 1], axis=-1)
    out["joints"][rows] = np.where(out["joint_mask"][rows], joints, 0)
