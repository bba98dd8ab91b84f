"""What a run tells of itself."""

import re
from pathlib import Path

import pytest
import torch

from guided_diffusion import dist_util, logger, reporting


def test_quarters_go_from_little_noise_to_much():
    """Timesteps 0 to 99 of 100 fall into four equal quarters."""
    assert reporting.quarters_of(torch.tensor([0, 24, 25, 49, 50, 74, 75, 99]), 100) == [
        0, 0, 1, 1, 2, 2, 3, 3,
    ]  # fmt: skip


def test_losses_are_averaged_by_quarter(log_dir):
    """Each quarter has the mean of its own losses, the whole that of all."""
    reporting.log_losses(8, torch.tensor([0, 1, 7]), {"mse": torch.tensor([1.0, 3.0, 5.0])})
    assert logger.getkvs() == {"mse": 3.0, "mse_q0": 2.0, "mse_q3": 5.0}


def test_the_pace_is_that_of_the_last_steps(monkeypatch):
    """Images and seconds since the last row, and the time that the rest takes at this pace."""
    now = [100.0]
    monkeypatch.setattr(reporting.time, "monotonic", lambda: now[0])
    pace = reporting.Pace(total_steps=1000, step=50, images=400)
    now[0] += 20
    measured = pace.measure(step=60, images=480)
    assert measured["seconds_per_step"] == 2.0 and measured["images_per_second"] == 4.0
    assert measured["time_left"] == "0:31:20"
    now[0] += 1
    assert pace.measure(step=61, images=488)["seconds_per_step"] == 1.0
    assert "time_left" not in reporting.Pace(0, 0, 0).measure(1, 1)


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (90061, "1d 1:01:01"), (-3, "0:00:00")],
)
def test_durations_read_like_a_clock(seconds, text):
    """Days only where there are any."""
    assert reporting.as_clock(seconds) == text


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells it there")
def test_memory_is_that_of_the_process(log_dir):
    """In bytes, the most that this process has had in memory, as the kernel counts it."""
    assert dist_util.dev().type == "cpu"
    status = Path("/proc/self/status").read_text()
    kibibytes = int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1))
    assert reporting.peak_memory() == pytest.approx(1024 * kibibytes, rel=0.05)
