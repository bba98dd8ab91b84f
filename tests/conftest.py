"""Fixtures that several test modules share."""

import pytest

from guided_diffusion import dist_util, logger


@pytest.fixture
def log_dir(tmp_path):
    """A folder in which the test's log is open, on the CPU."""
    dist_util.setup_dist("cpu")
    with logger.session(str(tmp_path / "log")):
        yield tmp_path / "log"
