"""A trained policy meets a robot or task of one's own, in two phases (paper, 3.4).

    python -m launch.train --config configs/adapt.py:projector --workdir runs/adapt_a \
        --config.init.run=runs/policy
    python -m launch.train --config configs/adapt.py:all --workdir runs/adapt_b \
        --config.init.run=runs/adapt_a

Name your data set as in docs/data.md; a robot that data/embodiments.py does not know is appended
there first. The first phase trains the robot's state projector alone, 10 % of the steps; the second
trains everything but the 2D tower, lightly. `adapt.py:all,one_stage` leaves the first phase out.
"""

from configs import gear_base

PHASES = ("all", "projector", "one_stage")
STEPS = {"projector": 1_200, "all": 10_800, "one_stage": 12_000}


def get_config(arg="", where="configs/adapt.py"):
    """ConfigDict of the stage `adapt`.

    Args:
        arg: phase, size and variant, as in gear_base.py; "one_stage" is the second phase with the
            steps of both.
        where: file, for messages.
    """
    size, variant, phase = gear_base.parse(arg, where, PHASES)
    config = gear_base.base(size)
    config.stage = "adapt"
    config.phase = "projector" if phase == "projector" else "all"
    steps, lr = STEPS[phase], 1e-4 if phase == "projector" else 2e-5
    config.init.update(run="runs/policy", fresh=())
    config.data.update(batch_size=224, hold_out=0.02)
    config.data.sets = {
        "mine": {
            "path": "data/mine/1.0.0", "row": "libero", "work": "runs/data/mine", "group": None,
            "latents": "runs/ids/mine", "weight": 1.0,
        }
    }  # fmt: skip
    config.data.pools = {}
    config.monitor.update(every=500)
    config.loop.update(checkpoint_every=1_000, keep_every=None)
    if size == "debug":
        config.data.sets = gear_base.base("debug").data.sets
        config.data.update(batch_size=8, hold_out=0.2)
        config.init.update(run="runs/debug/policy")
        config.monitor.update(every=4)
        config.loop.update(checkpoint_every=4)
        steps, lr = 8, 1e-3
    gear_base.optim(config, steps, lr, expert=True)
    gear_base.VARIANTS[variant](config)
    if phase == "projector":
        config.optim.partitions = (("state/.*", "state"), (".*", None))
    return config
