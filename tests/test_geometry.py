import itertools
import subprocess
import sys
import warnings

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.transform import Rotation, Slerp

from gear_jax import geometry as g

EXACT = 1e-12
ORDERS = ["".join(a) for a in itertools.product("xyz", repeat=3) if a[0] != a[1] != a[2]]
BOTH_SENSES = [(axes, sense) for axes in ORDERS for sense in g.SENSES]
RNG = np.random.default_rng(0)

# Rotation vectors at random, at and near zero, and at and near 180 degrees.
_UNIT = np.concatenate([np.eye(3), [[0.6, 0.0, 0.8], [-1 / 3, 2 / 3, -2 / 3]]])
ROTVECS = np.concatenate(
    [Rotation.random(50, random_state=0).as_rotvec()]
    + [_UNIT * a for a in (0, 1e-300, 1e-12, 1e-8, 0.99e-4, 1.01e-4, 1e-3, 3.0)]
    + [_UNIT * (np.pi - a) for a in (0, 1e-15, 1e-10, 1e-8, 1e-6, 1e-3)]
)
MATRICES = Rotation.from_rotvec(ROTVECS).as_matrix()

finite = st.floats(-3, 3, allow_nan=False, width=64)
vectors = st.tuples(finite, finite, finite).map(np.array)
properties = hypothesis.settings(max_examples=50, deadline=None, derandomize=True, database=None)


def _scipy_quat(rotation):
    return g.quat_from_xyzw(rotation.as_quat())


def _poses(*lead, seed=0):
    rng = np.random.default_rng(seed)
    count = int(np.prod(lead))
    rotmat = Rotation.random(count, random_state=seed).as_matrix().reshape(*lead, 3, 3)
    return g.make_pose(rng.normal(size=(*lead, 3)), rotmat)


def _same_up_to_sign(a, b):
    return np.minimum(np.abs(a - b).max(-1), np.abs(a + b).max(-1)).max()


# Values


def test_a_quarter_turn_about_z_reads_the_same_in_every_notation():
    turn = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    quat = np.array([0.5**0.5, 0, 0, 0.5**0.5])
    rotvec = np.array([0, 0, np.pi / 2])
    np.testing.assert_allclose(g.quat_to_rotmat(quat), turn, atol=EXACT)
    np.testing.assert_allclose(g.rotmat_to_quat(turn), quat, atol=EXACT)
    np.testing.assert_allclose(g.rotvec_to_rotmat(rotvec), turn, atol=EXACT)
    np.testing.assert_allclose(g.rotmat_to_rotvec(turn), rotvec, atol=EXACT)
    np.testing.assert_array_equal(g.rotmat_to_rmat6d(turn), [0, 1, 0, -1, 0, 0])
    np.testing.assert_array_equal(g.rotmat_to_rmat6d(turn, by="rows"), [0, -1, 0, 1, 0, 0])
    np.testing.assert_array_equal(g.quat_from_xyzw([1, 2, 3, 4]), [4, 1, 2, 3])
    np.testing.assert_array_equal(g.quat_to_xyzw([4, 1, 2, 3]), [1, 2, 3, 4])


