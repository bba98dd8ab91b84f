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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from . import checkpoints, config, dist_util, script_util, trained_flags
from .fp16_util import MixedPrecisionTrainer
from .guidance import classifier_guidance
from .losses import classifier_losses
from .metering import count_flops, peak_memory
from .presets import PRESETS
from .samplers import call_levels, is_guided, steered
from .sampling_flags import has_guide, sampler_of
from .script_util import CREATE

META = torch.device("meta")
WEAKER = "weaker network"
WORK = "within a step, at most"  # activations until their gradients come, or the work of a step


@dataclass(frozen=True)
class Estimate:
    """What a run needs.

    Attributes:
        parameters: network -> number of its parameters.
        flops: what is done with an image -> its FLOPs.
        repeats: how often that is done with one image, by the same names.
        memory: what a process keeps -> bytes.
    """

    parameters: dict[str, int]
    flops: dict[str, int]
    repeats: dict[str, int]
    memory: dict[str, int]

    @property
    def image_flops(self) -> int:
        """The FLOPs of one image: drawn, scored or trained on once."""
        return sum(self.repeats[name] * flops for name, flops in self.flops.items())


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
# Networks


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
    networks, cond_fn = {kind: model} | _create_guides(args, kind), None
    for name, network in networks.items():
        half = args.classifier_use_fp16 if name == "classifier" else args.use_fp16
        _to_half(args, network.eval(), half)
    if "classifier" in networks:
        cond_fn = classifier_guidance(networks["classifier"], args.classifier_scale)
    everywhere = argparse.Namespace(**vars(args) | {"guidance_interval": ""})
    predict = steered(everywhere, model, process, networks.get(WEAKER))

    def step() -> Any:
        x, t, cond = _inputs(args, kind, args.batch_size)
        take = process.p_sample if sampler_of(vars(args)) == "ancestral" else process.ddim_sample
        return take(predict, x, t, args.clip_denoised, cond_fn=cond_fn, model_kwargs=cond)

    flops, repeats = _count_calls(args, process, networks, cond_fn)
    memory = {f"weights, {name}": _nbytes(net.parameters()) for name, net in networks.items()}
    if args.use_bf16:  # autocast keeps them to its end, but not those of the frozen classifier
        kept = [net for name, net in networks.items() if name != "classifier"]
        layers = [layer for net in kept for layer in _narrowed(net)]
        memory["weights in bfloat16"] = sum(2 * _num_params(layer) for layer in layers)
    memory[WORK] = peak_memory(step, *networks.values())
    counts = {name: _num_params(network) for name, network in networks.items()}
    return Estimate(counts, flops, {name: chains * n for name, n in repeats.items()}, memory)


def _create_guides(args: argparse.Namespace, kind: str) -> dict[str, nn.Module]:
    """Build the networks that steer, without content, by name."""
    guides = {}
    if getattr(args, "classifier_scale", 0):
        guides["classifier"] = _create_classifier(args)
    if has_guide(vars(args)):
        with META:
            guides[WEAKER] = CREATE[kind](**args.guide_flags)[0]
    return guides


def _count_calls(
    args: argparse.Namespace, process: Any, networks: dict[str, nn.Module], cond_fn: Any
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the FLOPs of one call of each network, and how often an image needs it."""
    kind, model = next(iter(networks.items()))
    x, t, cond = _inputs(args, kind, 1)
    own = {n: value for n, value in cond.items() if n != "y" or args.class_cond}
    levels = call_levels(args, process)
    guided = sum(is_guided(args, sigma) for sigma in levels)
    twice = guided if getattr(args, "cfg_scale", 1) != 1 else 0
    flops = {f"{kind}, one call": count_flops(lambda: model(x, t, **own), model)}
    repeats = {f"{kind}, one call": len(levels) + twice}
    if WEAKER in networks:
        weaker, name = networks[WEAKER], f"{WEAKER}, one call"
        flops[name] = count_flops(lambda: weaker(x, t, **own), weaker)
        repeats[name] = guided
    if cond_fn is not None:
        name = "classifier, forward and backward"
        flops[name] = count_flops(lambda: cond_fn(x, t, **cond), networks["classifier"])
        repeats[name] = guided
    return flops, repeats


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
    opt = AdamW(trainer.master_params, foreach=False)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    trainer.optimize(opt)  # makes the moments
    opt.step = lambda: None  # a fused one needs no memory on the way

    def loss(num: int, within: int) -> Tensor:
        """Return the loss of the first `num` images of a batch of `within`."""
        x, t, cond = _inputs(args, kind, within)
        noise, cond = torch.empty_like(x), {name: value[:num] for name, value in cond.items()}
        given = (model, x[:num], t[:num], cond, noise[:num])
        if is_classifier:
            return classifier_losses(process, args.noised, *given)["loss"].mean()
        return process.training_losses(*given)["loss"].mean()

    def step() -> None:
        """Take a training step, or as much of it as has the most memory in use."""
        micro = args.microbatch if 0 < args.microbatch < args.batch_size else args.batch_size
        if not args.shard_params:  # else there are only parts of them
            trainer.zero_grad()
        for _ in range(2 if micro < args.batch_size else 1):  # to the second, all gradients exist
            trainer.backward(loss(micro, args.batch_size))
        trainer.optimize(opt)

    forward = count_flops(lambda: loss(1, 1), model)
    both = count_flops(lambda: loss(1, 1).backward(), model)
    kept = _kept_in_training(args, trainer, opt)
    made = 0 if args.shard_params else kept["gradients"]  # within the step
    memory = kept | {WORK: peak_memory(step, model) - made}
    flops = {"forward": forward, "backward": both - forward}
    return Estimate({kind: count}, flops, dict.fromkeys(flops, 1), memory)


def _kept_in_training(
    args: argparse.Namespace, trainer: MixedPrecisionTrainer, opt: AdamW
) -> dict[str, int]:
    """Return what lasts from step to step, what -> bytes.

    Where ranks share the weights, the one block that is whole while it runs is not counted.
    """
    masters = _nbytes(trainer.master_params)
    gradients = _nbytes(trainer.model_params)
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
        yield _row(f"an image, {_sum_of_calls(needs)}", *_giga(needs.image_flops))
    yield from _tell_memory(args, needs)


def _sum_of_calls(needs: Estimate) -> str:
    """Return how the operations of an image add up, such as "50 x (0.516 + 0.383)"."""
    calls = {name: _giga(flops)[0] for name, flops in needs.flops.items()}
    if len(set(needs.repeats.values())) > 1:
        return " + ".join(f"{needs.repeats[name]} x {call}" for name, call in calls.items())
    together = " + ".join(calls.values())
    together = f"({together})" if "+" in together else together
    return f"{next(iter(needs.repeats.values()))} x {together}"


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
