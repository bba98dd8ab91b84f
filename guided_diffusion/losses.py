"""Likelihood terms of the variational bound, in nats."""

import math
from typing import TypeAlias

import torch
from torch import Tensor

TensorOrFloat: TypeAlias = Tensor | float

MIN_PROBABILITY = 1e-12
EDGE = 0.999  # pixels beyond +-EDGE belong to the outermost bins
HALF_BIN = 1 / 255  # 256 values span [-1, 1]: a bin is 2 / 255 wide


def normal_kl(
    mean1: TensorOrFloat, logvar1: TensorOrFloat, mean2: TensorOrFloat, logvar2: TensorOrFloat
) -> Tensor:
    """Return KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) of each element, in nats.

    Shapes broadcast, and numbers may stand for tensors; at least one argument is a tensor.
    """
    given = (mean1, logvar1, mean2, logvar2)
    like = next((arg for arg in given if isinstance(arg, Tensor)), None)
    assert like is not None, "normal_kl needs at least one tensor"
    # Only exponents must be tensors: torch.exp takes no numbers.
    logvar1, logvar2 = (
        v if isinstance(v, Tensor) else torch.as_tensor(v).to(like) for v in (logvar1, logvar2)
    )
    var_ratio = torch.exp(logvar1 - logvar2)
    distance = (mean1 - mean2) ** 2 * torch.exp(-logvar2)
    return 0.5 * (logvar2 - logvar1 - 1.0 + var_ratio + distance)


def approx_standard_normal_cdf(x: Tensor) -> Tensor:
    """Approximate P(Z <= x) for a standard normal Z, shaped like x (Page, 1977)."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """Return the log probability, in nats, that a normal variable falls into the bin of x.

    DDPM (Ho et al., 2020), eq. 13. The outermost of the 256 bins are open-ended.

    Args:
        x: images [N, C, ...], bytes scaled to [-1, 1].
        means: the means, shaped like x.
        log_scales: the logarithms of the standard deviations, shaped like x.
    """
    assert x.shape == means.shape == log_scales.shape, (x.shape, means.shape, log_scales.shape)
    centered = x - means
    precision = torch.exp(-log_scales)
    below_upper = approx_standard_normal_cdf(precision * (centered + HALF_BIN))
    below_lower = approx_standard_normal_cdf(precision * (centered - HALF_BIN))
    probability = torch.where(x > EDGE, 1.0 - below_lower, below_upper - below_lower)
    probability = torch.where(x < -EDGE, below_upper, probability)
    return probability.clamp(min=MIN_PROBABILITY).log()
