"""What a run needs, told before it: parameters, operations and memory.

The networks are built on torch's meta device, whose tensors have a shape but no content, and there
take the very steps that the scripts take: the step of a sampler with its guidance, or a training
step from the loss to the optimizer. So nothing is computed, and yet each operation and each tensor
of the real step is seen. They are those of a GPU: fused attention, which keeps no matrix of
weights, and half precision; a CPU may need somewhat more.

A FLOP is one operation on floating point numbers, so a multiplication with its addition is two.
Counted are those of convolutions, linear layers and attention; all others are about a percent.
"""

import argparse
import shlex
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from . import checkpoints, config, dist_util, script_util, trained_flags
from .blocks import ATTENTION_BACKENDS
from .fp16_util import MixedPrecisionTrainer
from .guidance import classifier_guidance
from .losses import classifier_losses
from .presets import PRESETS
from .script_util import CREATE

META = torch.device("meta")
WORK = "within a step, at most"  # activations and gradients on their way, or the optimizer's work


@dataclass(frozen=True)
class Estimate:
    """What a run needs.

    Attributes:
        parameters: network -> number of its parameters.
        flops: what is done with an image -> its FLOPs.
        repeats: how often all that is done with one image.
        memory: what a process keeps -> bytes.
    """

    parameters: dict[str, int]
    flops: dict[str, int]
    repeats: int
    memory: dict[str, int]

    @property
    def image_flops(self) -> int:
        """The FLOPs of one image: drawn, scored or trained on once."""
        return self.repeats * sum(self.flops.values())


def dry_run(args: argparse.Namespace, kind: str = "diffusion model", chains: int = 1) -> None:
    """Print flags, parameters, operations and memory. Only rank 0 does; nothing is written.

    Args:
        args: the flags of a script, completed by `trained_flags.complete` or `.resume`.
        kind: which of CREATE the script trains or samples from.
        chains: how often an image goes through all steps of the process.

    Raises:
        ValueError: if flags do not go together.
    """
    if dist_util.is_main():
        trained_flags.settle_precision(args, _device(args))
        needs = estimate(args, kind, chains)
        print("\n".join([*_tell_flags(args), *_tell_needs(args, needs)]), flush=True)


def estimate(args: argparse.Namespace, kind: str = "diffusion model", chains: int = 1) -> Estimate:
    """Return what a run needs; arguments and errors are those of `dry_run`."""
    if _is_training(args):
        return _estimate_training(args, kind)
    return _estimate_sampling(args, kind, chains)


def _is_training(args: argparse.Namespace) -> bool:
    return hasattr(args, "ema_rate")


# --------------------------------------------------------------------------------------------
# Counting


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


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _num_params(network: nn.Module) -> int:
    return sum(param.numel() for param in network.parameters())


# --------------------------------------------------------------------------------------------
# bfloat16, as autocast does it where it exists


def _narrowed(network: nn.Module) -> list[nn.Module]:
    """Return the layers that autocast lets compute in bfloat16."""
    return [m for m in network.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear)]


def _autocast(network: nn.Module) -> None:
    """Let a network compute in bfloat16; the meta device has no autocast of its own."""
    for layer in _narrowed(network):
        layer.forward = partial(_forward_in_bf16, layer)


def _forward_in_bf16(layer: nn.Module, x: Tensor) -> Tensor:
    apply = getattr(layer, "_conv_forward", F.linear)
    return apply(*(value.bfloat16() for value in (x, layer.weight, layer.bias)))


# --------------------------------------------------------------------------------------------
# Sampling, or scoring


def _create(args: argparse.Namespace, kind: str) -> tuple[nn.Module, Any]:
    """Build a network without content, and its process, from the flags."""
    flags = script_util.args_to_dict(args, config.defaults(*trained_flags.KINDS[kind]))
    with META:
        return CREATE[kind](**flags)


def _inputs(args: argparse.Namespace, kind: str, num: int) -> tuple[Tensor, Tensor, dict]:
    """Return images [num, C, H, W], timesteps [num], and what else the networks are told."""
    size, cond = args.large_size if kind == "upsampler" else args.image_size, {}
    with META:
        t = torch.zeros(num, dtype=torch.int64)
        if kind == "classifier" or args.class_cond or _is_guided(args):
            cond["y"] = torch.zeros_like(t)
        if kind == "upsampler":
            cond["low_res"] = torch.empty(num, args.in_channels, args.small_size, args.small_size)
        return torch.empty(num, args.in_channels, size, size), t, cond


