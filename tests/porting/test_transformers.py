"""Against transformers itself, on models and inputs made up here (extra `port-check`)."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra port-check is not installed")
transformers = pytest.importorskip("transformers", reason="the extra port-check is not installed")

from gear_jax.data.qwen_images import PreprocessorConfig, image_patches  # noqa: E402
from launch import port  # noqa: E402

IMAGE, VIDEO, START, END = 5, 6, 3, 4


def _saved(folder, tied):
    """A random model, saved in bfloat16 and loaded again in float32."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [3, 4, 5]}
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 72,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "intermediate_size": 100,
            "vocab_size": 60,
            "rope_parameters": rope,
            "rms_norm_eps": 1e-5,
            "use_sliding_window": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "hidden_size": 48,
            "depth": 3,
            "num_heads": 3,
            "intermediate_size": 52,
            "out_hidden_size": 72,
            "fullatt_block_indexes": [0, 2],
            "window_size": 84,
            "tokens_per_second": 3,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(int(tied))
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.bfloat16().save_pretrained(folder)
    return _load(folder)


def _load(folder):
    return transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def _case(model):
    """One batch with gradients, in the format of the golden cases."""
    rng = np.random.default_rng(0)
    sizes = [(130, 100), (56, 200), (90, 90)]
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    config = PreprocessorConfig(max_pixels=28 * 28 * 1280)
    pixels, grids = zip(*(image_patches(image, config) for image in images), strict=True)
    counts = [int(np.prod(grid)) // 4 for grid in grids]
    rows = [
        [9, START, *[IMAGE] * counts[0], END, START, *[IMAGE] * counts[1], END, 10, 11, 12],
        [20, 21, START, *[IMAGE] * counts[2], END, 22, 23],
    ]
    length = max(map(len, rows)) + 2
    ids = np.array([row + [0] * (length - len(row)) for row in rows])
    mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    types = np.where(ids == IMAGE, 1, 0)
    labels = np.where((mask == 1) & (types == 0), ids, -100)
    inputs = {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "mm_token_type_ids": torch.from_numpy(types),
        "pixel_values": torch.from_numpy(np.concatenate(pixels)),
        "image_grid_thw": torch.from_numpy(np.stack(grids)),
    }
    out = model(**inputs, labels=torch.from_numpy(labels))
    out.loss.backward()
    named = {name: p.grad.numpy() for name, p in model.named_parameters()}
    assert all(np.any(gradient) for gradient in named.values())
    case = {name: tensor.numpy() for name, tensor in inputs.items()}
    case |= {f"image_{i}": image for i, image in enumerate(images)}
    case |= {"labels": labels, "logits": out.logits.detach().numpy(), "loss": out.loss.item()}
    case |= {"grad_norms": np.array([np.linalg.norm(g) for g in named.values()])}
    case |= {"grad_names": np.array(list(named))}
    case |= {
        f"grad__{name}": g for name, g in named.items() if "layers.1" in name or "blocks.0" in name
    }
    return case


@pytest.mark.parametrize("tied", [False, True])
def test_values_and_gradients_equal_those_of_transformers(tmp_path, capsys, tied):
    case = _case(_saved(tmp_path / "hf", tied))
    (tmp_path / "cases").mkdir()
    np.savez(tmp_path / "cases" / "random.npz", **case)
    arguments = ["check", "--model", "qwen2_5_vl", "--source", str(tmp_path / "hf")]
    arguments += ["--cases", str(tmp_path / "cases")]
    assert port.main(arguments) == 0
    assert "0 fall short" in capsys.readouterr().out

    if tied:
        return
    # every kind of comparison can fail
    for key, change in (("logits", 1e-3), ("loss", 1e-2), ("grad_norms", 1e-2)):
        np.savez(
            tmp_path / "cases" / "random.npz",
            **(case | {key: np.asarray(case[key]) * (1 + change)}),
        )
        assert port.main(arguments) == 1
        assert "1 fall short" in capsys.readouterr().out
    np.savez(tmp_path / "cases" / "random.npz", **case, something_else=np.zeros(3))
    assert port.main(arguments) == 1
    assert "no such output is computed" in capsys.readouterr().out


@pytest.mark.parametrize("shard_gb", ["5", "0.0001"])
def test_transformers_loads_our_export_and_gives_the_same_logits(tmp_path, shard_gb):
    model = _saved(tmp_path / "hf", tied=False)
    convert = ["convert", "--model", "qwen2_5_vl", "--source", str(tmp_path / "hf")]
    assert port.main([*convert, "--target", str(tmp_path / "orbax")]) == 0
    export = ["export", "--source", str(tmp_path / "orbax"), "--target", str(tmp_path / "back")]
    assert port.main([*export, "--max-shard-gb", shard_gb]) == 0
    files = sorted(path.name for path in (tmp_path / "back").glob("*.safetensors"))
    assert (len(files) > 1) == (shard_gb != "5")
    ids = torch.arange(8, 28)[None]
    with torch.inference_mode():
        again = _load(tmp_path / "back")(input_ids=ids).logits
        assert torch.equal(again, model(input_ids=ids).logits)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "qwen2_5_vl"
