"""Rotations and poses: one implementation for NumPy and JAX arrays, batched over leading axes.

What enters decides what leaves: NumPy in, NumPy out (data workers never import jax); JAX arrays or
tracers in, JAX out, under jit, vmap and grad. float32 in gives float32 out.

Conventions: quaternions wxyz; `T_base_ee`, float[..., 4, 4], reads "ee in base"; metres, radians.
Euler angles name their sense: "intrinsic" turns about the moving axes, "extrinsic" about the fixed
ones, in the order of the letters. Gradients are finite at zero angle, at 180 degrees and in gimbal
lock. Leading axes broadcast.

Shapes are always checked; values only of NumPy arrays, within `TOLERANCE`, by `ValueError`. Under
JAX a zero quaternion or a degenerate rmat6d gives NaN.
"""

import numpy as np

from gear_jax.geometry_inputs import (
    array_namespace,
    as_floating,
    as_pose,
    as_quat,
    as_rotmat,
    as_vector,
    atan2,
    lengths,
    matmul,
    norm,
    require,
    same_rank,
)

SENSES = ("intrinsic", "extrinsic")
RMAT6D = ("columns", "rows")
_SMALL = 1e-8  # squared angle below which a short series is exact in float64


# Quaternions and rotation vectors


def quat_from_xyzw(quat):
    """Reorder float[..., 4] xyzw (scipy, ROS, most data sets) to wxyz."""
    xp = array_namespace(quat)
    return xp.roll(as_floating(xp, "quat", quat, 4), 1, axis=-1)


def quat_to_xyzw(quat):
    """Reorder float[..., 4] wxyz to xyzw."""
    xp = array_namespace(quat)
    return xp.roll(as_floating(xp, "quat", quat, 4), -1, axis=-1)


def normalize_quat(quat):
    """Unit quaternions float[..., 4] of any others but zero."""
    xp = array_namespace(quat)
    quat = as_floating(xp, "quat", quat, 4)
    if xp is np:
        ok = (lengths(quat) >= 1e-6) & (lengths(quat) <= 1e6)
        require(ok, "quat", quat, "a quaternion wxyz with a norm in 1e-6 .. 1e6")
    return quat / norm(xp, quat)


def continuous_quat(quat):
    """The same rotations with the signs that make the sequence continuous.

    Args:
        quat: float[..., T, 4] wxyz, one rotation per step.

    Returns:
        float[..., T, 4]: the first has w >= 0, each other lies in the hemisphere of the one before.
    """
    xp = array_namespace(quat)
    quat = as_quat(xp, "quat", as_floating(xp, "quat", quat, None, 4))
    dots = xp.sum(quat[..., 1:, :] * quat[..., :-1, :], axis=-1)
    flips = xp.concatenate([quat[..., :1, 0], dots], axis=-1) < 0
    odd = xp.cumsum(flips, axis=-1) % 2 == 1
    return xp.where(odd[..., None], -quat, quat)


def quat_conjugate(quat):
    """The inverse rotation of float[..., 4] wxyz."""
    xp = array_namespace(quat)
    return _conjugate(xp, as_quat(xp, "quat", quat))


def _conjugate(xp, quat):
    return xp.concatenate([quat[..., :1], -quat[..., 1:]], axis=-1)


def quat_multiply(first, second):
    """float[..., 4] wxyz of the matrix product first @ second."""
    xp = array_namespace(first, second)
    return _multiply(xp, as_quat(xp, "first", first), as_quat(xp, "second", second))


def _multiply(xp, first, second):
    first, second = same_rank(first, second, 1)
    a, b, c, d = (first[..., i] for i in range(4))
    w, x, y, z = (second[..., i] for i in range(4))
    return xp.stack(
        [
            a * w - b * x - c * y - d * z,
            a * x + b * w + c * z - d * y,
            a * y - b * z + c * w + d * x,
            a * z + b * y - c * x + d * w,
        ],
        axis=-1,
    )


