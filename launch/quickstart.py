"""From nothing to a robot policy and its success rate: on the embedded tabletop, or in LIBERO.

    make quickstart                    # the tabletop
    FROM_SCRATCH=1 make quickstart     # trains a small VLM of its own first
    make quickstart-libero             # one task of LIBERO-Spatial

Scripted demonstrations are written as RLDS; a latent-action tokenizer is trained on them and gives
their latent ids; the VLM is pretrained on questions, latent and FAST tokens; the action expert is
trained behind the stop_gradient; the policy is evaluated on initial states that no demonstration
had, beside floors: another block is named, nothing is trained, a demonstration is replayed.
Everything lies under runs/quickstart (runs/quickstart_libero), with report.html; killed, the same
command goes on. Sizes: configs/quickstart.py. The last line is one JSON object.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from configs.quickstart import LIBERO, QUESTION_STAGES, TABLETOP, World

NUM_SCENES = 2000  # that questions are asked about
NUM_SCENES_FROM_SCRATCH = 8000


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """What the steps are told of one world.

    Attributes:
        world: of the config.
        title: of its report.
        note: what is to be said of its numbers.
        sim: simulator.
        tasks: of the demonstrations, as `launch.demos` numbers them.
        names: of the same tasks, as `launch.eval` has them.
        demonstrations: flags of `launch.demos`.
        replayed: likewise, of the few without noise that the replay floor has.
        evaluated: initial states, of each task.
        temperature: of the policy.
        workers: simulators at a time.
        options: of the simulator, where it is evaluated.
        from_scratch: more flags of `launch.demos`, where the VLM is trained as well.
    """

    world: World
    title: str
    note: str
    sim: str
    tasks: str
    names: str
    demonstrations: Sequence[str]
    replayed: Sequence[str]
    evaluated: str
    temperature: float
    workers: int
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    from_scratch: Sequence[str] = ()


QUICKSTARTS = {
    "tabletop": Quickstart(
        TABLETOP,
        title="GEAR-VLA on the embedded tabletop",
        note="A toy world made of boxes: its success rates belong in no table beside published "
        "ones.",
        sim="tabletop",
        tasks="0:4",
        names="all",
        demonstrations=("--inits", "1000:1200", "--noise", "0.7"),
        replayed=("--inits", "1000:1010"),
        evaluated="0:25",  # of each of the four tasks: 100 episodes
        temperature=0.5,
        workers=8,
        from_scratch=("--inits", "1000:1600"),  # with fewer scenes it learns these by heart
    ),
    "libero": Quickstart(
        LIBERO,
        title="GEAR-VLA on one task of LIBERO-Spatial",
        note="One task of ten, scripted demonstrations, pictures of 64 pixels without shadows and "
        "anti-aliasing: not the benchmark's protocol, so no number for its table.",
        sim="libero_spatial",
        tasks="2",
        names="pick_up_the_black_bowl_from_table_center_and_place_it_on_the_plate",
        demonstrations=("--inits", "0:25", "--repeats", "2", "--noise", "0.7", "--speed", "0.5",
                        "--image-size", "64", "--quality", "fast"),
        replayed=("--inits", "0:3", "--image-size", "64", "--quality", "fast"),
        evaluated="30:50",
        temperature=0.5,
        workers=2,
        options={"image_size": 64, "quality": "fast"},
        from_scratch=("--repeats", "6"),
    ),
}  # fmt: skip


def main(argv=None):
    """Run every step that is not done yet; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.quickstart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("world", nargs="?", default="tabletop", choices=tuple(QUICKSTARTS))
    one = QUICKSTARTS[parser.parse_args(argv).world]
    folder = pathlib.Path(one.world.root)
    folder.mkdir(parents=True, exist_ok=True)
    seconds = _read(folder / "steps.json")
    steps = plan(one, from_scratch=bool(os.environ.get("FROM_SCRATCH")))
    console = Console(stderr=True)
    for number, (name, command) in enumerate(steps.items(), 1):
        if name in seconds:
            print(f"[{number}/{len(steps)}] {name}: done before, {seconds[name]:.0f} s", flush=True)
            continue
        begun = time.monotonic()
        log = folder / "logs" / f"{name}.log"
        code = _run(log, command, f"[{number}/{len(steps)}] {name}", console)
        if code:
            print(f"error: {name} ended with {code}; see {log}", file=sys.stderr)
            return code
        seconds[name] = round(time.monotonic() - begun, 1)
        (folder / "steps.json").write_text(json.dumps(seconds, indent=1))
        print(f"[{number}/{len(steps)}] {name}: {seconds[name]:.0f} s", flush=True)
    return _report(one, seconds)


