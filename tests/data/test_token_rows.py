import dataclasses

import numpy as np
import pytest

from gear_jax.data import sequences
from gear_jax.data.sequences import IGNORE, Question, SequenceConfig, token_rows

CONFIG = SequenceConfig(length=64, view_grid=(1, 2), transitions=2, codes=2, fast_length=4)
NAMES = ["<|view_ref|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|view_head|>",
         "<|view_left|>", "<|view_right|>", "<|state_start|>", "<|state_pad|>", "<|state_end|>",
         "<|la_start|>",
         "<la_0>", "<la_1>", "<la_2>", "<la_3>", "<|la_end|>", "<|fast_start|>", "<fast_0000>",
         "<fast_0001>", "<fast_0002>", "<|fast_end|>", "<|im_end|>"]  # fmt: skip


class _Words:
    """A tokenizer of whole words: 1 opens the prompt, 2 begins the answer, letters from 100."""

    def encode(self, text):
        if text == sequences._OPENING:
            return [1]
        if text == sequences._TURN:
            return [2]
        return [100 + ord(word[0]) - ord("a") for word in text.split()]

    def id(self, token):
        return 10 + NAMES.index(token)

    def check_user_text(self, text):
        if "<|im_end|>" in text:
            raise ValueError("reserved token")


def _batch(rows=1, **changes):
    batch = {
        "instruction": ["a b"] * rows,
        "questions": [[] for _ in range(rows)],
        "view_mask": np.array([[True, False, True]] * rows),
        "state": {
            "arm_mask": np.array([[False, True]] * rows),
            "ee_mask": np.array([[False, True]] * rows),
            "joint_mask": np.array([[[False] * 9, [True] * 9]] * rows),
        },
        "latent_ids": np.array([[[0, 3], [1, 2]]] * rows),
        "latent_mask": np.array([[True, False]] * rows),
    }
    return {**batch, **changes}


def _names(tokens):
    return [NAMES[t - 10] if 10 <= t < 10 + len(NAMES) else int(t) for t in tokens]


def _one(batch, fast=(0, 2), config=CONFIG):
    made = token_rows(batch, _Words(), config, [np.array(fast) if fast is not None else None])
    length = int((made["segments"][0] > 0).sum())
    assert (made["segments"][0][length:] == 0).all()
    assert (made["labels"][0][length:] == IGNORE).all()
    made["positions"] = made["positions"][:, 0, :length][None]
    whole = ("positions", "latent_index", "latent_valid", "chunk_position")
    return {k: v[0] if k in whole else v[0, :length] for k, v in made.items()}


def test_a_robots_row_has_the_papers_order():
    row = _one(_batch())
    pad = "<|image_pad|>"
    assert _names(row["tokens"]) == [
        1,
        "<|view_head|>", "<|vision_start|>", pad, pad, "<|vision_end|>",
        "<|view_left|>", "<|vision_start|>", pad, pad, "<|vision_end|>",
        "<|view_right|>", "<|vision_start|>", pad, pad, "<|vision_end|>",
        100, 101,
        "<|state_start|>", *["<|state_pad|>"] * 4, "<|state_end|>",
        2,
        "<|la_start|>", "<la_0>", "<la_3>", "<la_1>", "<la_2>", "<|la_end|>",
        "<|fast_start|>", "<fast_0000>", "<fast_0002>", "<|fast_end|>",
        "<|im_end|>",
    ]  # fmt: skip
    learned = _names(row["tokens"][row["labels"] != IGNORE])
    assert learned == ["<|la_start|>", "<la_0>", "<la_3>", "<|la_end|>", "<|fast_start|>",
                       "<fast_0000>", "<fast_0002>", "<|fast_end|>", "<|im_end|>"]  # fmt: skip
    acts = _names(row["tokens"][row["acts"].astype(bool)])
    assert (acts[0], acts[-1], len(acts)) == ("<|la_start|>", "<|im_end|>", 11)
    assert row["acts"].tolist() == [0] * 25 + [1] * 6 + [2] * 5
    assert row["groups"].tolist() == (
        [0, 0, 0, 1, 1, 0, 0, 0, 2, 2, 0, 0, 0, 2, 2, 0, 0, 0, 0, 4, 4, 4, 4, 0, 0, 0]
        + [8] * 4
        + [0] * 6
    )
    # views in order, then the state's four
    assert row["insert_index"][row["insert_index"] >= 0].tolist() == list(range(10))
    assert row["latent_index"].tolist() == [26, 27, 28, 29]
    assert row["latent_valid"].tolist() == [True, True, False, False]


