"""Counting the operations of a call, and following its memory, on tensors without content."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .blocks import ATTENTION_BACKENDS


class Meter(TorchDispatchMode):
    """Counts operations and follows the memory of the tensors that are made within the block.

    Tensors that share their memory count once, and those from before the block not at all.

    Attributes:
        flops: operations so far.
        live: bytes in use now.
        peak: the most bytes that ever were in use.
    """

    def __init__(self):
        super().__init__()
        self.flops = self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: D105
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        known = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if storage._cdata not in known:  # else a view, or changed in place
                known.add(storage._cdata)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes()).atexit = False
        return out

    def _add(self, nbytes: int) -> None:
        self.live += nbytes
        self.peak = max(self.peak, self.live)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """Yield the memory of each tensor in nested tuples, lists and dicts."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()


class _FusedAttention(TorchFunctionMode):
    """Makes attention one operation on the meta device, too, which has no such kernel."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: D105
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        return func(*args, **(kwargs or {}))


def count_flops(call: Callable[[], Any], *networks: nn.Module) -> int:
    """Return the FLOPs of `call()`, which may use `networks`."""
    return _measure(call, networks, attention="math").flops  # matrix products have formulas


def peak_memory(call: Callable[[], Any], *networks: nn.Module) -> int:
    """Return the most bytes that tensors made by `call()`, which may use `networks`, have."""
    # Not in a context around the call: that does not hold where a block is recomputed.
    kept = ATTENTION_BACKENDS["auto"]
    ATTENTION_BACKENDS["auto"] = _FusedAttention
    try:
        return _measure(call, networks, attention="auto").peak
    finally:
        ATTENTION_BACKENDS["auto"] = kept


def _measure(call: Callable[[], Any], networks: Iterable[nn.Module], attention: str) -> Meter:
    for network in networks:
        network.set_attention_backend(attention)
    with Meter() as meter:
        call()
    return meter
