"""Who started this process: mpiexec, torchrun, Slurm's srun or nobody; and how its ranks meet.

`read_launch()` reads the launchers' environment variables. `meet()` returns a key-value store that
all ranks of the job reach, through which they then make their process group. mpi4py is imported
only where an MPI launcher started two ranks or more.
"""

from __future__ import annotations

import faulthandler
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import Store

TIMEOUT = timedelta(minutes=30)  # how long a rank waits for the others before it gives up

GRACE = 5.0  # seconds past the timeout, after which a wait that did not fail is ended
SIOCGIFADDR = 0x8915  # Linux's request for an interface's address

# (rank, world size, rank within the host) in the words of each MPI launcher
MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),  # MVAPICH2
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # MPICH, Intel MPI
)


@dataclass(frozen=True)
class Launch:
    """Who started this process ("mpi", "env", "slurm" or "single"), and as which rank."""

    launcher: str = "single"
    rank: int = 0
    world_size: int = 1
    local_rank: int | None = 0  # rank within the host; None until MPI was asked
    one_host: bool = True


def read_launch(environ: Mapping[str, str]) -> Launch:
    """Tell from environment variables who started this process, and as which rank.

    torchrun comes first, since an mpiexec may start one torchrun on each host. Of Slurm's
    variables only those of a job step count: `python` called from an sbatch script is one process.
    """
    if all(environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        rank, size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
        one_host = environ.get("LOCAL_WORLD_SIZE") == environ["WORLD_SIZE"]
        launch = Launch("env", rank, size, int(environ.get("LOCAL_RANK", 0)), one_host)
        return launch if size > 1 else Launch()
    slurm = _read_slurm(environ)
    for rank, size, local_rank in MPI_VARIABLES:
        if rank not in environ or int(environ.get(size) or 1) < 2:
            continue
        if slurm and rank == "PMI_RANK" and local_rank not in environ:
            continue  # set by srun itself (--mpi=pmi2), not by an mpiexec
        local = int(environ[local_rank]) if local_rank in environ else None
        return Launch("mpi", int(environ[rank]), int(environ[size]), local)
    return slurm or Launch()


def _read_slurm(environ: Mapping[str, str]) -> Launch | None:
    """Return this process's place in a Slurm job step of several tasks, if it is in one."""
    size = environ.get("SLURM_STEP_NUM_TASKS")
    if size is None and environ.get("SLURM_STEP_ID", "").isdigit():
        size = environ.get("SLURM_NTASKS")
    if int(size or 1) < 2 or "SLURM_PROCID" not in environ:
        return None
    one_host = environ.get("SLURM_STEP_NUM_NODES") == "1"
    rank, local_rank = int(environ["SLURM_PROCID"]), int(environ.get("SLURM_LOCALID", 0))
    return Launch("slurm", rank, int(size), local_rank, one_host)


def first_host(nodelist: str) -> str:
    """Return the first host of a Slurm list such as "gpu[007-009,12],login1"."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist).group()
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def meet(launch: Launch, timeout: timedelta = TIMEOUT) -> tuple[Store, Launch]:
    """Return a store that all ranks reach, and the launch completed by what MPI knows."""
    return MEETINGS[launch.launcher](launch, timeout)


def _meet_by_env(launch: Launch, timeout: timedelta) -> tuple[Store, Launch]:
    """Meet as torchrun arranged it."""
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://", timeout=timeout))[0], launch


def _meet_by_slurm(launch: Launch, timeout: timedelta) -> tuple[Store, Launch]:
    """Meet on the first host of the job step, at a port that follows from the job's number."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    host = "localhost" if launch.one_host else first_host(nodes)
    number = int(os.environ.get("SLURM_JOB_ID", 0)) + int(os.environ.get("SLURM_STEP_ID", 0))
    port = int(os.environ.get("MASTER_PORT") or 15000 + number % 15000)
    return _open_store(os.environ.get("MASTER_ADDR") or host, port, launch, timeout), launch


def _meet_by_mpi(launch: Launch, timeout: timedelta) -> tuple[Store, Launch]:
    """Meet at an address that rank 0 picks and tells the others over MPI."""
    mpi = _start_mpi_with_all_ranks(launch, timeout)
    host_comm = mpi.COMM_WORLD.Split_type(mpi.COMM_TYPE_SHARED)
    local_rank = host_comm.Get_rank() if launch.local_rank is None else launch.local_rank
    one_host = host_comm.Get_size() == launch.world_size
    launch = replace(launch, local_rank=local_rank, one_host=one_host)
    store = address = None
    if launch.rank == 0:
        host = os.environ.get("MASTER_ADDR") or ("localhost" if one_host else socket.gethostname())
        try:
            store = _open_store(host, int(os.environ.get("MASTER_PORT") or 0), launch, timeout)
            address = (host, store.port)
        except ValueError as error:
            address = error  # to be raised on every rank
    address = mpi.COMM_WORLD.bcast(address)
    if isinstance(address, ValueError):
        raise address
    return store or _open_store(*address, launch, timeout), launch


MEETINGS = {"env": _meet_by_env, "slurm": _meet_by_slurm, "mpi": _meet_by_mpi}


def _open_store(host: str, port: int, launch: Launch, timeout: timedelta) -> Store:
    """Reach the store at this address; rank 0 serves it (port 0: at any free port)."""
    import torch.distributed as dist

    serve = launch.rank == 0
    try:
        return dist.TCPStore(host, port, None, serve, timeout, wait_for_workers=False)
    except RuntimeError as error:
        raise ValueError(
            f"rank {launch.rank} cannot meet the others at {host}:{port} ({first_line(error)}); "
            "set MASTER_ADDR and MASTER_PORT to rank 0's host and a free port"
        ) from error


def _start_mpi_with_all_ranks(launch: Launch, timeout: timedelta) -> Any:
    """Import mpi4py, or say in one line how to get it.

    MPI starts when every rank did. Until then it holds the interpreter, and no thread of this
    process could end the wait: after the timeout it ends with a traceback to this function.
    """
    try:
        faulthandler.dump_traceback_later(
            timeout.total_seconds() + GRACE, exit=True, file=sys.__stderr__
        )
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"an MPI launcher started {launch.world_size} ranks, but mpi4py does not load "
            f"({first_line(error)}): pip install mpi4py mpich, or use torchrun"
        ) from error
    finally:
        faulthandler.cancel_dump_traceback_later()
    size = MPI.COMM_WORLD.Get_size()
    if size != launch.world_size:
        raise ValueError(
            f"an MPI launcher started {launch.world_size} ranks, but the MPI library of mpi4py "
            f"sees {size}: they belong to different MPI installations; use the mpiexec of that "
            "library (pip install mpi4py mpich brings both), or use torchrun"
        )
    return MPI


