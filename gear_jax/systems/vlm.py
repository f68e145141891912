"""The vision-language model: functions that join vision, projector, language and geometry.

Everything takes one parameter tree whose top keys are the towers. A batch is a dict:

    tokens        int32[B, T]
    positions     int32[3, B, T]   m-rope positions (data/mrope.py)
    segments      int32[B, T]      0 padding, 1 the sequence, more when sequences are packed
    insert_index  int32[B, T]      row of the visual embeddings for an image token, -1 for text
    visual        dict with patches [B, W, S, P], positions int32[B, W, S, 2], segments int32[B, W,
                  S] (data/patch_windows.py); left out, with insert_index, when there is no image
"""

import dataclasses

import jax
import jax.numpy as jnp

from gear_jax.towers import qwen_vision
from gear_jax.towers.projector import Projector, ProjectorConfig
from gear_jax.towers.qwen_language import QwenLanguage, QwenLanguageConfig, vocabulary_logits
from gear_jax.towers.qwen_vision import QwenVision, QwenVisionConfig
from gear_jax.towers.vggt import Vggt, VggtConfig


@dataclasses.dataclass(frozen=True)
class VlmConfig:
    """The towers' sizes and the image tokens; without `geometry`, Qwen2.5-VL as released."""

    vision: QwenVisionConfig
    projector: ProjectorConfig
    language: QwenLanguageConfig
    geometry: VggtConfig | None = None
    geometry_tap: int = -1  # pair of VGGT blocks whose output enters the projector
    image_token: int = 151_655
    video_token: int = 151_656
    tokens_per_second: float = 2.0  # positions that one second of video spans


def init(cfg, rng):
    """Random parameters of all towers, keyed by tower. Use `jax.eval_shape` for shapes alone."""
    vision, geometry = cfg.vision, cfg.geometry
    unit = vision.spatial_merge**2  # one merged token is enough to shape every parameter
    patches, places = jnp.zeros((1, 1, unit, vision.patch_dim)), jnp.zeros((1, 1, unit, 2), int)
    features = jnp.zeros((1, unit, cfg.projector.vision_width))
    token, position = jnp.zeros((1, 1), int), jnp.zeros((3, 1, 1), int)
    names = ("vision", "projector", "language", "geometry")
    keys = dict(zip(names, jax.random.split(rng, 4), strict=True))
    made = {
        "vision": QwenVision(vision).init(keys["vision"], patches, places),
        "projector": Projector(cfg.projector).init(keys["projector"], features),
        "language": QwenLanguage(cfg.language).init(keys["language"], token, position, token),
    }
    if geometry is not None:
        image = jnp.zeros((1, 1, geometry.patch_size, geometry.patch_size, 3))
        made["geometry"] = Vggt(geometry).init(keys["geometry"], image)
    return {tower: variables["params"] for tower, variables in made.items()}


def visual_embeddings(params, cfg, visual):
    """Embeddings of packed images of any size: [B, W * S / 4, D], in the order of the slots."""
    features, _ = QwenVision(cfg.vision).apply(
        {"params": params["vision"]}, visual["patches"], visual["positions"], visual["segments"]
    )
    merged = Projector(cfg.projector).apply({"params": params["projector"]}, features)
    return merged.reshape(merged.shape[0], -1, merged.shape[-1])


