"""What an evaluation found, one line an episode, in a folder that outlives any kill.

    protocol.json             how episodes are run, who runs them, and the digest of each
    episodes-<host>.jsonl     appended by one host, on disk before the next episode counts
    timings-<host>.jsonl      how long they took; no part of the result
    ledger.jsonl              all episodes, sorted: the same bytes however they came about
    summary.json              success by task, suite and in total

A row carries the digests of protocol and policy, so rows of different experiments never mix.
"""

import fcntl
import hashlib
import json
import os
import pathlib
import secrets
from collections.abc import Collection, Mapping
from typing import Any

from gear_jax.evals import statistics
from gear_jax.evals.episodes import Episode, canonical, json_digest

_FIELDS = {
    "suite": str, "task": str, "init": int, "success": bool, "steps": int, "queries": int,
    "protocol": str, "policy": str,
}  # fmt: skip


class Ledger:
    """The writer's side: one host's file."""

    def __init__(self, directory, protocol, policy, *, host: int = 0):
        """Begin an evaluation, or go on with one; a torn last line of this host is cut off.

        Args:
            directory: of the evaluation.
            protocol: how episodes are run, plain JSON.
            policy: who runs them, plain JSON.
            host: number of this process.

        Raises:
            ValueError: begun under another protocol or policy, faulty, or being written elsewhere.
        """
        self.directory = pathlib.Path(directory)
        self.digests = {"protocol": json_digest(protocol), "policy": json_digest(policy)}
        self.directory.mkdir(parents=True, exist_ok=True)
        record = {"protocol": protocol, "policy": policy, "digests": self.digests}
        path = self.directory / "protocol.json"
        if not path.exists():
            write(path, json.dumps(record, indent=1, sort_keys=True) + "\n")
        _refuse_other(self.directory, record, open_record(self.directory))
        self.rows = read(self.directory)[0]
        path = self.directory / f"episodes-{host}.jsonl"
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._file)
            raise ValueError(f"{path} is being written by another process") from error
        whole = path.read_bytes().rfind(b"\n") + 1
        if whole < path.stat().st_size:
            os.ftruncate(self._file, whole)
        self._timings = open(self.directory / f"timings-{host}.jsonl", "a", buffering=1)  # noqa: SIM115

    def add(self, episode: Episode, *, success: bool, steps: int, queries: int) -> None:
        """Append an episode; on disk when this returns."""
        row = {**episode._asdict(), "success": success, "steps": steps, "queries": queries}
        row |= self.digests
        _put(self.rows, row, self.directory)
        line = (canonical(row) + "\n").encode()
        while line:
            line = line[os.write(self._file, line) :]
        os.fsync(self._file)

    def add_timing(self, episode: Episode, seconds: Mapping[str, float]) -> None:
        """Append how long an episode took, beside the ledger."""
        shown = {name: round(value, 4) for name, value in seconds.items()}
        self._timings.write(canonical(episode._asdict() | shown) + "\n")

    def close(self) -> None:
        """Let another process write."""
        os.close(self._file)
        self._timings.close()


def read(directory) -> tuple[dict[Episode, dict[str, Any]], int]:
    """Rows of all hosts by episode, sorted, and how many torn last lines were left out.

    Raises:
        ValueError: no ledger, a line that is no row, rows of another experiment, or an episode
            that ended in two ways.
    """
    directory = pathlib.Path(directory)
    digests = open_record(directory)["digests"]
    rows: dict[Episode, dict[str, Any]] = {}
    torn = 0
    for path in sorted(directory.glob("episodes-*.jsonl")):
        *lines, last = path.read_bytes().split(b"\n")
        torn += bool(last)
        for number, line in enumerate(lines, 1):
            row = _row(line, f"{path} line {number}")
            if any(row[key] != digests[key] for key in digests):
                raise ValueError(f"{path} line {number} belongs to another protocol or policy")
            _put(rows, row, path)
    return dict(sorted(rows.items())), torn


def finish(directory) -> dict[str, Any]:
    """Write ledger.jsonl and summary.json; returns the summary."""
    directory = pathlib.Path(directory)
    rows, _ = read(directory)
    text = "".join(canonical(row) + "\n" for row in rows.values())
    digest = hashlib.sha256(text.encode()).hexdigest()
    write(directory / "ledger.jsonl", text)
    summary = statistics.summarize(rows) | {
        "ledger_sha256": digest,
        **open_record(directory)["digests"],
    }
    write(directory / "summary.json", json.dumps(summary, indent=1, sort_keys=True) + "\n")
    return summary