def interface_towards(store: Store | None) -> str | None:
    """Return the network interface by which this host reaches the store, if that can be found.

    What a container calls itself may lead nowhere, so gloo is told where to talk.

    Args:
        store: the TCPStore of rank 0, or None if all ranks are on this host.
    """
    with suppress(OSError, AttributeError, ImportError):
        names = [name for _, name in socket.if_nameindex()]
        if store is None:
            return next((name for name in names if name in ("lo", "lo0")), None)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((store.host, store.port))  # chooses a route, sends nothing
            mine = probe.getsockname()[0]
            found = [name for name in names if _read_address(probe, name) == mine]
        # The loopback would be the name of this host in its own list, of no use to the others.
        return found[0] if found and not mine.startswith("127.") else None
    return None


def _read_address(any_socket: socket.socket, interface: str) -> str | None:
    """Return the IPv4 address of a network interface, on Linux."""
    import fcntl

    request = struct.pack("256s", interface.encode()[:15])
    with suppress(OSError):
        return socket.inet_ntoa(fcntl.ioctl(any_socket, SIOCGIFADDR, request)[20:24])
    return None


def abort_if_uncaught() -> None:
    """Let an uncaught exception end all ranks: at exit MPI would wait for the others forever."""
    show = sys.excepthook

    def show_and_abort(kind, error, trace):
        show(kind, error, trace)
        abort(1)

    sys.excepthook = show_and_abort


def abort(code: int = 1) -> None:
    """End the whole job at once, all ranks under MPI, without waiting for anyone."""
    sys.stdout.flush()
    sys.stderr.flush()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and read_launch(os.environ).launcher == "mpi":
        time.sleep(0.5)  # for mpiexec to pass on what was printed: it drops the rest when it kills
        last_resort = threading.Timer(GRACE, os._exit, [code])
        last_resort.daemon = True
        last_resort.start()
        mpi.COMM_WORLD.Abort(code)
    os._exit(code)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its kind if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