def _is_guided(args: argparse.Namespace) -> bool:
    return bool(getattr(args, "classifier_scale", 0))


def _create_classifier(args: argparse.Namespace) -> nn.Module:
    flags = script_util.args_to_dict(args, script_util.classifier_defaults())
    with META:
        return script_util.create_classifier(**flags)


def _to_half(args: argparse.Namespace, network: nn.Module, use_fp16: bool) -> None:
    """Let a network compute in half precision, if that is asked for."""
    if use_fp16:
        network.convert_to_fp16()
    if args.use_bf16:
        _autocast(network)


@torch.no_grad()
def _estimate_sampling(args: argparse.Namespace, kind: str, chains: int) -> Estimate:
    """Estimate what taking images through the steps of a process needs."""
    model, process = _create(args, kind)
    _to_half(args, model.eval(), args.use_fp16)
    networks, guide = {kind: model}, None
    if _is_guided(args):
        networks["classifier"] = classifier = _create_classifier(args)
        _to_half(args, classifier, args.classifier_use_fp16)
        guide = classifier_guidance(classifier, args.classifier_scale)

    def predict(x: Tensor, t: Tensor, y: Tensor | None = None, **cond: Tensor) -> Tensor:
        return model(x, t, **cond, **({"y": y} if args.class_cond else {}))

    def step() -> Any:
        x, t, cond = _inputs(args, kind, args.batch_size)
        take = process.ddim_sample if getattr(args, "use_ddim", False) else process.p_sample
        return take(predict, x, t, args.clip_denoised, cond_fn=guide, model_kwargs=cond)

    x, t, cond = _inputs(args, kind, 1)
    flops = {f"{kind}, one call": count_flops(lambda: predict(x, t, **cond), model)}
    if guide:
        name = "classifier, forward and backward"
        flops[name] = count_flops(lambda: guide(x, t, **cond), classifier)
    memory = {f"weights, {name}": _nbytes(net.parameters()) for name, net in networks.items()}
    if args.use_bf16:  # autocast keeps them to its end, but not those of the frozen classifier
        memory["weights in bfloat16"] = sum(2 * _num_params(layer) for layer in _narrowed(model))
    memory[WORK] = peak_memory(step, *networks.values())
    counts = {name: _num_params(network) for name, network in networks.items()}
    return Estimate(counts, flops, chains * process.num_timesteps, memory)


# --------------------------------------------------------------------------------------------
# Training


class _Trainer(MixedPrecisionTrainer):
    """Steps without asking how long the gradient is: without content there is no answer."""

    def _measure_norms(self, grad_scale: float = 1.0) -> dict[str, float]:
        return {"grad_norm": 1.0}


def _estimate_training(args: argparse.Namespace, kind: str) -> Estimate:
    """Estimate what training steps need, any of them but the first."""
    model, process = _create(args, kind)
    count = _num_params(model)
    if args.use_bf16:
        _autocast(model)
    is_classifier = kind == "classifier"
    use_fp16 = args.classifier_use_fp16 if is_classifier else args.use_fp16
    trainer = _Trainer(model=model, use_fp16=use_fp16)
    opt = AdamW(trainer.master_params, foreach=_device(args).startswith("cuda"))
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    trainer.optimize(opt)  # makes the moments

    def loss(num: int, within: int) -> Tensor:
        """Return the loss of the first `num` images of a batch of `within`."""
        x, t, cond = _inputs(args, kind, within)
        noise, cond = torch.empty_like(x), {name: value[:num] for name, value in cond.items()}
        given = (model, x[:num], t[:num], cond, noise[:num])
        if is_classifier:
            return classifier_losses(process, args.noised, *given)["loss"].mean()
        return process.training_losses(*given)["loss"].mean()

    def step() -> None:
        micro = args.microbatch if args.microbatch > 0 else args.batch_size
        trainer.backward(loss(min(micro, args.batch_size), args.batch_size))
        trainer.optimize(opt)

    forward = count_flops(lambda: loss(1, 1), model)
    both = count_flops(lambda: loss(1, 1).backward(), model)
    kept = _kept_in_training(args, trainer, opt)
    memory = kept | {WORK: peak_memory(step, model)}
    return Estimate({kind: count}, {"forward": forward, "backward": both - forward}, 1, memory)


