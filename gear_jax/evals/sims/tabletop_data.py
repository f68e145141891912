"""What the tabletop teaches: pointing questions about many random scenes, and demonstrations."""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import cv2
import numpy as np

from gear_jax.data.embodiments import embodiment
from gear_jax.data.record_state import write_state
from gear_jax.evals.sims.recording import CutRun
from gear_jax.evals.sims.tabletop import (
    COLOURS,
    MAX_STEPS,
    NUM_INITS,
    PHRASES,
    TabletopSimulator,
)
from gear_jax.evals.sims.tabletop_expert import Pushes, TabletopExpert

NUM_JOINTS = embodiment("tabletop_gantry").joints["right"]
_AFTER = 16  # control steps recorded after success: up to the top, and hold on
_PUSHED = 0.007  # of control steps a push begins at: a run is cut there
# where a run with noise begins
_BEGINS = {"initial": 0.15, "anywhere": 0.35, "missed": 0.15, "about": 0.2, "held": 0.15}
_ANYWHERE = (-0.16, -0.16, 0.03), (0.16, 0.16, 0.12)  # metres: where the hand goes before
_WANDERING = 30  # control steps, fewer than these
_BESIDE = 0.01  # metres beside and above its middle, at most, that a block is held
_TAKING, _RAISING = 12, 5  # control steps: of each move to it, and fewer than these up
_FIRST_QUESTION = 1_000_000  # initial states from here on are asked about
_DESCRIPTIONS = (  # id, question, how a block is said
    ("long", "Where is what?", "{} block [{}, {}]"),
    ("short", "Where is what, in short?", "a {}{}, {}"),
)


