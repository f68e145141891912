"""Which off-screen renderer MuJoCo uses: the first that draws on this machine.

MuJoCo reads MUJOCO_GL once, when it is imported first; where something else did that before the
choice, it is made to read it again.
"""

import importlib
import os
import subprocess
import sys

BACKENDS = ("egl", "osmesa")
_READERS = ("mujoco.rendering.classic.gl_context", "mujoco.gl_context")  # of MuJoCo 4, of MuJoCo 3
_TRIAL = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='1'/></worldbody></mujoco>")
with mujoco.Renderer(model, 8, 8) as renderer:
    renderer.update_scene(mujoco.MjData(model))
    renderer.render()
"""


def choose_backend() -> str:
    """Set MUJOCO_GL, unless it is set, to what draws here; returns it.

    Raises:
        RuntimeError: nothing draws.
    """
    if os.environ.get("MUJOCO_GL"):
        return os.environ["MUJOCO_GL"]
    said = {}
    for backend in BACKENDS:
        environment = {**os.environ, "MUJOCO_GL": backend}
        environment.pop("PYOPENGL_PLATFORM", None)
        tried = subprocess.run(
            [sys.executable, "-c", _TRIAL], env=environment, capture_output=True, text=True
        )
        if tried.returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            for name in _READERS:
                if name in sys.modules:
                    importlib.reload(sys.modules[name])
            return backend
        said[backend] = (tried.stderr.strip().splitlines() or ["no message"])[-1]
    raise RuntimeError(
        f"MuJoCo draws with none of {BACKENDS} ({said}): install libegl1 and libgl1-mesa-dri, or "
        "libosmesa6"
    )
