"""GEAR-VLA: a VLM that says latent actions, and an action expert that reads nothing else of it.

    images, text, state -> VLM -> latent tokens, FAST tokens          (cross-entropy, eq. 1)
                            |
                            +- stop_gradient(K/V of the latent tokens) -> expert -> chunk  (eq. 2)

`latent_cache` is the only producer of what the expert sees, and the only stop_gradient of this
system. A batch is that of `data/sequences.py` with images, view_mask, state, embodiment_id, action
and action_mask of the stream. Source: GEAR-VLA 3, systems.md 2.
"""

import dataclasses

import jax
import jax.numpy as jnp

from gear_jax import flow
from gear_jax.data.sequences import STATE, WRIST
from gear_jax.losses import labelled_token_loss
from gear_jax.systems import vlm
from gear_jax.systems.vlm import VlmConfig
from gear_jax.towers.action_expert import ActionExpert, ActionExpertConfig
from gear_jax.towers.qwen_language import QwenLanguage
from gear_jax.towers.state_projector import TOKENS, StateProjector, StateProjectorConfig

# Modality dropping (GEAR-VLA App. A): groups hidden from the action tokens, and how often.
DROPS = ((0, 0.4), (WRIST, 0.2), (STATE, 0.2), (WRIST | STATE, 0.2))


@dataclasses.dataclass(frozen=True)
class GearConfig:
    """The towers and what joins them.

    Attributes:
        vlm: vision, geometry, projector and language.
        state: state projectors.
        expert: action expert; depth, kv heads and head size are those of the language tower.
        latent_ids: first id of the latent range, and its length.
        latent_pattern: group of each code of a transition.
        flow_weight: of the flow loss beside the cross-entropy.
        flow_steps: Euler steps of `act`.
        most_labels: labelled tokens that a row may have: latent and FAST blocks, or an answer.
        joint_grad: let the flow loss reach the VLM (an ablation; the paper stops it).
    """

    vlm: VlmConfig
    state: StateProjectorConfig
    expert: ActionExpertConfig
    latent_ids: tuple[int, int] = (153_713, 16)
    latent_pattern: tuple[int, ...] = (0, 0, 1, 1)
    flow_weight: float = 1.0
    flow_steps: int = 10
    most_labels: int = 512
    joint_grad: bool = False

    def __post_init__(self):
        """Check that the expert can read the language tower's cache.

        Raises:
            ValueError: all that differs.
        """
        language, faults = self.vlm.language, []
        for name in ("depth", "num_kv_heads", "head_dim", "rope_theta"):
            ours, theirs = getattr(self.expert, name), getattr(language, name)
            if ours != theirs:
                faults.append(f"expert.{name} is {ours}, the language tower's is {theirs}")
        if self.state.width != language.width:
            faults.append(f"state.width is {self.state.width}, expected {language.width}")
        if faults:
            raise ValueError(f"GearConfig: {'; '.join(faults)}")


def init(cfg, rng):
    """Random parameters of all towers. Use `jax.eval_shape` for shapes alone."""
    keys = jax.random.split(rng, 3)
    expert, arms = cfg.expert, len(TOKENS) // 2
    one = jnp.zeros(1, jnp.int32)
    state = {
        "ee": jnp.zeros((1, arms, 9)),
        "ee_mask": jnp.ones((1, arms), bool),
        "joints": jnp.zeros((1, arms, 9)),
        "joint_mask": jnp.ones((1, arms, 9), bool),
    }
    noisy = jnp.zeros((1, expert.chunk_len, expert.action_dim))
    kv = jnp.zeros((expert.depth, 1, 1, expert.num_kv_heads, expert.head_dim))
    return {
        **vlm.init(cfg.vlm, keys[0]),
        "state": StateProjector(cfg.state).init(keys[1], state, one)["params"],
        "expert": ActionExpert(expert).init(keys[2], noisy, jnp.zeros(1), kv, kv, one, None, one)[
            "params"
        ],
    }


