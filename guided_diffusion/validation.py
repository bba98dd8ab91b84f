"""Losses on validation data: of a batch now and then, and of the whole set over all ranks.

Noise and timestep of a validation image follow from the seed and its number alone, so that the
figures of a run can be compared over time and do not depend on the number of ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import dist_util, logger, streams
from .reporting import log_losses, quarters_of
from .train_state import TrainState

Cond = dict[str, Tensor]
Losses = Callable[[Tensor, Tensor, Cond, Tensor], dict[str, Tensor]]  # (x_start, t, cond, noise)


def losses_of(
    batch: Tensor,
    cond: Cond,
    numbers: Iterable[int],
    *,
    losses: Losses,
    num_timesteps: int,
    seed: int,
    microbatch: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the timesteps [N] of a validation batch and its losses, each [N], on the CPU.

    Args:
        batch: images [N, C, H, W], on the device.
        cond: the network's further inputs, [N, ...] each.
        numbers: the number of each image, N of them, which decide t and the noise.
        losses: the objective.
        num_timesteps: t is drawn uniformly from so many.
        seed: of the draws.
        microbatch: images per forward pass.
    """
    numbers = list(numbers)
    uniforms = streams.uniform(seed, numbers, streams.VAL_TIMESTEP)
    t = torch.from_numpy((uniforms * num_timesteps).astype(np.int64))
    parts = []
    for start in range(0, len(batch), microbatch):
        piece = slice(start, start + microbatch)
        noise = streams.normal(seed, numbers[piece], streams.VAL_NOISE, tuple(batch.shape[1:]))
        part = losses(
            batch[piece],
            t[piece].to(batch.device),
            {name: value[piece] for name, value in cond.items()},
            torch.from_numpy(noise).to(batch.device),
        )
        parts.append({name: value.float().cpu() for name, value in part.items()})
    return t, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def mean_over_all(parts: Iterable[tuple[Tensor, dict[str, Tensor]]], T: int) -> dict[str, float]:
    """Return the mean of each loss over the images of all ranks, and over each quarter of T steps.

    All ranks call this, with timesteps [N] and losses [N] of each of their batches; all get the
    result.
    """
    sums, counts = Counter(), Counter()
    for t, losses in parts:
        for name, values in losses.items():
            for quarter, value in zip(quarters_of(t, T), values.tolist(), strict=True):
                for key in (name, f"{name}_q{quarter}"):
                    sums[key] += value
                    counts[key] += 1
    all_sums, all_counts = Counter(), Counter()
    for its_sums, its_counts in dist_util.all_gather_objects((dict(sums), dict(counts))):
        all_sums.update(its_sums)
        all_counts.update(its_counts)
    return {key: all_sums[key] / all_counts[key] for key in sorted(all_sums)}


def _agree_on_filling(batch: Tensor | None, cond: Cond) -> tuple[tuple[Tensor, Cond], int]:
    """Return an image with its conditions, to fill batches up, and how many the largest has."""
    mine = None
    if batch is not None:
        mine = (batch[:1], {name: value[:1] for name, value in cond.items()}), len(batch)
    found = [each for each in dist_util.all_gather_objects(mine) if each is not None]
    return found[0][0], max(size for _, size in found)


def _fill_up(
    batch: Tensor | None, cond: Cond, filling: tuple[Tensor, Cond], size: int
) -> tuple[Tensor, Cond]:
    """Return a batch of `size` images, the missing ones all alike."""
    image, its_cond = filling
    if batch is None:
        batch, cond = image[:0], {name: value[:0] for name, value in its_cond.items()}

    def fill(values: Tensor, one: Tensor) -> Tensor:
        return torch.cat([values, one.expand(size - len(values), *one.shape[1:])])

    return fill(batch, image), {name: fill(cond[name], its_cond[name]) for name in its_cond}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a network into eval mode, without gradients, for the block."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()


class Validator:
    """Evaluates a network as it trains.

    Args:
        loss_fn: the objective, (model, x_start, t, cond, noise) -> terms [N].
        num_timesteps: length of the chain.
        data: an endless iterator of batches (images, cond); or None.
        whole: each image once, with a method `seek(0)` to begin again: image i of the set is on
            rank i mod the number of ranks; or None.
        microbatch: images per forward pass.
        precision: makes the context to evaluate in, such as autocast.
    """

    def __init__(
        self,
        loss_fn: Callable[..., dict[str, Tensor]],
        num_timesteps: int,
        *,
        data: Iterator[tuple[Tensor, Cond]] | None = None,
        whole: Any = None,
        microbatch: int,
        precision: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.loss_fn, self.num_timesteps = loss_fn, num_timesteps
        self.data, self.whole = data, whole
        self.microbatch, self.precision = microbatch, precision

    def log_batch(self, model: nn.Module, state: TrainState) -> None:
        """Log the losses of the next batch, as val_*; nothing if there are no batches."""
        if self.data is None:
            return
        batch, cond = next(self.data)
        first = state.val_images + dist_util.get_rank() * len(batch)
        with dist_util.stage("validating"), evaluating(model), self.precision():
            numbers = range(first, first + len(batch))
            t, losses = self._evaluate(model, batch, cond, numbers, state.seed)
        log_losses(self.num_timesteps, t, {"val_" + name: value for name, value in losses.items()})
        state.val_images += len(batch) * dist_util.get_world_size()

    def log_whole_set(self, model: nn.Module, state: TrainState) -> None:
        """Log the losses over the whole set, as val_all_*; nothing if there is no such set."""
        if self.whole is None:
            return
        self.whole.seek(0)
        with dist_util.stage("validating"), evaluating(model), self.precision():
            means = mean_over_all(self._parts(model, state.seed), self.num_timesteps)
        if "step" not in logger.getkvs():  # after the last step this makes a row of its own
            logger.logkv("step", state.step)
        logger.logkvs({f"val_all_{name}": value for name, value in means.items()})

    def _parts(self, model: nn.Module, seed: int) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield timesteps and losses of each batch of this rank's share of the set.

        The forward pass of a sharded network is a collective, so all ranks take as many of them
        and of as many images: a batch that is short is filled up with what does not count.
        """
        world, number = dist_util.get_world_size(), dist_util.get_rank()
        filling, size = None, 0
        while True:
            batch, cond = next(self.whole, (None, {}))
            if not dist_util.any_rank(batch is not None):
                return
            if filling is None:
                filling, size = _agree_on_filling(batch, cond)
            count = 0 if batch is None else len(batch)
            numbers = range(number, number + world * size, world)
            t, losses = self._evaluate(model, *_fill_up(batch, cond, filling, size), numbers, seed)
            if count:
                yield t[:count], {name: value[:count] for name, value in losses.items()}
            number += world * count

    def _evaluate(
        self, model: nn.Module, batch: Tensor, cond: Cond, numbers: range, seed: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        device = dist_util.dev()
        return losses_of(
            batch.to(device),
            {name: value.to(device) for name, value in cond.items()},
            numbers,
            losses=partial(self.loss_fn, model),
            num_timesteps=self.num_timesteps,
            seed=seed,
            microbatch=self.microbatch,
        )
