"""GEAR-VLA: a VLM that says latent actions, and an action expert that reads nothing else of it.

    images, text, state -> VLM -> latent tokens, FAST tokens          (cross-entropy, eq. 1)
                            |
                            +- stop_gradient(K/V of the latent tokens) -> expert -> chunk  (eq. 2)

`latent_cache` is the only producer of what the expert sees, and the only stop_gradient of this
system. A batch is that of `data/sequences.py` with images, state, embodiment_id, action and
action_mask of the stream; for a mask-guided policy also ref_image. Source: GEAR-VLA 3, systems.md
2.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from gear_jax import flow
from gear_jax.data.sequences import (
    ANSWER_BLOCK,
    FAST_BLOCK,
    HEAD,
    IGNORE,
    LATENT,
    LATENT_BLOCK,
    OTHER,
    PROMPT,
    STATE,
    WRIST,
)
from gear_jax.losses import labelled_token_loss
from gear_jax.systems import vlm
from gear_jax.systems.vlm import VlmConfig
from gear_jax.towers.action_expert import ActionExpert, ActionExpertConfig
from gear_jax.towers.qwen_language import QwenLanguage
from gear_jax.towers.state_projector import TOKENS, StateProjector, StateProjectorConfig

# Modality dropping (GEAR-VLA App. A): groups hidden from the action tokens, and how often.
DROPS = {
    "mixed": ((0, 0.4), (WRIST, 0.2), (STATE, 0.2), (WRIST | STATE, 0.2)),
    "wrist": ((0, 0.6), (WRIST, 0.4)),
    "state": ((0, 0.6), (STATE, 0.4)),
    "none": ((0, 1.0),),
}
LATENTS = ("codes", "learned", "none")
SOURCES = ("latent", "image", "state", "text")
FAST_SEES = ("all", "latents")
LOSSES = ("text", "latent", "fast")  # in the order of the blocks: 0, LATENT_BLOCK, FAST_BLOCK


@dataclasses.dataclass(frozen=True)
class GearConfig:
    """The towers and what joins them.

    Attributes:
        vlm: vision, geometry, projector and language.
        state: state projectors.
        expert: action expert; depth, kv heads and head size are those of the language tower. None:
            the VLM alone, as in pretraining.
        latents: "codes" that the VLM says; "learned" embeddings in their places, or "none": both
            are ablations (systems.md 2.12).
        num_latents: M, of a row.
        latent_ids: first id of the latent range, and its length.
        latent_pattern: group of each code of a transition.
        vocab_used: rows of the vocabulary that are tokens; later ones are never said.
        prompt_tokens: learned embeddings of each robot, behind the instruction (an ablation).
        kv_sources: whose keys and values the expert sees; more than the latent tokens' is an
            ablation.
        drops: key of `DROPS`.
        scrambled: share of a step's rows that read random codes and words in the place of their
            answer, and learn the true ones. What they say then comes from what is seen, not from
            what was just said: a policy says its codes itself. Ours; 0 is the paper's.
        fast_sees: "latents": FAST tokens see the latent tokens and each other, not the prompt. What
            the expert needs of the scene must then be in the keys and values that it reads, however
            little of it the codes tell. Ours; "all" is the paper's.
        flow_weight: of the flow loss beside the cross-entropy.
        flow_draws: noises of each chunk in a train step. The VLM runs once for all of them, and the
            expert is small beside it (CogACT trains with 8).
        flow_steps: Euler steps of `act`.
        most_labels: labelled tokens that a row may have: latent and FAST blocks, or an answer.
        joint_grad: let the flow loss reach the VLM (an ablation; the paper stops it).
    """

    vlm: VlmConfig
    state: StateProjectorConfig
    expert: ActionExpertConfig | None
    latents: str = "codes"
    num_latents: int = 20
    latent_ids: tuple[int, int] = (153_713, 16)
    latent_pattern: tuple[int, ...] = (0, 0, 1, 1)
    vocab_used: int | None = None
    prompt_tokens: int = 0
    kv_sources: tuple[str, ...] = ("latent",)
    drops: str = "mixed"
    scrambled: float = 0.0
    fast_sees: str = "all"
    flow_weight: float = 1.0
    flow_draws: int = 1
    flow_steps: int = 10
    most_labels: int = 512
    joint_grad: bool = False

    def __post_init__(self):
        """Check the choices, and that the expert can read the language tower's cache.

        Raises:
            ValueError: all faults in one sentence.
        """
        language, faults = self.vlm.language, []
        for name in ("depth", "num_kv_heads", "head_dim", "rope_theta") if self.expert else ():
            ours, theirs = getattr(self.expert, name), getattr(language, name)
            if ours != theirs:
                faults.append(f"expert.{name} is {ours}, the language tower's is {theirs}")
        if self.state.width != language.width:
            faults.append(f"state.width is {self.state.width}, expected {language.width}")
        if self.latents not in LATENTS:
            faults.append(f"latents is {self.latents!r}, expected one of {LATENTS}")
        if self.drops not in DROPS:
            faults.append(f"drops is {self.drops!r}, expected one of {tuple(DROPS)}")
        if self.fast_sees not in FAST_SEES:
            faults.append(f"fast_sees is {self.fast_sees!r}, expected one of {FAST_SEES}")
        if not self.kv_sources or not set(self.kv_sources) <= set(SOURCES):
            faults.append(f"kv_sources is {self.kv_sources}, expected some of {SOURCES}")
        if self.kv_sources == ("latent",) and self.latents == "none":
            faults.append(
                "kv_sources is ('latent',) and latents is 'none': the expert sees nothing"
            )
        if faults:
            raise ValueError(f"GearConfig: {'; '.join(faults)}")


def init(cfg, rng):
    """Random parameters of all towers. Use `jax.eval_shape` for shapes alone."""
    keys = jax.random.split(rng, 5)
    arms, width = len(TOKENS) // 2, cfg.vlm.language.width
    one = jnp.zeros(1, jnp.int32)
    state = {
        "ee": jnp.zeros((1, arms, 9)),
        "ee_mask": jnp.ones((1, arms), bool),
        "joints": jnp.zeros((1, arms, 9)),
        "joint_mask": jnp.ones((1, arms, 9), bool),
    }
    made = {
        **vlm.init(cfg.vlm, keys[0]),
        "state": StateProjector(cfg.state).init(keys[1], state, one)["params"],
    }
    if cfg.expert is not None:
        expert = cfg.expert
        noisy = jnp.zeros((1, expert.chunk_len, expert.action_dim))
        kv = jnp.zeros((expert.depth, 1, 1, expert.num_kv_heads, expert.head_dim))
        tower = ActionExpert(expert)
        made["expert"] = tower.init(keys[2], noisy, jnp.zeros(1), kv, kv, one, None, one)["params"]
    learned = {}
    if cfg.latents == "learned":
        learned["latents"] = jax.random.normal(keys[3], (cfg.num_latents, width))
    if cfg.prompt_tokens:
        shape = (cfg.state.num_embodiments, cfg.prompt_tokens, width)
        learned["prompts"] = jax.random.normal(keys[4], shape)
    if learned:
        made["learned"] = jax.tree.map(lambda x: 0.02 * x, learned)
    return made


def encode(params, cfg, batch):
    """What stands in for pad tokens, [B, I, D], in the order of `token_rows`' insert_index."""
    views = vlm.view_embeddings(params, cfg.vlm, batch["images"], batch["scenes"])
    tokens, _ = StateProjector(cfg.state).apply(
        {"params": params["state"]}, batch["state"], batch["embodiment_id"]
    )
    rows, width = len(tokens), tokens.shape[-1]
    parts = [views, tokens]
    if cfg.latents == "learned":
        parts.append(jnp.broadcast_to(params["learned"]["latents"], (rows, cfg.num_latents, width)))
    elif cfg.prompt_tokens or "ref_image" in batch:
        parts.append(jnp.zeros((rows, cfg.num_latents, width)))
    if cfg.prompt_tokens:
        parts.append(params["learned"]["prompts"][batch["embodiment_id"]])
    if "ref_image" in batch:  # drawn over: no 3D features (systems.md 2.7)
        flat = dataclasses.replace(cfg.vlm, geometry=None)
        parts.append(vlm.view_embeddings(params, flat, batch["ref_image"][:, None]))
    return jnp.concatenate([part.astype(views.dtype) for part in parts], axis=1)


