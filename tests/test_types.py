import dataclasses
import json
import math
import subprocess
import sys
import typing

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from gear_jax import types
from gear_jax.types import ActionSpec


def test_the_default_action_is_thirty_rows_of_twenty_numbers_at_30_hz():
    spec = ActionSpec()
    assert (spec.chunk_len, spec.action_dim, spec.rate_hz) == (30, 20, 30.0)
    assert (spec.rmat6d, spec.gripper) == ("columns", "0 closed, 1 open")
    assert spec.frame == "relative to current end effector"


def test_left_holds_dims_0_to_9_right_10_to_19_and_the_gripper_comes_last():
    spec = ActionSpec()
    owner = np.full(spec.action_dim, "", dtype="U20")
    for arm in types.ARMS:
        for part in types.ARM_PARTS:
            owner[spec.dims(arm, part)] += f"{arm} {part}"
    one_arm = ["position"] * 3 + ["rmat6d"] * 6 + ["gripper"]
    assert owner.tolist() == [f"left {p}" for p in one_arm] + [f"right {p}" for p in one_arm]


def test_views_and_arms_have_the_order_of_the_arrays():
    assert types.VIEWS == ("head", "left_wrist", "right_wrist")
    assert types.ARMS == ("left", "right")


def test_the_digest_is_the_same_on_every_machine():
    expected = "e31afdd91dfdeda8f84cab92879a39dd83eab1095957002f33035467e6f2d934"
    assert ActionSpec().digest() == expected


@hypothesis.settings(deadline=None, derandomize=True, database=None)
@hypothesis.given(
    st.builds(
        ActionSpec,
        chunk_len=st.integers(1, 1000),
        rate_hz=st.floats(0.1, 1000) | st.integers(1, 1000),
        rmat6d=st.sampled_from(["columns", "rows"]),
    )
)
def test_a_spec_comes_back_from_json_with_its_digest(spec):
    again = ActionSpec(**json.loads(json.dumps(dataclasses.asdict(spec))))
    assert again == spec
    assert again.digest() == spec.digest()
    assert hash(again) == hash(spec)


@pytest.mark.parametrize("change", [{"chunk_len": 16}, {"rate_hz": 20.0}, {"rmat6d": "rows"}])
def test_every_change_shows_in_the_digest(change):
    assert ActionSpec(**change).digest() != ActionSpec().digest()


def test_a_whole_rate_has_the_digest_of_the_same_float():
    assert ActionSpec(rate_hz=30).digest() == ActionSpec(rate_hz=30.0).digest()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"chunk_len": 0}, "chunk_len is 0, expected a positive int"),
        ({"chunk_len": 30.0}, "chunk_len is 30.0, expected a positive int"),
        ({"chunk_len": True}, "chunk_len is True, expected a positive int"),
        ({"rate_hz": 0}, "rate_hz is 0, expected a positive finite number"),
        ({"rate_hz": math.nan}, "rate_hz is nan, expected a positive finite number"),
        ({"rate_hz": math.inf}, "rate_hz is inf, expected a positive finite number"),
        ({"rate_hz": "30"}, "rate_hz is '30', expected a positive finite number"),
        ({"action_dim": 14}, "action_dim is 14, expected 20"),
        ({"action_dim": 20.0}, "action_dim is 20.0, expected 20"),
        ({"arms": ("right", "left")}, r"arms is \('right', 'left'\), expected \('left', 'right'\)"),
        ({"rmat6d": "cols"}, "rmat6d is 'cols', expected 'columns' or 'rows'"),
        ({"frame": "base"}, "frame is 'base', expected 'relative to current end effector'"),
        ({"position_unit": "cm"}, "position_unit is 'cm', expected 'metre'"),
        ({"gripper": "1 closed"}, "gripper is '1 closed', expected '0 closed, 1 open'"),
    ],
)
def test_a_field_that_means_something_else_is_refused_by_name(change, sentence):
    with pytest.raises(ValueError, match=f"^ActionSpec: {sentence}$"):
        ActionSpec(**change)


def test_all_faults_stand_in_one_sentence():
    with pytest.raises(ValueError, match="chunk_len is -1, .*; rmat6d is 'x', .*; frame is 'y'"):
        ActionSpec(chunk_len=-1, rmat6d="x", frame="y")


def test_contracts_cannot_be_changed_after_the_fact():
    arm = types.Arm(joint_pos=np.zeros((4, 7), np.float32))
    with pytest.raises(dataclasses.FrozenInstanceError):
        arm.joint_pos = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        ActionSpec().chunk_len = 1


@pytest.mark.parametrize("contract", [types.Arm, types.Episode, types.Window, types.Observation])
def test_the_docstring_describes_every_field_and_no_other(contract):
    described = [
        line.split(":")[0].strip()
        for line in contract.__doc__.split("Attributes:")[1].splitlines()
        if line.startswith(" " * 8) and not line.startswith(" " * 9)
    ]
    assert described == [field.name for field in dataclasses.fields(contract)]


def test_an_example_becomes_a_batch_without_changing_names():
    example = set(typing.get_type_hints(types.Example))
    batch = set(typing.get_type_hints(types.Batch))
    into_token_rows = {"instruction", "latent_ids", "latent_mask"}
    assert example - batch == into_token_rows


def test_the_contract_needs_numpy_only():
    code = "import sys, gear_jax.types; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
