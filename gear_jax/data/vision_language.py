"""Vision-language records -> prompts and answers, and a model's answers -> numbers.

GEAR-VLA's pretraining has eleven types of them (Table 4); record_pool.py reads them from files.
Coordinates of a record are pixels of the original image. What is written and read is
Qwen2.5-VL's native form: JSON with absolute pixels of the image as the model sees it (systems.md
2.10). docs/vision_language.md shows one of each.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from gear_jax.data.images import Fit
from gear_jax.data.mask_overlay import COLOURS, check_mask, decode_mask
from gear_jax.data.tfrecord import DataError

MAX_TEXT = 32768  # characters
MAX_POINTS = 10_000
TRAJECTORY_LEN = 10
LETTERS = "ABCDEF"  # of options

_MOST = 1e6  # no pixel and no metre is farther away
_HALF_PAIR = re.compile("[\ud800-\udfff]")  # JSON can hold them, UTF-8 cannot

Coordinates = Literal["abs_resized", "norm1", "norm1000"]
Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class VisionLanguageSample:
    """One record as text.

    Attributes:
        prompt: what is asked.
        answer: what is to be said.
        overlay: (mask bool[H, W], colour) to mark in the first image, or None.
    """

    prompt: str
    answer: str
    overlay: tuple[np.ndarray, str] | None = None


# Fields of records: what each must be


def text_fault(value):
    """What is wrong with a text, in words, or None."""
    if not isinstance(value, str) or not value.strip():
        return "a text that is not empty"
    if _HALF_PAIR.search(value):
        return "a text that UTF-8 can hold"
    return None if len(value) <= MAX_TEXT else f"up to {MAX_TEXT} characters"


def _options(value):
    fine = isinstance(value, list) and 2 <= len(value) <= len(LETTERS)
    if not fine or any(map(text_fault, value)) or len(set(value)) < len(value):
        return f"a list of two to {len(LETTERS)} different texts"
    return None


def _numbers(count):
    def check(value):
        fine = isinstance(value, list) and 1 <= len(value) <= MAX_POINTS
        if not fine or not all(is_numbers(row, count) for row in value):
            return f"one to {MAX_POINTS} lists of {count} finite numbers, none beyond {_MOST:g}"
        return None

    return check


def is_numbers(row, count):
    """Whether it is a list of so many finite numbers of a sensible size."""
    return (
        isinstance(row, list)
        and len(row) == count
        and all(type(x) in (int, float) and abs(x) <= _MOST for x in row)  # False for nan
    )


def _boxes(value):
    wrong = _numbers(4)(value)
    if wrong is None and any(x2 <= x1 or y2 <= y1 for x1, y1, x2, y2 in value):
        return "boxes [x1, y1, x2, y2] with x1 < x2 and y1 < y2"
    return wrong


def _one_box(value):
    return _boxes(value) or (None if len(value) == 1 else "one box")


def _pose_box(value):
    return None if is_numbers(value, 9) else f"nine finite numbers, none beyond {_MOST:g}"


def _mask(value):
    try:
        check_mask(value if isinstance(value, dict) else {})
    except ValueError as error:
        return str(error)
    return None if any(value["counts"][1::2]) else "a mask that marks something"


def _colour(value):
    return None if isinstance(value, str) and value in COLOURS else f"one of {list(COLOURS)}"


# Numbers -> answers


def _dump(value):
    return json.dumps(value, ensure_ascii=False)


def _seen(points, fit: Fit, *, edge):
    """Pixels of the image -> whole pixels of the slot, rounded half up, inside the image."""
    sx, sy, dx, dy = fit.affine
    points = np.floor(np.asarray(points, np.float64) * [sx, sy] + [dx, dy] + 0.5)
    top, left, height, width = fit.box
    last = np.array([left + width, top + height]) - (0 if edge else 1)
    return np.clip(points, [left, top], last).astype(int).tolist()


def _write_points(record, fits):
    points = np.asarray(record["points"], np.float64)
    if record["type"] == "traj2d" and len(points) > TRAJECTORY_LEN:
        points = _along(points, TRAJECTORY_LEN)
    return _dump([{"point_2d": point} for point in _seen(points, fits[-1], edge=False)])


def _along(points, count):
    """As many points, evenly spaced along a path."""
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    length = np.concatenate([[0], np.cumsum(steps)])
    places = np.linspace(0, length[-1], count)
    if length[-1] == 0:
        return points[:count]
    return np.stack([np.interp(places, length, points[:, axis]) for axis in range(2)], axis=1)


def _write_boxes(record, fits):
    found = []
    for x1, y1, x2, y2 in record["boxes"]:
        (a, b), (c, d) = _seen([[x1, y1], [x2, y2]], fits[-1], edge=True)
        label = {"label": record["label"]} if "label" in record else {}
        found.append({"bbox_2d": [a, b, c, d], **label})
    return _dump(found[0] if len(found) == 1 else found)


def _hundredths(numbers):
    return [round(float(x), 2) + 0.0 for x in numbers]  # + 0.0: no minus before a zero


def _write_pose_box(record, fits):
    return _dump({"bbox_3d": _hundredths(record["bbox_3d"])})


def _write_points_3d(record, fits):
    return _dump([_hundredths(point) for point in record["points_3d"]])


def _write_text(record, fits):
    if "options" not in record:
        return record["answer"]
    if record["answer"] not in record["options"]:
        raise ValueError(f"answer {record['answer']!r} is none of the options")
    return LETTERS[record["options"].index(record["answer"])]


# Answers -> numbers

# The patterns never leave open how to divide a run of characters among their parts: the time to
# search a text grows with its length, whatever a model writes.
_NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
_LIST = rf"[(\[]\s*({_NUMBER}(?:\s*,\s*{_NUMBER})*)\s*[)\]]"
_TAG = re.compile(rf"""\bx[0-9]*=["']({_NUMBER})["']\s+y[0-9]*=["']({_NUMBER})["']""")
_ALONE = r"(?![\w'\u2019]|-\w)"  # no word goes on after the letter
_SAID = re.compile(rf"(?i:\banswer(?:\s{{1,3}}is)?)[^\w.]{{0,8}}([{LETTERS}]){_ALONE}")
_LETTER = re.compile(rf"(?<![\w'\u2019-])([{LETTERS}]){_ALONE}")