def logits(params, cfg, hidden):
    """float32[B, T, V] over the vocabulary; rows of the table that are no tokens are never said."""
    scores = vlm.logits(params, hidden)
    if cfg.vocab_used is None:
        return scores
    return jnp.where(jnp.arange(scores.shape[-1]) < cfg.vocab_used, scores, -jnp.inf)


def draw_drops(rng, num, drops="mixed"):
    """Groups hidden from the action tokens of each sample, int32[num]; one draw a sample."""
    groups, odds = zip(*DROPS[drops], strict=True)
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
    concealed = None
    if drops is not None:
        # an expert that sees views and state itself has them dropped there (App. A, literally)
        least = LATENT_BLOCK if cfg.kv_sources == ("latent",) else FAST_BLOCK
        concealed = jnp.where(batch["acts"] >= least, drops[:, None], 0)
    if cfg.fast_sees == "latents":
        batch, concealed = _behind_latents(batch, 0 if concealed is None else concealed)
    hidden, kv, _ = vlm.forward(params, cfg.vlm, batch, inserts, hidden_groups=concealed)
    return hidden, kv


def _behind_latents(batch, concealed):
    """Hide the prompt from the FAST tokens of rows that have latent tokens."""
    prompt = jnp.where(batch["acts"] == 0, PROMPT, 0)
    fast = (batch["acts"] >= FAST_BLOCK) & batch["latent_valid"].any(axis=1)[:, None]
    batch = {**batch, "groups": batch["groups"] | prompt}
    return batch, concealed | jnp.where(fast, PROMPT, 0)


