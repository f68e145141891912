"""Parameters of a run, published and begun with."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import policy_gear
from gear_jax.tokenizers.fast import FastTokenizer
from gear_jax.train import checkpoint, start
from gear_jax.train.gear import make_model
from gear_jax.train.run_checkpoints import RunCheckpoints
from launch import publish


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir as the loop leaves it, without the training."""
    folder = tmp_path_factory.mktemp("run")
    config = policy_gear.get_config("debug")
    config.data.fast.path = str(folder / "fast")
    chunks = np.random.default_rng(0).uniform(-1, 1, (50, 30, 20))
    FastTokenizer.fit(chunks, vocab_size=400).save(config.data.fast.path)
    params, _ = make_model(config).init(jax.random.key(0))
    (folder / "config.json").write_text(config.to_json())
    checkpoints = RunCheckpoints(folder / "checkpoints")
    checkpoints.save(3, {"params": params, "step": jnp.array(3)}, {"data": {}})
    checkpoints.finish(3)
    checkpoints.close()
    return folder, params


def _publish(folder, target, *more):
    return publish.main(["--run", str(folder), "--target", str(target), *more])


def test_chosen_parameters_are_published_in_the_dtype_that_is_asked(run, tmp_path, capsys):
    folder, params = run
    target = tmp_path / "out"
    assert _publish(folder, target, "--only", "(vision|language)/.*", "--dtype", "bfloat16") == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    kept = {name: params[name] for name in ("vision", "language")}
    assert said["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(kept))
    checkpoint.verify_digests(target)
    assert set(checkpoint.stored_dtypes(target).values()) == {jnp.dtype("bfloat16")}
    assert json.loads((target / "manifest.json").read_text())["step"] == 3
    for file in (folder / "fast").iterdir():
        assert (target / "fast" / file.name).read_bytes() == file.read_bytes()


def test_a_run_begins_with_what_was_published(run, tmp_path):
    folder, params = run
    target = tmp_path / "out"
    assert _publish(folder, target, "--only", "(?!expert/).*") == 0
    init = {"published": str(target), "fresh": ("expert/.*",), "unused": (), "trained": (),
            "fresh_rows": (), "rows_like": (), "deeper": False}  # fmt: skip
    zeros = jax.tree.map(jnp.zeros_like, params)
    begun = start.loader(init, 10**6, lambda line: None)(zeros)
    for name in params:
        expected = zeros if name == "expert" else params
        jax.tree.map(np.testing.assert_array_equal, begun[name], expected[name])


def test_what_cannot_be_published_is_said_in_one_sentence(run, tmp_path, capsys):
    folder, _ = run
    assert _publish(folder, tmp_path / "none", "--only", "nothing/.*") == 4
    assert "--only 'nothing/.*' names no parameter" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert _publish(tmp_path, tmp_path / "x") == 4
    assert "config.json" in capsys.readouterr().err
    pathlib.Path(tmp_path / "there").mkdir()
    assert _publish(folder, tmp_path / "there") == 4
    assert "already exists" in capsys.readouterr().err
