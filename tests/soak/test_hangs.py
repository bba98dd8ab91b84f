"""The rarer ways to lose a rank, each of which takes a while to be sure of."""

import re
from functools import partial

import pytest
from launching import WORKERS, finish, launch, launch_as_slurm
from test_hosts import check_end, hosts, start_host  # noqa: F401 - a fixture

TIMEOUT = 5  # seconds that a rank of these jobs waits for the others
LATE = r"rank 1 on \S+ is still in stage 'reading a batch', for \d+ s; rank 0 waited in stage "


@pytest.mark.parametrize(
    "launcher, ending, message",
    [
        ("mpiexec", "stuck", LATE + r"'averaging gradients' for \d+ s \(no answer\)"),
        ("torchrun", "stuck", LATE + r"'averaging gradients' for \d+ s \(no answer\)"),
        ("mpiexec", "first", "rank 1: error: rank 0, which serves the store, cannot be reached"),
        ("torchrun", "first", r"rank 1: error: rank 0 on \S+ has been silent for"),
        ("mpiexec", "startup", "in _start_mpi_with_all_ranks"),
        ("torchrun", "startup", "error: rank 1 has not come; rank 0 waited in stage 'meeting the"),
    ],
)
def test_a_lost_rank_ends_the_job(tmp_path, launcher, ending, message):
    """Also a wait without end of its own, a lost rank 0 and one that never came end the job."""
    run = partial(launch, launcher, WORKERS / "hanging.py", TIMEOUT, ending, cwd=tmp_path)
    check_end(f"{launcher} -n 2, a rank lost ({ending})", run, message, TIMEOUT)


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_programs_without_process_group_end_too(tmp_path, launcher):
    """Below the traceback of an uncaught error between ranks stands what caused it."""
    command = (WORKERS / "hanging.py", TIMEOUT, "looping", "bare")
    status, printed = launch(launcher, *command, cwd=tmp_path)
    assert status != 0
    assert re.search(f"error: {LATE}'averaging gradients'", printed), printed
    assert "Traceback" in printed


def test_a_slurm_job_ends_without_srun(tmp_path):
    """A rank in an endless loop ends itself when another told that the job is over."""
    ranks = launch_as_slurm(WORKERS / "hanging.py", TIMEOUT, "looping", cwd=tmp_path)
    assert [status for status, _ in ranks] == [1, 1]
    assert re.search(f"error: {LATE}", ranks[0][1])
    assert "rank 1: error: another rank ended the job" in ranks[1][1]


def test_two_hosts_end_together(hosts, tmp_path):  # noqa: F811
    """What goes wrong on one host ends the ranks of the other, each with its launcher."""
    command = (WORKERS / "hanging.py", TIMEOUT, "looping")
    started = [start_host(i, name, command, tmp_path) for i, name in enumerate(hosts)]
    (first, told), (second, told_there) = [finish(process, timeout=90) for process in started]
    assert first != 0 and second != 0
    assert re.search(f"error: {LATE}'averaging gradients'", told), told
    assert "on host1 is still" in told
    assert "rank 1: error: another rank ended the job" in told_there, told_there
