"""Noise levels: sigma and timestep, one from the other, and which of them a short chain visits.

A solver works on x = x_start + sigma * noise, which is x_t / sqrt(alphas_cumprod), so that
sigma = sqrt(1 / alphas_cumprod - 1). A network knows only the levels that it was trained on, each
under a timestep. Between two of them the timestep is taken to be linear in log sigma.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .gaussian_diffusion import GaussianDiffusion, ModelMeanType
from .respace import SpacedDiffusion, space_timesteps

# Where "logsnr" and "karras" begin: here an image in [-1, 1] is a hundred times fainter than the
# noise. The linear schedule ends there; the cosine one goes on to 20,000 in its last five steps,
# which would take a third of the range of log sigma. (EDM, section C.3.4, leaves out eight.)
LARGEST_USEFUL_SIGMA = 160.0
KARRAS_RHO = 7.0  # EDM, eq. 5
ROUNDING = 1e-9  # of a timestep: nearer than this to a whole one it is that


class NoiseLevels:
    """The K levels of a process, from the cleanest to the noisiest.

    Args:
        process: of which a respaced one has the levels that it kept.

    Attributes:
        sigmas: float64 [K], rising.
        timesteps: the timestep in the unspaced process of each, int64 [K].
        rescales: whether the network is told timesteps in 0..1000, whatever T is.
        scale: what they are multiplied with for that.
        mean_type: what the network predicts.
    """

    def __init__(self, process: GaussianDiffusion):
        trained = _sigmas(getattr(process, "original_alphas_cumprod", process.alphas_cumprod))
        self.timesteps = np.array(getattr(process, "timestep_map", range(process.num_timesteps)))
        self.sigmas = trained[self.timesteps]
        self.rescales = process.rescale_timesteps
        self.scale = 1000.0 / len(trained) if self.rescales else 1.0
        self.mean_type = process.model_mean_type
        self._log_sigmas = np.log(self.sigmas)
        self._trained = np.arange(len(trained)), np.log(trained)
        self._trained_sigmas = trained

    def __len__(self) -> int:
        return len(self.sigmas)

    def timestep_of(self, sigma: float) -> float:
        """Return the timestep of a level, fractional between two of them, clipped at the ends."""
        timesteps, log_sigmas = self._trained
        t = float(np.interp(math.log(sigma), log_sigmas, timesteps))
        return round(t) if abs(t - round(t)) < ROUNDING else t

    def round(self, sigma: float) -> float:
        """Return the level that the network was trained on, nearest in log sigma."""
        return float(self._trained_sigmas[round(self.timestep_of(sigma))])

    def clip(self, sigma: float) -> float:
        """Return the level, or the nearest within the range that the network was trained on."""
        return float(np.clip(sigma, self._trained_sigmas[0], self._trained_sigmas[-1]))

    def network_timesteps(self, sigma: float, count: int, device: torch.device) -> Tensor:
        """Return what the network is told of a level, [count]: int64 if it is a whole timestep."""
        t = self.timestep_of(sigma)
        timesteps = torch.full((count,), t, device=device)  # int64 or float32, as t is
        return timesteps.float() * self.scale if self.rescales else timesteps

    def sigma_of(self, t: Tensor) -> Tensor:
        """Return the level [N], in float64 on the CPU, of what the network is told, t [N]."""
        timesteps = t.detach().cpu().double().numpy() / self.scale
        return torch.from_numpy(np.exp(np.interp(timesteps, *self._trained)))

    def x_start(self, output: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
        """Return the clean image that the network's output means.

        Args:
            output: [N, C or 2C, ...].
            x_t: what the network was given, [N, C, ...].
            sigma: its level, broadcastable.

        Raises:
            ValueError: if the network predicts neither noise nor x_start.
        """
        mean = output[:, : x_t.shape[1]].to(x_t.dtype)
        if self.mean_type == ModelMeanType.START_X:
            return mean
        self._require_eps()
        return (1 + sigma**2).sqrt() * x_t - sigma * mean

    def shift(self, gradient: Tensor, sigma: Tensor) -> Tensor:
        """Return what a gradient of log p(y | x_t) [N, C, ...] adds to the network's prediction.

        That is -sqrt(1 - alphas_cumprod) times it for the noise (ADM, algorithm 2), and so
        (1 - alphas_cumprod) / sqrt(alphas_cumprod) times it for x_start.
        """
        by = sigma / (1 + sigma**2).sqrt()  # sqrt(1 - alphas_cumprod)
        if self.mean_type == ModelMeanType.START_X:
            return by * sigma * gradient
        self._require_eps()
        return -by * gradient

    def _require_eps(self) -> None:
        if self.mean_type != ModelMeanType.EPSILON:
            raise ValueError(
                "solvers and folded guidance need a network that predicts the noise or x_start, "
                f"not {self.mean_type.name}"
            )

    def between(self, low: float, high: float) -> Callable[[Tensor], Tensor]:
        """Return the test low < sigma <= high of what the network is told: t [N] -> bool [N]."""
        first, last = self._bound(low), self._bound(high)
        return lambda t: (t > first) & (t <= last)

    def _bound(self, sigma: float) -> float:
        """Return the timestep of a level as the network is told; infinite beyond the ends."""
        if self.clip(sigma) != sigma:
            return math.copysign(math.inf, sigma - self._trained_sigmas[0])
        return float(self.network_timesteps(sigma, 1, torch.device("cpu")))  # rounded as t is

    def grid(self, num_steps: int, by: str = "published", fractional: bool = False) -> np.ndarray:
        """Choose the levels of a chain: float64 [num_steps + 1], falling, the last of them 0.

        Args:
            num_steps: how many steps the chain has.
            by: a key of GRIDS.
            fractional: take levels between those of the process, too. Otherwise each step has
                another level of the process, the nearest.

        Raises:
            ValueError: if there are too few levels, or no such grid.
        """
        indices = self.choose(num_steps, by, fractional)
        chosen = np.exp(np.interp(indices, np.arange(len(self)), self._log_sigmas))
        exact = indices == np.rint(indices)
        chosen[exact] = self.sigmas[np.rint(indices[exact]).astype(int)]
        return np.append(chosen, 0.0)

    def choose(self, num_steps: int, by: str, fractional: bool = False) -> np.ndarray:
        """Choose levels by their index in `sigmas`, float64 [num_steps], falling; as `grid`."""
        if by not in GRIDS:
            raise ValueError(f"--steps_by must be one of {', '.join(GRIDS)}, got {by!r}")
        if num_steps > len(self) or num_steps < 1:
            raise ValueError(
                f"--num_steps {num_steps} is impossible: the process has {len(self)} noise levels, "
                f"so give 1 to {len(self)}"
            )
        rising = GRIDS[by](self, num_steps)[::-1]
        return (rising if fractional else _distinct(rising))[::-1]


def _sigmas(alphas_cumprod: np.ndarray) -> np.ndarray:
    return np.sqrt((1.0 - alphas_cumprod) / alphas_cumprod)


def beside(values: Tensor, x: Tensor) -> Tensor:
    """Give values [N] the dimensions, dtype and device of x [N, C, ...]."""
    return values.view(-1, *[1] * (x.ndim - 1)).to(x)


def _published(levels: NoiseLevels, num_steps: int) -> np.ndarray:
    """Even in the timestep, rounded as in improved DDPM: what --timestep_respacing N keeps."""
    if num_steps == 1:
        return np.array([len(levels) - 1.0])  # that would keep timestep 0 alone
    kept = space_timesteps(len(levels), [num_steps])
    return np.array(sorted(kept, reverse=True), dtype=np.float64)


def _by_time(levels: NoiseLevels, num_steps: int) -> np.ndarray:
    """Even in the timestep."""
    return np.linspace(len(levels) - 1.0, 0.0, num_steps)


def _by_log_snr(levels: NoiseLevels, num_steps: int) -> np.ndarray:
    """Even in log sigma, half the negative logarithm of the signal-to-noise ratio."""
    return _indices_of(levels, np.linspace(*np.log(_useful_range(levels)), num_steps))


def _karras(levels: NoiseLevels, num_steps: int) -> np.ndarray:
    """Even in sigma^(1 / 7) (EDM, eq. 5), which is denser near clean images."""
    ends = np.power(_useful_range(levels), 1 / KARRAS_RHO)
    return _indices_of(levels, KARRAS_RHO * np.log(np.linspace(*ends, num_steps)))


GRIDS: dict[str, Callable[[NoiseLevels, int], np.ndarray]] = {
    "published": _published,
    "logsnr": _by_log_snr,
    "karras": _karras,
    "time": _by_time,
}


def _useful_range(levels: NoiseLevels) -> tuple[float, float]:
    """Return the largest level that tells something of the image, and the smallest."""
    useful = levels.sigmas[levels.sigmas <= LARGEST_USEFUL_SIGMA]
    return (useful if len(useful) > 1 else levels.sigmas)[-1], levels.sigmas[0]


def _indices_of(levels: NoiseLevels, log_sigmas: np.ndarray) -> np.ndarray:
    return np.interp(log_sigmas, levels._log_sigmas, np.arange(len(levels)))


def _distinct(rising: np.ndarray) -> np.ndarray:
    """Round rising indices to whole ones, each of them another, the last as far as it was."""
    steps = np.arange(len(rising))
    last = max(np.rint(rising[-1]), steps[-1])
    spread = np.maximum.accumulate(np.rint(rising) - steps)  # push up those that coincide
    return np.minimum(spread, last - steps[-1]) + steps  # and back, where that passes the end


def respaced(process: SpacedDiffusion, timesteps: Sequence[int]) -> SpacedDiffusion:
    """Return the process with only some of its timesteps, numbered as in `process`.

    Args:
        process: one that kept all steps.
        timesteps: which to keep.

    Raises:
        ValueError: if the process has fewer steps already.
    """
    if process.num_timesteps != process.original_num_steps:
        raise ValueError(
            f"the process keeps {process.num_timesteps} of {process.original_num_steps} steps "
            "already: give --num_steps or --timestep_respacing, not both"
        )
    return SpacedDiffusion(
        use_timesteps=timesteps,
        betas=process.betas,
        model_mean_type=process.model_mean_type,
        model_var_type=process.model_var_type,
        loss_type=process.loss_type,
        rescale_timesteps=process.rescale_timesteps,
    )
