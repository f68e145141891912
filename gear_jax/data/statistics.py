"""Action chunks and states -> exact statistics, the normalisation they give, and the gate.

    chunks, masks -> Accumulator -> Summary -> Statistics -> normalised actions and states

Only low-dimensional arrays enter, no image is touched. Accumulators of parts, from any number of
workers or hosts and in any order, merge into that of the whole. `check` says what makes statistics
unfit to train on. Decisions: systems.md 2.1, data.md 3.3.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from gear_jax.data.accumulator import FIELDS, Summary
from gear_jax.data.tfrecord import DataError
from gear_jax.types import ARM_PARTS, ARMS, ActionSpec

VERSION = 1
HORIZON = (1, 10, 20, 30)  # rows of a chunk that the report shows
IDENTITY_RMAT6D = (1, 0, 0, 0, 1, 0)  # by columns and by rows alike

STILL = 1e-9  # q99 - q01 of an axis that does not move
SMALLEST_TURN = 0.05  # of an entry of rmat6d, about radians: what turns less is hardly magnified


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of a data set, of an embodiment, or of all.

    Attributes:
        name: of the data set or embodiment, or "all".
        spec_digest: `ActionSpec.digest()` of the chunks.
        sources: data set name -> digest of what was read.
        fps: steps per second; None where rates differ.
        num_episodes: read.
        num_steps: read.
        action: of shape [A, a], per horizon step, in the units of the spec, not normalised.
        action_all: of shape [a], all horizon steps pooled.
        state: name -> of shape [R, ...], such as "ee_pos" [R, 3], "joint_pos" [R, J],
            "grip_open" [R].
    """

    name: str
    spec_digest: str
    sources: Mapping[str, str]
    fps: float | None
    num_episodes: int
    num_steps: int
    action: Summary
    action_all: Summary
    state: Mapping[str, Summary]

    def to_json(self) -> str:
        """Canonical JSON with its digest, NaN as null; `from_json` is the exact inverse."""
        return _canonical({**self._body(), "digest": self.digest()})

    def digest(self) -> str:
        """Hex sha256 over canonical JSON: equal statistics, equal digests, on any machine."""
        return hashlib.sha256(_canonical(self._body()).encode()).hexdigest()

    def _body(self):
        body = {name: getattr(self, name) for name in _ACCEPTED}
        body |= {name: _plain(getattr(self, name)) for name in ("action", "action_all")}
        body["state"] = {part: _plain(summary) for part, summary in self.state.items()}
        return {"version": VERSION, **body, "sources": dict(self.sources)}

    @classmethod
    def from_json(cls, text: str, where: str = "statistics") -> "Statistics":
        """The inverse of `to_json`.

        Raises:
            DataError: one sentence that starts with `where` and names the key.
        """
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise DataError(f"{where}: not JSON: {error}") from error
        version = raw.get("version") if isinstance(raw, dict) else None
        if version != VERSION:
            raise DataError(f"{where}: 'version' is {version!r}, expected {VERSION}")
        known = {"version", "digest", "action", "action_all", *_ACCEPTED}
        for key in sorted(known ^ raw.keys()):
            raise DataError(f"{where}: {key!r} is {'missing' if key in known else 'not known'}")
        for key, accepted in _ACCEPTED.items():
            if type(raw[key]) not in accepted:
                names = " or ".join(one.__name__ for one in accepted)
                raise DataError(f"{where}: {key!r} is {raw[key]!r}, expected {names}")
        fields = {key: raw[key] for key in _ACCEPTED}
        for key in ("action", "action_all"):
            fields[key] = _read_summary(raw[key], f"{where}: {key!r}")
        fields["state"] = {part: _read_summary(summary, f"{where}: 'state', {part!r}")
                           for part, summary in raw["state"].items()}  # fmt: skip
        steps, pooled = fields["action"].count.shape, fields["action_all"].count.shape
        if len(steps) != 2 or steps[1:] != pooled:
            raise DataError(
                f"{where}: 'action' is {steps} and 'action_all' {pooled}, expected [A, a] and [a]"
            )
        for part, summary in fields["state"].items():
            if summary.count.shape[:1] != (len(ARMS),):
                raise DataError(
                    f"{where}: 'state', {part!r} is {summary.count.shape}, expected [R, ...]"
                )
        made = cls(**fields)
        if raw["digest"] != made.digest():
            raise DataError(f"{where}: 'digest' is {raw['digest']!r}, but of what is there "
                            f"{made.digest()!r}: changed by hand")  # fmt: skip
        return made

    def save(self, path: str | os.PathLike) -> None:
        """Write `to_json` to a file, whole or not at all."""
        path = pathlib.Path(path)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(self.to_json() + "\n")
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Statistics":
        """The inverse of `save`.

        Raises:
            DataError: one sentence that names file and key.
            FileNotFoundError: no such file.
        """
        return cls.from_json(pathlib.Path(path).read_text(), str(path))


