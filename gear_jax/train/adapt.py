"""Stage `adapt`: a trained policy meets a robot or a task of one's own, in two phases.

    projector    the state projector of the new robot alone, by the discrete losses
    all          everything but the 2D tower, lightly

The flow loss cannot reach the projector, for the boundary stands between them: what teaches it is
that the frozen VLM must say the right latent and FAST tokens (systems.md 2.8).
"""

import jax
import ml_collections

from gear_jax.train import gear
from gear_jax.train.loop import Stage

PHASES = ("projector", "all")
PROJECTOR_ALONE = (("state/.*", "state"), (".*", None))


def stage(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> Stage:
    """The stage of a config like configs/adapt.py.

    Raises:
        ValueError: an unknown phase, a phase whose partitions are not its own, no checkpoint to
            adapt, or as `gear.build`.
    """
    if config.phase not in PHASES:
        raise ValueError(f"phase is {config.phase!r}: expected one of {PHASES}")
    alone = tuple(map(tuple, config.optim.partitions)) == PROJECTOR_ALONE
    if alone != (config.phase == "projector"):
        raise ValueError(
            f"phase is {config.phase!r} and optim.partitions {tuple(config.optim.partitions)}: "
            f"phase 'projector', and it alone, trains {PROJECTOR_ALONE}"
        )
    if not config.init.run:
        raise ValueError("init.run is None: expected the workdir of a policy to adapt")
    return gear.build(config, mesh)
