"""Noise schedules against the published numbers and their definitions."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from guided_diffusion import gaussian_diffusion, schedules
from guided_diffusion.schedules import SCHEDULES, betas_for_alpha_bar, get_named_beta_schedule

REFERENCE = np.load(Path(__file__).parent / "reference" / "diffusion.npz")


@pytest.mark.parametrize("key", [k for k in REFERENCE.files if k.startswith("betas/")])
def test_schedules_agree_with_the_reference(key):
    _, name, steps = key.split("/")
    betas = get_named_beta_schedule(name, int(steps))
    assert betas.dtype == np.float64
    np.testing.assert_allclose(betas, REFERENCE[key], rtol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [25, 1000])
def test_betas_are_variances_that_end_in_noise(name, steps):
    betas = get_named_beta_schedule(name, steps)
    assert betas.shape == (steps,)
    assert ((betas > 0) & (betas < 1)).all()
    assert (np.diff(betas) >= 0).all()
    assert np.prod(1 - betas) < 1e-4


def test_betas_multiply_up_to_the_level_they_were_made_from():
    betas = betas_for_alpha_bar(10, lambda u: math.exp(-3 * u))
    np.testing.assert_allclose(np.cumprod(1 - betas), np.exp(-3 * np.arange(1, 11) / 10))


def test_max_beta_limits_the_betas():
    assert betas_for_alpha_bar(4, lambda u: 1 - u, max_beta=0.4).max() == 0.4


def test_an_unknown_schedule_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"--noise_schedule.*cosine.*linear.*'quadratic'"):
        get_named_beta_schedule("quadratic", 10)


def test_a_chain_has_at_least_one_step():
    with pytest.raises(ValueError, match="--diffusion_steps"):
        get_named_beta_schedule("cosine", 0)


@pytest.mark.parametrize("name", ["get_named_beta_schedule", "betas_for_alpha_bar"])
def test_the_names_stay_where_they_were_published(name):
    assert getattr(gaussian_diffusion, name) is getattr(schedules, name)


def test_schedules_load_without_torch():
    """A command line that lists the names must answer at once."""
    code = "import sys, guided_diffusion.schedules; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