def compare(first, second) -> dict[str, Any]:
    """`statistics.compare` of two folders.

    Raises:
        ValueError: run under different protocols; policies may differ.
    """
    there, here = open_record(first), open_record(second)
    if there["digests"]["protocol"] != here["digests"]["protocol"]:
        raise ValueError(
            f"{first} and {second} were run under different protocols: "
            + _differences(there["protocol"], here["protocol"], "in the first", "in the second")
        )
    return statistics.compare(read(first)[0], read(second)[0])


def merge(directories, may_differ: Collection[str] = ()) -> dict[Episode, dict[str, Any]]:
    """Rows of several folders of one policy, such as one of each suite.

    Args:
        directories: of the evaluations.
        may_differ: keys of what the simulator says of itself; name, options and tasks may anyway.

    Raises:
        ValueError: two policies, other protocols, or an episode that ended in two ways.
    """
    rows: dict[Episode, dict[str, Any]] = {}
    first: tuple[Any, dict, dict] | None = None
    for directory in directories:
        record = open_record(directory)
        about = dict(record["protocol"])
        simulator = about.pop("simulator")["is"]
        about.pop("tasks")
        about["simulator"] = {key: one for key, one in simulator.items() if key not in may_differ}
        first = first or (directory, record["policy"], about)
        for there, here in zip(first[1:], (record["policy"], about), strict=True):
            if there != here:
                raise ValueError(
                    f"{first[0]} and {directory} cannot be put together: "
                    + _differences(there, here, "in the first", "in the second")
                )
        for row in read(directory)[0].values():
            _put(rows, {**row, "protocol": "", "policy": ""}, directory)
    return rows


def open_record(directory) -> dict[str, Any]:
    """What protocol.json says.

    Raises:
        ValueError: there is none, or its digests are not those of its contents.
    """
    path = pathlib.Path(directory) / "protocol.json"
    try:
        record = json.loads(path.read_bytes())
        expected = {key: json_digest(record[key]) for key in ("protocol", "policy")}
        if record["digests"] != expected:
            raise ValueError("digests are not those of its contents")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no record of an evaluation: {error!r}") from error
    return record


def write(path: pathlib.Path, text: str) -> None:
    """A file that appears whole."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # hosts share the folder
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _row(line, where):
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {line[:80]!r}") from error
    if not isinstance(row, dict) or {key: type(value) for key, value in row.items()} != _FIELDS:
        raise ValueError(f"{where} is {line[:80]!r}: expected the fields {sorted(_FIELDS)}")
    return row


def _put(rows, row, where):
    episode = Episode(row["suite"], row["task"], row["init"])
    if rows.setdefault(episode, row) != row:
        raise ValueError(
            f"{where}: {episode.suite} {episode.task!r} {episode.init} ended in two ways: "
            f"{canonical(rows[episode])} and {canonical(row)}"
        )


def _refuse_other(directory, here, there):
    for part in ("protocol", "policy"):
        if here["digests"][part] != there["digests"][part]:
            raise ValueError(
                f"{directory} was begun with another {part}: "
                + _differences(there[part], here[part], "there", "now")
            )


def _differences(first, second, one, other):
    """What differs, by dotted name; the first few."""
    flat = _flatten(first), _flatten(second)
    names = sorted(
        name for name in flat[0].keys() | flat[1].keys() if flat[0].get(name) != flat[1].get(name)
    )
    said = [
        f"{name} is {_short(flat[0].get(name))} {one} and {_short(flat[1].get(name))} {other}"
        for name in names[:4]
    ]
    return "; ".join(said) + (f"; and {len(names) - 4} more" if len(names) > 4 else "")


def _flatten(value, name=""):
    if isinstance(value, dict) and value:
        parts = (_flatten(one, f"{name}.{key}" if name else key) for key, one in value.items())
        return {key: one for part in parts for key, one in part.items()}
    return {name: canonical(value)}


def _short(text):
    return "absent" if text is None else text if len(text) <= 60 else text[:57] + "..."
