"""The comparison itself, and the reference cases in other precisions and with other kernels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gear_jax.data.mrope import mrope_positions
from gear_jax.data.vlm_batch import vlm_batch
from gear_jax.porting import golden as compare
from gear_jax.porting import models, table
from gear_jax.porting.files import CheckpointError
from gear_jax.systems import vlm


@pytest.fixture(scope="module")
def case(golden):
    """Model, parameters, batch, stored logits and valid tokens of the two-image case."""
    folder = golden / "qwen2_5_vl_tiny"
    model, _, tensors = models.open_source("qwen2_5_vl", folder)
    pairs = table.match(model.table, model.parameters, tensors)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = dict.fromkeys(model.targets, one)
    params = table.load(pairs, model.targets, model.table.sizes, shardings, jnp.float32)
    arrays = compare.read_case(folder / "case_two_images.npz")
    types, valid = arrays["mm_token_type_ids"], arrays["attention_mask"].astype(bool)
    media = (arrays["pixel_values"], arrays["image_grid_thw"])
    none = np.zeros((0, 3), int)
    positions, _ = mrope_positions(types, valid, media[1], none, tokens_per_second=2)
    window = model.cfg.vision.window
    batch = vlm_batch(arrays["input_ids"], types, valid, positions, media, window=window)
    return model.cfg, table.unflatten(params), batch, arrays["logits"][valid], valid


def _logits(case, **changes):
    cfg, params, batch, _, valid = case
    towers = {
        name: dataclasses.replace(getattr(cfg, name), **changes) for name in ("vision", "language")
    }
    types = {key: value for key, value in changes.items() if key == "dtype"}
    cfg = dataclasses.replace(cfg, projector=dataclasses.replace(cfg.projector, **types), **towers)
    run = jax.jit(lambda p, b: vlm.logits(p, vlm.forward(p, cfg, b)[0]))
    return np.asarray(run(params, batch), np.float64)[valid]


def test_bfloat16_stays_within_three_percent_of_the_reference(case):
    expected = case[3]
    error = _logits(case, dtype=jnp.bfloat16) - expected
    assert np.sqrt(np.mean(error**2)) < 0.03 * np.sqrt(np.mean(expected**2))


def test_the_splash_kernel_gives_the_reference_logits(case):
    ours = _logits(case, attention="splash_interpret")
    np.testing.assert_allclose(ours, case[3], atol=2e-4, rtol=1e-4)


def test_remat_gives_the_same_logits(case):
    np.testing.assert_array_equal(_logits(case, remat="attention"), _logits(case))


def test_floats_are_near_and_integers_equal_or_it_says_so():
    golden = np.array([1.0, 100.0])
    assert compare._close("case", "x", golden + [1e-4, 9e-3], golden).passed
    assert not compare._close("case", "x", golden + [1e-3, 0], golden).passed
    assert not compare._close("case", "x", golden * np.nan, golden).passed
    assert not compare._close("case", "x", golden[:1], golden).passed
    assert not compare._close("case", "x", np.array([1, 3]), np.array([1, 2])).passed
    assert compare._close("case", "x", golden + [9, 0], golden, np.array([False, True])).passed


def test_an_array_that_nothing_computes_is_a_failure():
    arrays = {"known": np.zeros(2), "note": np.array("text"), "strange": np.zeros(2)}
    made = compare._finish(
        "case",
        arrays,
        compare._VGGT_INPUTS,
        [compare._close("case", "known", np.zeros(2), arrays["known"])],
    )
    assert [(c.output, c.passed) for c in made] == [("known", True), ("strange", False)]


@pytest.mark.parametrize(
    "names",
    [
        {
            "grad_norms": np.array([5.0, 2.0]),
            "grad_names": np.array(["model.language_model.b", "a"]),
        },
        {"grad_norms": np.array([2.0, 5.0]), "names": np.array([b"a", b"model_b"])},
        {"grad_norms": np.array('{"a": 2.0, "model.b": 5.0}')},
        {"grad_norms": np.array([5.0, 2.0])},
    ],
)
def test_gradient_norms_are_found_however_a_case_names_them(names):
    ours = {"a": np.array([2.0]), "model.b": np.array([3.0, 4.0])}
    letters = {compare._letters(key): key for key in ours}
    assert compare._gradient_norms("case", names, ours, letters).passed
    ours["a"] = np.array([2.01])
    assert not compare._gradient_norms("case", names, ours, letters).passed


def test_an_unknown_gradient_name_is_a_failure_that_names_it():
    arrays = {"grad_norms": np.ones(1), "names": np.array(["c"])}
    made = compare._gradient_norms("case", arrays, {"a": np.ones(1)}, {"a": "a"})
    assert not made.passed
    assert made.note == "no such parameter: c"


def test_a_case_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "case.npz").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="case.npz: not a readable .npz case"):
        compare.read_case(tmp_path / "case.npz")
    np.savez(tmp_path / "pickled.npz", x=np.array([{}], dtype=object))
    with pytest.raises(CheckpointError, match="pickled.npz: not a readable .npz case"):
        compare.read_case(tmp_path / "pickled.npz")
