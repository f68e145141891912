"""Where to take an object: from its shape and what lies around it, both as points.

Points come from the simulator's meshes (`object_points`); planning (`plan_grasp`) is geometry.
The hand looks straight down. Its fingers open along (-sin yaw, cos yaw) in the plane of the table.
"""

import contextlib
import dataclasses
from typing import Any, Literal

import numpy as np

WIDEST = 0.072  # metres between the fingers that an object may fill; they open to 0.08
_BOX, _MESH = 6, 7  # of mjtGeom
_CENTRE_DEPTH = 0.024  # metres below an object's top
_RIM_DEPTH = 0.022
_TURN_COST = 0.004  # metres of width that a radian of turning is worth
# a round rim is as good on either side: take one always, for who learns from both takes the middle
_OTHER_SIDE_COST = 0.004
_CENTRE_YAWS = np.deg2rad(np.arange(-60, 61, 5))
_RIM_YAWS = np.deg2rad(np.arange(-75, 91, 15))


@dataclasses.dataclass(frozen=True)
class Grasp:
    """One way to take an object.

    Attributes:
        kind: "centre", between the fingers; "rim", the wall of something wider, such as a bowl.
        place: float64[3] of the finger tips' middle, metres.
        yaw: of the hand, radians.
    """

    kind: Literal["centre", "rim"]
    place: np.ndarray
    yaw: float


def opening_axis(yaw: float) -> np.ndarray:
    """The direction in which the fingers open, float64[2]."""
    return np.array([-np.sin(yaw), np.cos(yaw)])


def plan_grasp(points: np.ndarray, clutter: np.ndarray, base: np.ndarray) -> Grasp:
    """A grasp from above: the narrowest way across if the fingers are wide enough, else the rim.

    Args:
        points: float[n, 3], of the object's surface, metres.
        clutter: float[m, 3], of everything else; m may be 0.
        base: float[2], where the robot stands: near rims are easier to reach.
    """
    bottom, top = points[:, 2].min(), points[:, 2].max()
    height = top - bottom
    held = points
    if height > 0.03:  # only what the fingers will touch counts
        held = points[points[:, 2] > top - max(0.035, 0.3 * height)]
    ways = [_across(held, yaw) for yaw in _CENTRE_YAWS]
    costs = [
        width + _TURN_COST * abs(yaw) for (width, _), yaw in zip(ways, _CENTRE_YAWS, strict=True)
    ]
    best = int(np.argmin(costs))
    width, middle = ways[best]
    if width >= WIDEST:
        return _plan_rim(points, clutter, base)
    depth = min(_CENTRE_DEPTH, 0.55 * height)
    return Grasp(
        "centre", np.append(middle, max(top - depth, bottom + 0.008)), float(_CENTRE_YAWS[best])
    )


def hand_hits(clutter: np.ndarray, place: np.ndarray, yaw: float) -> int:
    """How many points are where the open hand would be, coming straight down on `place`."""
    if not len(clutter):
        return 0
    away = clutter - place
    axis = opening_axis(yaw)
    along = np.abs(away[:, :2] @ axis)
    beside = np.abs(away[:, 0] * axis[1] - away[:, 1] * axis[0])
    above = away[:, 2]
    palm = (along < 0.11) & (beside < 0.045) & (above > 0.04)
    fingers = (along < 0.055) & (beside < 0.016) & (above > -0.004)
    return int((palm | fingers).sum())


def _across(points, yaw):
    """Width along the opening axis, and the middle of what lies between the fingers, float[2]."""
    axis = opening_axis(yaw)
    side = np.array([axis[1], -axis[0]])
    along, beside = points[:, :2] @ axis, points[:, :2] @ side
    middle = axis * (along.max() + along.min()) / 2 + side * (beside.max() + beside.min()) / 2
    return along.max() - along.min(), middle