def quat_to_rotmat(quat):
    """Rotation matrix float[..., 3, 3] of float[..., 4] wxyz."""
    xp = array_namespace(quat)
    return _quat_to_rotmat(xp, as_quat(xp, "quat", quat))


def _quat_to_rotmat(xp, quat):
    w, x, y, z = (quat[..., i] for i in range(4))
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return _matrix(xp, rows)


def _matrix(xp, rows):
    return xp.stack([xp.stack(row, axis=-1) for row in rows], axis=-2)


def rotmat_to_quat(rotmat):
    """float[..., 4] wxyz with w >= 0 of float[..., 3, 3]."""
    xp = array_namespace(rotmat)
    return _rotmat_to_quat(xp, as_rotmat(xp, "rotmat", rotmat))


def _rotmat_to_quat(xp, rotmat):
    m = [[rotmat[..., i, j] for j in range(3)] for i in range(3)]
    x, y, z = m[2][1] - m[1][2], m[0][2] - m[2][0], m[1][0] - m[0][1]  # 4wx, 4wy, 4wz
    xy, xz, yz = m[1][0] + m[0][1], m[0][2] + m[2][0], m[2][1] + m[1][2]
    squares = [
        1 + m[0][0] + m[1][1] + m[2][2],
        1 + m[0][0] - m[1][1] - m[2][2],
        1 - m[0][0] + m[1][1] - m[2][2],
        1 - m[0][0] - m[1][1] + m[2][2],
    ]
    # Row i is 4 * quat[i] * quat; the row of the largest component has a norm of at least 2.
    rows = _matrix(
        xp,
        [
            [squares[0], x, y, z],
            [x, squares[1], xy, xz],
            [y, xy, squares[2], yz],
            [z, xz, yz, squares[3]],
        ],
    )
    largest = xp.argmax(xp.stack(squares, axis=-1), axis=-1)
    quat = xp.take_along_axis(rows, largest[..., None, None], axis=-2)[..., 0, :]
    quat = quat / norm(xp, quat)
    return xp.where(quat[..., :1] < 0, -quat, quat)


def rotvec_to_quat(rotvec):
    """float[..., 4] wxyz of a rotation vector float[..., 3], axis times angle."""
    xp = array_namespace(rotvec)
    return _rotvec_to_quat(xp, as_vector(xp, "rotvec", rotvec))


def _rotvec_to_quat(xp, rotvec):
    square = xp.sum(rotvec * rotvec, axis=-1, keepdims=True)
    small = square < _SMALL
    angle = xp.sqrt(xp.where(small, 1.0, square))
    w = xp.where(small, 1 - square / 8, xp.cos(angle / 2))
    scale = xp.where(small, 0.5 - square / 48, xp.sin(angle / 2) / angle)
    return xp.concatenate([w, scale * rotvec], axis=-1)


def quat_to_rotvec(quat):
    """Rotation vector float[..., 3] of float[..., 4] wxyz, angle in [0, pi]."""
    xp = array_namespace(quat)
    return _quat_to_rotvec(xp, as_quat(xp, "quat", quat))


def _quat_to_rotvec(xp, quat):
    quat = xp.where(quat[..., :1] < 0, -quat, quat)
    w, xyz = quat[..., :1], quat[..., 1:]
    square = xp.sum(xyz * xyz, axis=-1, keepdims=True)
    small = square < _SMALL
    sine = xp.sqrt(xp.where(small, 1.0, square))
    series = (2 - 2 * square / 3) / xp.where(small, w, 1.0)  # w is all but 1 there
    return xyz * xp.where(small, series, 2 * xp.arctan2(sine, w) / sine)


def rotvec_to_rotmat(rotvec):
    """Rotation matrix float[..., 3, 3] of a rotation vector float[..., 3]."""
    return quat_to_rotmat(rotvec_to_quat(rotvec))


def rotmat_to_rotvec(rotmat):
    """Rotation vector float[..., 3], angle in [0, pi], of float[..., 3, 3]."""
    return quat_to_rotvec(rotmat_to_quat(rotmat))


