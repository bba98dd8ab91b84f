"""Mixed-precision training: float16 weights in the network, float32 masters in the optimizer.

Micikevicius et al. (2018), "Mixed Precision Training". The loss is multiplied by a power of two
so that small gradients survive float16; the power grows slowly and falls when a gradient
overflows. Master parameters are two flat tensors: all scalars and vectors, and all matrices.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .sharding import global_norm

INITIAL_LOG_LOSS_SCALE = 20.0
MIN_LOG_LOSS_SCALE = 0.0  # a scale below 1 would make small gradients vanish for good
MAX_LOG_LOSS_SCALE = 127.0  # the range of float32

NamedParams: TypeAlias = list[tuple[str, Tensor]]
ParamGroups: TypeAlias = list[tuple[NamedParams, Any]]  # (named parameters, shape of the master)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _convert_convolution(layer: nn.Module, dtype: torch.dtype) -> None:
    if isinstance(layer, CONVOLUTIONS):
        for param in layer.parameters(recurse=False):
            param.data = param.data.to(dtype)


def convert_module_to_f16(l: nn.Module) -> None:  # noqa: E741  (the published name)
    """Make a convolution float16; leave any other module alone. For `Module.apply`."""
    _convert_convolution(l, torch.float16)


def convert_module_to_f32(l: nn.Module) -> None:  # noqa: E741  (the published name)
    """Undo `convert_module_to_f16`."""
    _convert_convolution(l, torch.float32)


def get_param_groups_and_shapes(named_model_params: Iterable[tuple[str, Tensor]]) -> ParamGroups:
    """Split (name, parameter) pairs into vectors (0-D or 1-D) and matrices (2-D or more).

    The second half of each pair is the shape of the flat master tensor, as for `view`.
    """
    named = list(named_model_params)
    vectors = [(name, param) for name, param in named if param.ndim <= 1]
    matrices = [(name, param) for name, param in named if param.ndim > 1]
    return [(vectors, -1), (matrices, (1, -1))]


def _flatten(tensors: Iterable[Tensor], shape: Any) -> Tensor:
    # `reshape`, not a view of memory: channels_last weights flatten in their logical order.
    return torch.cat([t.detach().float().reshape(-1) for t in tensors]).view(shape)


def make_master_params(param_groups_and_shapes: ParamGroups) -> list[nn.Parameter]:
    """Copy each group into one flat float32 parameter."""
    return [
        nn.Parameter(_flatten((param for _, param in group), shape))
        for group, shape in param_groups_and_shapes
    ]


def param_grad_or_zeros(param: Tensor) -> Tensor:
    """Return the gradient of `param`, or zeros shaped like it where there is none."""
    return torch.zeros_like(param) if param.grad is None else param.grad.detach()


def model_grads_to_master_grads(
    param_groups_and_shapes: ParamGroups, master_params: Sequence[Tensor]
) -> None:
    """Copy the gradients of the network's parameters into those of the masters, as float32."""
    for master, (group, shape) in zip(master_params, param_groups_and_shapes, strict=True):
        master.grad = _flatten((param_grad_or_zeros(param) for _, param in group), shape)


def unflatten_master_params(param_group: NamedParams, master_param: Tensor) -> list[Tensor]:
    """Return views of a flat master, one shaped like each parameter of its group."""
    pieces = master_param.view(-1).split([param.numel() for _, param in param_group])
    return [piece.view(param.shape) for piece, (_, param) in zip(pieces, param_group, strict=True)]


@torch.no_grad()
def master_params_to_model_params(
    param_groups_and_shapes: ParamGroups, master_params: Sequence[Tensor]
) -> None:
    """Copy the masters into the network's parameters, rounding to their dtype."""
    for master, (group, _) in zip(master_params, param_groups_and_shapes, strict=True):
        for (_, param), value in zip(group, unflatten_master_params(group, master), strict=True):
            param.copy_(value)


def master_params_to_state_dict(
    model: nn.Module,
    param_groups_and_shapes: ParamGroups | None,
    master_params: Sequence[Tensor],
    use_fp16: bool,
) -> dict[str, Tensor]:
    """Return the `state_dict` of `model` with `master_params` in place of its parameters."""
    state_dict = model.state_dict()
    if not use_fp16:
        names = [name for name, _ in model.named_parameters()]
        state_dict.update(zip(names, master_params, strict=True))
        return state_dict
    for master, (group, _) in zip(master_params, param_groups_and_shapes, strict=True):
        values = unflatten_master_params(group, master.detach())
        state_dict.update(zip((name for name, _ in group), values, strict=True))
    return state_dict


def state_dict_to_master_params(
    model: nn.Module, state_dict: dict[str, Tensor], use_fp16: bool
) -> list[Tensor]:
    """Return master parameters for `model` with the values in `state_dict`."""
    named = [(name, state_dict[name]) for name, _ in model.named_parameters()]
    if use_fp16:
        return make_master_params(get_param_groups_and_shapes(named))
    return [value for _, value in named]


def zero_master_grads(master_params: Iterable[Tensor]) -> None:
    """Forget the gradients of the masters: the next step makes new ones."""
    for param in master_params:
        param.grad = None


def zero_grad(model_params: Iterable[Tensor]) -> None:
    """Set the gradients that exist to zero, in place."""
    for param in model_params:
        if param.grad is not None:
            param.grad.detach_().zero_()


