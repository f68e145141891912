"""Columns of numbers -> count, extremes, moments and quantiles: exact, and mergeable in any order.

    rows, masks -> Accumulator -> Summary

Moments keep twice a float's precision, so neither an offset nor the number of rows costs digits.
Quantiles come from bins that depend on the set of entries alone: accumulators of parts, from any
number of workers or hosts, merge into that of the whole.
"""

import dataclasses
import fractions
import math
from collections.abc import Mapping

import numpy as np

from gear_jax.data.tfrecord import DataError

MAX_BINS = 16384  # of one column; 17 bytes a bin

_SMALL, _GRAIN = 2.0**-16, 2.0**-24  # below the former, bins are multiples of the latter
_LARGEST = 1e100  # a greater number is no measurement, and its square may overflow
_BLOCK = 1 << 17  # entries summed at a time
_SIGN = np.uint64(1 << 63)


@dataclasses.dataclass(frozen=True, eq=False)
class Summary:
    """Statistics of columns; every field has one entry per column, NaN where nothing was added.

    Attributes:
        count: int64[*D], entries that were not masked.
        mean: float64[*D].
        std: float64[*D], of the population (divided by count); 0 exactly if all are equal.
        min: float64[*D].
        max: float64[*D].
        q01: float64[*D], 1st percentile, linear between order statistics as in np.quantile.
        q99: float64[*D], 99th percentile.
        rank_error: float64[*D], bound on the fraction of entries between q01, or q99, as given and
            as it truly is; 0 where both are exact.
        value_error: float64[*D], bound on their error in the column's unit; 0 where exact.
    """

    count: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    min: np.ndarray
    max: np.ndarray
    q01: np.ndarray
    q99: np.ndarray
    rank_error: np.ndarray
    value_error: np.ndarray


FIELDS = tuple(field.name for field in dataclasses.fields(Summary))


