"""The mask-guided mode: the object that an instruction means is marked in the episode's first view.

    query 0: instruction, head view t0 -> VLM: box -> segmenter: mask -> t0' = overlay(t0)
    every query: [t0', views, "... the object with the {c}-colored mask ..."] -> GearPolicy

t0' is made once an episode and never segmented again. Source: GEAR-VLA, mask-guided policy;
systems.md 2.11.
"""

import dataclasses
import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import cv2
import numpy as np

from gear_jax.data.images import Fit
from gear_jax.data.mask_overlay import COLOURS, overlay
from gear_jax.data.vision_language import TYPES, parse_answer
from gear_jax.evals.episodes import Answer, Episode, Query, json_digest
from gear_jax.policy.policy import GearPolicy
from gear_jax.types import Image, Observation

Box = tuple[int, int, int, int]

# Instructions whose wording is known: in brackets the words that mean the object, {} is one word,
# {*} any number of them. The first that fits counts.
TEMPLATES = (
    "pick up [the {} block]",
    "lift [the {} block]",
    "grab [the {} block] and lift it",
    "take [the {} block]",
    "reach [the {} disc]",
    "pick up [the {*}] and place it {*}",
    "put [the {*}] on {*}",
    "put [the {*}] in {*}",
)
_WHICH = (
    "Which object does the robot handle to do this: {instruction} Answer with the words of the "
    "instruction that name it."
)
_ARTICLES = "the|a|an|this|that"
_MOST_KEPT = 256  # episodes that are under way at a time
_CLUSTERS = 5  # of GrabCut's colour models: fewer pixels than these teach it nothing


class Segmenter(Protocol):
    """Anything that finds the object in a box: SAM, or one of `SEGMENTERS`.

    Attributes:
        name: what it is; with the version of its weights where it has any.
    """

    name: str

    def __call__(self, image: Image, box: Box) -> np.ndarray:
        """The object's pixels.

        Args:
            image: uint8[H, W, 3], RGB.
            box: (x1, y1, x2, y2), whole pixels inside the image, x2 and y2 exclusive.

        Returns:
            bool[H, W]; a function of image and box alone.
        """
        ...


class Rectangle:
    """The whole box: what costs nothing."""

    name = "rectangle"

    def __call__(self, image: Image, box: Box) -> np.ndarray:
        """All of the box."""
        x1, y1, x2, y2 = box
        mask = np.zeros(image.shape[:2], bool)
        mask[y1:y2, x1:x2] = True
        return mask


class GrabCut:
    """GrabCut (Rother et al., 2004): what in the box differs in colour from what is outside."""

    name = "grabcut"

    def __init__(self, rounds: int = 5):
        """`rounds` of cutting."""
        self.rounds = rounds

    def __call__(self, image: Image, box: Box) -> np.ndarray:
        """The object, or the whole box where nothing is told apart."""
        inside = Rectangle()(image, box)
        if min(inside.sum(), (~inside).sum()) < _CLUSTERS:
            return inside
        x1, y1, x2, y2 = box
        found, models = np.zeros(image.shape[:2], np.uint8), np.zeros((2, 1, 65))
        cv2.setRNGSeed(0)  # the colour models begin at random
        cv2.grabCut(
            np.ascontiguousarray(image), found, (x1, y1, x2 - x1, y2 - y1), models[0], models[1],
            self.rounds, cv2.GC_INIT_WITH_RECT,
        )  # fmt: skip
        mask = (found == cv2.GC_FGD) | (found == cv2.GC_PR_FGD)
        return mask if mask.any() else inside


SEGMENTERS: dict[str, type[GrabCut] | type[Rectangle]] = {
    "grabcut": GrabCut,
    "rectangle": Rectangle,
}


# Words


def choose_colour(instruction: str) -> str:
    """The first of `COLOURS` that the instruction does not name: the mask's name is its alone."""
    words = set(re.findall(r"\w+", instruction.lower()))
    return next((one for one in COLOURS if one not in words), next(iter(COLOURS)))


