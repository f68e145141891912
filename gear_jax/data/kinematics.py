"""End-effector poses of robots that record joints only: forward kinematics by MuJoCo.

The user gives the robot's URDF or MJCF; meshes are not needed, since only the chain of joints is
used.
"""

import dataclasses
import functools
import importlib
import pathlib
from typing import Any

import numpy as np

from gear_jax.data.tfrecord import DataError


@dataclasses.dataclass(frozen=True)
class Kinematics:
    """One arm's chain in a robot description.

    Attributes:
        model: path of a URDF or MJCF file.
        base: body whose frame the poses are in.
        tip: body, or site, whose poses they are.
        joints: names in the order of the recorded numbers; hinges in radians, slides in metres.
    """

    model: str
    base: str
    tip: str
    joints: tuple[str, ...]

    def poses(self, joint_pos: np.ndarray) -> np.ndarray:
        """T_base_tip, float64[E, 4, 4], of joints float[E, n].

        Raises:
            DataError: unreadable model, or names that it does not have, or another n.
        """
        mujoco: Any = _import_mujoco()
        model = _load(self.model)
        base = self._find(model, mujoco.mjtObj.mjOBJ_BODY, self.base)
        site = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_SITE, self.tip)
        tip = site if site >= 0 else self._find(model, mujoco.mjtObj.mjOBJ_BODY, self.tip)
        places = [
            model.jnt_qposadr[self._find(model, mujoco.mjtObj.mjOBJ_JOINT, name)]
            for name in self.joints
        ]
        if joint_pos.ndim != 2 or joint_pos.shape[1] != len(places):
            raise DataError(
                f"{self.model}: {list(joint_pos.shape)} joint positions, expected {len(places)}"
                f" for {list(self.joints)}"
            )
        data = mujoco.MjData(model)
        poses = np.tile(np.eye(4), (len(joint_pos), 1, 1))
        for step, joints in enumerate(joint_pos):
            data.qpos[places] = joints
            mujoco.mj_kinematics(model, data)
            R_base, p_base = data.xmat[base].reshape(3, 3), data.xpos[base]
            R, p = (
                (data.site_xmat[tip], data.site_xpos[tip])
                if site >= 0
                else (data.xmat[tip], data.xpos[tip])
            )
            poses[step, :3, :3] = R_base.T @ R.reshape(3, 3)
            poses[step, :3, 3] = R_base.T @ (p - p_base)
        return poses

    def _find(self, model: Any, kind: Any, name: str) -> int:
        mujoco: Any = _import_mujoco()
        number = mujoco.mj_name2id(model, kind, name)
        if number < 0:
            count = {
                mujoco.mjtObj.mjOBJ_BODY: model.nbody,
                mujoco.mjtObj.mjOBJ_JOINT: model.njnt,
            }[kind]
            names = [mujoco.mj_id2name(model, kind, i) for i in range(count)]
            raise DataError(f"{self.model}: has no {name!r}: expected one of {names}")
        return number


def _import_mujoco() -> Any:
    try:
        return importlib.import_module("mujoco")
    except ImportError as error:
        raise DataError("forward kinematics needs MuJoCo: pip install mujoco") from error


@functools.lru_cache(maxsize=8)
def _load(path: str) -> Any:
    """The bare chain: geometry, meshes and what hangs on them are thrown away."""
    mujoco: Any = _import_mujoco()
    if not pathlib.Path(path).is_file():
        raise DataError(f"{path}: no such robot description")
    try:
        spec = mujoco.MjSpec.from_file(path)
        spec.compiler.discardvisual = False
        spec.compiler.fusestatic = False  # keep every link: any may be the base or the tip
        spec.compiler.boundmass = spec.compiler.boundinertia = 1e-6
        for kind in (spec.geoms, spec.meshes, spec.materials, spec.textures):
            for element in list(kind):
                spec.delete(element)
        return spec.compile()
    except (ValueError, RuntimeError) as error:
        raise DataError(f"{path}: not a usable URDF or MJCF: {error}") from error