def encode(params, cfg, batch):
    """What stands in for pad tokens: embeddings of all views, then of the state, [B, I, D]."""
    views = vlm.view_embeddings(params, cfg.vlm, batch["images"], batch["view_mask"])
    tokens, _ = StateProjector(cfg.state).apply(
        {"params": params["state"]}, batch["state"], batch["embodiment_id"]
    )
    return jnp.concatenate([views, tokens.astype(views.dtype)], axis=1)


def draw_drops(rng, num, drops=DROPS):
    """Groups hidden from the action tokens of each sample, int32[num]; one draw a sample."""
    groups, odds = zip(*drops, strict=True)
    return jax.random.choice(rng, jnp.array(groups, jnp.int32), (num,), p=jnp.array(odds))


def prefill(params, cfg, batch, drops=None):
    """The VLM over whole rows.

    Args:
        params: {tower: parameters}.
        cfg: GearConfig.
        batch: see the module's first lines.
        drops: int32[B] of `draw_drops`, or None: nothing is hidden.

    Returns:
        hidden [B, T, D]; (keys, values) each [L, B, T, K, H].
    """
    inserts = encode(params, cfg, batch)
    concealed = None if drops is None else jnp.where(batch["acts"] != 0, drops[:, None], 0)
    hidden, kv, _ = vlm.forward(params, cfg.vlm, batch, inserts, hidden_groups=concealed)
    return hidden, kv


def latent_cache(kv, latent_index, *, joint_grad=False):
    """Keys and values of the latent tokens, without a way back for the gradient.

    Args:
        kv: (keys, values) each [L, B, T, K, H].
        latent_index: int32[B, M], where the latent tokens stand.
        joint_grad: leave the way back open.

    Returns:
        (keys, values) each [L, B, M, K, H].
    """
    index = latent_index[None, :, :, None, None]
    cache = jax.tree.map(lambda x: jnp.take_along_axis(x, index, axis=2), kv)
    return cache if joint_grad else jax.lax.stop_gradient(cache)


def velocity(params, cfg, cache, noisy, tau, positions, mask, embodiment_id):
    """Velocity float32[B, A, a] of a noised chunk, from the latent cache alone.

    Args:
        params: {"expert", ...}.
        cfg: GearConfig.
        cache: of `latent_cache`.
        noisy: float32[B, A, a].
        tau: float32[B], 0 = noise, 1 = data.
        positions: int32[B], position of the last latent token.
        mask: bool[B, M], latent tokens that are there.
        embodiment_id: int32[B].
    """
    return ActionExpert(cfg.expert).apply(
        {"params": params["expert"]}, noisy, tau, *cache, positions, mask, embodiment_id
    )


def loss(params, cfg, batch, rng, drops=DROPS):
    """Cross-entropy of all labelled tokens and the flow loss (eq. 1 and 2).

    Rows without latent tokens or without actions teach the expert nothing.

    Args:
        params: {tower: parameters}.
        cfg: GearConfig.
        batch: see the module's first lines.
        rng: key of the dropping, the noise and tau.
        drops: as `DROPS`; None hides nothing.

    Returns:
        the loss; {"tokens", "flow"}.
    """
    keys = jax.random.split(rng, 3)
    rows = len(batch["tokens"])
    chosen = None if drops is None else draw_drops(keys[0], rows, drops)
    hidden, kv = prefill(params, cfg, batch, chosen)
    tokens = labelled_token_loss(
        hidden, batch["labels"], lambda states: vlm.logits(params, states), most=cfg.most_labels
    )
    flow_value = flow_loss(params, cfg, batch, kv, keys[1])
    return tokens + cfg.flow_weight * flow_value, {"tokens": tokens, "flow": flow_value}