def view_embeddings(params, cfg, images, scenes=None):
    """Embeddings of a robot's camera views, with the 3D branch when the config has one.

    Args:
        params: {"vision", "projector"[, "geometry"], ...}.
        cfg: VlmConfig.
        images: uint8[B, V, H, W, 3], H and W multiples of the vision tower's window (448 px: 256
            embeddings a view).
        scenes: int32[B, V], which views show the same scene, -1 for absent ones (towers/vggt.py).

    Returns:
        [B, V * H/28 * W/28, D], view by view, row by row.
    """
    batch, views, height, width, _ = images.shape
    patches, positions = qwen_vision.window_patches(
        images.reshape(-1, *images.shape[2:]), cfg.vision
    )
    features, _ = QwenVision(cfg.vision).apply({"params": params["vision"]}, patches, positions)
    geometry = None
    if cfg.geometry is not None:
        scene = Vggt(cfg.geometry).apply(
            {"params": params["geometry"]},
            images.astype(jnp.float32) / 255.0,
            scenes,
            taps=(cfg.geometry_tap,),
        )[0, :, :, cfg.geometry.num_special :]
        patch = cfg.geometry.patch_size
        scene = scene.reshape(batch * views, height // patch, width // patch, -1)
        geometry = qwen_vision.raster_to_windows(scene, cfg.vision)
    merged = Projector(cfg.projector).apply({"params": params["projector"]}, features, geometry)
    columns = width // cfg.vision.patch_size // cfg.vision.spatial_merge
    merged = qwen_vision.windows_to_raster(merged, columns, cfg.vision)
    return merged.reshape(batch, -1, merged.shape[-1])


def forward(params, cfg, batch, inserts=None, taps=(), hidden_groups=None):
    """The language tower over a whole sequence.

    Args:
        params: parameters keyed by tower.
        cfg: VlmConfig.
        batch: see the module's first lines.
        inserts: [B, I, D] for `insert_index`; by default the embeddings of `batch["visual"]`.
        taps: layers of the language tower to return.
        hidden_groups: int32[B, T] or None, bits of `batch["groups"]` that a token does not see.

    Returns:
        hidden [B, T, D], (keys, values) each [L, B, T, K, H], taps [len(taps), B, T, D].
    """
    if inserts is None and "visual" in batch:
        inserts = visual_embeddings(params, cfg, batch["visual"])
    return QwenLanguage(cfg.language).apply(
        {"params": params["language"]},
        batch["tokens"],
        batch["positions"],
        batch["segments"],
        inserts,
        batch.get("insert_index"),
        taps=taps,
        hidden=hidden_groups,
        groups=None if hidden_groups is None else batch["groups"],
    )


def logits(params, hidden):
    """float32[B, T, V] of hidden states that `forward` gave."""
    return vocabulary_logits(params["language"], hidden)


def generate(
    params,
    cfg,
    batch,
    inserts=None,
    *,
    max_new_tokens,
    stop_tokens=(),
    vocab_used=None,
    keep_logits=False,
):
    """Greedy continuation of a batch of prompts, padded on either side.

    Args:
        params: parameters keyed by tower.
        cfg: VlmConfig.
        batch: prompts, one a row; see the module's first lines.
        inserts: as in `forward`.
        max_new_tokens: N.
        stop_tokens: a row that emits one of them is over; what follows is the first of them.
        vocab_used: rows of the vocabulary that are tokens; later ones are never said.
        keep_logits: also return the logits of every step.

    Returns:
        tokens int32[B, N]; logits float32[B, N, V] or None.
    """
    hidden, kv, _ = forward(params, cfg, batch, inserts)
    rows, length = batch["tokens"].shape
    valid = batch["segments"] > 0
    last = length - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    first = logits(params, jnp.take_along_axis(hidden, last[:, None, None], axis=1))[:, 0]
    # text goes on from the last token, even where a video's time axis ran further ahead
    here = jnp.take_along_axis(batch["positions"], last[None, :, None], axis=2)
    position = jnp.max(here, axis=(0, 2)) + 1
    grow = ((0, 0), (0, 0), (0, max_new_tokens), (0, 0), (0, 0))
    cache = jax.tree.map(lambda x: jnp.pad(x, grow), kv)
    cache_segments = jnp.pad(batch["segments"], ((0, 0), (0, max_new_tokens)))
    stops = jnp.asarray(stop_tokens, jnp.int32).reshape(1, -1)
    tower = QwenLanguage(cfg.language)

    def step(carry):
        index, token, done, cache, cache_segments, tokens, kept = carry
        one = jnp.ones((rows, 1), jnp.int32)
        positions = jnp.broadcast_to((position + index)[None, :, None], (3, rows, 1))
        hidden, new, _ = tower.apply(
            {"params": params["language"]},
            token[:, None],
            positions,
            one,
            memory=cache,
            memory_segments=cache_segments,
        )
        slot = length + index
        cache = jax.tree.map(
            lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, slot, 2), cache, new
        )
        cache_segments = jax.lax.dynamic_update_slice_in_dim(cache_segments, one, slot, 1)
        return emit(
            index + 1, logits(params, hidden)[:, 0], done, cache, cache_segments, tokens, kept
        )

    def emit(index, scores, done, cache, cache_segments, tokens, kept):
        scores = scores if vocab_used is None else scores[:, :vocab_used]
        token = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        if stop_tokens:
            token = jnp.where(done, stops[0, 0], token)
            done = done | jnp.any(token[:, None] == stops, axis=1)
        tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], index, 1)
        if keep_logits:
            kept = jax.lax.dynamic_update_slice_in_dim(kept, scores[:, None], index, 1)
        return index, token, done, cache, cache_segments, tokens, kept

    kept = jnp.zeros((rows, max_new_tokens, vocab_used or first.shape[-1])) if keep_logits else None
    fill = stop_tokens[0] if stop_tokens else 0
    tokens = jnp.full((rows, max_new_tokens), fill, jnp.int32)
    start = emit(0, first, jnp.zeros(rows, bool), cache, cache_segments, tokens, kept)
    *_, tokens, kept = jax.lax.while_loop(
        lambda carry: (carry[0] < max_new_tokens - 1) & ~jnp.all(carry[2]), step, start
    )
    return tokens, kept
