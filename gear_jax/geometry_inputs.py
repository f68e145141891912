"""What enters geometry.py: NumPy or JAX, its shape and, of NumPy arrays, its values.

Every `as_...` gives the floating array back, or raises a ValueError that names the argument.
"""

import sys

import numpy as np

TOLERANCE = 1e-3  # how far a quaternion's norm or a rotation's columns may be from 1


def array_namespace(*arrays):
    """jax.numpy if any of the arrays is JAX's (or a tracer), else numpy; never imports jax."""
    jax = sys.modules.get("jax")
    if jax is not None and any(isinstance(x, jax.Array) for x in arrays):
        return jax.numpy
    return np


def as_floating(xp, name, x, *tail):
    """`x` as floating array whose last axes are `tail`; a None there is any length."""
    x = xp.asarray(x)
    if not xp.issubdtype(x.dtype, xp.floating):
        x = x.astype(float)
    last = x.shape[x.ndim - len(tail) :] if x.ndim >= len(tail) else ()
    if len(last) != len(tail) or any(t not in (None, n) for t, n in zip(tail, last, strict=True)):
        wanted = ", ".join("n" if t is None else str(t) for t in tail)
        raise ValueError(f"{name} has shape {list(x.shape)}; expected [..., {wanted}]")
    return x


def require(ok, name, x, expected):
    """Raise one sentence about the first element whose `ok` is False."""
    if not ok.all():
        index = np.unravel_index(np.argmin(ok), ok.shape)
        at = f"[{', '.join(str(i) for i in index)}]" if index else ""
        raise ValueError(f"{name}{at} is {x[index].tolist()}; expected {expected}")


def lengths(x):
    """Norms float64[...] of vectors NumPy [..., n]; too long for float64 is inf."""
    with np.errstate(over="ignore"):
        return np.linalg.norm(x.astype(np.float64), axis=-1)


def is_rotation(x):
    """bool[...] of NumPy [..., 3, 3]: orthonormal within `TOLERANCE`, determinant +1."""
    x = x.astype(np.float64)
    with np.errstate(all="ignore"):
        error = np.abs(np.swapaxes(x, -1, -2) @ x - np.eye(3)).max((-1, -2))
        return (error <= TOLERANCE) & (np.linalg.det(x) > 0)


def as_quat(xp, name, x):
    """`x` as unit quaternions."""
    x = as_floating(xp, name, x, 4)
    if xp is not np:
        return x / norm(xp, x)
    # einsum: overflow is inf, without a warning
    length = np.sqrt(np.einsum("...i,...i->...", x, x))
    ok = np.abs(length - 1) <= TOLERANCE
    require(ok, name, x, f"a unit quaternion wxyz (norm within {TOLERANCE} of 1)")
    return x / length[..., None]


def as_rotmat(xp, name, x):
    """`x` as rotation matrices [..., 3, 3]."""
    x = as_floating(xp, name, x, 3, 3)
    if xp is np:
        expected = f"a rotation matrix (orthonormal within {TOLERANCE}, determinant +1)"
        require(is_rotation(x), name, x, expected)
    return x


def as_pose(xp, name, x):
    """`x` as poses [..., 4, 4]."""
    x = as_floating(xp, name, x, 4, 4)
    if xp is np:
        ok = is_rotation(x[..., :3, :3]) & np.isfinite(x[..., 3]).all(-1)
        ok &= (x[..., 3, :] == [0, 0, 0, 1]).all(-1)
        expected = f"a pose: rotation orthonormal within {TOLERANCE}, last row [0, 0, 0, 1]"
        require(ok, name, x, expected)
    return x


def as_vector(xp, name, x):
    """`x` as finite vectors [..., 3]."""
    x = as_floating(xp, name, x, 3)
    if xp is np:
        require(np.isfinite(x).all(-1), name, x, "finite numbers")
    return x


def norm(xp, x):
    """Length of the last axis, which stays."""
    return xp.sqrt(xp.sum(x * x, axis=-1, keepdims=True))


def same_rank(a, b, tail):
    """`a` and `b`, whose last `tail` axes are their own, with equally many leading axes."""
    lead = max(a.ndim, b.ndim) - tail
    return tuple(x.reshape((1,) * (lead + tail - x.ndim) + x.shape) for x in (a, b))


def matmul(xp, a, b):
    """Matrix product by sums of products: accelerators round `@` to less than float32."""
    a, b = same_rank(a, b, 2)
    return xp.sum(a[..., :, :, None] * b[..., None, :, :], axis=-2)


def atan2(xp, y, x):
    """arctan2 whose value and gradient at (0, 0) are 0."""
    nowhere = (x == 0) & (y == 0)
    return xp.where(nowhere, 0.0, xp.arctan2(y, xp.where(nowhere, 1.0, x)))