def latent_cache(cfg, kv, batch, drops=None):
    """What the expert sees of the VLM, without a way back for the gradient.

    Args:
        cfg: GearConfig.
        kv: (keys, values) each [L, B, T, K, H].
        batch: with latent_index and latent_valid; for other `kv_sources` than the latent tokens
            also groups, acts and segments.
        drops: int32[B] of `draw_drops`; concerns other sources only.

    Returns:
        (keys, values) each [L, B, M, K, H]; mask bool[B, M]. M is the number of latent tokens, or T
        with other sources.
    """
    if cfg.kv_sources == ("latent",):
        index = batch["latent_index"][None, :, :, None, None]
        cache = jax.tree.map(lambda x: jnp.take_along_axis(x, index, axis=2), kv)
        mask = batch["latent_valid"]
    else:
        cache, groups = kv, batch["groups"]
        wanted = {
            "latent": groups == LATENT,
            "image": (groups == HEAD) | (groups == WRIST),
            "state": groups == STATE,
            "text": (groups == OTHER) & (batch["acts"] == 0),
        }
        mask = batch["segments"] == 1
        mask &= functools.reduce(jnp.logical_or, [wanted[name] for name in cfg.kv_sources])
        if drops is not None:
            mask &= (groups & drops[:, None]) == 0
    return (cache if cfg.joint_grad else jax.lax.stop_gradient(cache)), mask


def velocity(params, cfg, cache, noisy, tau, positions, mask, embodiment_id):
    """Velocity float32[B, A, a] of a noised chunk, from the latent cache alone.

    Args:
        params: {"expert", ...}.
        cfg: GearConfig.
        cache: of `latent_cache`.
        noisy: float32[B, A, a].
        tau: float32[B], 0 = noise, 1 = data.
        positions: int32[B], `chunk_position` of the rows.
        mask: bool[B, M], of `latent_cache`.
        embodiment_id: int32[B].
    """
    return ActionExpert(cfg.expert).apply(
        {"params": params["expert"]}, noisy, tau, *cache, positions, mask, embodiment_id
    )


def loss(params, cfg, batch, rng):
    """Cross-entropy of all labelled tokens and the flow loss (eq. 1 and 2).

    Rows without latent tokens or without actions teach the expert nothing.

    Args:
        params: {tower: parameters}.
        cfg: GearConfig; without an expert there is no flow loss.
        batch: see the module's first lines.
        rng: key of the dropping, the noise and tau.

    Returns:
        the loss; metrics {"tokens", "text", "latent", "fast", "flow"}, the middle three being
        means of their kind.
    """
    keys = jax.random.split(rng, 2)
    if cfg.scrambled:
        batch = {**batch, "tokens": scramble(cfg, batch, jax.random.fold_in(rng, 2))}
    drops = draw_drops(keys[0], len(batch["tokens"]), cfg.drops)
    hidden, kv = prefill(params, cfg, batch, None if cfg.drops == "none" else drops)
    tokens, kinds = token_loss(params, cfg, batch, hidden)
    metrics = {"tokens": tokens, **dict(zip(LOSSES, kinds, strict=True))}
    if cfg.expert is None:
        return tokens, metrics
    flow_value = flow_loss(params, cfg, batch, latent_cache(cfg, kv, batch, drops), keys[1])
    return tokens + cfg.flow_weight * flow_value, {**metrics, "flow": flow_value}


