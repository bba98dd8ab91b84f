"""Likelihood terms of the variational bound, in nats, and the loss of the noisy classifier."""

import math
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


def classifier_losses(
    diffusion: Any,
    noised: bool,
    model: nn.Module,
    x_start: Tensor,
    t: Tensor,
    cond: dict[str, Tensor],
    noise: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the cross-entropy and accuracies of a classifier of noised images.

    Args:
        diffusion: the process that noises the images.
        noised: False trains on clean images, at t = 0.
        model: (x_t [N, C, H, W], t [N]) -> logits [N, classes].
        x_start: images [N, C, H, W] in [-1, 1].
        t: timesteps [N].
        cond: {"y": labels [N]}.
        noise: the noise in x_t, shaped like x_start; drawn if None.

    Returns:
        "loss" [N], "acc@1" [N] and "acc@5" [N] (0 or 1 per image).
    """
    y = cond["y"]
    if noised:
        x_t = diffusion.q_sample(x_start, t, noise=noise)
    else:
        x_t, t = x_start, torch.zeros_like(t)
    logits = model(x_t, timesteps=t).float()
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == y[:, None]  # [N, 5]
    return {
        "loss": F.cross_entropy(logits, y, reduction="none"),
        "acc@1": ranked[:, 0].float(),
        "acc@5": ranked.any(dim=1).float(),
    }
