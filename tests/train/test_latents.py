"""The stage `latents` and extraction, through their public doors."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from configs import latents as configs
from gear_jax.data.catalog import open_prepared
from gear_jax.data.latent_ids import LatentIds, LatentWriter
from gear_jax.data.tfrecord import DataError
from gear_jax.report import latents_page
from gear_jax.systems import latents as system
from gear_jax.towers.latent_action import LatentActionConfig
from gear_jax.train import exits, extraction, latents, loop, sharding
from gear_jax.train.exits import StopRunError
from gear_jax.train.run_checkpoints import RunCheckpoints
from launch import extract, train

ROOT = pathlib.Path(__file__).parents[2]


def _debug(tmp_path, **updates):
    config = configs.get_config("debug")
    config.data.sets.shapes.work = str(tmp_path / "data")
    for path, value in updates.items():
        config.update_from_flattened_dict({path.replace("__", "."): value})
    return config


def _quiet(*_):
    pass


def _train(config, workdir, monkeypatch=None):
    mesh = sharding.make_mesh({"data": 8})
    record = json.loads(config.to_json())
    stage = latents.stage(config, mesh)
    options = loop.LoopConfig(**config.loop)
    return loop.run(stage, options, workdir, mesh, seed=config.seed, record=record, say=_quiet)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    config = _debug(folder)
    return folder, config, _train(config, folder / "run")


def _arrays(state):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves((state.params, state.extra))]


def test_monitors_are_written_and_the_checkpoint_loads_without_the_optimiser(trained):
    folder, _, state = trained
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    held = next(row for row in rows if "held_out/perplexity" in row)
    assert len(held["held_out/perplexity"]) == len(held["held_out/used"]) == 2
    assert {"held_out/gain_db", "held_out/shuffled", "held_out/entropy"} <= set(held)
    cfg, params, codebook, source = latents.load(folder / "run")
    assert cfg == latents.model_config(configs.get_config("debug").model)
    assert source["step"] == 8
    for got, wanted in ((params, state.params), (codebook, state.extra)):
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_another_stages_run_is_no_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"stage": "policy"}')
    with pytest.raises(DataError, match="its stage is 'policy', expected 'latents'"):
        latents.load(tmp_path)


def test_the_full_config_has_the_papers_codes_and_all_variants_build():
    full = configs.get_config()
    cfg = latents.model_config(full.model)
    assert (cfg.num_transitions, cfg.codes_per_transition, cfg.num_groups) == (5, 4, 2)
    for changes in ({}, {"mode": "lapa"}, {"quantizer": "fsq"}, {"window": "adjacent"},
                    {"num_frames": 5}):  # fmt: skip
        one = latents.model_config({**full.model, **changes})
        params, codebook = jax.eval_shape(lambda r, c=one: system.init(c, r), jax.random.key(0))
        mesh = sharding.make_mesh({"fsdp": 8})
        sharding.param_shardings(params, mesh, latents.RULES)
        assert codebook["mean"].shape[0] == one.num_transitions
    with pytest.raises(ValueError, match="size 'tiny': expected one of"):
        configs.get_config("tiny")


def test_a_bad_setting_trips_the_alarm_and_the_default_does_not(trained, tmp_path):
    rows = [
        json.loads(line) for line in (trained[0] / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert rows[-1]["step"] == 8  # the default of the fixture came to its end
    config = _debug(
        tmp_path, loss__commitment=100.0, loss__restart_steps=0, loss__standardize=False,
        loss__entropy=0.0, optim__num_steps=60, monitor__every=10, monitor__first=20,
    )  # fmt: skip
    with pytest.raises(StopRunError, match=r"latent actions have collapsed: group \d uses") as end:
        _train(config, tmp_path / "run")
    assert end.value.code == exits.COLLAPSED
    assert "do not read them" in str(end.value) or "perplexity" in str(end.value)


def _command(module, *arguments):
    return [sys.executable, "-m", f"launch.{module}", *map(str, arguments)]


def _environment():
    flags = "--xla_force_host_platform_device_count=2"
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


def _killed(command, until, seconds):
    """Start a command and kill it `seconds` after `until` is true; False if it ended before."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    begun = time.monotonic()
    while process.poll() is None and not until() and time.monotonic() - begun < 120:
        time.sleep(0.02)
    time.sleep(seconds)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return alive


def test_killed_at_random_the_rerun_ends_bitwise_as_an_unbroken_run(tmp_path):
    def arguments(name):
        return ("--config", "configs/latents.py:debug", "--workdir", tmp_path / name,
                f"--config.data.sets.shapes.work={tmp_path / 'data'}",
                "--config.loop.checkpoint_every=2", "--config.optim.num_steps=16",
                "--config.monitor.first=100")  # fmt: skip

    def checkpoints(name):
        return lambda: any((tmp_path / name / "checkpoints").glob("[0-9]*/digests.json"))

    run = subprocess.run
    run(_command("train", *arguments("whole")), cwd=ROOT, env=_environment(), check=True,
        capture_output=True)  # fmt: skip
    chance = random.Random(5)
    command = _command("train", *arguments("broken"))
    _killed(command, checkpoints("broken"), chance.uniform(0, 0.5))
    ended = run(command, cwd=ROOT, env=_environment(), check=True, capture_output=True, text=True)
    assert json.loads(ended.stdout.splitlines()[-1])["step"] == 16
    found = []
    for name in ("whole", "broken"):
        _, params, codebook, _ = latents.load(tmp_path / name)
        found.append([np.asarray(x).tobytes() for x in jax.tree.leaves((params, codebook))])
        reader = RunCheckpoints(tmp_path / name / "checkpoints", read_only=True)
        assert reader.steps()[-1] == 16
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def tokenizer(trained):
    cfg, params, codebook, source = latents.load(trained[0] / "run")
    mesh = sharding.make_mesh({"data": 8})
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params, codebook = jax.device_put((params, codebook), everywhere)
    return extraction.Tokenizer(cfg, params, codebook, source["digest"], 16, mesh)


