"""Processes find each other before the first device is touched; one process is a pod of one.

Joined even when alone: without it a notice of preemption goes unheard (reliability.md, finding 5).
The coordinator answers anybody who reaches it, so it listens on one inner address, never on all of
them (finding 7): a pod is one trust domain.
"""

import contextlib
import ipaddress
import os
import socket
import time
from collections.abc import Iterator

import jax
from jax._src import distributed
from jax._src.clusters import ClusterEnv

HEARTBEAT = 30  # seconds
CLUSTERS = ("slurm", "gcetpu", "gketpu")
_PATIENCE = 7 * 24 * 3600 * 1000  # ms; a process that dies meanwhile ends the run by its heartbeat
_PORT = "JAX_COORDINATOR_PORT"


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat: int = HEARTBEAT,
) -> None:
    """Join the other processes of the run; call it before anything of jax.

    Args:
        coordinator: HOST:PORT of process 0, as the others reach it.
        num_processes: of the run.
        process_id: 0 .. num_processes - 1. Without these three, those of Slurm or of a TPU pod;
            without these too, the process is alone.
        heartbeat: seconds after which a silent process is given up, and the run with it.

    Raises:
        ValueError: some of the three without the others, or an address that cannot serve.
    """
    if coordinator is None and num_processes is None and process_id is None:
        coordinator, num_processes, process_id = _cluster() or (_alone(), 1, 0)
    if coordinator is None or num_processes is None or process_id is None:
        given = f"coordinator {coordinator}, num_processes {num_processes}, process_id {process_id}"
        raise ValueError(f"{given}: expected all three or none")
    if not 0 <= process_id < num_processes:
        raise ValueError(f"process_id is {process_id}: expected 0 .. {num_processes - 1}")
    if num_processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        cluster_detection_method="deactivate",  # every device that a process sees is its own
        coordinator_bind_address=bind_address(coordinator) if process_id == 0 else None,
        heartbeat_timeout_seconds=heartbeat,
    )


@contextlib.contextmanager
def leader_first(name: str) -> Iterator[None]:
    """Process 0 runs the block before the others do: what it prepares on a shared disk, they find.

    Args:
        name: of the block, the same everywhere; nothing inside may need another process.
    """
    client, leads = distributed.global_state.client, jax.process_index() == 0
    if client is not None and not leads:
        client.wait_at_barrier(name, _PATIENCE)
    yield
    if client is not None and leads and jax.process_count() > 1:
        client.wait_at_barrier(name, _PATIENCE)


def meet(name: str) -> None:
    """Wait for every other process: process 0, where they are coordinated, may not leave first."""
    if distributed.global_state.client is not None and jax.process_count() > 1:
        distributed.global_state.client.wait_at_barrier(name, _PATIENCE)


def end(code: int, *, together: bool) -> None:
    """End this process at once: workers and collectives of a run that failed must not hold it up.

    Args:
        code: of the process.
        together: all processes come here, and wait for each other; else the coordinator only lets
            those go first that end for the same reason.
    """
    if jax.distributed.is_initialized():
        if together:
            jax.distributed.shutdown()
        elif jax.process_count() > 1 and jax.process_index() == 0:
            time.sleep(2)
    os._exit(code)


def bind_address(coordinator: str) -> str:
    """The one address, IP:PORT, on which process 0 listens.

    Raises:
        ValueError: no HOST:PORT, not an address of this host's cluster, or every interface.
    """
    host, _, port = coordinator.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal():
        raise ValueError(f"coordinator {coordinator!r}: expected HOST:PORT")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0][4][0]
    except socket.gaierror as error:
        raise ValueError(f"coordinator {coordinator!r}: {host} is not known here") from error
    address = ipaddress.ip_address(str(found))
    if address.is_unspecified:
        raise ValueError(f"coordinator {coordinator!r} is every interface: expected one address")
    if address.is_loopback and host != "localhost" and host != str(address):
        raise ValueError(
            f"coordinator {coordinator!r} is {address} here, where no other host can reach it: "
            "expected its address inside the cluster"
        )
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def _cluster():
    """Coordinator, number of processes and our own, where Slurm or a TPU pod says them."""
    for one in ClusterEnv._cluster_types:
        if one.name in CLUSTERS and one.is_env_present():
            coordinator = one.get_coordinator_address(300, os.environ.get(_PORT))
            return coordinator, one.get_process_count(), one.get_process_id()
    return None


def _alone():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"
