"""Ranks, devices and collectives, under mpiexec, torchrun, Slurm's srun or in one process.

`setup_dist()` picks a device and makes a process group, also for one process. Importing this module
costs no import of torch, so that `--help` stays fast.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from . import heartbeat, weight_files
from .heartbeat import stage as stage
from .heartbeat import waiting
from .launchers import (
    GRACE,
    TIMEOUT,
    Launch,
    abort,
    abort_if_uncaught,
    interface_towards,
    meet,
    read_launch,
)

if TYPE_CHECKING:
    import torch

GPUS_PER_NODE = 8  # of the published cluster; programs read it, nothing here does


@dataclass
class State:
    """What setup_dist() leaves for the other functions of this module."""

    device: torch.device | None = None
    store: Any = None  # the key-value store through which the ranks met
    num_shared: Counter = field(default_factory=Counter)


_state = State()


# Setting up


def setup_dist(device: str | None = None, timeout: float | None = None) -> None:
    """Pick this rank's device and make the process group; a second call does no harm.

    Args:
        device: "cpu", "cuda", "cuda:1" or "mps"; by default a GPU of its own for each rank of
            a host, or the CPU where there is no GPU.
        timeout: for how many seconds a rank waits for the others before it ends the job, by
            default half an hour.
    """
    import torch.distributed as dist

    launch = read_launch(os.environ)
    if _group_exists():
        if device is not None or _state.device is None:
            _use_device(choose_device(device, launch.local_rank or 0))
    elif launch.world_size == 1:
        _use_device(choose_device(device))
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        seconds = TIMEOUT.total_seconds() if timeout is None else timeout
        pulse = heartbeat.start(launch, seconds)
        with stage("meeting the other ranks", waits=True):
            _join(launch, pulse, device)


def _join(launch: Launch, pulse: heartbeat.Heartbeat, device: str | None) -> None:
    """Meet the other ranks of this launch and make the process group with them."""
    import torch.distributed as dist

    timeout = timedelta(seconds=pulse.timeout)
    store, launch = meet(launch, timeout)
    pulse.connect(store)
    chosen, backend, num_local = _agree_on_devices(store, launch, device)
    _use_device(chosen)
    _share_cores(num_local)
    interface = interface_towards(None if launch.one_host else store)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if backend == "nccl":  # its own watchdog ends a rank without a word, so let it come last
        timeout += timedelta(seconds=2 * GRACE)
    dist.init_process_group(
        backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout
    )
    _state.store = dist.PrefixStore("guided_diffusion/shared", store)
    heartbeat.explain_if_uncaught(launch.rank)
    if launch.launcher == "mpi":
        abort_if_uncaught()  # last, to be the outermost hook: torch's holds back what is printed


def choose_device(device: str | None = None, local_rank: int = 0) -> torch.device:
    """Return the named device, or the best there is, as an error names --device if it is absent."""
    import torch

    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    available = ["cpu"] + [f"cuda:{i}" for i in range(num_gpus)]
    if torch.backends.mps.is_available():
        available.append("mps")
    name = str(device or ("cuda" if num_gpus else "cpu"))
    if name == "cuda" and num_gpus:
        name = f"cuda:{local_rank % num_gpus}"
    if name not in available:
        raise ValueError(f"--device {name} is not available here; choose from {available}")
    return torch.device(name)


def _agree_on_devices(
    store: Any, launch: Launch, device: str | None
) -> tuple[torch.device, str, int]:
    """Return this rank's device, the backend, and how many ranks this host has.

    A device that one rank cannot have is an error on all ranks, so that none waits for another.
    """
    import torch
    import torch.distributed as dist

    chosen, mine = None, {"host": socket.gethostname(), "gpu": None, "num_gpus": 0, "error": None}
    try:
        chosen = choose_device(device, launch.local_rank)
        if chosen.type == "cuda":
            gpu = torch.cuda.get_device_properties(chosen)  # srun may show each rank another GPU 0
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            mine["gpu"] = str(getattr(gpu, "uuid", f"{visible}:{chosen.index}"))
            mine["num_gpus"] = torch.cuda.device_count()
    except ValueError as error:
        mine["error"] = str(error)
    facts = dist.PrefixStore("guided_diffusion/facts", store)
    facts.set(str(launch.rank), json.dumps(mine))
    ranks = [json.loads(facts.get(str(rank))) for rank in range(launch.world_size)]
    for error in filter(None, (rank["error"] for rank in ranks)):
        raise ValueError(error)
    backend = _choose_backend(ranks, may_share=":" in str(device))
    return chosen, backend, sum(rank["host"] == mine["host"] for rank in ranks)


def _choose_backend(ranks: list[dict[str, Any]], may_share: bool) -> str:
    """Return "nccl" if each rank has a GPU of its own; ranks may share one that --device names."""
    import torch.distributed as dist

    gpus = Counter((rank["host"], rank["gpu"]) for rank in ranks if rank["gpu"])
    crowded = [rank for rank in ranks if gpus[rank["host"], rank["gpu"]] > 1]
    if crowded and not may_share:
        host, num_gpus = crowded[0]["host"], crowded[0]["num_gpus"]
        num_ranks = sum(rank["host"] == host for rank in ranks)
        raise ValueError(
            f"{num_ranks} ranks on {host} cannot have a GPU each, {num_gpus} visible: "
            f"start at most {num_gpus} per host, or give --device cpu"
        )
    own_gpus = gpus.total() == len(ranks) and not crowded
    return "nccl" if own_gpus and dist.is_nccl_available() else "gloo"


def _use_device(device: torch.device) -> None:
    """Make this the device of dev() and, if it is a GPU, of calls that name none."""
    import torch

    if device.type == "cuda":
        torch.cuda.set_device(device)
    _state.device = device


def _share_cores(num_local: int) -> None:
    """Divide the cores of a host among its ranks, unless someone already did."""
    import torch

    affinity = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)
    if "OMP_NUM_THREADS" not in os.environ and len(affinity) == os.cpu_count():
        torch.set_num_threads(max(1, torch.get_num_threads() // num_local))


@contextmanager
def process_group(device: str | None = None, timeout: float | None = None) -> Iterator[None]:
    """Run a block between setup_dist() and the end of the group, if this made the group.

    In a job of several ranks an exception inside is reported and ends the whole job: the other
    ranks would wait for this one forever.
    """
    made_here = not _group_exists()
    try:
        setup_dist(device, timeout)
        yield
        if made_here:
            with stage("finishing"):
                barrier()
    except BaseException as error:
        is_normal_exit = isinstance(error, SystemExit) and not error.code
        if get_world_size() > 1 and not is_normal_exit:
            heartbeat.report_error(error, get_rank())
            abort(_exit_code(error))
        raise
    finally:
        if made_here and _group_exists():
            import torch.distributed as dist

            heartbeat.stop()
            dist.destroy_process_group()
            _state.store = None


def _exit_code(error: BaseException) -> int:
    """Return the exit code of a process that this error ends."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 130 if isinstance(error, KeyboardInterrupt) else 1


