"""Solvers: from noise to an image along the levels sigma, in few calls of the network.

All work on x = x_start + sigma * noise and ask `denoise(x, sigma)` for the expected clean image, so
none knows what the network predicts, how it is guided, or where the levels come from. The exact way
from one level to the next (DPM-Solver++, proposition 4.1; here alpha = 1, lambda = -log sigma) is

    x' = (sigma' / sigma) x + integral of exp(lambda - lambda') x_start(lambda) d lambda

and what sets the solvers apart is what they put in place of x_start(lambda): `_integrate` takes a
polynomial through estimates of it. The older kind (DDIM, PLMS, Heun) takes steps along the slope
dx / d sigma = (x - x_start) / sigma, which is the predicted noise.

A step is a function of a `Stage`. `SOLVERS` has each of them, in the loop, as a solver.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .sampling import NoiseFn, noise_like

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x [N, ...], sigma, 0-d) -> x_start [N, ...]


class Point(NamedTuple):
    """A place on the way: the sample at a level, and the clean image as seen from there."""

    sigma: float
    x: Tensor
    x_start: Tensor

    @property
    def eps(self) -> Tensor:
        """The predicted noise: the slope dx / d sigma."""
        return (self.x - self.x_start) / self.sigma


@dataclass(frozen=True)
class Stage:
    """What a step starts from.

    Attributes:
        denoise: the network.
        x: the sample [N, ...], float64.
        sigma: its level.
        after: the next level.
        past: the points before, the latest first; at most MEMORY of them.
        left: steps to the level 0, this one included; infinite if the levels end above it.
        num_steps: steps of the whole chain.
        noise: draws noise; None for the global generator.
    """

    denoise: Denoise
    x: Tensor
    sigma: float
    after: float
    past: Sequence[Point]
    left: float
    num_steps: int
    noise: NoiseFn | None

    def look(self, x: Tensor | None = None, sigma: float | None = None) -> Point:
        """Call the network: at the start of the step, or for another sample and level."""
        x, sigma = self.x if x is None else x, self.sigma if sigma is None else sigma
        level = torch.tensor(sigma, dtype=torch.float64)
        return Point(sigma, x, self.denoise(x, level).to(x.dtype))

    def add_noise(self, x: Tensor, deviation: float) -> Tensor:
        """Add normal noise of some deviation; for 0, draw none."""
        return x + deviation * noise_like(x, self.noise).to(x) if deviation else x


Taken = tuple[Point, Tensor]  # where a step began, and the sample where it ended
MEMORY = 3


# --------------------------------------------------------------------------------------------
# Along the predicted noise


def _ddim(at: Stage, eta: float = 0.0) -> Taken:
    """Follow the slope to below the next level, and add the noise that is missing (DDIM, eq. 12).

    `eta` is the deviation of that noise in units of the posterior's: 0 for the plain ODE, 1 for
    ancestral sampling with the posterior's variance.
    """
    here = at.look()
    added = eta * at.after * math.sqrt(1 - (at.after / at.sigma) ** 2)
    below = math.sqrt(max(at.after**2 - added**2, 0.0))
    return here, at.add_noise(here.x_start + below * here.eps, added)


# Adams-Bashforth on equal steps: the weights of the latest slope and of those before it.
ADAMS_BASHFORTH = [
    np.array([1.0]),
    np.array([3.0, -1.0]) / 2,
    np.array([23.0, -16.0, 5.0]) / 12,
    np.array([55.0, -59.0, 37.0, -9.0]) / 24,
]


def _ipndm(at: Stage) -> Taken:
    """Combine the slopes of up to four points, as many as there are (Zhang and Chen 2022)."""
    here = at.look()
    slopes = [point.eps for point in (here, *at.past)]
    weights = ADAMS_BASHFORTH[len(slopes) - 1]
    slope = sum(float(w) * eps for w, eps in zip(weights, slopes, strict=True))
    return here, at.x + (at.after - at.sigma) * slope


def _plms(at: Stage) -> Taken:
    """As iPNDM, but the first step is Heun's, of second order, with two calls.

    The pseudo linear multistep method (PNDM, Liu et al. 2022), as latent diffusion made it known.
    """
    return _ipndm(at) if at.past else _heun(at)


def _heun(
    at: Stage,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
    round_sigma: Callable[[float], float] = float,
) -> Taken:
    """Take the mean of the slopes at both ends: two calls, but in a step to 0 (EDM, algorithm 2).

    Args:
        at: the start of the step.
        s_churn: how much noise is added before the steps, in all.
        s_tmin: the lowest level at which it is added.
        s_tmax: the highest.
        s_noise: the deviation of that noise; a little over 1 makes up for what the network
            removes too much.
        round_sigma: takes a raised level to one that the network knows.
    """
    x, sigma, churn = at.x, at.sigma, min(s_churn / at.num_steps, math.sqrt(2) - 1)
    if churn and s_tmin <= sigma <= s_tmax:
        sigma = max(sigma, round_sigma(sigma * (1 + churn)))
        x = at.add_noise(x, s_noise * math.sqrt(sigma**2 - at.sigma**2))
    here = at.look(x, sigma)
    x_after = x + (at.after - sigma) * here.eps
    if at.after > 0:
        there = at.look(x_after, at.after)
        x_after = x + (at.after - sigma) * (here.eps + there.eps) / 2
    return here, x_after


# --------------------------------------------------------------------------------------------
# Along the predicted image


def _moments(h: float, count: int) -> list[float]:
    """Integrate s^k h exp(-(1 - s) h) over s in [0, 1], for k below `count`, by parts."""
    moments = [-math.expm1(-h)]
    for k in range(1, count):
        moments.append(1 - k / h * moments[-1])
    return moments


def _integrate(
    start: Point, after: float, others: Sequence[Point], eta: float = 0.0, halve: bool = False
) -> Tensor:
    """Return the sample at the level `after`, by a polynomial in lambda through estimates.

    It passes through `start.x_start` and those of `others`, weighted such that all polynomials of
    this degree are integrated exactly. Of one other point alone the weight is that of the midpoint
    rule, as in DPM-Solver++ 2M and in UniPC's B2(h).

    Args:
        start: where the step begins.
        after: the level where it ends; at 0 the sample is `start.x_start`.
        others: further points, whether before the step or at its end.
        eta: 0 for the ODE; otherwise the mean of the SDE with so much noise (1: the posterior's).
        halve: give the second derivative half of its weight.
    """
    if after == 0:
        return start.x_start
    step = math.log(start.sigma / after)
    h = (1 + eta) * step
    at = np.array([math.log(start.sigma / point.sigma) / step for point in others])  # the end: 1
    wanted = np.array(_moments(h, len(others) + 1))
    if len(others) == 1:
        wanted[1] = wanted[0] / 2
    if halve and len(others) == 2:
        wanted[2] /= 2
    weights = np.linalg.solve(np.vander(at, len(wanted), increasing=True)[:, 1:].T, wanted[1:])
    x = math.exp(-h) * start.x + float(wanted[0]) * start.x_start
    for weight, point in zip(weights, others, strict=True):
        x = x + float(weight) * (point.x_start - start.x_start)
    return x


def _multistep(
    at: Stage, order: int = 2, halve: bool = False, eta: float = 0.0, s_noise: float = 1.0
) -> Taken:
    """Take the points before into the polynomial (DPM-Solver++, algorithm 2, and its SDE form).

    Args:
        at: the start of the step.
        order: 1, 2 or 3: so many points.
        halve: give the second derivative half of its weight, as implementations usually do.
        eta: 0 for the ODE, 1 for the SDE.
        s_noise: the deviation of its noise.
    """
    _require_order(order, (1, 2, 3))
    here = at.look()
    x = _integrate(here, at.after, at.past[: order - 1], eta, halve)
    added = s_noise * at.after * math.sqrt(1 - (at.after / at.sigma) ** (2 * eta))
    return here, at.add_noise(x, added)


def _require_order(order: int, orders: tuple[int, ...]) -> None:
    if order not in orders:
        raise ValueError(f"order must be one of {', '.join(map(str, orders))}, got {order!r}")


def _unipc(at: Stage, order: int = 2) -> Taken:
    """Correct the sample by what the network sees there, then predict the next (UniPC, section 3).

    The correction repeats the last step with its end as a further point, and costs no call. Before
    the level 0 the order falls, as it does in the step to it.

    Args:
        at: the start of the step.
        order: 2 or 3.
    """
    _require_order(order, (2, 3))
    here, past = at.look(), at.past
    if past:
        x = _integrate(past[0], at.sigma, [*past[1:order], here])
        here = Point(at.sigma, x, here.x_start)
    degree = int(min(order, len(past) + 1, at.left))
    return here, _integrate(here, at.after, past[: degree - 1])


# --------------------------------------------------------------------------------------------
# The loop


STEPS: dict[str, Callable[..., Taken]] = {
    "ancestral": partial(_ddim, eta=1.0),
    "ddim": _ddim,
    "plms": _plms,
    "ipndm": _ipndm,
    "heun": _heun,
    "dpmpp_2m": _multistep,
    "dpmpp_3m": partial(_multistep, order=3),
    "dpmpp_3m_classic": partial(_multistep, order=3, halve=True),
    "dpmpp_2m_sde": partial(_multistep, eta=1.0),
    "unipc": _unipc,
}


def state_dtype(device: torch.device) -> torch.dtype:
    """Return what samples are kept in: float64, or float32 on devices without it."""
    return torch.float32 if device.type == "mps" else torch.float64


@torch.no_grad()
def solve_progressive(
    name: str,
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    *,
    noise: NoiseFn | None = None,
    **options: Any,
) -> Iterator[dict[str, Any]]:
    """Yield every step of a solver.

    Args:
        name: a key of STEPS.
        denoise: `denoise(x, sigma)` returns the expected clean image [N, ...] for the sample x
            [N, ...] at the level sigma, a float64 tensor without dimensions.
        x: the sample [N, ...] at the first level.
        sigmas: the levels [K + 1], falling; the last may be 0.
        noise: draws normal noise shaped like its argument; None for the global generator.
        options: those of the step.

    Yields:
        `sample`, x at the level `sigma`; `pred_xstart`, the clean image as seen from the level
        before; `i`, the number of the step from 0 on. All in `state_dtype`.

    Raises:
        ValueError: if the levels do not fall, or there is no such solver or order.
    """
    if name not in STEPS:
        raise ValueError(f"the solver must be one of {', '.join(STEPS)}, got {name!r}")
    levels = _checked(sigmas)
    step, past = partial(STEPS[name], **options), ()
    x = x.to(state_dtype(x.device))
    num_steps = len(levels) - 1
    for i, (sigma, after) in enumerate(itertools.pairwise(levels)):
        left = num_steps - i if levels[-1] == 0 else math.inf
        here, x = step(Stage(denoise, x, sigma, after, past, left, num_steps, noise))
        yield {"i": i, "sigma": after, "sample": x, "pred_xstart": here.x_start}
        past = (here, *past)[:MEMORY]


def _checked(sigmas: Tensor) -> list[float]:
    """Return the levels as numbers."""
    levels = torch.as_tensor(sigmas, dtype=torch.float64).tolist()
    falls = len(levels) > 1 and all(a > b for a, b in itertools.pairwise(levels))
    if not falls or levels[-1] < 0 or levels[0] == math.inf:
        raise ValueError(f"sigmas must fall, from a finite level to 0 or more, got {levels}")
    return levels


def _as_solver(name: str) -> Callable[..., Tensor]:
    def solver(
        denoise: Denoise,
        x: Tensor,
        sigmas: Tensor,
        *,
        noise: NoiseFn | None = None,
        callback: Callable[[dict[str, Any]], None] | None = None,
        **options: Any,
    ) -> Tensor:
        """Return the sample at the last level, [N, ...] in float64.

        Arguments and errors are those of `solve_progressive`; `callback` is given what that yields.
        """
        for out in solve_progressive(name, denoise, x, sigmas, noise=noise, **options):
            if callback is not None:
                callback(out)
        return out["sample"]

    solver.__name__ = solver.__qualname__ = name
    return solver


# name -> (denoise, x, sigmas, *, noise=None, callback=None, **options) -> x
SOLVERS: dict[str, Callable[..., Tensor]] = {name: _as_solver(name) for name in STEPS}