# Euler angles


def euler_to_rotmat(angles, axes, sense):
    """Rotation matrix of Euler angles.

    Args:
        angles: float[..., 3], radians, in the order of `axes`.
        axes: three of "x", "y", "z", no two neighbours equal, such as "xyz" or "zxz".
        sense: "intrinsic" (moving axes: R = R1 @ R2 @ R3) or "extrinsic" (fixed: R3 @ R2 @ R1).

    Returns:
        float[..., 3, 3]. `rotmat_to_euler` is the inverse.

    Raises:
        ValueError: unknown axes or sense.
    """
    xp = array_namespace(angles)
    axes = _axes(axes, sense)
    angles = as_vector(xp, "angles", angles)
    if sense == "extrinsic":
        axes, angles = axes[::-1], angles[..., ::-1]
    first, second, third = (_turn(xp, axis, angles[..., n]) for n, axis in enumerate(axes))
    return matmul(xp, matmul(xp, first, second), third)


def rotmat_to_euler(rotmat, axes, sense):
    """Euler angles of a rotation matrix; the inverse of `euler_to_rotmat`.

    In gimbal lock the first intrinsic (last extrinsic) angle is arbitrary and the other one takes
    up the rest, so that the angles always give the matrix back to machine precision.

    Args:
        rotmat: float[..., 3, 3].
        axes: as in `euler_to_rotmat`.
        sense: as in `euler_to_rotmat`.

    Returns:
        float[..., 3], radians: outer angles in [-pi, pi]; the middle one in [-pi/2, pi/2], or in
        [0, pi] when the first axis is also the last.

    Raises:
        ValueError: unknown axes or sense, or `rotmat` is not a rotation.
    """
    xp = array_namespace(rotmat)
    axes = _axes(axes, sense)
    rotmat = as_rotmat(xp, "rotmat", rotmat)
    i, j, k = axes if sense == "intrinsic" else axes[::-1]
    other = 3 - i - j
    sign = 1 if (j - i) % 3 == 1 else -1
    rows = [[rotmat[..., m, n] for n in range(3)] for m in range(3)]
    if i == k:
        first = atan2(xp, rows[j][i], -sign * rows[other][i])
    else:
        first = atan2(xp, -sign * rows[j][k], rows[k][k])
    # Undo the first turn: what is left are the second and the third, exact even in gimbal lock.
    cos, sin = xp.cos(first), sign * xp.sin(first)
    row_j = [cos * a + sin * b for a, b in zip(rows[j], rows[other], strict=True)]
    row_o = [cos * b - sin * a for a, b in zip(rows[j], rows[other], strict=True)]
    if i == k:
        second = atan2(xp, -sign * row_o[i], rows[i][i])
        third = atan2(xp, -sign * row_j[other], row_j[j])
    else:
        second = atan2(xp, sign * rows[i][k], row_o[k])
        third = atan2(xp, sign * row_j[i], row_j[j])
    angles = [first, second, third]
    return xp.stack(angles if sense == "intrinsic" else angles[::-1], axis=-1)


def _axes(axes, sense):
    """Indices of the axes' letters."""
    letters = axes if isinstance(axes, str) else ""
    if len(letters) != 3 or set(letters) - set("xyz") or letters[1] in (letters[0], letters[2]):
        raise ValueError(f"axes is {axes!r}; expected three of x, y, z, no two neighbours equal")
    if sense not in SENSES:
        raise ValueError(f"sense is {sense!r}; expected one of {SENSES}")
    return tuple("xyz".index(letter) for letter in letters)


def _turn(xp, axis, angle):
    """Rotation matrix about one coordinate axis."""
    j, k = (axis + 1) % 3, (axis + 2) % 3
    cos, sin = xp.cos(angle), xp.sin(angle)
    rows = [
        [xp.ones_like(cos) if m == n else xp.zeros_like(cos) for n in range(3)] for m in range(3)
    ]
    rows[j][j], rows[j][k] = cos, -sin
    rows[k][j], rows[k][k] = sin, cos
    return _matrix(xp, rows)


