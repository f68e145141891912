import dataclasses
import functools
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gear_jax.data import accumulator as module
from gear_jax.data.accumulator import Accumulator, Summary
from gear_jax.data.statistics import (
    Statistics,
    check,
    denormalize_action,
    normalize_action,
    normalize_state,
    report,
    require_valid,
)
from gear_jax.data.tfrecord import DataError
from gear_jax.types import ActionSpec

SPEC = ActionSpec(chunk_len=4)
NAMES = [field.name for field in dataclasses.fields(Summary)]


def _count(values, mask=None, shape=None):
    values = np.asarray(values)
    made = Accumulator(values.shape[1:] if shape is None else shape)
    made.add(values, np.ones(values.shape, bool) if mask is None else mask)
    return made


def _assert_same(one, two):
    for name in NAMES:
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)


# --- a data set's statistics ---


def _make(spec=SPEC, num=300, change=None, **fields):
    """Statistics of a single-arm robot; `change(action)` before they are counted."""
    rng = np.random.default_rng(5)
    action = np.zeros((num, spec.chunk_len, spec.action_dim))
    for arm in spec.arms:
        moves = 0.01 * rng.standard_normal((num, spec.chunk_len, 3))
        action[..., spec.dims(arm, "position")] = np.cumsum(moves, axis=1)
        action[..., spec.dims(arm, "rmat6d")] = [1, 0, 0, 0, 1, 0]
        action[..., spec.dims(arm, "gripper")] = rng.random((num, spec.chunk_len, 1)) < 0.5
    mask = np.zeros(action.shape, bool)
    mask[..., 10:] = True
    if change is not None:
        change(action)
    ee_pos = np.stack([np.zeros((num, 3)), rng.uniform(-0.5, 0.5, (num, 3))], axis=1)
    present = np.zeros(ee_pos.shape, bool)
    present[:, 1] = True
    counted = _count(action, mask)
    return Statistics(**{
        "name": "toy",
        "spec_digest": spec.digest(),
        "sources": {"toy": "0" * 64},
        "fps": 15.0,
        "num_episodes": 3,
        "num_steps": num,
        "action": counted.summary(),
        "action_all": counted.pooled().summary(),
        "state": {"ee_pos": _count(ee_pos, present).summary()},
        **fields,
    })  # fmt: skip


def test_statistics_come_back_from_a_file_exactly(tmp_path):
    made, path = _make(), tmp_path / "toy.json"
    made.save(path)
    made.save(path)
    assert os.listdir(tmp_path) == ["toy.json"]
    again = Statistics.load(path)
    _assert_same(again.action, made.action)
    _assert_same(again.action_all, made.action_all)
    assert set(again.state) == {"ee_pos"}
    _assert_same(again.state["ee_pos"], made.state["ee_pos"])
    for name in ("name", "spec_digest", "sources", "fps", "num_episodes", "num_steps"):
        assert getattr(again, name) == getattr(made, name)
    assert again.digest() == made.digest() == json.loads(path.read_text())["digest"]
    assert json.loads(path.read_text())["action_all"]["mean"][:10] == [None] * 10
    assert dataclasses.replace(made, fps=None).digest() != made.digest()


def test_a_save_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "toy.json"
    path.write_text("old")

    def fail(*paths):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        _make().save(path)
    assert os.listdir(tmp_path) == ["toy.json"]
    assert path.read_text() == "old"


def _drop(raw):
    del raw["action_all"]


def _drop_field(raw):
    del raw["action"]["std"]


def _cut(raw):
    raw["action"]["q99"].pop()


def _word(raw):
    raw["state"]["ee_pos"]["mean"][1][0] = "much"


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (_drop, "'action_all' is missing"),
        (_drop_field, "'action': 'std' is missing"),
        (_cut, "'action': 'q99' is (3, 20), but 'count' (4, 20)"),
        (_word, "'state', 'ee_pos': 'mean' is not an array of numbers"),
        (lambda raw: raw.update(version=7), "'version' is 7, expected 1"),
        (lambda raw: raw.update(extra=7), "'extra' is not known"),
        (lambda raw: raw.update(num_steps="7"), "'num_steps' is '7', expected int"),
        (lambda raw: raw.update(fps="7"), "'fps' is '7', expected float or int or NoneType"),
        (
            lambda raw: raw.update(action=raw["action_all"]),
            "'action' is (20,) and 'action_all' (20,), expected [A, a] and [a]",
        ),
        (
            lambda raw: raw["state"].update(q=raw["action_all"]),
            "'state', 'q' is (20,), expected [R, ...]",
        ),
    ],
)
def test_a_file_that_is_not_right_is_refused_by_file_and_key(tmp_path, edit, sentence):
    path = tmp_path / "toy.json"
    _make(num=5).save(path)
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError) as refused:
        Statistics.load(path)
    assert str(refused.value) == f"{path}: {sentence}"


