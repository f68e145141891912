"""Which data set the n-th sample comes from: weights, curriculum, exact counts.

Sizes are those of GEAR-VLA's Tables 4 and 5; the rules that turn them into weights are systems.md
2.10. A `Schedule` answers for any sample number at once, so the whole state of a stream is one
integer.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

# Table 4: vision-language samples, in thousands
VISION_LANGUAGE = {
    "general_vqa": 132,
    "understanding_qa": 578,
    "planning_qa": 35,
    "traj2d": 698,
    "traj3d": 150,
    "ground2d": 100,
    "ground3d": 632,
    "space_point": 625,
    "object_point": 401,
    "affordance": 393,
    "mask_track": 445,
}
# Table 5: hours of robots, and of people
ROBOT = {
    "oxe": 3000,
    "agibot": 3276,
    "droid": 350,
    "robomind": 305,
    "galaxea": 500,
    "bridge_v2": 127,
}
HUMAN = {
    "holoassist": 166,
    "ego4d": 3670,
    "egodex": 830,
    "hoi4d": 7.6,
    "ssv2": 240,
    "egovid": 556,
    "egocentric10k": 10000,
}
POOLS = {"vision_language": VISION_LANGUAGE, "robot": ROBOT, "human": HUMAN}
POOL_WEIGHTS = {
    "pretrain": {"vision_language": 0.40, "robot": 0.40, "human": 0.20},
    "policy": {"vision_language": 0.15, "robot": 0.65, "human": 0.20},
}
SIZE_POWER = 0.5  # inside a pool, a set's weight is its size to this power

# Members of "oxe" and their weights per frame (Octo's magic soup). Bridge and DROID are left out:
# they are sets of their own here, and would count twice.
OXE = {
    "fractal20220817_data": 0.54087122203,
    "kuka": 0.8341046294,
    "taco_play": 2.0,
    "jaco_play": 1.0,
    "berkeley_cable_routing": 1.0,
    "roboturk": 2.0,
    "nyu_door_opening_surprising_effectiveness": 1.0,
    "viola": 2.0,
    "berkeley_autolab_ur5": 2.0,
    "toto": 1.0,
    "language_table": 0.1,
    "stanford_hydra_dataset_converted_externally_to_rlds": 2.0,
    "austin_buds_dataset_converted_externally_to_rlds": 1.0,
    "nyu_franka_play_dataset_converted_externally_to_rlds": 3.0,
    "furniture_bench_dataset_converted_externally_to_rlds": 0.1,
    "ucsd_kitchen_dataset_converted_externally_to_rlds": 2.0,
    "austin_sailor_dataset_converted_externally_to_rlds": 1.0,
    "austin_sirius_dataset_converted_externally_to_rlds": 1.0,
    "bc_z": 0.2,
    "dlr_edan_shared_control_converted_externally_to_rlds": 1.0,
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": 1.0,
    "utaustin_mutex": 1.0,
    "berkeley_fanuc_manipulation": 2.0,
    "cmu_stretch": 1.0,
}

# The curriculum's groups: spatial understanding, spatial perception, action
UNDERSTANDING = ("general_vqa", "understanding_qa")
PERCEPTION = ("ground2d", "ground3d", "space_point", "object_point", "mask_track")

_BLOCK = 4096  # samples in which every set gets its exact share
_BLEND_STEPS = 16


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training with fixed weights.

    Attributes:
        start: fraction of all samples at which it begins.
        weights: {data set: share}, summing to 1.
    """

    start: float
    weights: Mapping[str, float]


def stage_weights(stage: Literal["pretrain", "policy"], names: Sequence[str]) -> dict[str, float]:
    """Shares of the named sets of the paper's tables in one stage, without a curriculum.

    Pools that have no set here leave their share to the others.

    Raises:
        ValueError: a set that is in neither table.
    """
    pools = _pools(names)
    shares = POOL_WEIGHTS[stage]
    total = sum(shares[pool] for pool in pools)
    return {
        name: shares[pool] / total * part
        for pool, members in pools.items()
        for name, part in _by_size(POOLS[pool], members).items()
    }


def curriculum(
    names: Sequence[str], order: Literal["su_sp", "sp_su", "mixed"] = "su_sp"
) -> tuple[Phase, ...]:
    """Pretraining's phases (systems.md 2.10): understanding, then perception, then action.

    0 to 15 %: one group leads with 80 %; 15 to 45 %: the other with 75 %; then 10 % understanding,
    30 % perception and 60 % action (planning, affordance, trajectories, video, robots), with linear
    blends over 2 %. "sp_su" exchanges the first two groups; "mixed" has one phase.

    Raises:
        ValueError: a set that is in neither table, or a group without any.
    """
    mixed = stage_weights("pretrain", names)
    if order == "mixed":
        return (Phase(0.0, mixed),)
    groups: dict[str, dict[str, float]] = {"su": {}, "sp": {}, "act": {}}
    for name, weight in mixed.items():
        kind = "su" if name in UNDERSTANDING else "sp" if name in PERCEPTION else "act"
        groups[kind][name] = weight
    empty = [kind for kind, members in groups.items() if not members]
    if empty:
        raise ValueError(
            f"curriculum {order!r}: no data set of the groups {empty}: add some, or use 'mixed'"
        )
    first, second = ("su", "sp") if order == "su_sp" else ("sp", "su")
    plan = [
        (0.0, {first: 0.80, second: 0.20, "act": 0.0}),
        (0.15, {first: 0.25, second: 0.75, "act": 0.0}),
        (0.45, {"su": 0.10, "sp": 0.30, "act": 0.60}),
    ]
    phases = []
    for start, shares in plan:
        weights = {
            name: shares[kind] * weight / sum(members.values())
            for kind, members in groups.items()
            for name, weight in members.items()
        }
        if phases:
            phases += _blend(phases[-1].weights, weights, start, 0.02)
        phases.append(Phase(start + 0.01 if phases else start, weights))
    return tuple(phases)


