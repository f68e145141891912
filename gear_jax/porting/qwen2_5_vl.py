"""Qwen2.5-VL on Hugging Face <-> gear_jax: config.json and key table. ported_models.md A1, A2."""

from gear_jax.porting.config import Fields
from gear_jax.porting.files import CheckpointError
from gear_jax.porting.table import Row, Table
from gear_jax.systems.vlm import VlmConfig
from gear_jax.towers.projector import ProjectorConfig
from gear_jax.towers.qwen_language import QwenLanguageConfig
from gear_jax.towers.qwen_vision import QwenVisionConfig

_VISION = (
    ("norm1.weight", "attn_norm/scale", "d -> d"),
    ("attn.qkv.weight", "qkv/kernel", "(three n h) d -> d three n h"),
    ("attn.qkv.bias", "qkv/bias", "(three n h) -> three n h"),
    ("attn.proj.weight", "proj/kernel", "d (n h) -> n h d"),
    ("attn.proj.bias", "proj/bias", "d -> d"),
    ("norm2.weight", "mlp_norm/scale", "d -> d"),
    ("mlp.gate_proj.weight", "gate/kernel", "f d -> d f"),
    ("mlp.gate_proj.bias", "gate/bias", "f -> f"),
    ("mlp.up_proj.weight", "up/kernel", "f d -> d f"),
    ("mlp.up_proj.bias", "up/bias", "f -> f"),
    ("mlp.down_proj.weight", "down/kernel", "d f -> f d"),
    ("mlp.down_proj.bias", "down/bias", "d -> d"),
)
_LANGUAGE = (
    ("input_layernorm.weight", "attn_norm/scale", "d -> d"),
    ("self_attn.q_proj.weight", "q/kernel", "(n head) d -> d n head"),
    ("self_attn.q_proj.bias", "q/bias", "(n head) -> n head"),
    ("self_attn.k_proj.weight", "k/kernel", "(n head) d -> d n head"),
    ("self_attn.k_proj.bias", "k/bias", "(n head) -> n head"),
    ("self_attn.v_proj.weight", "v/kernel", "(n head) d -> d n head"),
    ("self_attn.v_proj.bias", "v/bias", "(n head) -> n head"),
    ("self_attn.o_proj.weight", "o/kernel", "d (n head) -> n head d"),
    ("post_attention_layernorm.weight", "mlp_norm/scale", "d -> d"),
    ("mlp.gate_proj.weight", "gate/kernel", "f d -> d f"),
    ("mlp.up_proj.weight", "up/kernel", "f d -> d f"),
    ("mlp.down_proj.weight", "down/kernel", "d f -> f d"),
)
_ROWS = (
    Row("visual.patch_embed.proj.weight", "vision/patch_embed", "d c t p q -> (c t p q) d"),
    *(Row("visual.blocks.{i}." + a, "vision/layers/" + b, pattern) for a, b, pattern in _VISION),
    Row("visual.merger.ln_q.weight", "projector/norm/scale", "d -> d"),
    Row("visual.merger.mlp.0.weight", "projector/fc1/kernel", "f d -> d f"),
    Row("visual.merger.mlp.0.bias", "projector/fc1/bias", "f -> f"),
    Row("visual.merger.mlp.2.weight", "projector/fc2/kernel", "f d -> d f"),
    Row("visual.merger.mlp.2.bias", "projector/fc2/bias", "f -> f"),
    Row("model.embed_tokens.weight", "language/embed", "v d -> v d"),
    *(Row("model.layers.{i}." + a, "language/layers/" + b, pattern) for a, b, pattern in _LANGUAGE),
    Row("model.norm.weight", "language/final_norm/scale", "d -> d"),
)
_MOST_LAYERS = 1024
_HEAD = Row("lm_head.weight", "language/head", "v d -> v d")


