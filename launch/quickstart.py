"""From nothing to a robot policy and its success rate, on the embedded tabletop.

    make quickstart
    FROM_SCRATCH=1 make quickstart     # also trains the small VLM that ships with the project

Scripted demonstrations are written as RLDS; a latent-action tokenizer is trained on them and gives
their latent ids; the VLM is pretrained on pointing, latent and FAST tokens; the action expert is
trained behind the stop_gradient; the policy is evaluated on initial states that no demonstration
had, beside three floors: another block is named, nothing is trained, a demonstration is replayed.
Everything lies under runs/quickstart, with report.html; killed, the same command goes on.
Sizes: configs/quickstart.py. The last line is one JSON object.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from configs.quickstart import TABLETOP, VLM

ROOT = TABLETOP.root
RUN = pathlib.Path(ROOT)
NUM_SCENES = 8000  # that questions are asked about
DEMONSTRATIONS = "1000:1200"  # initial states of each of the four tasks
EVALUATED = "0:25"  # likewise: 100 episodes
REPLAYED = "1000:1010"  # likewise, without noise: what the replay floor has
_SET = TABLETOP.path
_WORK = f"{ROOT}/data/work"
_CLEAN = f"replay:tabletop:{ROOT}/clean/tabletop_clean/1.0.0:{ROOT}/clean/work"


def main():
    """Run every step that is not done yet; returns the exit code."""
    RUN.mkdir(parents=True, exist_ok=True)
    seconds = _read(RUN / "steps.json")
    steps = plan(from_scratch=bool(os.environ.get("FROM_SCRATCH")))
    console = Console(stderr=True)
    for number, (name, command) in enumerate(steps.items(), 1):
        if name in seconds:
            print(f"[{number}/{len(steps)}] {name}: done before, {seconds[name]:.0f} s", flush=True)
            continue
        begun = time.monotonic()
        code = _run(name, command, f"[{number}/{len(steps)}]", console)
        if code:
            print(f"error: {name} ended with {code}; see {RUN}/logs/{name}.log", file=sys.stderr)
            return code
        seconds[name] = round(time.monotonic() - begun, 1)
        (RUN / "steps.json").write_text(json.dumps(seconds, indent=1))
        print(f"[{number}/{len(steps)}] {name}: {seconds[name]:.0f} s", flush=True)
    return _report(seconds)


def plan(*, from_scratch):
    """{step: command}, in order."""
    questions = _launch("demos", "questions", "--target", f"{ROOT}/questions",
                        "--scenes", NUM_SCENES)  # fmt: skip
    demos = _launch("demos", "--sim", "tabletop", "--tasks", "0:4", "--inits", DEMONSTRATIONS,
                    "--target", f"{ROOT}/data", "--name", "tabletop", "--noise", 0.7,
                    "--encoding", "png", "--workers", 2)  # fmt: skip
    clean = _launch("demos", "--sim", "tabletop", "--tasks", "0:4", "--inits", REPLAYED,
                    "--target", f"{ROOT}/clean", "--name", "tabletop_clean", "--noise", 0,
                    "--encoding", "png")  # fmt: skip
    extract = _launch("extract", "--tokenizer", f"{ROOT}/latents", "--path", _SET,
                      "--row", "tabletop", "--work", _WORK, "--out", f"{ROOT}/ids",
                      "--page")  # fmt: skip
    vlm, published = {}, VLM
    if from_scratch:
        published = f"{ROOT}/vlm_published"
        vlm = {
            "vlm": _train("vlm"),
            "spatial": _train("spatial"),
            "publish": publish(f"{ROOT}/spatial", published),
        }
    return {
        "questions": questions,
        "demonstrations": demos,
        "clean_demonstrations": clean,
        **vlm,
        "latents": _train("latents"),
        "extract": extract,
        "pretrain": [*_train("pretrain"), f"--config.init.published={published}"],
        "policy": _train("policy"),
        "evaluate": _evaluate("named", f"{ROOT}/policy", "--video", "all", "--videos", 12),
        "evaluate_other": _evaluate(
            "other", f"{ROOT}/policy", "--options", json.dumps({"instruct": "other"})
        ),
        "evaluate_untrained": _evaluate("untrained", f"untrained:{ROOT}/policy"),
        "evaluate_replay": _evaluate("replay", _CLEAN),
    }


def publish(run, target):
    """The command that makes what ships: configs/quickstart_vlm."""
    return _launch("publish", "--run", run, "--target", target, "--dtype", "bfloat16",
                   "--only", "(vision|geometry|projector|language)/.*")  # fmt: skip


def _launch(name, *arguments):
    return [sys.executable, "-m", f"launch.{name}", *map(str, arguments)]


def _train(stage):
    return _launch("train", "--config", f"configs/quickstart.py:{stage}",
                   "--workdir", f"{ROOT}/{stage}")  # fmt: skip


def _evaluate(name, policy, *more):
    return _launch("eval", "--policy", policy, "--sim", "tabletop", "--inits", EVALUATED,
                   "--workers", 4, "--out", f"{ROOT}/eval/{name}", *more)  # fmt: skip


def _run(name, command, where, console):
    """Run one step; its last line is shown while it runs, all of it is in its log."""
    log = RUN / "logs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with log.open("a") as file, Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"{where} {name}")
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process:
            for line in process.stdout or ():
                file.write(line)
                file.flush()
                if line.startswith("step ") or "/" in line[:12]:
                    progress.update(task, description=f"{where} {name}: {line.strip()[:90]}")
    return process.returncode


def _report(seconds):
    from gear_jax.report import quickstart_page

    found = {
        name: _read(RUN / "eval" / name / "summary.json")["total"]
        for name in ("named", "other", "untrained", "replay")
    }
    quickstart_page.write(RUN, found, seconds)
    for name, count in found.items():
        print(
            f"{name}: {count['success']} of {count['episodes']} = {100 * count['rate']:.0f} % "
            f"({100 * count['low']:.0f} .. {100 * count['high']:.0f})"
        )
    said = {"ok": True, "success": found["named"]["rate"], "seconds": sum(seconds.values())}
    print(json.dumps({**said, "report": str(RUN / "report.html"), "evaluations": found}))
    return 0


def _read(path):
    return json.loads(path.read_text()) if path.is_file() else {}


if __name__ == "__main__":
    sys.exit(main())
