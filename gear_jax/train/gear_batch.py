"""A batch on its way to the devices: flat and by rows outside, nested where it is read.

Stream -> arrays -> sharded over rows -> nested -> gear.loss
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gear_jax.data.sequences import SequenceConfig
from gear_jax.systems.gear import GearConfig
from gear_jax.towers.action_expert import ActionExpertConfig

# What a train step reads of a batch.
_ARRAYS = ("images", "scenes", "embodiment_id", "action", "action_mask", "tokens", "labels",
           "segments", "groups", "acts", "insert_index", "positions", "latent_index",
           "latent_valid", "chunk_position")  # fmt: skip


def arrays(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What goes to the devices: flat, every array with its leading axis over rows."""
    flat = {key: batch[key] for key in _ARRAYS}
    flat["positions"] = np.moveaxis(flat["positions"], 0, 1)
    return flat | {f"state/{key}": value for key, value in batch["state"].items()}


def nested(flat: Mapping[str, jax.Array]) -> dict[str, Any]:
    """The inverse of `arrays`: what systems/gear.py reads."""
    batch: dict[str, Any] = {"state": {}}
    for key, value in flat.items():
        group, _, name = key.rpartition("/")
        (batch[group] if group else batch)[name] = value
    return batch | {"positions": jnp.moveaxis(batch["positions"], 1, 0)}


def expected_arrays(
    cfg: GearConfig, sequence: SequenceConfig, rows: int, image_size: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of `arrays` for a batch of `rows`, for compiling without data."""
    length, count = sequence.length, sequence.transitions * sequence.codes
    chunk = cfg.expert or ActionExpertConfig()
    i32, f32, flag = jnp.int32, jnp.float32, jnp.bool_
    shapes = {
        "images": ((3, image_size, image_size, 3), jnp.uint8),
        "scenes": ((3,), i32),
        "embodiment_id": ((), i32),
        "action": ((chunk.chunk_len, chunk.action_dim), f32),
        "action_mask": ((chunk.chunk_len, chunk.action_dim), flag),
        "positions": ((3, length), i32),
        "latent_index": ((count,), i32),
        "latent_valid": ((count,), flag),
        "chunk_position": ((), i32),
        "state/ee": ((2, 9), f32),
        "state/ee_mask": ((2,), flag),
        "state/joints": ((2, 9), f32),
        "state/joint_mask": ((2, 9), flag),
        "state/arm_mask": ((2,), flag),
    }
    for name in ("tokens", "labels", "segments", "groups", "acts", "insert_index"):
        shapes[name] = ((length,), i32)
    return {
        name: jax.ShapeDtypeStruct((rows, *shape), kind) for name, (shape, kind) in shapes.items()
    }
