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
Cond = dict[str, Any]  # keyword arguments of the network and of the guidance gradient
Device = torch.device | str | None
Step = dict[str, Tensor]  # "sample" and "pred_xstart", each [N, C, ...]


def noise_like(x: Tensor) -> Tensor:
    """Draw the noise of one step, shaped like `x`: the only place where steps draw."""
    return torch.randn_like(x)


def ancestral_step(
    process: "SamplingMethods",
    model: Denoiser,
    x: Tensor,
    t: Tensor,
    *,
    cond_fn: CondFn | None = None,
    model_kwargs: Cond | None = None,
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
        options: `clip_denoised` and `denoised_fn` of `p_mean_variance`.
    """
    out = process.p_mean_variance(model, x, t, model_kwargs=model_kwargs, **options)
    noise = noise_like(x)
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
    **options: Any,
) -> Step:
    """Go from x_t to x_{t-1} along the implicit model (DDIM, eqs. 12 and 16).

    A guidance gradient enters the predicted noise (ADM, algorithm 2); x_0 is then recomputed and
    not clipped again. The noise is drawn for eta = 0 too, so eta does not shift later draws.

    Args:
        process: gives the prediction of x_0.
        model: the network.
        x: x_t, [N, C, ...].
        t: integer timesteps [N] of the process.
        cond_fn: the gradient of log p(y | x_t), or None.
        model_kwargs: keyword arguments for `model` and `cond_fn`.
        eta: 0 (deterministic) to 1 (as noisy as DDPM).
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
    return {"sample": mean + sigma * noise_like(x), "pred_xstart": x_start}


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
    num_steps: int,
    noise: Tensor | None = None,
    device: Device = None,
    progress: bool = False,
) -> Iterator[Step]:
    """Yield `step(x, t)` for t = num_steps - 1, ..., 0, feeding each sample to the next step.

    The loop reads `sample` back after the yield: a consumer may replace it and so steer the chain.

    Args:
        step: `(x, t) -> Step` with everything else bound.
        model: the network; asked for its device only.
        shape: the shape (N, C, ...) of the batch.
        num_steps: the number of steps.
        noise: x_T, or None to draw it from the global generator on `device`.
        device: where to sample; None for where the network's parameters are.
        progress: show a tqdm bar.
    """
    assert isinstance(shape, (tuple, list)), f"shape must be a tuple or a list, got {shape!r}"
    device = model_device(model, noise) if device is None else device
    x = torch.randn(*shape, device=device) if noise is None else noise
    for i in tqdm(range(num_steps - 1, -1, -1), disable=not progress):
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
    * `eta`, the noise of DDIM: 0 is deterministic, 1 as noisy as ancestral sampling.

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
    ) -> Tensor:
        """Sample a batch by ancestral sampling."""
        options = (clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress)
        return last_sample(self.p_sample_loop_progressive(model, shape, noise, *options))

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
    ) -> Iterator[Step]:
        """Yield every step of ancestral sampling."""
        step = partial(
            self.p_sample,
            model,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            cond_fn=cond_fn,
            model_kwargs=model_kwargs,
        )
        return run_chain(step, model, shape, self.num_timesteps, noise, device, progress)

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
    ) -> Tensor:
        """Sample a batch by DDIM."""
        options = (clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, eta)
        return last_sample(self.ddim_sample_loop_progressive(model, shape, noise, *options))

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
        )
        return run_chain(step, model, shape, self.num_timesteps, noise, device, progress)
