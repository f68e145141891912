"""The mask-guided mode: words, masks, and what is kept of an episode's first view."""

import dataclasses

import cv2
import numpy as np
import pytest

from gear_jax.data.mask_overlay import overlay
from gear_jax.data.sources.reach import ReachSource, draw
from gear_jax.evals import policies
from gear_jax.policy import mask_guided
from gear_jax.policy.mask_guided import GrabCut, MaskGuidedPolicy, Rectangle
from launch import eval as door

MASKED = "the object with the red-colored mask"


@pytest.mark.parametrize(
    ("instruction", "phrase"),
    [
        ("pick up the red block", "the red block"),
        ("Grab the blue block and lift it.", "the blue block"),
        ("reach the green disc", "the green disc"),
        ("pick up the black bowl between the plate and the ramekin and place it on the plate",
         "the black bowl between the plate and the ramekin"),
        ("put the wine bottle on top of the cabinet", "the wine bottle"),
        ("pick up the red block and throw the blue block", None),
        ("open the drawer", None),
    ],
)  # fmt: skip
def test_the_object_of_a_known_wording_is_found_without_asking(instruction, phrase):
    assert mask_guided.known_phrase(instruction) == phrase


@pytest.mark.parametrize(
    ("answer", "phrase"),
    [
        ("red mug", "red mug"),
        ('"The red mug."\n', "The red mug"),
        ("mug", "mug"),
        ("blue mug", None),
        ("re", None),
        ("", None),
        ("Move the red mug.", None),
    ],
)
def test_what_the_vlm_calls_the_object_counts_where_the_instruction_has_it(answer, phrase):
    assert mask_guided.said_phrase(answer, "move the red mug") == phrase


@pytest.mark.parametrize(
    ("instruction", "phrase", "expected"),
    [
        ("pick up the red block", "the red block", f"pick up {MASKED}"),
        ("move the red mug (large) away", "red mug (large)", f"move {MASKED} away"),
        ("Move that Mug, please", "mug", f"Move {MASKED}, please"),
        ("mugs: take a mug", "mug", f"mugs: take {MASKED}"),
        ("open the drawer", None, f"open the drawer (target: {MASKED})"),
        ("open the drawer", "red mug", f"open the drawer (target: {MASKED})"),
    ],
)
def test_the_mask_is_named_in_the_objects_place(instruction, phrase, expected):
    assert mask_guided.rewrite(instruction, phrase, "red") == expected


def test_the_mask_has_a_colour_that_the_instruction_does_not_name():
    assert mask_guided.choose_colour("open the drawer") == "red"
    assert mask_guided.choose_colour("put the Red block on the green one") == "blue"
    assert mask_guided.choose_colour("reduce the reds") == "red"


def _scene(size=160):
    """A drawn table, and the pixels and the box of the disc that is meant."""
    episode = ReachSource(num_episodes=1, seed=3).episode(0)
    scene = episode.scene
    image = draw(scene, np.array([2.0, 2.0, 0.2]), "head", size)  # no hand in sight
    axis = ((np.arange(size) + 0.5) / size - 0.5) * 0.5
    x, y = np.meshgrid(0.5 + axis, axis, indexing="ij")
    place = scene.places[scene.named]
    disc = np.hypot(x - place[0], y - place[1]) < 0.04
    rows, columns = np.flatnonzero(disc.any(axis=1)), np.flatnonzero(disc.any(axis=0))
    box = columns[0] - 6, rows[0] - 6, columns[-1] + 7, rows[-1] + 7
    return image, disc, tuple(int(x) for x in box)


def test_grabcut_finds_a_painted_disc():
    image, disc, box = _scene()
    found = GrabCut()(image, box)
    overlap = (found & disc).sum() / (found | disc).sum()
    assert overlap > 0.8
    square = Rectangle()(image, box)
    assert (square & disc).sum() / (square | disc).sum() < 0.7