def _blend(before, after, middle, width):
    """Small phases that lead linearly from one set of weights to another."""
    parts = (np.arange(_BLEND_STEPS) + 0.5) / _BLEND_STEPS
    starts = middle - width / 2 + width * np.arange(_BLEND_STEPS) / _BLEND_STEPS
    return [
        Phase(float(start), {n: (1 - part) * before[n] + part * after[n] for n in after})
        for start, part in zip(starts, parts, strict=True)
    ]


def _pools(names):
    found = {
        pool: [name for name in names if name in sizes]
        for pool, sizes in POOLS.items()
        if any(name in sizes for name in names)
    }
    unknown = sorted(set(names) - set(itertools.chain(*found.values())))
    if unknown or not names:
        known = sorted(itertools.chain(*POOLS.values()))
        raise ValueError(f"data sets {unknown} are in neither table: expected some of {known}")
    return found


def _by_size(sizes, names):
    parts = {name: sizes[name] ** SIZE_POWER for name in names}
    return {name: part / sum(parts.values()) for name, part in parts.items()}


class Schedule:
    """(data set, place in its own order) of every sample number, by arithmetic alone.

    Within each block of 4096 samples every set has its exact share, spread evenly, so no batch is
    far from the weights; within a set, places count up without gaps over phases and epochs.
    """

    def __init__(self, names: Sequence[str], phases: Sequence[Phase], num_samples: int):
        """Lay the phases out.

        Args:
            names: data sets, in the order that `locate` numbers them.
            phases: the first starts at 0; the last goes on for ever.
            num_samples: of the whole training; fractions are of this.

        Raises:
            ValueError: weights that are no shares, or of other names.
        """
        self.names, self._starts, self._segments = tuple(names), [], []
        offsets = np.zeros(len(names), np.int64)
        faults = _faults(self.names, phases)
        if faults:
            raise ValueError(f"mixture: {'; '.join(faults)}")
        for phase, following in zip(phases, [*phases[1:], None], strict=True):
            begin = round(phase.start * num_samples / _BLOCK)
            quotas = _quotas(np.array([phase.weights.get(name, 0.0) for name in names]))
            end = begin if following is None else round(following.start * num_samples / _BLOCK)
            if following is not None and end == begin:
                continue
            self._starts.append(begin * _BLOCK)
            self._segments.append((quotas, offsets, *_spread(quotas)))
            offsets = offsets + quotas * (end - begin)

    def locate(self, sample: int) -> tuple[int, int]:
        """(number of the data set, place in its order) of one sample."""
        segment = bisect.bisect_right(self._starts, sample) - 1
        quotas, offsets, which, rank = self._segments[segment]
        block, slot = divmod(sample - self._starts[segment], _BLOCK)
        slot = (slot + block * 1031) % _BLOCK  # another beginning each time: no host sees a pattern
        source = int(which[slot])
        return source, int(offsets[source] + block * quotas[source] + rank[slot])


def _faults(names, phases):
    if not phases or phases[0].start != 0:
        return ["the first phase must start at 0"]
    faults = []
    for phase in phases:
        values = list(phase.weights.values())
        if set(phase.weights) - set(names):
            faults.append(f"weights of unknown sets {sorted(set(phase.weights) - set(names))}")
        if any(not 0 <= w <= 1 for w in values) or abs(sum(values) - 1) > 1e-6:
            faults.append(f"weights {dict(phase.weights)}: expected shares that sum to 1")
    for name in names:
        most = max(phase.weights.get(name, 0.0) for phase in phases)
        if 0 < most < 1 / _BLOCK:
            faults.append(f"{name!r} has weight {most:.2g}: expected 0 or at least 1/{_BLOCK}")
    if any(a.start > b.start for a, b in zip(phases, phases[1:], strict=False)):
        faults.append(f"phases start at {[p.start for p in phases]}: expected growing fractions")
    return faults


def _quotas(weights):
    """Whole numbers that sum to a block and are nearest to the weights (largest remainder)."""
    exact = weights * _BLOCK
    quotas = np.floor(exact).astype(np.int64)
    rest = np.argsort(quotas - exact, kind="stable")[: _BLOCK - quotas.sum()]
    quotas[rest] += 1
    return quotas


def _spread(quotas):
    """Order of a block: which set has each slot, and its how-many-th slot that is."""
    which = np.repeat(np.arange(len(quotas)), quotas)
    rank = np.concatenate([np.arange(n) for n in quotas])
    order = np.argsort((rank + 0.5) / quotas[which], kind="stable")
    return which[order].astype(np.int32), rank[order].astype(np.int64)
