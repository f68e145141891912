"""The porter through its command line: round trips, hostile sources, memory, kills."""

import json
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest

from configs import port_proof
from gear_jax.porting import files, models
from launch import port

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = port_proof.get_config().to_dict()
CASES = [
    ("qwen2_5_vl", "qwen2_5_vl_tiny", None, None),
    ("qwen2_5_vl", "qwen2_5_vl_tiny_tied", None, None),
    ("vggt", "vggt_tiny", "dino", ["aggregator.safetensors", "patch_embed_dino.safetensors"]),
    ("vggt", "vggt_tiny", "conv", ["aggregator.safetensors", "patch_embed_conv.safetensors"]),
]


def _write(folder, config, name="qwen2_5_vl", num_files=1, seed=0):
    """A random bfloat16 checkpoint in the published format; returns its number of bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    block = np.random.default_rng(seed).standard_normal(1 << 20).astype(ml_dtypes.bfloat16)
    entries = models.describe(name, config).entries

    def tensor(entry):
        return entry.key, "BF16", entry.shape, lambda: np.resize(block, entry.shape)

    index, total = {}, 0
    for number in range(num_files):
        mine = entries[number::num_files]
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        file = file if num_files > 1 else "model.safetensors"
        files.write_file(folder / file, [tensor(entry) for entry in mine])
        index |= {entry.key: file for entry in mine}
        total += sum(2 * int(np.prod(entry.shape)) for entry in mine)
    if num_files > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return total


def _digests(directory, parts=None):
    return {
        key: (tensor.dtype, tensor.shape, tensor.read().tobytes())
        for key, tensor in files.open_directory(directory, parts).items()
    }


def test_check_passes_on_the_reference_and_fails_when_a_value_is_off(golden, tmp_path, capsys):
    source = golden / "qwen2_5_vl_tiny"
    arguments = ["check", "--model", "qwen2_5_vl", "--source", str(source), "--cases"]
    assert port.main([*arguments, str(source)]) == 0
    tied = golden / "qwen2_5_vl_tiny_tied"
    tied_arguments = ["check", "--model", "qwen2_5_vl", "--source", str(tied), "--cases", str(tied)]
    assert port.main([*tied_arguments, "--config", "config_hub_style.json"]) == 0
    vggt = golden / "vggt_tiny"
    assert port.main(["check", "--model", "vggt", "--source", str(vggt), "--cases", str(vggt)]) == 0
    out = capsys.readouterr().out
    assert out.count(" 0 fall short") == 3
    assert "NO" not in out

    with np.load(source / "case_text_only_left_pad.npz") as stored:
        case = {key: stored[key] for key in stored.files}
    case["logits"] = case["logits"].copy()
    case["logits"][0, -1, 3] += 1e-3
    np.savez(tmp_path / "case.npz", **case)
    assert port.main([*arguments, str(tmp_path)]) == 1
    assert " 1 fall short" in capsys.readouterr().out


@pytest.mark.parametrize(("model", "folder", "patch_embed", "parts"), CASES)
def test_convert_then_export_is_byte_identical(golden, tmp_path, model, folder, patch_embed, parts):
    choose = ["--patch-embed", patch_embed] if patch_embed else []
    convert = ["convert", "--model", model, "--source", str(golden / folder), *choose]
    assert port.main([*convert, "--target", str(tmp_path / "ours")]) == 0
    export = ["export", "--source", str(tmp_path / "ours"), "--target", str(tmp_path / "theirs")]
    assert port.main(export) == 0
    expected = _digests(golden / folder, parts)
    assert _digests(tmp_path / "theirs") == expected
    assert (
        port.main(["inspect", "--model", model, "--source", str(tmp_path / "theirs"), *choose]) == 0
    )


def test_a_cast_is_kept_in_our_checkpoint_and_undone_on_export(golden, tmp_path):
    source, ours = golden / "qwen2_5_vl_tiny_tied", tmp_path / "ours"
    convert = ["convert", "--model", "qwen2_5_vl", "--source", str(source), "--dtype", "float32"]
    assert port.main([*convert, "--mesh", "fsdp=2,data=4", "--target", str(ours)]) == 0
    from gear_jax.train import checkpoint

    assert {str(dtype) for dtype in checkpoint.stored_dtypes(ours).values()} == {"float32"}
    assert port.main(["export", "--source", str(ours), "--target", str(tmp_path / "theirs")]) == 0
    assert _digests(tmp_path / "theirs") == _digests(source)


def test_a_damaged_checkpoint_of_ours_is_not_exported(tmp_path, capsys):
    _write(tmp_path / "hf", CONFIG["qwen2_5_vl"])
    convert = ["convert", "--model", "qwen2_5_vl", "--source", str(tmp_path / "hf")]
    assert port.main([*convert, "--target", str(tmp_path / "ours")]) == 0
    largest = max((tmp_path / "ours").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    export = ["export", "--source", str(tmp_path / "ours"), "--target", str(tmp_path / "theirs")]
    assert port.main(export) == 4
    assert f"damaged: {largest.relative_to(tmp_path / 'ours')}" in capsys.readouterr().err
    assert not (tmp_path / "theirs").exists()


def test_an_existing_target_is_left_alone(golden, tmp_path, capsys):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "precious").write_text("x")
    source = str(golden / "qwen2_5_vl_tiny")
    arguments = ["convert", "--model", "qwen2_5_vl", "--source", source]
    assert port.main([*arguments, "--target", str(tmp_path / "ours")]) == 4
    assert "ours: already exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["ours", "precious"]


def _hostile(folder, change):
    """A good checkpoint, then one fault."""
    _write(folder, CONFIG["qwen2_5_vl"], num_files=2)
    path = folder / "model-00001-of-00002.safetensors"
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    key = next(iter(listed))
    tensors = files.read_header(path)

    def rewrite(name=key, dtype=None, shape=None, array=None):
        old = tensors[key]
        new = (name, dtype or old.dtype, shape or old.shape, lambda: array)
        if array is None:
            new = (*new[:3], lambda: old.read().reshape(new[2]))
        kept = [(k, t.dtype, t.shape, t.read) for k, t in tensors.items() if k != key]
        other = path.with_name("new")
        files.write_file(other, [new, *kept])
        other.rename(path)
        if name != key:
            listed[name] = listed.pop(key)
            index.write_text(json.dumps({"weight_map": listed}))

    def reindex(name):
        index.write_text(json.dumps({"weight_map": listed | {key: name}}))

    if change == "missing shard":
        path.unlink()
    elif change == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif change == "climbing name":
        reindex("../model-00001-of-00002.safetensors")
    elif change == "absolute name":
        reindex("/etc/passwd.safetensors")
    elif change == "pickle shard":
        reindex("model-00001-of-00002.bin")
    elif change == "nan":
        rewrite(array=np.full(tensors[key].shape, np.nan, ml_dtypes.bfloat16))
    elif change == "dtype swap":
        rewrite(dtype="F16", array=np.ones(tensors[key].shape, np.float16))
    elif change == "shape swap":
        rewrite(shape=tensors[key].shape[::-1])
    elif change == "63 dimensions":
        rewrite(shape=(1,) * 62 + (int(np.prod(tensors[key].shape)),))
    elif change == "strange key":
        rewrite(name="../../etc/x")
    elif change == "only pickles":
        for file in folder.glob("model*"):
            file.unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    return key


HOSTILE = {
    "missing shard": "'visual.patch_embed.proj.weight' lies in 'model-00001-of-.*', which is not",
    "cut": "model-00001-of-00002.safetensors: .* bytes of data",
    "climbing name": "key 'visual.patch_embed.proj.weight' lies in '../model",
    "absolute name": "key 'visual.patch_embed.proj.weight' lies in '/etc/passwd",
    "pickle shard": "lies in 'model-00001-of-00002.bin': expected the plain name of a .safetensors",
    "nan": "model-00001-of-00002.safetensors: key 'visual.patch_embed.proj.weight' holds NaN",
    "dtype swap": "model-00001-of-00002.safetensors: 'visual.patch_embed.proj.weight' is F16, but",
    "shape swap": "'visual.patch_embed.proj.weight' has shape .*, expected",
    "63 dimensions": "'visual.patch_embed.proj.weight' has shape .*, expected",
    "strange key": "'visual.patch_embed.proj.weight' is missing.*'../../etc/x' is not part",
    "only pickles": "pytorch_model.bin: pickled weights can run code",
}


@pytest.mark.parametrize("change", HOSTILE)
def test_a_hostile_source_leaves_one_sentence_and_no_target(tmp_path, capsys, change):
    _hostile(tmp_path / "hf", change)
    arguments = ["convert", "--model", "qwen2_5_vl", "--source", str(tmp_path / "hf")]
    assert port.main([*arguments, "--target", str(tmp_path / "ours")]) == 4
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert re.match(f"error: .*{HOSTILE[change]}", error)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# Not getrusage: a child inherits the peak of the process that started it.
_PEAK = """
import pathlib, re
def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1])
"""


def test_a_refusal_takes_little_memory(tmp_path):
    _hostile(tmp_path / "hf", "63 dimensions")
    arguments = ["convert", "--model", "qwen2_5_vl", "--source", str(tmp_path / "hf")]
    arguments += ["--target", str(tmp_path / "ours")]
    code = f"{_PEAK}\nfrom launch import port\nprint(port.main({arguments}), peak())"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    code, peak = map(int, out.stdout.split())
    assert code == 4
    assert out.stderr.count("\n") == 1
    assert peak < 500e6  # imports included


_LARGE = CONFIG["qwen2_5_vl"] | {
    "hidden_size": 2048,
    "num_hidden_layers": 14,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 8192,
    "vocab_size": 60_000,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": CONFIG["qwen2_5_vl"]["vision_config"] | {"out_hidden_size": 2048},
}
_MEASURE = (
    _PEAK
    + """
