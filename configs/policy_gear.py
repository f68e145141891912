"""Continuous policy of GEAR-VLA: the action expert behind the stop_gradient (paper, 3.3).

    python -m launch.train --config configs/policy_gear.py --workdir runs/policy            # 7B
    python -m launch.train --config configs/policy_gear.py:3b,wo_latent --workdir runs/no_latent
    python -m launch.train --config configs/policy_gear.py:debug --workdir runs/debug/policy

700,000 steps of 960 samples: 240 accelerators with 4 each. Begins with the VLM of
configs/pretrain_gear.py (`--config.init.run`), and goes on to teach it; 40 % of the vision-language
records are kept.
"""

from configs import gear_base


def get_config(arg=""):
    """ConfigDict of the stage `policy`.

    Args:
        arg: size and variant, as in gear_base.py.
    """
    size, variant, _ = gear_base.parse(arg, "configs/policy_gear.py")
    config = gear_base.base(size)
    config.stage = "policy"
    gear_base.optim(config, 700_000, 2e-5, expert=True)
    config.data.update(batch_size=960, mixture="policy", keep_percent=40)
    config.init.update(run="runs/pretrain", fresh=("expert/.*",))
    if size == "debug":
        gear_base.optim(config, 8, 1e-3, expert=True)
        config.data.update(batch_size=8, mixture="weights", keep_percent=100)
        config.init.update(run="runs/debug/pretrain", fresh=("expert/.*",))
    gear_base.VARIANTS[variant](config)
    return config
