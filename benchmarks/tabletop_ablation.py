"""What the parts of GEAR-VLA are worth on the embedded tabletop: the same budget, several seeds.

    make quickstart                                  # demonstrations, latent ids
    python -m benchmarks.tabletop_ablation           # hours on two cores; killed, it goes on

For each variant and seed: pretrain and policy of configs/quickstart.py, then the quickstart's
closed-loop evaluation as it is, with a noisy wrist camera and with a shifted head camera. All begin
with configs/quickstart_vlm, which was trained with every part: what is compared is what happens
afterwards. Prints a Markdown table and keeps it as <out>/table.md; another budget needs another
--out.
"""

import argparse
import json
import pathlib
import subprocess
import sys

from configs.quickstart import TABLETOP
from gear_jax.evals.statistics import wilson
from launch.quickstart import QUICKSTARTS

# {name: (words behind the stage, flags of both stages)}
VARIANTS = {
    "full": ("", ()),
    "no latent ids": (",wo_latent", ()),
    "no FAST": (",wo_fast", ()),
    "LAPA latents": (",lapa", ()),
    "no VGGT": (",wo_vggt", ()),
    "modality dropping": ("", ("--config.model.drops=mixed",)),
}
CONDITIONS = {
    "as it is": {},
    "wrist camera noise": {"perturb": {"noise": 3}, "noisy_view": "right_wrist"},
    "camera shift": {"perturb": {"camera": 2}},
}


def main():
    """Run what is not done yet, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/ablation"))
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretrain-steps", type=int, default=350)
    parser.add_argument("--policy-steps", type=int, default=800)
    parser.add_argument("--inits", type=int, default=15, help="of each of the four tasks")
    args = parser.parse_args()
    if "LAPA latents" in args.variants:
        _lapa_ids(args.out)
    for seed in range(args.seeds):
        for name in args.variants:
            _train_and_evaluate(args, name, seed)
            (args.out / "table.md").write_text(_table(args))
    print(_table(args))


def _lapa_ids(out):
    """The tokenizer that sees the first and last frame alone, and its ids."""
    tokenizer, ids = out / "lapa", out / "lapa_ids"
    _once(tokenizer, "launch.train", "--config", f"{TABLETOP.config}:latents",
          "--config.model.mode=lapa", "--workdir", tokenizer)  # fmt: skip
    _once(ids, "launch.extract", "--tokenizer", tokenizer, "--path", TABLETOP.path, "--row",
          TABLETOP.row, "--work", f"{TABLETOP.root}/data/work", "--out", ids)  # fmt: skip


def _train_and_evaluate(args, name, seed):
    words, flags = VARIANTS[name]
    if name == "LAPA latents":
        flags = (f"--config.data.sets.{TABLETOP.name}.latents={args.out}/lapa_ids",)
    folder = _folder(args, name, seed)
    for stage, steps in (("pretrain", args.pretrain_steps), ("policy", args.policy_steps)):
        begin = () if stage == "pretrain" else (f"--config.init.run={folder}/pretrain",)
        _once(folder / stage, "launch.train", "--config", f"{TABLETOP.config}:{stage}{words}",
              f"--config.seed={seed}", f"--config.optim.num_steps={steps}", "--workdir",
              folder / stage, *flags, *begin)  # fmt: skip
    for condition, options in CONDITIONS.items():
        out = folder / condition.replace(" ", "_")
        _once(out, "launch.eval", "--policy", folder / "policy", "--sim", "tabletop", "--tasks",
              "all", "--inits", f"0:{args.inits}", "--workers", 8, "--batch", 8, "--options",
              json.dumps(options), "--temperature", QUICKSTARTS["tabletop"].temperature,
              "--out", out)  # fmt: skip


def _folder(args, name, seed):
    return args.out / f"{name.replace(' ', '_')}_{seed}"


def _once(folder, module, *arguments):
    """Run a command whose result is `folder`, unless that was done."""
    done = folder.parent / f"{folder.name}.done"
    command = ["-m", module, *map(str, arguments)]
    if done.exists():
        if done.read_text() != " ".join(command):
            sys.exit(f"error: {folder} was made by `{done.read_text()}`: expected another --out")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        subprocess.run([sys.executable, *command], stdout=log, stderr=subprocess.STDOUT, check=True)
    done.write_text(" ".join(command))
    print(folder, flush=True)


def _table(args):
    """Success in percent: all seeds together with their 95 % interval, and each seed."""
    lines = [f"| variant | {' | '.join(CONDITIONS)} |", "|---" * (len(CONDITIONS) + 1) + "|"]
    for name in args.variants:
        cells = []
        for condition in CONDITIONS:
            files = [_folder(args, name, seed) / condition.replace(" ", "_") / "summary.json"
                     for seed in range(args.seeds)]  # fmt: skip
            totals = [json.loads(file.read_text())["total"] for file in files if file.is_file()]
            cells.append(_cell(totals))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(totals):
    if not totals:
        return ""
    successes = sum(one["success"] for one in totals)
    episodes = sum(one["episodes"] for one in totals)
    low, high = wilson(successes, episodes)
    seeds = ", ".join(f"{100 * one['rate']:.0f}" for one in totals)
    return f"{100 * successes / episodes:.0f} ({100 * low:.0f} .. {100 * high:.0f}); {seeds}"


if __name__ == "__main__":
    main()
