"""Sampling: one loop, and one step per sampler.

A step takes the process (`GaussianDiffusion` or what behaves like it), the network, a batch x_t
and its timesteps, and returns a dict with `sample`, the next batch, and `pred_xstart`, the
network's present idea of x_0. `run_chain` feeds each sample to the next step. A further sampler
is a further step function; the loop stays.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

Denoiser = Callable[..., Tensor]  # (x_t [N, C, ...], t [N], **cond) -> [N, C or 2C, ...]
CondFn = Callable[..., Tensor]  # same arguments -> gradient of log p(y | x_t), shaped like x_t
XStartFn = Callable[[Tensor], Tensor]  # edits a predicted x_0 before it is used
NoiseFn = Callable[[Tensor], Tensor]  # x -> standard normal noise, shaped like x
Cond = dict[str, Any]  # keyword arguments of the network and of the guidance gradient
Device = torch.device | str | None
Step = dict[str, Tensor]  # "sample" and "pred_xstart", each [N, C, ...]


def noise_like(x: Tensor, noise_fn: NoiseFn | None = None) -> Tensor:
    """Draw the noise of one step, shaped like `x`: the only place where steps draw.

    From the global generator, as published, or from `noise_fn`.
    """
    return torch.randn_like(x) if noise_fn is None else noise_fn(x)


def ancestral_step(
    process: "SamplingMethods",
    model: Denoiser,
    x: Tensor,
    t: Tensor,
    *,
    cond_fn: CondFn | None = None,
    model_kwargs: Cond | None = None,
    noise_fn: NoiseFn | None = None,
    **options: Any,
) -> Step:
    """Draw x_{t-1} from p(x_{t-1} | x_t) (DDPM, algorithm 2).

    A guidance gradient shifts the mean by variance * gradient (ADM, algorithm 1). At t = 0 the
    mean itself is returned.

    Args:
        process: gives the distribution.
        model: the network.
        x: x_t, [N, C, ...].
        t: integer timesteps [N] of the process.
        cond_fn: the gradient of log p(y | x_t), or None.
        model_kwargs: keyword arguments for `model` and `cond_fn`.
        noise_fn: draws the noise; None for the global generator.
        options: `clip_denoised` and `denoised_fn` of `p_mean_variance`.
    """
    out = process.p_mean_variance(model, x, t, model_kwargs=model_kwargs, **options)
    noise = noise_like(x, noise_fn)
    mean = out["mean"]
    if cond_fn is not None:
        mean = process.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
    not_last = (t != 0).float().view(-1, *[1] * (x.ndim - 1))
    sample = mean + not_last * torch.exp(0.5 * out["log_variance"]) * noise
    return {"sample": sample, "pred_xstart": out["pred_xstart"]}


def ddim_step(
    process: "SamplingMethods",
    model: Denoiser,
    x: Tensor,
    t: Tensor,
    *,
    cond_fn: CondFn | None = None,
    model_kwargs: Cond | None = None,
    eta: float = 0.0,
    noise_fn: NoiseFn | None = None,
    **options: Any,
) -> Step:
    """Go from x_t to x_{t-1} along the implicit model (DDIM, eqs. 12 and 16).

    A guidance gradient enters the predicted noise (ADM, algorithm 2); x_0 is then recomputed and
    not clipped again. The global generator is drawn from for eta = 0 too, as published, so that
    eta does not shift later draws.

    Args:
        process: gives the prediction of x_0.
        model: the network.
        x: x_t, [N, C, ...].
        t: integer timesteps [N] of the process.
        cond_fn: the gradient of log p(y | x_t), or None.
        model_kwargs: keyword arguments for `model` and `cond_fn`.
        eta: 0 (deterministic) to 1 (as noisy as DDPM).
        noise_fn: draws the noise, unless eta is 0; None for the global generator.
        options: `clip_denoised` and `denoised_fn` of `p_mean_variance`.
    """
    out = process.p_mean_variance(model, x, t, model_kwargs=model_kwargs, **options)
    if cond_fn is not None:
        out = process.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
    x_start = out["pred_xstart"]
    eps = process._predict_eps_from_xstart(x, t, x_start)
    a_prev = process.lookup("alphas_cumprod_prev", t, x)
    # Eq. 16 is eta times the posterior's deviation; at t = 0 it vanishes: no mask is needed.
    sigma = eta * process.lookup("posterior_variance", t, x).sqrt()
    # The clamp catches rounding: with eta = 1 and a_t near 0 the difference is nearly 0.
    remaining = process.lookup("_one_minus_alphas_cumprod_prev", t, x) - sigma**2
    mean = x_start * a_prev.sqrt() + remaining.clamp(min=0).sqrt() * eps
    if eta == 0 and noise_fn is not None:
        return {"sample": mean, "pred_xstart": x_start}
    return {"sample": mean + sigma * noise_like(x, noise_fn), "pred_xstart": x_start}


def ddim_reverse_step(
    process: "SamplingMethods",
    model: Denoiser,
    x: Tensor,
    t: Tensor,
    *,
    eta: float = 0.0,
    **options: Any,
) -> Step:
    """Go from x_t to x_{t+1}: encode an image by the DDIM ODE (DDIM, section 4.3).

    Args:
        process: gives the prediction of x_0.
        model: the network.
        x: x_t, [N, C, ...].
        t: integer timesteps [N] of the process.
        eta: must be 0, since only the deterministic path can be walked back.
        options: `clip_denoised`, `denoised_fn` and `model_kwargs` of `p_mean_variance`.
    """
    assert eta == 0.0, f"the reverse ODE exists for the deterministic path only, got eta={eta}"
    x_start = process.p_mean_variance(model, x, t, **options)["pred_xstart"]
    eps = process._predict_eps_from_xstart(x, t, x_start)
    a_next = process.lookup("alphas_cumprod_next", t, x)
    return {
        "sample": x_start * a_next.sqrt() + (1 - a_next).sqrt() * eps,
        "pred_xstart": x_start,
    }


@torch.no_grad()  # as a decorator it ends at every yield; a `with` would leak into the consumer
def run_chain(
    step: Callable[[Tensor, Tensor], Step],
    model: Denoiser,
    shape: Sequence[int],
    timesteps: Sequence[int],
    noise: Tensor | None = None,
    device: Device = None,
    progress: bool = False,
    noise_fn: NoiseFn | None = None,
) -> Iterator[Step]:
    """Yield `step(x, t)` for each of the timesteps, feeding each sample to the next.

    The loop reads `sample` back after the yield: a consumer may replace it and so steer the chain.

    Args:
        step: `(x, t) -> Step` with everything else bound.
        model: the network; asked for its device only.
        shape: the shape (N, C, ...) of the batch.
        timesteps: from the first step to the last.
        noise: where the chain starts, or None to draw it on `device`.
        device: where to sample; None for where the network's parameters are.
        progress: show a tqdm bar.
        noise_fn: draws `noise`, if that is None; None for the global generator.
    """
    assert isinstance(shape, (tuple, list)), f"shape must be a tuple or a list, got {shape!r}"
    device = model_device(model, noise) if device is None else device
    if noise is None:
        x = torch.empty(*shape, device=device)
        noise = x.normal_() if noise_fn is None else noise_fn(x)
    x = noise
    for i in tqdm(timesteps, disable=not progress):
        out = step(x, torch.full((shape[0],), i, dtype=torch.int64, device=device))
        yield out
        x = out["sample"]


def last_sample(chain: Iterable[Step]) -> Tensor:
    """Run a chain to its end and return the last sample, [N, C, ...]."""
    for out in chain:
        sample = out["sample"]
    return sample


def model_device(model: Denoiser, noise: Tensor | None = None) -> torch.device:
    """Return the device of a network's parameters.

    A function without parameters is taken to live where `noise` does, else on the CPU.
    """
    parameters = getattr(model, "parameters", tuple)()
    first = next(iter(parameters), noise)
    return torch.device("cpu") if first is None else first.device


def _given(noise_fn: NoiseFn | None) -> dict[str, NoiseFn]:
    """Return the source as a keyword argument, if there is one.

    Subclasses that override a method with its published signature know of none.
    """
    return {} if noise_fn is None else {"noise_fn": noise_fn}


class SamplingMethods:
    """The samplers as methods of a process, for `GaussianDiffusion` to inherit.

    The process brings `num_timesteps`, `p_mean_variance`, `condition_mean`, `condition_score`,
    `_predict_eps_from_xstart` and `lookup`. The arguments mean the same in all methods:

    * `model`, the network, called as `model(x, t, **model_kwargs)`;
    * `x`, the batch x_t [N, C, ...], and `t`, integer timesteps [N] of the process;
    * `shape`, of the batch to sample; `noise`, its start x_T, drawn if None; `device`, where to
      sample, None for where the network's parameters are; `progress`, show a tqdm bar;
    * `clip_denoised`, limit the predicted x_0 to [-1, 1]; `denoised_fn`, edits it before that;
    * `cond_fn`, gradient of log p(y | x_t), called as `cond_fn(x, t, **model_kwargs)`;
    * `eta`, the noise of DDIM: 0 is deterministic, 1 as noisy as ancestral sampling;
    * `noise_fn`, the source of all noise, called as `noise_fn(x)`: first for the start, if `noise`
      is None, then once a step that needs some; None for torch's global generator.

    Steps return a dict with `sample` and `pred_xstart`; progressive loops yield these dicts, from
    the noisiest step to the last; the other loops return the last sample, [N, C, ...].
    """

    def p_sample(
        self,
        model: Denoiser,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: XStartFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: Cond | None = None,
        noise_fn: NoiseFn | None = None,
    ) -> Step:
        """Draw x_{t-1} from p(x_{t-1} | x_t): see `ancestral_step`."""
        return ancestral_step(
            self,
            model,
            x,
            t,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            noise_fn=noise_fn,
        )

    def p_sample_loop(
        self,
        model: Denoiser,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: XStartFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: Cond | None = None,
        device: Device = None,
        progress: bool = False,
        noise_fn: NoiseFn | None = None,
    ) -> Tensor:
        """Sample a batch by ancestral sampling."""
        options = (clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress)
        chain = self.p_sample_loop_progressive(model, shape, noise, *options, **_given(noise_fn))
        return last_sample(chain)

    def p_sample_loop_progressive(
        self,
        model: Denoiser,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: XStartFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: Cond | None = None,
        device: Device = None,
        progress: bool = False,
        noise_fn: NoiseFn | None = None,
    ) -> Iterator[Step]:
        """Yield every step of ancestral sampling."""
        step = partial(
            self.p_sample,
            model,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            **_given(noise_fn),
        )
        downwards = range(self.num_timesteps - 1, -1, -1)
        return run_chain(step, model, shape, downwards, noise, device, progress, noise_fn)

    def ddim_sample(
        self,
        model: Denoiser,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: XStartFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: Cond | None = None,
        eta: float = 0.0,
        noise_fn: NoiseFn | None = None,
    ) -> Step:
        """Go from x_t to x_{t-1} by DDIM: see `ddim_step`."""
        return ddim_step(
            self,
            model,
            x,
            t,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            eta=eta,
            noise_fn=noise_fn,
        )

    def ddim_reverse_sample(
        self,
        model: Denoiser,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: XStartFn | None = None,
        model_kwargs: Cond | None = None,
        eta: float = 0.0,
    ) -> Step:
        """Go from x_t to x_{t+1} by the DDIM ODE: see `ddim_reverse_step`."""
        return ddim_reverse_step(
            self,
            model,
            x,
            t,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            model_kwargs=model_kwargs,
            eta=eta,
        )

    def ddim_sample_loop(
        self,
        model: Denoiser,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: XStartFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: Cond | None = None,
        device: Device = None,
        progress: bool = False,
        eta: float = 0.0,
        noise_fn: NoiseFn | None = None,
    ) -> Tensor:
        """Sample a batch by DDIM."""
        options = (clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, eta)
        chain = self.ddim_sample_loop_progressive(model, shape, noise, *options, **_given(noise_fn))
        return last_sample(chain)

    def ddim_sample_loop_progressive(
        self,
        model: Denoiser,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: XStartFn | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: Cond | None = None,
        device: Device = None,
        progress: bool = False,
        eta: float = 0.0,
        noise_fn: NoiseFn | None = None,
    ) -> Iterator[Step]:
        """Yield every step of DDIM."""
        step = partial(
            self.ddim_sample,
            model,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
            eta=eta,
            **_given(noise_fn),
        )
        downwards = range(self.num_timesteps - 1, -1, -1)
        return run_chain(step, model, shape, downwards, noise, device, progress, noise_fn)

    def ddim_reverse_sample_loop(
        self,
        model: Denoiser,
        x_start: Tensor,
        clip_denoised: bool = True,
        denoised_fn: XStartFn | None = None,
        model_kwargs: Cond | None = None,
        device: Device = None,
        progress: bool = False,
    ) -> Tensor:
        """Encode images x_start [N, C, ...] in [-1, 1] as the noise that DDIM makes them from.

        That is x at the last timestep of this process, which `ddim_sample_loop` takes as `noise`.
        What it makes of it differs from x_start by the error of the steps, which shrinks with
        their number; clipping adds to it.
        """
        options = (clip_denoised, denoised_fn, model_kwargs, device, progress)
        return last_sample(self.ddim_reverse_sample_loop_progressive(model, x_start, *options))

    def ddim_reverse_sample_loop_progressive(
        self,
        model: Denoiser,
        x_start: Tensor,
        clip_denoised: bool = True,
        denoised_fn: XStartFn | None = None,
        model_kwargs: Cond | None = None,
        device: Device = None,
        progress: bool = False,
    ) -> Iterator[Step]:
        """Yield every step of the way from x_start up to the last timestep."""
        step = partial(
            self.ddim_reverse_sample,
            model,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            model_kwargs=model_kwargs,
        )
        # A clean image counts as x at t = 0; the step at t = T - 2 leads to T - 1.
        upwards = range(self.num_timesteps - 1)
        return run_chain(step, model, tuple(x_start.shape), upwards, x_start, device, progress)
