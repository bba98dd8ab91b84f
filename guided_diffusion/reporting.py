"""What a training run tells: its losses by noise level, its speed, memory and time left."""

from __future__ import annotations

import sys
import time

import torch
from torch import Tensor
from tqdm import tqdm

from . import dist_util, logger


def quarters_of(t: Tensor, num_timesteps: int) -> list[int]:
    """Return for each timestep [N] the quarter of the chain it lies in, 0 (least noise) to 3."""
    return (4 * t.cpu() // num_timesteps).tolist()


def log_losses(num_timesteps: int, t: Tensor, losses: dict[str, Tensor]) -> None:
    """Log the mean of each loss [N], over all timesteps [N] and over each quarter of the chain."""
    quarters = quarters_of(t, num_timesteps)
    for name, values in losses.items():
        logger.logkv_mean(name, values.mean().item())
        for quarter, value in zip(quarters, values.tolist(), strict=True):
            logger.logkv_mean(f"{name}_q{quarter}", value)


def progress_bar(total_steps: int, step: int, images: int, global_batch: int) -> tqdm:
    """Return the progress bar of a run, in images, on rank 0.

    Args:
        total_steps: where the run ends; 0 for never.
        step: steps done.
        images: images seen by then.
        global_batch: images in a step from here on.
    """
    return tqdm(
        total=images + (total_steps - step) * global_batch if total_steps else None,
        initial=images,
        unit="img",
        unit_scale=True,
        desc="training",
        disable=not dist_util.is_main(),
    )


class Pace:
    """A clock that measures the steps between two rows of the log.

    Args:
        total_steps: where the run ends; 0 for never.
        step: steps done, where the clock starts.
        images: images seen by then.
    """

    def __init__(self, total_steps: int, step: int, images: int):
        self.total_steps = total_steps
        self._step, self._images, self._since = step, images, time.monotonic()

    def measure(self, step: int, images: int) -> dict[str, float | str]:
        """Return what to log about the steps since the last call, and measure from here on.

        Args:
            step: steps done by now.
            images: images seen by all ranks by now.

        Returns:
            images_per_second, seconds_per_step, peak_memory_mb and, if there is an end, time_left
            as days and h:mm:ss.
        """
        seconds = max(time.monotonic() - self._since, 1e-9)
        steps, seen = max(step - self._step, 1), images - self._images
        measured: dict[str, float | str] = {
            "images_per_second": seen / seconds,
            "seconds_per_step": seconds / steps,
            "peak_memory_mb": peak_memory() / 2**20,
        }
        if self.total_steps:
            measured["time_left"] = as_clock((self.total_steps - step) * seconds / steps)
        self._step, self._images, self._since = step, images, time.monotonic()
        return measured


def as_clock(seconds: float) -> str:
    """Return a duration as h:mm:ss, with days in front if there are any."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours}:{minutes:02d}:{rest:02d}"


def peak_memory() -> int:
    """Return the most bytes in use so far: of the GPU if this rank has one, else of the process."""
    device = dist_util.dev()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
