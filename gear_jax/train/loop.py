"""The one training loop: any stage, any mesh, killed and resumed to the bit.

    stage, config -> restore or initialise -> [batch -> step -> log, evaluate, save] -> final step

Metrics are read one step late, so that the device never waits for the host. The place in the data
is one number and lies in the same checkpoint as the state. All processes save the same steps: those
of a cadence, that process 0 finds due by its clock, and the one agreed on after a SIGTERM to any.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from gear_jax.train import exits, sharding
from gear_jax.train.exits import StopRunError
from gear_jax.train.log import Log
from gear_jax.train.optim import OptimConfig, make_tx
from gear_jax.train.run_checkpoints import NoCheckpointError, RunCheckpoints, SaveError
from gear_jax.train.state import TrainState, make_train_step, new_state, state_shardings
from gear_jax.train.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Something measured between steps.

    Attributes:
        every: steps between two measurements; one is also made at the end.
        run: state -> {name: number}; may raise StopRunError.
    """

    every: int
    run: Callable[[TrainState], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one stage of training brings to the loop.

    Attributes:
        name: latents, pretrain, policy, adapt.
        init: rng -> params, extra.
        loss: params, extra, batch, rng -> loss, (extra, metrics).
        optim: the optimiser; its num_steps is the length of the run.
        rules: sharding of the parameters.
        open_stream: state of the data or None -> batches of this host, with `state()`, `close()`.
        arrays: batch of this host -> arrays that go to the devices.
        evaluators: by name.
        ema_decay: or None.
        load: params of a run that begins, sharded -> params to begin with, the same in tree,
            shapes, dtypes and shardings; None keeps them.
        flops_per_sample: of the model, for one sample's step; None leaves "mfu" out of the log.
        files: {name: text} that a user of the checkpoints needs, kept beside config.json.
    """

    name: str
    init: Callable
    loss: Callable
    optim: OptimConfig
    rules: Sequence[tuple[str, tuple]]
    open_stream: Callable[[Mapping[str, Any] | None], Any]
    arrays: Callable[[dict[str, Any]], dict[str, np.ndarray]]
    evaluators: Mapping[str, Evaluator] = dataclasses.field(default_factory=dict)
    ema_decay: float | None = None
    load: Callable[[Any], Any] | None = None
    flops_per_sample: float | None = None
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How a run is run; none of it changes what is learned.

    Attributes:
        log_every: steps between two lines.
        checkpoint_every: steps between two checkpoints.
        checkpoint_minutes: and after so much time as well, looked at where a line is due.
        keep: newest checkpoints that stay.
        keep_every: checkpoints at multiples of this stay as well; None keeps no others.
        max_bad_steps: steps in a row that may be not finite.
        watchdog_minutes: that a step or its data may take; compiling, evaluating and saving may
            take 6 times as long.
        resume: "auto" goes on where there is something, "must" refuses to begin, "never" refuses
            to go on.
    """

    log_every: int = 50
    checkpoint_every: int = 1000
    checkpoint_minutes: float = 20.0
    keep: int = 3
    keep_every: int | None = None
    max_bad_steps: int = 10
    watchdog_minutes: float = 10.0
    resume: Literal["auto", "must", "never"] = "auto"


def run(
    stage: Stage,
    config: LoopConfig,
    workdir: str | os.PathLike,
    mesh: jax.sharding.Mesh,
    *,
    seed: int,
    record: Mapping[str, Any],
    say: Callable[[str], None] = print,
) -> TrainState:
    """Train to the last step, from the newest checkpoint of `workdir` where there is one.

    Args:
        stage: what to train.
        config: cadences.
        workdir: of this run; config.json, metrics.jsonl and checkpoints/ are written there.
        mesh: with the axes of `sharding.AXES`.
        seed: of parameters and steps.
        record: JSON, the config of the run; a checkpoint made under another is refused.
        say: prints a line.

    Returns:
        The state after the last step, saved.

    Raises:
        StopRunError: with the exit code that fits; PREEMPTED after a SIGTERM, once all is saved.
        DataError: data that cannot be used, or are not those of the checkpoint.
    """
    workdir = pathlib.Path(workdir).absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    lock = _lock(workdir)
    checkpoints, watch = None, Watchdog(config.watchdog_minutes)
    say = say if jax.process_index() == 0 else _nothing
    try:
        with jax.set_mesh(mesh):
            checkpoints = RunCheckpoints(
                workdir / "checkpoints", keep=config.keep, keep_every=config.keep_every
            )
            return _run(stage, config, workdir, mesh, seed, record, say, checkpoints, watch)
    except SaveError as error:
        raise StopRunError(exits.SAVE, str(error)) from error
    except NoCheckpointError as error:
        raise StopRunError(exits.NO_CHECKPOINT, str(error)) from error
    finally:
        if checkpoints is not None:
            with contextlib.suppress(SaveError):  # said already, or lost with a run that failed
                checkpoints.close()
        watch.stop()
        lock.close()


def _nothing(_):
    pass


def _run(stage, config, workdir, mesh, seed, record, say, checkpoints, watch):
    params, _ = jax.eval_shape(stage.init, jax.random.key(0))
    tx = make_tx(params, stage.optim)
    make = functools.partial(new_state, stage.init, tx, seed, stage.ema_decay is not None)
    shapes = jax.eval_shape(make)
    shardings = state_shardings(shapes, mesh, stage.rules)
    state, data = _begin(stage, config, checkpoints, make, shapes, shardings, record, say)
    if jax.process_index() == 0:
        for name, text in {"config.json": json.dumps(record, indent=1), **stage.files}.items():
            (workdir / name).write_text(text)
    begun, num_steps = int(state.step), stage.optim.num_steps
    rows = sharding.batch_sharding(mesh)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    step_fn = jax.jit(
        make_train_step(stage.loss, tx, stage.ema_decay, stage.optim.accumulate),
        donate_argnums=0,
        in_shardings=(shardings, rows),
        out_shardings=(shardings, everywhere),
    )
    log = Log(workdir, begun, num_steps, config, stage.flops_per_sample, say)
    clock = _Clock(config)
    watch.at("opening the data", slow=True)
    stream, late = stage.open_stream(data), None
    try:
        for step in range(begun + 1, num_steps + 1):
            watch.at(f"data of step {step}", slow=step == begun + 1)
            waited = time.perf_counter()
            batch = _next(stream, step)
            log.waited += time.perf_counter() - waited
            watch.at(f"step {step}", slow=step == begun + 1)
            arrays = _to_devices(stage.arrays(batch), rows, stage.optim.accumulate)
            state, metrics = step_fn(state, arrays)
            if late is not None:
                log.step(*late)
            late = step, metrics, batch["sample"]
            checkpoints.poll()
            last = step == num_steps
            due = [n for n, one in stage.evaluators.items() if step % one.every == 0 or last]
            preempted = multihost_utils.reached_preemption_sync_point(step) and not last
            save = step % config.checkpoint_every == 0 or last or preempted or clock.due(step)
            if due or save:
                log.step(*late)
                late = None
            if due and not preempted:
                watch.at(f"evaluation after step {step}", slow=True)
                log.evaluated(step, due, stage.evaluators, state)
            if save:
                watch.at(f"saving step {step}", slow=True)
                meta = {"data": stream.state(), "record": record, "mesh": dict(mesh.shape)}
                checkpoints.save(step, state, meta)
                clock.saved()
            if preempted:
                checkpoints.finish(step)
                raise StopRunError(
                    exits.PREEMPTED, f"preempted: step {step} is saved; launch again to go on"
                )
    finally:
        stream.close()
        log.close()
    watch.at("finishing the last checkpoint", slow=True)
    checkpoints.finish(num_steps)
    return state


def _next(stream, step):
    try:
        return next(stream)
    except RuntimeError as error:  # a worker is gone
        raise StopRunError(
            exits.INTERNAL, f"data of step {step}: {error}; launch again to go on"
        ) from error


def _to_devices(arrays, rows, accumulate):
    """Rows of this host, on its devices."""
    count = len(next(iter(arrays.values())))
    places = rows.addressable_devices_indices_map((rows.num_devices,))
    parts = len({where.start for (where,) in places.values()})
    if count % (parts * accumulate):
        raise ValueError(
            f"{count} rows of a batch on this host: expected a multiple of {parts} (places of the "
            f"mesh) x {accumulate} (optim.accumulate)"
        )
    return {k: jax.make_array_from_process_local_data(rows, v) for k, v in arrays.items()}


class _Clock:
    """When time alone asks for a checkpoint: process 0 decides, and all look at the same steps."""

    def __init__(self, config):
        self._every, self._seconds = config.log_every, 60 * config.checkpoint_minutes
        self.saved()

    def saved(self):
        self._since = time.monotonic()

    def due(self, step):
        if step % self._every:
            return False
        late = time.monotonic() - self._since >= self._seconds
        if jax.process_count() > 1:
            late = multihost_utils.broadcast_one_to_all(np.array(late))
        return bool(late)


def _begin(stage, config, checkpoints, make, shapes, shardings, record, say):
    """The state to go on from, and the state of its data."""
    targets = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes, shardings
    )
    restored = checkpoints.restore(targets, say=say)
    where = checkpoints.directory
    if restored is None:
        if config.resume == "must":
            raise StopRunError(exits.NO_CHECKPOINT, f"{where}: no checkpoint, and resume is 'must'")
        state = jax.jit(make, out_shardings=shardings)()
        return (state if stage.load is None else _loaded(state, stage.load)), None
    if config.resume == "never":
        raise StopRunError(
            exits.NO_CHECKPOINT,
            f"{where}: step {restored.step} is there, and resume is 'never'",
        )
    changed = sorted(_differences(restored.meta["record"], json.loads(json.dumps(record))))
    if changed:
        raise StopRunError(
            exits.DATA,
            f"{where}, step {restored.step}: made with another config: {', '.join(changed[:5])}; "
            "go on with what it was made with, or choose another workdir",
        )
    say(f"resumed at step {restored.step}")
    return restored.state, restored.meta["data"]


def _loaded(state, load):
    """The state that begins with the parameters of `load`, and its average with them too."""
    params = load(state.params)
    wanted, got = jax.tree.structure(state.params), jax.tree.structure(params)
    if got != wanted:
        raise ValueError(f"load gave parameters {got}: expected {wanted}")
    faults = [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} is {new.dtype}{new.shape} on "
        f"{new.sharding}: expected {old.dtype}{old.shape} on {old.sharding}"
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(state.params), jax.tree.leaves(params), strict=True
        )
        if (old.shape, old.dtype) != (new.shape, new.dtype)
        or not new.sharding.is_equivalent_to(old.sharding, old.ndim)
    ]
    if faults:
        raise ValueError(f"load gave other parameters: {'; '.join(faults[:5])}")
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, ema=ema)


def _differences(old: Any, new: Any, path: str = "config") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {*old, *new}:
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}")
    elif old != new:
        yield f"{path} was {old!r} and is {new!r}"


def _lock(workdir: pathlib.Path):
    """Keep other trainers out of a directory for as long as this process lives."""
    file = (workdir / f"trainer-{jax.process_index()}.lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise StopRunError(
            exits.DATA, f"{workdir}: another trainer works here ({owner}); choose another workdir"
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}")
    file.flush()
    return file
