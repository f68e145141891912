import dataclasses
import json

import numpy as np
import pytest

from gear_jax.data.catalog import DatasetConfig, open_prepared
from gear_jax.data.embodiments import embodiment_id
from gear_jax.data.measure import measure
from gear_jax.data.normalizer import Normalizer
from gear_jax.data.tfrecord import DataError
from gear_jax.data.windows import make_chunks
from gear_jax.types import ActionSpec

SPEC = ActionSpec()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    work = str(tmp_path_factory.mktemp("reach"))
    fields = {"path": "reach", "row": "reach", "format": "reach", "work": work}
    return open_prepared(DatasetConfig(**fields, drawing={"num_episodes": 8}))


@pytest.fixture(scope="module")
def normalizer(prepared):
    counted = measure(prepared, SPEC)
    robot = prepared.row.embodiment
    return Normalizer(counted.statistics("all"), {robot: counted.statistics(robot)}, SPEC)


def test_chunks_come_back_from_the_models_units(prepared, normalizer):
    action, mask, _ = make_chunks([prepared.episode(0)] * 3, [0, 5, 9], SPEC)
    there = normalizer.normalize_action(action, mask)
    assert not there[~mask].any()
    back = normalizer.denormalize_action(there)
    np.testing.assert_allclose(back[mask], action[mask], atol=1e-6)


def test_states_are_normalised_by_their_own_robot_and_zero_for_a_stranger(prepared, normalizer):
    _, _, state = make_chunks([prepared.episode(0)] * 2, [0, 5], SPEC)
    known, stranger = embodiment_id(prepared.row.embodiment), embodiment_id("gr1")
    made = normalizer.normalize_state(state, np.array([known, stranger]))
    assert np.abs(made["ee"][0]).max() > 0.1
    assert not made["ee"][1].any()
    assert not made["joints"][1].any()
    np.testing.assert_array_equal(made["ee_mask"], state["ee_mask"])


def test_a_normalizer_survives_its_file_and_a_changed_one_is_refused(normalizer):
    text = normalizer.to_json()
    again = Normalizer.from_json(text)
    assert again.digest() == normalizer.digest()
    assert again.to_json() == text
    raw = json.loads(text)
    raw["spec"]["chunk_len"] = 29
    with pytest.raises(DataError, match=r"run/normalizer.json: its digest is .* changed by hand"):
        Normalizer.from_json(json.dumps(raw), "run/normalizer.json")
    old = {key: value for key, value in raw.items() if key != "version"}
    with pytest.raises(DataError, match="version 1, expected 2: it scales rotations otherwise"):
        Normalizer.from_json(json.dumps(old))
    for broken in ("[]", "{}", "{", json.dumps({**raw, "spec": {"rate": 3}})):
        with pytest.raises(DataError, match="normalizer"):
            Normalizer.from_json(broken)


def test_without_robots_there_is_nothing_to_denormalise_by(normalizer):
    bare = dataclasses.replace(normalizer, action=None, states={})
    assert Normalizer.from_json(bare.to_json()).digest() == bare.digest()
    zero = np.zeros((1, 30, 20), np.float32)
    np.testing.assert_array_equal(bare.normalize_action(zero, zero == 0), zero)
    with pytest.raises(DataError, match="trained without robots"):
        bare.denormalize_action(zero)