def demonstrations(
    tasks: Sequence[int],
    inits: Sequence[int],
    *,
    noise: float = 0.7,
    seed: int = 0,
    encoding: Literal["jpeg", "png"] = "png",
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Episode after episode: its source, and the record or None where the expert failed.

    With noise the hand begins somewhere else, its gripper open or closed, and is pushed now and
    then. Neither is recorded: a run is cut there into several episodes, so that every second of
    motion is what the expert meant to do (a chunk is made of poses that were reached).

    Args:
        tasks: numbers of the colours.
        inits: numbers of initial states, of each task, from `tabletop.NUM_INITS` on: those below
            are for evaluation.
        noise: strength of `Pushes`, 0 for none.
        seed: of the pushes; an episode depends on it, on the task and the initial state alone.
        encoding: of images.

    Raises:
        ValueError: no such task, or an initial state that is kept for evaluation.
    """
    simulator = TabletopSimulator()
    known = simulator.tasks()
    if bad := [number for number in tasks if not 0 <= number < len(known)]:
        raise ValueError(f"tabletop has no task {bad[0]}: expected 0 .. {len(known) - 1}")
    if min(inits) < NUM_INITS:
        raise ValueError(
            f"initial state {min(inits)} is for evaluation: demonstrations have those from "
            f"{NUM_INITS} on"
        )
    try:
        for init in inits:
            for number in tasks:
                yield from _demonstrate(simulator, known[number].name, init, noise, seed, encoding)
    finally:
        simulator.close()


def _demonstrate(simulator, task, init, noise, seed, encoding):
    """One run of the expert, cut where it is pushed, so that all that is recorded was meant."""
    source = f"tabletop/{task}/init_{init}"
    rng = np.random.default_rng([seed, *task.encode(), init])
    simulator.reset(task, init)
    if noise:
        _wander(simulator, rng)
    expert, push, left = TabletopExpert(simulator), Pushes(rng, chance=_PUSHED, size=noise), None
    run = CutRun(source, num_joints=NUM_JOINTS, encoding=encoding)
    for _ in range(MAX_STEPS + _AFTER):
        action = expert.act()
        done = action if left is not None else push(action)
        if np.array_equal(done, action):
            run.add(simulator.observe(), action)
        else:
            run.cut()
        simulator.act(done)
        if left is None and simulator.solved():
            left = _AFTER
        elif left is not None:
            left -= 1
            if not left:
                yield from run.episodes()
                return
    yield source, None


def _wander(simulator, rng):
    """What the expert finds: all as it was, the hand anywhere, a grasp that missed, or one begun.

    None of it is recorded. "Anywhere" goes beyond the initial states of an evaluation and the head
    view: a policy that never saw a hand come back from there goes on, away from the block. A third
    of all runs begin with closed fingers that have to open. An expert is about a block and holds it
    by its middle, at one height; a policy is not, and from where no run went on it would never
    close ("about") or open again ("held").
    """
    begins = rng.choice(list(_BEGINS), p=list(_BEGINS.values()))
    block = simulator.block()[:3]
    if begins in ("about", "held"):
        low = -_BESIDE if begins == "about" else 0.0
        aim = block + rng.uniform((-_BESIDE, -_BESIDE, low), _BESIDE)
        _go(simulator, aim + (0, 0, 0.06), -1, _TAKING)
        _go(simulator, aim, -1, _TAKING)
        if begins == "held":
            _go(simulator, aim, 1, _TAKING)
            _go(simulator, aim + (0, 0, 0.1), 1, int(rng.integers(0, _RAISING)))
    elif begins == "anywhere":
        where = rng.uniform(*_ANYWHERE), rng.choice([-1, 1])
        _go(simulator, *where, int(rng.integers(1, _WANDERING)))
    elif begins == "missed":
        beside = rng.normal(0, 0.03, 3) * (1, 1, 0.3)
        _go(simulator, block + beside, 1, int(rng.integers(1, _WANDERING)))


def _go(simulator, aim, closed, steps):
    """Control steps straight towards a place."""
    for _ in range(steps):
        way = np.clip(40 * (aim - simulator.pose()[:3, 3]), -0.6, 0.6)
        simulator.act(np.append(way, (0, 0, 0, closed)))


def num_images(num_scenes: int) -> int:
    """Scenes that `write_questions` draws for so many with three blocks."""
    return num_scenes + num_scenes // 2


def write_questions(folder, num_scenes: int, *, seed: int = 0, progress=lambda done: None) -> None:
    """Records (docs/vision_language.md) of random scenes, about their places.

    points: where is the red block? scenes: where is what, in random order, each name before its
    place: without such descriptions, a model from nothing does not learn which colour was asked
    for. names: the same in short, `a red24, 47`: there the name itself is the token that says the
    place. single: points and descriptions of other scenes, with one block. pairs: descriptions of
    both kinds of scenes with two. ways: an instruction with both views and the state, where its
    block is from the hand, in whole centimetres along its own axes, and how open the fingers are,
    in tenths; the head camera does not see every hand, so without the state the place could not be
    known. offsets: where every block is from the hand, each name before its way, as in scenes.
    single_ways: both, of the scenes with one block.
    But for what is said in short, all places open with a bracket, behind a name and behind a
    question alike, so that the bracket learns to look up what was named. The hand is anywhere, at
    any height, open or closed, so that the model has seen what a policy will see. Why each of
    them: docs/quickstart_findings.md.

    Args:
        folder: <kind>.jsonl of each kind and images/ appear in it; images first.
        num_scenes: scenes with three blocks.
        seed: of hands and scenes.
        progress: told the number of scenes done, of `num_images(num_scenes)`.
    """
    folder, total = pathlib.Path(folder), num_images(num_scenes)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    simulator = TabletopSimulator()
    rng, order = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    pools = {
        kind: []
        for kind in ("single", "pairs", "single_ways", "offsets", "ways", "names", "scenes",
                     "points")
    }  # fmt: skip
    for number in range(total):
        whole = number < num_scenes
        colour = list(COLOURS)[number % len(COLOURS)]
        num_blocks = 3 if whole else 1 + number // len(COLOURS) % 2
        simulator.place(colour, _FIRST_QUESTION + seed * total + number, rng, num_blocks)
        name, head = f"tabletop/{seed}/{number}", f"images/{number:06d}.png"
        shown = simulator.observe()
        _write_image(folder / head, shown.images["head"])
        pixels = [_pixel(simulator, block) for block in range(num_blocks)]
        colours = simulator.scene.colours
        shuffled = order.permutation(num_blocks)
        long, short = (
            {"id": f"{name}/{kind}", "type": "understanding_qa", "question": question,
             "answer": ", ".join(form.format(colours[block], *pixels[block]) for block in shuffled),
             "images": [head]}
            for kind, question, form in _DESCRIPTIONS
        )  # fmt: skip
        points = [
            {"id": f"{name}/{its}", "type": "object_point", "label": f"{its} block",
             "points": [pixel], "images": [head]}
            for its, pixel in zip(colours, pixels, strict=True)
        ]  # fmt: skip
        if whole:
            pools["scenes"].append(long)
            pools["names"].append(short)
            pools["points"] += points
        elif num_blocks == 1:
            pools["single"] += [long, *points]
        else:
            pools["pairs"] += [long, short]
        if num_blocks != 2:
            wrist = f"images/{number:06d}_wrist.png"
            _write_image(folder / wrist, shown.images["right_wrist"])
            ways, offsets = _from_the_hand(simulator, shown, name, [head, wrist], shuffled, order)
            pools["ways" if whole else "single_ways"] += ways
            pools["offsets" if whole else "single_ways"].append(offsets)
        progress(number + 1)
    simulator.close()
    for kind, records in pools.items():
        partial = folder / f".{kind}.partial"
        partial.write_text("".join(json.dumps(record) + "\n" for record in records))
        partial.rename(folder / f"{kind}.jsonl")


def _write_image(path, view):
    cv2.imwrite(str(path), view[..., ::-1])


def _pixel(simulator, block):
    """Whole pixels of a block's centre in the head view: [x, y]."""
    place = np.clip(simulator.pixel(block), 0, simulator.image_size - 1)
    return [round(float(value)) for value in place]


def _from_the_hand(simulator, shown, name, images, shuffled, order):
    """ways, one for each block, and the scene's offsets; `order` draws the wordings."""
    state = write_state(shown.embodiment, shown.state)
    opening = round(10 * float(shown.state["grip_open"][1]))
    robot = {"images": images, "views": ["head", "right_wrist"], "state": state}
    ways, reached = [], []
    for block, its in enumerate(simulator.scene.colours):
        x, y, z = (round(100 * float(value)) for value in simulator.offset(block))
        way = f"[{x:+03} {y:+03} {z:+03}]"
        reached.append(f"{its} block {way}")
        told = PHRASES[order.integers(len(PHRASES))].format(its)
        ways.append(
            {"id": f"{name}/{its}", "type": "understanding_qa", "question": told,
             "answer": f"at {way} open {opening:02}", **robot}
        )  # fmt: skip
    offsets = {
        "id": name, "type": "understanding_qa", "question": "What is where from the hand?",
        "answer": ", ".join(reached[block] for block in shuffled), **robot,
    }  # fmt: skip
    return ways, offsets
