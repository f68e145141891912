"""Grasps of simple shapes, where the right answer is known."""

import numpy as np

from gear_jax.evals.sims.libero_expert import _tallest_between
from gear_jax.evals.sims.libero_grasps import hand_hits, opening_axis, plan_grasp

NOTHING = np.zeros((0, 3))
BASE = np.array([-0.6, 0.0])


def _box(size, turn=0.0, at=(0.0, 0.0, 0.0)):
    """Points on a grid through a box that stands on z = at[2], turned about z."""
    grid = np.stack(np.meshgrid(*[np.linspace(-0.5, 0.5, 15)] * 3), -1).reshape(-1, 3) * size
    cos, sin = np.cos(turn), np.sin(turn)
    grid[:, :2] = grid[:, :2] @ np.array([[cos, sin], [-sin, cos]])
    return grid + np.array([0, 0, size[2] / 2]) + at


def _bowl(radius, height):
    """Points of a wall that opens upwards."""
    angle, part = np.meshgrid(np.linspace(0, 2 * np.pi, 180), np.linspace(0, 1, 20))
    wide = radius * (0.6 + 0.4 * part)
    return np.stack([wide * np.cos(angle), wide * np.sin(angle), height * part], -1).reshape(-1, 3)


def test_a_narrow_box_is_taken_across_its_short_side():
    for turn in (-0.6, 0.0, 0.5):
        grasp = plan_grasp(_box((0.10, 0.05, 0.04), turn, (0.2, 0.1, 0.9)), NOTHING, BASE)
        assert grasp.kind == "centre"
        # at turn 0 the short side lies along y, which is where the fingers open at yaw 0
        assert abs(grasp.yaw - turn) < np.deg2rad(5)
        np.testing.assert_allclose(grasp.place[:2], [0.2, 0.1], atol=0.002)
        np.testing.assert_allclose(grasp.place[2], 0.94 - 0.55 * 0.04, atol=1e-9)


def test_the_fingers_stay_above_the_table_under_a_flat_object():
    grasp = plan_grasp(_box((0.05, 0.05, 0.012)), NOTHING, BASE)
    assert grasp.place[2] == 0.008


def test_something_wide_is_taken_at_its_rim():
    grasp = plan_grasp(_bowl(0.06, 0.05), NOTHING, BASE)
    assert grasp.kind == "rim"
    np.testing.assert_allclose(np.linalg.norm(grasp.place[:2]), 0.056, atol=0.002)
    np.testing.assert_allclose(grasp.place[2], 0.05 - 0.022, atol=1e-9)
    # the fingers close across the wall
    across = abs(opening_axis(grasp.yaw) @ grasp.place[:2]) / np.linalg.norm(grasp.place[:2])
    assert across > 0.999


def test_a_round_rim_is_taken_on_the_same_side_wherever_it_stands():
    for aside in (-0.15, -0.001, 0.0, 0.001, 0.15):
        grasp = plan_grasp(_bowl(0.06, 0.05) + (0, aside, 0), NOTHING, BASE)
        assert grasp.place[1] > aside + 0.05


def test_a_rim_is_taken_where_nothing_stands_in_the_way():
    free = plan_grasp(_bowl(0.06, 0.05), NOTHING, BASE)
    wall = _box((0.04, 0.04, 0.2), at=(*(free.place[:2] * 1.4), 0.0))
    other = plan_grasp(_bowl(0.06, 0.05), wall, BASE)
    assert hand_hits(wall, free.place, free.yaw) > 0
    assert hand_hits(wall, other.place, other.yaw) == 0


def test_the_hand_hits_what_is_under_its_palm_or_fingers_only():
    place = np.array([0.0, 0.0, 0.1])
    points = {
        "finger, which opens along y": (0.0, 0.05, 0.1),
        "palm": (0.04, 0.1, 0.15),
        "beside the finger": (0.02, 0.05, 0.1),
        "below": (0.0, 0.05, 0.09),
        "under the palm": (0.04, 0.1, 0.13),
    }
    hits = {name: hand_hits(np.array([point]), place, 0.0) for name, point in points.items()}
    assert [name for name, hit in hits.items() if hit] == list(points)[:2]
    # a quarter turn exchanges both directions
    assert hand_hits(np.array([(0.05, 0.0, 0.1)]), place, np.pi / 2) == 1
    assert hand_hits(NOTHING, place, 0.0) == 0


def test_only_what_stands_near_the_way_makes_the_hand_go_higher():
    start, end = np.array([0.0, 0.0]), np.array([0.4, 0.0])
    points = np.array([[0.2, 0.1, 1.1], [0.2, -0.2, 1.5], [0.6, 0.0, 1.4]])
    assert _tallest_between(points, start, end) == 1.1
    assert _tallest_between(points[1:], start, end) == -1.0
    assert _tallest_between(NOTHING, start, end) == -1.0
    assert _tallest_between(points, start, start) == -1.0
