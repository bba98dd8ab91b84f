"""Start worker programs as several ranks, under each launcher."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORKERS = ROOT / "tests" / "workers"
LAUNCHER_PREFIXES = ("SLURM_", "OMPI_", "PMI", "MPI_", "MV2_", "TORCHELASTIC_", "MASTER_")
LAUNCHER_NAMES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def is_launcher_variable(name):
    return name.startswith(LAUNCHER_PREFIXES) or name in LAUNCHER_NAMES


def clean_environment(**extra):
    """The environment of a process that no launcher started."""
    kept = {name: value for name, value in os.environ.items() if not is_launcher_variable(name)}
    return kept | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "5,7"} | extra


def find_mpiexec():
    """The mpiexec beside this Python, which belongs to its MPI library, else that of PATH."""
    beside = Path(sys.executable).parent / "mpiexec"
    path = str(beside) if beside.exists() else shutil.which("mpiexec")
    assert path, "the tests need mpiexec: pip install mpich"
    return path


def launcher_words(launcher, ranks):
    """Return what stands before a Python program in a command that runs it as some ranks."""
    if launcher == "mpiexec":
        return [find_mpiexec(), "-n", ranks, sys.executable]
    return [*TORCHRUN, "--standalone", "--nproc_per_node", ranks]


def launch(launcher, *command, cwd, ranks=2):
    """Run a worker program as some ranks; return its exit status and what it printed."""
    return finish(start([*launcher_words(launcher, ranks), *command], cwd))


def start(command, cwd, **extra):
    """Start a command, with further environment variables, in a session of its own."""
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        env=clean_environment(**extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,  # mpiexec reports in the one, torchrun in the other
        text=True,
        start_new_session=True,
    )


def finish(process, timeout=120):
    """Return the exit status and the output of what was started; end it if that takes too long."""
    try:
        printed, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # the launcher ends its ranks
        raise
    return process.returncode, printed


def launch_as_slurm(*command, cwd):
    """Start two processes with the variables that srun sets; return what became of each."""
    processes = []
    for rank in range(2):
        slurm = {"PROCID": rank, "LOCALID": rank, "JOB_ID": os.getpid(), "STEP_ID": 0}
        slurm |= {"STEP_NUM_TASKS": 2, "STEP_NUM_NODES": 1, "STEP_NODELIST": "no-such-host"}
        variables = {f"SLURM_{name}": str(value) for name, value in slurm.items()}
        processes.append(start([sys.executable, *command], cwd, **variables))
    return [finish(process) for process in processes]