def flow_loss(params, cfg, batch, kv, rng):
    """Eq. 2 on the cache of rows that were run with their own latent tokens."""
    noise_rng, tau_rng = jax.random.split(rng)
    action = batch["action"].astype(jnp.float32)
    noise = jax.random.normal(noise_rng, action.shape)
    tau = flow.sample_tau(tau_rng, action.shape[:1])
    cache = latent_cache(kv, batch["latent_index"], joint_grad=cfg.joint_grad)
    made = velocity(
        params, cfg, cache, flow.noised(action, noise, tau), tau, last_position(batch),
        batch["latent_valid"], batch["embodiment_id"],
    )  # fmt: skip
    there = batch["latent_valid"].any(axis=1)[:, None, None]
    return flow.flow_loss(made, flow.target(action, noise), batch["action_mask"] & there)


def last_position(batch):
    """Position int32[B] of the last latent token."""
    return jnp.take_along_axis(batch["positions"][0], batch["latent_index"][:, -1:], axis=1)[:, 0]


def say_latents(params, cfg, batch, hidden, kv):
    """The latent tokens, said greedily, each among the ids that its place may take.

    Args:
        params: {tower: parameters}.
        cfg: GearConfig.
        batch: rows that end with the token that opens the latent block; with `latent_index`, of
            which only the number of tokens counts.
        hidden: [B, T, D] of `prefill`.
        kv: its keys and values.

    Returns:
        ids int32[B, M], from 0; cache as `latent_cache` gives; position int32[B] of the last.
    """
    rows, length = batch["tokens"].shape
    count, (first, size) = batch["latent_index"].shape[1], cfg.latent_ids
    valid = batch["segments"] > 0
    last = length - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    here = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
    begin = jnp.take_along_axis(batch["positions"][0], last[:, None], axis=1)[:, 0]
    tower, language = QwenLanguage(cfg.vlm.language), params["language"]
    head = {"embed": language.get("head", language["embed"])[first : first + size]}
    groups = jnp.tile(jnp.array(cfg.latent_pattern), count // len(cfg.latent_pattern))
    owner = jnp.arange(size) // (size // (max(cfg.latent_pattern) + 1))
    memory = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, count), (0, 0), (0, 0))), kv)
    # tokens that are alone with themselves are no memory of those that follow
    seen = jnp.pad(
        jnp.where(batch["segments"] == 1, 1, -1), ((0, 0), (0, count)), constant_values=-1
    )
    one = jnp.ones((rows, 1), jnp.int32)

    def step(carry, place):
        here, memory, seen = carry
        scores = vlm.logits({"language": head}, here)[:, 0]
        legal = owner == groups[place]
        ids = jnp.argmax(jnp.where(legal[None], scores, -jnp.inf), axis=-1).astype(jnp.int32)
        at = jnp.broadcast_to((begin + 1 + place)[None, :, None], (3, rows, 1))
        here, new, _ = tower.apply(
            {"params": language}, first + ids[:, None], at, one, memory=memory,
            memory_segments=seen,
        )  # fmt: skip
        slot = length + place
        memory = jax.tree.map(
            lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, slot, 2), memory, new
        )
        seen = jax.lax.dynamic_update_slice_in_dim(seen, one, slot, 1)
        return (here, memory, seen), ids

    (_, memory, _), ids = jax.lax.scan(step, (here, memory, seen), jnp.arange(count))
    index = jnp.broadcast_to(length + jnp.arange(count)[None], (rows, count))
    return ids.T, latent_cache(memory, index), begin + count


def act(params, cfg, batch, rng):
    """A normalised chunk, from images, instruction and state alone.

    Args:
        params: {tower: parameters}.
        cfg: GearConfig.
        batch: rows of `token_rows` with `prompt_only`.
        rng: key of the noise.

    Returns:
        chunk float32[B, A, a]; latent ids int32[B, M].
    """
    hidden, kv = prefill(params, cfg, batch)
    ids, cache, position = say_latents(params, cfg, batch, hidden, kv)
    expert = cfg.expert
    noise = jax.random.normal(rng, (len(ids), expert.chunk_len, expert.action_dim))

    def field(noisy, tau):
        return velocity(params, cfg, cache, noisy, tau, position, None, batch["embodiment_id"])

    return flow.integrate(field, noise, cfg.flow_steps), ids