# rmat6d


def rotmat_to_rmat6d(rotmat, by="columns"):
    """First two columns, [R[:, 0]; R[:, 1]], or rows of a rotation: float[..., 6] (Zhou et al.)."""
    xp = array_namespace(rotmat)
    rotmat = as_rotmat(xp, "rotmat", rotmat)
    if _by(by) == "columns":
        rotmat = xp.swapaxes(rotmat, -1, -2)
    return rotmat[..., :2, :].reshape(*rotmat.shape[:-2], 6)


def rmat6d_to_rotmat(rmat6d, by="columns"):
    """Rotation matrix of two vectors, by Gram-Schmidt (Zhou et al.).

    Args:
        rmat6d: float[..., 6], two vectors of any length, as a network gives them.
        by: "columns" if they stand for the rotation's first two columns, "rows" for its rows.

    Returns:
        float[..., 3, 3]. `rotmat_to_rmat6d` is the inverse.

    Raises:
        ValueError: a vector has no direction or both point the same way.
    """
    xp = array_namespace(rmat6d)
    _by(by)
    rmat6d = as_floating(xp, "rmat6d", rmat6d, 6)
    if xp is np:
        require(
            _spans_plane(rmat6d),
            "rmat6d",
            rmat6d,
            "two independent vectors with norms in 1e-6 .. 1e6",
        )
    first = rmat6d[..., :3] / norm(xp, rmat6d[..., :3])
    second = rmat6d[..., 3:] / norm(xp, rmat6d[..., 3:])
    second = second - first * xp.sum(first * second, axis=-1, keepdims=True)
    second = second / norm(xp, second)
    rows = xp.stack([first, second, xp.cross(first, second)], axis=-2)
    return xp.swapaxes(rows, -1, -2) if by == "columns" else rows


def _by(by):
    if by not in RMAT6D:
        raise ValueError(f"by is {by!r}; expected one of {RMAT6D}")
    return by


def _spans_plane(rmat6d):
    """Both vectors have a norm in 1e-6 .. 1e6 and the angle between them is above 1e-6."""
    a, b = np.split(rmat6d.astype(np.float64), 2, axis=-1)
    sizes = np.stack([lengths(a), lengths(b)])
    with np.errstate(all="ignore"):
        sine = lengths(np.cross(a, b)) / sizes.prod(0)
        return ((sizes >= 1e-6) & (sizes <= 1e6)).all(0) & (sine > 1e-6)


# Interpolation


def slerp(start, end, fraction):
    """Quaternion on the shortest arc from `start` (fraction 0) to `end` (1).

    Args:
        start: float[..., 4] wxyz.
        end: float[..., 4] wxyz.
        fraction: float[...].

    Returns:
        float[..., 4] wxyz, in the hemisphere of `start`.
    """
    xp = array_namespace(start, end, fraction)
    start, end = as_quat(xp, "start", start), as_quat(xp, "end", end)
    arc = _quat_to_rotvec(xp, _multiply(xp, _conjugate(xp, start), end))
    return _multiply(xp, start, _rotvec_to_quat(xp, _scaled(xp, arc, fraction)))


def interpolate_pose(start, end, fraction):
    """Pose between two others: position on the straight line, rotation on the shortest arc.

    Args:
        start: float[..., 4, 4], at fraction 0.
        end: float[..., 4, 4], at fraction 1.
        fraction: float[...].

    Returns:
        float[..., 4, 4].
    """
    xp = array_namespace(start, end, fraction)
    start, end = same_rank(as_pose(xp, "start", start), as_pose(xp, "end", end), 2)
    path = _scaled(xp, end[..., :3, 3] - start[..., :3, 3], fraction)
    turn = matmul(xp, xp.swapaxes(start[..., :3, :3], -1, -2), end[..., :3, :3])
    turn = _rotvec_to_quat(
        xp, _scaled(xp, _quat_to_rotvec(xp, _rotmat_to_quat(xp, turn)), fraction)
    )
    position = sum(same_rank(start[..., :3, 3], path, 1))
    return _join(xp, position, matmul(xp, start[..., :3, :3], _quat_to_rotmat(xp, turn)))