def _lists(text, count, key=None):
    """Bracketed lists of so many numbers; only those that follow the key, if it has any."""
    keyed = re.findall(rf"""["']{key}["']\s*:\s*{_LIST}""", text) if key else []
    found = [[float(x) for x in inner.split(",")] for inner in keyed or re.findall(_LIST, text)]
    return [row for row in found if is_numbers(row, count)]


def _read_points(text):
    tags = _TAG.findall(text) if "<point" in text else []
    points = [[float(x), float(y)] for x, y in tags]
    return _lists(text, 2, "point_2d") or [row for row in points if is_numbers(row, 2)] or None


def _read_boxes(text):
    boxes = _lists(text, 4, "bbox_2d")
    return [[x1, y1, x2, y2] for x1, y1, x2, y2 in boxes if x1 <= x2 and y1 <= y2] or None


def _read_pose_box(text):
    return next(iter(_lists(text, 9, "bbox_3d")), None)


def _read_points_3d(text):
    return _lists(text, 3) or None


def _read_text(text):
    return text.strip() or None


@dataclasses.dataclass(frozen=True)
class TaskType:
    """One of the eleven types.

    Attributes:
        prompts: wordings; names in braces are fields, {colour} the mask's colour.
        fields: {field: what is wrong with a value, or None}.
        optional: the same for fields that may be left out.
        images: least and greatest number of them.
        write: record and fits -> answer.
        read: answer -> numbers in the model's pixels, or None.
        pixels: number of coordinates in each of what is read that are pixels; 0 if none are.
    """

    prompts: tuple[str, ...]
    fields: Mapping[str, Callable[[Any], str | None]]
    write: Callable[[Record, Sequence[Fit]], str]
    read: Callable[[str], Any]
    pixels: int = 0
    optional: Mapping[str, Callable[[Any], str | None]] = dataclasses.field(default_factory=dict)
    images: tuple[int, int] = (1, 1)