def table(cfg: VlmConfig) -> Table:
    """The key table of one config."""
    vision = cfg.vision
    return Table(
        rows=_ROWS if cfg.language.tied_head else (*_ROWS, _HEAD),
        sizes={
            "three": 3,
            "h": vision.head_dim,
            "head": cfg.language.head_dim,
            "c": vision.channels,
            "t": vision.temporal_patch,
            "p": vision.patch_size,
            "q": vision.patch_size,
        },
        renames=((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual.")),
    )


def read_config(config: dict, name: str = "config.json") -> VlmConfig:
    """config.json, in the hub's flat layout or that of transformers 5 -> VlmConfig.

    Args:
        config: the parsed file.
        name: its name, for messages.

    Raises:
        CheckpointError: another model, a missing field, or an option we do not build.
    """
    top = Fields(config, name)
    top.only("model_type", "qwen2_5_vl")
    text = top.section("text_config", default=config)
    vision = top.section("vision_config")
    rope = text.section("rope_parameters", "rope_scaling")
    text.only("hidden_act", "silu")
    vision.only("hidden_act", "silu")
    text.only("use_sliding_window", False)
    rope.only("rope_type" if "rope_type" in rope else "type", "default", "mrope")
    width, heads = text.count("hidden_size"), text.count("num_attention_heads")
    kv_heads, sections = text.count("num_key_value_heads"), rope.counts("mrope_section")
    head_dim = width // heads
    if text.get("head_dim", default=None) is not None:
        head_dim = text.count("head_dim")
    if width % heads or heads % kv_heads or len(sections) != 3 or 2 * sum(sections) != head_dim:
        raise CheckpointError(
            f"{name}: hidden_size {width}, num_attention_heads {heads}, num_key_value_heads "
            f"{kv_heads} and mrope_section {sections} do not fit together"
        )
    if vision.count("out_hidden_size") != width:
        vision.refuse("out_hidden_size", vision.get("out_hidden_size"), f"hidden_size, {width}")
    vocab_size = text.count("vocab_size")
    tied = top if "tie_word_embeddings" in top else text
    theta = rope if "rope_theta" in rope else text
    return VlmConfig(
        vision=_vision_config(vision),
        projector=ProjectorConfig(
            vision_width=vision.count("hidden_size"),
            geometry_width=None,
            merge=vision.count("spatial_merge_size") ** 2,
            width=width,
        ),
        language=QwenLanguageConfig(
            depth=text.count("num_hidden_layers", most=_MOST_LAYERS),
            width=width,
            num_heads=heads,
            num_kv_heads=kv_heads,
            mlp_dim=text.count("intermediate_size"),
            vocab_size=vocab_size,
            head_dim=head_dim,
            rope_theta=theta.positive("rope_theta"),
            rope_sections=sections,
            norm_eps=text.positive("rms_norm_eps"),
            tied_head=tied.flag("tie_word_embeddings"),
        ),
        image_token=top.count("image_token_id", least=0, most=vocab_size - 1),
        video_token=top.count("video_token_id", least=0, most=vocab_size - 1),
        tokens_per_second=vision.positive("tokens_per_second"),
    )


def _vision_config(fields: Fields) -> QwenVisionConfig:
    depth = fields.count("depth", most=_MOST_LAYERS)
    width, heads = fields.count("hidden_size"), fields.count("num_heads")
    patch = fields.count("patch_size", "spatial_patch_size")
    merge, window = fields.count("spatial_merge_size"), fields.count("window_size")
    if width % heads or (width // heads) % 4:
        fields.refuse("num_heads", heads, f"a number of heads of 4, 8, .. channels of {width}")
    if window % (patch * merge):
        fields.refuse("window_size", window, f"a multiple of {patch * merge} pixels")
    rope = fields.section("rope_parameters", default={"rope_type": "axial", "rope_theta": 10_000.0})
    rope.only("rope_type", "axial", "default", default="axial")
    return QwenVisionConfig(
        depth=depth,
        width=width,
        num_heads=heads,
        mlp_dim=fields.count("intermediate_size"),
        full_attention_layers=fields.counts("fullatt_block_indexes", most=depth - 1),
        patch_size=patch,
        temporal_patch=fields.count("temporal_patch_size"),
        spatial_merge=merge,
        window_size=window,
        channels=fields.count("in_channels", "in_chans"),
        rope_theta=rope.positive("rope_theta"),
    )
