"""What GEAR-VLA learns at debug size: the learning tests of systems.md 2.13, over seeds.

    python -m benchmarks.gear_learning --experiments overfit new_robot --seeds 5

For each experiment and seed a line of numbers, with those of an untrained model beside them; then
the least and the greatest over the seeds. tests/systems/test_gear_learning.py takes its margins
from here. Minutes on one core; nothing is timed but the run itself.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import tempfile
import time

import jax
import numpy as np

from benchmarks.gear_lab import (
    HEIGHT,
    Lab,
    blind,
    ending,
    height_as_brightness,
    no_wrist,
    others_latents,
    place_as_colour,
    small_config,
    strange_wrist,
    whole,
)
from gear_jax.data.embodiments import embodiment_id
from gear_jax.train.adapt import PROJECTOR_ALONE

NEAR = 0.04  # metres that a chunk may end too high or too low


def overfit(folder, seed, steps=600):
    """L1: eight rows again and again, with latent and FAST blocks, ordinary views and dropping."""

    def change(config):
        config.model.update(with_fast=True, length=192, most_labels=96)

    config = small_config(f"{folder}/overfit", seed, steps=steps, lr=4e-3, batch_size=8,
                          change=change, num_episodes=40)  # fmt: skip
    lab = Lab(config)
    batch = lab.gather(lab.batches())

    def look(params):
        chunk = np.mean([np.square(lab.act(params, batch, (k,)) - batch["action"])
                         [batch["action_mask"]].mean() for k in range(2)])  # fmt: skip
        made = lab.losses(params, [batch] * 8)
        return {name: made[name] for name in ("latent", "fast", "flow")} | {"chunk": float(chunk)}

    state = lab.begin()
    before = look(state.params)
    return _with(before, look(lab.train(state, itertools.repeat(batch), steps).params))


def _with(before, after):
    return after | {f"untrained_{name}": value for name, value in before.items()}


@functools.lru_cache(maxsize=1)
def policy(folder, seed, steps=500):
    """(lab, parameters) of a policy that L3 tries and L5 adapts."""
    lab = Lab(small_config(f"{folder}/policy", seed, steps=steps, num_episodes=300))
    return lab, lab.train(lab.begin(), lab.batches(place_as_colour), steps).params


def held_out(folder, seed, **options):
    """L3: flow loss on held-out episodes, on the ids of the future, said, and another row's."""
    lab, trained = policy(folder, seed, **options)
    held, late = (lab.held(8, place_as_colour, choose) for choose in (whole, ending))

    def look(params):
        made, end = lab.measure(params, held), lab.measure(params, late)
        other = lab.losses(params, map(others_latents, held))["flow"]
        return {
            "flow": made["flow"],
            "ratio": made["flow_predicted"] / made["flow"],
            "ending_ratio": end["flow_predicted"] / end["flow"],
            "other_ratio": other / lab.losses(params, held)["flow"],
            "latent_right": made["latent_right"],
        }

    return _with(look(lab.begin().params), look(trained))


def new_robot(folder, seed, budget=400, **options):
    """L5: a policy of one robot meets another, whose joints are permuted and scaled."""
    robot = {"robot": "ur5", "joint_order": (2, 0, 1), "joint_scale": 5.0, "num_episodes": 60}

    def alone(config):
        config.optim.partitions = PROJECTOR_ALONE

    old, trained = policy(folder, seed, **options)
    seed += 1000
    projector = Lab(small_config(folder, seed, steps=budget, change=alone, **robot))
    everything = Lab(small_config(folder, seed, steps=budget, lr=6e-4, **robot))
    held, held_old = (lab.held(6, place_as_colour) for lab in (everything, old))

    def latent(state, batches=held):
        return everything.losses(state.params, batches)["latent"]

    slots = embodiment_id("franka"), embodiment_id("ur5")
    # systems.md 2.8: a robot that was never seen begins as the mean of those that were
    mean = jax.tree.map(lambda x: x.at[slots[1]].set(x[slots[0]]), trained["state"])
    start = trained | {"state": mean}
    tenth, quarter = budget // 10, budget // 4

    before = everything.begin(start)
    batches = everything.batches(place_as_colour)
    a = projector.train(projector.begin(start), batches, tenth)
    two = everything.train(everything.begin(a.params), batches, quarter - tenth)
    one = everything.train(before, everything.batches(place_as_colour), quarter)
    return {
        "untrained": latent(old.begin()),
        "before": latent(everything.begin(start)),
        "unseen_slot": latent(everything.begin(trained)),
        "after_a": latent(a),
        "two_stage": latent(two),
        "one_stage": latent(one),
        "old_robot": latent(old.begin(trained), held_old),
        "old_robot_after_a": latent(a, held_old),
        "old_robot_two_stage": latent(two, held_old),
        "old_robot_one_stage": latent(one, held_old),
        "changed": changed(start, a.params),
    }


