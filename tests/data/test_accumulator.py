import dataclasses
import functools
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gear_jax.data import accumulator as module
from gear_jax.data.accumulator import Accumulator, Summary
from gear_jax.data.tfrecord import DataError

NAMES = [field.name for field in dataclasses.fields(Summary)]


def _count(values, mask=None, shape=None):
    values = np.asarray(values)
    made = Accumulator(values.shape[1:] if shape is None else shape)
    made.add(values, np.ones(values.shape, bool) if mask is None else mask)
    return made


def _assert_same(one, two):
    for name in NAMES:
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)


def _assert_same_bins(one, two):
    one, two = one.to_arrays(), two.to_arrays()
    for name in ("shape", "count", "min", "max", "shift", "num_bins", "keys", "counts", "single"):
        assert one[name].tobytes() == two[name].tobytes(), name


def test_statistics_of_a_few_numbers():
    values = np.array([[1.0, 5.0], [2.0, np.nan], [3.0, -np.inf], [6.0, 5.0]])
    mask = np.array([[1, 1], [1, 0], [1, 0], [1, 1]], bool)
    got = _count(values, mask).summary()
    assert got.count.tolist() == [4, 2]
    assert got.mean.tolist() == [3.0, 5.0]
    assert got.std.tolist() == [3.5**0.5, 0.0]
    assert got.min.tolist() == [1.0, 5.0]
    assert got.max.tolist() == [6.0, 5.0]
    np.testing.assert_allclose(got.q01, [1.03, 5.0], rtol=1e-15)
    np.testing.assert_allclose(got.q99, [5.91, 5.0], rtol=1e-15)
    assert got.rank_error.tolist() == got.value_error.tolist() == [0.0, 0.0]


def test_a_column_without_entries_is_nan_and_counts_none():
    got = _count(np.ones((3, 2)), np.array([[True, False]] * 3)).summary()
    assert got.count.tolist() == [3, 0]
    assert all(np.isnan(getattr(got, name)[1]) for name in NAMES if name != "count")
    assert Accumulator((2, 3)).summary().count.tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e101])
def test_a_number_that_is_no_measurement_is_refused_by_column_and_nothing_is_added(value):
    made = _count(np.ones((1, 2, 3)))
    values = np.ones((2, 2, 3))
    values[1, 0, 2] = value
    with pytest.raises(DataError) as refused:
        made.add(values, np.ones(values.shape, bool))
    assert str(refused.value) == f"column [0, 2], row 1: {value} is not a finite measurement"
    _assert_same_bins(made, _count(np.ones((1, 2, 3))))


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"values are \(2, 3\) and mask \(2, 4\), expected"):
        Accumulator((3,)).add(np.ones((2, 3)), np.ones((2, 4), bool))
    with pytest.raises(ValueError, match=r"expected \[n, 3\]"):
        Accumulator((3,)).add(np.ones((2, 4)), np.ones((2, 4), bool))
    with pytest.raises(ValueError, match=r"shapes \(3,\) and \(4,\) do not merge"):
        Accumulator((3,)).merge(Accumulator((4,)))


def test_sums_lose_nothing_where_floats_would_lose_all():
    got = _count(np.array([[1e16], [1.0], [-1e16]])).summary()
    assert got.mean[0] == 1 / 3
    got = _count(1e8 + np.array([[0.0], [1e-3]] * 500)).summary()
    step = (1e8 + 1e-3) - 1e8  # what a float64 makes of a thousandth up there
    assert got.std[0] == pytest.approx(step / 2, rel=1e-9)
    still = np.tile(np.random.default_rng(0).random(50), (999, 1))
    assert not _count(still).summary().std.any()


def test_both_zeros_are_one_number():
    one, two = _count(np.array([[-0.0], [0.0], [-0.0]])), _count(np.zeros((3, 1)))
    _assert_same_bins(one, two)
    assert two.to_arrays()["counts"].tolist() == [3]
    assert not np.signbit(one.summary().min[0])


# --- hostile columns: an honest oracle, and the usual way beside it ---


@functools.cache
def _hostile():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(50_001)
    return {
        "1.569, std 1e-3": 1.569 + 1e-3 * noise,
        "1000, std 1e-2": 1000 + 1e-2 * noise,
        "outlier of 1e4 std": np.append(noise[:-1], 1e4),
        "slow drift": 2 + 1e-5 * np.cumsum(noise),
        "at rest half the time": np.where(noise > 0, 1.569 + 1e-5 * noise, 3 * np.sin(1e3 * noise)),
        "ten decades": noise * 10 ** (5 * np.sin(np.arange(50_001))),
    }