def test_a_file_that_was_cut_or_edited_is_refused(tmp_path):
    path = tmp_path / "toy.json"
    _make(num=5).save(path)
    text = path.read_text()
    path.write_text(text.replace('"num_episodes":3', '"num_episodes":4'))
    with pytest.raises(DataError, match="toy.json: 'digest' is '.*changed by hand"):
        Statistics.load(path)
    path.write_text(text[:100])
    with pytest.raises(DataError, match="toy.json: not JSON: "):
        Statistics.load(path)
    path.write_text("[]")
    with pytest.raises(DataError, match="toy.json: 'version' is None, expected 1"):
        Statistics.load(path)


# --- normalisation ---


def _flat(low, high):
    """Statistics with these quantiles of all horizon steps, float[20]."""
    made = _make(num=2)
    summary = dataclasses.replace(made.action_all, q01=np.array(low), q99=np.array(high))
    return dataclasses.replace(made, action_all=summary)


@pytest.mark.parametrize("rmat6d", ["columns", "rows"])
def test_normalisation_in_numbers(rmat6d):
    turns = [0.9, -0.1, -0.25, 0.0, 0.95, 0.0], [1.0, 0.1, 0.2, 0.0, 1.0, 0.0]
    low = [-0.1, 0.0, 0.3, *turns[0], np.nan] + [np.nan] * 10
    high = [0.3, 2.0, 0.3, *turns[1], np.nan] + [np.nan] * 10
    left = [0.3, 4.0, 0.5, 0.95, 0.1, -0.25, 0, 1, 0.5, 1]
    right = [0.25, 0, 0, 1, 0, 0.01, 0, 1, 0, 0.25]
    spec = ActionSpec(chunk_len=1, rmat6d=rmat6d)
    got = normalize_action(np.array([left + right]), _flat(low, high), spec)
    expected = [1, 3, 0.2, -0.2, 0.4, -1, 0, 0, 2, 1, 0.25, 0, 0, 0, 0, 0.2, 0, 0, 0, -0.5]
    np.testing.assert_allclose(got, [expected], atol=1e-15)
    assert got.dtype == np.float64
    again = denormalize_action(got, _flat(low, high), spec)
    np.testing.assert_allclose(again, [left + right], atol=1e-15)


_entry = st.floats(-2, 2, width=32)


@settings(max_examples=60, deadline=None)
@given(
    action=st.lists(_entry, min_size=20, max_size=20),
    middle=st.lists(st.floats(-0.5, 0.5), min_size=20, max_size=20),
    width=st.lists(st.floats(1e-3, 2) | st.just(0.0), min_size=20, max_size=20),
)
def test_normalisation_and_its_inverse_undo_each_other(action, middle, width):
    middle, width = np.array(middle), np.array(width)
    statistics = _empty(q01=middle - width, q99=middle + width)
    for dtype in (np.float32, np.float64):
        given_action = np.broadcast_to(np.array(action, dtype), (2, 4, 20))
        normal = normalize_action(given_action, statistics, SPEC)
        assert normal.dtype == dtype
        back = denormalize_action(normal, statistics, SPEC)
        assert back.dtype == dtype
        np.testing.assert_allclose(back, given_action, atol=1e-6)
    raw = denormalize_action(np.array(action), statistics, SPEC)
    np.testing.assert_allclose(normalize_action(raw, statistics, SPEC), action, atol=1e-6)


@functools.cache
def _base():
    return _make(num=2)


def _empty(**fields):
    made = _base()
    return dataclasses.replace(made, action_all=dataclasses.replace(made.action_all, **fields))


def test_states_are_clipped_and_keep_their_dtype():
    nothing = np.full(3, np.nan)
    summary = Summary(*([nothing] * 5), q01=np.array([-1.0, 2.0, np.nan]),
                      q99=np.array([1.0, 2.0, np.nan]), rank_error=nothing,
                      value_error=nothing)  # fmt: skip
    value = np.array([[0.5, 2.25, 0.5], [7.0, -7.0, -7.0]], np.float32)
    got = normalize_state(value, summary)
    assert got.tolist() == [[0.5, 0.25, 0.5], [1.5, -1.5, -1.5]]
    assert got.dtype == np.float32


# --- the gate ---


def test_good_statistics_pass_and_an_absent_arm_is_no_fault():
    assert check(_make(), SPEC) == []
    require_valid(_make(), SPEC)


def _set(dim, value, step=slice(None), row=slice(None)):
    def change(action):
        action[row, step, dim] = value

    return change


def _rare(action):
    action[:, :, 11] = 0
    action[0, 0, 11] = 0.1