def check_overflow(value: float) -> bool:
    """Tell whether `value` is infinite or not a number."""
    return not math.isfinite(value)


class MixedPrecisionTrainer:
    """Steps an optimizer on `master_params`, and keeps the network's weights equal to them.

    Without `use_fp16` the masters are the network's own parameters. With it, the network is
    converted by its method `convert_to_fp16`, and the loss is scaled by 2 ** lg_loss_scale.

    Attributes:
        model_params: the network's parameters, a list.
        master_params: what the optimizer must be given; fp16: two flat float32 tensors.
        param_groups_and_shapes: how masters and parameters correspond; None without fp16.
        lg_loss_scale: the base-2 logarithm of the loss scale, MIN_LOG_LOSS_SCALE at least.
        metrics: what the last `optimize` measured: grad_norm (unscaled) and param_norm, both
            before the step and absent where a gradient overflowed; with fp16 also
            lg_loss_scale, as it was before the step.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        initial_lg_loss_scale: float = INITIAL_LOG_LOSS_SCALE,
        grad_clip: float = 0.0,
    ):
        self.grad_clip = grad_clip  # the largest norm of a gradient; 0 for any
        self.model = model
        self.use_fp16 = use_fp16
        self.fp16_scale_growth = fp16_scale_growth
        self.model_params: list[nn.Parameter] = list(model.parameters())
        self.master_params: list[nn.Parameter] = self.model_params
        self.param_groups_and_shapes: ParamGroups | None = None
        self.lg_loss_scale = initial_lg_loss_scale
        self.metrics: dict[str, float] = {}
        if use_fp16:
            self.param_groups_and_shapes = get_param_groups_and_shapes(model.named_parameters())
            self.master_params = make_master_params(self.param_groups_and_shapes)
            model.convert_to_fp16()

    def zero_grad(self) -> None:
        """Forget the network's gradients.

        A backward pass makes them anew, one by one as it frees activations, so that at no time
        there are all activations and all gradients.
        """
        for param in self.model_params:
            param.grad = None

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the scalar `loss`, scaled under fp16, to the parameters' own."""
        (loss * 2**self.lg_loss_scale if self.use_fp16 else loss).backward()

    def optimize(self, opt: torch.optim.Optimizer) -> bool:
        """Step `opt` with the gradients at hand and tell whether the step was taken.

        A step whose gradients are not finite is skipped: parameters and the state of `opt` stay
        as they are, and under fp16 the loss scale is halved.
        """
        scale = 1.0
        if self.use_fp16:
            model_grads_to_master_grads(self.param_groups_and_shapes, self.master_params)
            scale = 2**self.lg_loss_scale
        norms = self._measure_norms(scale)
        if check_overflow(norms["grad_norm"]):
            return self.skip()
        self.metrics = norms | self._scale_metric()
        self._rescale_grads(1.0 / scale, norms["grad_norm"])
        opt.step()
        if self.use_fp16:
            zero_master_grads(self.master_params)
            master_params_to_model_params(self.param_groups_and_shapes, self.master_params)
            grown = self.lg_loss_scale + self.fp16_scale_growth
            self.lg_loss_scale = min(grown, MAX_LOG_LOSS_SCALE)
        return True

    def skip(self) -> bool:
        """Forget the gradients at hand, under fp16 halve the loss scale, and return False."""
        self.metrics = self._scale_metric()
        if self.use_fp16:
            floor = min(MIN_LOG_LOSS_SCALE, self.lg_loss_scale)
            self.lg_loss_scale = max(floor, self.lg_loss_scale - 1)
            zero_master_grads(self.master_params)
        return False

    @contextmanager
    def showing(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Give the network other weights within the block: masters, such as those of an EMA."""
        own = [param.detach().clone() for param in self.master_params]
        self._show(values)
        try:
            yield
        finally:
            self._show(own)

    @torch.no_grad()
    def _show(self, values: Sequence[Tensor]) -> None:
        if self.use_fp16:
            master_params_to_model_params(self.param_groups_and_shapes, values)
            return
        for param, value in zip(self.model_params, values, strict=True):
            param.copy_(value)

    def _scale_metric(self) -> dict[str, float]:
        return {"lg_loss_scale": self.lg_loss_scale} if self.use_fp16 else {}

    def _rescale_grads(self, factor: float, grad_norm: float) -> None:
        """Undo the loss scale, and shorten a gradient that is longer than `grad_clip`."""
        if self.grad_clip and grad_norm > self.grad_clip:
            factor *= self.grad_clip / grad_norm
        if factor != 1.0:
            for param in self.master_params:
                if param.grad is not None:
                    param.grad.mul_(factor)

    @torch.no_grad()
    def _measure_norms(self, grad_scale: float = 1.0) -> dict[str, float]:
        grads = [param.grad for param in self.master_params if param.grad is not None]
        return {
            "grad_norm": global_norm(grads) / grad_scale,
            "param_norm": global_norm(list(self.master_params)),
        }

    def master_params_to_state_dict(self, master_params: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return a `state_dict` of the network that holds `master_params`, such as an EMA."""
        return master_params_to_state_dict(
            self.model, self.param_groups_and_shapes, master_params, self.use_fp16
        )

    def state_dict_to_master_params(self, state_dict: dict[str, Tensor]) -> list[Tensor]:
        """Return the masters that `state_dict` holds: the way back."""
        return state_dict_to_master_params(self.model, state_dict, self.use_fp16)
