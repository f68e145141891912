"""Qwen2.5-VL on Hugging Face <-> gear_jax: config.json and key table. ported_models.md A1, A2."""

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
    top = _Fields(config, name)
    if config.get("model_type") != "qwen2_5_vl":
        raise CheckpointError(
            f"{name}: model_type is {config.get('model_type')!r}, not 'qwen2_5_vl'"
        )
    text = _Fields(config.get("text_config", config), name)
    vision = _Fields(top.get("vision_config"), f"{name}: vision_config")
    rope = _Fields(text.get("rope_parameters", "rope_scaling"), f"{name}: rope_scaling")
    for fields, key, wanted in (
        (text, "hidden_act", ("silu",)),
        (vision, "hidden_act", ("silu",)),
        (text, "use_sliding_window", (False,)),
        (rope, "rope_type", ("default", "mrope")),
    ):
        value = fields.get("type" if key == "rope_type" and "rope_type" not in fields else key)
        if value not in wanted:
            raise CheckpointError(f"{fields.name}: {key} is {value!r}, expected one of {wanted}")
    heads = text.get("num_attention_heads")
    width, vision_width = text.get("hidden_size"), vision.get("hidden_size")
    sections = tuple(rope.get("mrope_section"))
    head_dim = text.get("head_dim", default=None) or width // heads
    if width % heads or heads % text.get("num_key_value_heads") or 2 * sum(sections) != head_dim:
        raise CheckpointError(
            f"{name}: hidden_size {width}, num_attention_heads {heads}, num_key_value_heads "
            f"{text.get('num_key_value_heads')} and mrope_section {sections} do not fit together"
        )
    if vision.get("out_hidden_size") != width:
        raise CheckpointError(
            f"{name}: vision out_hidden_size is {vision.get('out_hidden_size')}, not {width}"
        )
    vision_rope = vision.get("rope_parameters", default={"rope_theta": 10_000.0})
    merge = vision.get("spatial_merge_size")
    return VlmConfig(
        vision=QwenVisionConfig(
            depth=vision.get("depth"),
            width=vision_width,
            num_heads=vision.get("num_heads"),
            mlp_dim=vision.get("intermediate_size"),
            full_attention_layers=tuple(vision.get("fullatt_block_indexes")),
            patch_size=vision.get("patch_size", "spatial_patch_size"),
            temporal_patch=vision.get("temporal_patch_size"),
            spatial_merge=merge,
            window_size=vision.get("window_size"),
            channels=vision.get("in_channels", "in_chans"),
            rope_theta=vision_rope["rope_theta"],
        ),
        projector=ProjectorConfig(
            vision_width=vision_width, geometry_width=None, merge=merge**2, width=width
        ),
        language=QwenLanguageConfig(
            depth=text.get("num_hidden_layers"),
            width=width,
            num_heads=heads,
            num_kv_heads=text.get("num_key_value_heads"),
            mlp_dim=text.get("intermediate_size"),
            vocab_size=text.get("vocab_size"),
            head_dim=head_dim,
            rope_theta=rope.get("rope_theta", default=None) or text.get("rope_theta"),
            rope_sections=sections,
            norm_eps=text.get("rms_norm_eps"),
            tied_head=top.get("tie_word_embeddings"),
        ),
        image_token=top.get("image_token_id"),
        video_token=top.get("video_token_id"),
        tokens_per_second=float(vision.get("tokens_per_second")),
    )


_NEEDED = object()


class _Fields(dict):
    """A config section whose missing fields are errors that name it."""

    def __init__(self, values, name):
        if not isinstance(values, dict):
            raise CheckpointError(f"{name}: expected an object, found {type(values).__name__}")
        super().__init__(values)
        self.name = name

    def get(self, *keys, default=_NEEDED):
        for key in keys:
            if self.__contains__(key):
                return self[key]
        if default is _NEEDED:
            raise CheckpointError(f"{self.name}: field {keys[0]!r} is missing")
        return default
