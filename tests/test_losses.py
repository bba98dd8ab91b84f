import math

import pytest
import torch

from guided_diffusion import losses


def test_normal_kl_agrees_with_torch_distributions():
    """The closed form must be that of the library, element by element."""
    torch.manual_seed(0)
    mean1, logvar1, mean2, logvar2 = torch.randn(4, 3, 5).double()
    p = torch.distributions.Normal(mean1, (0.5 * logvar1).exp())
    q = torch.distributions.Normal(mean2, (0.5 * logvar2).exp())
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(losses.normal_kl(mean1, logvar1, mean2, logvar2), expected)


def test_normal_kl_takes_numbers_for_tensors():
    """A number stands for a constant tensor; one real tensor is enough."""
    mean = torch.randn(3, 4)
    zeros = torch.zeros(3, 4)
    expected = losses.normal_kl(mean, zeros + 0.3, zeros, zeros + 0.2)
    torch.testing.assert_close(losses.normal_kl(mean, 0.3, 0.0, 0.2), expected)
    torch.testing.assert_close(losses.normal_kl(0.0, 0.0, mean, 0.0), mean**2 / 2)
    with pytest.raises(AssertionError, match="at least one tensor"):
        losses.normal_kl(0.0, 0.0, 0.0, 0.0)


def test_the_cdf_is_close_to_the_exact_one():
    """The tanh formula errs by less than 3e-4 everywhere."""
    x = torch.linspace(-6, 6, 1001).double()
    exact = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    assert (losses.approx_standard_normal_cdf(x) - exact).abs().max() < 3e-4


@pytest.mark.parametrize("mean, log_scale", [(0.0, -1.0), (0.7, -3.0), (-1.2, 0.5)])
def test_the_bins_of_all_256_values_share_the_whole_probability(mean, log_scale):
    """The bins tile the line, open at both ends, so their probabilities add up to one."""
    x = torch.arange(256).double() * 2 / 255 - 1
    log_p = losses.discretized_gaussian_log_likelihood(
        x, means=torch.full_like(x, mean), log_scales=torch.full_like(x, log_scale)
    )
    torch.testing.assert_close(log_p.exp().sum(), torch.ones((), dtype=torch.float64))


def test_an_impossible_pixel_costs_a_finite_amount_and_has_finite_gradients():
    """Probabilities are at least 1e-12, so one far-off pixel cannot make the bound infinite."""
    x = torch.tensor([-1.0, 0.0, 1.0])
    means = torch.tensor([50.0, 50.0, -50.0], requires_grad=True)
    log_p = losses.discretized_gaussian_log_likelihood(
        x, means=means, log_scales=torch.full_like(x, -5.0)
    )
    torch.testing.assert_close(log_p.detach(), torch.full((3,), math.log(1e-12)))
    log_p.sum().backward()
    assert means.grad.isfinite().all()
