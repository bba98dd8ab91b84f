"""What the tests of the scripts share: tiny images, tiny models, and a way to run a script here."""

import contextlib
import importlib.util
import io
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
from launching import ROOT, clean_environment, launcher_words
from PIL import Image

from guided_diffusion import config

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
    """Return an environment without a launcher's variables, and without those of the logger."""
    kept = clean_environment(OMP_NUM_THREADS="1")
    return {name: value for name, value in kept.items() if not name.startswith("OPENAI_")}


def launch_command(launcher, program, arguments, ranks=2):
    """Return the command that runs a Python program as some ranks of this host."""
    return [*map(str, [*launcher_words(launcher, ranks), program, *arguments])]


def launch(launcher, program, arguments, cwd, ranks=2):
    """Run a Python program as some ranks, from a folder that is not the project's."""
    return subprocess.run(
        launch_command(launcher, program, arguments, ranks),
        capture_output=True, text=True, cwd=cwd, env=environment(), timeout=120,
    )  # fmt: skip
