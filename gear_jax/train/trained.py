"""The parameters of a finished or running training run: for policies, and to publish them.

workdir -> config.json, the newest whole checkpoint -> config, model, params
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections

from gear_jax.data.tfrecord import DataError
from gear_jax.train import sharding
from gear_jax.train.gear import GearModel
from gear_jax.train.run_checkpoints import NoCheckpointError, RunCheckpoints


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run has learned so far.

    Attributes:
        params: {tower: parameters}, on the mesh; LoRA's are not merged.
        key: "ema" where the run averages its parameters, else "params".
        step: of the checkpoint.
        digest: of its files.
        meta: what the checkpoint says of data and config.
    """

    params: Any
    key: str
    step: int
    digest: str
    meta: Mapping[str, Any]


def read_config(workdir: str | pathlib.Path) -> ml_collections.ConfigDict:
    """The config of a run.

    Raises:
        DataError: no such file.
    """
    return ml_collections.ConfigDict(json.loads(read_text(pathlib.Path(workdir) / "config.json")))


def read_text(path: pathlib.Path) -> str:
    """A file of a run.

    Raises:
        DataError: no such file.
    """
    try:
        return path.read_text()
    except OSError as error:
        raise DataError(f"{path}: no such file: expected the folder of a trained run") from error


def load(
    workdir: str | pathlib.Path,
    config: ml_collections.ConfigDict,
    model: GearModel,
    mesh: jax.sharding.Mesh,
) -> Trained:
    """The newest whole checkpoint, without the optimiser.

    Args:
        workdir: of a run of stage pretrain, policy or adapt.
        config: of `read_config`.
        model: `gear.make_model(config)`.
        mesh: where the parameters go.

    Raises:
        DataError: no checkpoint can be used.
    """
    shapes, wheres = _placed(model, mesh)
    key = "params" if config.ema_decay is None else "ema"
    targets = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, wheres
    )
    checkpoints = RunCheckpoints(pathlib.Path(workdir) / "checkpoints", read_only=True)
    try:
        restored = checkpoints.restore_part({key: targets})
    except NoCheckpointError as error:
        raise DataError(str(error)) from error
    finally:
        checkpoints.close()
    return Trained(restored.state[key], key, restored.step, restored.digest, restored.meta)


def untrained(model: GearModel, mesh: jax.sharding.Mesh, seed: int = 0) -> Any:
    """Random parameters of a run's model, on the mesh: what learning must beat."""
    _, wheres = _placed(model, mesh)
    make = jax.jit(lambda key: model.init(key)[0], out_shardings=wheres)
    return make(jax.random.key(seed))


def _placed(model, mesh):
    """Shapes of the parameters, and their shardings."""
    shapes, _ = jax.eval_shape(model.init, jax.random.key(0))
    return shapes, sharding.param_shardings(shapes, mesh)
