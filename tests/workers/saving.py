"""Kill a run that saves after every step, again and again, and check what it leaves.

Usage: saving.py FOLDER KILLS SEED. A child process trains and is killed at a random moment; then
the newest complete set must be as new as before or newer, and equal, file by file and bit by bit,
to that of a run which nobody killed. Prints a line for each kill.
"""

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_resume import equal  # noqa: E402
from test_train_util import TINY, Flat, build, squares  # noqa: E402

from guided_diffusion import checkpoint_sets, checkpoints, dist_util, logger  # noqa: E402
from guided_diffusion.train_util import TrainLoop  # noqa: E402

LONGEST = 0.15  # seconds from a first file to the kill


class Numbers:
    """Batches that follow from the number of their first image."""

    def seek(self, number):
        self.number = number

    def __next__(self):
        rng = np.random.default_rng(self.number)
        self.number += 4
        return torch.from_numpy(rng.standard_normal((4, 1, 8, 8), np.float32)), {}


def train(folder, steps, keep):
    """Go on with the run in a folder, saving after every step."""
    dist_util.setup_dist("cpu")
    torch.manual_seed(0)
    with logger.scoped_configure(str(folder), ["csv"]):
        loop = TrainLoop(
            model=Flat(), diffusion=build(**TINY)[1], data=Numbers(), batch_size=4, microbatch=-1,
            lr=1e-2, ema_rate="0.5", log_interval=1, save_interval=1, resume_checkpoint="auto",
            seed=1, max_steps=steps, keep_checkpoints=keep, flags={"image_size": 8},
            loss_fn=squares,
        )  # fmt: skip
        loop.run_loop()


def fork(folder, steps, keep):
    """Train in a child process, silently; return its number."""
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        try:
            train(folder, steps, keep)
            os._exit(0)
        finally:
            os._exit(1)
    return child


def newest_step(folder):
    """Return the step of the newest complete set, 0 before the first."""
    return checkpoints.step_of(checkpoint_sets.find_newest(str(folder)) or "")


def kill_once(folder, rng):
    """Let a child go on until it writes its first file, and kill it a moment later."""
    before = files_of(folder)
    child = fork(folder, 100_000, keep=2)
    while files_of(folder) == before:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, LONGEST))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def files_of(folder):
    """Return each checkpoint file with the time of its last change."""
    names = [path for path in Path(folder).glob("*0*") if path.suffix != ".csv"]
    times = {}
    for path in names:
        with contextlib.suppress(FileNotFoundError):
            times[path.name] = path.stat().st_mtime_ns
    return times


def newest_names(folder):
    """Return the largest number among the weights files, complete or not; 0 if there are none."""
    return max(checkpoint_sets.steps_among(checkpoints.names_in(str(folder))), default=0)


def same_set(one, other, step):
    """Compare all files of a step; of the states all but sizes."""
    names = sorted(path.name for path in Path(one).glob(f"*{step:06d}.pt"))
    assert len(names) == 4, names
    for name in names:
        pair = [torch.load(Path(folder) / name, weights_only=True) for folder in (one, other)]
        for state in pair if name.startswith("state") else ():
            del state["files"]
        assert equal(*pair), name


def main(folder, kills, seed):
    """Kill, check, and in the end compare with the undisturbed run."""
    rng, step = random.Random(seed), 0
    killed, whole = folder / "killed", folder / "whole"
    cut_short = 0
    for kill in range(kills):
        kill_once(killed, rng)
        unfinished = newest_names(killed)
        found = newest_step(killed)
        assert found >= step, f"kill {kill}: step {found} after {step}"
        cut_short += unfinished > found or any(killed.glob("*.tmp*"))
        step = found
        print(f"kill {kill}: the newest complete set is step {step}", flush=True)
    last = step + 1
    for where in (killed, whole):
        status = os.waitpid(fork(where, last, keep=0), 0)[1]
        assert status == 0, f"the run in {where} ended with {status}"
    for number in (step, last):
        same_set(killed, whole, number)
    print(f"{kills} kills, {cut_short} of them within a save, {last} steps")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
