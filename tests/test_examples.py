"""The examples' own functions, on problems whose solution is known."""

import importlib.util

import pytest
import torch
from launching import ROOT

from guided_diffusion.noise_levels import NoiseLevels, beside
from guided_diffusion.script_util import create_gaussian_diffusion


def load_example(name):
    """Import examples/NAME.py."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


inverse = load_example("inverse_problem")
PIXEL, NOISE = 0.04, 0.05  # variance of a pixel, all independent; deviation of the measurement


def test_the_transpose_is_that_of_the_measurement():
    """<A x, y> = <x, A' y>."""
    x, y = torch.randn(2, 1, 8, 12), torch.randn(2, 1, 2, 3)
    torch.testing.assert_close(
        (inverse.measure(x) * y).sum(), (x * inverse.spread(y)).sum(), rtol=1e-4, atol=1e-4
    )
    assert inverse.image_shape(y) == x.shape


def exact_network(process):
    """Return what predicts x_start of independent normal pixels, exactly."""
    levels = NoiseLevels(process)

    def network(x, t):
        a_t = beside(1 / (1 + levels.sigma_of(t) ** 2), x)
        return x * a_t.sqrt() * PIXEL / (a_t * PIXEL + 1 - a_t)

    return network


def reconstruct(by, y):
    respacing = "250" if by == "steps" else ""
    process = create_gaussian_diffusion(predict_xstart=True, timestep_respacing=respacing)
    model = exact_network(process)
    if by == "steps":
        return inverse.by_steps(process, model, y, NOISE)
    return inverse.by_solver(process, model, y, NOISE, by, 50)


@pytest.mark.parametrize("by", ["steps", "dpmpp_2m", "dpmpp_2m_sde"])
def test_reconstructions_are_draws_from_the_posterior(by):
    """Of independent normal pixels whose averages were measured, mean and variance are known.

    The mean of a block is normal around gain * y; what was not measured stays as it was.
    """
    torch.manual_seed(0)
    truth = PIXEL**0.5 * torch.randn(4000, 1, 8, 8)
    y = inverse.measure(truth) + NOISE * torch.randn(4000, 1, 2, 2)
    x = reconstruct(by, y)
    block, prior = inverse.measure(x), PIXEL / inverse.BLOCK**2
    gain = prior / (prior + NOISE**2)
    slope = float((block * y).mean() / y.square().mean())
    rest = float((block - slope * y).square().mean())
    within = float((x - inverse.spread(block) * inverse.BLOCK**2).square().mean())
    assert abs(slope - gain) < 0.03
    assert abs(rest / (gain * NOISE**2) - 1) < 0.1
    assert abs(within / (PIXEL * 15 / 16) - 1) < 0.1
