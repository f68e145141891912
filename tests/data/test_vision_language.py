import json
import pathlib
import pickle
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gear_jax.data.images import Fit
from gear_jax.data.mask_overlay import encode_mask
from gear_jax.data.tfrecord import DataError
from gear_jax.data.vision_language import TYPES, Pool, keep_record, make_sample, parse_answer

DOC = pathlib.Path(__file__).parents[2] / "docs" / "vision_language.md"
BLOCK = re.compile(r"```json\n(.*?)\n```\n\n```text\n(.*?)\n---\n(.*?)\n```", re.DOTALL)
EXAMPLES = BLOCK.findall(DOC.read_text())
POINT = {"id": "p", "type": "object_point", "images": ["a.jpg"], "label": "mug", "points": [[1, 2]]}


def _rng():
    return np.random.default_rng(0)


def _pool(tmp_path, *records):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    (tmp_path / "pool.jsonl").write_text("\n".join(lines) + "\n")
    return Pool(tmp_path / "pool.jsonl")


def test_the_page_has_an_example_of_every_type():
    assert [json.loads(record)["type"] for record, _, _ in EXAMPLES] == list(TYPES)


@pytest.mark.parametrize(("record", "prompt", "answer"), EXAMPLES)
def test_the_pages_examples_are_what_the_code_writes(tmp_path, record, prompt, answer):
    record = _pool(tmp_path, record).record(0)
    fits = [Fit(100, 100, 200)] * len(record["images"])
    sample = make_sample(record, fits, _rng())
    assert (sample.prompt, sample.answer) == (prompt, answer)
    said = parse_answer(record["type"], answer, fits, options="options" in record)
    for field in ("points", "boxes", "points_3d", "bbox_3d"):
        if field in record:
            np.testing.assert_allclose(
                said, record[field], atol=0.25 if "3d" not in field else 5e-3
            )
    if "options" in record:
        assert said == "B"
    elif "question" in record and "points" not in record:
        assert said == record["answer"]


@settings(max_examples=80, deadline=None)
@given(
    height=st.integers(20, 1000),
    width=st.integers(20, 1000),
    corners=st.lists(st.floats(0, 1), min_size=4, max_size=4),
    mode=st.sampled_from(["pad", "stretch"]),
)
def test_pixels_come_back_within_half_a_model_pixel(height, width, corners, mode):
    fit = Fit(height, width, 448, mode)
    (x1, x2), (y1, y2) = sorted(corners[:2]), sorted(corners[2:])
    box = [x1 * width, y1 * height, min(x2 * width + 1e-3, width), min(y2 * height + 1e-3, height)]
    record = {"id": "b", "type": "ground2d", "images": ["a"], "label": "mug", "boxes": [box]}
    said = parse_answer("ground2d", make_sample(record, [fit], _rng()).answer, [fit])
    sx, sy, _, _ = fit.affine
    error = np.abs(np.array(said[0]) - box) * [sx, sy, sx, sy]
    assert error.max() <= 0.5 + 1e-6


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(list(TYPES)), text=st.text(max_size=200), options=st.booleans())
def test_no_text_makes_the_parser_raise(kind, text, options):
    said = parse_answer(kind, text, [Fit(10, 10, 20)], options=options)
    assert said is None or isinstance(said, str if options else str | list)


@settings(max_examples=200, deadline=None)
@given(
    example=st.sampled_from(EXAMPLES),
    cut=st.floats(0, 1),
    noise=st.text(max_size=5),
    at=st.floats(0, 1),
)
def test_no_broken_answer_makes_the_parser_raise(example, cut, noise, at):
    record, _, answer = example
    place = int(at * len(answer))
    text = (answer[:place] + noise + answer[place:])[: int(cut * len(answer)) + 1]
    said = parse_answer(json.loads(record)["type"], text, [Fit(100, 100, 200)] * 2)
    assert said is None or isinstance(said, str | list)


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ('```json\n[{"point_2d": [20, 40]}]\n```', [[10, 20]]),
        ("The mug is at [(20, 40), (30.5, 60)].", [[10, 20], [15.25, 30]]),
        ("{'point_2d': [20, 40], 'label': 'mug'}", [[10, 20]]),
        ('<point x="20" y="40">mug</point>', [[10, 20]]),
        ("I cannot see a mug.", None),
        ("", None),
    ],
)
def test_points_are_found_in_many_forms(text, points):
    assert parse_answer("object_point", text, [Fit(100, 100, 200)]) == points


def test_other_coordinates_are_a_choice_and_never_guessed():
    fit = [Fit(50, 100, 448)]
    text = "[(0.5, 0.5)]"
    assert parse_answer("space_point", text, fit, coordinates="norm1") == [[50, 25]]
    assert parse_answer("space_point", "[(500, 500)]", fit, coordinates="norm1000") == [[50, 25]]
    (x, _) = parse_answer("space_point", text, fit)[0]
    assert x == pytest.approx(0.5 / 4.48)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Answer: B", "B"),
        ("A is wrong. Answer: C. No, the answer is D", "D"),
        ("(B) the spoon", "B"),
        ("B", "B"),
        ("Because", None),
        ("F.", "F"),
    ],
)
def test_letters_are_never_taken_out_of_words(text, letter):
    assert parse_answer("general_vqa", text, options=True) == letter


