"""A mixture of four Gaussians in the plane, where all that a network would learn is known."""

import numpy as np
import torch

from guided_diffusion.noise_levels import NoiseLevels

MEANS = torch.tensor([[-0.8, -0.3], [0.5, 0.7], [0.9, -0.6], [-0.1, 0.2]], dtype=torch.float64)
VARIANCES = torch.tensor([0.05, 0.02, 0.1, 0.03], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.25, 0.25, 0.2], dtype=torch.float64)


def log_joint(x, sigma):
    """Return log p(x, k) up to a constant, [N, 4], of x [N, 2] = x_start + sigma * noise."""
    variances = VARIANCES + sigma**2
    squares = ((x[:, None] - MEANS) ** 2).sum(dim=2)
    return WEIGHTS.log() - variances.log() - squares / (2 * variances)


def denoise(x, sigma):
    """Return the posterior mean of x_start, [N, 2]."""
    x = x.double()
    shares = log_joint(x, sigma).softmax(dim=1)
    noise = sigma**2
    means = (VARIANCES[:, None] * x[:, None] + noise * MEANS) / (VARIANCES + noise)[:, None]
    return (shares[..., None] * means).sum(dim=1)


def class_gradient(x, sigma, y):
    """Return the gradient of log p(y | x) with respect to x, [N, 2]."""
    x = x.double()
    pulls = (MEANS - x[:, None]) / (VARIANCES + sigma**2)[:, None]  # of log p(x | k)
    shares = log_joint(x, sigma).softmax(dim=1)
    return pulls[torch.arange(len(x)), y] - (shares[..., None] * pulls).sum(dim=1)


class ExactNetwork:
    """What a network that predicts the noise would be after endless training.

    Args:
        process: says which sigma a timestep means.
        num_out: 2 for the noise alone, 4 with channels for a learned variance, here 0.
    """

    def __init__(self, process, num_out=2):
        self.levels, self.num_out, self.calls = NoiseLevels(process), num_out, []

    def __call__(self, x_t, t, y=None):
        self.calls.append(float(t[0]))
        sigma = self.levels.sigma_of(t[:1])
        x = x_t.double() * (1 + sigma**2).sqrt()
        eps = (x - denoise(x, sigma)) / sigma
        return torch.cat([eps, torch.zeros(len(x), self.num_out - 2)], dim=1).to(x_t.dtype)


class ExactGradient(ExactNetwork):
    """The gradient of log p(y | x_t), as a classifier would give it."""

    def __call__(self, x_t, t, y=None):
        self.calls.append(float(t[0]))
        sigma = self.levels.sigma_of(t[:1])
        scale = (1 + sigma**2).sqrt()
        return (class_gradient(x_t.double() * scale, sigma, y) * scale).to(x_t.dtype)


def start(num=512, sigma=157.40728, seed=0):
    """Return points of the prior, float64 [num, 2]."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((num, 2)) * sigma)


def log_grid(num_steps, highest=157.40728, lowest=0.0100005):
    """Return levels that are even in log sigma, float64 [num_steps + 1]."""
    return torch.from_numpy(np.geomspace(highest, lowest, num_steps + 1))
