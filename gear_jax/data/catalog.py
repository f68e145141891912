"""A data set by its description: where it lies, in which format, and by which row it is read.

    entry = DatasetConfig(path="droid/1.0.0", row="droid", work="runs/data/droid")
    prepared = open_prepared(entry)

What is derived from a data set (the byte-range index, the prepared tracks) goes to `work`; the data
set's own folder is never written to.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from gear_jax.data import tfrecord_index
from gear_jax.data.kinematics import Kinematics
from gear_jax.data.prepared import Prepared, prepare
from gear_jax.data.rlds_features import load_json
from gear_jax.data.rows import Row, choose_row, row_from_json, row_to_json, with_kinematics
from gear_jax.data.sources.base import Source
from gear_jax.data.sources.hdf5 import Hdf5Source
from gear_jax.data.sources.lerobot import LeRobotSource
from gear_jax.data.sources.reach import ReachSource
from gear_jax.data.sources.rlds import ArrayRecordSource, RldsSource
from gear_jax.data.sources.shapes import ShapesSource
from gear_jax.data.sources.video_folder import VideoFolderSource
from gear_jax.data.standard_rows import ROWS
from gear_jax.data.tfrecord import DataError

Format = Literal["rlds", "array_record", "lerobot", "hdf5", "video", "shapes", "reach"]


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """One data set.

    Attributes:
        path: its folder.
        row: name in `standard_rows.ROWS`, or path of a JSON file with a row of one's own.
        work: folder for what is derived from it.
        format: None: told by its metadata files.
        split: of RLDS.
        layout: of HDF5; a key of `sources.hdf5.LAYOUTS`.
        drawing: fields of `ShapesSource` or `ReachSource`, for "shapes" and "reach"; their path is
            only a name.
        options: of the row.
        kinematics: {arm: fields of `Kinematics`} of a robot that records joints only.
        budget: greatest fraction of episodes that may be dropped for damage.
    """

    path: str
    row: str
    work: str
    format: Format | None = None
    split: str = "train"
    layout: str | None = None
    drawing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kinematics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    budget: float = 0.01


def open_source(config: DatasetConfig, *, num_workers: int = 1) -> Source:
    """The recordings as they are; an RLDS data set is indexed first where it is not yet.

    Raises:
        DataError: unreadable, or a format that has to be given.
    """
    kind = config.format or detect_format(config.path)
    if kind == "rlds":
        target = pathlib.Path(config.work) / f"index-{config.split}"
        try:
            return RldsSource(config.path, config.split, target)
        except DataError:  # none yet, or of other data: building says what is wrong with these
            tfrecord_index.build(config.path, config.split, target, num_workers=num_workers)
            return RldsSource(config.path, config.split, target)
    if kind == "array_record":
        return ArrayRecordSource(config.path, config.split)
    if kind == "lerobot":
        return LeRobotSource(config.path)
    if kind == "video":
        return VideoFolderSource(config.path)
    if kind == "shapes":
        return ShapesSource(**config.drawing)
    if kind == "reach":
        return ReachSource(**config.drawing)
    if config.layout is None:
        raise DataError(f"{config.path}: HDF5 needs a layout")
    return Hdf5Source(config.path, config.layout)


def detect_format(path: str) -> Format:
    """What the metadata files of a folder say it is.

    Raises:
        DataError: they say nothing.
    """
    folder = pathlib.Path(path)
    if (folder / "dataset_info.json").is_file():
        info = load_json(folder / "dataset_info.json")
        kind = info.get("fileFormat") if isinstance(info, dict) else None
        if kind in ("tfrecord", "array_record"):
            return "rlds" if kind == "tfrecord" else "array_record"
        raise DataError(f"{folder}: file format {kind!r}, expected tfrecord or array_record")
    if (folder / "meta" / "info.json").is_file():
        return "lerobot"
    raise DataError(
        f"{folder}: neither dataset_info.json (RLDS) nor meta/info.json (LeRobot) is there: give "
        "the format: hdf5 or video, or the folder one level deeper"
    )


def row_options(texts: Sequence[str]) -> dict[str, Any]:
    """Options of a row from KEY=VALUE, numbers as such; `choose_row` checks them."""
    options: dict[str, Any] = {}
    for text in texts:
        key, _, value = text.partition("=")
        try:
            options[key] = float(value)
        except ValueError:
            options[key] = value
    return options


def open_row(config: DatasetConfig) -> Row:
    """The row of a data set, with its options and kinematics.

    Raises:
        DataError: an unreadable JSON row.
        ValueError: unknown row, option or field.
    """
    if config.row.endswith(".json"):
        if config.options:
            raise ValueError(f"{config.row}: a row of one's own has no options")
        try:
            row = row_from_json(load_json(pathlib.Path(config.row)))
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            raise ValueError(f"{config.row}: {error}") from error
    else:
        row = choose_row(ROWS, config.row, **config.options)
    chains = {
        arm: Kinematics(chain["model"], chain["base"], chain["tip"], tuple(chain["joints"]))
        for arm, chain in config.kinematics.items()
    }
    return with_kinematics(row, chains) if chains else row


def open_prepared(
    config: DatasetConfig,
    *,
    num_workers: int = 1,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Prepared:
    """The data set ready for training; it is prepared first where it is not yet, or has changed.

    Args:
        config: which.
        num_workers: processes for indexing and preparing.
        report: called with episodes done and in all.

    Raises:
        DataError: a fatal fault, or more dropped than the budget.
    """
    source, row = open_source(config, num_workers=num_workers), open_row(config)
    target = pathlib.Path(config.work) / "prepared"
    try:
        prepared = Prepared(target, source)
        if json.dumps(row_to_json(prepared.row)) == json.dumps(row_to_json(row)):
            return prepared
    except (DataError, OSError):
        pass  # none yet, or of other data
    prepare(
        source,
        row,
        target,
        budget=config.budget,
        num_workers=num_workers,
        report=lambda done: report(done, len(source)),
    )
    return Prepared(target, source)