_QA = TaskType(
    ("{question}",),
    {"question": text_fault, "answer": text_fault},
    _write_text,
    _read_text,
    optional={"options": _options},
    images=(1, 3),
)
TYPES: dict[str, TaskType] = {
    "general_vqa": _QA,
    "understanding_qa": _QA,
    "planning_qa": _QA,
    "traj2d": TaskType(
        (
            "Draw the path of the end effector in the image to do this: {instruction} Answer with "
            "up to 10 points in JSON.",
            "Where does the gripper move to do this: {instruction} List up to 10 points in JSON.",
        ),
        {"instruction": text_fault, "points": _numbers(2)},
        _write_points,
        _read_points,
        2,
    ),
    "traj3d": TaskType(
        (
            "Give the 3D path of the end effector in the camera frame, in metres, to do this: "
            "{instruction}",
        ),
        {"instruction": text_fault, "points_3d": _numbers(3)},
        _write_points_3d,
        _read_points_3d,
    ),
    "ground2d": TaskType(
        (
            "Locate every {label} in the image. Answer with boxes in JSON.",
            "Detect each {label} and answer with bounding boxes in JSON.",
        ),
        {"label": text_fault, "boxes": _boxes},
        _write_boxes,
        _read_boxes,
        4,
    ),
    "ground3d": TaskType(
        (
            "Give the 3D bounding box of the {label} in the camera frame: centre, size and "
            "roll, pitch, yaw in metres and radians, in JSON.",
        ),
        {"label": text_fault, "bbox_3d": _pose_box},
        _write_pose_box,
        _read_pose_box,
    ),
    "space_point": TaskType(
        ("{question} Answer with points in JSON.",),
        {"question": text_fault, "points": _numbers(2)},
        _write_points,
        _read_points,
        2,
    ),
    "object_point": TaskType(
        ("Point to the {label}. Answer in JSON.", "Where is the {label}? Answer with points."),
        {"label": text_fault, "points": _numbers(2)},
        _write_points,
        _read_points,
        2,
    ),
    "affordance": TaskType(
        ("Where should the gripper act to do this: {instruction} Answer with a box in JSON.",),
        {"instruction": text_fault, "boxes": _one_box},
        _write_boxes,
        _read_boxes,
        4,
    ),
    "mask_track": TaskType(
        ("Locate the object with the {colour}-colored mask.",),
        {"mask": _mask, "boxes": _one_box},
        _write_boxes,
        _read_boxes,
        4,
        optional={"color": _colour},
        images=(2, 2),
    ),
}


def make_sample(
    record: Record, fits: Sequence[Fit], rng: np.random.Generator
) -> VisionLanguageSample:
    """Prompt and answer of one record.

    Args:
        record: as `Pool.record` gives it.
        fits: of each image: how it lies in the slot that the model sees.
        rng: picks the wording, and the mask's colour if the record names none.

    Raises:
        DataError: coordinates outside the image, or a mask of another size.
    """
    kind, where = TYPES[record["type"]], f"record {record['id']!r}"
    fit = fits[-1]
    for field in ("points", "boxes"):
        for row in record.get(field, ()):
            inside = all(0 <= x <= fit.width for x in row[0::2]) and all(
                0 <= y <= fit.height for y in row[1::2]
            )
            if not inside:
                raise DataError(
                    f"{where}: {field} has {row}, outside the image of {fit.width} x {fit.height}"
                )
    prompt = kind.prompts[int(rng.integers(len(kind.prompts)))]
    marked = None
    if "mask" in record:
        mask = decode_mask(record["mask"])
        if mask.shape != (fits[0].height, fits[0].width):
            raise DataError(f"{where}: mask is {mask.shape}, its image "
                            f"{(fits[0].height, fits[0].width)}")  # fmt: skip
        drawn = list(COLOURS)[int(rng.integers(len(COLOURS)))]
        marked = mask, record.get("color", drawn)
    prompt = prompt.format(**record, colour=marked[1] if marked else "")
    if "options" in record:
        lines = [f"{LETTERS[i]}. {text}" for i, text in enumerate(record["options"])]
        prompt += "\n" + "\n".join(lines) + "\nAnswer with the letter."
    try:
        return VisionLanguageSample(prompt, kind.write(record, fits), marked)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error


def parse_answer(
    kind: str,
    text: str,
    fits: Sequence[Fit] = (),
    *,
    options: bool = False,
    coordinates: Coordinates = "abs_resized",
) -> Any:
    """What a model's answer says, in pixels of the original image; None if it says nothing.

    Never raises on any text: JSON, fences, tuples and point tags are all searched for numbers.

    Args:
        kind: a key of `TYPES`.
        text: the answer.
        fits: of the images, as in `make_sample`.
        options: the question was multiple choice: the letter is returned.
        coordinates: what the model speaks: pixels of the slot, or fractions or thousandths of the
            image's sides.

    Returns:
        Lists [[x, y], ...], [[x1, y1, x2, y2], ...], [[x, y, z], ...], nine numbers, a letter, or
        the text.
    """
    if options:
        said = _SAID.findall(text)
        letters = said[-1:] or _LETTER.findall(text)[:1]
        return letters[0] if letters else None
    task = TYPES[kind]
    found = task.read(text)
    if found is None or not task.pixels:
        return found
    return [_original(row, fits[-1], coordinates) for row in found]


def _original(row, fit, coordinates):
    sx, sy, dx, dy = fit.affine
    if coordinates != "abs_resized":
        whole = {"norm1": 1.0, "norm1000": 1000.0}[coordinates]
        sx, sy, dx, dy = whole / fit.width, whole / fit.height, 0.0, 0.0
    return [(x - (dy if i % 2 else dx)) / (sy if i % 2 else sx) for i, x in enumerate(row)]
