"""What the tabletop teaches: pointing questions about many random scenes, and demonstrations."""

import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import cv2
import numpy as np

from gear_jax.data.embodiments import embodiment
from gear_jax.evals.sims.recording import Recorder
from gear_jax.evals.sims.tabletop import COLOURS, MAX_STEPS, NUM_INITS, TabletopSimulator
from gear_jax.evals.sims.tabletop_expert import Pushes, TabletopExpert

NUM_JOINTS = embodiment("tabletop_gantry").joints["right"]
_AFTER = 6  # control steps recorded after success: hold on
_FIRST_QUESTION = 1_000_000  # initial states from here on are asked about


def demonstrations(
    tasks: Sequence[int],
    inits: Sequence[int],
    *,
    noise: float = 0.7,
    seed: int = 0,
    encoding: Literal["jpeg", "png"] = "png",
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Episode after episode: its source, and the record or None where the expert failed.

    Args:
        tasks: numbers of the colours.
        inits: numbers of initial states, of each task, from `tabletop.NUM_INITS` on: those below
            are for evaluation.
        noise: strength of `Pushes`; recorded actions stay the expert's own.
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
                yield _demonstrate(simulator, known[number].name, init, noise, seed, encoding)
    finally:
        simulator.close()


def _demonstrate(simulator, task, init, noise, seed, encoding):
    simulator.reset(task, init)
    recorder = Recorder(f"tabletop/{task}/init_{init}", num_joints=NUM_JOINTS, encoding=encoding)
    push = Pushes(np.random.default_rng([seed, *task.encode(), init]), size=noise)
    expert, left = TabletopExpert(simulator), None
    for _ in range(MAX_STEPS):
        action = expert.act()
        recorder.add(simulator.observe(), action)
        simulator.act(push(action) if left is None else action)
        if left is None and simulator.solved():
            left = _AFTER
        elif left is not None:
            left -= 1
            if not left:
                return recorder.source, recorder.episode()
    return recorder.source, None


def write_questions(folder, num_scenes: int, *, seed: int = 0, progress=lambda done: None) -> None:
    """Records (docs/vision_language.md) of random scenes: where each block is, and what is where.

    The hand is anywhere, at any height, so that the model has seen what a policy will see. A
    description names the blocks of a scene in random order, each before its place: without it, a
    model from nothing does not learn which colour was asked for (docs/quickstart.md).

    Args:
        folder: points.jsonl, scenes.jsonl and images/ appear in it; the images come first.
        num_scenes: images.
        seed: of hands and scenes.
        progress: told the number of scenes done.
    """
    folder = pathlib.Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    simulator = TabletopSimulator()
    rng, order = np.random.default_rng(seed), np.random.default_rng([seed, 1])
    points, scenes = [], []
    for number in range(num_scenes):
        colour = list(COLOURS)[number % len(COLOURS)]
        simulator.place(colour, _FIRST_QUESTION + seed * num_scenes + number, rng)
        image = simulator.observe().images["head"]
        about = {"images": [f"images/{number:06d}.png"]}
        cv2.imwrite(str(folder / about["images"][0]), image[..., ::-1])
        said = []
        for block, its in enumerate(simulator.scene.colours):
            place = np.clip(simulator.pixel(block), 0, simulator.image_size - 1)
            x, y = (round(float(value)) for value in place)
            name = f"tabletop/{seed}/{number}/{its}"
            points.append(
                {"id": name, "type": "object_point", "label": f"{its} block", "points": [[x, y]]}
                | about
            )
            said.append(f"{its} block [{x}, {y}]")
        answer = ", ".join(order.permutation(said))
        scenes.append(
            {"id": f"tabletop/{seed}/{number}", "type": "understanding_qa",
             "question": "Where is what?", "answer": answer} | about
        )  # fmt: skip
        progress(number + 1)
    simulator.close()
    for name, records in (("scenes", scenes), ("points", points)):
        partial = folder / f".{name}.partial"
        partial.write_text("".join(json.dumps(record) + "\n" for record in records))
        partial.rename(folder / f"{name}.jsonl")
