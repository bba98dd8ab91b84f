"""Runs that are stopped, killed and moved to other ranks, by the dozen. `make soak` runs this.

Each test prints what it did in one line, which docs/reliability.md quotes.
"""

import contextlib
import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripting import (  # noqa: E402
    CLASSIFIER,
    ROOT,
    SMALL,
    SUPER_RES,
    environment,
    flags_of,
    launch,
    launch_command,
    make_images,
)
from test_killed_saves import kill_saves  # noqa: E402
from test_resume import TIMES, assert_same_run  # noqa: E402

SCRIPT = ROOT / "scripts" / "image_train.py"
RUN = SMALL | {
    "device": "cpu", "num_workers": 1, "log_interval": 3, "save_interval": 5, "dropout": 0.1,
    "ema_rate": "0.5,0.9", "schedule_sampler": "loss-second-moment", "random_crop": True,
    "resume_checkpoint": "auto", "keep_checkpoints": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data") / "data", count=23)


def flags_for(folder, data, ranks, seed, steps):
    """Return the flags of a run with 12 images a step."""
    own = {"batch_size": 12 // ranks, "log_dir": folder, "seed": seed, "max_steps": steps}
    return RUN | {"data_dir": data} | own


def run_whole(folder, launcher, ranks, flags, script="image_train"):
    """Run to the end in one go."""
    program = ROOT / "scripts" / f"{script}.py"
    done = launch(launcher, program, flags_of(flags), folder.parent, ranks=ranks)
    assert done.returncode == 0, done.stderr


def run_with_interruptions(folder, launcher, ranks, flags, rng, numbers, script="image_train"):
    """Run, and interrupt with one signal of `numbers` after the other; return how often it began.

    Each goes to all processes of the job at once, as from a batch system.
    """
    program = ROOT / "scripts" / f"{script}.py"
    command = launch_command(launcher, program, flags_of(flags), ranks)
    numbers = list(numbers)
    for begun in range(1, 100):
        job = subprocess.Popen(
            command, cwd=folder.parent, env=environment(), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        rows = count_rows(folder)
        while numbers and job.poll() is None and count_rows(folder) <= rows:
            time.sleep(0.02)
        if numbers and job.poll() is None:
            time.sleep(rng.uniform(0, 0.7))
            send(numbers.pop(0), job.pid)
        _, stderr = job.communicate(timeout=120)
        steps = next(flags[n] for n in ("max_steps", "iterations", "lr_anneal_steps") if n in flags)
        if job.returncode == 0 and (folder / f"state{steps:06d}.pt").exists():
            return begun
    raise AssertionError(stderr)


def send(number, pid):
    """Send a signal to a process, its children, theirs and so on: torchrun's have own sessions."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    for each in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, number)


def count_rows(folder):
    path = folder / "progress.csv"
    return path.read_text().count("\n") if path.exists() else 0


SHARDED = {"shard_params": True, "use_bf16": True, "use_checkpoint": True}
CASES = [
    ("mpiexec", 1, {}),
    ("mpiexec", 2, {}),
    ("torchrun", 2, {}),
    ("mpiexec", 3, {}),
    ("torchrun", 4, {}),
    ("mpiexec", 2, SHARDED),
]


@pytest.mark.parametrize("launcher, ranks, more", CASES)
def test_interrupted_runs_equal_undisturbed_ones(launcher, ranks, more, data, tmp_path):
    """Killed and stopped at random moments, restarted by the same command: the same 40 steps."""
    seed = CASES.index((launcher, ranks, more))
    rng = random.Random(seed)
    numbers = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1]
    rng.shuffle(numbers)
    if launcher == "torchrun":  # which knows no SIGUSR1 and dies of it
        numbers = [signal.SIGTERM if n == signal.SIGUSR1 else n for n in numbers]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_whole(whole, launcher, ranks, flags_for(whole, data, ranks, seed, 40) | more)
    flags = flags_for(parts, data, ranks, seed, 40) | more
    begun = run_with_interruptions(parts, launcher, ranks, flags, rng, numbers)
    assert_same_run(whole, parts, 40)
    names = " ".join(signal.Signals(number).name for number in numbers)
    how = " sharded, bf16" if more else ""
    print(f"\n{launcher} -n {ranks}{how}: begun {begun} times ({names}), equal to the whole run")


def test_ranks_may_change_on_the_way(data, tmp_path):
    """1, 2, 3, 4, 2 ranks, 6 steps each: the losses are those of one rank, to rounding."""
    flags = {"dropout": 0, "schedule_sampler": "uniform", "log_interval": 1}
    whole = tmp_path / "whole"
    run_whole(whole, "mpiexec", 1, flags_for(whole, data, 1, 6, 30) | flags)
    parts = tmp_path / "parts"
    for part, ranks in enumerate([1, 2, 3, 4, 2], 1):
        run_whole(parts, "mpiexec", ranks, flags_for(parts, data, ranks, 6, 6 * part) | flags)
    rows = []
    for folder in (whole, parts):
        with open(folder / "progress.csv") as file:
            rows.append(list(csv.DictReader(file)))
    assert len(rows[0]) == len(rows[1]) == 30
    worst = 0.0
    for one, other in zip(*rows, strict=True):
        for name in set(one) - TIMES:
            assert bool(one[name]) == bool(other[name]), name
            if one[name]:
                a, b = float(one[name]), float(other[name])
                worst = max(worst, abs(a - b) / max(abs(a), 1e-12))
    assert worst < 1e-3
    print(f"\n1, 2, 3, 4, 2 ranks in turn: 30 rows, figures within {worst:.1e} of one rank's")


@pytest.mark.parametrize("script", ["super_res_train", "classifier_train"])
def test_the_other_trainers_go_on_exactly(script, data, tmp_path):
    """Killed and stopped on two ranks, with validation, annealing and float16."""
    flags = {
        "seed": 3,
        "save_interval": 5,
        "keep_checkpoints": 2,
        "batch_size": 6,
        "num_workers": 1,
    }
    flags |= {"data_dir": data, "device": "cpu", "log_interval": 3, "resume_checkpoint": "auto"}
    flags |= {"ema_rate": "0.5,0.9"}
    if script == "classifier_train":
        flags |= CLASSIFIER | {"iterations": 40, "anneal_lr": True, "classifier_use_fp16": True}
        flags |= {"val_data_dir": data}
    else:
        flags |= SUPER_RES | {"lr_anneal_steps": 40, "use_fp16": True, "sample_interval": 7}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_whole(whole, "mpiexec", 2, flags | {"log_dir": whole}, script)
    numbers = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL]
    flags |= {"log_dir": parts}
    begun = run_with_interruptions(parts, "mpiexec", 2, flags, random.Random(3), numbers, script)
    assert_same_run(whole, parts, 40)
    print(f"\n{script} on 2 ranks, fp16: begun {begun} times, equal to the whole run")


SIGNALS = [
    ("python", "SIGTERM", 0), ("python", "SIGINT", 0), ("python", "SIGUSR1", 0),
    ("mpiexec", "SIGTERM", 0), ("mpiexec", "SIGINT", 0), ("mpiexec", "SIGUSR1", 0),
    ("torchrun", "SIGTERM", 1), ("torchrun", "SIGINT", 1),
]  # fmt: skip


@pytest.mark.parametrize("launcher, name, status", SIGNALS)
def test_a_signal_to_the_launcher(launcher, name, status, data, tmp_path):
    """The process that a user or scheduler knows of is signalled; a set is saved."""
    folder = tmp_path / "run"
    flags = flags_of(flags_for(folder, data, 2, 1, 0) | {"save_interval": 1000})
    command = [sys.executable, str(SCRIPT), *flags]
    if launcher != "python":
        command = launch_command(launcher, SCRIPT, flags, 2)
    job = subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while count_rows(folder) < 2:
        time.sleep(0.05)
    job.send_signal(getattr(signal, name))
    assert job.wait(timeout=60) == status
    assert len(list(folder.glob("state*.pt"))) == 1
    print(f"\n{name} to {launcher}: a set is saved, exit {status}")


def test_fifty_kills_leave_a_set_to_go_on_from(tmp_path):
    """As in the suite, with 50 kills."""
    told = kill_saves(tmp_path, kills=50, seed=5).splitlines()[-1]
    assert not told.startswith("50 kills, 0 of them")
    print(f"\n{told}")