# Asking and telling


def _group_exists() -> bool:
    """Tell whether there is a process group, without importing torch to find out."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def get_rank() -> int:
    """Return this process's number, before setup_dist() as its launcher numbered it."""
    if _group_exists():
        return sys.modules["torch.distributed"].get_rank()
    return read_launch(os.environ).rank


def get_world_size() -> int:
    """Return the number of processes in the job."""
    if _group_exists():
        return sys.modules["torch.distributed"].get_world_size()
    return read_launch(os.environ).world_size


def is_main() -> bool:
    """Tell whether this is rank 0, which writes the files and prints."""
    return get_rank() == 0


def dev() -> torch.device:
    """Return the device of this rank."""
    return _state.device or choose_device(None, read_launch(os.environ).local_rank or 0)


def precision(use_bf16: bool, cache: bool = True) -> AbstractContextManager:
    """Return bfloat16 autocast on `dev()`; if not asked for, what leaves the caller's as it is.

    Without `cache` a weight is cast at each use, instead of keeping its narrow copy for the block.
    """
    import torch

    if not use_bf16:
        return nullcontext()
    return torch.autocast(dev().type, torch.bfloat16, cache_enabled=cache)


def _is_alone() -> bool:
    """Tell whether a collective would have nobody to talk to."""
    return not _group_exists() or get_world_size() == 1


def barrier() -> None:
    """Wait until every rank is here."""
    import torch.distributed as dist

    if not _is_alone():
        with waiting("a barrier"):
            dist.barrier(device_ids=[dev().index] if dist.get_backend() == "nccl" else None)


