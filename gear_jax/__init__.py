"""gear_jax: GEAR-VLA in JAX."""

__version__ = "0.1.0"
