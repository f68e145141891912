"""Eight simulated devices for every test, strict shapes, and the reference data if it is there."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join((
    # compiling is most of the time that the tests take, and level 0 compiles in a third of it
    "--xla_backend_optimization_level=0",
    # else collectives of a train step on more devices than cores wait for each other for ever
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    "--xla_force_host_platform_device_count=8",
    os.environ.get("XLA_FLAGS", ""),
)).strip()  # fmt: skip

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

SHARED = pathlib.Path(__file__).parents[2] / "shared"


def _shared(folder):
    if not (SHARED / folder).is_dir():
        pytest.skip(f"the reference data ../shared/{folder} is not beside this checkout")
    return SHARED / folder


@pytest.fixture(scope="session")
def golden():
    """Inputs and outputs of the reference models."""
    return _shared("golden")


@pytest.fixture(scope="session")
def samples():
    """Small cuts of public robot data."""
    return _shared("samples")
