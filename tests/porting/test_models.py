"""Released models by their key templates, and both layouts of config.json."""

import copy
import json
import math
import re

import pytest

from configs import port_proof
from gear_jax.porting import files, models, table

QWEN = port_proof.get_config().to_dict()["qwen2_5_vl"]

# What the hub's config.json says of the released models (flat layout).
RELEASED = QWEN | {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_config": QWEN["vision_config"]
    | {
        "depth": 32,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 3420,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "window_size": 112,
        "out_hidden_size": 3584,
    },
}
RELEASED_3B = RELEASED | {
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "intermediate_size": 11008,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "vision_config": RELEASED["vision_config"] | {"out_hidden_size": 2048},
}
RELEASED_VGGT = {"embed_dim": 1024, "img_size": 518, "patch_size": 14}  # all that its file says


@pytest.mark.parametrize(
    ("template", "name", "config", "num_parameters", "num_tensors"),
    [
        ("qwen2_5_vl_7b", "qwen2_5_vl", RELEASED, 8_292_166_656, 729),
        ("qwen2_5_vl_3b", "qwen2_5_vl", RELEASED_3B, 3_754_622_976, 824),
        ("vggt_1b", "vggt", RELEASED_VGGT, 909_112_320, 1210),
    ],
)
def test_every_released_key_is_used_once_and_every_target_filled(
    golden, template, name, config, num_parameters, num_tensors
):
    keys = json.loads((golden / "checkpoint_keys" / f"{template}.json").read_text())["keys"]
    published = {}
    for key, entry in keys.items():
        first, last = entry["n"] or (0, 0)
        for i in range(first, last + 1):
            published[key.replace("{i}", str(i))] = tuple(entry["shape"])
    model = models.describe(name, config)  # jax.eval_shape: no memory
    ours = model.entries
    assert len(ours) == len(published) == num_tensors
    assert {entry.key: entry.shape for entry in ours} == published
    filled = {}
    for entry in ours:
        filled.setdefault(entry.ours, []).append(entry.layer)
    assert set(filled) == set(model.targets)
    for path, layers in filled.items():
        assert layers in ([None], list(range(model.targets[path].shape[0]))), path
    assert sum(math.prod(x.shape) for x in model.targets.values()) == num_parameters


@pytest.mark.parametrize("case", ["qwen2_5_vl_tiny", "qwen2_5_vl_tiny_tied"])
def test_both_layouts_of_config_json_say_the_same(golden, case):
    new, _, _ = models.open_source("qwen2_5_vl", golden / case)
    hub, _, _ = models.open_source("qwen2_5_vl", golden / case, "config_hub_style.json")
    assert new.cfg == hub.cfg


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2_vl"}, "model_type is 'qwen2_vl', expected 'qwen2_5_vl'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        (
            {"rope_scaling": {"type": "yarn", "mrope_section": [2, 3, 3]}},
            "type is 'yarn', expected 'default' or 'mrope'",
        ),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 4]}}, "do not fit together"),
        ({"num_key_value_heads": 3}, "do not fit together"),
        ({"vision_config": []}, "vision_config: expected an object, found list"),
        ({"rms_norm_eps": None}, "field 'rms_norm_eps' is missing"),
    ],
)
def test_a_config_we_would_misread_is_refused(changes, message):
    config = copy.deepcopy(QWEN) | changes
    config = {key: value for key, value in config.items() if value is not None}
    with pytest.raises(files.CheckpointError, match=f"^config.json.*{message}"):
        models.describe("qwen2_5_vl", config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aa_order": ["global", "frame"]}, "aa_order is .*, expected"),
        ({"qk_norm": False}, "qk_norm is False, expected True"),
        ({"num_heads": 5}, "num_heads is 5, expected a divisor of 256"),
    ],
)
def test_a_vggt_option_we_do_not_build_is_refused(changes, message):
    with pytest.raises(files.CheckpointError, match=message):
        models.describe("vggt", RELEASED_VGGT | changes)


def test_an_unknown_model_is_named():
    with pytest.raises(
        files.CheckpointError, match="'llava' is unknown: expected one of qwen2_5_vl"
    ):
        models.describe("llava", {})


def test_newer_spellings_of_keys_are_the_released_ones():
    rows = models.describe("qwen2_5_vl", QWEN).table
    for key, released in (
        ("model.language_model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("model.visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ):
        assert table.released_name(rows, key) == released


def test_a_source_with_both_patch_embeddings_asks_which(golden):
    with pytest.raises(files.CheckpointError, match="choose with --patch-embed"):
        models.open_source("vggt", golden / "vggt_tiny")
    for kind in ("dino", "conv"):
        model, _, tensors = models.open_source("vggt", golden / "vggt_tiny", patch_embed=kind)
        assert (model.cfg.dino is None) == (kind == "conv")
        assert len(table.match(model.table, model.parameters, tensors)) == len(tensors)


_NONSENSE = (None, True, 0, -1, 1.5, 1e30, math.nan, math.inf, 10**30, "x", [], {}, [1], ["x"])


def _sections(config, path=()):
    """Every (path, field) of nested objects."""
    for key, value in config.items():
        yield path, key
        if isinstance(value, dict):
            yield from _sections(value, (*path, key))


def _answer(name, config, path, field, value):
    """Put one value into a copy of a config: the refusal, or None when it makes a model."""
    config = copy.deepcopy(config)
    section = config
    for key in path:
        section = section[key]
    section[field] = value
    try:
        return None if models.describe(name, config).entries else "no entries"
    except files.CheckpointError as error:
        return str(error)


@pytest.mark.parametrize("layout", ["hub", "transformers", "vggt"])
def test_nonsense_in_any_field_is_refused_in_one_sentence(layout):
    name, config = "qwen2_5_vl", copy.deepcopy(QWEN)
    if layout == "transformers":
        names = ("model_type", "vision_config", "image_token_id", "video_token_id", "torch_dtype")
        text = {key: value for key, value in config.items() if key not in names}
        rope = text.pop("rope_scaling") | {"rope_theta": text.pop("rope_theta")}
        text["rope_parameters"] = rope | {"rope_type": "default"}
        config = {key: config[key] for key in names} | {"text_config": text}
        config["vision_config"]["rope_parameters"] = {"rope_type": "axial", "rope_theta": 1e4}
    if layout == "vggt":
        name, config = "vggt", port_proof.get_config().to_dict()["vggt"]
    for path, field in list(_sections(config)):
        for value in _NONSENSE:
            answer = _answer(name, config, path, field, value)
            assert answer is None or re.fullmatch(r"config.json.*", answer), (path, field, value)