def scramble(cfg, batch, rng):
    """Tokens int32[B, T]: `scrambled` rows read random codes and words where they answer.

    Codes that no row learns are nobody's, and always drawn.
    """
    rows, count = batch["latent_index"].shape
    which, words, codes = jax.random.split(rng, 3)
    learned = jnp.take_along_axis(batch["labels"], batch["latent_index"], axis=1) != IGNORE
    own_codes = (learned & batch["latent_valid"]).any(axis=1, keepdims=True)
    hit = jax.random.bernoulli(which, cfg.scrambled, (rows, 1))
    first, size = cfg.latent_ids
    tokens = batch["tokens"]
    said = hit & (batch["labels"] != IGNORE) & (batch["acts"] == 0)
    tokens = jnp.where(said, jax.random.randint(words, tokens.shape, 0, first + size), tokens)
    own = size // (max(cfg.latent_pattern) + 1)
    groups = jnp.tile(jnp.array(cfg.latent_pattern), count // len(cfg.latent_pattern))
    drawn = first + own * groups[None] + jax.random.randint(codes, (rows, count), 0, own)
    hit = (hit | ~own_codes) & batch["latent_valid"]
    place = jnp.where(hit, batch["latent_index"], tokens.shape[1])
    return tokens.at[jnp.arange(rows)[:, None], place].set(drawn, mode="drop")


def token_loss(params, cfg, batch, hidden):
    """Eq. 1: mean float32[] over all labelled tokens; means float32[3] by kind, as `LOSSES`."""
    return labelled_token_loss(
        hidden,
        batch["labels"],
        jnp.where(batch["acts"] == ANSWER_BLOCK, 0, batch["acts"]),
        lambda states: logits(params, cfg, states),
        num_kinds=len(LOSSES),
        most=cfg.most_labels,
    )


def flow_loss(params, cfg, batch, cached, rng):
    """Eq. 2 on what `latent_cache` gave."""
    noise_rng, tau_rng = jax.random.split(rng)
    again = functools.partial(jnp.repeat, repeats=cfg.flow_draws)
    action, valid, place, robot = (
        again(batch[key], axis=0)
        for key in ("action", "action_mask", "chunk_position", "embodiment_id")
    )
    cache, mask = jax.tree.map(lambda x: again(x, axis=1), cached[0]), again(cached[1], axis=0)
    action = action.astype(jnp.float32)
    noise = jax.random.normal(noise_rng, action.shape)
    tau = flow.sample_tau(tau_rng, action.shape[:1])
    made = velocity(params, cfg, cache, flow.noised(action, noise, tau), tau, place, mask, robot)
    there = mask.any(axis=1)[:, None, None]
    return flow.flow_loss(made, flow.target(action, noise), valid & there)


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
        ids int32[B, M], from 0; (keys, values) each [L, B, T + M, K, H]; what `latent_cache` and
        the expert need of rows that have become so long: latent_index, latent_valid, groups, acts,
        segments, chunk_position.
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
    grown = {
        name: jnp.pad(batch[name], ((0, 0), (0, count)), constant_values=value)
        for name, value in (("groups", LATENT), ("acts", LATENT_BLOCK), ("segments", 1))
    }
    index = jnp.broadcast_to(length + jnp.arange(count)[None], (rows, count))
    there = {"latent_index": index, "latent_valid": jnp.ones((rows, count), bool)}
    return ids.T, memory, {**grown, **there, "chunk_position": begin + count}


def act(params, cfg, batch, noise):
    """A normalised chunk, from images, instruction and state alone.

    Args:
        params: {tower: parameters}.
        cfg: GearConfig.
        batch: rows of `token_rows` with `prompt_only`.
        noise: float32[B, A, a], standard normal: where the flow begins.

    Returns:
        chunk float32[B, A, a]; latent ids int32[B, M], none where the config has no codes.
    """
    hidden, kv = prefill(params, cfg, batch)
    ids = jnp.zeros((len(hidden), 0), jnp.int32)
    if cfg.latents == "codes":
        ids, kv, grown = say_latents(params, cfg, batch, hidden, kv)
        batch = {**batch, **grown}
    return sample_chunk(params, cfg, batch, latent_cache(cfg, kv, batch), noise), ids


def sample_chunk(params, cfg, batch, cached, noise):
    """A chunk float32[B, A, a] from noise of that shape, on what `latent_cache` gave."""
    cache, mask = cached
    place, robot = batch["chunk_position"], batch["embodiment_id"]

    def field(noisy, tau):
        return velocity(params, cfg, cache, noisy, tau, place, mask, robot)

    return flow.integrate(field, noise, cfg.flow_steps)
