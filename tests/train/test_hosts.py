import socket

import pytest

from gear_jax.train import hosts


@pytest.mark.parametrize(
    ("coordinator", "address"),
    [
        ("127.0.0.1:1234", "127.0.0.1:1234"),
        ("10.1.2.3:80", "10.1.2.3:80"),
        ("[fd00::1]:80", "[fd00::1]:80"),
    ],
)
def test_the_coordinator_listens_on_its_own_address_alone(coordinator, address):
    assert hosts.bind_address(coordinator) == address


@pytest.mark.parametrize(
    ("coordinator", "said"),
    [
        ("10.1.2.3", "expected HOST:PORT"),
        ("10.1.2.3:x", "expected HOST:PORT"),
        ("0.0.0.0:80", "is every interface: expected one address"),
        ("[::]:80", "is every interface: expected one address"),
        ("no-such-host.invalid:80", "no-such-host.invalid is not known here"),
    ],
)
def test_an_address_that_cannot_serve_is_refused(coordinator, said):
    with pytest.raises(ValueError, match=said):
        hosts.bind_address(coordinator)


def test_a_host_whose_name_is_loopback_to_itself_is_refused(monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    with pytest.raises(ValueError, match="is 127.0.1.1 here, where no other host can reach it"):
        hosts.bind_address("node001:80")


def test_half_an_address_is_refused_by_what_is_missing():
    with pytest.raises(ValueError, match="process_id 1: expected all three or none"):
        hosts.join(process_id=1)
    with pytest.raises(ValueError, match=r"process_id is 2: expected 0 .. 1"):
        hosts.join("127.0.0.1:1", 2, 2)


def test_slurm_says_who_we_are_and_nothing_says_we_are_alone(monkeypatch):
    assert hosts._cluster() is None
    values = {"JOB_ID": "7", "STEP_NODELIST": "node[001-004]", "NTASKS": "4", "PROCID": "3",
              "LOCALID": "0"}  # fmt: skip
    for key, value in values.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "4321")
    assert hosts._cluster() == ("node001:4321", 4, 3)
