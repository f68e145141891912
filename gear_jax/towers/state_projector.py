"""The bank of state projectors: a robot's proprioception -> four embeddings for the LM.

One small MLP for each embodiment, all in one parameter tree with a leading axis E of slots; a row
of the batch goes through its own robot's slot. A robot that was never seen gets a new slot, the
mean of the others. Source: GEAR-VLA's embodiment canonicalisation, systems.md 2.8; the bank is
X-VLA's domain-aware linear map.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

TOKENS = ("left_ee", "left_joints", "right_ee", "right_joints")


@dataclasses.dataclass(frozen=True)
class StateProjectorConfig:
    """Sizes of the bank; the defaults are those of GEAR-VLA with Qwen2.5-VL-7B.

    Attributes:
        num_embodiments: E, slots of the bank (data/embodiments.py).
        hidden_dim: of the MLP.
        width: D of the language tower.
        shared: one slot for all robots, the paper's comparison without canonicalisation.
        dtype: of the second map and of the embeddings; the first works in float32, for bfloat16 is
            coarser than a robot's joints.
        param_dtype: of the parameters.
    """

    num_embodiments: int
    hidden_dim: int = 512
    width: int = 3584
    shared: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def __post_init__(self):
        """Check the bank.

        Raises:
            ValueError: no slot.
        """
        if self.num_embodiments < 1:
            raise ValueError(
                f"StateProjectorConfig: num_embodiments is {self.num_embodiments}, "
                "expected at least 1"
            )


class EmbodimentDense(nn.Module):
    """A linear map for each embodiment; they start equal, so that they stay averageable.

    A row's input is laid into the block of its slot and zeros into the others, and all blocks meet
    the stacked kernel in one matrix product. Picking kernels instead would copy one for each row,
    29 MB in float32 for the state projector's second map; here nothing grows with rows times
    kernel, and the product is sharded like any other.
    """

    num_embodiments: int
    features: int
    kernel_init: Callable = nn.initializers.lecun_normal()
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, embodiment_id):
        """Rows through their own maps.

        Args:
            x: [B, ..., D].
            embodiment_id: int32[B], 0 .. E-1. NaN comes out of a row whose id has no slot.

        Returns:
            [B, ..., features].
        """
        slots = self.num_embodiments

        def stacked(rng, shape, dtype):
            return jnp.broadcast_to(self.kernel_init(rng, shape[1:], dtype)[None], shape)

        shape = (slots, x.shape[-1], self.features)
        kernel = self.param("kernel", stacked, shape, self.param_dtype).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, shape[::2], self.param_dtype)
        known = (embodiment_id >= 0) & (embodiment_id < slots)
        chosen = jax.nn.one_hot(embodiment_id, slots, dtype=self.dtype)
        chosen = jnp.where(known[:, None], chosen, jnp.nan)
        blocks = jnp.einsum("b...d,be->b...ed", x.astype(self.dtype), chosen)
        y = jnp.einsum("b...ed,edf->b...f", blocks, kernel, precision="highest")
        bias = jnp.einsum("be,ef->bf", chosen, bias.astype(self.dtype), precision="highest")
        return y + bias.reshape(len(x), *(1,) * (x.ndim - 2), self.features)


class StateProjector(nn.Module):
    """The tower: all of a robot's numbers -> linear, GELU, linear -> one embedding per `TOKENS`."""

    cfg: StateProjectorConfig

    @nn.compact
    def __call__(self, state, embodiment_id):
        """Embeddings of the robot's state, and which of them say something.

        Args:
            state: `types.NormalizedState` with a leading batch axis: ee float32[B, R, 9] and
                joints float32[B, R, J + 1], about -1 .. 1, with ee_mask bool[B, R] and joint_mask
                bool[B, R, J + 1]. What a mask hides has no influence.
            embodiment_id: int32[B], slot of each row; NaN comes out where there is no such slot.

        Returns:
            tokens [B, 4, D], end effector and joints of each arm in turn (`TOKENS`), zero where
            hidden; their mask bool[B, 4]: an end effector's is `ee_mask`, the joints' is whether
            any joint or the gripper is known.
        """
        c = self.cfg
        slots = 1 if c.shared else c.num_embodiments
        if c.shared:
            embodiment_id = jnp.zeros_like(embodiment_id)
        ee = jnp.where(state["ee_mask"][..., None], state["ee"], 0.0)
        joints = jnp.where(state["joint_mask"], state["joints"], 0.0)
        x = rearrange(jnp.concatenate([ee, joints], axis=-1), "b r d -> b (r d)")
        mask = jnp.stack([state["ee_mask"], jnp.any(state["joint_mask"], axis=-1)], axis=-1)
        mask = rearrange(mask, "b r s -> b (r s)")

        fc1 = EmbodimentDense(slots, c.hidden_dim, param_dtype=c.param_dtype, name="fc1")
        fc2 = EmbodimentDense(
            slots, len(TOKENS) * c.width, dtype=c.dtype, param_dtype=c.param_dtype, name="fc2"
        )
        y = fc2(nn.gelu(fc1(x, embodiment_id)), embodiment_id)
        tokens = rearrange(y, "b (s d) -> b s d", s=len(TOKENS))
        return jnp.where(mask[..., None], tokens, 0), mask


def with_new_slot(params, num=1, trained=None):
    """A bank with slots for new robots, each the mean of existing ones (systems.md 2.8).

    Args:
        params: a bank's parameters, every leaf [E, ...].
        num: how many slots to append.
        trained: slots to average, for a slot that no robot ever used would dilute the mean; by
            default all.

    Returns:
        The same tree, every leaf [E + num, ...]; the first E slots are as they were.

    Raises:
        ValueError: leaves of different E, `num` below one, or `trained` names no or unknown slots.
    """
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(params)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(f"not a bank: its leaves have {sorted(sizes)} slots, expected one number")
    ((slots,),) = sizes
    trained = list(range(slots)) if trained is None else list(trained)
    if num < 1:
        raise ValueError(f"num is {num}: expected at least 1")
    if not trained or not set(trained) <= set(range(slots)):
        raise ValueError(f"trained is {trained}: expected some of the slots 0 .. {slots - 1}")

    def grown(leaf):
        mean = jnp.mean(leaf[jnp.asarray(trained)].astype(jnp.float32), axis=0, keepdims=True)
        return jnp.concatenate([leaf, *[mean.astype(leaf.dtype)] * num])

    return jax.tree.map(grown, params)