def _plan_rim(points, clutter, base):
    """The side of the rim with the least in the hand's way, then the least turning and reach."""
    top = points[:, 2].max()
    centre = (points[:, :2].min(0) + points[:, :2].max(0)) / 2
    rim = points[points[:, 2] > top - 0.012, :2] - centre
    candidates = []
    for yaw in _RIM_YAWS:
        for side in (1, -1):
            axis = opening_axis(yaw) * side
            radius = np.quantile(rim @ axis, 0.995) - 0.004  # in the middle of the wall
            place = np.append(centre + axis * radius, top - _RIM_DEPTH)
            cost = 0.02 * hand_hits(clutter, place, yaw) + 0.02 * abs(yaw)
            cost += 0.05 * float(np.linalg.norm(place[:2] - base)) + _OTHER_SIDE_COST * (side < 0)
            candidates.append((cost, Grasp("rim", place, float(yaw))))
    return min(candidates, key=lambda one: one[0])[1]


# Points of what is in the simulator


def body_id(model: Any, name: str) -> int:
    """The number of an object's body.

    Raises:
        ValueError: there is none.
    """
    for full in (f"{name}_main", name):
        with contextlib.suppress(KeyError):
            return model.body(full).id
    raise ValueError(f"the scene has no body {name!r}")


def object_points(model: Any, data: Any, body: int, count: int = 6000) -> np.ndarray:
    """Points of an object's surface in the world, float64[n, 3]; the same ones at every call.

    Args:
        model: `mujoco.MjModel`.
        data: `mujoco.MjData`.
        body: its root; what hangs on it counts too.
        count: samples of each mesh; its vertices come on top.
    """
    rng = np.random.default_rng(0)
    meshes, shapes = [], []
    for geom in range(model.ngeom):
        if not _is_below(model, model.geom_bodyid[geom], body):
            continue
        turn, place = data.geom_xmat[geom].reshape(3, 3), data.geom_xpos[geom]
        if model.geom_type[geom] == _MESH:
            if model.geom_group[geom]:  # group 0 is a coarse copy for collisions
                meshes.append(
                    _mesh_points(model, model.geom_dataid[geom], count, rng) @ turn.T + place
                )
        elif model.geom_group[geom] == 0:
            shapes.append(_box_points(model, geom, rng) @ turn.T + place)
    if not meshes and not shapes:
        return data.xpos[body][None].copy()
    return np.concatenate(meshes or shapes)


def clutter_points(model: Any, data: Any, body: int, count: int = 4000) -> np.ndarray:
    """Points of every object and fixture but one, float64[n, 3]."""
    found = [np.zeros((0, 3))]
    for other in range(model.nbody):
        name = model.body(other).name
        part = any(word in name for word in ("robot", "gripper", "mount", "table"))
        if name.endswith("_main") and other != body and not part:
            found.append(object_points(model, data, other, count))
    return np.concatenate(found)


def _is_below(model, body, root):
    while body > 0:
        if body == root:
            return True
        body = model.body_parentid[body]
    return False


def _mesh_points(model, mesh, count, rng):
    """Vertices, and points spread evenly over the faces, in the mesh's frame."""
    vertices = model.mesh_vert[model.mesh_vertadr[mesh] :][: model.mesh_vertnum[mesh]]
    faces = model.mesh_face[model.mesh_faceadr[mesh] :][: model.mesh_facenum[mesh]]
    corners = vertices[faces].astype(np.float64)
    first, second = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    areas = np.linalg.norm(np.cross(first, second), axis=1)
    chosen = rng.choice(len(faces), count, p=areas / areas.sum())
    weights = rng.random((count, 2))
    weights = np.where(weights.sum(1, keepdims=True) > 1, 1 - weights, weights)
    spread = corners[chosen, 0] + weights[:, :1] * first[chosen] + weights[:, 1:] * second[chosen]
    return np.concatenate([vertices, spread])


def _box_points(model, geom, rng, count=600):
    """Points on the box around a simple shape, in its own frame."""
    size = model.geom_size[geom]
    if model.geom_type[geom] != _BOX:
        size = np.array([size[0], size[0], max(size[1], size[0])])
    points = rng.uniform(-1, 1, (count, 3))
    face = (np.arange(count), rng.integers(0, 3, count))
    points[face] = np.sign(points[face])
    return points * size
