"""Laws of jobs on several hosts or with failing ranks: real ranks, under real launchers."""

import json
import os
import re
import shutil
import subprocess
import time
from contextlib import contextmanager
from functools import partial

import pytest
from launching import TORCHRUN, WORKERS, finish, launch, start

TIMEOUT = 6  # seconds that a rank of these jobs waits for the others
SILENT = r"rank {} on \S+ has been silent for \d+ s, last seen in stage 'reading a batch'"
LATE = r"rank {} on \S+ is still in stage 'reading a batch', for \d+ s"
# Of several ranks that wait, any may be the first to give up; the others then lose its connection.
WAITED = r"; rank \d waited in stage 'averaging gradients' for \d+ s \("


@pytest.mark.parametrize(
    "launcher, ranks, ending, message",
    [
        ("mpiexec", 2, "killed", r"Killed \(signal 9\)"),  # by mpiexec, which ends the others
        ("mpiexec", 2, "stopped", "error: " + SILENT.format(1) + WAITED),
        ("mpiexec", 4, "looping", "error: " + LATE.format(3) + WAITED),
        ("torchrun", 2, "killed", r"exitcode  : -9"),  # by torchrun
        ("torchrun", 2, "stopped", "error: " + SILENT.format(1) + WAITED),
        ("torchrun", 2, "looping", "error: " + LATE.format(1) + WAITED),
    ],
)
def test_a_lost_rank_ends_the_job(tmp_path, launcher, ranks, ending, message):
    """Whatever befalls a rank, the job ends in time, and someone names the rank and the stage."""
    command = (WORKERS / "hanging.py", TIMEOUT, ending)
    run = partial(launch, launcher, *command, cwd=tmp_path, ranks=ranks)
    check_end(f"{launcher} -n {ranks}, a rank {ending}", run, message, TIMEOUT)


def check_end(what, run, message, timeout):
    """Run a job: it must fail for the reason named, and no rank may have waited much too long."""
    began = time.monotonic()
    status, printed = run()
    assert status != 0
    assert re.search(message, printed), printed
    assert all(int(waited) <= timeout + 15 for waited in re.findall(r"for (\d+) s \(", printed))
    print(f"\n{what}: ended after {time.monotonic() - began:.0f} s, exit {status}")


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_four_ranks_work_together(tmp_path, launcher):
    """Four ranks, on however few cores, have rank 0's tensors and know of each other."""
    write_weights(tmp_path)
    status, printed = launch(launcher, WORKERS / "ranks.py", tmp_path, cwd=tmp_path, ranks=4)
    assert status == 0, printed
    check_facts(tmp_path, 4)


def write_weights(folder):
    """The checkpoint that ranks.py reads."""
    import torch

    torch.save({"a": torch.arange(3)}, folder / "weights.pt")


def check_facts(folder, num_ranks):
    """Assert what ranks.py must find among any number of ranks, and return it."""
    facts = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]
    for rank, fact in enumerate(facts):
        assert (fact["rank"], fact["world_size"], fact["backend"]) == (rank, num_ranks, "gloo")
        assert all(set(values) <= {0.0} for values in fact["params"])
        assert fact["any_rank"] == [True, True, False]
        assert fact["all_gathered"] == [[other] for other in range(num_ranks)]
        assert len(fact["table"]) == (0 if rank else num_ranks + 1)
    return facts


def run_ip(*words):
    """Run iproute2's ip, and fail as it does."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20)


@contextmanager
def joined_namespaces():
    """Yield the names of two network namespaces with the addresses 10.77.0.1 and 10.77.0.2."""
    names = [f"guided{os.getpid()}-{i}" for i in range(2)]
    cables = [f"gd{os.getpid()}x{i}" for i in range(2)]
    try:
        for name in names:
            run_ip("netns", "add", name)
        run_ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])
        for i, (name, cable) in enumerate(zip(names, cables, strict=True)):
            run_ip("link", "set", cable, "netns", name)
            run_ip("-n", name, "address", "add", f"10.77.0.{i + 1}/24", "dev", cable)
            run_ip("-n", name, "link", "set", cable, "up")
            run_ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for words in [*(("netns", "del", n) for n in names), ("link", "del", cables[0])]:
            subprocess.run(["ip", *words], capture_output=True, timeout=20)


@pytest.fixture
def hosts():
    """Two network namespaces, or a skipped test."""
    if missing := [tool for tool in ("ip", "unshare") if not shutil.which(tool)]:
        pytest.skip(f"needs the programs ip (iproute2) and unshare: no {missing[0]} here")
    try:
        with joined_namespaces() as names:
            yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")


def start_host(number, namespace, command, cwd):
    """Start torchrun in a namespace, under a host name that no one can resolve."""
    inside = ["ip", "netns", "exec", namespace, "unshare", "--uts", "sh", "-c"]
    rendezvous = ["--nnodes", 2, "--node_rank", number, "--nproc_per_node", 1]
    rendezvous += ["--master_addr", "10.77.0.1", "--master_port", 29544]
    script = f'hostname host{number} && exec "$@"'
    return start([*inside, script, "sh", *TORCHRUN, *rendezvous, *command], cwd)


def test_two_hosts_work_together(hosts, tmp_path):
    """On two hosts gloo talks over the interfaces that lead from one to the other."""
    write_weights(tmp_path)
    command = (WORKERS / "ranks.py", tmp_path)
    started = [start_host(i, name, command, tmp_path) for i, name in enumerate(hosts)]
    for status, printed in [finish(process, timeout=60) for process in started]:
        assert status == 0, printed
    facts = check_facts(tmp_path, 2)
    assert [fact["interface"] for fact in facts] == [f"gd{os.getpid()}x{i}" for i in range(2)]
    assert [row.split()[:2] for row in facts[0]["table"][1:]] == [["host0", "0"], ["host1", "1"]]
