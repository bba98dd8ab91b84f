"""Small pieces that every network of this package is built from."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
AVG_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


class SiLU(nn.Module):
    """The activation x * sigmoid(x) (Hendrycks and Gimpel, 2016), of any shape."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x * sigmoid(x), shaped like x."""
        return F.silu(x)


class GroupNorm32(nn.GroupNorm):
    """Group normalization (Wu and He, 2018) that computes in float32 at least.

    Half-precision activations, also those under autocast, are widened for the arithmetic and
    narrowed again afterwards; float64 stays float64.
    """

    def forward(
        self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        """Normalize x [N, C, ...]; the result has the dtype of x.

        Args:
            x: activations.
            scale: [N, C], with `shift` [N, C] the modulation of FiLM (Perez et al., 2018): the
                result is the normalized x times 1 + scale, plus shift, at no further cost.
            shift: given with `scale`.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight, self.bias
        if weight is not None:
            weight, bias = weight.to(dtype), bias.to(dtype)
        if scale is None:
            return self._normalize(x, self.num_groups, weight, bias)
        # Weights of its own for each image: side by side, all are one image with N times the
        # channels and groups.
        factor = 1 + scale.to(dtype)
        weight, bias = (weight * factor).flatten(), (bias * factor + shift.to(dtype)).flatten()
        row = x.reshape(1, len(weight), *x.shape[2:])  # [1, N * C, ...]
        return self._normalize(row, len(x) * self.num_groups, weight, bias).view(x.shape)

    def _normalize(
        self, x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        if x.device.type == "cpu":
            # The CPU kernel widens by itself where the weights are wide, and it is several times
            # faster on images whose channels do not come last.
            return F.group_norm(x.contiguous(), num_groups, weight, bias, self.eps)
        # No name for the wide copy: it shall be gone when the narrow result is made.
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.group_norm(x.to(dtype), num_groups, weight, bias, self.eps).to(x.dtype)


def _by_dims(table: dict[int, type[nn.Module]], dims: int) -> type[nn.Module]:
    if dims not in table:
        raise ValueError(f"dims must be one of {sorted(table)}, got {dims!r}")
    return table[dims]


def conv_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Return a convolution over `dims` spatial dimensions (1, 2 or 3).

    Raises:
        ValueError: `dims` is something else.
    """
    return _by_dims(CONVS, dims)(*args, **kwargs)


def linear(*args: Any, **kwargs: Any) -> nn.Linear:
    """Return a fully connected layer."""
    return nn.Linear(*args, **kwargs)


def avg_pool_nd(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Return average pooling over `dims` spatial dimensions (1, 2 or 3).

    Raises:
        ValueError: `dims` is something else.
    """
    return _by_dims(AVG_POOLS, dims)(*args, **kwargs)


@torch.no_grad()
def update_ema(
    target_params: Iterable[Tensor], source_params: Iterable[Tensor], rate: float = 0.99
) -> None:
    """Move each target in place to rate * target + (1 - rate) * source; its dtype stays."""
    targets, sources = list(target_params), list(source_params)
    assert len(targets) == len(sources), (len(targets), len(sources))
    if targets:
        torch._foreach_mul_(targets, rate)
        torch._foreach_add_(targets, sources, alpha=1 - rate)


@torch.no_grad()
def zero_module(module: nn.Module) -> nn.Module:
    """Set every parameter of `module` to zero and return the module."""
    for param in module.parameters():
        param.zero_()
    return module


@torch.no_grad()
def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply every parameter of `module` by `scale` and return the module."""
    for param in module.parameters():
        param.mul_(scale)
    return module


def mean_flat(tensor: Tensor) -> Tensor:
    """Average [N, ...] over all dimensions but the first: [N]."""
    return tensor.mean(dim=list(range(1, tensor.dim())))


def normalization(channels: int) -> GroupNorm32:
    """Return the normalization of all networks here: 32 groups of `channels` / 32."""
    return GroupNorm32(32, channels)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: int = 10000) -> Tensor:
    """Embed [N] timesteps, possibly fractional, as [N, dim] cosines, then sines.

    The sinusoids of Vaswani et al. (2017), section 3.5: the frequencies fall geometrically
    from 1 to nearly 1 / max_period. An odd `dim` is filled up with a zero column.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(-math.log(max_period) * steps / half)
    phases = timesteps[:, None].float() * frequencies  # [N, dim // 2]
    return F.pad(torch.cat([phases.cos(), phases.sin()], dim=1), (0, dim % 2))  # [N, dim]


def checkpoint(
    func: Callable[..., Any], inputs: Sequence[Any], params: Iterable[Tensor], flag: bool
) -> Any:
    """Call `func(*inputs)`; with `flag`, recompute it in the backward pass to save memory.

    The recomputation sees the random numbers of the first pass, so dropout agrees. Autograd
    finds the parameters by itself: `params` is kept for callers that still list them.
    """
    del params
    if not flag:
        return func(*inputs)
    return torch.utils.checkpoint.checkpoint(func, *inputs, use_reentrant=False)
