import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gear_jax.train import exits, loop, sharding
from gear_jax.train.exits import StopRunError
from gear_jax.train.loop import Evaluator, LoopConfig, Stage
from gear_jax.train.optim import OptimConfig

STEPS = 8


class _Stream:
    """Numbered batches; may fail or give a NaN at chosen steps."""

    def __init__(self, state, fail_at=None, bad=()):
        self.place = 0 if state is None else state["samples"]
        self.fail_at, self.bad = fail_at, bad

    def __next__(self):
        step = self.place // 8
        if step == self.fail_at:
            raise KeyboardInterrupt
        rng = np.random.default_rng(step)
        x = rng.standard_normal((8, 3)).astype(np.float32)
        if step in self.bad:
            x[2] = np.nan
        batch = {"x": x, "sample": np.arange(self.place, self.place + 8)}
        self.place += 8
        return batch

    def state(self):
        return {"samples": self.place}

    def close(self):
        pass


def _stage(**stream):
    def init(rng):
        return {"w": jax.random.normal(rng, (3, 2))}, {"seen": jnp.zeros(())}

    def loss(params, extra, batch, rng):
        noise = jax.random.normal(rng, (8, 2))
        value = jnp.mean((batch["x"] @ params["w"] - noise) ** 2)
        return value, ({"seen": extra["seen"] + 1}, {"mean": batch["x"].mean()})

    return Stage(
        name="test",
        init=init,
        loss=loss,
        optim=OptimConfig(0.1, 2, STEPS, ((".*", "all"),)),
        rules=(("w", ("fsdp", None)),),
        open_stream=lambda state: _Stream(state, **stream),
        arrays=lambda batch: {"x": batch["x"]},
        evaluators={"norm": Evaluator(4, lambda state: {"w": float(jnp.sum(state.params["w"]))})},
        ema_decay=0.9,
    )


def _run(workdir, stage=None, record=None, **config):
    mesh = sharding.make_mesh({"data": 8})
    options = {"log_every": 2, "checkpoint_every": 3, **config}
    stage = dataclasses.replace(stage or _stage(), rules=(("w", (None, None)),))
    return loop.run(
        stage, LoopConfig(**options), workdir, mesh, seed=1, record=record or {"a": {"b": 1}},
        say=lambda line: None,
    )  # fmt: skip


def _bits(state):
    raw = dataclasses.replace(state, rng=jax.random.key_data(state.rng))
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(raw)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, _run(workdir)


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_run_that_breaks_off_anywhere_ends_bitwise_as_one_that_does_not(whole, tmp_path, step):
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, _stage(fail_at=step))
    state = _run(tmp_path)
    assert _bits(state) == _bits(whole[1])
    straight, resumed = (
        [json.loads(line) for line in (d / "metrics.jsonl").read_text().splitlines()]
        for d in (whole[0], tmp_path)
    )

    def learned(rows):
        timing = ("samples_per_second", "data_wait")
        return [{k: v for k, v in row.items() if k not in timing} for row in rows]

    assert learned(straight) == learned(resumed)


def test_everything_is_in_the_state_and_the_log(whole):
    workdir, state = whole
    assert int(state.step) == STEPS
    assert float(state.extra["seen"]) == STEPS
    assert (state.ema["w"] != state.params["w"]).all()
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 4, 6, 8, 8]
    assert {"loss", "grad_norm", "mean", "data_wait"} <= set(rows[0])
    assert "norm/w" in rows[2]


def test_a_step_that_is_not_finite_changes_nothing_but_its_count(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "a", _stage(bad=(3,), fail_at=4), checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "b", _stage(fail_at=3), checkpoint_every=1)
    found = [_run(tmp_path / n, _stage(fail_at=None), checkpoint_every=1) for n in "ab"]
    seen = [float(state.extra["seen"]) for state in found]
    assert seen == [STEPS - 1, STEPS]


def test_too_many_of_them_end_the_run_and_name_the_samples(tmp_path):
    with pytest.raises(StopRunError, match=r"not finite 3 times in a row, last for samples 40 to"
                       ) as error:  # fmt: skip
        _run(tmp_path, _stage(bad=(3, 4, 5, 6, 7)), max_bad_steps=3)
    assert error.value.code == exits.NOT_FINITE


