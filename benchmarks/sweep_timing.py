"""Seconds per image of sets of samples: what --time of the sweeps measures and keeps."""

import argparse
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from sweeping import Drawing, command, one_thread
from tqdm import tqdm

from guided_diffusion import checkpoints

NUM_TIMED, NUM_ROUNDS = 50, 3  # images and rounds


def measure(drawings: Mapping[str, Drawing], args: argparse.Namespace) -> dict[str, float]:
    """Return the seconds per image of each drawing, medians over the rounds.

    Each round draws NUM_TIMED images of every drawing, and twice as many: the difference does not
    contain the start of the script.

    Raises:
        ValueError: a script failed.
    """
    found = {name: [] for name in drawings}
    with tqdm(total=NUM_ROUNDS * len(drawings), desc="timing", unit="run") as bar:
        for _ in range(NUM_ROUNDS):
            for name, drawing in drawings.items():
                once, twice = (replace(drawing, num_samples=n * NUM_TIMED) for n in (1, 2))
                found[name].append((seconds_of(twice, args) - seconds_of(once, args)) / NUM_TIMED)
                bar.update()
    return {name: median(seconds) for name, seconds in found.items()}


def seconds_of(drawing: Drawing, args: argparse.Namespace) -> float:
    """Draw a set into a folder that is thrown away; return the seconds from start to end.

    Raises:
        ValueError: the script failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run(
            command(drawing, args, Path(folder)), capture_output=True, text=True, env=one_thread()
        )
        seconds = time.perf_counter() - start
    if done.returncode:
        raise ValueError(f"{drawing.name}: {done.stderr.strip().splitlines()[-1]}")
    return seconds


def keep(path: Path, seconds: Mapping[str, float], args: argparse.Namespace) -> None:
    """Write what was measured, and where."""
    where = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    content = {**where, "threads": 1, "bf16": args.bf16, "seconds_per_image": dict(seconds)}
    checkpoints.make_folder(str(path.parent))
    checkpoints.write_bytes(str(path), f"{json.dumps(content, indent=1)}\n".encode())
    print(f"timing: {path.resolve()}")


def read(path: Path) -> dict[str, float]:
    """Return what was measured; empty if --time has not run."""
    return json.loads(path.read_text())["seconds_per_image"] if path.exists() else {}