def changed(before, after):
    """Parameters that are not bitwise the same: "tower", or "state[slots]"."""
    found = []
    for tower in before:
        pairs = [
            (np.asarray(x), np.asarray(y))
            for x, y in zip(*map(jax.tree.leaves, (before[tower], after[tower])), strict=True)
        ]
        if tower == "state":
            slots = {int(slot) for x, y in pairs for slot in np.argwhere(x != y)[:, 0]}
            found += [f"state{sorted(slots)}"] if slots else []
        elif any((x != y).any() for x, y in pairs):
            found.append(tower)
    return found


def wrist(folder, seed, steps=400):
    """L7: wrist views tell the hand's height loudly, the head view faintly; then they fail."""
    made = {}

    def tell(batch):
        return height_as_brightness(batch, contrast=(0.3, 1, 1))

    for drops in ("none", "mixed"):

        def change(config, drops=drops):
            config.model.drops = drops

        lab = _height(folder, seed, steps, change)
        held = lab.held(16, tell)
        if drops == "none":
            made |= _success("untrained", lab, lab.begin().params, held)
        params = lab.train(lab.begin(), lab.batches(tell), steps).params
        for name, fail in (("clean", dict), ("strange", strange_wrist), ("absent", no_wrist)):
            made |= _success(f"{drops}_{name}", lab, params, map(fail, held))
    return made


def depth(folder, seed, steps=400):
    """L6: the hand's height is told in a colour that the frozen 2D tower does not see."""

    def tell(batch):
        return height_as_brightness(batch, channels=(2,))

    def with_geometry(config):
        config.model.geometry = {
            "depth": 1, "width": 32, "num_heads": 2, "mlp_dim": 64, "dino": None,
        }  # fmt: skip

    made = {}
    for name, change in (("without", None), ("with", with_geometry)):
        lab = _height(folder, seed, steps, change)
        held, start = lab.held(16, tell), blind(lab.begin().params, lab.cfg)
        if name == "with":
            made |= _success("untrained", lab, start, held)
        made |= _success(name, lab, lab.train(lab.begin(start), lab.batches(tell), steps).params,
                         held)  # fmt: skip
    return made


def _height(folder, seed, steps, change):
    return Lab(small_config(f"{folder}/height", seed, steps=steps, num_episodes=200, change=change))


def _success(name, lab, params, batches):
    """Share of chunks that end at the right height, and the mean miss in centimetres."""
    missed = np.abs(lab.misses(params, batches)[:, HEIGHT])
    return {name: float(np.mean(missed < NEAR)), f"{name}_cm": 100 * float(missed.mean())}


EXPERIMENTS = {one.__name__: one for one in (overfit, held_out, new_robot, wrist, depth)}


def main():
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiments", nargs="*", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="seed")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON, of the experiment")
    args = parser.parse_args()
    rows = {name: [] for name in args.experiments}
    for seed in range(args.first, args.first + args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            for name in args.experiments:
                begin = time.time()
                with contextlib.redirect_stdout(io.StringIO()):
                    made = EXPERIMENTS[name](folder, seed, **args.options)
                rows[name].append(made)
                print(name, seed, f"{time.time() - begin:.0f} s", _line(made), flush=True)
    for name, made in rows.items():
        numbers = {key: [row[key] for row in made] for key in made[0] if key != "changed"}
        for what, choose in (("least", min), ("greatest", max)):
            print(name, what, _line({key: choose(x) for key, x in numbers.items()}), flush=True)


def _line(made):
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in made.items()
    )


if __name__ == "__main__":
    main()
