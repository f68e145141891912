"""What the names of LIBERO-Plus's tasks say (arXiv 2510.13626): the axis, and the task it perturbs.

The benchmark puts everything into the end of a task's name:

    camera      _view_344_0_100_0_0_initstate_0
    robot       _view_0_0_100_0_0_initstate_17
    language    _language_5_view_0_0_100_0_0_initstate_0
    noise       _view_0_0_100_0_0_initstate_0_noise_34
    light       _light_3
    background  _table_2 (table), _tb_12 (table and wall)
    layout      _level3_sample2, _moved_level1_sample1 (displaced), _add_10 (more objects)
"""

import re

SUITES = ("libero_plus_spatial", "libero_plus_object", "libero_plus_goal", "libero_plus_10")
# axis -> how many tasks each of SUITES has; 10,030 in all
TASKS = {
    "camera": (376, 396, 408, 419),
    "robot": (350, 398, 409, 393),
    "language": (390, 354, 410, 383),
    "light": (292, 297, 279, 274),
    "background": (258, 248, 281, 289),
    "noise": (351, 422, 379, 449),
    "layout": (385, 403, 425, 312),
}
AXES = tuple(TASKS)
TOTAL = sum(map(sum, TASKS.values()))
NO_VIEW = "0_0_100_0_0"

_END = re.compile(
    r"(?:_language_(?P<language>\d+))?_view_(?P<view>-?\d+_-?\d+_\d+_-?\d+_-?\d+)"
    r"_initstate_(?P<robot>\d+)(?:_noise_(?P<noise>\d+))?$"
    r"|_(?P<light>light)_\d+$"
    r"|_(?P<background>table|tb)_\d+$"
    r"|_(?P<layout>add_\d+|(?:moved_)?level\d+_sample\d+)$"
)


def split(name: str) -> tuple[str, str]:
    """LIBERO's task, and what of LIBERO-Plus stands behind it.

    Raises:
        ValueError: nothing of LIBERO-Plus does.
    """
    return name[: _match(name).start()], name[_match(name).start() :]


def axis_of(name: str) -> str:
    """One of `AXES`.

    Raises:
        ValueError: not the name of a LIBERO-Plus task, or one that perturbs none or two of them.
    """
    found = _match(name)
    axes = [one for one in ("language", "noise", "light", "background", "layout") if found[one]]
    if found["view"] is not None:
        axes += ["camera"] if found["view"] != NO_VIEW else []
        axes += ["robot"] if int(found["robot"]) else []
    if len(axes) != 1:
        raise ValueError(f"task {name!r} perturbs {axes or 'nothing'}: expected one of {AXES}")
    return axes[0]


def noise_of(name: str) -> int:
    """Number of the noise, 1 .. 50; 0 for none."""
    return int(_match(name)["noise"] or 0)


def num_tasks(axis: str, suite: str) -> int:
    """How many tasks of an axis the benchmark has in one of `SUITES`."""
    return TASKS[axis][SUITES.index(suite)]


def _match(name):
    found = _END.search(name)
    if not found or not found.start():
        raise ValueError(f"task {name!r} is none of LIBERO-Plus: expected an end such as _light_3")
    return found