def test_another_config_is_refused_by_the_name_of_what_changed(whole):
    with pytest.raises(StopRunError, match=r"config\.a\.b was 1 and is 2") as error:
        _run(whole[0], record={"a": {"b": 2}})
    assert error.value.code == exits.DATA


def test_resume_says_whether_a_run_may_begin_or_go_on(whole, tmp_path):
    with pytest.raises(StopRunError, match="no checkpoint, and resume is 'must'"):
        _run(tmp_path / "typo", resume="must")
    with pytest.raises(StopRunError, match="step 8 is there, and resume is 'never'"):
        _run(whole[0], resume="never")
    again = _run(whole[0])
    assert _bits(again) == _bits(whole[1])


def test_two_trainers_cannot_work_in_one_folder(tmp_path):
    held = loop._lock(tmp_path)
    with pytest.raises(StopRunError, match=r"another trainer works here \(process \d+ on"):
        _run(tmp_path)
    held.close()
    assert int(_run(tmp_path).step) == STEPS


def test_a_disk_that_cannot_be_written_ends_with_its_own_code(tmp_path, monkeypatch):
    from gear_jax.train.run_checkpoints import RunCheckpoints

    def full(self, *args, **kwargs):
        self._fail(3, OSError(28, "No space left on device"))

    monkeypatch.setattr(RunCheckpoints, "save", full)
    with pytest.raises(StopRunError, match="could not be saved: .*No space left") as error:
        _run(tmp_path)
    assert error.value.code == exits.SAVE


def test_the_loop_alone_asks_for_a_preemption_once_a_step(tmp_path, monkeypatch):
    """Orbax's thread asks about older steps; JAX would then agree on one that is over."""
    asked = []
    monkeypatch.setattr(
        loop.multihost_utils, "reached_preemption_sync_point", lambda step: asked.append(step)
    )
    _run(tmp_path, checkpoint_every=1)
    assert asked == list(range(1, STEPS + 1))


def test_loaded_parameters_begin_a_run_and_its_average_and_never_a_resumed_one(tmp_path):
    asked = []

    def load(params):
        asked.append(params["w"].sharding)
        return {"w": jax.device_put(jnp.full((3, 2), 7.0), params["w"].sharding)}

    stage = dataclasses.replace(_stage(fail_at=0), load=load, ema_decay=1.0)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, stage)  # before any step: begins again
    stage = dataclasses.replace(_stage(fail_at=4), load=load, ema_decay=1.0)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, stage)
    assert len(asked) == 2
    state = _run(tmp_path, dataclasses.replace(_stage(), load=load, ema_decay=1.0))
    assert len(asked) == 2
    np.testing.assert_array_equal(state.ema["w"], np.full((3, 2), 7.0))
    assert (np.asarray(state.params["w"]) != 7).all()


def test_loaded_parameters_of_another_shape_are_refused_by_name(tmp_path):
    stage = dataclasses.replace(_stage(), load=lambda p: {"w": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match=r"w is float32\(2, 2\) on .* expected float32\(3, 2\)"):
        _run(tmp_path / "a", stage)
    stage = dataclasses.replace(_stage(), load=lambda p: {"v": p["w"]})
    with pytest.raises(ValueError, match="load gave parameters .*'v'.*: expected .*'w'"):
        _run(tmp_path / "b", stage)


def test_time_alone_asks_for_a_checkpoint_where_a_line_is_due(tmp_path):
    steps = {}
    for minutes in (0.0, 60.0):
        workdir = tmp_path / str(minutes)
        _run(workdir, checkpoint_every=100, checkpoint_minutes=minutes, keep=10)
        steps[minutes] = sorted(int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*"))
    assert steps == {0.0: [2, 4, 6, 8], 60.0: [8]}


def test_rows_that_do_not_fill_the_mesh_in_parts_are_refused(tmp_path):
    stage = dataclasses.replace(_stage(), optim=dataclasses.replace(_stage().optim, accumulate=2))
    with pytest.raises(ValueError, match=r"8 rows .* a multiple of 8 \(places of the mesh\) x 2"):
        _run(tmp_path, stage)