def _scaled(xp, vector, fraction):
    """Product of vector [..., n] and fraction [...], in the vector's dtype."""
    vector, fraction = same_rank(vector, xp.asarray(fraction, vector.dtype)[..., None], 1)
    return vector * fraction


# Poses


def make_pose(position, rotmat):
    """float[..., 4, 4] of position float[..., 3], metres, and rotation float[..., 3, 3]."""
    xp = array_namespace(position, rotmat)
    return _join(xp, as_vector(xp, "position", position), as_rotmat(xp, "rotmat", rotmat))


def _join(xp, position, rotmat):
    column, rotmat = same_rank(position[..., None], rotmat, 2)
    lead = np.broadcast_shapes(column.shape[:-2], rotmat.shape[:-2])
    top = xp.concatenate(
        [xp.broadcast_to(rotmat, (*lead, 3, 3)), xp.broadcast_to(column, (*lead, 3, 1))], axis=-1
    )
    bottom = xp.broadcast_to(xp.asarray([[0, 0, 0, 1]], top.dtype), (*lead, 1, 4))
    return xp.concatenate([top, bottom], axis=-2)


def compose(first, second):
    """T_a_c of T_a_b and T_b_c, float[..., 4, 4] each."""
    xp = array_namespace(first, second)
    return matmul(xp, as_pose(xp, "first", first), as_pose(xp, "second", second))


def inverse(pose):
    """T_b_a of T_a_b, float[..., 4, 4]."""
    xp = array_namespace(pose)
    pose = as_pose(xp, "pose", pose)
    back = xp.swapaxes(pose[..., :3, :3], -1, -2)
    return _join(xp, -matmul(xp, back, pose[..., :3, 3:])[..., 0], back)


def relative(pose, other):
    """T_b_c of T_a_b and T_a_c, float[..., 4, 4] each: `other` seen from `pose`."""
    xp = array_namespace(pose, other)
    pose, other = same_rank(as_pose(xp, "pose", pose), as_pose(xp, "other", other), 2)
    back = xp.swapaxes(pose[..., :3, :3], -1, -2)
    position = matmul(xp, back, other[..., :3, 3:] - pose[..., :3, 3:])[..., 0]
    return _join(xp, position, matmul(xp, back, other[..., :3, :3]))


def relative_chunk(pose, future):
    """Future end-effector poses in the frame of the current one (GEAR-VLA eq. 4).

    Args:
        pose: float[..., 4, 4], T_base_ee at time t, metres.
        future: float[..., A, 4, 4], T_base_ee at t+1 .. t+A.

    Returns:
        float[..., A, 4, 4], T_t_{t+i}. `absolute_chunk` is the inverse.

    Raises:
        ValueError: a rotation block is not orthonormal within `TOLERANCE`.
    """
    xp = array_namespace(pose, future)
    pose = as_floating(xp, "pose", pose, 4, 4)
    return relative(pose[..., None, :, :], as_floating(xp, "future", future, None, 4, 4))


def absolute_chunk(pose, chunk):
    """Poses in the base frame of a chunk relative to the current end effector (GEAR-VLA eq. 4).

    Args:
        pose: float[..., 4, 4], T_base_ee at time t, metres.
        chunk: float[..., A, 4, 4], T_t_{t+i}.

    Returns:
        float[..., A, 4, 4], T_base_ee at t+1 .. t+A. `relative_chunk` is the inverse.

    Raises:
        ValueError: a rotation block is not orthonormal within `TOLERANCE`.
    """
    xp = array_namespace(pose, chunk)
    pose = as_floating(xp, "pose", pose, 4, 4)
    return compose(pose[..., None, :, :], as_floating(xp, "chunk", chunk, None, 4, 4))
