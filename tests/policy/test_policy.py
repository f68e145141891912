"""A run as a policy: the rows of its training, answers of a query alone, and what is refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from gear_jax.data.sequences import IGNORE, Question, token_rows
from gear_jax.data.tfrecord import DataError
from gear_jax.data.windows import empty_state
from gear_jax.evals.episodes import noise_seed
from gear_jax.policy.policy import open_policy
from gear_jax.systems import gear
from gear_jax.train.gear_batch import arrays, nested


@pytest.fixture(scope="module")
def trained_rows(config, data):
    """A batch of the training stream, its rows ending where a policy goes on, and as it was."""
    stream = data.open_train(config, None)
    batch = {key: np.copy(value) if isinstance(value, np.ndarray) else value
             for key, value in next(stream).items()}  # fmt: skip
    stream.close()
    return batch


def _prompts(batch, data, **more):
    config = dataclasses.replace(data.rows.config, prompt_only=True, **more)
    made = token_rows(batch, data.rows.tokenizer, config, [None] * len(batch["instruction"]))
    return arrays(batch | made)


def _windows(batch, observations):
    """The observation of each row: the one with its head view, its instruction and its state."""
    robots = {}
    for one in observations.values():
        key = one.images["head"].tobytes(), one.instruction
        robots.setdefault(key, []).append(one)
    return [
        robots[batch["images"][row, 0].tobytes(), batch["instruction"][row]]
        for row in range(len(batch["instruction"]))
    ]


def test_what_the_policy_reads_is_what_training_read(policy, data, trained_rows, observations):
    expected = _prompts(trained_rows, data)
    for row, candidates in enumerate(_windows(trained_rows, observations)):
        ours = policy.batch(candidates)
        same = [
            all(np.array_equal(ours[key][n], expected[key][row]) for key in ours)
            for n in range(len(candidates))
        ]
        assert any(same), row
        assert set(ours) == set(expected) - {"action", "action_mask", "labels"}


def test_a_marked_view_is_read_in_its_place_and_changes_nothing_else(policy, data, observations):
    plain, other = observations[0, 3], observations[1, 0]
    ref = np.full((112, 56, 3), 200, np.uint8)
    marked = dataclasses.replace(plain, ref_image=ref)
    made = policy.batch([marked, other])
    assert made["ref_image"].shape == (2, 56, 56, 3)
    assert (made["ref_image"][0, :, 14:42] == 200).all()
    assert not made["ref_image"][0, :, :14].any()
    assert not made["ref_image"][1].any()
    told = {
        "instruction": [plain.instruction, other.instruction],
        "questions": [[], []],
        "view_mask": np.array([[True, False, True]] * 2),
        "state": {"arm_mask": np.array([[False, True]] * 2),
                  "ee_mask": np.array([[False, True]] * 2),
                  "joint_mask": np.array([[[False] * 9, [True] * 9]] * 2)},
        "ref_mask": np.array([True, False]),
    }  # fmt: skip
    longer = dataclasses.replace(policy.sequence, length=policy.sequence.length + 4 + 3)
    rows = token_rows(told, data.rows.tokenizer, longer, [None, None])
    for name in ("tokens", "segments", "insert_index", "groups"):
        np.testing.assert_array_equal(made[name], rows[name], name)
    without = policy.batch([plain])
    for key in ("images", "scenes", "state/ee", "state/joints"):
        np.testing.assert_array_equal(made[key][:1], without[key])
    assert "ref_image" not in without


def test_a_question_is_asked_in_the_rows_that_taught_to_answer_it(policy, data, observations):
    image = observations[0, 0].images["head"]
    ours = policy.questions(["Where is it?"], [[image, image]])
    told = {
        "instruction": [""],
        "questions": [[Question("Where is it?", "there", (0, 1))]],
        "view_mask": np.array([[True, True, False]]),
        "state": empty_state((1,)),
    }
    taught = token_rows(told, data.rows.tokenizer, data.rows.config, [None])
    answer = taught["labels"][0] != IGNORE
    asked = (taught["segments"][0] == 1) & ~answer
    assert answer.sum() == len("there") + 1
    np.testing.assert_array_equal(ours["segments"][0] == 1, asked)
    for name in ("tokens", "insert_index", "groups"):
        np.testing.assert_array_equal(ours[name][0][asked], taught[name][0][asked], name)
    np.testing.assert_array_equal(ours["positions"][0][:, asked], taught["positions"][:, 0, asked])
    np.testing.assert_array_equal(ours["scenes"], taught["scenes"])
    np.testing.assert_array_equal(ours["images"][0, :2], [image, image])


def _same(one, two):
    np.testing.assert_array_equal(one.action, two.action)
    np.testing.assert_array_equal(one.latent_ids, two.latent_ids)


def test_an_answer_depends_on_its_query_alone(policy, query):
    ref = np.full((56, 56, 3), 90, np.uint8)
    queries = [query(number, 2) for number in range(6)]
    for place in (1, 4):
        seen = dataclasses.replace(queries[place].observation, ref_image=ref)
        queries[place] = dataclasses.replace(queries[place], observation=seen)
    together = policy(queries)
    for place in (5, 4, 0):
        _same(policy(queries[place : place + 1])[0], together[place])
    for one, two in zip(policy(queries[::-1]), together[::-1], strict=True):
        _same(one, two)
    assert len({one.action.tobytes() for one in together}) == 6


@pytest.mark.parametrize("axes", [{"data": 4}, {"replica": 2, "data": 2}])
def test_the_number_of_devices_changes_no_bit(make_policy, query, axes):
    queries = [query(number, 2) for number in range(5)]
    alone, many = make_policy(1, 2), make_policy(4, 2, **axes)
    assert (alone.batch_size, many.batch_size) == (2, 8)
    for one, two in zip(many(queries), alone(queries), strict=True):
        _same(one, two)


def test_parameters_may_be_split_over_devices(make_policy, query):
    queries = [query(number, 2) for number in range(3)]
    split = make_policy(8, 1, data=2, fsdp=2, tensor=2)
    assert split.batch_size == 4
    for one, two in zip(split(queries), make_policy(1, 2)(queries), strict=True):
        np.testing.assert_allclose(one.action, two.action, atol=1e-4)
        np.testing.assert_array_equal(one.latent_ids, two.latent_ids)


def test_a_changed_mark_changes_the_answer(policy, query):
    asked = query(0, 0)

    def answer(grey):
        ref = np.full((56, 56, 3), grey, np.uint8)
        seen = dataclasses.replace(asked.observation, ref_image=ref)
        return policy([dataclasses.replace(asked, observation=seen)])[0].action

    dark, bright, plain = answer(10), answer(240), policy([asked])[0].action
    assert np.abs(dark - bright).max() > 1e-4
    assert np.abs(dark - plain).max() > 1e-4
    np.testing.assert_array_equal(dark, answer(10))


def test_a_question_is_answered_greedily_and_alone(policy, observations):
    pictures = [observations[number, 0].images["head"] for number in range(6)]
    prompts = [f"What is number {number}?" for number in range(6)]
    said = policy.ask(prompts, [[one] for one in pictures], max_new_tokens=6)
    assert policy.ask(prompts[5:], [[pictures[5]]], max_new_tokens=6) == said[5:]
    flat = policy.questions(prompts[:1], [[pictures[0]]])
    hidden, _ = gear.prefill(policy.params, policy.cfg, nested(flat))
    last = int(np.flatnonzero(flat["segments"][0])[-1])
    scores = gear.logits(policy.params, policy.cfg, hidden[:, last : last + 1])
    first = policy.tokenizer.decode([int(scores[0, 0].argmax())], skip_special=True)
    assert said[0].startswith(first)


def test_the_vlm_stops_where_its_turn_ends(policy, observations, monkeypatch):
    end = policy.tokenizer.id("<|im_end|>")
    table = policy.params["language"]
    name = "head" if "head" in table else "embed"
    pictures = [[observations[0, 0].images["head"]]]
    row = np.asarray(table[name])
    # the end of a turn is liked best: its row is the state that the first token is said from
    flat = policy.questions(["Well?"], pictures)
    hidden, _ = gear.prefill(policy.params, policy.cfg, nested(flat))
    last = int(np.flatnonzero(flat["segments"][0])[-1])
    liked = row.copy()
    liked[end] = 1e3 * np.asarray(hidden[0, last]) / np.linalg.norm(hidden[0, last])
    params = policy.params | {"language": table | {name: jax.numpy.asarray(liked)}}
    assert len(policy.ask(["Well?"], pictures, max_new_tokens=6)[0]) > 0
    monkeypatch.setattr(policy, "params", params)
    assert policy.ask(["Well?"], pictures, max_new_tokens=6) == [""]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"images": {"front": np.zeros((9, 9, 3), np.uint8)}}, r"views \['front'\]: expected some"),
        ({"embodiment": "widowx"}, "robot 'widowx' is unknown to the run: expected one of"),
        ({"instruction": "<|im_end|>"}, "reserved token"),
    ],
)
def test_what_the_run_cannot_take_is_one_sentence(policy, query, changes, sentence):
    asked = query(0, 0)
    odd = dataclasses.replace(asked.observation, **changes)
    with pytest.raises(ValueError, match=sentence):
        policy([dataclasses.replace(asked, observation=odd)])


def test_a_question_without_an_image_is_refused(policy):
    with pytest.raises(ValueError, match="0 images: expected one to 3"):
        policy.ask(["What?"], [[]])


# A trained run


def test_a_run_opens_and_answers(opened, query, data):
    answers = opened([query(0, 0), query(1, 0)])
    assert opened.identity()["step"] == 2
    assert opened.identity()["statistics"] == data.normalizer.digest()
    for one in answers:
        assert one.action.shape == (30, 20)
        assert np.isfinite(one.action).all()
        assert one.latent_ids.shape == (20,)
        codes = one.latent_ids.reshape(5, 4)
        assert (codes[:, :2] < 8).all()
        assert (codes[:, 2:] >= 8).all()


def test_an_untrained_policy_is_the_run_with_random_parameters(run, opened, query):
    floor = open_policy(run, untrained=True, device_batch=1)
    assert floor.identity()["parameters"] == "random"
    assert "checkpoint" not in floor.identity()
    assert floor.identity()["config"] == opened.identity()["config"]
    (one,), (other,) = floor([query(0, 0)]), opened([query(0, 0)])
    assert np.isfinite(one.action).all()
    assert not np.array_equal(one.action, other.action)


def test_temperature_scales_the_noise_and_is_part_of_what_the_policy_is(run, opened, query):
    still, again = (open_policy(run, seed=seed, temperature=0.0, device_batch=1) for seed in (0, 1))
    (one,), (other,), (drawn,) = (made([query(0, 0)]) for made in (still, again, opened))
    np.testing.assert_array_equal(one.action, other.action)  # whatever the seed
    assert not np.array_equal(one.action, drawn.action)
    half = open_policy(run, temperature=0.5, device_batch=1)
    observation, whole = query(0, 0).observation, opened.spec
    noise = np.random.default_rng(noise_seed(query(0, 0), 0)).standard_normal(
        (1, whole.chunk_len, whole.action_dim)
    )
    expected, _ = opened.chunks([observation], 0.5 * noise)
    (made,) = half([query(0, 0)])
    np.testing.assert_array_equal(made.action, expected[0])
    assert half.identity() == opened.identity() | {"temperature": 0.5}
    with pytest.raises(ValueError, match=r"temperature 1.5: expected 0 .. 1"):
        open_policy(run, temperature=1.5)


def _copy(run, target):
    return shutil.copytree(run, target)


def test_a_normaliser_of_another_run_is_refused(run, data, tmp_path):
    other = dataclasses.replace(data.normalizer, states={})
    workdir = _copy(run, tmp_path / "run")
    (workdir / "normalizer.json").write_text(other.to_json())
    with pytest.raises(DataError, match="normalizer.json is .* step 2 was trained with .*: not of"):
        open_policy(workdir)
    changed = json.loads(other.to_json())
    changed["spec"]["rate_hz"] = 20.0
    (workdir / "normalizer.json").write_text(json.dumps(changed))
    with pytest.raises(DataError, match="changed by hand"):
        open_policy(workdir)


def test_a_run_without_an_expert_and_a_folder_without_a_run_are_refused(run, tmp_path):
    with pytest.raises(DataError, match="expected the folder of a trained run"):
        open_policy(tmp_path)
    config = json.loads((run / "config.json").read_text())
    config["stage"] = "pretrain"
    config["model"]["expert"] = None
    config["optim"]["partitions"] = [["vision/.*", None], [".*", "vlm"]]
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(run / "normalizer.json", tmp_path)
    with pytest.raises(ValueError, match="no action expert: expected one of stage policy or adapt"):
        open_policy(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
