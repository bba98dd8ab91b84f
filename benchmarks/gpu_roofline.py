"""Operations of networks without content, and how long hardware takes for them at least.

A roofline model. A step of sampling, or of training, goes through on torch's meta device, whose
tensors have a shape but no content, and every operation that it dispatches is noted: its FLOPs, and
the bytes of its inputs and outputs, of which views have none. An operation takes the longer of
FLOPs / peak and bytes / bandwidth, and a launch; a step takes the sum of its operations.
"""

import sys
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # guided_diffusion

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.flop_counter import flop_registry, sdpa_flop_count  # noqa: E402

from guided_diffusion import config, script_util  # noqa: E402
from guided_diffusion.fp16_util import MixedPrecisionTrainer  # noqa: E402
from guided_diffusion.guidance import classifier_guidance  # noqa: E402
from guided_diffusion.metering import peak_memory  # noqa: E402
from guided_diffusion.nn import update_ema  # noqa: E402
from guided_diffusion.presets import PRESETS  # noqa: E402
from guided_diffusion.samplers import steered  # noqa: E402
from guided_diffusion.trained_flags import KINDS  # noqa: E402

META = torch.device("meta")
FILL = 0.9  # the part of a GPU's memory that tensors may take
BOUNDS = ("compute", "bandwidth", "launch")  # fields of Time


@dataclass(frozen=True)
class Hardware:
    """What bounds the speed of a device.

    Attributes:
        name: of the device.
        half: FLOP/s of products and convolutions in float16 or bfloat16.
        convolution: FLOP/s of float32 convolutions: in TF32 where there is that, torch's default.
        single: FLOP/s of float32 products.
        bandwidth: bytes/s of its memory.
        memory: bytes that it has.
    """

    name: str
    half: float
    convolution: float
    single: float
    bandwidth: float
    memory: float = 0.0


# NVIDIA's data sheets: V100 (of 2018), A100 80GB (2021), H100 (2023; half of the figures that it
# gives "with sparsity").
GPUS = {
    "V100": Hardware("V100 SXM2 32GB", 125e12, 15.7e12, 15.7e12, 900e9, 32e9),
    "A100": Hardware("A100 SXM 80GB", 312e12, 156e12, 19.5e12, 2039e9, 80e9),
    "H100": Hardware("H100 SXM 80GB", 989e12, 494e12, 67e12, 3350e9, 80e9),
}


# --------------------------------------------------------------------------------------------
# Operations and their time

# Attention as one operation, which torch's registry of FLOPs lacks on this device -> where q, k
# and v stand, and how many of its two products it has. What is recomputed does not count.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (slice(0, 3), 1),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (slice(1, 4), 2),
}


class Op(NamedTuple):
    """An operation: its name, the rate of `Hardware` that it goes by, FLOPs, and bytes moved."""

    name: str
    unit: str
    flops: int
    nbytes: int


class Time(NamedTuple):
    """Seconds of operations, by what bounds them; `products` is what the FLOPs alone would take."""

    compute: float
    bandwidth: float
    launch: float
    products: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.bandwidth + self.launch


def time_of(ops: Iterable[Op], hardware: Hardware, overhead: float) -> Time:
    """Return what operations, one after the other, take at least; `overhead` is of a launch, in s.

    Only caches and fused kernels, which save ways to the memory, can be faster.
    """
    compute = bandwidth = launch = products = 0.0
    for op in ops:
        work = op.flops / getattr(hardware, op.unit)
        way = op.nbytes / hardware.bandwidth
        if work > way:
            compute += work
        else:
            bandwidth += way
        launch, products = launch + overhead, products + work
    return Time(compute, bandwidth, launch, products)