_ACCEPTED = {
    "name": (str,),
    "spec_digest": (str,),
    "sources": (dict,),
    "fps": (float, int, type(None)),
    "num_episodes": (int,),
    "num_steps": (int,),
    "state": (dict,),
}


def _canonical(plain: Any) -> str:
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _plain(summary):
    """`Summary` -> nested lists, NaN as None."""
    arrays = {name: getattr(summary, name) for name in FIELDS}
    return {name: np.where(np.isnan(x), None, x).tolist() for name, x in arrays.items()}


def _read_summary(raw, where):
    """The inverse of `_plain`."""
    arrays = {}
    for name in FIELDS:
        if not isinstance(raw, dict) or name not in raw:
            raise DataError(f"{where}: {name!r} is missing")
        try:
            arrays[name] = np.array(raw[name], np.int64 if name == "count" else np.float64)
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{where}: {name!r} is not an array of numbers") from error
        if arrays[name].shape != arrays["count"].shape:
            raise DataError(f"{where}: {name!r} is {arrays[name].shape}, but 'count' "
                            f"{arrays['count'].shape}")  # fmt: skip
    return Summary(**arrays)


# --- normalisation (systems.md 2.1) ---


def normalize_action(action, statistics: Statistics, spec: ActionSpec):
    """Action as the towers see it; `denormalize_action` is the inverse.

    Position from q01 .. q99 of all horizon steps to -1 .. 1, not clipped; an axis that does not
    move is centred only. rmat6d minus that of no turn, divided by one number for each arm: the
    largest of its q01 and q99, `SMALLEST_TURN` at least. One second's turns are often a few
    degrees; beside noise of unit variance, and in FAST's steps, they would be lost. Gripper from
    0 .. 1 to -1 .. 1. Elementwise: what a mask hides is the caller's to zero.

    Args:
        action: float[..., A, a], in the units of `spec`.
        statistics: their `action_all` counts.
        spec: the layout.

    Returns:
        float32[..., A, a] if `action` is float32, else float64.
    """
    centre, half = _action_scale(statistics, spec)
    return _like(action, (np.asarray(action, np.float64) - centre) / half)


def denormalize_action(action, statistics: Statistics, spec: ActionSpec):
    """The inverse of `normalize_action`: float[..., A, a], in the units of `spec`."""
    centre, half = _action_scale(statistics, spec)
    return _like(action, np.asarray(action, np.float64) * half + centre)


def normalize_state(value, summary: Summary):
    """State part float[..., *D] from q01 .. q99 to -1 .. 1, clipped to -1.5 .. 1.5."""
    centre, half = _scale(summary.q01, summary.q99)
    return _like(value, np.clip((np.asarray(value, np.float64) - centre) / half, -1.5, 1.5))


def _scale(low, high):
    """Centre and half range; half range 1 where there is no range, centre 0 where no data."""
    half = np.where(high - low >= STILL, (high - low) / 2, 1.0)
    return np.nan_to_num((low + high) / 2), half


def _action_scale(statistics, spec):
    centre, half = np.zeros(spec.action_dim), np.ones(spec.action_dim)
    low, high = statistics.action_all.q01, statistics.action_all.q99
    for arm in spec.arms:
        dims = spec.dims(arm, "position")
        centre[dims], half[dims] = _scale(low[dims], high[dims])
        dims = spec.dims(arm, "rmat6d")
        turns = [abs(found[dims] - IDENTITY_RMAT6D) for found in (low, high)]
        centre[dims], half[dims] = IDENTITY_RMAT6D, np.nanmax([SMALLEST_TURN, *np.ravel(turns)])
        centre[spec.dims(arm, "gripper")] = half[spec.dims(arm, "gripper")] = 0.5
    return centre, half


def _like(given, result):
    return result.astype(np.float32) if np.asarray(given).dtype == np.float32 else result


# --- the gate ---

_DIM_NAMES = tuple(
    f"{arm} {part}" + ("" if part == "gripper" else f" {'xyz'[i] if part == 'position' else i}")
    for arm in ARMS
    for part, dims in ARM_PARTS.items()
    for i in range(dims.stop - dims.start)
)


def require_valid(statistics: Statistics, spec: ActionSpec) -> None:
    """Stop before training on statistics that are unfit for it.

    Raises:
        DataError: all that `check` finds, in one message.
    """
    if faults := check(statistics, spec):
        raise DataError(f"statistics of {statistics.name!r}: {'; '.join(faults)}")


