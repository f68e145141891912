"""The servo on the controller that it is made for: a critically damped unit mass."""

import numpy as np
import pytest

from gear_jax import geometry
from gear_jax.policy.servo import SERVOS, OscServo, coupling

STIFFNESS, PERIOD, SUBSTEPS = 150.0, 0.05, 500
# a Panda in LIBERO, at the beginning of an episode
PANDA = np.array(
    [
        [1, 0, 0, -0.004, -0.230, 0.001],
        [0, 1, 0, 0.187, 0.001, 0.074],
        [0, 0, 1, -0.003, -0.174, 0],
        [-0.067, 0.738, 0.015, 1, 0, 0],
        [-2.648, 0.036, -0.489, 0, 1, 0],
        [0.017, 0.840, 0.004, 0, 0, 1],
    ]
)


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


def _arm(answer, action, velocity):
    """Way and velocity of an arm that answers so, after one period, place and turn, float[6]."""
    goal, way = action[:6] * np.repeat([0.05, 0.5], 3), np.zeros(6)
    for _ in range(SUBSTEPS):
        asked = STIFFNESS * (goal - way) - 2 * np.sqrt(STIFFNESS) * velocity
        velocity = velocity + answer @ asked * PERIOD / SUBSTEPS
        way = way + velocity * PERIOD / SUBSTEPS
    return way, velocity


def _target(place, turn):
    return geometry.make_pose(np.array(place), geometry.rotvec_to_rotmat(np.array(turn)))


def test_an_arm_that_is_no_unit_mass_is_at_its_target_after_one_period():
    servo = OscServo(coupled=True, correction=1.0, rotation_correction=1.0)
    velocity = np.array([0.05, -0.1, 0.08, 0.1, 0.2, -0.1])
    target = _target([0.004, -0.003, 0.005], [0.01, 0.012, -0.015])
    action = servo.action(np.eye(4), target, 1.0, velocity, PANDA)
    assert np.abs(action[:6]).max() < 1
    found, _ = _arm(PANDA, action, velocity)
    np.testing.assert_allclose(found[:3], target[:3, 3], atol=2e-4)
    np.testing.assert_allclose(found[3:], [0.01, 0.012, -0.015], atol=1e-3)


def test_a_push_to_the_front_does_not_tilt_the_hand():
    tilts, still = {}, np.zeros(6)
    for name, servo in SERVOS.items():
        action = servo.action(np.eye(4), _target([0.003, 0, 0], still[3:]), 1.0, still, PANDA)
        tilts[name] = abs(_arm(PANDA, action, still)[0][4])
    assert tilts["unit_mass"] > 3e-3
    assert tilts["coupled"] < 1e-3


def test_on_the_unit_mass_both_servos_do_the_same():
    velocity, target = np.array([0.1, 0, 0, 0, 0, 0.3]), _target([0.006, 0.002, 0], [0, 0, 0.02])
    plain = OscServo(correction=0.8, rotation_correction=0.8)
    servos = plain, SERVOS["coupled"]
    found = [one.action(np.eye(4), target, 0.0, velocity, np.eye(6)) for one in servos]
    np.testing.assert_allclose(*found, atol=5e-3)


def test_an_arm_that_is_all_but_stretched_still_comes_to_its_target():
    stretched = PANDA.copy()
    stretched[0, 4], stretched[4, 0] = -0.37, -2.7  # one way hardly answers at all
    assert np.linalg.eigvals(stretched).real.min() < 2e-3
    wanted, left = np.array([0.02, 0, -0.02, 0, 0.05, 0]), {}
    target = _target(wanted[:3], wanted[3:])
    for name, servo in SERVOS.items():
        place, velocity = np.zeros(6), np.zeros(6)
        for _ in range(10):
            pose = _target(place[:3], place[3:])
            action = servo.action(pose, target, 1.0, velocity, stretched)
            assert (np.abs(action) <= 1).all()
            way, velocity = _arm(stretched, action, velocity)
            place = place + way
        left[name] = np.linalg.norm((wanted - place) * np.repeat([1, 0.2], 3))
    assert left["unit_mass"] > 0.1  # from 0.03: it drives the hand away
    assert left["coupled"] < 0.01


def test_place_alone_and_turn_alone_come_as_asked():
    rng = np.random.default_rng(0)
    root, jacobian = rng.normal(size=(7, 7)), rng.normal(size=(6, 7))
    mass = root @ root.T + np.eye(7)
    found = coupling(jacobian, mass)
    np.testing.assert_allclose(found[:3, :3], np.eye(3), atol=1e-9)
    np.testing.assert_allclose(found[3:, 3:], np.eye(3), atol=1e-9)
    # what OSC does: forces of each alone, through the arm
    inverse = jacobian @ np.linalg.inv(mass) @ jacobian.T
    torque = np.linalg.solve(inverse[3:, 3:], [1.0, 2.0, 3.0])
    joints = np.linalg.solve(mass, jacobian[3:].T @ torque)
    np.testing.assert_allclose(found @ [0, 0, 0, 1, 2, 3], jacobian @ joints, atol=1e-9)
