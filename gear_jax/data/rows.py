"""What a row of the standardisation table can say, and how one is chosen, written and read.

A row declares where each canonical track lies under a data set's own keys and in which convention;
`standardize.standard_episode` obeys it. Rows of public data sets: standard_rows.py.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from gear_jax.data import images as images_lib
from gear_jax.data.embodiments import embodiment
from gear_jax.data.kinematics import Kinematics
from gear_jax.data.sources.base import RawEpisode
from gear_jax.types import VIEWS, Image

Rotation = Literal[
    "wxyz", "xyzw", "rotvec", "euler_xyz_extrinsic", "euler_xyz_intrinsic", "euler_zyx_intrinsic"
]


@dataclasses.dataclass(frozen=True)
class Pose:
    """Where an end-effector pose lies: columns, and what their numbers mean.

    Attributes:
        position: column of three numbers.
        rotation: column of three or four numbers.
        convention: how they say a rotation.
        metres: one unit of position in metres.
        turn: rotation matrix, row by row, applied on the right: R_base_ee = R_recorded @ turn.
    """

    position: str
    rotation: str
    convention: Rotation
    metres: float = 1.0
    turn: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Gripper:
    """Where an opening lies, and which numbers are closed and open.

    Attributes:
        column: of one number.
        closed: the number of a closed gripper.
        open: the number of an open one.
        sense: "absolute"; "change": closed and open are commands, anything near their middle keeps
            what was (RT-1); "settle": values between wait for the next settled one (Bridge).
    """

    column: str
    closed: float
    open: float
    sense: Literal["absolute", "change", "settle"] = "absolute"


@dataclasses.dataclass(frozen=True)
class ArmRow:
    """Where one arm's tracks lie; None for what is not recorded.

    Attributes:
        pose: achieved end-effector pose.
        joints: column of joint positions, radians.
        grip_open: achieved opening.
        grip_cmd: commanded opening.
        kinematics: of a robot that records joints only; the user gives the model.
    """

    pose: Pose | None = None
    joints: str | None = None
    grip_open: Gripper | None = None
    grip_cmd: Gripper | None = None
    kinematics: Kinematics | None = None


@dataclasses.dataclass(frozen=True)
class ViewRow:
    """Where one view's images lie.

    Attributes:
        key: of the images.
        present: key of a flag that says whether this episode has them.
        bgr: stored with red and blue exchanged.
        upside_down: stored turned by 180 degrees, or from the bottom row up (`flipped`).
        flipped: rows stored from the bottom up.
    """

    key: str
    present: str | None = None
    bgr: bool = False
    upside_down: bool = False
    flipped: bool = False

    def open(self, raw: RawEpisode, skip: int) -> Sequence[bytes | Image]:
        """Images of this view, RGB and upright, without the first `skip`."""
        images = raw.images(self.key)
        if not (skip or self.bgr or self.upside_down or self.flipped):
            return images
        return _StandardView(images, self, skip)


@dataclasses.dataclass(frozen=True)
class Row:
    """How one data set becomes canonical.

    Attributes:
        name: of the data set.
        embodiment: name in data/embodiments.py.
        fps: steps per second; None where the source itself says it (LeRobot, mp4).
        arms: {arm of `ARMS`: ArmRow}; none for video without actions.
        views: {view of `VIEWS`: ViewRow}.
        instruction: text keys; the first that is not empty counts.
        needs_instruction: leave out episodes without one.
        keep: key of a flag that an episode must have set, such as "success".
        keep_text: (text key, part that it must contain).
        skip_first: steps left out at the beginning.
        clock: key of time stamps, which must grow.
        truth: where each of these facts stands.
    """

    name: str
    embodiment: str
    fps: float | None
    arms: Mapping[str, ArmRow]
    views: Mapping[str, ViewRow]
    instruction: tuple[str, ...] = ()
    needs_instruction: bool = False
    keep: str | None = None
    keep_text: tuple[str, str] | None = None
    skip_first: int = 0
    clock: str | None = None
    truth: str = ""

    def __post_init__(self):
        """Names must be of the house's lists.

        Raises:
            ValueError: unknown arm, view, embodiment, or an arm that the robot does not have.
        """
        faults = [f"view {view!r}, expected {VIEWS}" for view in self.views if view not in VIEWS]
        try:
            robot = embodiment(self.embodiment)
            faults += [
                f"arm {arm!r}, which {robot.name} does not have: expected {list(robot.joints)}"
                for arm in self.arms
                if arm not in robot.joints
            ]
        except KeyError as error:
            faults.append(error.args[0])
        if self.fps is not None and not 0 < self.fps <= 1000:
            faults.append(f"fps {self.fps}, expected 0 .. 1000")
        if faults:
            raise ValueError(f"row {self.name!r}: {'; '.join(faults)}")


class _StandardView(Sequence):
    """Images of one view, RGB and upright; decoded only where a correction needs it."""

    def __init__(self, images: Sequence[bytes | Image], how: ViewRow, skip: int):
        self.images, self.how, self.skip = images, how, skip

    def __len__(self) -> int:
        return len(self.images) - self.skip

    def __getitem__(self, step):
        if not 0 <= step < len(self):
            raise IndexError(step)
        image = self.images[step + self.skip]
        how = self.how
        if not (how.bgr or how.upside_down or how.flipped):
            return image
        image = images_lib.decode(image)
        if how.upside_down:
            image = image[::-1, ::-1]
        if how.flipped:
            image = image[::-1]
        return np.ascontiguousarray(image[..., ::-1] if how.bgr else image)


# Choosing and making rows


def choose_row(rows: Mapping[str, Callable[..., Row]], name: str, **options: Any) -> Row:
    """The row of a data set, with its options.

    Args:
        rows: {name: function of its options}.
        name: of the data set.
        **options: what the row leaves open; accepted values are those of its `Literal`s.

    Raises:
        ValueError: unknown data set, option or value, or one that must be given and is not.
    """
    if name not in rows:
        raise ValueError(f"data set {name!r} has no row: expected one of {sorted(rows)}")
    hints = typing.get_type_hints(rows[name])
    hints.pop("return", None)
    needed = set(hints) - set(rows[name].__kwdefaults__ or {})
    faults = [f"option {key!r} is unknown, expected one of {sorted(hints)}"
              for key in options if key not in hints]  # fmt: skip
    faults += [f"option {key!r} must be given" for key in sorted(needed - set(options))]
    for key in set(options) & set(hints):
        accepted = typing.get_args(hints[key])
        if typing.get_origin(hints[key]) is Literal and options[key] not in accepted:
            faults.append(f"option {key!r} is {options[key]!r}, expected one of {accepted}")
    if faults:
        raise ValueError(f"data set {name!r}: {'; '.join(faults)}")
    return rows[name](**options)


def with_kinematics(row: Row, chains: Mapping[str, Kinematics]) -> Row:
    """The same row with forward kinematics for arms that record joints only.

    Raises:
        ValueError: an arm that the row does not have, or that has poses or no joints.
    """
    arms = dict(row.arms)
    for name, chain in chains.items():
        if name not in arms or arms[name].joints is None or arms[name].pose is not None:
            raise ValueError(f"row {row.name!r}: arm {name!r} is not one that records joints only")
        arms[name] = dataclasses.replace(arms[name], kinematics=chain)
    return dataclasses.replace(row, arms=arms)


def row_from_json(stored: Any) -> Row:
    """A row written as JSON: the fields of `Row`, `ArmRow`, `ViewRow`, `Pose`, `Gripper`.

    Raises:
        ValueError: unknown or missing fields, or values of another kind, with their path.
    """
    return _from_json(Row, stored, "row")


def row_to_json(row: Row) -> dict[str, Any]:
    """The inverse of `row_from_json`."""
    return dataclasses.asdict(row)


def _from_json(kind, stored, path):
    """Plain data -> an instance of `kind`, a type annotation of the rows' fields."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if stored is None and type(None) in args:
            return None
        return _from_json(next(a for a in args if a is not type(None)), stored, path)
    if dataclasses.is_dataclass(kind):
        if not isinstance(stored, Mapping):
            raise ValueError(f"{path} is {stored!r}, expected an object")
        hints = typing.get_type_hints(kind)
        unknown = sorted(set(stored) - set(hints))
        if unknown:
            raise ValueError(f"{path}: unknown fields {unknown}, expected some of {list(hints)}")
        values = {k: _from_json(hints[k], v, f"{path}.{k}") for k, v in stored.items()}
        try:
            return typing.cast(Any, kind)(**values)
        except TypeError as error:
            raise ValueError(f"{path}: {error}") from error
    if origin is Literal:
        if stored not in args:
            raise ValueError(f"{path} is {stored!r}, expected one of {args}")
        return stored
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(stored, Mapping):
            raise ValueError(f"{path} is {stored!r}, expected an object")
        return {k: _from_json(args[1], v, f"{path}.{k}") for k, v in stored.items()}
    if origin is tuple:
        if not isinstance(stored, Sequence) or isinstance(stored, str):
            raise ValueError(f"{path} is {stored!r}, expected a list")
        kinds = args[:1] * len(stored) if args[-1] is ... else args
        if len(kinds) != len(stored):
            raise ValueError(f"{path} has {len(stored)} entries, expected {len(kinds)}")
        return tuple(_from_json(k, v, f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, stored, strict=True)))  # fmt: skip # noqa: E501
    if kind is float and type(stored) is int:
        return float(stored)
    if not isinstance(stored, kind) or (kind is not bool and isinstance(stored, bool)):
        raise ValueError(f"{path} is {stored!r}, expected {kind.__name__}")
    return stored
