"""The splash backend compiled for a TPU slice that is not there (needs libtpu, extra `tpu`)."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from gear_jax.towers.qwen_language import QwenLanguage, QwenLanguageConfig
from gear_jax.train import sharding

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4").devices
mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 2}, devices)
cfg = QwenLanguageConfig(depth=3, width=512, num_heads=8, num_kv_heads=2, mlp_dim=1024,
                         vocab_size=4096, attention="splash", remat="attention", dtype=jnp.bfloat16)
tower = QwenLanguage(cfg)
one = jnp.zeros((1, 1), jnp.int32)
three = jnp.zeros((3, 1, 1), jnp.int32)
shapes = jax.eval_shape(lambda: tower.init(jax.random.key(0), one, three, one))
shardings = sharding.param_shardings({"language": shapes["params"]}, mesh)["language"]
params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                      shapes["params"], shardings)
rows = sharding.batch_sharding(mesh)
ids = jax.ShapeDtypeStruct((16, 1000), jnp.int32, sharding=rows)
places = jax.ShapeDtypeStruct((3, 16, 1000), jnp.int32,
                              sharding=NamedSharding(mesh, P(None, sharding.BATCH_AXES)))

def loss(params, tokens, positions, segments):
    return jnp.mean(tower.apply({"params": params}, tokens, positions, segments)[0] ** 2)

with jax.set_mesh(mesh):
    compiled = jax.jit(jax.value_and_grad(loss)).lower(params, ids, places, ids).compile()
print(compiled.as_text().count("tpu_custom_call"))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_forward_and_backward_compile_for_a_v5e_slice_as_kernels():
    run = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=pathlib.Path(__file__).parents[2],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert int(run.stdout) >= 3  # forward, and the two backward kernels
