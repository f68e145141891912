"""The evaluation's side of environment workers: start, ask, wait for whichever is ready, end.

A worker is a process that connects back to one loopback port with a token made for it alone. One
request is outstanding at a time; `wait` looks at many workers at once, so one thread is enough.
Start workers from the main thread: they end with the thread that started them.
"""

import contextlib
import dataclasses
import hmac
import json
import os
import pathlib
import secrets
import select
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import gear_jax
from gear_jax.evals import wire
from gear_jax.evals.sims.base import Task
from gear_jax.evals.worker import TOKEN
from gear_jax.types import Observation

_ROOT = pathlib.Path(gear_jax.__file__).parents[1]


class WorkerGoneError(Exception):
    """A worker died, said nonsense or was silent too long; another may be started."""


class WorkerError(Exception):
    """A simulator failed in a way that starting it again would not change."""


@dataclasses.dataclass(frozen=True)
class WorkerConfig:
    """How workers are started; only `sim` and `options` may change a result.

    Attributes:
        sim: a name in `worker.SIMULATORS`.
        options: of the simulator.
        python: executable of the virtual environment that has the simulator.
        timeout: seconds to wait for a reply before the worker counts as gone.
        environment: variables to set, such as MUJOCO_GL.
    """

    sim: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    python: str = sys.executable
    timeout: float = 600.0
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


class RemoteSimulator:
    """One worker: a simulator's operations, asked for now and taken later."""

    def __init__(self, config: WorkerConfig, number: int = 0):
        """Start the process; it need not have connected when this returns."""
        self.config, self.name = config, f"worker {number} ({config.sim})"
        self._token = secrets.token_hex(16)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._connection: socket.socket | None = None
        self._request: dict[str, Any] | None = None
        self._deadline = 0.0
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        paths = [str(_ROOT)]
        if config.python == sys.executable and os.environ.get("PYTHONPATH"):
            paths.append(os.environ["PYTHONPATH"])
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", **config.environment,
            "PYTHONPATH": os.pathsep.join(paths), TOKEN: self._token,
        }  # fmt: skip
        command = [config.python, "-m", "gear_jax.evals.worker", "--sim", config.sim]
        command += ["--options", json.dumps(dict(config.options)), "--parent", str(os.getpid())]
        command += ["--connect", f"127.0.0.1:{port}"]
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
                env=environment,
            )  # fmt: skip
        except OSError as error:
            self._listener.close()
            self._log.close()
            raise ValueError(f"{self.name} cannot be started: {error}") from error

    def ask(self, op: str, **arguments: Any) -> None:
        """Send a request; `take` its reply before the next one."""
        assert self._request is None, f"{self.name} is still busy with {self._request}"
        self._request = {"op": op, **arguments}
        self._deadline = time.monotonic() + self.config.timeout
        if self._connection is not None:
            self._send()

    def poll(self) -> bool:
        """Whether `take` would return or raise now; a process that just connected is let in."""
        if self._connection is None:
            if select.select([self._listener], [], [], 0)[0]:
                self._let_in()
        elif select.select([self._connection], [], [], 0)[0]:
            return True
        dead = self._connection is None and self.process.poll() is not None
        return dead or time.monotonic() > self._deadline

    def take(self) -> Any:
        """The reply to what was asked; call when `poll` or `wait` says so.

        Raises:
            WorkerGoneError: it died, or its reply is late or malformed.
            ValueError: the simulator refused what it was given.
            WorkerError: the simulator failed.
        """
        request, self._request = self._request, None
        assert request is not None, f"{self.name} was asked nothing"
        try:
            if self._connection is None:
                raise ConnectionError("never connected")
            if not select.select([self._connection], [], [], 0)[0]:
                raise TimeoutError(f"no reply in {self.config.timeout:g} s")
            self._connection.settimeout(max(1.0, self._deadline - time.monotonic()))
            reply = wire.receive(self._connection)
        except (OSError, wire.WireError) as error:
            raise self._gone(request["op"], error) from error
        if not isinstance(reply, dict):
            raise self._gone(request["op"], "the reply is no map")
        if "error" in reply:
            what = f"{self.name}, {request['op']}: {reply['error']}"
            if reply.get("kind") == "ValueError":
                raise ValueError(what)
            raise WorkerError(f"{what} [{reply.get('kind')}]")
        return reply

    def call(self, op: str, **arguments: Any) -> Any:
        """Ask, wait and take."""
        self.ask(op, **arguments)
        wait([self])
        return self.take()

    def fileno(self) -> int:
        """What becomes readable next."""
        return (self._connection or self._listener).fileno()

    def close(self) -> None:
        """End the process, whatever it is doing."""
        for one in (self._connection, self._listener):
            if one is not None:
                one.close()
        if self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1.0 if self._request is None else 0.05)  # it sees the end
        self.process.kill()
        self.process.wait()
        self._log.close()

    def _let_in(self):
        """Accept the worker; who has not the token is sent away."""
        connection, _ = self._listener.accept()
        connection.settimeout(10.0)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            shown = wire.receive(connection)
            token = shown["token"] if isinstance(shown, dict) else ""
            if not hmac.compare_digest(str(token).encode(), self._token.encode()):
                raise wire.WireError("wrong token")
        except (OSError, wire.WireError, KeyError):
            connection.close()
            return
        self._connection = connection
        if self._request is not None:
            self._send()

    def _send(self):
        assert self._connection is not None
        self._connection.settimeout(self.config.timeout)
        with contextlib.suppress(OSError):  # `take` finds out why
            wire.send(self._connection, self._request)

    def _gone(self, op, error):
        if self.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.2)  # a closed socket comes a moment before the exit code
        code = self.process.poll()
        how = "is running" if code is None else f"ended with {code}"
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 2000))
        last = self._log.read().decode(errors="replace").strip().rsplit("\n", 1)[-1]
        said = f'; it said last: "{last[:200]}"' if last else ""
        return WorkerGoneError(f"{self.name} failed in {op}: {error}; the process {how}{said}")


def wait(workers: Sequence[RemoteSimulator], seconds: float = float("inf")) -> list:
    """Workers of which one can `take`: at least one, unless `seconds` go by first."""
    until = time.monotonic() + seconds
    while True:
        ready = [one for one in workers if one.poll()]
        if ready or time.monotonic() >= until:
            return ready
        select.select(workers, [], [], min(0.25, max(0.0, until - time.monotonic())))


def tasks_of(hello: Mapping[str, Any]) -> list[Task]:
    """Tasks out of the reply to `hello`."""
    return [Task(**task) for task in hello["tasks"]]


def observation_of(reply: Mapping[str, Any]) -> Observation | None:
    """The observation in a reply to `reset` or `run`; None if none was rendered."""
    return None if reply["observation"] is None else Observation(**reply["observation"])
