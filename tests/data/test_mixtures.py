import collections

import numpy as np
import pytest

from gear_jax.data.mixtures import (
    HUMAN,
    ROBOT,
    VISION_LANGUAGE,
    Phase,
    Schedule,
    curriculum,
    stage_weights,
)

ALL = [*VISION_LANGUAGE, *ROBOT, *HUMAN]


def test_the_papers_tables_add_up():
    assert sum(VISION_LANGUAGE.values()) == 4189
    assert sum(ROBOT.values()) == 7558
    assert round(sum(HUMAN.values()), 1) == 15469.6
    assert round(sum(ROBOT.values()) + sum(HUMAN.values()), 1) == 23027.6


def test_stage_weights_share_the_pools_and_follow_the_root_of_the_sizes():
    for stage, shares in (("pretrain", (0.40, 0.40, 0.20)), ("policy", (0.15, 0.65, 0.20))):
        weights = stage_weights(stage, ALL)
        for pool, share in zip((VISION_LANGUAGE, ROBOT, HUMAN), shares, strict=True):
            assert sum(weights[name] for name in pool) == pytest.approx(share)
    assert weights["agibot"] / weights["droid"] == pytest.approx((3276 / 350) ** 0.5)
    assert stage_weights("policy", ["droid", "bridge_v2"]).keys() == {"droid", "bridge_v2"}
    assert sum(stage_weights("policy", ["droid", "ego4d"]).values()) == pytest.approx(1)
    with pytest.raises(ValueError, match="\\['mine'\\] are in neither table"):
        stage_weights("policy", ["droid", "mine"])


def _share(phase, names):
    return sum(phase.weights[name] for name in names)


def test_the_curriculum_goes_from_understanding_over_perception_to_action():
    su, sp = ("general_vqa", "understanding_qa"), ("ground2d", "ground3d", "space_point",
                                                   "object_point", "mask_track")  # fmt: skip
    phases = curriculum(ALL)
    assert (phases[0].start, _share(phases[0], su), _share(phases[0], sp)) == pytest.approx(
        (0, 0.8, 0.2)
    )
    middle = next(p for p in phases if p.start == pytest.approx(0.16))
    assert (_share(middle, su), _share(middle, sp)) == pytest.approx((0.25, 0.75))
    assert (_share(phases[-1], su), _share(phases[-1], sp)) == pytest.approx((0.10, 0.30))
    assert phases[-1].start == pytest.approx(0.46)
    halfway = [p for p in phases if 0.139 < p.start < 0.1599]
    assert len(halfway) == 16
    assert np.mean([_share(p, su) for p in halfway]) == pytest.approx((0.8 + 0.25) / 2)
    swapped = curriculum(ALL, "sp_su")
    assert _share(swapped[0], sp) == pytest.approx(0.8)
    assert len(curriculum(ALL, "mixed")) == 1
    with pytest.raises(ValueError, match="no data set of the groups \\['su', 'sp'\\]"):
        curriculum(["droid"])


def test_counts_are_exact_in_every_block_and_places_have_no_gaps():
    names = ["a", "b", "c"]
    phases = [
        Phase(0.0, {"a": 0.7, "b": 0.2, "c": 0.1}),
        Phase(0.5, {"a": 0.0, "b": 0.5, "c": 0.5}),
    ]
    schedule = Schedule(names, phases, 8 * 4096)
    places = [schedule.locate(n) for n in range(12 * 4096)]
    first = collections.Counter(source for source, _ in places[:4096])
    assert [first[i] for i in range(3)] == [2867, 819, 410]
    later = collections.Counter(source for source, _ in places[-4096:])
    assert [later[i] for i in range(3)] == [0, 2048, 2048]
    for source in range(3):
        mine = sorted(place for s, place in places if s == source)
        assert mine == list(range(len(mine)))
    for start in range(0, 4096 * 3, 100):  # every hundred is near the weights
        some = collections.Counter(source for source, _ in places[start : start + 100])
        assert abs(some[0] - 70) <= 2
        assert abs(some[1] - 20) <= 2


def test_weights_that_are_no_shares_are_refused():
    for phases, message in [
        ([], "the first phase must start at 0"),
        ([Phase(0.1, {"a": 1.0})], "the first phase must start at 0"),
        ([Phase(0.0, {"a": 0.5})], "expected shares that sum to 1"),
        ([Phase(0.0, {"a": 1.5, "b": -0.5})], "expected shares"),
        ([Phase(0.0, {"z": 1.0})], "unknown sets \\['z'\\]"),
        ([Phase(0.0, {"a": 0.9999, "b": 0.0001})], "at least 1/4096"),
        ([Phase(0.0, {"a": 1.0}), Phase(0.5, {"a": 1.0}), Phase(0.4, {"a": 1.0})], "growing"),
    ]:
        with pytest.raises(ValueError, match=message):
            Schedule(["a", "b"], phases, 10**6)
