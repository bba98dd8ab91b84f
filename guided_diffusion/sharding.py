"""Parameters divided among the ranks, for networks that outgrow one GPU.

Fully sharded data parallelism (ZeRO-3, Rajbhandari et al., 2020) by torch's own `fully_shard`: each
rank keeps a slice of the first dimension of every parameter, and with it of gradients, moments and
averages. A block's parameters are whole only while the block runs. This module shards a network,
and translates between slices and the whole tensors that files hold.
"""

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import AdamW

from . import dist_util

# How an optimizer computes is no matter of files: another machine may go on from them.
IMPLEMENTATION = ("foreach", "fused")

# torch's modules for sharding take a second to import, so functions here import what they need.


def shard(model: nn.Module) -> None:
    """Shard the parameters of a network over all ranks, in place; they move to `dev()`.

    Every rank must hold the same values. Each input, middle and output block is gathered by
    itself, the rest together. The parameters are new objects afterwards, so optimizers and
    averages come later; the network is still a `UNetModel`, but cannot be copied or moved.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Of logits that are a view, as a classifier's: in place they must not change, and do not.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(dist_util.dev().type, (dist_util.get_world_size(),))
    for part in [*blocks_of(model), model]:
        # By default the last one would stay whole after a forward pass without a backward one.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """Return the parts of a network that run one after the other, as far as it has them."""
    for name in ("input_blocks", "middle_block", "output_blocks"):
        blocks = getattr(model, name, None)
        if blocks is not None:
            yield from blocks if isinstance(blocks, nn.ModuleList) else [blocks]


def is_sharded(tensor: Any) -> bool:
    """Tell whether this is a tensor of which each rank holds a part."""
    return hasattr(tensor, "full_tensor")


def full(tensor: Tensor) -> Tensor:
    """Return the whole of a sharded tensor, on the CPU; a plain one as it is.

    All ranks call this.
    """
    return tensor.detach().full_tensor().cpu() if is_sharded(tensor) else tensor


def like(whole: Tensor, shard: Tensor) -> Tensor:
    """Return this rank's part of `whole`, a copy sharded and placed like `shard`.

    Args:
        whole: a tensor that every rank has; its dtype is kept.
        shard: a tensor of the same shape. If it is plain, `whole` itself is returned.
    """
    if not is_sharded(shard):
        return whole
    from torch.distributed.tensor import DTensor

    assert whole.shape == shard.shape, (whole.shape, shard.shape)
    mesh, local = shard.device_mesh, shard.to_local()
    part = whole.detach()
    if shard.placements[0].is_shard():
        start = mesh.get_local_rank() * math.ceil(len(whole) / mesh.size())
        part = part[start : start + len(local)]
    part = part.to(local.device, copy=True, memory_format=torch.contiguous_format)
    return DTensor.from_local(
        part, mesh, shard.placements, shape=shard.shape, stride=shard.stride()
    )


def gather(tensors: dict[Any, Any]) -> dict[Any, Any]:
    """Return the whole of each value on rank 0, and an empty dictionary elsewhere.

    One tensor after the other, so that no rank but the first ever holds them all. All ranks call
    this.
    """
    wholes = {}
    for name, tensor in tensors.items():
        whole = full(tensor)
        if dist_util.is_main():
            wholes[name] = whole
    return wholes


def make_optimizer(params: list[nn.Parameter], lr: float, weight_decay: float) -> AdamW:
    """Return AdamW (Loshchilov and Hutter, 2019), where torch can in one pass over the memory."""
    param = params[0]
    can_fuse = param.device.type in ("cpu", "cuda") and not is_sharded(param)
    # None, unlike False, leaves the choice of another way to torch.
    return AdamW(params, lr=lr, weight_decay=weight_decay, fused=can_fuse or None)


def optimizer_state(opt: torch.optim.Optimizer) -> dict[str, Any]:
    """Return on rank 0 the `state_dict` that `opt` would have without shards, elsewhere {}.

    All ranks call this.
    """
    state = opt.state_dict()
    groups = [group | dict.fromkeys(IMPLEMENTATION) for group in state["param_groups"]]
    wholes = {index: gather(values) for index, values in state["state"].items()}
    return {**state, "state": wholes, "param_groups": groups} if dist_util.is_main() else {}


def load_optimizer_state(opt: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the `state_dict` of an optimizer without shards; every rank has it.

    Raises:
        ValueError: the parameters of `opt` are not as many.
    """
    params = dict(enumerate(param for group in opt.param_groups for param in group["params"]))
    parts = {
        index: {name: _fit(value, params.get(index)) for name, value in values.items()}
        for index, values in state["state"].items()
    }
    own = {name: opt.defaults[name] for name in IMPLEMENTATION if name in opt.defaults}
    groups = [{**group, **own} for group in state["param_groups"]]
    opt.load_state_dict({**state, "state": parts, "param_groups": groups})


def _fit(value: Any, param: Tensor | None) -> Any:
    """Shard what is shaped like its parameter; counts and misfits stay as they are."""
    fits = param is not None and getattr(value, "shape", None) == param.shape
    return like(value, param) if fits else value


@torch.no_grad()
def global_norm(tensors: list[Tensor]) -> float:
    """Return the Euclidean norm of all elements of all tensors, summed in float64.

    If they are sharded, of all ranks' parts; then all ranks call this.
    """
    if not tensors:
        return 0.0
    if not is_sharded(tensors[0]):
        return torch.stack(torch._foreach_norm(tensors)).cpu().double().norm().item()
    parts = [tensor.to_local() for tensor in tensors]
    # A rank beyond the end of a short first dimension holds nothing of that tensor.
    norms = torch._foreach_norm([part for part in parts if part.numel()])
    square = torch.stack([*norms, parts[0].new_zeros(())]).double().square().sum()
    dist.all_reduce(square, group=tensors[0].device_mesh.get_group())
    return square.sqrt().item()
