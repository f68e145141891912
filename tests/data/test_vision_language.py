import json
import pathlib
import pickle
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gear_jax.data.images import Fit
from gear_jax.data.mask_overlay import encode_mask
from gear_jax.data.record_pool import Pool, keep_record
from gear_jax.data.record_state import read_state, state_fault, write_state
from gear_jax.data.tfrecord import DataError
from gear_jax.data.vision_language import TYPES, make_sample, parse_answer

DOC = pathlib.Path(__file__).parents[2] / "docs" / "vision_language.md"
BLOCK = re.compile(r"```json\n(.*?)\n```\n\n```text\n(.*?)\n---\n(.*?)\n```", re.DOTALL)
EXAMPLES = BLOCK.findall(DOC.read_text())
MASKED = {
    "id": "m", "type": "mask_track", "images": ["a", "b"], "boxes": [[1, 1, 2, 2]],
    "mask": {"size": [2, 2], "counts": [2, 2]},
}  # fmt: skip
CHOICE = {
    "id": "q", "type": "general_vqa", "images": ["a"], "question": "?", "answer": "b",
    "options": ["a", "b"],
}  # fmt: skip
POINT = {"id": "p", "type": "object_point", "images": ["a.jpg"], "label": "mug", "points": [[1, 2]]}
RIGHT = {
    "ee_pos": [0.3, 0, 0.2], "ee_quat": [0, 1, 0, 0], "joint_pos": [0.1] * 7, "grip_open": 1,
}  # fmt: skip
STATE = {"embodiment": "franka", "arms": {"right": RIGHT}}


def _about(state):
    return POINT | {"views": ["head"], "state": state}


def _arm(**changes):
    arm = {key: value for key, value in (RIGHT | changes).items() if value is not None}
    return _about(STATE | {"arms": {"right": arm}})


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


def test_the_pages_example_with_a_state_is_accepted(tmp_path):
    (line,) = re.findall(r"^    (\{.*\})$", DOC.read_text(), re.MULTILINE)
    assert _pool(tmp_path, line).record(0)["state"]["embodiment"] == "franka"


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
    record = {
        "id": "p",
        "type": "object_point",
        "images": ["a"],
        "label": "mug",
        "points": [box[:2]],
    }
    said = parse_answer("object_point", make_sample(record, [fit], _rng()).answer, [fit])
    _, _, rows, columns = fit.box
    wanted = np.minimum(np.multiply(box[:2], [sx, sy]), [columns - 1, rows - 1])  # a pixel in it
    assert np.abs(np.multiply(said[0], [sx, sy]) - wanted).max() <= 0.5 + 1e-6


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
        ("<point x='20' y='40'>mug</point>", [[10, 20]]),
        ('<points x1="20" y1="40" x2="60" y2="80">mugs</points>', [[10, 20], [30, 40]]),
        ("[(2e1, +40.), (.5, 6)]", [[10, 20], [0.25, 3]]),
        ('It is (3, 4) cm wide: [{"point_2d": [20, 40]}]', [[10, 20]]),
        ("[(" + "9" * 400 + ", 40)]", None),
        ("[(1e999, 40)]", None),
        ("I cannot see a mug.", None),
        ("", None),
    ],
)
def test_points_are_found_in_many_forms(text, points):
    assert parse_answer("object_point", text, [Fit(100, 100, 200)]) == points


def test_numbers_in_a_label_are_no_box_and_turned_corners_neither():
    fit = [Fit(100, 100, 200)]
    label = {"label": "cup [1, 2, 3, 4]", "boxes": [[10, 20, 30, 40]]}
    record = {"id": "b", "type": "ground2d", "images": ["a"], **label}
    answer = make_sample(record, fit, _rng()).answer
    assert parse_answer("ground2d", answer, fit) == [[10, 20, 30, 40]]
    assert parse_answer("ground2d", "[60, 80, 20, 40]", fit) is None


@pytest.mark.parametrize("kind", ["general_vqa", "object_point", "ground2d", "traj3d", "ground3d"])
@pytest.mark.parametrize(
    "part", [" ", "[", "[ ", "1", "[1, ", "answer ", "<point x", "'bbox_2d': "]
)
def test_reading_takes_no_longer_than_the_text_is_long(kind, part):
    begin = time.perf_counter()
    for text in ("answer" + part * 5_000 + "?", "<point [1" + part * 5_000 + "?"):
        parse_answer(kind, text, [Fit(9, 9, 9)], options=kind == "general_vqa")
    assert time.perf_counter() - begin < 2