def known_phrase(instruction: str) -> str | None:
    """The words that mean the object, where the instruction is one of `TEMPLATES`."""
    for template in TEMPLATES:
        found = re.fullmatch(_pattern(template), instruction.strip(), re.IGNORECASE)
        if found:
            return found["phrase"]
    return None


def said_phrase(answer: str, instruction: str) -> str | None:
    """What the VLM called the object, if these are some of the instruction's words."""
    words = answer.strip().strip("\"'`.,:;!? \n")
    if not words or re.fullmatch(_ARTICLES, words.lower()):
        return None
    if words.lower() == instruction.strip(" .").lower():
        return None
    return words if _place(words, instruction) else None


def rewrite(instruction: str, phrase: str | None, colour: str) -> str:
    """The instruction with "the object with the {colour}-colored mask" for the object.

    Args:
        instruction: raw text.
        phrase: words of it that mean the object, whatever their article. None, or words that the
            instruction does not have: the object is named behind it.
        colour: of the mask.
    """
    name = f"the object with the {colour}-colored mask"
    place = _place(phrase, instruction) if phrase else None
    if place is None:
        return f"{instruction} (target: {name})"
    return instruction[: place.start()] + name + instruction[place.end() :]


def _place(phrase, instruction):
    words = rf"(?<!\w)(?:(?:{_ARTICLES})\s+)?{re.escape(_bare(phrase))}(?!\w)"
    return re.search(words, instruction, re.IGNORECASE)


def _pattern(template):
    marks = {"[": "(?P<phrase>", "]": ")", "{}": r"[\w-]+", "{*}": ".+?"}
    parts = re.split(r"(\[|\]|\{\*?\})", template)
    return "".join(marks.get(part, re.escape(part)) for part in parts) + r"\.?"


# The policy


@dataclasses.dataclass(frozen=True, eq=False)
class _Mark:
    """What is kept of an episode's beginning; without an image, no object was found."""

    image: Image | None
    phrase: str | None
    colour: str

    def guide(self, observation: Observation) -> Observation:
        """The observation with the marked view, and told in its words."""
        if self.image is None:
            return observation
        told = rewrite(observation.instruction, self.phrase, self.colour)
        return dataclasses.replace(observation, instruction=told, ref_image=self.image)