def test_a_mask_is_a_function_of_image_and_box():
    rng = np.random.default_rng(3)  # an image whose colour models depend on where they begin
    ground = cv2.resize(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), (80, 80),
                        interpolation=cv2.INTER_CUBIC)  # fmt: skip
    noise = rng.normal(0, 25, (80, 80, 3))
    y, x = np.mgrid[:80, :80]
    disc = np.hypot(x - 40, y - 40)[..., None] < 14
    image = np.clip(0.6 * ground + 60 * disc + noise, 0, 255).astype(np.uint8)
    made = []
    for seed in range(6):
        cv2.setRNGSeed(seed)
        made.append(GrabCut(rounds=1)(image, (20, 20, 60, 60)).tobytes())
    assert len(set(made)) == 1


def test_a_box_without_anything_to_tell_apart_is_the_mask_itself():
    image = np.full((20, 30, 3), 80, np.uint8)
    whole = GrabCut()(image, (0, 0, 30, 20))
    assert whole.all()
    tiny = GrabCut()(image, (3, 4, 5, 6))
    assert tiny.sum() == 4
    assert tiny[4:6, 3:5].all()
    assert GrabCut()(image, (5, 5, 20, 15)).any()


class _Said:
    """Answers questions as it is told; keeps the prompts."""

    def __init__(self, answers):
        self.answers, self.prompts = answers, []

    def __call__(self, prompts, images):
        assert all(len(one) == 1 for one in images)
        self.prompts += prompts
        return [
            next(answer for words, answer in self.answers.items() if words in prompt)
            for prompt in prompts
        ]


@pytest.fixture
def say(policy, monkeypatch):
    """{words of the prompt: answer} -> what was asked."""

    def install(answers):
        said = _Said(answers)
        monkeypatch.setattr(policy, "ask", said)
        return said

    return install


def _answers(policy, queries):
    return [one.action for one in policy(queries)]


def _by_hand(asked, ref, instruction):
    seen = dataclasses.replace(asked.observation, ref_image=ref, instruction=instruction)
    return dataclasses.replace(asked, observation=seen)


BOX = '{"bbox_2d": [10, 12, 30, 40], "label": "disc"}'


def test_the_first_view_is_marked_once_and_kept(policy, query, say):
    said = say({"Locate every": BOX})
    guided = MaskGuidedPolicy(policy, Rectangle())
    first, later = query(0, 0), query(0, 7)
    instruction = first.observation.instruction
    colour = mask_guided.choose_colour(instruction)
    mask = np.zeros((56, 56), bool)
    mask[12:40, 10:30] = True
    ref = overlay(first.observation.images["head"], mask, colour)
    told = f"reach the object with the {colour}-colored mask"
    for asked in (first, later):
        ours, by_hand = guided([asked]), policy([_by_hand(asked, ref, told)])
        np.testing.assert_array_equal(ours[0].action, by_hand[0].action)
    word = instruction.removeprefix("reach the ")
    assert said.prompts == [f"Locate every {word} in the image. Answer with boxes in JSON."]
    assert guided.counts() == {"episodes": 1, "unmarked": 0}


def test_a_box_is_read_in_the_pixels_that_the_model_saw(policy, query, say):
    say({"Locate every": BOX})
    asked = query(0, 0).observation
    wide = np.ascontiguousarray(asked.images["head"][:28])  # in its slot it begins at row 14
    one = dataclasses.replace(asked, images={"head": wide})
    mark = MaskGuidedPolicy(policy, Rectangle()).mark([one])[0]
    mask = np.zeros((28, 56), bool)
    mask[0:26, 10:30] = True
    np.testing.assert_array_equal(mark.image, overlay(wide, mask, mark.colour))


def test_an_episode_is_answered_alike_whoever_shares_its_batch(policy, query, say):
    say({"Locate every": BOX})
    alone, together = (MaskGuidedPolicy(policy, GrabCut()) for _ in range(2))
    expected = [_answers(alone, [query(number, step)])[0] for number in (0, 1) for step in (0, 5)]
    made = _answers(together, [query(1, 0), query(0, 0), query(1, 0)])
    made += _answers(together, [query(1, 5), query(0, 5)])
    for ours, place in zip(made, (2, 0, 2, 3, 1), strict=True):
        np.testing.assert_array_equal(ours, expected[place])
    assert together.counts()["episodes"] == 2


def _guide(policy, query, instruction):
    one = dataclasses.replace(query(0, 0).observation, instruction=instruction)
    return MaskGuidedPolicy(policy, Rectangle()).mark([one])[0].guide(one)


