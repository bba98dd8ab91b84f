"""Recover garments from 7 x 7 noisy averages of their pixels, with the bundled model.

The model was never trained for this. It says what garments look like; a gradient that
`guidance.estimate_guidance` sends back through it says what was measured. The truth is drawn by the
model itself, so no data set is needed. Prints how far the reconstructions are from the measurement
and from the truth, beside a draw that knows nothing of either, and writes a picture.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from guided_diffusion.checkpoints import load_flags, load_weights
from guided_diffusion.guidance import estimate_guidance, limited
from guided_diffusion.noise_levels import NoiseLevels
from guided_diffusion.pictures import save_grid, to_uint8
from guided_diffusion.sampling import CondFn
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
from guided_diffusion.solver_sampling import solver_sample_loop
from guided_diffusion.solvers import SOLVERS

MODEL = Path(__file__).resolve().parent.parent / "models" / "fashion" / "diffusion.pt"
NO_CLASS = 10  # the label that stands for none: the reconstruction is not told what it is of
BLOCK = 4  # pixels, squared, that are averaged
NOISE = 0.05  # deviation of the noise of a measurement
# Above this level of noise an estimate tells next to nothing of its image, and its gradient less.
LARGEST_SIGMA = 20.0


def measure(x: Tensor) -> Tensor:
    """Average blocks of pixels: [N, C, H, W] -> [N, C, H / 4, W / 4]."""
    return F.avg_pool2d(x, BLOCK)


def spread(y: Tensor) -> Tensor:
    """Apply the transpose of `measure`: [N, C, h, w] -> [N, C, 4 h, 4 w]."""
    return F.interpolate(y, scale_factor=float(BLOCK)) / BLOCK**2


def toward(y: Tensor, noise: float, prior_variance: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the gradient of log p(y | x_start) for `estimate_guidance`.

    y differs from `measure(x_start)` by the noise of the measurement and by what the estimate is
    off. The variance of the latter is taken from a prior in which pixels are independent and
    normal; it grows with sigma from 0 to that of a measured value.

    Args:
        y: the measurement, [N, C, h, w].
        noise: the deviation of its noise.
        prior_variance: of a measured value, before anything is known.
    """

    def gradient(x_start: Tensor, sigma: Tensor) -> Tensor:
        off = prior_variance * sigma**2 / (sigma**2 + BLOCK**2 * prior_variance)
        return spread((y - measure(x_start)) / (noise**2 + off))

    return gradient


def guidance_for(process: Any, model: Callable[..., Tensor], y: Tensor, noise: float) -> CondFn:
    """Return what steers samples of a process toward a measurement y [N, C, h, w]."""
    prior_variance = float(y.var()) - noise**2  # measurements themselves show it
    steer = estimate_guidance(process, model, toward(y, noise, prior_variance))
    return limited(steer, NoiseLevels(process).between(0, LARGEST_SIGMA))


def by_steps(process: Any, model: Any, y: Tensor, noise: float, **options: Any) -> Tensor:
    """Reconstruct images [N, C, H, W] by the ancestral steps of the process."""
    options |= {"cond_fn": guidance_for(process, model, y, noise)}
    return process.p_sample_loop(model, image_shape(y), **options)


def by_solver(
    process: Any, model: Any, y: Tensor, noise: float, solver: str, num_steps: int, **options: Any
) -> Tensor:
    """Reconstruct images [N, C, H, W] by a solver."""
    options |= {"cond_fn": guidance_for(process, model, y, noise)}
    sigmas = torch.from_numpy(NoiseLevels(process).grid(num_steps, "logsnr"))
    return solver_sample_loop(process, model, image_shape(y), solver, sigmas, **options)


def image_shape(y: Tensor) -> tuple[int, ...]:
    """Return the shape of the images whose measurement is y."""
    return (*y.shape[:2], y.shape[2] * BLOCK, y.shape[3] * BLOCK)


def load(timestep_respacing: str) -> tuple[torch.nn.Module, Any]:
    """Return the bundled network and its process."""
    flags = model_and_diffusion_defaults() | load_flags(str(MODEL))
    model, process = create_model_and_diffusion(
        **flags | {"timestep_respacing": timestep_respacing}
    )
    load_weights(model, str(MODEL))
    return model.eval().requires_grad_(False), process


def of_no_class(count: int) -> dict[str, Any]:
    """Return the options of a chain of so many images whose class is not told."""
    return {"model_kwargs": {"y": torch.full((count,), NO_CLASS)}, "progress": True}


def report(results: dict[str, Tensor], truth: Tensor, y: Tensor) -> None:
    """Print root mean square errors, where pixels range over [-1, 1]."""
    print(f"{'':<28}{'from the measurement':>22}{'from the truth':>18}")
    for name, x in results.items():
        errors = [(a - b).square().mean().sqrt() for a, b in [(measure(x), y), (x, truth)]]
        print(f"{name:<28}{errors[0]:>22.3f}{errors[1]:>18.3f}")


def main() -> None:
    """Draw, measure, reconstruct, print and show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--solver", default="dpmpp_2m_sde", choices=sorted(SOLVERS))
    parser.add_argument("--steps", type=int, default=50, help="of each chain")
    parser.add_argument("--draws", type=int, default=1, help="by the solver; their mean is shown")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="inverse_problem.png", help="the picture")
    args = parser.parse_args()
    model, process = load(str(args.steps))
    _, whole = load("")
    torch.manual_seed(args.seed)
    labels = torch.arange(8)  # one garment of each of eight classes

    print("drawing the truth, and garments that have nothing to do with it")
    shape = (len(labels), 1, 28, 28)
    truth = process.p_sample_loop(model, shape, model_kwargs={"y": labels}, progress=True)
    unguided = process.p_sample_loop(model, shape, **of_no_class(len(labels)))
    y = measure(truth) + NOISE * torch.randn(len(labels), 1, 7, 7)
    print(f"reconstructing by {args.steps} ancestral steps, then by {args.solver}")
    results = {
        "the measurement, enlarged": spread(y) * BLOCK**2,
        "an unguided draw": unguided,
        "ancestral steps": by_steps(process, model, y, NOISE, **of_no_class(len(y))),
    }
    many = y.repeat(args.draws, 1, 1, 1)
    drawn = by_solver(
        whole, model, many, NOISE, args.solver, args.steps, **of_no_class(len(many))
    ).chunk(args.draws)
    results[args.solver] = drawn[0]
    if args.draws > 1:
        results[f"mean of {args.draws} of these"] = torch.stack(drawn).mean(dim=0)
    report(results, truth, y)
    rows = [to_uint8(x) for x in [truth, *results.values()]]
    out = os.path.abspath(args.out)
    save_grid(np.concatenate(rows), None, out, columns=len(labels))


if __name__ == "__main__":
    main()