@pytest.fixture(scope="module")
def prepared(trained):
    fields = trained[1].data.sets.shapes.to_dict()
    del fields["weight"]
    return open_prepared(latents.DatasetConfig(**fields))


def test_every_step_gets_the_ids_of_the_clip_that_begins_there(tokenizer, prepared, tmp_path):
    spec = extraction.spec_of(tokenizer, prepared, part_steps=100)
    writer = LatentWriter(tmp_path / "all", spec)
    done = extraction.extract(tokenizer, prepared, writer)
    assert (done.clips, writer.done) == (prepared.num_steps, True)
    # each frame was decoded once, but for those that two parts share
    assert prepared.num_steps <= done.log.seen <= prepared.num_steps + 5 * len(spec.parts)
    ids = LatentIds(tmp_path / "all", prepared)
    encode = jax.jit(
        lambda f: system.encode(tokenizer.params, tokenizer.cfg, tokenizer.codebook, f)
    )
    for row in (0, 17, 29, 64, 101, prepared.num_steps - 1):
        number, step = prepared.locate(row)
        frames = np.asarray(prepared.episode(number).views["head"])
        shown = np.minimum(step + np.arange(6), len(frames) - 1)  # 5 Hz
        wanted = np.asarray(encode(frames[shown][None].astype(np.float32) / 127.5 - 1))[0]
        inside = step + np.arange(1, 6) < len(frames)
        found, mask = ids.read(row)
        assert mask.tolist() == inside.tolist()
        np.testing.assert_array_equal(found[mask], wanted[mask])
    # three processes, one of which comes late
    shared = tmp_path / "shared"
    for host in (2, 0, 1):
        writer = LatentWriter(shared, spec)
        extraction.extract(tokenizer, prepared, writer, host=host, num_hosts=3)
        assert writer.done == (host == 1)
    assert (shared / "ids.bin").read_bytes() == (tmp_path / "all/ids.bin").read_bytes()


def test_codes_of_one_clip_are_those_of_a_batch_of_64_and_of_any_number_of_devices(
    tokenizer, prepared
):
    frames = np.stack(
        [np.asarray(prepared.episode(i % 50).views["head"])[i % 7 : i % 7 + 6] for i in range(64)]
    )
    cfg = tokenizer.cfg

    def encode(batch, devices):
        mesh = sharding.make_mesh({"data": devices}, jax.devices()[:devices])
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        placed = jax.device_put((tokenizer.params, tokenizer.codebook), everywhere)
        one = extraction.Tokenizer(cfg, *placed, "", batch, mesh)
        rows = [np.asarray(one.encode(frames[i : i + batch])) for i in range(0, 64, batch)]
        return np.concatenate(rows)

    wanted = encode(64, 8)
    for batch, devices in ((1, 1), (64, 1), (8, 8)):
        np.testing.assert_array_equal(encode(batch, devices), wanted)


def test_extraction_killed_at_random_ends_with_the_same_bytes(trained, tmp_path, capsys):
    folder = trained[0]
    drawing = {"num_episodes": 400, "num_steps": 30, "image_size": 16, "seed": 0}

    def arguments(name):
        return ("--tokenizer", folder / "run", "--path", "shapes", "--row", "shapes",
                "--format", "shapes", "--drawing", json.dumps(drawing),
                "--work", tmp_path / "work", "--out", tmp_path / name, "--part", 500)  # fmt: skip

    assert extract.main([str(x) for x in arguments("whole")]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["clips"], said["finished"]) == (12000, True)
    parts = tmp_path / "broken/parts"
    assert _killed(
        _command("extract", *arguments("broken")), lambda: len(list(parts.glob("0*"))) >= 2, 0.1
    )
    done = len(list(parts.glob("0*.bin")))
    assert 2 <= done < 24
    assert extract.main([str(x) for x in arguments("broken")]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["clips"] == 12000 - 500 * done
    for name in ("ids.bin", "manifest.json"):
        read = [(tmp_path / d / name).read_bytes() for d in ("whole", "broken")]
        assert read[0] == read[1]
    assert extract.main([str(x) for x in arguments("whole")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["clips"] == 0


def test_the_page_shows_every_code_and_the_monitors(tokenizer, prepared, tmp_path):
    writer = LatentWriter(tmp_path, extraction.spec_of(tokenizer, prepared))
    extraction.extract(tokenizer, prepared, writer)
    latents_page.write(tmp_path / "page.html", tokenizer, prepared, LatentIds(tmp_path, prepared))
    page = (tmp_path / "page.html").read_text()
    for code in range(16):
        assert f"<th>code {code}</th>" in page
    for words in ("perplexity", "error with another clip&#x27;s codes", "data:image/png"):
        assert words in page


def test_a_config_that_cannot_be_used_is_said_in_one_sentence(tmp_path):
    config = _debug(tmp_path)
    config.stage = "x"
    with pytest.raises(ValueError, match="stage 'x' is unknown: expected one of"):
        train.train(config, tmp_path / "run")
    with pytest.raises(ValueError, match="mode is 'x', expected one of"):
        LatentActionConfig(mode="x")
