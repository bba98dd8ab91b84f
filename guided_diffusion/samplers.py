"""From flags to a sampler: which steps, by which solver, steered by what."""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .flag_checks import read_interval
from .flag_parsing import defaults
from .gaussian_diffusion import GaussianDiffusion
from .guidance import GuidedNetwork, dynamic_threshold, fold, limited
from .noise_levels import NoiseLevels, respaced
from .sampling import Cond, CondFn, Denoiser, NoiseFn, Step, model_device
from .sampling_flags import (
    ONLY_FOR,
    PUBLISHED_SAMPLERS,
    SteeringConfig,
    StepsConfig,
    sampler_of,
    steps_of,
)
from .solver_sampling import solver_sample_loop_progressive
from .solvers import SOLVERS

LOOPS = {"ancestral": "p_sample_loop_progressive", "ddim": "ddim_sample_loop_progressive"}
# Options of the solvers that have another name as flags.
OPTIONS = {"solver_order": "order"}
UNSET_ETA = -1.0


@dataclass(frozen=True)
class Sampler:
    """What turns noise into images.

    Attributes:
        num_steps: the steps of a chain.
        chain: (shape (N, C, H, W), source of noise, model_kwargs) -> the steps of a batch.
    """

    num_steps: int
    chain: Callable[[tuple[int, ...], NoiseFn, Cond], Iterator[Step]]


def _filled(args: argparse.Namespace) -> argparse.Namespace:
    """Return the flags with the defaults of those that a script lacks."""
    return argparse.Namespace(**defaults(StepsConfig, SteeringConfig) | vars(args))


def make_sampler(
    args: argparse.Namespace,
    model: Denoiser,
    diffusion: GaussianDiffusion,
    *,
    cond_fn: CondFn | None = None,
    guide: Denoiser | None = None,
    device: torch.device | str | None = None,
    loop: tuple[Callable[..., Iterator[Step]], int] | None = None,
) -> Sampler:
    """Make the sampler that the command line asks for, with all that steers it.

    Args:
        args: gives the flags of StepsConfig and SteeringConfig (those that are missing have their
            defaults), use_ddim, clip_denoised, class_cond and, for --cfg_scale, num_classes.
        model: the network.
        diffusion: the process, respaced by --timestep_respacing.
        cond_fn: a guidance gradient, or None.
        guide: a weaker network for autoguidance, or None.
        device: where to sample; None for where the network's parameters are.
        loop: what yields the steps of a batch, as `GaussianDiffusion.p_sample_loop_progressive`,
            and their number; None for that of the sampler which the flags name.

    Raises:
        ValueError: if the process has not as many steps as are wanted.
    """
    args = _filled(args)
    steps, num_steps = loop or _loop(args, diffusion)
    device = model_device(model) if device is None else device
    network = steered(args, model, diffusion, guide)
    if cond_fn is not None and args.guidance_interval:
        cond_fn = limited(cond_fn, _active(args, diffusion))
    options: dict[str, Any] = {"clip_denoised": args.clip_denoised, "device": device}
    if args.dynamic_threshold:
        options |= {
            "clip_denoised": False,
            "denoised_fn": dynamic_threshold(args.dynamic_threshold),
        }
        if cond_fn is not None and sampler_of(vars(args)) != "ancestral":  # which shifts the mean
            network, cond_fn = fold(diffusion, network, cond_fn), None

    def chain(shape: tuple[int, ...], noise_fn: NoiseFn, cond: Cond) -> Iterator[Step]:
        """Return the steps of a batch."""
        return steps(
            network, shape, cond_fn=cond_fn, noise_fn=noise_fn, model_kwargs=cond, **options
        )

    return Sampler(num_steps, chain)


def steered(
    args: argparse.Namespace, model: Denoiser, diffusion: GaussianDiffusion, guide: Denoiser | None
) -> Denoiser:
    """Return the network with the guidance by networks that the command line asks for."""
    args = _filled(args)

    def own(network: Denoiser) -> Denoiser:
        """Return a network that takes the labels as `model` does, or ignores them."""
        return network if args.class_cond else partial(_without_labels, network)

    if args.cfg_scale == 1 and guide is None:
        return own(model)
    return GuidedNetwork(
        own(model),
        cfg_scale=args.cfg_scale,
        null_class=args.num_classes,
        guide=guide and own(guide),
        guide_scale=args.guide_scale,
        active=_active(args, diffusion) if args.guidance_interval else None,
    )


