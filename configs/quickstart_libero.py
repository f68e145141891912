"""The quickstart's second world: one task of LIBERO-Spatial, from scripted demonstrations.

    make quickstart-libero
    python -m launch.train --config configs/quickstart_libero.py:policy --workdir runs/x

Sizes and stages are those of quickstart.py. No question is asked here. Stage "spatial" begins with
the tabletop's VLM, learns how LIBERO's hand moves, 2D tower and all, and ships as
configs/quickstart_libero_vlm.
"""

from configs import quickstart


def get_config(arg="policy"):
    """ConfigDict of one stage: "spatial", "latents", "pretrain" or "policy", and a variant."""
    config = quickstart.get_config(arg, quickstart.LIBERO)
    if config.stage != "latents":
        config.model.update(length=192, fast_length=54)  # a longer instruction; turns are said too
    stages = arg.split(",")
    if "spatial" in stages:
        config.optim.num_steps = 2200
        config.data.fast.path = f"{quickstart.LIBERO.root}/fast"  # of its own motions
        config.init.update(
            run=None, published=quickstart.TABLETOP.vlm, fresh_rows=(512, 1024), rows_like=(),
            deeper=False,
        )  # fmt: skip
    if "policy" in stages:
        config.optim.num_steps = 1600
        config.model.length = 160
    return config
