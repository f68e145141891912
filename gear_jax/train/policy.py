"""Stage `policy`: the action expert learns from latent tokens while the VLM goes on as before.

    VLM of `pretrain` -> cross-entropy (eq. 1) + flow loss behind the stop_gradient (eq. 2)

The two losses share a step and no gradient; each partition has its own clip, so the flow loss does
not change the VLM by a bit. Source: GEAR-VLA 3.3, systems.md 2.9 stage C.
"""

import jax
import ml_collections

from gear_jax.train import gear
from gear_jax.train.loop import Stage


def stage(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> Stage:
    """The stage of a config like configs/policy_gear.py.

    Raises:
        ValueError: there is no action expert, or as `gear.build`.
    """
    if config.model.expert is None:
        raise ValueError("stage 'policy' trains an action expert: model.expert is None")
    return gear.build(config, mesh)
