"""What can be wrong with a record, and what is done about it: always named, never silent.

    fatal    the data set cannot be trusted: the run stops (`DataError`)
    drop     the episode, or the image, is left out and counted
    clamp    the number is put into its range and counted

The decision is a function of the record alone, so every host, worker and resumed run decides alike.
`FaultLog.check` stops the run when more is dropped than its budget allows.
"""

import collections
import dataclasses
from typing import Any

from gear_jax.data.tfrecord import DataError

POLICY = {
    # what a file is made of: found by the index, by `verify`, or when a record is opened
    "damaged_file": "fatal",
    # an episode's numbers
    "no_steps": "drop",
    "one_step": "drop",
    "not_finite": "drop",
    "out_of_range": "drop",
    "bad_quaternion": "drop",
    "jump": "drop",
    "time_goes_back": "drop",
    "missing_key": "drop",
    "wrong_length": "drop",
    "bad_text": "drop",
    "long_text": "drop",
    "no_instruction": "drop",
    "not_kept": "drop",
    "gripper_range": "clamp",
    # an image, when it is decoded; the view is masked in this sample
    "bad_image": "drop",
    "tiny_image": "drop",
    "missing_view": "drop",
}

BY_DESIGN = ("not_kept", "no_instruction", "missing_view")  # counted, but no sign of damage


class FaultError(DataError):
    """A record that the policy leaves out; `code` is a key of `POLICY`."""

    def __init__(self, code: str, where: str, what: str):
        """`where` names file, episode and step; `what` says what was found and expected."""
        assert code in POLICY
        super().__init__(f"{where}: {what} [{code}]")
        self.code = code


@dataclasses.dataclass
class FaultLog:
    """Counts of each fault, with the first sentences.

    Attributes:
        seen: records looked at.
        dropped: of these, left out.
        counts: by code.
        examples: up to five sentences of each code.
    """

    seen: int = 0
    dropped: int = 0
    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def drop(self, fault: FaultError) -> None:
        """Count a record that is left out."""
        self.count(fault.code, str(fault))
        self.dropped += fault.code not in BY_DESIGN

    def count(self, code: str, sentence: str) -> None:
        """Count a fault."""
        self.counts[code] += 1
        if len(said := self.examples.setdefault(code, [])) < 5:
            said.append(sentence)

    def merge(self, other: "FaultLog") -> None:
        """Add what another process counted."""
        self.seen += other.seen
        self.dropped += other.dropped
        self.counts.update(other.counts)
        for code, sentences in other.examples.items():
            self.examples[code] = (self.examples.get(code, []) + sentences)[:5]

    def check(self, budget: float, name: str) -> None:
        """Stop when too much is lost.

        Args:
            budget: greatest fraction of records that may be dropped for damage.
            name: of the data set.

        Raises:
            DataError: more was dropped; says what, with one example of each.
        """
        if self.dropped <= budget * self.seen:
            return
        said = "; ".join(f"{self.counts[code]} {code}, such as: {s[0]}"
                         for code, s in self.examples.items() if code not in BY_DESIGN)  # fmt: skip
        raise DataError(
            f"{name}: {self.dropped} of {self.seen} records dropped, more than the budget of "
            f"{budget:.1%}: {said}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**dataclasses.asdict(self), "counts": dict(self.counts)}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "FaultLog":
        """The inverse of `to_json`."""
        counts = collections.Counter(stored["counts"])
        return cls(stored["seen"], stored["dropped"], counts, stored["examples"])
