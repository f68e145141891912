"""One simulator in a process of its own, perhaps in a virtual environment of its own.

    python -m gear_jax.evals.worker --sim point --options '{}' --connect 127.0.0.1:PORT

Started by `remote.py`: it connects back to whoever started it, shows the token that it found in its
environment, and answers one request after the other until the connection closes. Needs NumPy,
msgpack and its simulator; no JAX. Requests are {"op": ...}; replies are a map, or {"error": text,
"kind": name of the exception}:

    hello                      -> protocol, tasks, rate_hz, versions
    reset task, init           -> observation, seconds
    run targets, observe       -> done, steps, observation or None, seconds {physics, render}
    audit                      -> what a simulator says of the files that its tasks need
"""

import argparse
import ctypes
import dataclasses
import importlib
import json
import os
import platform
import signal
import socket
import sys
import time
from typing import Any

import numpy as np

import gear_jax
from gear_jax.evals import wire
from gear_jax.evals.sims.base import Simulator

TOKEN = "GEAR_JAX_WORKER_TOKEN"

_SIMS = "gear_jax.evals.sims"
_LIBERO = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
_PLUS = {f"libero_plus_{suite[len('libero_') :]}": {"suite": suite} for suite in _LIBERO[:4]}

# our own names -> module, class and options; nothing else can be started
SIMULATORS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "point": (f"{_SIMS}.point", "PointSimulator", {}),
    "tabletop": (f"{_SIMS}.tabletop", "TabletopSimulator", {}),
    **{suite: (f"{_SIMS}.libero", "LiberoSimulator", {"suite": suite}) for suite in _LIBERO},
    **{name: (f"{_SIMS}.libero_plus", "LiberoPlusSimulator", one) for name, one in _PLUS.items()},
    "robotwin": (f"{_SIMS}.robotwin", "RobotwinSimulator", {}),
}


def open_simulator(name: str, options: dict) -> Simulator:
    """A simulator by its name.

    Raises:
        ValueError: no such name, or options that it does not have.
    """
    if name not in SIMULATORS:
        raise ValueError(f"simulator {name!r} is unknown: expected one of {sorted(SIMULATORS)}")
    module, attribute, fixed = SIMULATORS[name]
    try:
        return getattr(importlib.import_module(module), attribute)(**fixed, **options)
    except TypeError as error:
        raise ValueError(f"simulator {name!r} with options {options}: {error}") from error
    except ImportError as error:
        raise ValueError(f"simulator {name!r} is not installed here: {error}") from error


class Server:
    """The operations on one simulator."""

    def __init__(self, simulator: Simulator):
        """Serve `simulator`."""
        self.simulator = simulator

    def answer(self, request):
        """The reply to one request; what goes wrong is part of it."""
        try:
            if not isinstance(request, dict) or request.get("op") not in self._OPS:
                raise ValueError(f"request {str(request)[:80]}: expected one of {list(self._OPS)}")
            arguments = {key: value for key, value in request.items() if key != "op"}
            return self._OPS[request["op"]](self, **arguments)
        except Exception as error:
            text = " ".join(str(error).split()) or repr(error)
            return {"error": text, "kind": type(error).__name__}

    def _hello(self):
        return {
            "protocol": dict(self.simulator.protocol()),
            "tasks": [dataclasses.asdict(task) for task in self.simulator.tasks()],
            "rate_hz": float(self.simulator.rate_hz),
            "versions": {
                "python": platform.python_version(),
                "numpy": np.__version__,
                "gear_jax": gear_jax.__version__,
            },
        }

    def _reset(self, task, init):
        begun = time.perf_counter()
        self.simulator.reset(task, init)
        settled = time.perf_counter()
        observation = dataclasses.asdict(self.simulator.observe())
        seconds = {"physics": settled - begun, "render": time.perf_counter() - settled}
        return {"observation": observation, "seconds": seconds}

    def _run(self, targets, observe):
        begun = time.perf_counter()
        done, steps = False, 0
        for target in targets:
            done = bool(self.simulator.step(target))
            steps += 1
            if done:
                break
        moved = time.perf_counter()
        seen = None if done or not observe else dataclasses.asdict(self.simulator.observe())
        seconds = {"physics": moved - begun, "render": time.perf_counter() - moved}
        return {"done": done, "steps": steps, "observation": seen, "seconds": seconds}

    def _audit(self):
        audit = getattr(self.simulator, "audit", None)
        if audit is None:
            raise ValueError("the simulator has no audit: whatever it lists, it can run")
        return audit()

    _OPS = {"hello": _hello, "reset": _reset, "run": _run, "audit": _audit}  # noqa: RUF012


def main(argv=None):
    """Serve until the connection closes; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m gear_jax.evals.worker")
    parser.add_argument("--sim", required=True, choices=sorted(SIMULATORS))
    parser.add_argument("--options", type=json.loads, default={}, help="JSON, for the simulator")
    parser.add_argument("--connect", required=True, help="HOST:PORT of who started this")
    parser.add_argument("--parent", type=int, required=True, help="its process")
    args = parser.parse_args(argv)
    _die_with(args.parent)
    host, _, port = args.connect.rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire.send(connection, {"token": os.environ.pop(TOKEN, "")})
        simulator = None
        try:
            while True:
                request = wire.receive(connection)
                if simulator is None:  # opened late, so that what is wrong can be said
                    try:
                        simulator = open_simulator(args.sim, args.options)
                    except Exception as error:
                        reply = {"error": " ".join(str(error).split()), "kind": "ValueError"}
                        wire.send(connection, reply)
                        return 1
                wire.send(connection, Server(simulator).answer(request))
        except ConnectionError:
            return 0
        finally:
            if simulator is not None:
                simulator.close()


def _die_with(parent):
    """A killed evaluation must not leave its workers behind (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # killed before that was said
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