class MaskGuidedPolicy:
    """A `ChunkPolicy` that points at the object by a mask.

    An answer depends on the queries of its own episode alone: on the first one, which is marked,
    and on itself. An episode in whose first view the VLM finds no object goes on without a mark;
    `counts` says how many did.
    """

    def __init__(self, policy: GearPolicy, segmenter: Segmenter):
        """Wrap a policy.

        Args:
            policy: whose VLM is asked, and who acts.
            segmenter: box -> mask.
        """
        self.policy, self.segmenter, self.spec = policy, segmenter, policy.spec
        self._kept: OrderedDict[Episode, _Mark] = OrderedDict()
        self._episodes = self._unmarked = 0

    def identity(self) -> Mapping[str, Any]:
        """The policy's own, and how the object is found, marked and named."""
        how = {
            "segmenter": self.segmenter.name,
            "colour": "the first that the instruction does not name",
            "words": json_digest([TEMPLATES, _WHICH]),
        }
        return {**self.policy.identity(), "mask_guided": how}

    def counts(self) -> Mapping[str, int]:
        """Episodes that were begun, and those of them that go on without a mark."""
        return {"episodes": self._episodes, "unmarked": self._unmarked}

    def __call__(self, queries: Sequence[Query]) -> Sequence[Answer]:
        """One answer to each query.

        Raises:
            ValueError: a later query of an episode whose first one was not asked here, or a first
                one without a head view.
        """
        first = {_episode(query): query.observation for query in queries if query.number == 0}
        marks = dict(zip(first, self.mark(list(first.values())), strict=True))
        self._episodes += len(marks)
        self._unmarked += sum(mark.image is None for mark in marks.values())
        self._kept.update(marks)
        told = []
        for query in queries:
            if (mark := self._kept.get(_episode(query))) is None:
                raise ValueError(
                    f"query {query.number} of {query.task!r} {query.init}: its first view is not "
                    "kept here: expected an episode that begins with query 0"
                )
            self._kept.move_to_end(_episode(query))
            told.append(dataclasses.replace(query, observation=mark.guide(query.observation)))
        while len(self._kept) > max(_MOST_KEPT, len(queries)):
            self._kept.popitem(last=False)
        return self.policy(told)

    def mark(self, observations: Sequence[Observation]) -> list[_Mark]:
        """The object of each instruction, marked in the head view."""
        for one in observations:
            if "head" not in one.images:
                raise ValueError(
                    f"views {sorted(one.images)}: a mask-guided policy marks view 'head'"
                )
        phrases = self._phrases(observations)
        boxes = self._boxes(observations, phrases)
        return [self._marked(*one) for one in zip(observations, phrases, boxes, strict=True)]

    def _marked(self, observation, phrase, box):
        image, colour = observation.images["head"], choose_colour(observation.instruction)
        if box is None:
            return _Mark(None, phrase, colour)
        mask = np.asarray(self.segmenter(image, box), bool)
        return _Mark(overlay(image, mask, colour) if mask.any() else None, phrase, colour)

    def _phrases(self, observations):
        """Words that mean the object: by a template, else as the VLM says, else None."""
        told = [one.instruction for one in observations]
        phrases = [known_phrase(text) for text in told]
        asked = [place for place, phrase in enumerate(phrases) if phrase is None]
        prompts = [_WHICH.format(instruction=told[place]) for place in asked]
        said = self.policy.ask(prompts, [[observations[place].images["head"]] for place in asked])
        for place, answer in zip(asked, said, strict=True):
            phrases[place] = said_phrase(answer, told[place])
        return phrases

    def _boxes(self, observations, phrases):
        """Box of each object, or None.

        `ground2d` of its words, whose boxes are whole objects; where there are no words, or no box
        is said, `affordance` of the instruction, whose box may be the part that is gripped.
        """
        boxes: list[Box | None] = [None] * len(observations)
        for kind in ("ground2d", "affordance"):
            asked = [
                place for place, box in enumerate(boxes)
                if box is None and (kind == "affordance" or phrases[place])
            ]  # fmt: skip
            prompts = [
                TYPES[kind].prompts[0].format(
                    label=_bare(phrases[place]), instruction=observations[place].instruction
                )
                for place in asked
            ]  # fmt: skip
            images = [observations[place].images["head"] for place in asked]
            said = self.policy.ask(prompts, [[image] for image in images])
            for place, image, answer in zip(asked, images, said, strict=True):
                fit = Fit(*image.shape[:2], self.policy.image_size, self.policy.fit)
                found = parse_answer(kind, answer, [fit])
                boxes[place] = _whole(found[0], image) if found else None
        return boxes


def _episode(query):
    return Episode(query.suite, query.task, query.init)


def _bare(phrase):
    """A phrase as the `label` of a record is written: without its article."""
    return re.sub(rf"^(?:{_ARTICLES})\s+", "", phrase or "", flags=re.IGNORECASE)


def _whole(box, image):
    """A box of whole pixels inside the image, or None where nothing of it is there."""
    height, width = image.shape[:2]
    x1, y1 = (max(0, math.floor(value)) for value in box[:2])
    x2, y2 = min(width, math.ceil(box[2])), min(height, math.ceil(box[3]))
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def guided(policy: GearPolicy, segmenter: str) -> MaskGuidedPolicy:
    """A policy in the mask-guided mode, with one of `SEGMENTERS`.

    Raises:
        ValueError: an unknown segmenter.
    """
    if segmenter not in SEGMENTERS:
        raise ValueError(f"segmenter {segmenter!r}: expected one of {sorted(SEGMENTERS)}")
    return MaskGuidedPolicy(policy, SEGMENTERS[segmenter]())
