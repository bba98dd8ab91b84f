"""Timestep samplers: at which noise levels a training step spends its batch.

A sampler may favour some timesteps. Each draw comes with an importance weight that undoes the
favour in expectation, so the mean of `weights * losses` estimates the loss under uniform draws.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


class ScheduleSampler(ABC):
    """A distribution over the timesteps of a diffusion process.

    A subclass gives `weights`; `sample` turns them into draws that leave the objective unbiased.
    """

    @abstractmethod
    def weights(self) -> np.ndarray:
        """Return one positive weight per timestep, [num_timesteps]; any scale will do."""

    def sample(self, batch_size: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Draw the timesteps of a batch from numpy's global generator.

        Returns:
            `(timesteps, weights)`, int64 and float32, both [batch_size] and on `device`. A
            timestep of probability p has the weight 1 / (num_timesteps * p).
        """
        return self.sample_by(np.random.random_sample(batch_size), device)

    def sample_by(self, uniforms: np.ndarray, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Draw timesteps by given random numbers in [0, 1), [N], as `sample` returns them."""
        weights = self.weights()
        probabilities = weights / np.sum(weights)
        cumulative = np.cumsum(probabilities)
        drawn = np.searchsorted(cumulative / cumulative[-1], uniforms, side="right")
        importance = 1 / (len(probabilities) * probabilities[drawn])
        return (
            torch.as_tensor(drawn, dtype=torch.int64).to(device),
            torch.as_tensor(importance, dtype=torch.float32).to(device),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return what was learnt so far; nothing here."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> bool:
        """Go on with what `state_dict` returned, and tell whether it fits this sampler."""
        return not state


class UniformSampler(ScheduleSampler):
    """Every timestep is equally likely, every importance weight is 1."""

    def __init__(self, diffusion: Any):
        self.diffusion = diffusion
        self._weights = np.ones([diffusion.num_timesteps])

    def weights(self) -> np.ndarray:
        """Return ones, [num_timesteps]."""
        return self._weights


class LossAwareSampler(ScheduleSampler):
    """A sampler that learns from the losses of past batches, the same on every rank."""

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        """Learn from one batch of this rank, together with the batches of all others.

        Every rank must call this after every batch: it gathers across ranks, whose batches may
        differ in size. All ranks then see the same losses in the same order, so that their
        weights stay equal.

        Args:
            local_ts: integer timesteps [N].
            local_losses: the losses [N] at these timesteps.
        """
        ts, losses = local_ts.detach(), local_losses.detach()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            ts, losses = _gather_batches(ts, losses)
        self.update_with_all_losses(ts.tolist(), losses.tolist())

    @abstractmethod
    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Learn from the losses of all ranks, deterministically, to keep the ranks alike.

        Args:
            ts: integer timesteps, one per image.
            losses: the loss of each image at its timestep.
        """


def _gather_batches(*batches: Tensor) -> list[Tensor]:
    """Join each [N] tensor over all ranks, in rank order; N may differ between ranks."""
    if dist.get_backend() == "gloo":  # gathers in host memory only
        batches = tuple(batch.cpu() for batch in batches)
    count = len(batches[0])
    size = torch.tensor([count], dtype=torch.int64, device=batches[0].device)
    sizes = torch.cat(_all_gather(size)).tolist()
    joined = []
    for batch in batches:
        padded = batch.new_zeros(max(sizes))  # all_gather wants equal shapes
        padded[:count] = batch
        parts = zip(_all_gather(padded), sizes, strict=True)
        joined.append(torch.cat([part[:length] for part, length in parts]))
    return joined


def _all_gather(tensor: Tensor) -> list[Tensor]:
    """Return the tensor of every rank; shapes must agree."""
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    return gathered


class LossSecondMomentResampler(LossAwareSampler):
    """Favour timesteps in proportion to sqrt(E[loss^2]) (improved DDPM, section 3.3, eq. 18).

    Args:
        diffusion: the process; only its `num_timesteps` is read.
        history_per_term: how many recent losses of each timestep the average covers. Draws are
            uniform until every timestep has that many.
        uniform_prob: the share of draws that stays uniform, so that no timestep is forgotten.
    """

    def __init__(self, diffusion: Any, history_per_term: int = 10, uniform_prob: float = 0.001):
        self.diffusion = diffusion
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self._loss_history = np.zeros([diffusion.num_timesteps, history_per_term], np.float64)
        self._loss_counts = np.zeros([diffusion.num_timesteps], np.int64)

    def weights(self) -> np.ndarray:
        """Return float64 weights [num_timesteps] that sum to 1 (all ones until warmed up)."""
        if not self._warmed_up():
            return np.ones([self.diffusion.num_timesteps], np.float64)
        root_mean_square = np.sqrt(np.mean(self._loss_history**2, axis=-1))
        weights = root_mean_square / np.sum(root_mean_square)
        return weights * (1 - self.uniform_prob) + self.uniform_prob / len(weights)

    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Append each loss to the history of its timestep; a full history drops its oldest."""
        for t, loss in zip(ts, losses, strict=True):
            if self._loss_counts[t] == self.history_per_term:
                self._loss_history[t, :-1] = self._loss_history[t, 1:]
                self._loss_history[t, -1] = loss
            else:
                self._loss_history[t, self._loss_counts[t]] = loss
                self._loss_counts[t] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """Return the history [num_timesteps, history_per_term] and how much of it is filled."""
        history, counts = torch.tensor(self._loss_history), torch.tensor(self._loss_counts)
        return {"history": history, "counts": counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> bool:
        """Go on with what `state_dict` returned, and tell whether it fits this sampler."""
        if not state or state["history"].shape != self._loss_history.shape:
            return False
        self._loss_history, self._loss_counts = state["history"].numpy(), state["counts"].numpy()
        return True

    def _warmed_up(self) -> bool:
        return bool((self._loss_counts == self.history_per_term).all())


def sample_timesteps(
    sampler: Any, uniforms: np.ndarray, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Draw timesteps by given random numbers [N]; a sampler with its own `sample` draws its own."""
    has_own = getattr(type(sampler), "sample", None) is not ScheduleSampler.sample
    if has_own:
        return sampler.sample(len(uniforms), device)
    return sampler.sample_by(uniforms, device)


SCHEDULE_SAMPLERS: dict[str, Callable[[Any], ScheduleSampler]] = {
    "uniform": UniformSampler,
    "loss-second-moment": LossSecondMomentResampler,
}


def create_named_schedule_sampler(name: str, diffusion: Any) -> ScheduleSampler:
    """Build the sampler of that name in `SCHEDULE_SAMPLERS` for the steps of `diffusion`.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    if name not in SCHEDULE_SAMPLERS:
        raise ValueError(
            f"--schedule_sampler must be one of {sorted(SCHEDULE_SAMPLERS)}, got {name!r}"
        )
    return SCHEDULE_SAMPLERS[name](diffusion)