import sys, jax
from gear_jax.porting import models, table
from gear_jax.train import sharding
mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2})
model, _, tensors = models.open_source("qwen2_5_vl", sys.argv[1])
pairs = table.match(model.table, model.parameters, tensors)
shardings = table.flatten(sharding.param_shardings(table.unflatten(model.targets), mesh))
jax.block_until_ready(jax.device_put(1, jax.devices()[0]))
base = peak()
arrays = table.load(pairs, model.targets, model.table.sizes, shardings)
top = peak()
held = sum(s.data.nbytes for a in arrays.values() for s in a.addressable_shards)
print(top - base - held, base, held)
"""
)


@pytest.mark.slow
def test_two_gibibytes_load_in_bounded_memory_and_survive_a_kill(tmp_path):
    total = _write(tmp_path / "hf", _LARGE, num_files=4)
    assert total > 2 << 30
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    measured = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "hf")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    beyond, _, held = map(int, measured.stdout.split())
    assert held >= total
    assert beyond < 500e6, measured.stdout

    command = [sys.executable, "-m", "launch.port", "convert", "--model", "qwen2_5_vl"]
    command += ["--source", str(tmp_path / "hf"), "--mesh", "fsdp=2,tensor=2"]
    command += ["--target", str(tmp_path / "ours")]
    killed = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    partial = tmp_path / ".ours.partial"
    while not partial.exists() or not any(partial.rglob("*")):  # the first bytes are being written
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "ours").exists()

    assert subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0
    assert not partial.exists()
    export = ["export", "--source", str(tmp_path / "ours"), "--target", str(tmp_path / "back")]
    assert port.main(export) == 0
    source = files.open_directory(tmp_path / "hf")
    for key, tensor in files.open_directory(tmp_path / "back").items():
        assert np.array_equal(tensor.read().view(np.uint16), source[key].read().view(np.uint16)), (
            key
        )


def _convert(source, target):
    arguments = ["convert", "--model", "qwen2_5_vl", "--source", str(source)]
    return port.main([*arguments, "--target", str(target)])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "SHA256SUMS"])
@pytest.mark.parametrize("kind", ["pipe", "device", "directory", "link out", "dangling link"])
def test_what_is_no_plain_file_of_the_source_is_never_opened(tmp_path, capsys, name, kind):
    source = tmp_path / "hf"
    _write(source, CONFIG["qwen2_5_vl"])
    path = source / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "link out": "/etc/hostname"}.get(kind, "nowhere"))
    assert _convert(source, tmp_path / "ours") == 4
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert name in error
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_files_beside_the_weights_travel_but_not_through_links_out(tmp_path, capsys):
    source = tmp_path / "hf"
    _write(source, CONFIG["qwen2_5_vl"])
    (source / "tokenizer_config.json").write_text("{}")
    assert _convert(source, tmp_path / "ours") == 0
    assert (tmp_path / "ours" / "tokenizer_config.json").read_text() == "{}"
    (source / "vocab.json").symlink_to("/etc/hostname")
    assert _convert(source, tmp_path / "other") == 4
    assert "vocab.json: a link that leads out of" in capsys.readouterr().err


def test_targets_that_cannot_be_are_refused_before_anything_is_read(tmp_path, capsys):
    source = tmp_path / "hf"
    _write(source, CONFIG["qwen2_5_vl"])
    assert _convert(source, source / "ours") == 4
    assert "the target lies in the source" in capsys.readouterr().err
    (tmp_path / "link").symlink_to("nowhere")
    assert _convert(source, tmp_path / "link") == 4
    assert "link: already exists" in capsys.readouterr().err
    (tmp_path / ".ours.partial").touch()
    assert _convert(source, tmp_path / "ours") == 4
    assert ".ours.partial: already exists" in capsys.readouterr().err
    (source / "model.safetensors").unlink()
    assert _convert(source, tmp_path / "a" / "b" / "c") == 4
    assert not (tmp_path / "a").exists()
