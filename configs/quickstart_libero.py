"""The quickstart's second world: one task of LIBERO-Spatial, from scripted demonstrations.

    make quickstart-libero
    python -m launch.train --config configs/quickstart_libero.py:policy --workdir runs/x

Sizes and stages are those of quickstart.py. No question is asked here; and the 2D tower, which saw
nothing but the tabletop, is trained as well.
"""

from configs import gear_base, quickstart


def get_config(arg="policy"):
    """ConfigDict of one stage: "latents", "pretrain" or "policy", and a variant."""
    config = quickstart.get_config(arg, quickstart.LIBERO)
    if config.stage == "pretrain":
        gear_base.VARIANTS["trainable_vit"](config)
        config.optim.update(num_steps=600, lr_scale=())
        config.data.fast.path = f"{quickstart.LIBERO.root}/fast"  # of its own motions
        config.init.fresh_rows = (512, 1024)
    if config.stage != "latents":
        config.model.length = 192  # a longer instruction
    return config