def check(statistics: Statistics, spec: ActionSpec) -> list[str]:
    """What makes statistics unfit to train on: a sentence each, the dim and horizon step named.

    Rotations are not looked at but for their spec: they are scaled together, and by no more than
    1 / `SMALLEST_TURN`. A dim that no entry has, such as an absent arm's, is no fault.
    """
    if statistics.spec_digest != spec.digest():
        return [f"made for another action spec: digest {statistics.spec_digest}, expected "
                f"{spec.digest()}"]  # fmt: skip
    if statistics.action.count.shape != (spec.chunk_len, spec.action_dim):
        return [f"actions are {statistics.action.count.shape}, expected "
                f"{(spec.chunk_len, spec.action_dim)}"]  # fmt: skip
    if not statistics.num_steps or not statistics.action_all.count.any():
        return ["no data"]
    faults = []
    rows = {name: np.vstack([getattr(statistics.action_all, name),
                             getattr(statistics.action, name)]) for name in FIELDS}  # fmt: skip
    for arm in spec.arms:
        for part, rules in (("position", _position_rules), ("gripper", _gripper_rules)):
            for dim in range(spec.action_dim)[spec.dims(arm, part)]:
                column = Summary(**{name: rows[name][:, dim] for name in FIELDS})
                faults += _broken(rules(column), column, _DIM_NAMES[dim])
    for name, column in _state_columns(statistics):
        faults += _broken(_quantile_rules(column), column, name)
    return faults


def _state_columns(statistics):
    """(name, Summary [1]) of every column of every state part that was seen."""
    for part, summary in statistics.state.items():
        for index in np.argwhere(summary.count).tolist():
            words = ["xyz"[i] if part == "ee_pos" else str(i) for i in index[1:]]
            column = {name: getattr(summary, name)[tuple(index)][None] for name in FIELDS}
            yield " ".join([ARMS[index[0]], part, *words]), Summary(**column)


def _broken(rules, column, name):
    """A sentence per broken rule, on the first row that breaks it."""
    faults = []
    for sentence, broken in rules.items():
        if not broken.any():
            continue
        row, where = int(np.argmax(broken)), name
        if row:
            where += f", horizon step {row}"
            where += f" and {broken.sum() - 1} more" if broken.sum() > 1 else ""
        values = {field: getattr(column, field)[row] for field in FIELDS}
        faults.append(f"{where}: {sentence.format(**values)}")
    return faults


# A rule is a sentence and where it is broken: bool[rows], row 0 all horizon steps pooled.


def _position_rules(s):
    reach = np.maximum(np.abs(s.q01), np.abs(s.q99))
    return {
        **_spread_rules(s),
        "q01 {q01:g} and q99 {q99:g} m, more than 2 m within a second: units?": reach > 2,
        **_quantile_rules(s),
    }


def _gripper_rules(s):
    pooled = np.arange(len(s.count)) == 0
    outside = (s.min < -1e-6) | (s.max > 1 + 1e-6)
    return {
        **{sentence: broken & pooled for sentence, broken in _spread_rules(s).items()},
        "from {min:g} to {max:g}, expected 0 closed .. 1 open": outside,
        "at most {max:g}, never opens": pooled & (s.max < 0.5),
        "at least {min:g}, never closes": pooled & (s.min > 0.5),
    }


def _spread_rules(s):
    return {
        "always {min:g}": s.min == s.max,
        "q01 {q01:g} is not below q99 {q99:g}": (s.q01 >= s.q99) & (s.std > 0),
    }


def _quantile_rules(s):
    # A deviation here is the std of a normal column with these quantiles: one outlier among n
    # widens the std itself so far that none lies beyond sqrt(n) of it.
    spread, middle = s.q99 - s.q01, (s.q01 + s.q99) / 2
    far = np.maximum(s.max - middle, middle - s.min)
    unsure = (s.rank_error > 1e-3) & (s.value_error > 1e-3 * spread)
    return {
        "from {min:g} to {max:g}, more than 1000 deviations from q01 {q01:g} and q99 {q99:g}: "
        "outliers?": (spread > 0) & (far > 1000 * spread / 4.65),
        "q01 and q99 are only known within {value_error:g}, {rank_error:.1%} of the entries":
        unsure,
    }  # fmt: skip


def report(statistics: Statistics) -> str:
    """A table to read: actions, how positions spread over the horizon, and states."""
    fields = ("count", "mean", "std", "min", "q01", "q99", "max")
    rate = "several rates" if statistics.fps is None else f"{statistics.fps:g} Hz"
    lines = [
        f"{statistics.name}: {statistics.num_episodes} episodes, {statistics.num_steps} steps, "
        f"{rate}",
        "",
        _line("action, all steps", fields),
    ]
    actions = statistics.action_all
    for dim, name in enumerate(_DIM_NAMES):
        lines.append(_line(name, [getattr(actions, field)[dim] for field in fields]))
    steps = [step for step in HORIZON if step <= len(statistics.action.std)]
    lines += ["", _line("std at horizon step", steps)]
    for dim, name in enumerate(_DIM_NAMES):
        if "position" in name:
            lines.append(_line(name, [statistics.action.std[step - 1, dim] for step in steps]))
    lines += ["", _line("state", fields)]
    for name, column in _state_columns(statistics):
        lines.append(_line(name, [getattr(column, field)[0] for field in fields]))
    return "\n".join(lines) + "\n"


def _line(name, cells):
    shown = (
        x if isinstance(x, str) else str(x) if isinstance(x, (int, np.integer))
        else "-" if np.isnan(x) else f"{x:.5g}"
        for x in cells
    )  # fmt: skip
    return f"{name:<20}" + "".join(f"{cell:>12}" for cell in shown)
