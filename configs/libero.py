"""GEAR-VLA on LIBERO: one model for the union of the four suites (paper, 4.1).

    python -m launch.train --config configs/libero.py:projector --workdir runs/libero_a
    python -m launch.train --config configs/libero.py:all --workdir runs/libero

12,000 steps of 224 samples: 56 accelerators with 4 each. The data are the no-op-filtered RLDS
copies of the four suites, below data/modified_libero_rlds.
"""

from configs import adapt

SUITES = ("spatial", "object", "goal", "10")


def get_config(arg=""):
    """ConfigDict of the stage `adapt` on LIBERO.

    Args:
        arg: phase, size and variant, as in adapt.py.
    """
    config = adapt.get_config(arg, "configs/libero.py")
    config.init.run = "runs/policy" if config.phase == "projector" else "runs/libero_a"
    if "debug" in arg.split(","):
        config.init.run = "runs/debug/policy"
        return config
    config.data.sets = {
        f"libero_{suite}": {
            "path": f"data/modified_libero_rlds/libero_{suite}_no_noops/1.0.0",
            "row": "libero",
            "work": f"runs/data/libero_{suite}",
            "group": None,
            "latents": f"runs/ids/libero_{suite}",
            "weight": 1.0,
        }
        for suite in SUITES
    }
    return config