class Recorder(TorchDispatchMode):
    """Notes the operations of the block that touch tensors on a kind of device.

    Attributes:
        device: "meta" or "cpu".
        ops: those so far.
    """

    def __init__(self, device: str = "meta"):
        super().__init__()
        self.device, self.ops = device, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: D105
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        seen = [*_tensors((args, kwargs)), *_tensors(out)]
        nbytes = _moved(func, args, kwargs, out)
        if nbytes is not None and any(tensor.device.type == self.device for tensor in seen):
            name = func.overloadpacket.__name__
            dtype = next((t.dtype for t in seen if t.is_floating_point()), torch.float32)
            single = "convolution" if "convolution" in name else "single"
            unit = "half" if dtype.itemsize == 2 else single
            self.ops.append(Op(name, unit, _flops(func, args, kwargs, out), nbytes))
        return out


def _tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts, each once."""
    return list({id(t): t for t in tree_leaves(tree) if isinstance(t, Tensor)}.values())


def _moved(func: Any, args: tuple, kwargs: dict, out: Any) -> int | None:
    """Return the bytes that an operation reads and writes; None if it does neither, as a view."""
    name, read = func.overloadpacket.__name__, _tensors((args, kwargs))
    there = {tensor.untyped_storage()._cdata for tensor in read}
    made = [t for t in _tensors(out) if t.untyped_storage()._cdata not in there]
    declared = func._schema.arguments
    given = dict(zip((a.name for a in declared), args, strict=False)) | kwargs
    changed = [given.get(a.name) for a in declared if a.alias_info and a.alias_info.is_write]
    written = [*_tensors(changed), *made]
    if not written or "empty" in name:
        return None
    if name in ("copy_", "fill_", "zero_"):  # which do not read what they change
        read = read[1:]
    # No more than there is in memory: what is broadcast is there once.
    return sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in read + written)


def _flops(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    """Return the FLOPs of an operation: of convolutions, linear layers and attention."""
    packet = func.overloadpacket
    if packet in ATTENTION:
        where, times = ATTENTION[packet]
        return times * sdpa_flop_count(*(t.shape for t in args[where]))
    formula = flop_registry.get(packet)
    return formula(*args, **kwargs, out_val=out) if formula else 0


# --------------------------------------------------------------------------------------------
# Networks without content, and their steps


class Seen(NamedTuple):
    """What a step does, and the most bytes that it and what lasts between steps need."""

    ops: list[Op]
    memory: int

    @property
    def flops(self) -> int:
        """Those of all operations."""
        return sum(op.flops for op in self.ops)


@dataclass(frozen=True, eq=False)
class Case:
    """The networks of a preset on the meta device, their process, and the flags of the model."""

    model: nn.Module
    process: Any
    classifier: nn.Module | None
    flags: dict[str, Any]

    def networks(self) -> list[nn.Module]:
        """Return the model and, if there is one, the classifier."""
        return [network for network in (self.model, self.classifier) if network is not None]

    def inputs(self, batch: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return images [N, 3, H, W], timesteps [N], and what else the networks are told."""
        size, cond = self.flags.get("large_size", self.flags.get("image_size")), {}
        with META:
            t = torch.zeros(batch, dtype=torch.int64)
            if self.flags["class_cond"] or self.classifier is not None:
                cond["y"] = torch.zeros_like(t)
            if "small_size" in self.flags:
                cond["low_res"] = torch.empty(batch, 3, *[self.flags["small_size"]] * 2)
            return torch.empty(batch, 3, size, size), t, cond


def create(name: str, precision: str, guided: bool) -> Case:
    """Build the networks of a preset, all in float32 as yet; the flags say what they shall be.

    Args:
        name: a key of PRESETS, of a released model.
        precision: "float32", "float16", or "preset" for what that says.
        guided: with its classifier, if it has one.
    """
    preset, classifier = PRESETS[name], None
    (kind,) = preset.network.keys() - {"classifier"}
    half = precision == "float16"
    half_model = preset.sampling.get("use_fp16") if precision == "preset" else half
    flags = config.defaults(*KINDS[kind]) | preset.network[kind] | {"use_fp16": half_model}
    with META:
        model, process = script_util.CREATE[kind](**flags)
        if guided and "classifier" in preset.network:
            own = preset.network["classifier"] | {"classifier_use_fp16": half}
            classifier = script_util.create_classifier(**script_util.classifier_defaults() | own)
    return Case(model, process, classifier, flags)