def wait_patiently(name: str) -> None:
    """Wait until every rank is here, however long the others work: only a silent one ends it.

    A barrier gives up when the timeout of the job is over, whatever the others are at. All ranks
    call this. A rank whose main thread hangs while its heart beats is waited for, too.

    Args:
        name: what for, as in `stage`.
    """
    if _is_alone() or _state.store is None:
        barrier()
        return
    _state.num_shared[name] += 1
    key = f"{name}/{_state.num_shared[name]}"
    with stage(name), heartbeat.listening():
        here, mine = 0, 1
        while here < get_world_size():
            with stage(name, waits=True):  # the server of the store may have stopped
                here, mine = _state.store.add(key, mine), 0
            heartbeat.end_if_silent()
            time.sleep(0.1)


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value on every rank. All ranks call this."""
    import torch.distributed as dist

    if _is_alone():
        return value
    box = [value]
    with waiting("sending a value to all ranks"):
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's value, by rank, on rank 0 and an empty list elsewhere."""
    import torch.distributed as dist

    if _is_alone():
        return [value]
    box = [None] * get_world_size() if is_main() else None
    with waiting("collecting the values of all ranks"):
        dist.gather_object(value, box, dst=0)
    return box or []


def all_gather_objects(value: Any) -> list[Any]:
    """Return every rank's value, by rank, on every rank."""
    import torch.distributed as dist

    if _is_alone():
        return [value]
    box = [None] * get_world_size()
    with waiting("exchanging the values of all ranks"):
        dist.all_gather_object(box, value)
    return box


def any_rank(fact: bool) -> bool:
    """Tell whether something is true on some rank. All ranks call this."""
    import torch
    import torch.distributed as dist

    if _is_alone():
        return bool(fact)
    device = dev() if dist.get_backend() == "nccl" else None
    flag = torch.tensor(bool(fact), dtype=torch.uint8, device=device)
    with waiting("agreeing with the other ranks"):
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())  # with nccl it is here that the rank waits


def describe_ranks() -> list[str]:
    """Return on rank 0 the lines of a table of hosts, ranks and devices, elsewhere nothing."""
    ranks = gather_objects((socket.gethostname(), str(get_rank()), _describe_device()))
    rows = [("host", "rank", "device"), *ranks] if ranks else []
    host, rank = (max((len(row[i]) for row in rows), default=0) for i in range(2))
    return [f"{row[0]:{host}}  {row[1]:>{rank}}  {row[2]}" for row in rows]


def _describe_device() -> str:
    """Return the name of this rank's GPU, or on how many threads it computes."""
    import torch

    device = dev()
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    threads = torch.get_num_threads()
    return f"{device}, {threads} thread{'s' if threads > 1 else ''}"


def share(name: str, make: Callable[[], str]) -> str:
    """Return on every rank what `make` returned on rank 0, which does not wait for the others.

    Unlike a collective this also serves programs in which rank 0 alone asks, unless the program
    made the process group itself: then all ranks must ask.
    """
    if _is_alone():
        return make()
    if _state.store is None:
        return broadcast_object(make() if is_main() else None)
    _state.num_shared[name] += 1
    key = f"{name}/{_state.num_shared[name]}"
    if is_main():
        _state.store.set(key, make())
    with waiting(f"sharing {name}"):
        return _state.store.get(key).decode()


def sync_params(params: Iterable[torch.Tensor]) -> None:
    """Overwrite the tensors of every rank with those of rank 0. All ranks call this."""
    import torch
    import torch.distributed as dist

    if _is_alone():
        return
    device = dev() if dist.get_backend() == "nccl" else None
    with torch.no_grad(), waiting("copying rank 0's tensors"):
        for param in params:
            # As bytes, since the backends do not know every dtype.
            whole = param.detach().to(device).contiguous()
            dist.broadcast(whole.reshape(-1).view(torch.uint8), src=0)
            if get_rank() > 0:
                param.copy_(whole)


# Loading


def load_state_dict(path: str | os.PathLike, **kwargs: Any) -> Any:
    """Read a checkpoint of tensors, by default onto the CPU.

    Each rank reads for itself, so any one of them may call this alone. The file can only hold
    tensors and plain containers: one that would run code is refused.

    Args:
        path: a local path, or a remote one (az://, gs://) that blobfile understands, of a file
            that torch.save wrote or that ends in .safetensors.
        **kwargs: passed on to `torch.load`; of a .safetensors file only `map_location`, a device.
            `mmap=True` maps files that can be mapped into memory and reads others.

    Raises:
        ValueError: if it cannot be read; one line that names it and says what it is.
    """
    return weight_files.load(path, **kwargs)