def _kept_in_training(
    args: argparse.Namespace, trainer: MixedPrecisionTrainer, opt: AdamW
) -> dict[str, int]:
    """Return what lasts from step to step, what -> bytes.

    Where ranks share the weights, the one block that is whole while it runs is not counted.
    """
    masters = _nbytes(trainer.master_params)
    gradients = _nbytes(param.grad for param in trainer.model_params)
    ranks = dist_util.get_world_size()
    rates = [rate for rate in args.ema_rate.split(",") if rate]
    kept = {
        "weights": _nbytes(trainer.model_params),
        "float32 weights": masters if trainer.use_fp16 else 0,
        "gradients": gradients,
        "gradients on their way to other ranks": gradients if ranks > 1 else 0,
        "moments of AdamW": sum(_nbytes(state.values()) for state in opt.state.values()),
        "averages of weights": masters * len(rates),
    }
    if args.shard_params:
        del kept["gradients on their way to other ranks"]
        kept = {name: -(-nbytes // ranks) for name, nbytes in kept.items()}
    return {name: nbytes for name, nbytes in kept.items() if nbytes}


# --------------------------------------------------------------------------------------------
# Telling it


def _device(args: argparse.Namespace) -> str:
    """Return the kind of device of the run, which need not be there yet."""
    return args.device or dist_util.choose_device().type


def _tell_flags(args: argparse.Namespace) -> Iterator[str]:
    """Yield a line for each flag and who decided it, by group, and the notes."""
    origins = {}
    for origin, flags in _decisions(args):
        origins |= {n: origin for n, value in flags.items() if getattr(args, n, None) == value}
    groups = [g for g in vars(config).values() if isinstance(g, type) and is_dataclass(g)]
    for group in groups:
        names = [f.name for f in fields(group)]
        if not all(hasattr(args, name) for name in names):
            continue
        yield group.__doc__.rstrip(".")
        for name in names:
            line = f"  --{name} {shlex.quote(str(getattr(args, name)))}"
            yield f"{line:<46} # {origins[name]}" if name in origins else line
    yield from getattr(args, "notes", [])


def _decisions(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (who decides, flag -> value), the strongest last."""
    preset = PRESETS.get(getattr(args, "preset", ""))
    if preset:
        yield from (("by --preset", flags) for flags in preset.network.values())
    for flag in ("classifier_path", "init_from", "resume_checkpoint", "model_path"):
        path = getattr(args, flag, "")
        if path:
            yield f"by --{flag}", checkpoints.load_flags(path)
    if preset:
        yield "by --preset", preset.sampling
    yield "given", {flag: getattr(args, flag) for flag in args.given}


def _tell_needs(args: argparse.Namespace, needs: Estimate) -> Iterator[str]:
    """Yield the table of parameters, operations and memory."""
    yield "Parameters"
    for name, count in needs.parameters.items():
        yield _row(name, f"{count:,}", f"({count / 1e6:.1f} million)")
    yield "Operations for one image; a multiplication and its addition are two"
    for name, flops in needs.flops.items():
        yield _row(name, *_giga(flops))
    if _is_training(args):
        yield _row("together", *_giga(needs.image_flops))
        step = needs.image_flops * args.batch_size
        yield _row(f"a step of --batch_size {args.batch_size}", *_giga(step))
    else:
        calls = " + ".join(_giga(flops)[0] for flops in needs.flops.values())
        calls = f"({calls})" if "+" in calls else calls
        yield _row(f"an image, {needs.repeats} x {calls}", *_giga(needs.image_flops))
    yield from _tell_memory(args, needs)


def _tell_memory(args: argparse.Namespace, needs: Estimate) -> Iterator[str]:
    """Yield the table of memory."""
    batch, micro = f"--batch_size {args.batch_size}", getattr(args, "microbatch", -1)
    batch += f" --microbatch {micro}" if micro > 0 else ""
    ranks = dist_util.get_world_size()
    where = f"{_device(args)}, in each of {ranks} processes" if ranks > 1 else _device(args)
    yield f"Expected memory at {batch} on {where}"
    total = sum(needs.memory.values())
    unit, size = ("GB", 1e9) if total >= 1e9 else ("MB", 1e6)
    for name, nbytes in [*needs.memory.items(), ("together", total)]:
        yield _row(name, f"{nbytes / size:,.2f}", unit)
    yield "  On top comes what the allocator, the libraries and the device's context need."


def _row(name: str, value: str, unit: str) -> str:
    return f"  {name:<44}{value:>16} {unit}"


def _giga(flops: int) -> tuple[str, str]:
    return f"{flops / 1e9:,.3f}", "GFLOPs"