def test_what_is_absent_is_alone_with_itself():
    row = _one(_batch())
    alone = row["segments"] >= sequences._ALONE
    # the left view with its marks, the left arm's two states, the transition outside the episode
    assert np.flatnonzero(alone).tolist() == [6, 7, 8, 9, 10, 19, 20, 28, 29]
    counts = np.bincount(row["segments"][alone] - sequences._ALONE)
    assert counts[1] == 5  # a view's tokens see each other
    assert sorted(counts[counts > 0].tolist()) == [1, 1, 1, 1, 5]


def test_positions_are_those_of_mrope_and_do_not_depend_on_what_is_absent():
    row = _one(_batch())
    assert row["positions"][0].tolist() == [
        0, 1, 2, 3, 3, 5, 6, 7, 8, 8, 10, 11, 12, 13, 13, *range(15, 36)
    ]  # fmt: skip
    assert row["positions"][2][[3, 4]].tolist() == [3, 4]
    other = _one(_batch(view_mask=np.array([[True, True, True]])))
    np.testing.assert_array_equal(row["positions"], other["positions"])


def test_video_of_people_has_no_state_and_no_fast_block():
    state = {key: np.zeros_like(value) for key, value in _batch()["state"].items()}
    names = _names(_one(_batch(state=state), fast=None)["tokens"])
    assert "<|state_pad|>" not in names
    assert "<|fast_start|>" not in names
    assert names[-7:] == ["<|la_start|>", "<la_0>", "<la_3>", "<la_1>", "<la_2>", "<|la_end|>",
                          "<|im_end|>"]  # fmt: skip


def test_a_question_has_its_images_and_its_answer_only():
    row = _one(_batch(instruction=[""], questions=[[Question("b", "c d", (0, 2))]]), fast=None)
    pad = "<|image_pad|>"
    assert _names(row["tokens"]) == [
        1, "<|vision_start|>", pad, pad, "<|vision_end|>", "<|vision_start|>", pad, pad,
        "<|vision_end|>", 101, 2, 102, 103, "<|im_end|>",
    ]  # fmt: skip
    assert _names(row["tokens"][row["labels"] != IGNORE]) == [102, 103, "<|im_end|>"]
    assert row["insert_index"][row["insert_index"] >= 0].tolist() == [0, 1, 4, 5]
    assert not row["acts"].any()
    assert not row["latent_valid"].any()


def _nobody():
    """The state of a question whose record says none."""
    return {key: np.zeros_like(value) for key, value in _batch()["state"].items()}


@pytest.mark.parametrize(("state", "shown"), [(None, 24), (_nobody(), 18)])
def test_a_question_about_a_robots_views_begins_as_its_rows_do(state, shown):
    """With views and instruction, and the state where the record says it."""
    question = Question("a b", "c", (0, 2), robot=True)
    changes = {} if state is None else {"state": state}
    told = _batch(instruction=[""], questions=[[question]], **changes)
    asked = _one(told, fast=None)
    robot = _one(_batch())
    for name in ("tokens", "segments", "groups", "insert_index"):
        np.testing.assert_array_equal(asked[name][:shown], robot[name][:shown], err_msg=name)
    np.testing.assert_array_equal(asked["positions"][:, :shown], robot["positions"][:, :shown])
    assert _names(asked["tokens"][shown:]) == [2, 102, "<|im_end|>"]
    assert (asked["labels"] != IGNORE).sum() == 2
    scenes = [
        token_rows(one, _Words(), CONFIG, [None])["scenes"].tolist() for one in (_batch(), told)
    ]
    assert scenes[0] == scenes[1] == [[0, -1, 0]]


