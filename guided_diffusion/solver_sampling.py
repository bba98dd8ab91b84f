"""Solvers on a network: what a process was trained on, made into `denoise(x, sigma)`."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .gaussian_diffusion import GaussianDiffusion
from .noise_levels import NoiseLevels
from .sampling import (
    Cond,
    CondFn,
    Denoiser,
    NoiseFn,
    Step,
    XStartFn,
    last_sample,
    model_device,
    noise_like,
)
from .solvers import solve_progressive, state_dtype


class NetworkDenoiser:
    """A network as the solvers want it: (x [N, C, ...], sigma) -> x_start [N, C, ...].

    The network computes in its own precision, all else in that of x.

    Args:
        process: the diffusion process, respaced or not.
        model: the network.
        clip_denoised: limit its estimate to [-1, 1], before a gradient is added, as DDIM does.
        denoised_fn: edits the estimate, before that.
        cond_fn: the gradient of log p(y | x_t), or None.
        model_kwargs: keyword arguments of the network and of `cond_fn`.

    Raises:
        ValueError: if the network predicts neither noise nor x_start.
    """

    def __init__(
        self,
        process: GaussianDiffusion,
        model: Denoiser,
        *,
        clip_denoised: bool = True,
        denoised_fn: XStartFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: Cond | None = None,
    ):
        self.process, self.model, self.levels = process, model, NoiseLevels(process)
        self.clip_denoised, self.denoised_fn, self.cond_fn = clip_denoised, denoised_fn, cond_fn
        self.model_kwargs = model_kwargs or {}

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the expected clean image for the sample x at a level, 0-d, of float64."""
        t = self.levels.network_timesteps(float(sigma), len(x), x.device)
        x_t = x / (1 + sigma**2).sqrt()
        output = self.model(x_t.float(), t, **self.model_kwargs)
        x_start = self.levels.x_start(self.process._split(output, x)[0], x_t, sigma)
        if self.denoised_fn is not None:
            x_start = self.denoised_fn(x_start)
        if self.clip_denoised:
            x_start = x_start.clamp(-1, 1)
        if self.cond_fn is not None:
            gradient = self.cond_fn(x_t.float(), t, **self.model_kwargs)
            x_start = x_start + sigma**2 / (1 + sigma**2).sqrt() * gradient
        return x_start


def solver_sample_loop_progressive(
    process: GaussianDiffusion,
    model: Denoiser,
    shape: Sequence[int],
    solver: str,
    sigmas: Tensor,
    noise: Tensor | None = None,
    *,
    clip_denoised: bool = True,
    denoised_fn: XStartFn | None = None,
    cond_fn: CondFn | None = None,
    model_kwargs: Cond | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    noise_fn: NoiseFn | None = None,
    **options: Any,
) -> Iterator[Step]:
    """Yield every step of a solver on a network, as the loops of the process do.

    Errors are those of `solve_progressive` and `NetworkDenoiser`.

    Args:
        process: the diffusion process, respaced or not.
        model: the network.
        shape: (N, C, ...) of the batch.
        solver: a key of `solvers.SOLVERS`.
        sigmas: levels, such as `NoiseLevels(process).grid(20)`.
        noise: x_t at the first of them; drawn if None.
        clip_denoised: as for `NetworkDenoiser`; so are the next three.
        denoised_fn: see there.
        cond_fn: see there.
        model_kwargs: see there.
        device: where to sample; None for where the network's parameters are.
        progress: show a tqdm bar.
        noise_fn: draws all noise; None for the global generator.
        options: those of the solver.

    Yields:
        `sample`, x_t at the next level, and `pred_xstart`; both in float32.
    """
    denoise = NetworkDenoiser(
        process, model, clip_denoised=clip_denoised, denoised_fn=denoised_fn, cond_fn=cond_fn,
        model_kwargs=model_kwargs,
    )  # fmt: skip
    if noise is None:
        device = model_device(model) if device is None else device
        noise = noise_like(torch.empty(*shape, device=device), noise_fn)
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64)
    x = noise.to(state_dtype(noise.device)) * float((1 + sigmas[0] ** 2).sqrt())
    chain = solve_progressive(solver, denoise, x, sigmas, noise=noise_fn, **options)
    for out in tqdm(chain, total=len(sigmas) - 1, disable=not progress):
        x_t = out["sample"] / (1 + out["sigma"] ** 2) ** 0.5
        yield {"sample": x_t.float(), "pred_xstart": out["pred_xstart"].float()}


def solver_sample_loop(*args: Any, **kwargs: Any) -> Tensor:
    """Sample a batch by a solver; see `solver_sample_loop_progressive`."""
    return last_sample(solver_sample_loop_progressive(*args, **kwargs))
