"""Noise schedules by name: how the betas, the variances of the noising steps, grow."""

import math
from collections.abc import Callable

import numpy as np


def linear_betas(num_diffusion_timesteps: int) -> np.ndarray:
    """Return [T] float64 betas that rise on a line from 0.1 / T to 20 / T.

    At T = 1000 these are the 1e-4 to 0.02 of DDPM (Ho et al. 2020, section 4). For other lengths
    they shrink with T, which keeps the noise at the end of the chain about the same; below
    T = 20 the last of them would pass 1.
    """
    first, last = 1000 * 0.0001, 1000 * 0.02
    return np.linspace(
        first / num_diffusion_timesteps,
        last / num_diffusion_timesteps,
        num_diffusion_timesteps,
        dtype=np.float64,
    )


def cosine_betas(num_diffusion_timesteps: int) -> np.ndarray:
    """Return [T] float64 betas of the cosine schedule (improved DDPM, eq. 17, s = 0.008)."""
    return betas_for_alpha_bar(num_diffusion_timesteps, _squared_cosine)


def _squared_cosine(fraction: float) -> float:
    """Return f(t) of improved DDPM, eq. 17, at t / T = `fraction`."""
    return math.cos((fraction + 0.008) / 1.008 * math.pi / 2) ** 2


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """Discretise a continuous noise level into betas (improved DDPM, section 3.2).

    Args:
        num_diffusion_timesteps: the number T of steps.
        alpha_bar: the product of all (1 - beta) up to a fraction, 0..1, of the chain. It may be
            off by a constant factor, since only ratios are used.
        max_beta: an upper limit below 1; it prevents a singularity at the end of the chain.

    Returns:
        A float64 array [T].
    """
    levels = np.array(
        [alpha_bar(i / num_diffusion_timesteps) for i in range(num_diffusion_timesteps + 1)],
        dtype=np.float64,
    )
    return np.minimum(1 - levels[1:] / levels[:-1], max_beta)


SCHEDULES: dict[str, Callable[[int], np.ndarray]] = {
    "linear": linear_betas,
    "cosine": cosine_betas,
}


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """Return the float64 betas [num_diffusion_timesteps] of a schedule in `SCHEDULES`.

    Raises:
        ValueError: for a name that is not in `SCHEDULES`, or for fewer than one step.
    """
    if schedule_name not in SCHEDULES:
        raise ValueError(
            f"--noise_schedule must be one of {sorted(SCHEDULES)}, got {schedule_name!r}"
        )
    if num_diffusion_timesteps < 1:
        raise ValueError(f"--diffusion_steps must be at least 1, got {num_diffusion_timesteps}")
    return SCHEDULES[schedule_name](num_diffusion_timesteps)
