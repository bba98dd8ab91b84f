"""Fixtures that several test modules share."""

import signal

import pytest

from guided_diffusion import dist_util, logger


@pytest.fixture
def log_dir(tmp_path):
    """A folder in which the test's log is open, on the CPU."""
    dist_util.setup_dist("cpu")
    with logger.session(str(tmp_path / "log")):
        yield tmp_path / "log"


@pytest.fixture(autouse=True)
def own_ctrl_c():
    """Let Ctrl-C mean what it did before the test: a script that was interrupted changes that."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)