def _naive_float32(values):
    """Mean of squares minus square of mean, in running float32 sums over batches."""
    total = squares = np.float32(0)
    for batch in np.array_split(values.astype(np.float32), 50):
        total += batch.sum()
        squares += (batch * batch).sum()
    mean = total / np.float32(len(values))
    return np.sqrt(max(squares / np.float32(len(values)) - mean * mean, np.float32(0)))


def test_hostile_columns_come_out_right_where_float32_sums_do_not():
    columns = _hostile()
    made = Accumulator((len(columns),))
    table = np.stack(list(columns.values()), axis=1)
    for rows in np.array_split(table, 13):
        made.add(rows, np.ones(rows.shape, bool))
    got = made.summary()
    naive_errors = []
    print(f"\n{'column':<22}{'true std':>12}{'ours, rel':>11}{'naive, rel':>11}"
          f"{'rank bound':>11}{'rank err':>10}")  # fmt: skip
    for index, (name, values) in enumerate(columns.items()):
        exact = values.astype(np.longdouble)
        mean = exact.sum() / len(values)
        std = float(np.sqrt(((exact - mean) ** 2).sum() / len(values)))
        error = abs(got.std[index] - std) / std
        naive_errors.append(abs(float(_naive_float32(values)) - std) / std)
        assert got.mean[index] == pytest.approx(float(mean), rel=1e-15, abs=1e-15)
        assert error < 1e-9
        assert (got.min[index], got.max[index]) == (values.min(), values.max())
        ordered, rank_errors = np.sort(values), []
        for q, value in ((0.01, got.q01[index]), (0.99, got.q99[index])):
            above = np.searchsorted(ordered, value, side="right")
            below = np.searchsorted(ordered, value, side="left")
            ideal = q * (len(values) - 1)
            rank_errors.append(max(0, below - 1 - ideal, ideal - above) / len(values))
            assert abs(value - np.quantile(ordered, q)) <= got.value_error[index] + 1e-15
        assert max(rank_errors) <= got.rank_error[index] + 1e-9
        assert got.rank_error[index] <= 1e-3
        print(f"{name:<22}{std:>12.5g}{error:>11.1e}{naive_errors[-1]:>11.1e}"
              f"{got.rank_error[index]:>11.1e}{max(rank_errors):>10.1e}")  # fmt: skip
    assert naive_errors[0] > 1e-3
    assert naive_errors[1] > 1e-3
    assert made.to_arrays()["shift"].min() > 0  # every column was coarsened


def test_seven_uneven_parts_merge_into_the_whole():
    table = np.stack(list(_hostile().values()), axis=1)
    mask = np.random.default_rng(1).random(table.shape) < 0.9
    whole, merged = _count(table, mask), Accumulator(table.shape[1:])
    cuts = [3, 4, 900, 20_000, 20_001, 44_000]
    for values, present in zip(np.split(table, cuts), np.split(mask, cuts), strict=True):
        part = _count(values, present)
        before = part.to_arrays()
        merged.merge(part)
        for name, array in part.to_arrays().items():
            np.testing.assert_array_equal(array, before[name])
    _assert_same_bins(merged, whole)
    for name in NAMES:
        np.testing.assert_allclose(
            getattr(merged.summary(), name), getattr(whole.summary(), name), rtol=1e-12
        )


# --- bins ---


def _bins_by_definition(values, max_bins):
    """The smallest shift with few enough bins, and the bins, from all values at once."""
    values = np.asarray(values, np.float64) + 0.0
    coarse = len(np.unique(values)) > max_bins
    small = (np.abs(values) < 2.0**-16) & coarse
    rounded = np.where(small, np.round(values * 2.0**24) / 2.0**24 + 0.0, values)
    bits = rounded.view(np.uint64)
    keys = np.where(bits >> 63, ~bits, bits | np.uint64(1 << 63))
    shifts = range(1, 64) if coarse else range(1)
    shift = next(s for s in shifts if len(np.unique(keys >> s)) <= max_bins)
    bins, counts = np.unique(keys >> shift, return_counts=True)
    same = rounded == values
    single = [len(set(keys[keys >> shift == b])) == 1 and same[keys >> shift == b].all()
              for b in bins]  # fmt: skip
    return shift, bins, counts, single