@pytest.mark.parametrize(
    ("change", "sentences"),
    [
        (_set(12, 0.25), ["right position z: always 0.25"]),
        (_set(10, 0.0, step=0), ["right position x, horizon step 1: always 0"]),
        (_set(3, 7.0), []),  # an absent arm is masked
        (_set(13, 0.5), []),  # a rotation that never turns is no fault
        (
            _rare,
            ["right position y, horizon step 2 and 2 more: always 0",
             "right position y: q01 0 is not below q99 0"],
        ),
        (
            _set(10, 350.0, row=0, step=1),
            ["right position x: from -0.0562115 to 350, more than 1000 deviations from q01 "
             "-0.0414125 and q99 0.0407698: outliers?"],
        ),
        (_set(19, 1.0), ["right gripper: always 1", "right gripper: at least 1, never closes"]),
        (
            _set(19, np.linspace(0, 0.25, 300)[:, None]),
            ["right gripper: at most 0.25, never opens"],
        ),
        (
            _set(19, 1.5, row=7, step=3),
            ["right gripper: from 0 to 1.5, expected 0 closed .. 1 open"],
        ),
    ],
)  # fmt: skip
def test_each_fault_is_named_in_words(change, sentences):
    assert check(_make(change=change), SPEC) == sentences


def test_millimetres_are_noticed():
    def change(action):
        action[..., 10] *= 1000
        action[:, 3, 11] *= 1000

    faults = check(_make(change=change), SPEC)
    assert faults == [
        "right position x: q01 -41.4125 and q99 39.8653 m, more than 2 m within a second: units?",
        "right position y: q01 -40.6051 and q99 36.8975 m, more than 2 m within a second: units?",
    ]


def test_statistics_of_another_spec_or_of_nothing_are_refused():
    made = _make(num=5)
    other = dataclasses.replace(SPEC, rmat6d="rows")
    assert check(made, other) == [
        f"made for another action spec: digest {SPEC.digest()}, expected {other.digest()}"
    ]
    cut = dataclasses.replace(made, action=_make(ActionSpec(chunk_len=2), num=5).action)
    assert check(cut, SPEC) == ["actions are (2, 20), expected (4, 20)"]
    assert check(dataclasses.replace(made, num_steps=0), SPEC) == ["no data"]
    nothing = Accumulator((4, 20))
    empty = {"action": nothing.summary(), "action_all": nothing.pooled().summary()}
    assert check(dataclasses.replace(made, **empty), SPEC) == ["no data"]


def test_states_with_outliers_and_quantiles_that_are_not_known_are_refused(monkeypatch):
    rng = np.random.default_rng(6)
    joints = rng.uniform(-1, 1, (3000, 2, 8))
    joints[0, 1, 6] = -1e5
    state = {"joint_pos": _count(joints).summary()}
    [fault] = check(_make(state=state), SPEC)
    assert fault.startswith("right joint_pos 6: from -100000 to 0.99")
    assert fault.endswith(": outliers?")

    made = _make()
    monkeypatch.setattr(module, "MAX_BINS", 16)
    height = np.where(rng.random(3000) < 0.5, 1.5 + 1e-3 * rng.random(3000), rng.random(3000))
    ee_pos = np.zeros((3000, 2, 3))
    ee_pos[:, 0, 2] = height
    summary = _count(ee_pos).summary()
    assert summary.rank_error[0, 2] > 0.4
    true = np.quantile(height, 0.99)
    assert abs(summary.q99[0, 2] - true) <= summary.value_error[0, 2] < 0.6
    [fault] = check(dataclasses.replace(made, state={"ee_pos": summary}), SPEC)
    assert fault.startswith("left ee_pos z: q01 and q99 are only known within 0.")


def test_training_stops_with_every_fault_in_one_message():
    def change(action):
        action[..., 10] = 0
        action[..., 19] = 1

    with pytest.raises(DataError) as refused:
        require_valid(_make(change=change), SPEC)
    assert str(refused.value) == (
        "statistics of 'toy': right position x: always 0; right gripper: always 1; "
        "right gripper: at least 1, never closes"
    )


def test_the_report_says_what_a_person_checks():
    spec = ActionSpec()
    made = _make(spec, num=50)
    lines = report(made).splitlines()
    assert lines[0] == "toy: 3 episodes, 50 steps, 15 Hz"
    assert lines[2].split() == ["action,", "all", "steps", "count", "mean", "std", "min", "q01",
                                "q99", "max"]  # fmt: skip
    assert lines[3].split() == ["left", "position", "x", "0"] + ["-"] * 6
    assert lines[16].split() == ["right", "rmat6d", "0", "1500", "1", "0", "1", "1", "1", "1"]
    gripper = lines[22].split()
    assert gripper[:3] == ["right", "gripper", "1500"]
    assert gripper[5:] == ["0", "0", "1", "1"]
    assert lines[24].split() == ["std", "at", "horizon", "step", "1", "10", "20", "30"]
    growth = made.action.std[[0, 9, 19, 29], 10]
    assert lines[28].split() == ["right", "position", "x"] + [f"{std:.5g}" for std in growth]
    assert growth[3] > 4 * growth[0]
    assert lines[32].split()[0] == "state"
    assert lines[33].split()[:4] == ["right", "ee_pos", "x", "50"]
    assert len(lines) == 36
    assert report(dataclasses.replace(made, fps=None)).startswith(
        "toy: 3 episodes, 50 steps, several rates"
    )