def _without_labels(model: Denoiser, x: Tensor, t: Tensor, y: Any = None, **cond: Any) -> Tensor:
    """Call an unconditional network: the labels in `cond` are for the guidance alone."""
    return model(x, t, **cond)


def _active(args: argparse.Namespace, diffusion: GaussianDiffusion) -> Callable[[Tensor], Tensor]:
    return NoiseLevels(diffusion).between(*read_interval(args.guidance_interval))


def call_levels(args: argparse.Namespace, diffusion: GaussianDiffusion) -> list[float]:
    """Return the noise level of each call of the network that an image takes, in order.

    Args:
        args: as for `make_sampler`.
        diffusion: the process, respaced by --timestep_respacing.
    """
    loop, _ = _loop(_filled(args), diffusion)
    if sampler_of(vars(args)) in PUBLISHED_SAMPLERS:
        return NoiseLevels(loop.func.__self__).sigmas[::-1].tolist()
    sigmas, seen = loop.keywords["sigmas"], []
    options = {n: v for n, v in loop.keywords.items() if n not in ("solver", "sigmas")}

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(float(sigma))
        return x

    point = torch.zeros(1, device="cpu")
    SOLVERS[sampler_of(vars(args))](denoise, point, sigmas, noise=torch.zeros_like, **options)
    return seen


def is_guided(args: argparse.Namespace, sigma: float) -> bool:
    """Tell whether a level is within --guidance_interval, if one is given."""
    low, high = read_interval(_filled(args).guidance_interval) or (0.0, math.inf)
    return low < sigma <= high


def _loop(
    args: argparse.Namespace, diffusion: GaussianDiffusion
) -> tuple[Callable[..., Iterator[Step]], int]:
    """Return what yields the steps of a batch, and their number."""
    name, levels = sampler_of(vars(args)), NoiseLevels(diffusion)
    if name in PUBLISHED_SAMPLERS:
        process = shortened(args, diffusion)
        eta = {} if args.eta == UNSET_ETA else {"eta": args.eta}
        return partial(getattr(process, LOOPS[name]), **eta), process.num_timesteps
    sigmas = solver_grid(args, diffusion)
    loop = partial(solver_sample_loop_progressive, diffusion)
    given = partial(loop, solver=name, sigmas=sigmas, **_solver_options(args, name, levels))
    return given, len(sigmas) - 1


def shortened(args: argparse.Namespace, diffusion: GaussianDiffusion) -> GaussianDiffusion:
    """Return the process with the steps of --num_steps, if that is given."""
    args = _filled(args)
    if not args.num_steps:
        return diffusion
    levels = NoiseLevels(diffusion)
    chosen = levels.choose(args.num_steps, steps_of(vars(args))).astype(int)
    return respaced(diffusion, levels.timesteps[chosen])


def solver_grid(args: argparse.Namespace, diffusion: GaussianDiffusion) -> Tensor:
    """Return the noise levels of a solver's chain, float64, falling to 0."""
    levels = NoiseLevels(diffusion)
    if not args.num_steps:
        return torch.from_numpy(levels.grid(len(levels)))
    grid = levels.grid(args.num_steps, steps_of(vars(args)), args.fractional_t)
    return torch.from_numpy(grid)


def _solver_options(args: argparse.Namespace, name: str, levels: NoiseLevels) -> dict[str, Any]:
    """Return the flags that a solver reads, under the names that it has for them."""
    flags = [flag for flag, samplers in ONLY_FOR.items() if name in samplers]
    options = {OPTIONS.get(flag, flag): getattr(args, flag) for flag in flags}
    if options.get("eta") == UNSET_ETA:
        del options["eta"]
    if name == "heun":
        options["round_sigma"] = levels.clip if args.fractional_t else levels.round
    return options
