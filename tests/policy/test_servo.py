"""The servo on the controller that it is made for: a critically damped unit mass."""

import numpy as np
import pytest

from gear_jax import geometry
from gear_jax.policy.servo import OscServo

STIFFNESS, PERIOD, SUBSTEPS = 150.0, 0.05, 500


def _period(place, velocity, step):
    """Where the mass is after one period with its goal `step` away from where it begins."""
    goal, dt = place + step, PERIOD / SUBSTEPS
    for _ in range(SUBSTEPS):
        force = STIFFNESS * (goal - place) - 2 * np.sqrt(STIFFNESS) * velocity
        velocity = velocity + force * dt
        place = place + velocity * dt
    return place, velocity


def _follow(servo, way):
    """Places after each period, along x, for targets `way`; metres."""
    place, velocity, found = 0.0, 0.0, []
    for target in way:
        moving = np.array([velocity, 0, 0, 0, 0, 0])
        action = servo.action(_pose(place), _pose(target), 1.0, moving)
        place, velocity = _period(place, velocity, action[0] * servo.position_scale)
        found.append(place)
    return np.array(found)


def _pose(x, turn=0.0):
    rotation = geometry.rotvec_to_rotmat(np.array([0.0, 0.0, turn]))
    return geometry.make_pose(np.array([x, 0.0, 0.0]), rotation)


def test_with_the_whole_correction_the_hand_is_at_its_target_after_one_period():
    servo = OscServo(correction=1.0)
    found = _follow(servo, [0.003, 0.008, 0.015, 0.018])
    np.testing.assert_allclose(found, [0.003, 0.008, 0.015, 0.018], atol=5e-5)


@pytest.mark.parametrize("correction", [0.4, 0.6])
def test_a_target_of_constant_speed_is_followed_all_but_without_lag(correction):
    way = 0.008 * np.arange(1, 41)
    lag = way - _follow(OscServo(correction=correction), way)
    assert np.abs(lag[-1]) < 4e-4
    assert lag.max() > 1e-3  # at the start there is some


def test_a_gain_alone_lags():
    servo, way = OscServo(), 0.008 * np.arange(1, 41)
    place, velocity = 0.0, 0.0
    for target in way:
        action = servo.action(_pose(place), _pose(target), 1.0)
        place, velocity = _period(place, velocity, action[0] * servo.position_scale)
    assert way[-1] - place > 3e-3


def test_turns_are_led_as_places_are():
    servo = OscServo(correction=0.7, rotation_correction=0.7)
    moving = np.array([0.1, 0, 0, 0, 0, 1.0])
    action = servo.action(_pose(0.0), _pose(0.01, 0.1), 1.0, moving)
    np.testing.assert_allclose(action[5] * servo.rotation_scale, action[0] * 0.5, rtol=1e-5)
    np.testing.assert_allclose(action[5] * 0.5, 10 * action[0] * 0.05, rtol=1e-5)


def test_actions_are_bounded_and_the_gripper_is_binary():
    servo = OscServo()
    action = servo.action(_pose(0.0), _pose(1.0), 0.49)
    assert action.dtype == np.float32
    assert action.tolist() == [1, 0, 0, 0, 0, 0, 1]
    assert servo.action(_pose(0.0), _pose(-1.0), 0.5, np.zeros(6)).tolist()[::6] == [-1, -1]
