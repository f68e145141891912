"""What the tabletop teaches: pointing questions about many random scenes, and demonstrations."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

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
    num_episodes: int, *, noise: float = 0.7, seed: int = 0, encoding: str = "png"
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Episode after episode: its source, and the record or None where the expert failed.

    Initial states are those from `tabletop.NUM_INITS` on, which no evaluation uses.

    Args:
        num_episodes: the colours in turn.
        noise: of `Pushes`; recorded actions stay the expert's own.
        seed: of the pushes.
        encoding: of images, "jpeg" or "png".
    """
    simulator = TabletopSimulator()
    for number in range(num_episodes):
        task = f"pick_{list(COLOURS)[number % len(COLOURS)]}"
        init = NUM_INITS + number // len(COLOURS)
        simulator.reset(task, init)
        recorder = Recorder(
            f"tabletop/{task}/init_{init}", num_joints=NUM_JOINTS, encoding=encoding
        )
        expert, push = (
            TabletopExpert(simulator),
            Pushes(np.random.default_rng([seed, number]), size=noise),
        )
        left = None
        for _ in range(MAX_STEPS):
            action = expert.act()
            recorder.add(simulator.observe(), action)
            simulator.act(push(action) if left is None else action)
            if left is None and simulator.solved():
                left = _AFTER
            elif left is not None:
                left -= 1
                if not left:
                    break
        yield recorder.source, None if left is None else recorder.episode()
    simulator.close()


def write_questions(folder, num_scenes: int, *, seed: int = 0, progress=lambda done: None) -> None:
    """Pointing records (docs/vision_language.md): where each block of a scene is.

    The hand is anywhere, at any height, so that the model has seen what a policy will see.

    Args:
        folder: questions.jsonl and images/ appear in it; the first comes last.
        num_scenes: images.
        seed: of hands and scenes.
        progress: told the number of scenes done.
    """
    folder = pathlib.Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    simulator = TabletopSimulator()
    rng, lines = np.random.default_rng(seed), []
    for number in range(num_scenes):
        colour = list(COLOURS)[number % len(COLOURS)]
        simulator.place(colour, _FIRST_QUESTION + seed * num_scenes + number, rng)
        image = simulator.observe().images["head"]
        name = f"images/{number:06d}.png"
        cv2.imwrite(str(folder / name), image[..., ::-1])
        for block, its in enumerate(simulator.scene.colours):
            x, y = np.clip(simulator.pixel(block), 0, simulator.image_size - 1)
            record = {
                "id": f"tabletop/{seed}/{number}/{its}", "type": "object_point", "images": [name],
                "label": f"{its} block", "points": [[round(float(x)), round(float(y))]],
            }  # fmt: skip
            lines.append(json.dumps(record))
        progress(number + 1)
    simulator.close()
    partial = folder / ".questions.partial"
    partial.write_text("\n".join(lines) + "\n")
    partial.rename(folder / "questions.jsonl")