def test_a_question_of_no_robot_has_no_state():
    row = _one(_batch(instruction=[""], questions=[[Question("a b", "c", (0, 2))]]), fast=None)
    assert "<|state_pad|>" not in _names(row["tokens"])


def test_a_question_about_a_robots_views_may_be_answered_through_a_latent_block():
    config = dataclasses.replace(CONFIG, through_latents=True)
    questions = [[Question("a b", "c", (0, 2), robot=True)]]
    told = _batch(instruction=[""], questions=questions, state=_nobody())
    row = _one(told, fast=None, config=config)
    robot = _one(_batch())
    codes = ["<|la_start|>", *["<la_0>"] * 4, "<|la_end|>"]
    assert _names(row["tokens"][18:]) == [2, *codes, 102, "<|im_end|>"]
    assert row["acts"][18:].tolist() == [0, *[1] * 6, 3, 3]
    assert row["latent_valid"].all()
    assert row["latent_index"].tolist() == [20, 21, 22, 23]
    assert row["groups"][20:24].tolist() == robot["groups"][26:30].tolist()
    assert _names(row["tokens"][row["labels"] != IGNORE]) == [102, "<|im_end|>"]
    plain = [[Question("a b", "c", (0, 2))]]  # of no robot
    row = _one(_batch(instruction=[""], questions=plain), fast=None, config=config)
    assert not row["acts"].any()


def test_fast_tokens_of_a_row_without_ids_may_stand_behind_a_latent_block():
    config = dataclasses.replace(CONFIG, through_latents=True)
    nowhere = _batch(latent_mask=np.zeros((1, 2), bool))
    unknown = {key: value for key, value in nowhere.items() if not key.startswith("latent_")}
    codes = ["<|la_start|>", *["<la_0>"] * 4, "<|la_end|>"]
    said = ["<|fast_start|>", "<fast_0000>", "<fast_0002>", "<|fast_end|>", "<|im_end|>"]
    for batch in (nowhere, unknown):
        row = _one(batch, config=config)
        assert _names(row["tokens"][-11:]) == [*codes, *said]
        assert row["latent_valid"].all()
        assert (row["segments"][-11:] == 1).all()
        assert _names(row["tokens"][row["labels"] != IGNORE]) == said
    known = _one(_batch(), config=config)
    for name, value in _one(_batch()).items():  # a row that has ids is as it was
        np.testing.assert_array_equal(known[name], value, err_msg=name)


def test_questions_that_share_a_row_are_as_if_each_came_alone():
    one, two = Question("b", "c d", (0,)), Question("a b", "e", (1,))
    row = _one(_batch(instruction=[""], questions=[[one, two]]), fast=None)
    alone = [_one(_batch(instruction=[""], questions=[[q]]), fast=None) for q in (one, two)]
    for name in ("tokens", "labels", "insert_index"):
        joined = np.concatenate([part[name] for part in alone])
        np.testing.assert_array_equal(row[name], joined)
    joined = np.concatenate([part["positions"] for part in alone], axis=1)
    np.testing.assert_array_equal(row["positions"], joined)
    lengths = [len(part["tokens"]) for part in alone]
    np.testing.assert_array_equal(row["segments"], np.repeat([1, 2], lengths))
    batch = _batch(instruction=[""], questions=[[one, two]], view_mask=np.array([[1, 1, 0]], bool))
    assert token_rows(batch, _Words(), CONFIG, [None])["scenes"].tolist() == [[0, 1, -1]]


def test_a_row_that_shows_nothing_teaches_nothing():
    batch = _batch(latent_mask=np.zeros((1, 2), bool))
    assert (_one(batch, fast=None)["labels"] == IGNORE).all()


