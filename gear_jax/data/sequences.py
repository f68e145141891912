"""Token rows: the only place that knows token order, labels, groups and places in m-rope.

    robot:  system, user: [marked first view,] views, instruction, state; assistant: latent block,
            FAST block
    video:  system, user: view, instruction;         assistant: latent block
    asked:  system, user: images, question;          assistant: answer; several may share a row
            (a question about a robot's views begins as its rows do)

Who may see whom is said by three integers a token: its segment, its group, and the groups that are
hidden from it (towers/attention.py). Source: GEAR-VLA Fig. 2, systems.md 2.2, 2.3 and 2.5.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from gear_jax.data.mrope import IMAGE, TEXT, mrope_positions
from gear_jax.types import VIEWS

# Groups of keys, as bits: what modality dropping can hide.
OTHER, HEAD, WRIST, STATE, LATENT = 0, 1, 2, 4, 8
PROMPT = 16  # all before the answer, whatever else it is; rows do not say it, `acts` does
# Which block of the answer a token is of; modality dropping concerns both of them.
LATENT_BLOCK, FAST_BLOCK = 1, 2
ANSWER_BLOCK = 3  # of a question that is answered through a latent block
_VIEW_GROUPS = {"head": HEAD, "left_wrist": WRIST, "right_wrist": WRIST}
_VIEW_MARKS = {"head": "head", "left_wrist": "left", "right_wrist": "right"}
STATE_TOKENS = 4
IGNORE = -100
_OPENING = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
_TURN = "<|im_end|>\n<|im_start|>assistant\n"
_ALONE = 1000  # segments from here on hold tokens that see and are seen by nothing but themselves


@dataclasses.dataclass(frozen=True)
class Question:
    """One vision-language record, ready to be asked.

    Attributes:
        prompt: what is asked.
        answer: what is learned.
        views: places of its images among the row's.
        robot: these are a robot's views, laid out as its rows have them; it has a row of its own.
    """

    prompt: str
    answer: str
    views: tuple[int, ...]
    robot: bool = False


class Tokenizer(Protocol):
    """What rows need of a text tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Ids of a template."""
        ...

    def id(self, token: str) -> int:
        """Id of one token."""
        ...

    def check_user_text(self, text: str) -> None:
        """Raise ValueError where text spells a reserved token."""
        ...


@dataclasses.dataclass(frozen=True)
class SequenceConfig:
    """Lengths and what rows hold (systems.md 2.3).

    Attributes:
        length: T; longer rows are an error.
        view_grid: rows and columns of merged patches of a view.
        transitions: of the latent block.
        codes: of a transition.
        most_labels: tokens that a row may be asked to learn; `gear.GearConfig` has the same.
        fast_length: longest FAST sequence; a longer one gets no FAST block.
        latents: "codes" that are learned; "learned" embeddings in their places, which are not;
            "none" leaves the block out.
        with_fast: False leaves the FAST block out.
        prompt_tokens: learned embeddings of the robot, behind the instruction.
        through_latents: questions about a robot's views, and FAST tokens of rows without ids, stand
            behind a latent block whose codes `gear.scramble` draws: with `fast_sees` "latents" they
            are said from its keys and values alone.
        prompt_only: end where a policy goes on: with the token that opens the latent block, with
            the learned embeddings, or behind a question.
    """

    length: int = 1280
    view_grid: tuple[int, int] = (16, 16)
    transitions: int = 5
    codes: int = 4
    most_labels: int = 512
    fast_length: int = 256
    latents: Literal["codes", "learned", "none"] = "codes"
    with_fast: bool = True
    prompt_tokens: int = 0
    through_latents: bool = False
    prompt_only: bool = False


class ChunkTokenizer(Protocol):
    """What rows need of a FAST tokenizer."""

    def encode(self, chunks: np.ndarray) -> list[np.ndarray]:
        """Ids of each of chunks float[n, A, a]."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class RowMaker:
    """A batch of the stream -> the same with its token rows; runs in the stream's workers.

    Attributes:
        tokenizer: of text.
        fast: of chunks; None where the config has no FAST block.
        config: lengths.
        digest: of the tokenizers, for the state of the stream.
    """

    tokenizer: Tokenizer
    fast: ChunkTokenizer | None
    config: SequenceConfig
    digest: str

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with everything of `token_rows`."""
        fast: list[np.ndarray | None] = [None] * len(batch["instruction"])
        moving = batch["action_mask"].any(axis=(1, 2))
        if self.fast is not None and self.config.with_fast and moving.any():
            chunks = held_chunks(batch["action"][moving], batch["action_mask"][moving])
            encoded = self.fast.encode(np.clip(chunks, -1, 1))
            for row, ids in zip(np.flatnonzero(moving), encoded, strict=True):
                fast[row] = ids
        return {**batch, **token_rows(batch, self.tokenizer, self.config, fast)}


def ref_tokens(config: SequenceConfig) -> int:
    """Tokens that the place of a marked first view takes of a row."""
    return math.prod(config.view_grid) + 3


def question_tokens(tokenizer: Tokenizer) -> int:
    """Tokens of a question's row beside its images, its prompt and its answer."""
    return len(tokenizer.encode(_OPENING)) + len(tokenizer.encode(_TURN)) + 1


