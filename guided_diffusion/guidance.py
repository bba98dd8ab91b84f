"""Guidance: what steers sampling towards a label, a better image, or a measurement.

There are two kinds. A gradient, `cond_fn(x_t, t, **cond)`, is added to a mean or to the predicted
noise by the samplers. A `GuidedNetwork` has the arguments and the result of the network and so goes
wherever the network goes. Both can be limited to an interval of noise levels; outside it nothing
but the network is called.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .noise_levels import NoiseLevels, beside
from .sampling import CondFn, Denoiser, XStartFn

SMALL_BATCH = 2  # up to which a CPU, too, is faster with twice the batch than with two calls
Active = Callable[[Tensor], Tensor]  # t [N], as the network is told -> bool [N]


def classifier_guidance(classifier: nn.Module, scale: float) -> CondFn:
    """Return the gradient of scale * log p(y | x_t) as a function of x_t, t and y (ADM, alg. 1).

    The gradient flows to x_t alone: the classifier is frozen and put in eval mode.

    Args:
        classifier: (x_t [N, C, H, W], t [N]) -> logits [N, classes].
        scale: the guidance scale s.

    Returns:
        a function (x_t, t, y [N], **ignored) -> [N, C, H, W], to be given as `cond_fn`.
    """
    classifier.requires_grad_(False).eval()

    def cond_fn(x: Tensor, t: Tensor, y: Tensor | None = None, **_) -> Tensor:
        """Return the gradient, shaped like x."""
        if y is None:
            raise ValueError("classifier guidance needs the labels y in model_kwargs")
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            log_probs = F.log_softmax(classifier(x_in, t).float(), dim=-1)  # [N, classes]
            chosen = log_probs.gather(1, y[:, None])  # [N, 1]
            return torch.autograd.grad(chosen.sum(), x_in)[0] * scale

    return cond_fn


def estimate_guidance(
    process: Any,
    model: Denoiser,
    gradient_fn: Callable[[Tensor, Tensor], Tensor],
    clip_denoised: bool = True,
) -> CondFn:
    """Steer by what is wanted of the clean image: inverse problems (DPS, Chung et al. 2023).

    p(measurement | x_t) is taken to be a likelihood of the network's estimate of x_start, whose
    gradient passes back through the network. So a step has two calls more, one of them backward.
    examples/inverse_problem.py shows it at work.

    Args:
        process: the diffusion process, respaced or not.
        model: the network; its weights get no gradient.
        gradient_fn: (x_start [N, C, ...], sigma [N, 1, ...]) -> the gradient of
            log p(measurement | x_start) with respect to x_start, of the same shape and times
            whatever scale is wanted. The estimate is the less certain, the larger sigma is.
        clip_denoised: limit the estimate to [-1, 1]; what is beyond passes no gradient on. In
            strong noise an estimate that is not limited may be off by thousands.

    Returns:
        a function (x_t, t, **cond) -> [N, C, ...], to be given as `cond_fn`; see `limited` to
        leave out the strongest noise.
    """
    levels = NoiseLevels(process)

    def cond_fn(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """Return the gradient, shaped like x."""
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            sigma = beside(levels.sigma_of(t), x_in)
            x_start = levels.x_start(model(x_in, t, **cond), x_in, sigma)
            if clip_denoised:
                x_start = x_start.clamp(-1, 1)
            return torch.autograd.grad(x_start, x_in, gradient_fn(x_start.detach(), sigma))[0]

    return cond_fn


def together(*cond_fns: CondFn) -> CondFn:
    """Return the sum of several gradients, as of a classifier and a measurement."""

    def cond_fn(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """Return the sum, shaped like x."""
        return sum(function(x, t, **cond) for function in cond_fns)

    return cond_fn


def limited(cond_fn: CondFn, active: Active) -> CondFn:
    """Return a gradient that is 0, and costs nothing, where `active(t)` is false."""

    def limited_fn(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """Return the gradient, or zeros, shaped like x."""
        where = active(t)
        if not where.any():
            return torch.zeros_like(x)
        return cond_fn(x, t, **cond) * beside(where, x)

    return limited_fn


class GuidedNetwork:
    """A network that other predictions push away from what is less wanted.

        prediction + (cfg_scale - 1) * (prediction - that without the label)
                   + (guide_scale - 1) * (prediction - that of a weaker network)

    The second line is classifier-free guidance (Ho and Salimans 2022), the third autoguidance
    (Karras et al. 2024). Variance channels remain those of the network itself.

    Args:
        model: the network, (x_t [N, C, ...], t [N], y [N], **cond) -> [N, C or 2C, ...].
        cfg_scale: 1 for none.
        null_class: the label that stands for none.
        guide: the weaker network, with the same arguments; its variance channels do not count.
        guide_scale: 1 for none.
        active: where to guide; None for everywhere.
    """

    def __init__(
        self,
        model: Denoiser,
        *,
        cfg_scale: float = 1.0,
        null_class: int | None = None,
        guide: Denoiser | None = None,
        guide_scale: float = 1.0,
        active: Active | None = None,
    ):
        assert cfg_scale == 1 or null_class is not None, "classifier-free guidance: null_class?"
        self.model, self.cfg_scale, self.null_class = model, cfg_scale, null_class
        self.guide, self.guide_scale, self.active = guide, guide_scale, active

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """Return the guided prediction and, untouched, the variance: [N, C or 2C, ...]."""
        where = None if self.active is None else self.active(t)
        if where is not None and not where.any():
            return self.model(x, t, **cond)
        channels, push = x.shape[1], 0
        if self.cfg_scale != 1:
            out, null = self._both(x, t, **cond)
            push = (self.cfg_scale - 1) * (out - null)[:, :channels]
        else:
            out = self.model(x, t, **cond)
        if self.guide is not None and self.guide_scale != 1:
            weak = self.guide(x, t, **cond)[:, :channels]
            push = push + (self.guide_scale - 1) * (out[:, :channels] - weak)
        if where is not None:
            push = push * beside(where, x)
        return torch.cat([out[:, :channels] + push, out[:, channels:]], dim=1)

    def _both(self, x: Tensor, t: Tensor, *, y: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
        """Predict with and without labels: in one call where that is faster."""
        null = torch.full_like(y, self.null_class)
        if x.device.type == "cpu" and len(x) > SMALL_BATCH:
            return self.model(x, t, y=y, **cond), self.model(x, t, y=null, **cond)
        twice = {name: torch.cat([value, value]) for name, value in cond.items()}
        out = self.model(torch.cat([x, x]), torch.cat([t, t]), y=torch.cat([y, null]), **twice)
        return out.chunk(2)

    def parameters(self) -> Iterator[Tensor]:
        """Return the parameters of the network, none if it has none."""
        return getattr(self.model, "parameters", tuple)()


def fold(process: Any, model: Denoiser, cond_fn: CondFn) -> Denoiser:
    """Return a network whose prediction has a guidance gradient in it (ADM, algorithm 2).

    So that what edits the predicted x_start, as thresholding does, sees the guided one.

    Args:
        process: the diffusion process, respaced or not.
        model: the network.
        cond_fn: the gradient of log p(y | x_t).
    """
    levels = NoiseLevels(process)

    def guided(x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """Return the network's output, its mean channels shifted."""
        out, gradient = model(x, t, **cond), cond_fn(x, t, **cond)
        mean, rest = out[:, : x.shape[1]], out[:, x.shape[1] :]
        shifted = mean + levels.shift(gradient, beside(levels.sigma_of(t), x))
        return torch.cat([shifted, rest], dim=1)

    return guided


def dynamic_threshold(percentile: float) -> XStartFn:
    """Return what limits a predicted x_start by its own extent (Imagen, section 2.3).

    Where the given share of an image's pixels, by absolute value, is not within [-1, 1], the
    image is cut off at that value and scaled back to [-1, 1].

    Args:
        percentile: such as 0.995; in (0, 1].
    """

    def threshold(x_start: Tensor) -> Tensor:
        """Return the images [N, C, ...] within [-1, 1]."""
        sizes = x_start.flatten(1).abs()  # [N, D]
        rank = max(math.ceil(percentile * sizes.shape[1]), 1)
        limit = sizes.kthvalue(rank, dim=1).values.clamp(min=1)  # [N]
        limit = beside(limit, x_start)
        return torch.minimum(x_start.abs(), limit) * x_start.sign() / limit

    return threshold