@cache
def for_sampling(name: str, precision: str) -> Case:
    """Return the networks of a preset in their precision, after a first step; see `create`."""
    case = create(name, precision, guided=True)
    if case.flags["use_fp16"]:
        case.model.convert_to_fp16()
    if case.classifier is not None and precision == "float16":
        case.classifier.convert_to_fp16()
    for network in case.networks():
        network.eval()
    take_step(case, 1)  # which copies tables to the device
    return case


@torch.no_grad()
def take_step(case: Case, batch: int, guided: bool = True) -> None:
    """Take a step of ancestral sampling, guided if that is wanted and there is a classifier."""
    x, t, cond = case.inputs(batch)
    has_guide = guided and case.classifier is not None
    cond_fn = classifier_guidance(case.classifier, 1.0) if has_guide else None
    own = Namespace(class_cond=case.flags["class_cond"])
    predict = steered(own, case.model, case.process, None)
    case.process.p_sample(predict, x, t, cond_fn=cond_fn, model_kwargs=cond)


@cache
def sampling(case: Case, batch: int, guided: bool = True) -> Seen:
    """Watch a step of sampling."""
    with Recorder() as recorder:
        peak = peak_memory(partial(take_step, case, batch, guided), *case.networks())
    weights = sum(param.nbytes for network in case.networks() for param in network.parameters())
    return Seen(recorder.ops, weights + peak)


class _Trainer(MixedPrecisionTrainer):
    """Takes the norms of gradients, and steps whatever they are: without content they are none."""

    def _measure_norms(self, grad_scale: float = 1.0) -> dict[str, float]:
        torch._foreach_norm([param.grad for param in self.master_params])
        torch._foreach_norm(list(self.master_params))
        return {"grad_norm": 1.0}


class _FusedAdamW:
    """AdamW in one operation, as training has it on a GPU; torch's refuses the meta device."""

    def __init__(self, params: list[Tensor]):
        self.params = params
        self.moments = [[torch.zeros_like(param) for param in params] for _ in range(2)]
        self.counts = [param.new_zeros(()) for param in params]

    @torch.no_grad()
    def step(self) -> None:
        torch._foreach_add_(self.counts, 1)
        torch._fused_adamw_(
            self.params, [param.grad for param in self.params], *self.moments, [], self.counts,
            lr=1e-4, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False,
            maximize=False, grad_scale=None, found_inf=None,
        )  # fmt: skip


@cache
def training(name: str, precision: str, batch: int) -> Seen:
    """Watch the second training step of a preset's diffusion model; the first copies tables."""

    def train() -> None:
        case = create(name, precision, guided=False)
        trainer = _Trainer(model=case.model, use_fp16=case.flags["use_fp16"])
        opt = _FusedAdamW(trainer.master_params)
        ema = [param.detach().clone() for param in trainer.master_params]
        for _ in range(2):
            recorder.ops.clear()
            trainer.zero_grad()
            loss = case.process.training_losses(case.model, *case.inputs(batch))["loss"].mean()
            trainer.backward(loss)
            trainer.optimize(opt)
            update_ema(ema, trainer.master_params, rate=0.9999)

    with Recorder() as recorder:
        peak = peak_memory(train)  # of all that is made within: weights and moments, too
    return Seen(recorder.ops, peak)


def largest_batch(case: Case, hardware: Hardware, most: int) -> int:
    """Return `most`, halved until a guided step should fit into the memory, down to 1."""
    one, two = (sampling(case, batch).memory for batch in (1, 2))
    while most > 1 and one + (most - 1) * (two - one) > FILL * hardware.memory:
        most //= 2
    return most