class Accumulator:
    """Count, extremes, moments and quantiles of columns, over any number of rows.

    Sums and sums of squares are kept as two floats each, 106 bits, so neither an offset nor the
    number of rows costs digits. Count, extremes and bins depend on nothing but the set of entries.
    """

    def __init__(self, shape: tuple[int, ...]):
        """`shape` is D, that of one row, such as (A, a)."""
        self.shape = tuple(shape)
        columns = math.prod(self.shape)
        self.count = np.zeros(columns, np.int64)
        self.min = np.full(columns, np.inf)
        self.max = np.full(columns, -np.inf)
        self.sum = np.zeros((2, columns))
        self.squares = np.zeros((2, columns))
        self.bins = [_Bins()] * columns

    def add(self, values: np.ndarray, mask: np.ndarray) -> None:
        """Count rows in; a few thousand at a time are fastest.

        Args:
            values: float[n, *D].
            mask: bool[n, *D], False where an entry is to be ignored, whatever it is.

        Raises:
            ValueError: wrong shapes.
            DataError: an entry is not finite, or beyond 1e100; nothing was added.
        """
        if values.shape != mask.shape or values.shape[1:] != self.shape:
            raise ValueError(
                f"values are {values.shape} and mask {mask.shape}, expected [n, "
                f"{', '.join(map(str, self.shape))}]"
            )
        mask = mask.astype(bool).reshape(len(mask), len(self.bins))
        values = np.where(mask, values.reshape(mask.shape), 0).astype(np.float64)
        values += 0.0  # turns -0.0 into 0.0
        wrong = ~(np.abs(values) <= _LARGEST)
        if wrong.any():
            row, column = np.argwhere(wrong)[0].tolist()
            where = ", ".join(str(int(i)) for i in np.unravel_index(column, self.shape))
            raise DataError(
                f"column [{where}], row {row}: {values[row, column]} is not a finite measurement"
            )
        self.count += mask.sum(axis=0)
        block_len = 1 + _BLOCK // max(1, len(self.bins))
        for start in range(0, len(values), block_len):
            block = values[start : start + block_len]
            self.sum = _add(self.sum, _total(np.stack([block, np.zeros_like(block)])))
            self.squares = _add(self.squares, _total(_square(block)))
        for column in np.flatnonzero(mask.any(axis=0)):
            entries = np.sort(values[mask[:, column], column])
            self.min[column] = min(self.min[column], entries[0])
            self.max[column] = max(self.max[column], entries[-1])
            each = np.ones(len(entries), np.int64)
            new = _Bins(0, _to_keys(entries), each, each.astype(bool))
            self.bins[column] = _merge(self.bins[column], new)

    def merge(self, other: "Accumulator") -> None:
        """Count in all that `other` has counted; `other` stays as it is.

        Raises:
            ValueError: the shapes differ.
        """
        if self.shape != other.shape:
            raise ValueError(f"shapes {self.shape} and {other.shape} do not merge")
        self.count = self.count + other.count
        self.min = np.minimum(self.min, other.min)
        self.max = np.maximum(self.max, other.max)
        self.sum = _add(self.sum, other.sum)
        self.squares = _add(self.squares, other.squares)
        self.bins = [_merge(*pair) for pair in zip(self.bins, other.bins, strict=True)]

    def pooled(self) -> "Accumulator":
        """An accumulator of shape D[1:]: all of the first axis, the horizon steps, as one column.

        The same as adding every row's slices one by one.
        """
        whole, width = Accumulator(self.shape[1:]), math.prod(self.shape[1:])
        for start in range(0, len(self.bins), width):
            part, here = Accumulator(whole.shape), slice(start, start + width)
            part.count, part.min, part.max = self.count[here], self.min[here], self.max[here]
            part.sum, part.squares = self.sum[:, here], self.squares[:, here]
            part.bins = self.bins[here]
            whole.merge(part)
        return whole

    def summary(self) -> Summary:
        """What was counted, as plain statistics."""
        fields = {name: np.full(len(self.count), np.nan) for name in FIELDS}
        fields["count"] = self.count.copy()
        for column in np.flatnonzero(self.count):
            count, bins, largest = int(self.count[column]), self.bins[column], self.max[column]
            mean = _fraction(self.sum[:, column]) / count
            variance = max(_fraction(self.squares[:, column]) / count - mean * mean, 0)
            low, *low_errors = _quantile(bins, 0.01, count, largest)
            high, *high_errors = _quantile(bins, 0.99, count, largest)
            rank_error, value_error = np.maximum(low_errors, high_errors)
            for name, value in {
                "mean": float(mean),
                "std": math.sqrt(variance) if self.min[column] < largest else 0.0,
                "min": self.min[column],
                "max": largest,
                "q01": low,
                "q99": high,
                "rank_error": rank_error,
                "value_error": value_error,
            }.items():
                fields[name][column] = value
        return Summary(**{name: values.reshape(self.shape) for name, values in fields.items()})

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as plain arrays, for np.savez; `from_arrays` is the exact inverse."""
        return {
            "shape": np.array(self.shape, np.int64),
            "count": self.count.copy(),
            "min": self.min.copy(),
            "max": self.max.copy(),
            "sum": self.sum,
            "squares": self.squares,
            "shift": np.array([one.shift for one in self.bins], np.int64),
            "num_bins": np.array([len(one.keys) for one in self.bins], np.int64),
            "keys": np.concatenate([_NO_KEYS, *(one.keys for one in self.bins)]),
            "counts": np.concatenate([_NO_COUNTS, *(one.counts for one in self.bins)]),
            "single": np.concatenate([_NO_FLAGS, *(one.single for one in self.bins)]),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Accumulator":
        """The inverse of `to_arrays`."""
        made = cls(tuple(arrays["shape"].tolist()))
        for name in ("count", "min", "max", "sum", "squares"):
            setattr(made, name, arrays[name].copy())
        ends = np.cumsum(arrays["num_bins"])[:-1]
        parts = [np.split(arrays[name], ends) for name in ("keys", "counts", "single")]
        made.bins = [
            _Bins(shift, *(x.copy() for x in columns))
            for shift, *columns in zip(arrays["shift"].tolist(), *parts, strict=True)
        ]
        return made


# --- sums of twice a float's precision: float64[2, ...], a rounded sum and what rounding lost ---


def _two_sum(x, y):
    """Rounded sum and its exact error (Knuth)."""
    total = x + y
    moved = total - x
    return total, (x - (total - moved)) + (y - moved)


def _square(x):
    """Exact squares float64[2, ...] (Dekker's product with itself)."""
    scaled = 134217729.0 * x  # 2^27 + 1 cuts 53 bits into halves
    high = scaled - (scaled - x)
    low = x - high
    square = x * x
    return np.stack([square, ((high * high - square) + 2 * high * low) + low * low])


def _add(x, y):
    """Sum of two float64[2, ...], right to about 1e-32."""
    total, error = _two_sum(x[0], y[0])
    small, rest = _two_sum(x[1], y[1])
    total, error = _two_sum(total, error + small)
    return np.stack(_two_sum(total, error + rest))


def _total(x):
    """Sum of float64[2, n, ...] over its rows, by halves: float64[2, ...]."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        odd = x[:, 2 * half :]
        x = np.concatenate([_add(x[:, :half], x[:, half : 2 * half]), odd], axis=1)
    return x[:, 0]


def _fraction(pair):
    return fractions.Fraction(float(pair[0])) + fractions.Fraction(float(pair[1]))


# --- bins: neighbouring floats that share their leading bits ---

_NO_KEYS, _NO_COUNTS, _NO_FLAGS = np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, bool)


@dataclasses.dataclass(frozen=True, eq=False)
class _Bins:
    """Histogram of one column: entries whose keys agree but for the last `shift` bits share a bin.

    Entries below `_SMALL` are rounded to `_GRAIN` once anything is coarsened: a simulator at rest
    spreads nothing over forty octaves, and would leave few bins to each of those that matter.

    `shift` is the smallest that leaves at most MAX_BINS bins. It, and so the bins, depend only on
    the set of entries, not on their order or parts: more entries never make fewer bins at any
    shift, hence no part ever needs a larger shift than the whole, and nothing is coarsened early.

    Attributes:
        shift: 0 .. 63.
        keys: uint64[n], the smallest key in each bin, ascending.
        counts: int64[n].
        single: bool[n], True where all entries of a bin are the same number.
    """

    shift: int = 0
    keys: np.ndarray = dataclasses.field(default_factory=_NO_KEYS.copy)
    counts: np.ndarray = dataclasses.field(default_factory=_NO_COUNTS.copy)
    single: np.ndarray = dataclasses.field(default_factory=_NO_FLAGS.copy)


def _to_keys(values):
    """uint64 keys in the order of the float64 values."""
    bits = values.view(np.uint64)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def _from_keys(keys):
    """The inverse of `_to_keys`."""
    return np.where(keys & _SIGN, keys ^ _SIGN, ~keys).view(np.float64)


def _from_key(key):
    """The number of one key."""
    return float(_from_keys(np.uint64(key)))


def _merge(one, two):
    keys = np.concatenate([one.keys, two.keys])
    order = np.argsort(keys, kind="stable")  # two ascending runs: fast
    counts = np.concatenate([one.counts, two.counts])[order]
    single = np.concatenate([one.single, two.single])[order]
    bins = _coarsen(keys[order], counts, single, max(one.shift, two.shift))
    if len(bins.keys) > MAX_BINS and not bins.shift:
        bins = _coarsen(bins.keys, bins.counts, bins.single, 1)
    if len(bins.keys) <= MAX_BINS:
        return bins
    # at a shift s, neighbours stay apart if they differ by 2^s or above: MAX_BINS - 1 pairs may
    apart = np.partition(bins.keys[1:] ^ bins.keys[:-1], -MAX_BINS)[-MAX_BINS]
    return _coarsen(bins.keys, bins.counts, bins.single, int(apart).bit_length())


def _coarsen(keys, counts, single, shift):
    """`_Bins` from ascending keys, equal ones allowed."""
    if not len(keys):
        return _Bins(shift)
    if shift:
        numbers = _from_keys(keys)
        grained = np.round(numbers / _GRAIN) * _GRAIN + 0.0  # -0.0 is 0
        rounded = _to_keys(np.where(np.abs(numbers) < _SMALL, grained, numbers))
        keys, single = rounded, single & (rounded == keys)
    apart = (keys[1:] >> shift) != (keys[:-1] >> shift)
    starts = np.concatenate([[0], np.flatnonzero(apart) + 1])
    ends = np.concatenate([starts[1:], [len(keys)]]) - 1
    same = np.logical_and.reduceat(single, starts) & (keys[starts] == keys[ends])
    return _Bins(shift, keys[starts], np.add.reduceat(counts, starts), same)


def _quantile(bins, q, count, largest):
    """(value, its rank error at most, its error at most); in a bin, ranks are evenly spaced."""
    ends = np.cumsum(bins.counts)
    rank = q * (count - 1)
    found, errors = [], {}
    for whole in (math.floor(rank), math.ceil(rank)):
        index = int(np.searchsorted(ends, whole, side="right"))
        value = _from_key(bins.keys[index])
        if not bins.single[index]:
            num = int(bins.counts[index])
            last = int(bins.keys[index]) | ((1 << bins.shift) - 1)
            width = np.fmin(_from_key(last), largest) - value
            width += _GRAIN if abs(value) < _SMALL else 0.0
            errors[index] = num / count, width
            value += width * (whole - int(ends[index]) + num) / max(num - 1, 1)
        found.append(value)
    rank_error, value_error = (
        sum(error) for error in zip((0.0, 0.0), *errors.values(), strict=True)
    )
    return found[0] + (found[1] - found[0]) * (rank - math.floor(rank)), rank_error, value_error