def test_an_unknown_wording_is_asked_for_its_object(policy, query, say):
    said = say({"Which object": "The disc", "Locate every": BOX})
    assert _guide(policy, query, "touch a disc now").instruction == f"touch {MASKED} now"
    assert [prompt.split(":")[0] for prompt in said.prompts] == [
        "Which object does the robot handle to do this",
        "Locate every disc in the image. Answer with boxes in JSON.",
    ]


def test_without_words_for_the_object_the_instruction_is_asked_for_a_box(policy, query, say):
    said = say({"Which object": "a cup", "Where should": BOX})
    guided = _guide(policy, query, "touch it")
    assert guided.instruction == f"touch it (target: {MASKED})"
    assert guided.ref_image is not None
    assert said.prompts[1] == (
        "Where should the gripper act to do this: touch it Answer with a box in JSON."
    )


@pytest.mark.parametrize("box", ["I see no disc.", '{"bbox_2d": [90, 90, 99, 99]}'])
def test_an_episode_whose_object_is_not_found_goes_on_without_a_mark(policy, query, say, box):
    said = say({"Locate every": "Nothing.", "Where should": box})
    guided, asked = MaskGuidedPolicy(policy, Rectangle()), query(0, 0)
    np.testing.assert_array_equal(guided([asked])[0].action, policy([asked])[0].action)
    assert len(said.prompts) == 2
    assert guided.counts() == {"episodes": 1, "unmarked": 1}


def test_an_episode_that_did_not_begin_here_is_refused(policy, query, say):
    say({"Locate every": BOX})
    guided = MaskGuidedPolicy(policy, Rectangle())
    guided([query(0, 0)])
    with pytest.raises(ValueError, match="query 3 of 'reach' 1: its first view is not kept here"):
        guided([query(0, 3), query(1, 3)])


def test_episodes_that_nobody_goes_on_with_are_forgotten(policy, query, say, monkeypatch):
    say({"Locate every": BOX})
    monkeypatch.setattr(mask_guided, "_MOST_KEPT", 2)
    guided = MaskGuidedPolicy(policy, Rectangle())
    guided([query(0, 0)])
    guided([query(1, 0)])
    guided([query(0, 1)])
    guided([query(2, 0)])
    guided([query(0, 2), query(2, 1)])
    with pytest.raises(ValueError, match="query 1 of 'reach' 1"):
        guided([query(1, 1)])


def test_a_robot_without_a_head_view_is_refused(policy, query):
    asked = query(0, 0)
    wrist = {"right_wrist": asked.observation.images["right_wrist"]}
    odd = dataclasses.replace(asked.observation, images=wrist)
    with pytest.raises(ValueError, match=r"views \['right_wrist'\]: a mask-guided policy marks"):
        MaskGuidedPolicy(policy, Rectangle())([dataclasses.replace(asked, observation=odd)])


# Through the doors


def test_a_run_is_opened_mask_guided_and_says_so(run, opened, query):
    made = policies.open_policy(str(run), mask_guided="grabcut", device_batch=1)
    said = dict(made.identity())
    assert said.pop("mask_guided") == {
        "segmenter": "grabcut",
        "colour": "the first that the instruction does not name",
        "words": mask_guided.json_digest([mask_guided.TEMPLATES, mask_guided._WHICH]),
    }
    assert said == opened.identity()
    # two steps teach nobody to answer: the real VLM is asked, and says no box
    action = made([query(0, 0)])[0].action
    np.testing.assert_array_equal(action, opened([query(0, 0)])[0].action)
    with pytest.raises(ValueError, match=r"segmenter 'sam': expected one of \['grabcut', 'rect"):
        policies.open_policy(str(run), mask_guided="sam")


def test_a_floor_has_nothing_to_mark(tmp_path, capsys):
    flags = ["--policy", "hold", "--sim", "point", "--inits", "0:2", "--out", str(tmp_path)]
    assert door.main([*flags, "--mask-guided", "grabcut"]) == door.DATA
    said = capsys.readouterr().err
    assert said == "error: policy 'hold' sees nothing to mask: expected a run's folder\n"
