import itertools
import os
import signal

import pytest

from tests.faults import runs, trainer


@pytest.fixture(autouse=True)
def _no_trainer_is_left():
    yield
    while runs.STARTED:
        process = runs.STARTED.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    config = trainer.get_config()
    config.data.work = str(folder)
    trainer.dataset(config)
    return folder


@pytest.fixture
def place(tmp_path, data):
    """New working directories: `place("name", **options)`."""
    count = itertools.count()

    def make(name=None, **options):
        return runs.Place(tmp_path / (name or f"run{next(count)}"), data, options)

    return make