def test_long_trajectories_keep_ten_points_evenly_spaced():
    points = [[x, 0.0] for x in range(91)]
    record = {"id": "t", "type": "traj2d", "images": ["a"], "instruction": "go", "points": points}
    answer = make_sample(record, [Fit(100, 100, 100)], _rng()).answer
    assert parse_answer("traj2d", answer, [Fit(100, 100, 100)]) == [
        [10.0 * i, 0] for i in range(10)
    ]


def test_a_mask_without_a_colour_gets_one_by_the_generator():
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2] = True
    record = {
        "id": "m", "type": "mask_track", "images": ["a", "b"], "mask": encode_mask(mask),
        "boxes": [[1, 1, 2, 2]],
    }  # fmt: skip
    fits = [Fit(4, 6, 28), Fit(10, 10, 28)]
    drawn = {make_sample(record, fits, np.random.default_rng(i)).overlay[1] for i in range(60)}
    assert len(drawn) == 8
    sample = make_sample(record, fits, _rng())
    np.testing.assert_array_equal(sample.overlay[0], mask)
    assert sample.prompt == f"Locate the object with the {sample.overlay[1]}-colored mask."
    with pytest.raises(DataError, match="mask is \\(4, 6\\), its image \\(5, 6\\)"):
        make_sample(record, [Fit(5, 6, 28), fits[1]], _rng())


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ("{", "not a JSON object"),
        ('{"id": "a", "id": "b"}', "stand twice"),
        ("[1]", "expected an object with a text 'id'"),
        (POINT | {"type": "song"}, "type 'song': expected one of"),
        ({k: v for k, v in POINT.items() if k != "label"}, "field 'label' is missing"),
        (POINT | {"boxes": []}, "field 'boxes' is not one of object_point's"),
        (POINT | {"points": [[1, float("nan")]]}, "field 'points': expected one to 10000 lists"),
        (POINT | {"points": [[1, 2]] * 10_001}, "field 'points'"),
        (POINT | {"points": [[1, True]]}, "field 'points'"),
        (POINT | {"label": " "}, "field 'label': expected a text that is not empty"),
        (POINT | {"label": "x" * 40_000}, "up to 32768 characters"),
        (POINT | {"images": []}, "expected 1 to 1 images"),
        (POINT | {"images": ["/etc/passwd"]}, "expected a path below"),
        (POINT | {"images": ["a/../../b"]}, "expected a path below"),
        (
            POINT | {"type": "ground2d", "boxes": [[5, 5, 5, 9]], "points": None},
            "field 'points' is not",
        ),
        (
            {"id": "b", "type": "ground2d", "images": ["a"], "label": "x", "boxes": [[5, 5, 5, 9]]},
            "x1 < x2",
        ),
        (
            {"id": "m", "type": "mask_track", "images": ["a", "b"], "boxes": [[1, 1, 2, 2]],
             "mask": {"size": [2, 2], "counts": [3]}},
            "runs fill 3 pixels, expected 4",
        ),
    ],
)  # fmt: skip
def test_a_bad_record_is_named_by_file_and_line(tmp_path, record, sentence):
    pool = _pool(tmp_path, POINT, "", record)
    assert pool.record(0)["label"] == "mug"
    with pytest.raises(DataError, match=f"pool.jsonl, line 3.*{re.escape(sentence)}"):
        pool.record(1)
    faults = list(pool.check())
    assert "a.jpg is not there" in faults[0]
    assert len(faults) == 2


def test_points_outside_the_image_and_answers_that_are_no_option_are_refused():
    with pytest.raises(
        DataError, match="record 'p': points has \\[1, 2\\], outside the image of 9 x 1"
    ):
        make_sample(POINT, [Fit(1, 9, 28)], _rng())
    record = {"id": "q", "type": "general_vqa", "images": ["a"], "question": "?", "answer": "c",
              "options": ["a", "b"]}  # fmt: skip
    with pytest.raises(DataError, match="answer 'c' is none of the options"):
        make_sample(record, [Fit(9, 9, 28)], _rng())


def test_a_pool_picks_types_and_a_fixed_subset_and_survives_pickling(tmp_path):
    records = [POINT | {"id": f"p{i}"} for i in range(200)]
    records += [json.loads(EXAMPLES[0][0]) | {"id": f"q{i}"} for i in range(50)]
    pool = _pool(tmp_path, *records)
    assert len(pool) == 250
    again = pickle.loads(pickle.dumps(pool))
    assert again.record(220) == pool.record(220) == records[220]
    assert again.digest == pool.digest
    chosen = Pool(tmp_path, types=["general_vqa"])
    assert [chosen.record(i)["id"] for i in range(3)] == ["q0", "q1", "q2"]
    part = Pool(tmp_path, keep_percent=40)
    ids = {part.record(i)["id"] for i in range(len(part))}
    assert ids == {r["id"] for r in records if keep_record(r["id"], 40)}
    assert 70 < len(ids) < 130
    assert len({pool.digest, chosen.digest, part.digest}) == 3
    with pytest.raises(DataError, match="has no records of"):
        Pool(tmp_path, types=["traj3d"])
    with pytest.raises(DataError, match="expected a .jsonl file"):
        Pool(tmp_path / "nowhere")