def plan(one, *, from_scratch):
    """{step: command}, in order."""
    world, root = one.world, one.world.root
    work, steps = f"{root}/data/work", {}
    if world.questions:
        scenes = NUM_SCENES_FROM_SCRATCH if from_scratch else NUM_SCENES
        steps["questions"] = _launch("demos", "questions", "--target", f"{root}/questions",
                                     "--scenes", scenes)  # fmt: skip
    demos = ("demos", "--sim", one.sim, "--tasks", one.tasks, "--encoding", "png")
    more = one.from_scratch if from_scratch else ()
    steps["demonstrations"] = _launch(*demos, *one.demonstrations, *more, "--workers", 2,
                                      "--target", f"{root}/data", "--name", world.name)  # fmt: skip
    steps["clean_demonstrations"] = _launch(*demos, *one.replayed, "--target", f"{root}/clean",
                                            "--name", world.name)  # fmt: skip
    published = world.vlm
    if from_scratch:
        published = f"{root}/vlm_published"
        if world.questions:
            steps |= {stage: _train(one, stage) for stage in QUESTION_STAGES}
        steps["spatial"] = _train(one, "spatial")
        steps["publish"] = publish(f"{root}/spatial", published)
    steps["latents"] = _train(one, "latents")
    steps["extract"] = _launch("extract", "--tokenizer", f"{root}/latents", "--path", world.path,
                               "--row", world.row, "--work", work, "--out", f"{root}/ids",
                               *(f"--option={key}={value}" for key, value in world.options.items()),
                               "--page")  # fmt: skip
    fast = [f"--config.data.fast.path={published}/fast"] if from_scratch else []
    steps["pretrain"] = [*_train(one, "pretrain"), f"--config.init.published={published}", *fast]
    steps["policy"] = _train(one, "policy")
    drawn = ("--temperature", one.temperature)
    steps["evaluate"] = _evaluate(one, "named", f"{root}/policy", *drawn,
                                  "--video", "all", "--videos", 100)  # fmt: skip
    if world.questions:
        steps["evaluate_other"] = _evaluate(
            one, "other", f"{root}/policy", *drawn, instruct="other"
        )
    steps["evaluate_untrained"] = _evaluate(one, "untrained", f"untrained:{root}/policy", *drawn)
    clean = f"{root}/clean/{world.name}/1.0.0:{root}/clean/work"
    steps["evaluate_replay"] = _evaluate(one, "replay", f"replay:{world.row}:{clean}")
    return steps


def publish(run, target):
    """The command that makes what ships: configs/quickstart_vlm."""
    return _launch("publish", "--run", run, "--target", target, "--dtype", "bfloat16",
                   "--only", "(vision|geometry|projector|language|state)/.*")  # fmt: skip


def _launch(name, *arguments):
    return [sys.executable, "-m", f"launch.{name}", *map(str, arguments)]


def _train(one, stage):
    return _launch("train", "--config", f"{one.world.config}:{stage}",
                   "--workdir", f"{one.world.root}/{stage}")  # fmt: skip


def _evaluate(one, name, policy, *more, **options):
    return _launch("eval", "--policy", policy, "--sim", one.sim, "--tasks", one.names,
                   "--inits", one.evaluated, "--workers", one.workers, "--batch", one.workers,
                   "--device-batch", one.workers,
                   "--options", json.dumps({**one.options, **options}),
                   "--out", f"{one.world.root}/eval/{name}", *more)  # fmt: skip


def _run(log, command, where, console):
    """Run one step; its last line is shown while it runs, all of it is in its log."""
    log.parent.mkdir(exist_ok=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with log.open("a") as file, Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(where)
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            for line in process.stdout or ():
                file.write(line)
                file.flush()
                if line.startswith("step ") or "/" in line[:12]:
                    progress.update(task, description=f"{where}: {line.strip()[:90]}")
    return process.returncode


def _report(one, seconds):
    from gear_jax.report import quickstart_page

    folder = pathlib.Path(one.world.root)
    names = ("named", "other", "untrained", "replay")
    summaries = {name: _read(folder / "eval" / name / "summary.json") for name in names}
    found = {name: summary["total"] for name, summary in summaries.items() if summary}
    quickstart_page.write(folder, found, seconds, title=one.title, note=one.note)
    for name, count in found.items():
        print(
            f"{name}: {count['success']} of {count['episodes']} = {100 * count['rate']:.0f} % "
            f"({100 * count['low']:.0f} .. {100 * count['high']:.0f})"
        )
    said = {"ok": True, "success": found["named"]["rate"], "seconds": sum(seconds.values())}
    print(json.dumps({**said, "report": str(folder / "report.html"), "evaluations": found}))
    return 0


def _read(path):
    return json.loads(path.read_text()) if path.is_file() else {}


if __name__ == "__main__":
    sys.exit(main())
