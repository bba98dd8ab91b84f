"""One network on several ranks: replicated (DDP), sharded (FSDP) or, alone, just itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import dist_util, sharding
from .train_state import random_kept


def shard_or_move(model: nn.Module) -> None:
    """Share the parameters of a network among the ranks; with one rank, move it to its device.

    Optimizers and averages come later: the parameters are new ones.
    """
    if dist_util.dev().type == "mps":
        raise ValueError("--shard_params True does not work with --device mps: leave it out")
    if dist_util.get_world_size() > 1:
        sharding.shard(model)
    else:
        model.to(dist_util.dev())


class Parallel:
    """A network whose backward pass averages the gradients over all ranks.

    Args:
        model: the network, the same on all ranks: sharded, or on its device and in its dtype.

    Attributes:
        model: what to call in training.
        use_ddp: whether that is a DistributedDataParallel.
        is_sharded: whether each rank holds but a part of it.
    """

    def __init__(self, model: nn.Module):
        self._module = model
        self.is_sharded = any(map(sharding.is_sharded, model.parameters()))
        self.use_ddp = dist_util.get_world_size() > 1 and not self.is_sharded
        self.model = _replicate(model) if self.use_ddp else model
        # With two ranks there is only one order in which to add.
        self._is_settled = not self.use_ddp or dist_util.get_world_size() == 2

    def exchanging(self, is_last: bool) -> AbstractContextManager:
        """Exchange gradients in a backward pass within the block only if it is a step's last.

        Sharded gradients are exchanged each time: until then every rank holds all of them.
        """
        return nullcontext() if is_last or not self.use_ddp else self.model.no_sync()

    def precision(self, use_bf16: bool) -> AbstractContextManager:
        """Return bfloat16 autocast; a sharded network must not stay whole in its cache."""
        return dist_util.precision(use_bf16, cache=not self.is_sharded)

    def settle(self, backward: Callable[[], Any]) -> None:
        """Before the first step of a process, run a backward pass whose gradients are thrown away.

        In it DDP learns the order in which gradients arrive, and regroups its buckets by it. The
        grouping decides in which order ranks are added up, and so the last bits of the sum: a
        resumed run must not take its first step with another grouping than the run before.
        """
        if not self._is_settled:
            with random_kept():
                backward()
            self._module.zero_grad()
            self._is_settled = True


def _replicate(model: nn.Module) -> DistributedDataParallel:
    device = dist_util.dev()
    return DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None, bucket_cap_mb=128
    )
