"""Stage `pretrain`: the VLM learns text, grounding, latent actions and FAST tokens (eq. 1).

    ported Qwen2.5-VL, VGGT -> cross-entropy over all targets -> what `policy` begins with

Source: GEAR-VLA 3.3, systems.md 2.9 stage P.
"""

import jax
import ml_collections

from gear_jax.train import gear
from gear_jax.train.loop import Stage


def stage(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> Stage:
    """The stage of a config like configs/pretrain_gear.py.

    Raises:
        ValueError: there is an action expert, which nothing would train; or as `gear.build`.
    """
    if config.model.expert is not None:
        raise ValueError("stage 'pretrain' has no action expert: expected model.expert None")
    return gear.build(config, mesh)