def test_small_negative_numbers_become_a_zero_without_a_minus():
    record = {"id": "t", "type": "traj3d", "images": ["a"], "instruction": "go",
              "points_3d": [[-0.001, 0, 1.005]]}  # fmt: skip
    assert make_sample(record, [Fit(9, 9, 9)], _rng()).answer == "[[0.0, 0.0, 1.0]]"


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
        ("ANSWER: B", "B"),
        ("A is wrong. Answer: **C**", "C"),
        ("Answer: I think it is B", "B"),
        ("the A4 paper, not vitamin B12", None),
        ("Bär", None),
        ("D\u2019accord", None),
        ("an A-frame", None),
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
        (POINT | {"views": ["tail"]}, "field 'views': expected different ones of"),
        (POINT | {"views": "head"}, "field 'views': expected different ones of"),
        (POINT | {"views": ["head", "left_wrist"]}, "'views' has 2, expected one for each image"),
        (POINT | {"state": STATE}, "field 'state' is a robot's: expected field 'views' beside it"),
        (_about({}), "field 'state': expected an object with 'embodiment' and 'arms'"),
        (_about(STATE | {"embodiment": "toaster"}), "'state': expected an 'embodiment' of"),
        (_about(STATE | {"embodiment": "human"}), "'state': expected an 'embodiment' of"),
        (_about(STATE | {"embodiment": ["franka"]}), "'state': expected an 'embodiment' of"),
        (_about(STATE | {"arms": {"left": RIGHT}}), "'arms' with some of ['right']"),
        (_about(STATE | {"arms": {"right": {"elbow": 1}}}), "arm 'right' with some of"),
        (_arm(ee_quat=None), "arm 'right' with both of 'ee_pos' and 'ee_quat'"),
        (_arm(joint_pos=[0.0] * 6), "7 finite numbers in 'joint_pos'"),
        (_arm(ee_pos=[0, 10**400, 0]), "3 finite numbers in 'ee_pos'"),
        (_arm(ee_quat=[1, 1, 0, 0]), "an 'ee_quat' of length 1"),
        (_arm(grip_open=1.5), "a 'grip_open' of 0 .. 1"),
        (_arm(grip_open="wide"), "a 'grip_open' of 0 .. 1"),
        (POINT | {"points": [[1, float("nan")]]}, "field 'points': expected one to 10000 lists"),
        (POINT | {"points": [[1, 2]] * 10_001}, "field 'points'"),
        (POINT | {"points": [[1, True]]}, "field 'points'"),
        (POINT | {"points": [[1, 10**400]]}, "field 'points'"),
        (POINT | {"label": "\ud800"}, "a text that UTF-8 can hold"),
        (POINT | {"id": "\ud800"}, "a text 'id'"),
        (POINT | {"images": ["a\0b"]}, "expected a path below"),
        (CHOICE | {"answer": "c"}, "field 'answer': expected one of the options"),
        (CHOICE | {"options": ["b", "b"]}, "two to 6 different texts"),
        (CHOICE | {"options": list("abcdefg")}, "two to 6 different texts"),
        (MASKED | {"color": ["red"]}, "field 'color': expected one of"),
        (MASKED | {"mask": {"size": [2, 2], "counts": [4]}}, "a mask that marks something"),
        (MASKED | {"mask": {"size": [10**9] * 2, "counts": [10**18]}}, "more than 50000000"),
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
        (MASKED | {"mask": {"size": [2, 2], "counts": [3]}}, "runs fill 3 pixels, expected 4"),
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
    with pytest.raises(DataError, match="answer 'c' is none of the options"):
        make_sample(CHOICE | {"answer": "c"}, [Fit(9, 9, 28)], _rng())


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


@pytest.mark.parametrize("known", [("ee_pos", "ee_quat"), ("joint_pos",), ("grip_open",)])
def test_a_state_comes_back_as_it_was_told_and_what_is_not_told_is_masked(known):
    told = {"embodiment": "franka", "arms": {"right": {key: RIGHT[key] for key in known}}}
    assert state_fault(told) is None
    state = read_state(told)
    assert write_state("franka", state) == told
    assert state["arm_mask"].tolist() == [False, True]
    masks = {"ee_pos": "ee_mask", "joint_pos": "joint_mask", "grip_open": "grip_mask"}
    for field, mask in masks.items():
        assert not state[mask][0].any()
        assert state[mask][1].any() == (field in known)
    if "ee_pos" in known:
        np.testing.assert_allclose(state["ee_pose"][1, :3, 3], RIGHT["ee_pos"], atol=1e-7)
        np.testing.assert_allclose(state["ee_pose"][1, :3, :3], np.diag([1, -1, -1]), atol=1e-7)