def test_intrinsic_and_extrinsic_turns_multiply_in_opposite_orders():
    half = np.pi / 2  # x then y: about fixed axes Ry @ Rx, about moving axes Rx @ Ry
    fixed = [[0, 1, 0], [0, 0, -1], [-1, 0, 0]]
    moving = [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    angles = np.array([half, half, 0])
    np.testing.assert_allclose(g.euler_to_rotmat(angles, "xyz", "extrinsic"), fixed, atol=EXACT)
    np.testing.assert_allclose(g.euler_to_rotmat(angles, "xyz", "intrinsic"), moving, atol=EXACT)


def test_a_pose_ahead_of_a_turned_gripper_is_ahead_in_its_own_frame():
    pose = g.make_pose([1.0, 2, 3], [[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    future = pose.copy()[None]
    future[0, :3, 3] = [1, 2.5, 3.25]  # base y is the gripper's x
    expected = np.array([[[1.0, 0, 0, 0.5], [0, 1, 0, 0], [0, 0, 1, 0.25], [0, 0, 0, 1]]])
    np.testing.assert_array_equal(g.relative_chunk(pose, future), expected)
    np.testing.assert_array_equal(g.absolute_chunk(pose, expected), future)
    np.testing.assert_array_equal(
        g.inverse(pose), [[0, 1, 0, -2], [-1, 0, 0, 1], [0, 0, 1, -3], [0, 0, 0, 1]]
    )


def test_gram_schmidt_keeps_the_first_vector_and_straightens_the_second():
    made = g.rmat6d_to_rotmat(np.array([0, 2.0, 0, -3, 5, 0]))
    np.testing.assert_allclose(made, [[0, -1, 0], [1, 0, 0], [0, 0, 1]], atol=EXACT)
    made = g.rmat6d_to_rotmat(np.array([0, 2.0, 0, -3, 5, 0]), by="rows")
    np.testing.assert_allclose(made, [[0, 1, 0], [-1, 0, 0], [0, 0, 1]], atol=EXACT)


def test_continuous_quaternions_never_change_hemisphere():
    quat = _scipy_quat(Rotation.from_rotvec(np.linspace(0.1, 12, 40)[:, None] * [0.0, 0.6, 0.8]))
    flipped = quat * RNG.choice([-1, 1], size=(7, 40, 1))
    fixed = g.continuous_quat(flipped)
    assert (np.sum(fixed[:, 1:] * fixed[:, :-1], -1) > 0).all()
    np.testing.assert_allclose(fixed, np.broadcast_to(g.continuous_quat(quat), fixed.shape))
    assert (fixed[:, 0, 0] > 0).all()
    assert (fixed[:, :, 0] < 0).any()  # continuity, not w >= 0
    np.testing.assert_allclose(g.quat_to_rotmat(fixed[0]), g.quat_to_rotmat(quat), atol=EXACT)


# scipy as the oracle


def test_rotations_equal_scipys_even_next_to_zero_and_to_180_degrees():
    rotation = Rotation.from_rotvec(ROTVECS)
    np.testing.assert_allclose(g.rotvec_to_rotmat(ROTVECS), MATRICES, rtol=0, atol=EXACT)
    np.testing.assert_allclose(
        g.quat_to_rotmat(_scipy_quat(rotation)), MATRICES, rtol=0, atol=EXACT
    )
    assert _same_up_to_sign(g.rotmat_to_quat(MATRICES), _scipy_quat(rotation)) < EXACT
    assert _same_up_to_sign(g.rotvec_to_quat(ROTVECS), _scipy_quat(rotation)) < EXACT
    assert (g.rotmat_to_quat(MATRICES)[:, 0] >= 0).all()
    back = g.rotmat_to_rotvec(MATRICES)
    np.testing.assert_allclose(Rotation.from_rotvec(back).as_matrix(), MATRICES, rtol=0, atol=EXACT)
    inside = np.linalg.norm(ROTVECS, axis=-1) < np.pi - 1e-9  # beyond, both signs are right
    np.testing.assert_allclose(back[inside], ROTVECS[inside], rtol=0, atol=EXACT)


@pytest.mark.parametrize("angle", [1e-12, 0.9e-4, 1.1e-4, 0.9e-2, 0.1])
def test_small_rotations_lose_no_digits(angle):
    rotvec = _UNIT * angle
    quat = g.rotvec_to_quat(rotvec)
    np.testing.assert_allclose(quat[:, 1:], _UNIT * np.sin(angle / 2), rtol=1e-14)
    np.testing.assert_allclose(g.quat_to_rotvec(quat), rotvec, rtol=1e-14)


def test_products_and_inverses_of_quaternions_equal_scipys():
    a, b = Rotation.random(20, random_state=1), Rotation.random(20, random_state=2)
    qa, qb = _scipy_quat(a), _scipy_quat(b)
    assert _same_up_to_sign(g.quat_multiply(qa, qb), _scipy_quat(a * b)) < EXACT
    assert _same_up_to_sign(g.quat_conjugate(qa), _scipy_quat(a.inv())) < EXACT


@pytest.mark.parametrize(("axes", "sense"), BOTH_SENSES)
def test_euler_angles_equal_scipys(axes, sense):
    names = axes.upper() if sense == "intrinsic" else axes
    angles = RNG.uniform(-np.pi, np.pi, (50, 3))
    rotation = Rotation.from_euler(names, angles)
    rotmat = g.euler_to_rotmat(angles, axes, sense)
    np.testing.assert_allclose(rotmat, rotation.as_matrix(), rtol=0, atol=EXACT)
    apart = g.rotmat_to_euler(rotmat, axes, sense) - rotation.as_euler(names)
    np.testing.assert_allclose(np.cos(apart), 1, rtol=0, atol=EXACT)
    np.testing.assert_allclose(np.sin(apart), 0, rtol=0, atol=EXACT)


@pytest.mark.parametrize(("axes", "sense"), BOTH_SENSES)
def test_euler_angles_give_the_matrix_back_in_and_next_to_gimbal_lock(axes, sense):
    locks = [0, np.pi] if axes[0] == axes[2] else [-np.pi / 2, np.pi / 2]
    off = [0, 1e-16, 1e-12, 1e-9, -1e-8, 1e-7, 1e-4]
    angles = np.array(
        [(a, m + e, b) for m in locks for e in off for a in (0, 0.7, -3) for b in (0, -1.1, 2)]
    )
    rotmat = g.euler_to_rotmat(angles, axes, sense)
    back = g.rotmat_to_euler(np.concatenate([rotmat, MATRICES]), axes, sense)
    again = g.euler_to_rotmat(back, axes, sense)
    np.testing.assert_allclose(again, np.concatenate([rotmat, MATRICES]), rtol=0, atol=EXACT)


def test_slerp_equals_scipys_on_short_and_long_arcs_whatever_the_signs():
    fractions = np.linspace(0, 1, 7)
    for angle in (0, 1e-9, 1e-4, 0.5, 3.0, np.pi - 1e-6):
        ends = Rotation.from_rotvec([[0.3, -0.2, 0.9], [0, 0, 0]])
        ends = Rotation.concatenate([ends[0], ends[0] * Rotation.from_rotvec(_UNIT[4] * angle)])
        oracle = _scipy_quat(Slerp([0, 1], ends)(fractions))
        start, end = _scipy_quat(ends)
        for sign in (1, -1):
            made = g.slerp(start, sign * end, fractions)
            assert _same_up_to_sign(made, oracle) < EXACT
            np.testing.assert_allclose(made[0], start, rtol=0, atol=EXACT)
            assert (np.sum(made[1:] * made[:-1], -1) > 0).all()


def test_interpolated_poses_go_straight_and_turn_like_scipys_slerp():
    poses = _poses(2)
    fractions = np.linspace(0, 1, 9)
    made = g.interpolate_pose(poses[0], poses[1], fractions)
    turn = Slerp([0, 1], Rotation.from_matrix(poses[:, :3, :3]))(fractions).as_matrix()
    np.testing.assert_allclose(made[:, :3, :3], turn, rtol=0, atol=EXACT)
    line = poses[0, :3, 3] + fractions[:, None] * (poses[1, :3, 3] - poses[0, :3, 3])
    np.testing.assert_allclose(made[:, :3, 3], line, rtol=0, atol=EXACT)
    np.testing.assert_array_equal(made[:, 3], np.tile([0.0, 0, 0, 1], (9, 1)))


def test_poses_compose_as_matrices_do():
    a, b = _poses(6, seed=1), _poses(6, seed=2)
    np.testing.assert_allclose(g.compose(a, b), a @ b, rtol=0, atol=EXACT)
    np.testing.assert_allclose(g.inverse(a), np.linalg.inv(a), rtol=0, atol=EXACT)
    np.testing.assert_allclose(g.relative(a, b), np.linalg.inv(a) @ b, rtol=0, atol=EXACT)


# Properties


@properties
@hypothesis.given(vectors)
def test_rotation_vectors_come_back_up_to_full_turns(rotvec):
    rotmat = g.rotvec_to_rotmat(rotvec)
    again = g.rotvec_to_rotmat(g.rotmat_to_rotvec(rotmat))
    np.testing.assert_allclose(again, rotmat, rtol=0, atol=EXACT)
    if np.linalg.norm(rotvec) < 3:
        np.testing.assert_allclose(g.rotmat_to_rotvec(rotmat), rotvec, rtol=0, atol=EXACT)


@properties
@hypothesis.given(vectors, st.sampled_from(g.RMAT6D), st.floats(0.01, 100), st.floats(-5, 5))
def test_rmat6d_comes_back_also_after_stretching_and_shearing(rotvec, by, length, shear):
    rotmat = g.rotvec_to_rotmat(rotvec)
    rmat6d = g.rotmat_to_rmat6d(rotmat, by)
    np.testing.assert_allclose(g.rmat6d_to_rotmat(rmat6d, by), rotmat, rtol=0, atol=EXACT)
    bent = np.concatenate([rmat6d[:3] * length, rmat6d[3:] + shear * rmat6d[:3]])
    np.testing.assert_allclose(g.rmat6d_to_rotmat(bent, by), rotmat, rtol=0, atol=EXACT)


@properties
@hypothesis.given(vectors, st.sampled_from(BOTH_SENSES))
def test_rotations_come_back_from_euler_angles(rotvec, how):
    rotmat = g.rotvec_to_rotmat(rotvec)
    again = g.euler_to_rotmat(g.rotmat_to_euler(rotmat, *how), *how)
    np.testing.assert_allclose(again, rotmat, rtol=0, atol=EXACT)


@properties
@hypothesis.given(st.integers(0, 2**31 - 1), st.integers(1, 30))
def test_e6_a_chunk_comes_back_and_does_not_know_the_base_frame(seed, chunk_len):
    pose, base, *future = _poses(2 + chunk_len, seed=seed)
    future = np.stack(future)
    chunk = g.relative_chunk(pose, future)
    np.testing.assert_allclose(g.absolute_chunk(pose, chunk), future, rtol=0, atol=EXACT)
    moved = g.relative_chunk(g.compose(base, pose), g.compose(base, future))
    np.testing.assert_allclose(moved, chunk, rtol=0, atol=EXACT)


# JAX

QUATS = g.rotvec_to_quat(ROTVECS)
POSES = g.make_pose(RNG.normal(size=(len(MATRICES), 3)), MATRICES)
FRACTIONS = RNG.uniform(size=len(QUATS))
EVERY_FUNCTION = {
    "quat_from_xyzw": (g.quat_from_xyzw, QUATS),
    "quat_to_xyzw": (g.quat_to_xyzw, QUATS),
    "normalize_quat": (g.normalize_quat, 3 * QUATS),
    "continuous_quat": (g.continuous_quat, QUATS.reshape(-1, 5, 4)),
    "quat_conjugate": (g.quat_conjugate, QUATS),
    "quat_multiply": (g.quat_multiply, QUATS, QUATS[::-1]),
    "quat_to_rotmat": (g.quat_to_rotmat, QUATS),
    "rotmat_to_quat": (g.rotmat_to_quat, MATRICES),
    "rotvec_to_quat": (g.rotvec_to_quat, ROTVECS),
    "quat_to_rotvec": (g.quat_to_rotvec, QUATS),
    "rotvec_to_rotmat": (g.rotvec_to_rotmat, ROTVECS),
    "rotmat_to_rotvec": (g.rotmat_to_rotvec, MATRICES[:50]),
    "columns": (g.rotmat_to_rmat6d, MATRICES),
    "rows": (lambda x: g.rotmat_to_rmat6d(x, "rows"), MATRICES),
    "from_columns": (g.rmat6d_to_rotmat, RNG.normal(size=(50, 6))),
    "from_rows": (lambda x: g.rmat6d_to_rotmat(x, "rows"), RNG.normal(size=(50, 6))),
    "slerp": (g.slerp, QUATS[:50], QUATS[49::-1], FRACTIONS[:50]),
    "interpolate_pose": (g.interpolate_pose, POSES[:50], POSES[49::-1], FRACTIONS[:50]),
    "make_pose": (g.make_pose, ROTVECS, MATRICES),
    "compose": (g.compose, POSES, POSES[::-1]),
    "inverse": (g.inverse, POSES),
    "relative": (g.relative, POSES, POSES[::-1]),
    "relative_chunk": (g.relative_chunk, POSES[:4], POSES[:40].reshape(4, 10, 4, 4)),
    "absolute_chunk": (g.absolute_chunk, POSES[:4], POSES[:40].reshape(4, 10, 4, 4)),
    "unbatched_with_batched": (g.compose, POSES[0], POSES),
    **{
        f"{axes} {sense}": (lambda x, a=axes, s=sense: g.euler_to_rotmat(x, a, s), ROTVECS)
        for axes, sense in [("xyz", "extrinsic"), ("zyx", "intrinsic"), ("zxz", "extrinsic")]
    },
    **{
        f"to {axes} {sense}": (lambda x, a=axes, s=sense: g.rotmat_to_euler(x, a, s), MATRICES[:50])
        for axes, sense in [("xyz", "extrinsic"), ("zyx", "intrinsic"), ("zxz", "extrinsic")]
    },
}


@pytest.mark.parametrize("name", EVERY_FUNCTION)
def test_jax_under_jit_equals_numpy_in_float64(name):
    function, *args = EVERY_FUNCTION[name]
    expected = function(*args)
    with jax.enable_x64(True):
        made = jax.jit(function)(*args)
        assert isinstance(made, jax.Array)
        assert made.dtype == jnp.float64
        np.testing.assert_allclose(made, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", EVERY_FUNCTION)
def test_float32_in_gives_float32_out(name):
    function, *args = EVERY_FUNCTION[name]
    args = [np.asarray(x, np.float32) for x in args]
    made = function(*args)
    assert isinstance(made, np.ndarray)
    assert made.dtype == np.float32
    on_device = jax.eval_shape(function, *args)
    assert (on_device.dtype, on_device.shape) == (jnp.float32, made.shape)


def test_whole_numbers_become_float64_and_a_fraction_does_not_widen_float32():
    assert g.quat_from_xyzw([1, 2, 3, 4]).dtype == np.float64
    quat = np.eye(4, dtype=np.float32)[0]
    assert g.slerp(quat, quat, np.float64(0.5)).dtype == np.float32
    assert g.interpolate_pose(*np.float32(POSES[:2]), np.linspace(0, 1, 3)).dtype == np.float32
    assert jax.eval_shape(g.quat_from_xyzw, np.arange(4)).dtype == jnp.float32


def test_no_matrix_product_is_left_to_the_rounding_of_an_accelerator():
    poses = jnp.asarray(POSES[:2], jnp.float32)
    jaxprs = [
        jax.make_jaxpr(g.interpolate_pose)(poses, poses, 0.5),
        jax.make_jaxpr(g.absolute_chunk)(poses[0], poses),
        jax.make_jaxpr(g.relative_chunk)(poses[0], poses),
        jax.make_jaxpr(lambda x: g.euler_to_rotmat(x, "xyz", "extrinsic"))(poses[:, 0, :3]),
    ]
    assert all("mul" in str(jaxpr) and "dot_general" not in str(jaxpr) for jaxpr in jaxprs)


def test_vmap_equals_the_batched_call():
    batched = g.interpolate_pose(POSES[:50], POSES[50:100], FRACTIONS[:50])
    args = [jnp.asarray(x, jnp.float32) for x in (POSES[:50], POSES[50:100], FRACTIONS[:50])]
    made = jax.jit(jax.vmap(g.interpolate_pose))(*args)
    np.testing.assert_allclose(made, batched, atol=1e-5)


SPECIAL = Rotation.from_rotvec(np.concatenate([np.zeros((1, 3)), _UNIT * np.pi]))
GIMBAL = Rotation.from_euler("xyz", [[0.0, np.pi / 2, 0], [0, -np.pi / 2, 0.3], [0, 0, 0]])


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (g.rotvec_to_rotmat, SPECIAL.as_rotvec()),
        (g.rotvec_to_quat, SPECIAL.as_rotvec()),
        (g.rotmat_to_quat, SPECIAL.as_matrix()),
        (g.rotmat_to_rotvec, SPECIAL.as_matrix()),
        (g.quat_to_rotvec, _scipy_quat(SPECIAL)),
        (lambda q: g.slerp(jnp.eye(4)[:1], q, 0.3), _scipy_quat(SPECIAL)),
        (lambda x: g.rmat6d_to_rotmat(g.rotmat_to_rmat6d(x)), SPECIAL.as_matrix()),
        (lambda x: g.rotmat_to_euler(x, "xyz", "extrinsic"), np.round(GIMBAL.as_matrix(), 15)),
        (lambda x: g.rotmat_to_euler(x, "zyx", "intrinsic"), np.round(GIMBAL.as_matrix(), 15)),
        (lambda x: g.rotmat_to_euler(x, "zxz", "intrinsic"), SPECIAL.as_matrix()),
    ],
)
def test_gradients_are_finite_at_identity_at_180_degrees_and_in_gimbal_lock(function, x):
    jacobian = jax.jit(jax.jacfwd(function))(jnp.asarray(x, jnp.float32))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(function(x) ** 2 + function(x))))(
        jnp.asarray(x, jnp.float32)
    )
    assert np.isfinite(jacobian).all()
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


def test_the_derivative_of_the_exponential_at_the_identity_is_the_cross_product():
    jacobian = jax.jit(jax.jacrev(g.rotvec_to_rotmat))(jnp.zeros(3))
    cross = np.array(
        [
            [[0, 0, 0], [0, 0, -1], [0, 1, 0]],
            [[0, 0, 1], [0, 0, 0], [-1, 0, 0]],
            [[0, -1, 0], [1, 0, 0], [0, 0, 0]],
        ]
    )
    np.testing.assert_allclose(np.moveaxis(jacobian, -1, 0), cross, atol=1e-6)
    there_and_back = jax.jit(jax.jacrev(lambda v: g.rotmat_to_rotvec(g.rotvec_to_rotmat(v))))
    np.testing.assert_allclose(there_and_back(jnp.zeros(3)), np.eye(3), atol=1e-6)


def test_workers_that_only_use_numpy_never_import_jax():
    code = (
        "import sys, numpy as np; from gear_jax import geometry as g;"
        "g.slerp([1, 0, 0, 0], [0, 1, 0, 0], 0.5); g.inverse(np.eye(4));"
        "sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Errors

NOT_A_ROTATION = np.stack([np.eye(3), np.diag([1, 1, 1.01]), np.diag([1, 1, -1.0])])
BENT_POSE = np.eye(4)
BENT_POSE[3, 0] = 1


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: g.quat_to_rotmat(np.array([[1, 0, 0, 0], [0.0, 0, 0, 0]])),
            r"quat\[1\] is \[0.0, 0.0, 0.0, 0.0\]; expected a unit quaternion wxyz",
        ),
        (
            lambda: g.slerp([1, 0, 0, 0], [0, 0.5, 0, 0], 0.5),
            r"end is \[0.0, 0.5, 0.0, 0.0\]; expected a unit quaternion wxyz",
        ),
        (
            lambda: g.rotvec_to_quat([[0, 0, 0], [np.nan, 0, 0]]),
            r"rotvec\[1\] is \[nan, 0.0, 0.0\]; expected finite numbers",
        ),
        (lambda: g.normalize_quat(np.zeros(4)), r"quat is \[0.0, .*; expected a quaternion"),
        (lambda: g.rotmat_to_quat(NOT_A_ROTATION), r"rotmat\[1\] is .*1.01.*; expected a rotation"),
        (lambda: g.rotmat_to_quat(NOT_A_ROTATION[2]), r"rotmat is .*; expected a rotation matrix"),
        (lambda: g.rotmat_to_euler(np.full((3, 3), np.nan), "xyz", "intrinsic"), "rotmat is .*nan"),
        (lambda: g.inverse(BENT_POSE), r"pose is .*; expected a pose: .* last row \[0, 0, 0, 1\]"),
        (lambda: g.inverse(np.eye(3)), r"pose has shape \[3, 3\]; expected \[..., 4, 4\]"),
        (lambda: g.relative_chunk(np.eye(4), np.eye(4)), r"future has shape .*\[..., n, 4, 4\]"),
        (lambda: g.rmat6d_to_rotmat([1, 0, 0, 2, 0, 0]), "rmat6d is .*; expected two independ"),
        (lambda: g.rmat6d_to_rotmat([1e30, 0, 0, 0, 1, 0]), "rmat6d is .*; expected two independ"),
        (lambda: g.rmat6d_to_rotmat(np.ones(6), by="cols"), "by is 'cols'; expected one of .*rows"),
        (lambda: g.euler_to_rotmat(np.zeros(3), "xxz", "intrinsic"), "axes is 'xxz'; expected thr"),
        (lambda: g.euler_to_rotmat(np.zeros(3), "XYZ", "intrinsic"), "axes is 'XYZ'; expected thr"),
        (lambda: g.euler_to_rotmat(np.zeros(3), "xyz", "fixed"), "sense is 'fixed'; expected one"),
    ],
)
def test_a_fault_is_named_with_its_value_and_what_was_expected(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_faults_within_the_tolerance_are_accepted_and_quaternions_made_unit():
    rotmat = g.quat_to_rotmat(np.array([1 + 9e-4, 0, 0, 0]))
    np.testing.assert_array_equal(rotmat, np.eye(3))
    near = np.diag([1, 1, 1 + 4e-4])
    np.testing.assert_allclose(g.rotmat_to_quat(near), [1, 0, 0, 0], atol=1e-3)


def test_values_under_jax_are_not_checked_but_shapes_are():
    assert np.isnan(jax.jit(g.quat_to_rotmat)(jnp.zeros(4))).all()
    assert np.isfinite(jax.jit(g.inverse)(2 * jnp.eye(4))).all()
    with pytest.raises(ValueError, match=r"quat has shape \[3\]; expected \[..., 4\]"):
        jax.jit(g.quat_to_rotmat)(jnp.zeros(3))


def test_bad_values_raise_no_numerical_warnings_on_the_way():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for value in (np.inf, np.nan, 1e200):
            with pytest.raises(ValueError, match="expected"):
                g.rotmat_to_quat(np.full((3, 3), value))
            with pytest.raises(ValueError, match="expected"):
                g.rmat6d_to_rotmat(np.full(6, value))
            with pytest.raises(ValueError, match="expected"):
                g.quat_to_rotvec(np.full(4, value))
