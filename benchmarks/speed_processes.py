"""What speed.py measures of other processes: data loading, start-up, and peak memory.

python benchmarks/speed_processes.py JSON    # one task, as `peak` asks for it; prints bytes
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

DISTINCT = 32  # photographs that differ; the files of a folder repeat them
LOAD_BATCH = 16
WARM, BATCHES, AHEAD = 3, 8, 5  # batches before the clock starts, on it, and that loaders are ahead
NUM_PHOTOS = LOAD_BATCH * (WARM + BATCHES + AHEAD)
TIMEOUT = 600.0  # seconds
POLL = 0.005
STEPS = 3  # of a task whose memory is measured: the second has gradients and moments

PUBLISHED = "as published"  # the name of a training mode

Fields = dict[str, Any]


# --------------------------------------------------------------------------------------------
# Data


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Return coloured noise whose amplitudes fall like 1 / frequency, as those of photographs."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    noise = np.fft.rfft2(rng.standard_normal((4, height, width)))
    planes = np.fft.irfft2(noise / np.maximum(frequency, 1 / width), s=(height, width))
    planes /= planes.std(axis=(1, 2), keepdims=True)
    colours = 128 + 50 * (planes[:1] + 0.3 * planes[1:])  # light, and a tint
    return Image.fromarray(colours.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def write_photographs(folder: Path, num: int, size: tuple[int, int]) -> float:
    """Write `num` JPEG files CLASS_NUMBER.jpg of one seed; return their mean size in bytes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(num):
        path = folder / f"{i % 10}_{i}.jpg"
        if i < DISTINCT:
            photograph(rng, *size).save(path, quality=90)
        else:
            path.write_bytes((folder / f"{(i % DISTINCT) % 10}_{i % DISTINCT}.jpg").read_bytes())
    return sum(path.stat().st_size for path in folder.iterdir()) / num


def loading_seconds(package: Any, folder: Path, crop: int) -> float:
    """Return the seconds for BATCHES batches of a running `load_data`, left at its defaults."""
    batches = package.image_datasets.load_data(
        data_dir=str(folder), batch_size=LOAD_BATCH, image_size=crop
    )
    for _ in range(WARM):
        next(batches)
    start = time.perf_counter()
    for _ in range(BATCHES):
        next(batches)
    seconds = time.perf_counter() - start
    batches.close()
    return seconds


def first_batch(package: Any, folder: Path, crop: int) -> Any:
    """Return the first images of a folder, in order and as they are: [N, 3, crop, crop]."""
    batches = package.image_datasets.load_data(
        data_dir=str(folder), batch_size=LOAD_BATCH, image_size=crop, deterministic=True,
        random_flip=False,
    )  # fmt: skip
    images, _ = next(batches)
    batches.close()
    return images


# --------------------------------------------------------------------------------------------
# Start-up


def script_of(package: Any) -> Path | None:
    """Return the training script beside a package, if there is one that imports this package."""
    path = package.folder.parent / "scripts" / "image_train.py"
    return path if path.is_file() and package.folder.name == "guided_diffusion" else None


def environment(package: Any, device: str, threads: int) -> dict[str, str]:
    """Return the environment of a process that uses a package."""
    more = {"PYTHONPATH": str(package.folder.parent), "OMP_NUM_THREADS": str(threads)}
    return os.environ | more | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})


def help_seconds(package: Any, env: dict[str, str]) -> float:
    """Return the seconds that the training script takes for --help."""
    words = [sys.executable, str(script_of(package)), "--help"]
    start = time.perf_counter()
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise ValueError(f"{package.label}: --help ended with {last_line(done.stderr)}")
    return seconds


def first_step_seconds(package: Any, env: dict[str, str], flags: Fields, folder: Path) -> float:
    """Return the seconds from the start of the training script to the end of its first step.

    That is when the row of the step is in progress.csv; the process is then killed.

    Args:
        package: whose script.
        env: its environment.
        flags: of the script, such as data_dir.
        folder: an empty one, for the log.
    """
    env = env | {"OPENAI_LOGDIR": str(folder), "OPENAI_LOG_FORMAT": "csv"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with open(folder / "output.txt", "w+", errors="replace") as output:
        start = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, str(script_of(package)), *words, "--log_interval", "1"],
            env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        try:
            while not _has_row(folder / "progress.csv"):
                if child.poll() is not None or time.perf_counter() - start > TIMEOUT:
                    output.seek(0)
                    reason = last_line(output.read())
                    raise ValueError(f"{package.label}: no first training step: {reason}")
                time.sleep(POLL)
            return time.perf_counter() - start
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # its loaders, too
            child.wait()


def _has_row(csv: Path) -> bool:
    return csv.exists() and len(csv.read_text().splitlines()) > 1


def last_line(text: str) -> str:
    """Return the last line that says something."""
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["without a word"])[-1]


# --------------------------------------------------------------------------------------------
# Peak memory


def peak(package: Any, task: str, setting: Any, threads: int) -> int:
    """Do a task in a process of its own; return the most memory that it needed, in bytes.

    On a CPU that is what the operating system says, less what the process had after its imports;
    on a GPU what torch had allocated.
    """
    wanted = {"package": package.spec, "task": task, "setting": asdict(setting)}
    done = subprocess.run(
        [sys.executable, __file__, json.dumps(wanted)],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"{package.label}: {task}: {last_line(done.stderr)}")
    return int(done.stdout)


def measure(wanted: Fields) -> int:
    """Do a task in this process; return the bytes that it needed at most."""
    import torch
    import torch._dynamo  # by the optimizer, otherwise, and would count as its memory
    from speed_tasks import TASKS, Package, Setting, session

    package, setting = Package(wanted["package"]), Setting(**wanted["setting"])
    for part in ("fp16_util", "logger", "nn", "script_util", "unet"):
        getattr(package, part)
    before = resident_peak()
    with session(wanted["task"], setting):
        call = TASKS[wanted["task"]](package, setting)
        for i in range(STEPS):
            call(i)
    if setting.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resident_peak() - before


def resident_peak() -> int:
    """Return the most memory that this process had, in bytes.

    On Linux from /proc: what getrusage says begins with the memory of the parent.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def training_modes(setting: Any) -> dict[str, Any]:
    """Return, by name, other settings of a training step, whose memory is of interest."""
    checkpointed = replace(setting, flags=setting.flags | {"use_checkpoint": True})
    return {
        "--use_checkpoint True": checkpointed,
        PUBLISHED: replace(setting, as_published=True),
    }


if __name__ == "__main__":
    print(measure(json.loads(sys.argv[1])))
