"""What the tests of the scripts share: tiny images, tiny models, and a way to run a script here."""

import contextlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from guided_diffusion import config

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    path.stem: path
    for path in (ROOT / "scripts").glob("*.py")
    if "config.run(main)" in path.read_text()
}

PROCESS = {"diffusion_steps": 20, "noise_schedule": "cosine"}
PIXELS = {"in_channels": 1, "num_classes": 3}
UNET = PIXELS | PROCESS | {
    "num_channels": 32, "channel_mult": "1,2", "num_res_blocks": 1, "num_heads": 1,
    "attention_resolutions": "4", "class_cond": True, "learn_sigma": True,
}  # fmt: skip
SMALL = UNET | {"image_size": 8}
SUPER_RES = UNET | {"large_size": 8, "small_size": 4}
CLASSIFIER = PIXELS | PROCESS | {
    "image_size": 8, "classifier_width": 32, "classifier_channel_mult": "1,2",
    "classifier_depth": 1, "classifier_attention_resolutions": "4",
    "classifier_num_head_channels": 32,
}  # fmt: skip


def flags_of(values):
    """Turn {"name": value} into ["--name", "value"]."""
    return [item for name, value in values.items() for item in (f"--{name}", str(value))]


@dataclass
class Done:
    """How a script ended: its exit code, and what it printed."""

    code: int
    out: str
    err: str


def load_script(name):
    """Import scripts/NAME.py as a fresh module."""
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", SCRIPTS[name])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(name, values=(), **more):
    """Run a script in this process, as its command line would."""
    argv = [f"{name}.py", *flags_of(dict(values) | more)]
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", argv),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            config.run(load_script(name).main)
        except SystemExit as end:
            code = end.code or 0
    return Done(code, out.getvalue(), err.getvalue())


def succeed(name, values=(), **more):
    """Run a script in this process and assert that it succeeds."""
    done = run_script(name, values, **more)
    assert done.code == 0, done.err
    return done


def make_images(folder, count=24, size=8, classes=3):
    """Write grey PNGs named CLASS_NUMBER.png, a class in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 256, (size, size), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i % classes}_{i}.png")
    return folder


def files_below(folder):
    """Return the paths of all files and folders below a folder, relative to it."""
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*")}


def environment():
    """Return an environment without a launcher's variables."""
    marks = ("SLURM_", "OMPI_", "PMI", "MPI_", "MV2_", "TORCHELASTIC_", "MASTER_", "OPENAI_")
    names = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(marks) and k not in names}
    return kept | {"OMP_NUM_THREADS": "1"}


def launch_command(launcher, program, arguments, ranks=2):
    """Return the command that runs a Python program as some ranks of this host."""
    mpiexec = Path(sys.executable).parent / "mpiexec"
    starts = {
        "mpiexec": [str(mpiexec) if mpiexec.exists() else shutil.which("mpiexec"), "-n"],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        + ["--nproc_per_node"],
    }
    python = [sys.executable] if launcher == "mpiexec" else []
    return [*starts[launcher], str(ranks), *python, str(program), *map(str, arguments)]


def launch(launcher, program, arguments, cwd, ranks=2):
    """Run a Python program as some ranks, from a folder that is not the project's."""
    return subprocess.run(
        launch_command(launcher, program, arguments, ranks),
        capture_output=True, text=True, cwd=cwd, env=environment(), timeout=120,
    )  # fmt: skip
