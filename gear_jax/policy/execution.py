"""An action chunk -> the targets of a controller's own rate."""

import numpy as np

from gear_jax import geometry
from gear_jax.data.windows import target_poses
from gear_jax.types import ActionSpec, State


def targets(action, state: State, spec: ActionSpec, *, rate_hz: float, num_steps: int):
    """Targets of the next control steps, a list of {arm: (T_base_ee float64[4, 4], opening)}.

    Args:
        action: float[A, a], in the units of `spec`, as the policy answered.
        state: at the time it was asked; only arms that are there get targets.
        spec: the layout.
        rate_hz: control steps per second.
        num_steps: how many; step k is wanted k / rate_hz seconds after the state, k = 1, 2, ...

    Raises:
        ValueError: more steps than the chunk reaches.
    """
    reach = spec.chunk_len / spec.rate_hz
    if num_steps < 1 or num_steps / rate_hz > reach + 1e-6:
        raise ValueError(
            f"{num_steps} control steps at {rate_hz} Hz: expected 1 .. "
            f"{int(reach * rate_hz + 1e-6)}, the chunk reaches {reach:g} s"
        )
    poses, grippers = target_poses(np.asarray(action, np.float64), state["ee_pose"], spec)
    out: list[dict[str, tuple[np.ndarray, float]]] = [{} for _ in range(num_steps)]
    for arm, name in enumerate(spec.arms):
        if not state["arm_mask"][arm]:
            continue
        way = np.concatenate([state["ee_pose"][arm][None].astype(np.float64), poses[arm]])
        opening = np.concatenate([grippers[arm][:1], grippers[arm]])
        for step, target in enumerate(out, 1):
            time = min(step * spec.rate_hz / rate_hz, spec.chunk_len)
            before = min(int(time), spec.chunk_len - 1)
            pose = geometry.interpolate_pose(way[before], way[before + 1], time - before)
            # a gripper is told what the nearest row says: half open is no command
            target[name] = pose, float(opening[round(time)])
    return out