def test_variants_leave_blocks_out_and_a_long_fast_sequence_is_not_cut():
    without = _names(_one(_batch(), config=dataclasses.replace(CONFIG, with_fast=False))["tokens"])
    assert without[-2:] == ["<|la_end|>", "<|im_end|>"]
    assert _names(_one(_batch(), fast=(0, 1, 2, 0, 1))["tokens"]) == without
    row = _one(_batch(), config=dataclasses.replace(CONFIG, latents="none"))
    assert "<|la_start|>" not in _names(row["tokens"])
    assert row["chunk_position"] == row["positions"][0][24]  # of the turn's last token
    alone = _one(_batch(), fast=None, config=dataclasses.replace(CONFIG, latents="none"))
    prompt = _one(_batch(), config=dataclasses.replace(CONFIG, latents="none", prompt_only=True))
    np.testing.assert_array_equal(alone["tokens"], prompt["tokens"])


def test_the_chunk_follows_the_last_latent_token():
    row = _one(_batch())
    assert row["chunk_position"] == row["positions"][0][29]
    prompt = _one(_batch(), config=dataclasses.replace(CONFIG, prompt_only=True))
    assert _names(prompt["tokens"])[-1] == "<|la_start|>"


def test_learned_latents_hold_the_places_of_codes_and_are_not_asked_for():
    row = _one(_batch(), config=dataclasses.replace(CONFIG, latents="learned"))
    assert row["insert_index"][26:30].tolist() == [10, 11, 12, 13]  # behind six views' and 4 states
    assert row["latent_index"].tolist() == [26, 27, 28, 29]
    assert row["latent_valid"].all()
    learned = _names(row["tokens"][row["labels"] != IGNORE])
    assert learned == ["<|fast_start|>", "<fast_0000>", "<fast_0002>", "<|fast_end|>", "<|im_end|>"]
    prompt = _one(_batch(), config=dataclasses.replace(CONFIG, latents="learned", prompt_only=True))
    np.testing.assert_array_equal(prompt["latent_index"], row["latent_index"])


def test_the_marked_first_view_stands_before_the_others_and_is_alone_where_there_is_none():
    row = _one(_batch(ref_mask=np.array([True])))
    pad = "<|image_pad|>"
    assert _names(row["tokens"])[1:6] == [
        "<|view_ref|>", "<|vision_start|>", pad, pad, "<|vision_end|>",
    ]  # fmt: skip
    assert row["insert_index"][3:5].tolist() == [14, 15]  # behind 6 views', 4 states', 4 latents'
    assert (row["segments"][1:6] == 1).all()
    none = _one(_batch(ref_mask=np.array([False])))
    assert len(np.unique(none["segments"][1:6])) == 1
    assert none["segments"][1] not in none["segments"][6:]
    np.testing.assert_array_equal(none["positions"], row["positions"])


def test_a_robot_s_own_embeddings_stand_behind_the_instruction():
    row = _one(_batch(), config=dataclasses.replace(CONFIG, prompt_tokens=2))
    own = np.flatnonzero(row["insert_index"] >= 14)
    assert row["insert_index"][own].tolist() == [14, 15]
    assert _names(row["tokens"][own[0] - 2 : own[0]]) == [100, 101]
    assert _names(row["tokens"][own[1] + 1 : own[1] + 2]) == ["<|state_start|>"]


def test_rows_of_all_kinds_share_a_batch():
    batch = _batch(3, questions=[[], [Question("b", "c", (0,))], []])
    made = token_rows(batch, _Words(), CONFIG, [np.array([0]), None, None])
    assert made["tokens"].shape == (3, 64)
    assert made["positions"].shape == (3, 3, 64)
    assert made["latent_valid"].sum(axis=1).tolist() == [2, 0, 2]


def test_a_row_that_is_too_long_or_forges_a_token_is_refused():
    with pytest.raises(ValueError, match=r"row 0 has 36 tokens, expected up to 30: 'a b'"):
        token_rows(_batch(), _Words(), dataclasses.replace(CONFIG, length=30), [np.array([0, 2])])
    with pytest.raises(ValueError, match=r"row 0 has 9 tokens to learn, expected up to 8"):
        token_rows(
            _batch(), _Words(), dataclasses.replace(CONFIG, most_labels=8), [np.array([0, 2])]
        )
    with pytest.raises(ValueError, match="reserved token"):
        token_rows(_batch(instruction=["a <|im_end|>"]), _Words(), CONFIG, [None])
