"""Checkpoints of a run in progress: state, data position and manifest as one step directory.

A step counts only when Orbax has committed it and its digests are written: `steps` lists no other.
Deleting is one rename into a bin that is emptied later, so a killed deletion leaves no half step
behind (reliability.md, findings 1 and 2).
"""

import concurrent.futures
import dataclasses
import pathlib
import shutil
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from gear_jax.train import checkpoint

_BIN, _STATE, _META = ".trash", "state", "meta"
_SPARE = 1.2  # of a state's bytes must be free before it is written
_TRIES = 5  # of a reader, where a trainer deletes what it reads
_SEAL_SECONDS = 1.0  # until it looks again, where the only step has no digests yet
_QUIET_SECONDS, _CLEAR_SECONDS = 1.0, 10.0  # nothing of a failed save came back; at most this long


class NoCheckpointError(Exception):
    """Steps are there, and none of them can be used."""


class SaveError(Exception):
    """A checkpoint could not be written."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a step holds: `state` as the targets ask, `meta` as it was given, its files' digest."""

    step: int
    state: Any
    meta: dict[str, Any]
    digest: str


class _Manager(ocp.CheckpointManager):
    """Leaves it to the training loop to ask whether a preemption has been announced.

    JAX takes the last step anybody asked about for the newest of this process. Orbax asks as well,
    from the thread that finishes a save, about a step that the loop has passed: a notice that comes
    just then is agreed on for a step that is over, and nobody stops.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class RunCheckpoints:
    """The checkpoints below one directory; one trainer writes, anybody may read."""

    def __init__(self, directory, *, keep: int = 3, keep_every: int | None = None, read_only=False):
        """Open the directory; a trainer also clears what a killed one left.

        Args:
            directory: made where it is not there.
            keep: newest steps that stay.
            keep_every: steps that are multiples of this stay as well.
            read_only: for readers: nothing is written or cleared.
        """
        self.directory = pathlib.Path(directory).absolute()
        self._leads = jax.process_index() == 0 and not read_only
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._sealing: concurrent.futures.Future | None = None
        self._saving: int | None = None
        self._read_only, self._bytes = read_only, 0
        if self._leads:
            self._clear("*")
        self._manager = self._make_manager(keep, keep_every)
        if self._leads:
            self._empty_bin()
            for step in self._manager.all_steps():  # committed, and then a kill came
                if not checkpoint.has_digests(self.path(step)):
                    checkpoint.write_digests(self.path(step), "crc32c")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints are open")

    def _make_manager(self, keep: int, keep_every: int | None) -> Any:
        if self._read_only:
            return None  # its listing fails where a trainer deletes a step meanwhile
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            keep_period=keep_every,
            todelete_subdir=_BIN,
            cleanup_tmp_directories=True,
            save_interval_steps=1,
        )
        handlers = {_STATE: ocp.StandardCheckpointHandler(), _META: ocp.JsonCheckpointHandler()}
        return _Manager(self.directory, options=options, item_handlers=handlers)

    def steps(self) -> list[int]:
        """Committed steps with digests, oldest first."""
        names = [path.name for path in self.directory.glob("*") if checkpoint.has_digests(path)]
        return sorted(int(name) for name in names if name.isdecimal())

    def path(self, step: int) -> pathlib.Path:
        """Directory of a step."""
        return self.directory / str(step)

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Begin to save; the arrays are copied from the devices before this returns.

        Args:
            step: not saved yet.
            state: tree of arrays.
            meta: JSON.

        Raises:
            SaveError: this save, or the one before, could not be written.
        """
        self.wait()
        self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        try:
            if self._leads:
                self._look_before()
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{_STATE: ocp.args.StandardSave(state), _META: ocp.args.JsonSave(meta)}
                ),
                force=True,
            )
        except jax.errors.JaxRuntimeError:
            raise  # another process is gone: no fault of the disk
        except Exception as error:
            self._fail(step, error)
        self._saving = step

    def poll(self) -> None:
        """Seal a save that has been committed; cheap, call it every step.

        Raises:
            SaveError: it could not be written.
        """
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self._seal(self._saving)
        if self._sealing is not None and self._sealing.done():
            self._finish_seal(self._sealing)

    def wait(self) -> None:
        """Return when everything begun is committed and sealed.

        Raises:
            SaveError: it could not be written.
        """
        if self._saving is not None:
            self._seal(self._saving)
        if self._sealing is not None:
            self._finish_seal(self._sealing)

    def finish(self, step: int) -> None:
        """Return when everything is written, and `step` was read back as it was written.

        Raises:
            SaveError: it was not.
        """
        self.wait()
        if self._leads:
            try:
                checkpoint.verify_digests(self.path(step))
            except (OSError, ValueError) as error:
                raise SaveError(f"{self.path(step)}: was saved, and then: {error}") from error

    def _seal(self, step: int) -> None:
        self._saving = None
        try:
            self._manager.wait_until_finished()
            if step not in self._manager.all_steps():
                raise OSError("it was not committed")
        except jax.errors.JaxRuntimeError:
            raise  # another process is gone: no fault of the disk
        except Exception as error:
            self._fail(step, error)
        if self._leads:
            self._sealing = self._pool.submit(self._write_digests, self.path(step))

    def _write_digests(self, path: pathlib.Path) -> None:
        checkpoint.write_digests(path, "crc32c")
        self._empty_bin()

    def _finish_seal(self, sealing: concurrent.futures.Future) -> None:
        self._sealing = None
        try:
            sealing.result()
        except OSError as error:
            raise SaveError(f"{self.directory}: digests could not be written: {error}") from error

    def _fail(self, step, error):
        """Remove what a failed save left, so that it does not keep a full disk full."""
        free = self._free()
        if self._leads:
            self._clear_failed(step)
        needed = int(_SPARE * self._bytes)
        said = str(error)
        if len(said) > 700:  # Orbax names long paths first and the reason last
            said = f"{said[:300]} ... {said[-400:]}"
        raise SaveError(
            f"{self.path(step)}: could not be saved: {said}; {needed} bytes are needed "
            f"and {free} were free"
        ) from error

    def _look_before(self) -> None:
        known = self._manager.all_steps()
        if known and not self.path(max(known)).is_dir():  # Orbax would begin an empty directory
            raise OSError(f"step {max(known)}, which was there, has vanished")
        if self._free() < _SPARE * self._bytes:
            raise OSError("the disk is too full to begin")

    def _free(self) -> int:
        folder = next(one for one in (self.directory, *self.directory.parents) if one.exists())
        return shutil.disk_usage(folder).free

    def _clear_failed(self, step: int) -> None:
        """Remove a failed save's files, and those that its other writers still add.

        Orbax says that one file failed while TensorStore goes on with the rest in its own threads,
        which also make the directory anew. Nobody can wait for them.
        """
        begun = quiet_since = time.monotonic()
        while (now := time.monotonic()) - quiet_since < _QUIET_SECONDS:
            if now - begun > _CLEAR_SECONDS:
                return  # a disk that is read-only keeps it; the next trainer clears it
            if self._clear(step):
                quiet_since = now
            time.sleep(0.02)

    def _clear(self, step) -> bool:
        """Remove what a save that never ended left of a step; whether anything was there."""
        found = list(self.directory.glob(f"{step}.orbax-checkpoint-tmp*"))
        for left in found:
            shutil.rmtree(left, ignore_errors=True)
        return bool(found)

    def _empty_bin(self) -> None:
        for left in (self.directory / _BIN).glob("*"):
            shutil.rmtree(left, ignore_errors=True)

    def restore(self, targets: Any, *, say=print) -> Restored | None:
        """The newest step whose files are what was written, or None when there is no step at all.

        Args:
            targets: tree of ShapeDtypeStruct with shardings.
            say: told of every step that is passed over, and why.

        Raises:
            NoCheckpointError: there are steps, and all are damaged.
            ValueError: the stored tree is not the one that `targets` describes.
        """
        step = self._newest_whole(say)
        if step is None:
            return None
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            try:
                state = checkpointer.restore(
                    self.path(step) / _STATE, args=ocp.args.StandardRestore(targets)
                )
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path(step)}: not the parameters this config makes: {error}"
                ) from error
        return Restored(step, state, self._meta(step), checkpoint.digest(self.path(step)))

    def restore_part(self, targets: Any, *, say=print) -> Restored:
        """Some of the newest whole step's arrays, such as the parameters without the optimiser.

        A trainer may delete the step meanwhile. A step is never written twice and goes all at once,
        so what was read is right if the step is still there afterwards; else the newest is read.

        Args:
            targets: tree of ShapeDtypeStruct with shardings, of the keys that are wanted.
            say: told of every step that is passed over, and why.

        Raises:
            NoCheckpointError: no step, or all are damaged, or deleted while they are read.
            ValueError: the stored arrays are not those that `targets` describes.
        """
        for _ in range(_TRIES):
            known = set(self.steps())
            if not known and any(path.name.isdecimal() for path in self.directory.glob("*")):
                say(f"{self.directory}: the only step has no digests yet")
                time.sleep(_SEAL_SECONDS)
                continue
            try:
                found = self._read_part(self.newest(say=say), targets)
            except Exception:
                if known <= set(self.steps()):
                    raise
            else:
                if found.step in self.steps():
                    return found
            gone = sorted(known - set(self.steps()))
            say(f"{self.directory}: steps {gone} were deleted while they were read")
        raise NoCheckpointError(
            f"{self.directory}: {_TRIES} times a step was not whole yet, or was deleted while it "
            "was read: expected a trainer that keeps more of them (loop.keep)"
        )

    def _read_part(self, step: int, targets: Any) -> Restored:
        arguments = ocp.checkpoint_utils.construct_restore_args(targets)
        with ocp.PyTreeCheckpointer() as checkpointer:
            try:
                state = checkpointer.restore(
                    self.path(step) / _STATE,
                    args=ocp.args.PyTreeRestore(targets, arguments, partial_restore=True),
                )
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{self.path(step)}: not the arrays this config makes: {error}"
                ) from error
        return Restored(step, state, self._meta(step), checkpoint.digest(self.path(step)))

    def newest(self, *, say=print) -> int:
        """The newest step whose files are what was written.

        Raises:
            NoCheckpointError: no step, or all are damaged.
        """
        step = self._newest_whole(say)
        if step is None:
            raise NoCheckpointError(f"{self.directory}: no checkpoint")
        return step

    def _newest_whole(self, say) -> int | None:
        """A reader looks for itself; trainers go by what process 0 finds."""
        if self._read_only or jax.process_count() == 1:
            return self._search(say)
        found, error = None, None
        if self._leads:
            try:
                found = self._search(say)
            except NoCheckpointError as damaged:
                found, error = -2, damaged
        step = int(multihost_utils.broadcast_one_to_all(np.array(-1 if found is None else found)))
        if step == -2:
            raise error or NoCheckpointError(f"{self.directory}: all steps are damaged")
        return None if step == -1 else step

    def _search(self, say) -> int | None:
        steps = self.steps()
        for step in reversed(steps):
            try:
                checkpoint.verify_digests(self.path(step))
            except ValueError as error:
                say(f"step {step} is passed over: {error}")
                continue
            return step
        if steps:
            raise NoCheckpointError(f"{self.directory}: steps {steps}: all damaged")
        return None

    def _meta(self, step: int) -> dict[str, Any]:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            return checkpointer.restore(self.path(step) / _META)

    def close(self) -> None:
        """Wait, and let go of the directory."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            if self._manager is not None:
                self._manager.close()