@settings(max_examples=80, deadline=None)
@given(
    values=st.lists(
        st.floats(-1e100, 1e100)
        | st.sampled_from([0.0, -0.0, 1.0])
        | st.floats(0.9, 1.1)
        | st.floats(-2e-5, 2e-5),
        min_size=1,
        max_size=60,
    ),
    order=st.randoms(use_true_random=False),
    num_parts=st.integers(1, 5),
    max_bins=st.integers(2, 20),
)
def test_order_and_parts_change_no_bin_and_hardly_a_moment(values, order, num_parts, max_bins):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_BINS", max_bins)
        whole = _count(np.array(values)[:, None])
        shuffled = order.sample(values, len(values))
        parts = [_count(x[:, None], shape=(1,)) for x in np.array_split(shuffled, num_parts)]
        order.shuffle(parts)
        while len(parts) > 1:  # in any tree
            parts[-1].merge(parts.pop(order.randrange(len(parts) - 1)))
    _assert_same_bins(parts[0], whole)
    arrays = whole.to_arrays()
    shift, bins, counts, single = _bins_by_definition(values, max_bins)
    assert arrays["shift"].tolist() == [shift]
    assert (arrays["keys"] >> shift).tolist() == bins.tolist()
    assert arrays["counts"].tolist() == counts.tolist()
    assert arrays["single"].tolist() == single
    one, two = parts[0].summary(), whole.summary()
    scale = np.abs(values).max()
    for name in ("mean", "std"):
        np.testing.assert_allclose(
            getattr(one, name), getattr(two, name), rtol=1e-12, atol=1e-12 * scale
        )
    ordered, middle = np.sort(values), np.float64(len(values) - 1)
    for name, q in (("q01", 0.01), ("q99", 0.99)):
        value = getattr(two, name)[0]
        truth = ordered[int(q * middle)], ordered[int(np.ceil(q * middle))]
        slack = two.value_error[0] + 1e-12 * scale
        assert truth[0] - slack <= value <= truth[1] + slack
        between = (ordered > min(value, truth[0])) & (ordered < max(value, truth[1]))
        assert between.sum() <= two.rank_error[0] * len(values) + 1e-9


def test_bins_by_hand(monkeypatch):
    monkeypatch.setattr(module, "MAX_BINS", 4)
    made = _count(np.array([[1.0], [1.25], [1.5], [1.75], [2.0], [2.0], [-3.0]]))
    arrays = made.to_arrays()
    # five bits of 52 are dropped last: 1 .. 1.5 and 1.5 .. 2 become a bin each
    assert arrays["shift"].tolist() == [51]
    assert arrays["counts"].tolist() == [1, 2, 2, 2]
    assert arrays["single"].tolist() == [True, False, False, True]
    keys = arrays["keys"]
    assert [module._from_key(key) for key in keys] == [-3.0, 1.0, 1.5, 2.0]


def test_more_than_a_cap_of_distinct_numbers_is_still_exact_where_numbers_repeat():
    rng = np.random.default_rng(2)
    values = np.concatenate([np.zeros(3000), rng.standard_normal(40_000), np.full(3000, 5.0)])
    got = _count(values[:, None]).summary()
    assert got.q99[0] == 5.0
    assert 0 < got.rank_error[0] <= 1e-3  # of q01


def test_noise_of_a_simulator_at_rest_leaves_bins_to_what_moves():
    """Half of the entries are spread over thirty octaves around nothing."""
    rng = np.random.default_rng(4)
    still = rng.choice([-1, 1], 60_000) * 2.0 ** rng.uniform(-48, -17, 60_000)
    moving = rng.uniform(-0.07, 0.06, 60_000)
    got = _count(np.concatenate([still, moving])[:, None]).summary()
    assert got.value_error[0] < 5e-4 * (got.q99[0] - got.q01[0])


# --- pooling and exchange ---


def test_pooled_horizon_steps_are_the_same_as_adding_them_one_by_one():
    rng = np.random.default_rng(3)
    values, mask = rng.standard_normal((12_000, 4, 2)), rng.random((12_000, 4, 2)) < 0.7
    mask[:, :, 1] &= mask[:, :, 0]
    pooled, direct = _count(values, mask).pooled(), _count(values.reshape(-1, 2),
                                                           mask.reshape(-1, 2))  # fmt: skip
    assert pooled.to_arrays()["shift"].min() > 0
    _assert_same_bins(pooled, direct)
    np.testing.assert_allclose(pooled.summary().std, direct.summary().std, rtol=1e-14)


def test_arrays_cross_hosts_unchanged():
    rng = np.random.default_rng(4)
    made = _count(rng.standard_normal((20_000, 2, 2)), rng.random((20_000, 2, 2)) < [1, 0])
    file = io.BytesIO()
    np.savez(file, **made.to_arrays())
    file.seek(0)
    with np.load(file) as arrays:
        again = Accumulator.from_arrays(dict(arrays))
    for name, array in made.to_arrays().items():
        other = again.to_arrays()[name]
        assert (array.dtype, array.shape) == (other.dtype, other.shape)
        assert array.tobytes() == other.tobytes(), name
    again.add(np.ones((1, 2, 2)), np.ones((1, 2, 2), bool))
    assert made.count.sum() == 40_000
