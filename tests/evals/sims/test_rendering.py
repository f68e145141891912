import os
import subprocess
import sys

DRAWN = """
import mujoco  # as forward kinematics do, before anything is to be drawn
from gear_jax.evals.sims.rendering import choose_backend
assert choose_backend() in ("egl", "osmesa")
model = mujoco.MjModel.from_xml_string(
    "<mujoco><worldbody><light pos='0 0 3'/><geom size='1'/></worldbody></mujoco>"
)
with mujoco.Renderer(model, 16, 16) as renderer:
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    renderer.update_scene(data)
    print(renderer.render().max() > 0)
"""


def test_a_renderer_is_chosen_though_mujoco_was_imported_before():
    environment = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(
        [sys.executable, "-c", DRAWN], env=environment, capture_output=True, text=True
    )
    assert ran.stdout.strip() == "True", ran.stderr
