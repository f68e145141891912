"""Low-rank adaptation (Hu et al. 2021): big kernels stay, small factors beside them are trained.

    params -> params | {"lora": {kernel's path: {a, b}}}         (init)
    params with factors -> params whose kernels are W + alpha/r a b   (merge)

Towers never know: they get merged parameters. b is zero at the start, so nothing changes there.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

_INPUT_AXES = ((r".*/layers/(o|proj)/kernel", 2), (r".*", 1))  # behind the axis of layers


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What gets factors.

    Attributes:
        rank: r.
        alpha: the product is scaled by alpha / r.
        targets: regexes of kernels with a leading axis of layers.
    """

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = (r"language/layers/(q|k|v|o|gate|up|down)/kernel",)


def init(params: Any, cfg: LoraConfig, rng: jax.Array) -> dict[str, Any]:
    """Factors {path: {"a": [L, in, r], "b": [L, r, out]}} of all targets, b zero.

    Raises:
        ValueError: a target that matches no parameter.
    """
    named = _named(params)
    made = {}
    for pattern in cfg.targets:
        found = [name for name in named if re.fullmatch(pattern, name)]
        if not found:
            raise ValueError(f"lora.targets: {pattern!r} matches no parameter")
        for name in found:
            layers, inputs, outputs = _sizes(name, named[name].shape)
            key = jax.random.fold_in(rng, len(made))
            a = jax.random.normal(key, (layers, inputs, cfg.rank)) / math.sqrt(inputs)
            made[name.replace("/", ".")] = {"a": a, "b": jnp.zeros((layers, cfg.rank, outputs))}
    return made


def merge(params: Any, cfg: LoraConfig | None) -> Any:
    """The parameters that the towers read, without the factors."""
    if cfg is None:
        return params
    factors = params["lora"]

    def one(path, kernel):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if name not in factors:
            return kernel
        product = jnp.einsum("lir,lro->lio", factors[name]["a"], factors[name]["b"])
        return kernel + (cfg.alpha / cfg.rank * product).reshape(kernel.shape).astype(kernel.dtype)

    towers = {tower: tree for tower, tree in params.items() if tower != "lora"}
    return jax.tree_util.tree_map_with_path(one, towers)


def _sizes(name, shape):
    axes = next(axes for pattern, axes in _INPUT_AXES if re.fullmatch(pattern, name))
    return shape[0], math.prod(shape[1 : 1 + axes]), math.prod(shape[1 + axes :])


def _named(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
