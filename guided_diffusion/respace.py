"""Respacing: sample a process of T steps with fewer, as a diffusion process of its own."""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .gaussian_diffusion import GaussianDiffusion
from .tables import DeviceTables


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """Choose which timesteps of a longer process to keep.

    Args:
        num_timesteps: the steps T of the original process.
        section_counts: how many to keep. "250", or a list of one number: that many, evenly
            spread from the first to the last. "10,15,20", or a list: cut the process into
            equal sections and take these numbers from them, starting at t = 0 (improved DDPM,
            section 4). "ddim50": 50 with a constant integer stride from 0 (DDIM's choice).

    Returns:
        The chosen timesteps, within 0..T-1.

    Raises:
        ValueError: if the request cannot be read or met; the message says what can.
    """
    if isinstance(section_counts, str) and section_counts.startswith("ddim"):
        return _constant_stride(num_timesteps, section_counts)
    parts = section_counts.split(",") if isinstance(section_counts, str) else section_counts
    try:
        counts = [int(part) for part in parts]
    except (TypeError, ValueError):
        counts = []
    if not counts or min(counts) < 0 or sum(counts) == 0:
        raise _refusal(section_counts, 'use a number ("250"), a list ("10,15,20") or "ddim50"')
    kept: set[int] = set()
    start = 0
    for i, count in enumerate(counts):
        size = num_timesteps // len(counts) + (i < num_timesteps % len(counts))
        if size < count:
            raise _refusal(
                section_counts,
                f"cannot take {count} from section {i + 1}, which has only {size} of the "
                f"{num_timesteps} diffusion steps; ask for at most that",
            )
        kept.update(start + offset for offset in _even_offsets(size, count))
        start += size
    return kept


def _even_offsets(size: int, count: int) -> list[int]:
    """Spread `count` integers from 0 to `size` - 1."""
    if count == 0:
        return []
    stride = (size - 1) / max(count - 1, 1)
    # A running sum, not a product: the two may round to different integers.
    return [round(offset) for offset in accumulate(repeat(stride, count - 1), initial=0.0)]


def _constant_stride(num_timesteps: int, request: str) -> set[int]:
    """Read "ddimN" and return the N multiples of an integer that lie in 0..num_timesteps-1."""
    digits = request[len("ddim") :].strip()
    lengths = {len(range(0, num_timesteps, i)): i for i in range(num_timesteps, 0, -1)}
    if not digits.isdecimal():
        raise _refusal(request, 'use "ddim" and a number of steps, such as "ddim50"')
    if int(digits) not in lengths:
        nearest = sorted(lengths, key=lambda n: abs(n - int(digits)))[:3]
        raise _refusal(
            request,
            f"no constant stride takes {int(digits)} of {num_timesteps} diffusion steps; the "
            f"nearest possible are {', '.join(f'ddim{n}' for n in sorted(nearest))}",
        )
    return set(range(0, num_timesteps, lengths[int(digits)]))


def _refusal(request: Any, remedy: str) -> ValueError:
    return ValueError(f"--timestep_respacing {request!r} is impossible: {remedy}")


class SpacedDiffusion(GaussianDiffusion):
    """A diffusion process that keeps some steps of a longer one.

    Its betas are such that the noise at each kept step is what it was. The network and the
    guidance are handed the timesteps of the original process, which they were trained with.

    Args:
        use_timesteps: the steps to keep, each in 0..T-1.
        kwargs: the arguments of the original `GaussianDiffusion`, its T `betas` among them.

    Raises:
        ValueError: if `use_timesteps` is empty or names a step that the process lacks.
    """

    def __init__(self, use_timesteps: Iterable[int], **kwargs: Any):
        self.use_timesteps = set(use_timesteps)
        self.timestep_map = [int(t) for t in sorted(self.use_timesteps)]
        self.original_num_steps = len(kwargs["betas"])
        if not self.use_timesteps or not self.use_timesteps <= set(range(self.original_num_steps)):
            raise ValueError(
                f"use_timesteps must be some of the steps 0..{self.original_num_steps - 1}, "
                f"got {self.timestep_map[:1]}..{self.timestep_map[-1:]}"
            )
        # q(x_t | x_0) depends on alphas_cumprod alone: keep its entries, derive the betas.
        self.original_alphas_cumprod = np.cumprod(1.0 - np.array(kwargs["betas"], dtype=np.float64))
        a_t = self.original_alphas_cumprod[self.timestep_map]
        kwargs["betas"] = 1 - a_t / np.append(1.0, a_t[:-1])
        super().__init__(**kwargs)

    def _wrap_model(self, model: Callable[..., Tensor]) -> "_WrappedModel":
        """Translate timesteps for `model`; one that was wrapped before is returned as it is."""
        if isinstance(model, _WrappedModel):
            return model
        return _WrappedModel(
            model,
            self.timestep_map,
            self.rescale_timesteps,
            self.original_num_steps,
            self._tables,
        )

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        """Leave the timesteps alone: the wrapped model scales them."""
        return t


class _WrappedModel:
    """A network, or a guidance function, that is called with the timesteps of a short process.

    Args:
        model: the function that expects timesteps of the original process.
        timestep_map: the original timestep of each short one.
        rescale_timesteps: scale the original timesteps to 0..1000.
        original_num_steps: the number of original timesteps.
        tables: where copies of the map on devices are kept.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        timestep_map: Sequence[int],
        rescale_timesteps: bool,
        original_num_steps: int,
        tables: DeviceTables | None = None,
    ):
        self.model = model
        self.timestep_map = timestep_map
        self.rescale_timesteps = rescale_timesteps
        self.original_num_steps = original_num_steps
        self._tables = DeviceTables() if tables is None else tables

    def __call__(self, x: Tensor, ts: Tensor, **kwargs: Any) -> Tensor:
        """Evaluate the function at x [N, C, ...] and the short process's timesteps ts [N]."""
        steps = self._tables.get("timestep_map", self.timestep_map, ts.device, torch.int64)
        original = steps[ts].to(ts.dtype)
        if self.rescale_timesteps:
            original = original.float() * (1000.0 / self.original_num_steps)
        return self.model(x, original, **kwargs)

    def parameters(self) -> Iterable[Tensor]:
        """Return the parameters of the function, none if it has none."""
        return getattr(self.model, "parameters", tuple)()