def held_chunks(action: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Chunks float[n, A, a] whose last valid row is held; a dimension without any is 0.

    A jump to zero at an episode's end would cost FAST many tokens, and teach a motion that is not.
    """
    last = np.maximum(mask.sum(axis=1, keepdims=True) - 1, 0)
    held = np.where(mask, action, np.take_along_axis(action, last, axis=1))
    return np.where(mask.any(axis=1, keepdims=True), held, 0)


class _Row:
    """One row as it grows."""

    def __init__(self):
        self.columns = {name: [] for name in ("tokens", "labels", "segments", "groups", "acts",
                                              "insert_index", "types", "latent")}  # fmt: skip

    def add(self, tokens, *, label=False, segment=1, group=OTHER, act=0, insert=-1, kind=TEXT,
            latent=-1):  # fmt: skip
        """Append tokens; what is said of all of them may be one value or one for each."""
        tokens = np.atleast_1d(np.asarray(tokens, np.int32))
        values = {
            "tokens": tokens,
            "labels": np.where(label, tokens, IGNORE),
            "segments": segment,
            "groups": group,
            "acts": act,
            "insert_index": insert,
            "types": kind,
            "latent": latent,
        }
        for name, value in values.items():
            self.columns[name].append(np.broadcast_to(value, tokens.shape))

    def teaches(self):
        """Whether anything so far is to be learned."""
        return any((part != IGNORE).any() for part in self.columns["labels"])

    def finish(self):
        """{name: int32[n]}."""
        return {name: np.concatenate(parts) for name, parts in self.columns.items()}


def token_rows(
    batch: Mapping[str, Any],
    tokenizer: Tokenizer,
    config: SequenceConfig,
    fast: Sequence[np.ndarray | None],
) -> dict[str, np.ndarray]:
    """Rows of a batch of the stream, padded on the right.

    Args:
        batch: of `pipeline.Stream`: instruction, questions, view_mask bool[B, V], state with
            arm_mask, latent_ids int[B, T, C] and latent_mask bool[B, T]; and ref_mask bool[B] where
            the config is mask-guided: which rows have the marked first view.
        tokenizer: with GEAR-VLA's ranges.
        config: lengths.
        fast: FAST ids of each row's chunk, from 0; None for rows without actions.

    Returns:
        tokens, labels (`IGNORE` where nothing is learned), segments, groups, int32[B, T]; acts
        int32[B, T], `LATENT_BLOCK`, `FAST_BLOCK` or 0; insert_index int32[B, T] into the views'
        embeddings, then the four state tokens, the learned latents, the robot's own and the marked
        view's; positions
        int32[3, B, T]; latent_index int32[B, M], where each latent token stands, and latent_valid
        bool[B, M]; chunk_position int32[B], the place in m-rope that the action chunk follows;
        scenes int32[B, V]: a robot's views show one scene, images of a question one each, absent
        ones -1.

    Raises:
        ValueError: a row too long or with too much to learn, or text that spells a reserved token.
    """
    ids = _Ids.of(tokenizer)
    grid = (1, 2 * config.view_grid[0], 2 * config.view_grid[1])
    rows, positions = [], []
    for index in range(len(batch["instruction"])):
        parts = _parts(batch, index, tokenizer, ids, config, fast[index])
        row = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        _check(row, batch, index, config)
        rows.append(row)
        places = [_places(part.pop("types"), grid, config) for part in parts]
        fill = ((0, 0), (0, config.length - len(row["tokens"])))
        positions.append(np.pad(np.concatenate(places, axis=1), fill))
    fill = {"labels": IGNORE, "insert_index": -1, "latent": -1}
    out = {
        name: np.stack([
            np.pad(row[name], (0, config.length - len(row[name])),
                   constant_values=fill.get(name, 0)) for row in rows
        ])
        for name in rows[0] if name != "types"
    }  # fmt: skip
    valid = np.arange(config.length)[None] < np.array([len(row["tokens"]) for row in rows])[:, None]
    out["positions"] = np.stack(positions, axis=1)
    latent = out.pop("latent")
    count = config.transitions * config.codes
    out["latent_index"] = np.zeros((len(rows), count), np.int32)
    out["latent_valid"] = np.zeros((len(rows), count), bool)
    for row, column in np.argwhere(latent >= 0):
        out["latent_index"][row, latent[row, column]] = column
        out["latent_valid"][row, latent[row, column]] = out["segments"][row, column] == 1
    asked = [bool(questions) and not questions[0].robot for questions in batch["questions"]]
    asked = np.array(asked)[:, None]
    scenes = np.where(asked, np.arange(len(VIEWS), dtype=np.int32)[None], np.int32(0))
    out["scenes"] = np.where(batch["view_mask"], scenes, np.int32(-1))
    before = valid & (out["acts"] == 0) & (out["labels"] == IGNORE)
    last = np.where(latent >= 0, np.arange(config.length)[None], -1).max(axis=1)
    last = np.where(last >= 0, last, config.length - 1 - before[:, ::-1].argmax(axis=1))
    out["chunk_position"] = out["positions"][0, np.arange(len(rows)), last]
    return out


@dataclasses.dataclass(frozen=True)
class _Ids:
    """Ids of the tokens that rows are made of."""

    pad: int
    vision: tuple[int, int]
    views: Mapping[str, int]
    ref: int
    state: tuple[int, int, int]
    latent: tuple[int, int, int]
    fast: tuple[int, int, int]
    end: int

    @classmethod
    def of(cls, tokenizer):
        one = tokenizer.id
        return cls(
            pad=one("<|image_pad|>"),
            vision=(one("<|vision_start|>"), one("<|vision_end|>")),
            views={view: one(f"<|view_{mark}|>") for view, mark in _VIEW_MARKS.items()},
            ref=one("<|view_ref|>"),
            state=(one("<|state_start|>"), one("<|state_pad|>"), one("<|state_end|>")),
            latent=(one("<|la_start|>"), one("<la_0>"), one("<|la_end|>")),
            fast=(one("<|fast_start|>"), one("<fast_0000>"), one("<|fast_end|>")),
            end=one("<|im_end|>"),
        )


def _check(row, batch, index, config):
    told = batch["instruction"][index] or "".join(q.prompt for q in batch["questions"][index])
    if len(row["tokens"]) > config.length:
        raise ValueError(
            f"row {index} has {len(row['tokens'])} tokens, expected up to {config.length}: "
            f"{told[:60]!r}"
        )
    learned = int((row["labels"] != IGNORE).sum())
    if learned > config.most_labels:
        raise ValueError(
            f"row {index} has {learned} tokens to learn, expected up to {config.most_labels}: "
            f"{told[:60]!r}"
        )


def _places(types, grid, config):
    """Positions int32[3, n] of one part of a row; each part begins at 0."""
    images = int((types == IMAGE).sum()) // (config.view_grid[0] * config.view_grid[1])
    return mrope_positions(types[None], np.ones((1, len(types)), bool), [grid] * images, [])[0][
        :, 0
    ]


def _parts(batch, index, tokenizer, ids, config, fast):
    """What shares a row: the questions, or the one thing that a robot or a video shows."""
    questions = batch["questions"][index]
    if not questions:
        return [_row(batch, index, tokenizer, ids, config, fast)]
    return [
        _asked(one, number, batch, index, tokenizer, ids, config)
        for number, one in enumerate(questions, 1)
    ]


def _asked(question, segment, batch, index, tokenizer, ids, config):
    """One question and its answer, in a segment of their own; with the state, if one is known."""
    row, size = _Row(), config.view_grid[0] * config.view_grid[1]
    row.add(tokenizer.encode(_OPENING), segment=segment)
    if question.robot:
        _views(row, batch["view_mask"][index], ids, size)
    for place in () if question.robot else question.views:
        row.add(ids.vision[0], segment=segment)
        row.add([ids.pad] * size, segment=segment, group=_VIEW_GROUPS[VIEWS[place]], kind=IMAGE,
                insert=np.arange(place * size, (place + 1) * size))  # fmt: skip
        row.add(ids.vision[1], segment=segment)
    for text in (question.prompt, question.answer):
        tokenizer.check_user_text(text)
    row.add(tokenizer.encode(question.prompt), segment=segment)
    if question.robot and batch["state"]["arm_mask"][index].any():
        _state(row, batch["state"], index, ids, len(VIEWS) * size)
    row.add(tokenizer.encode(_TURN), segment=segment)
    if config.prompt_only:
        return row.finish()
    block = 0
    if question.robot and config.through_latents:
        block = ANSWER_BLOCK
        _drawn_latents(row, ids, config)
    answer = [*tokenizer.encode(question.answer), ids.end]
    row.add(answer, label=True, segment=segment, act=block)
    return row.finish()


def _row(batch, index, tokenizer, ids, config, fast):
    """The one part of a robot's or a video's row."""
    row = _Row()
    row.add(tokenizer.encode(_OPENING))
    size = config.view_grid[0] * config.view_grid[1]
    if "ref_mask" in batch:
        # it keeps its place too, so that rows with and without one share their positions
        segment = 1 if batch["ref_mask"][index] else _ALONE + len(VIEWS)
        first = len(VIEWS) * size + _num_learned(config)
        row.add([ids.ref, ids.vision[0]], segment=segment)
        row.add([ids.pad] * size, segment=segment, group=HEAD, kind=IMAGE,
                insert=first + np.arange(size))  # fmt: skip
        row.add(ids.vision[1], segment=segment)
    _views(row, batch["view_mask"][index], ids, size)
    tokenizer.check_user_text(batch["instruction"][index])
    row.add(tokenizer.encode(batch["instruction"][index]))
    place = len(VIEWS) * size
    if config.prompt_tokens:
        learned = STATE_TOKENS + config.transitions * config.codes + np.arange(config.prompt_tokens)
        row.add([ids.state[1]] * config.prompt_tokens, insert=place + learned)
    if batch["state"]["arm_mask"][index].any():
        _state(row, batch["state"], index, ids, place)
    row.add(tokenizer.encode(_TURN))
    block = OTHER
    if config.latents != "none":
        block = LATENT_BLOCK
        _latents(row, batch, index, ids, config, place + STATE_TOKENS)
    if config.prompt_only:
        return row.finish()
    if config.with_fast and fast is not None and len(fast) <= config.fast_length:
        block = FAST_BLOCK
        row.add(
            [ids.fast[0], *(ids.fast[1] + np.asarray(fast, np.int32)), ids.fast[2]],
            label=True,
            act=block,
        )
    if block != OTHER:  # something was said
        row.add(ids.end, label=row.teaches(), act=block)
    return row.finish()


def _views(row, view_mask, ids, size):
    """A robot's views; an absent one keeps its place, and is alone with itself."""
    for place, view in enumerate(VIEWS):
        segment = 1 if view_mask[place] else _ALONE + place
        row.add([ids.views[view], ids.vision[0]], segment=segment)
        row.add([ids.pad] * size, segment=segment, group=_VIEW_GROUPS[view], kind=IMAGE,
                insert=np.arange(place * size, (place + 1) * size))  # fmt: skip
        row.add(ids.vision[1], segment=segment)


def _num_learned(config):
    """Embeddings between the views' and the marked view's: states, learned latents, the robot's."""
    return STATE_TOKENS + config.transitions * config.codes + config.prompt_tokens


def _latents(row, batch, index, ids, config, first):
    """The latent block: codes to learn, or learned embeddings that hold their places."""
    count = config.transitions * config.codes
    places = np.arange(count)
    there = {"act": LATENT_BLOCK, "latent": places, "group": LATENT}
    if config.latents == "learned":
        row.add(ids.latent[0], act=LATENT_BLOCK)
        row.add([ids.state[1]] * count, insert=first + places, **there)
        if not config.prompt_only:
            row.add(ids.latent[2], act=LATENT_BLOCK)
        return
    if config.prompt_only:
        row.add(ids.latent[0], act=LATENT_BLOCK)
        return
    known = batch["latent_mask"][index] if "latent_mask" in batch else np.array(False)
    if config.through_latents and not known.any():
        _drawn_latents(row, ids, config)
        return
    mask = np.repeat(known, config.codes)
    row.add(ids.latent[0], label=mask.any(), act=LATENT_BLOCK)
    row.add(
        ids.latent[1] + batch["latent_ids"][index].reshape(-1),
        label=mask,
        segment=np.where(mask, 1, _ALONE + len(VIEWS) + 1 + STATE_TOKENS + places),
        **there,
    )
    row.add(ids.latent[2], label=mask.any(), act=LATENT_BLOCK)


def _drawn_latents(row, ids, config):
    """A latent block of codes that nobody knows: `gear.scramble` draws them, none is learned."""
    places = np.arange(config.transitions * config.codes)
    row.add(ids.latent[0], act=LATENT_BLOCK)
    row.add(np.full_like(places, ids.latent[1]), act=LATENT_BLOCK, latent=places, group=LATENT)
    row.add(ids.latent[2], act=LATENT_BLOCK)


def _state(row, state, index, ids, first):
    """Four places for the state; those of an arm, or of a part of it, that is not known are alone.

    The order is that of the state projector: end effector and joints of each arm in turn.
    """
    known = np.stack([state["ee_mask"][index], state["joint_mask"][index].any(axis=-1)], axis=-1)
    places = np.arange(STATE_TOKENS)
    row.add(ids.state[0])
    row.add(
        [ids.state[1]] * STATE_TOKENS,
        group=STATE,
        insert=first + places,
        segment=np.where(known.reshape(-1), 1, _ALONE + len(VIEWS) + 1 + places),
    )
    row.add(ids.state[2])
