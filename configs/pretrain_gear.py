"""Embodied pretraining of GEAR-VLA: text, grounding, latent actions, FAST tokens (paper, 3.3).

    python -m launch.train --config configs/pretrain_gear.py --workdir runs/pretrain       # 7B
    python -m launch.train --config configs/pretrain_gear.py:3b --workdir runs/pretrain3b
    python -m launch.train --config configs/pretrain_gear.py:debug --workdir runs/debug/pretrain

350,000 steps of 1,920 samples: 240 accelerators with 8 each. Begins with ported Qwen2.5-VL and VGGT
(docs/port.md) and needs latent ids (docs/latents.md); "debug" needs neither weights nor downloads.
"""

from configs import gear_base


def get_config(arg=""):
    """ConfigDict of the stage `pretrain`.

    Args:
        arg: size and variant, as in gear_base.py.
    """
    size, variant, _ = gear_base.parse(arg, "configs/pretrain_gear.py")
    config = gear_base.base(size)
    config.stage = "pretrain"
    gear_base.optim(config, 350_000, 2e-5, expert=False)
    config.data.batch_size = 1920
    config.data.mixture = "su_sp"
    config.init.update(
        qwen2_5_vl=f"checkpoints/qwen2_5_vl_{size}", vggt="checkpoints/vggt",
        fresh=("state/.*", "projector/geometry_kernel", "learned/.*"),
    )  # fmt: skip
    if size == "debug":
        gear_base.optim(config, 8, 1e-3, expert=False)
        config.data.update(batch_size=8, mixture="weights")
        config.init.update(qwen2_5_vl=None, vggt=None, fresh=(".*",))
    gear_base.VARIANTS[variant](config)
    return config
