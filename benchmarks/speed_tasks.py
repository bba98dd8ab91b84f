"""What speed.py times: the networks of a package at work, by the published interface alone.

A task is made from a package and a setting, and is then a function of the number of the call. All
packages get the same weights and inputs, so that what they return can be compared.
"""

import importlib
import importlib.util
import inspect
import os
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # guided_diffusion

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from guided_diffusion.config import UNET_CHANNEL_MULT  # noqa: E402
from guided_diffusion.metering import Meter  # noqa: E402

OURS = "guided_diffusion"
SEED = 0
SIDE = 2048  # of the matrices whose product stands for the speed of the hardware
LOG_LOSS_SCALE = 8.0  # low enough that no float16 gradient overflows and no step is skipped

Call = Callable[[int], Tensor]  # number of the call -> what it computed


# --------------------------------------------------------------------------------------------
# Packages


class Package:
    """A package with the published interface. Its modules, as attributes, are imported when used.

    Args:
        spec: the name of a package, or the path of its folder; such a one is imported under a
            name of its own, so that several called guided_diffusion go side by side.

    Attributes:
        label: what tables call it.
        folder: where it is.

    Raises:
        ValueError: there is no such package.
    """

    def __init__(self, spec: str):
        self.spec = spec
        try:
            module = _import_folder(Path(spec)) if os.sep in spec else importlib.import_module(spec)
        except ImportError as error:
            raise ValueError(f"--package {spec}: {error}") from None
        if not getattr(module, "__file__", None):
            raise ValueError(f"--package {spec} is no package: it has no __init__.py")
        self.name = module.__name__
        if not (hasattr(module, "__path__") and self.has("script_util")):
            raise ValueError(f"--package {spec} has not the published modules: no script_util")
        self.folder = Path(module.__file__).resolve().parent
        self.label = "/".join(self.folder.parts[-2:]) if os.sep in spec else spec

    def __getattr__(self, part: str) -> ModuleType:
        return importlib.import_module(f"{self.name}.{part}")

    def has(self, part: str) -> bool:
        """Tell whether there is a module of this name."""
        return importlib.util.find_spec(f"{self.name}.{part}") is not None


def _import_folder(folder: Path) -> ModuleType:
    """Import a folder as a package under a name made from its path."""
    name = "speed_" + re.sub(r"\W", "_", str(folder.resolve()))
    if name not in sys.modules:
        init = folder.resolve() / "__init__.py"
        if not init.is_file():
            raise ImportError("there is no such folder with an __init__.py")
        spec = importlib.util.spec_from_file_location(
            name, init, submodule_search_locations=[str(init.parent)]
        )
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


# --------------------------------------------------------------------------------------------
# Networks


@dataclass(frozen=True)
class Setting:
    """How a task is done.

    Attributes:
        flags: those of network, process and classifier that are not left at their defaults.
        batch: images in a call.
        device: "cpu" or "cuda".
        precision: one of PRECISIONS.
        extras: use what is faster and not in the published interface, where a package has it.
        as_published: train in the memory of the published code, which recomputes all attention and
            nothing else, by matrix products, and sets gradients to zero.
    """

    flags: dict[str, Any]
    batch: int
    device: str = "cpu"
    precision: str = "float32"
    extras: bool = False
    as_published: bool = False

    @property
    def num_classes(self) -> int:
        """The number of classes; what the published one is without a flag for it."""
        return self.flags.get("num_classes", 1000)

    def autocast(self) -> AbstractContextManager:
        """Return bfloat16 autocast, if that is the precision."""
        is_bf16 = self.precision == "bfloat16"
        return torch.autocast(self.device, torch.bfloat16) if is_bf16 else nullcontext()


PRECISIONS = ("float32", "bfloat16", "float16")


def model_flags(package: Package, setting: Setting) -> dict[str, Any]:
    """Return all flags of a package's diffusion model.

    Raises:
        ValueError: the package does not know one that was given.
    """
    known = package.script_util.model_and_diffusion_defaults()
    given = {n: v for n, v in setting.flags.items() if not n.startswith("classifier_")}
    for name in given:
        if name not in known:
            raise ValueError(f"{package.label} has no flag --{name}: leave it out")
    return known | given | {"use_fp16": setting.precision == "float16"}


def create_model(package: Package, setting: Setting) -> tuple[nn.Module, Any]:
    """Return a diffusion model on its device, and its process."""
    create = package.script_util.create_model_and_diffusion
    model, process = create(**model_flags(package, setting))
    if setting.as_published:
        for module in model.modules():
            if isinstance(module, package.unet.AttentionBlock):
                module.use_checkpoint = True
        model.set_attention_backend("math")
    return fill(model).to(setting.device), process


def classifier_flags(package: Package, setting: Setting) -> dict[str, Any]:
    """Return all flags of a package's classifier, and those that were given beyond them."""
    shared = ("image_size", "num_classes", "in_channels")
    given = {
        name: value
        for name, value in setting.flags.items()
        if name.startswith("classifier_") or name in shared
    }
    known = package.script_util.classifier_defaults()
    return known | given | {"classifier_use_fp16": setting.precision == "float16"}


def create_classifier(package: Package, setting: Setting) -> nn.Module:
    """Return a classifier on its device, ready to guide.

    The published `create_classifier` cannot be told the widths of levels or heads. If they are
    given, it is its class that is asked, which can.
    """
    flags, create = classifier_flags(package, setting), package.script_util.create_classifier
    if flags.keys() <= inspect.signature(create).parameters.keys():
        classifier = create(**flags)
    else:
        classifier = _classifier_from_class(package, flags)
    return _for_inference(fill(classifier).to(setting.device), setting)


def _classifier_from_class(package: Package, flags: dict[str, Any]) -> nn.Module:
    """Do what `create_classifier` does, with all flags."""
    size = flags["image_size"]
    levels = flags.get("classifier_channel_mult")
    mult = tuple(map(int, levels.split(","))) if levels else UNET_CHANNEL_MULT[size]
    attended = flags["classifier_attention_resolutions"].split(",")
    return package.unet.EncoderUNetModel(
        image_size=size,
        in_channels=flags.get("in_channels", 3),
        model_channels=flags["classifier_width"],
        out_channels=flags.get("num_classes", 1000),
        num_res_blocks=flags["classifier_depth"],
        attention_resolutions=tuple(size // int(resolution) for resolution in attended),
        channel_mult=mult,
        use_fp16=flags["classifier_use_fp16"],
        num_head_channels=flags.get("classifier_num_head_channels", 64),
        use_scale_shift_norm=flags["classifier_use_scale_shift_norm"],
        resblock_updown=flags["classifier_resblock_updown"],
        pool=flags["classifier_pool"],
    )


def _for_inference(network: nn.Module, setting: Setting) -> nn.Module:
    if setting.precision == "float16":
        network.convert_to_fp16()
    return network.eval()


@torch.no_grad()
def fill(network: nn.Module) -> nn.Module:
    """Give a network random weights that follow from their names and shapes; none are zero."""
    generator = torch.Generator().manual_seed(SEED)
    for name, param in sorted(network.named_parameters()):
        draw = torch.randn(param.shape, generator=generator)
        if param.dim() > 1:
            param.copy_(draw * param[0].numel() ** -0.5)
        else:
            param.copy_(0.1 * draw + name.endswith("weight"))
    return network


# --------------------------------------------------------------------------------------------
# Tasks


def inputs(setting: Setting) -> tuple[Tensor, Tensor, Tensor]:
    """Return images and noise, each [N, C, H, W], and labels [N]."""
    generator = torch.Generator().manual_seed(SEED)
    size = setting.flags["image_size"]
    shape = (2, setting.batch, setting.flags.get("in_channels", 3), size, size)
    images, noise = torch.randn(shape, generator=generator).to(setting.device)
    labels = 7 * torch.arange(setting.batch, device=setting.device) % setting.num_classes
    return (images / 2).clamp(-1, 1), noise, labels


def cond_of(setting: Setting, y: Tensor) -> dict[str, Tensor]:
    """Return the labels, if the diffusion model takes any."""
    return {"y": y} if setting.flags.get("class_cond") else {}


def down(i: int, setting: Setting) -> Tensor:
    """Return the timesteps [N] of sampling step i: all the same, and falling by 1."""
    steps = setting.flags.get("diffusion_steps", 1000)
    return torch.full((setting.batch,), steps - 1 - i % steps, device=setting.device)


def forward(package: Package, setting: Setting) -> Call:
    """Predict: the diffusion model alone, without gradients."""
    model = _for_inference(create_model(package, setting)[0], setting)
    _, x, y = inputs(setting)

    @torch.no_grad()
    def call(i: int) -> Tensor:
        return model(x, down(i, setting), **cond_of(setting, y))

    return call


def train(package: Package, setting: Setting) -> Call:
    """Take a training step: loss, backward pass, optimizer step, average of the weights."""
    package.logger.configure(dir=tempfile.gettempdir(), format_strs=[])  # trainers may log
    model, process = create_model(package, setting)
    trainer = package.fp16_util.MixedPrecisionTrainer(
        model=model.train(),
        use_fp16=setting.precision == "float16",
        initial_lg_loss_scale=LOG_LOSS_SCALE,
    )
    opt = optimizer_of(package, setting, trainer.master_params)
    ema = [param.detach().clone() for param in trainer.master_params]
    x_start, noise, y = inputs(setting)
    spread = 251 * torch.arange(setting.batch, device=setting.device)

    def call(i: int) -> Tensor:
        if setting.as_published:
            package.fp16_util.zero_grad(trainer.model_params)
        else:
            trainer.zero_grad()
        t = (spread + 37 * i) % process.num_timesteps
        with setting.autocast():
            losses = process.training_losses(
                model, x_start, t, model_kwargs=cond_of(setting, y), noise=noise
            )
        trainer.backward(losses["loss"].mean())
        if trainer.optimize(opt):
            package.nn.update_ema(ema, trainer.master_params, rate=0.9999)
        return losses["loss"].detach()

    return call


def optimizer_of(package: Package, setting: Setting, params: list[nn.Parameter]) -> Any:
    """Return AdamW, as the published loop makes it."""
    if setting.extras and package.has("sharding"):
        return package.sharding.make_optimizer(params, lr=1e-4, weight_decay=0.0)
    return torch.optim.AdamW(params, lr=1e-4)


def cond_fn_of(package: Package, setting: Setting) -> Callable[..., Tensor]:
    """Return the gradient of the classifier's log p(y | x_t), as the published script takes it."""
    classifier = create_classifier(package, setting)
    if setting.extras and package.has("guidance"):
        return package.guidance.classifier_guidance(classifier, 1.0)

    def cond_fn(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            log_probs = F.log_softmax(classifier(x_in, t), dim=-1)
            chosen = log_probs[range(len(y)), y]
            return torch.autograd.grad(chosen.sum(), x_in)[0]

    return cond_fn


def gradient(package: Package, setting: Setting) -> Call:
    """Take the gradient of the classifier alone, as guidance does."""
    cond_fn = cond_fn_of(package, setting)
    _, x, y = inputs(setting)
    return lambda i: cond_fn(x, down(i, setting), y=y)


def guided(package: Package, setting: Setting, sampler: str = "p_sample") -> Call:
    """Take a step of guided sampling: diffusion model, classifier and the arithmetic around."""
    model, process = create_model(package, setting)
    model, cond_fn = _for_inference(model, setting), cond_fn_of(package, setting)
    _, x, y = inputs(setting)
    step = getattr(process, sampler)

    def model_fn(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return model(x, t, **cond_of(setting, y))

    @torch.no_grad()
    def call(i: int) -> Tensor:
        return step(model_fn, x, down(i, setting), cond_fn=cond_fn, model_kwargs={"y": y})["sample"]

    return call


def guided_ddim(package: Package, setting: Setting) -> Call:
    """Take a step of guided DDIM."""
    return guided(package, setting, "ddim_sample")


TASKS: dict[str, Callable[[Package, Setting], Call]] = {
    "forward": forward,
    "train": train,
    "gradient": gradient,
    "guided": guided,
    "guided_ddim": guided_ddim,
}


def session(task: str, setting: Setting) -> AbstractContextManager:
    """Return what is around all calls of a task.

    Weights in bfloat16 are kept from call to call in sampling, where they stay the same.
    """
    return nullcontext() if task == "train" else setting.autocast()


def product(device: str) -> Call:
    """Return the product of two float32 matrices, SIDE by SIDE: the speed of the hardware."""
    generator = torch.Generator().manual_seed(SEED)
    a, b = torch.randn(2, SIDE, SIDE, generator=generator).to(device)

    @torch.no_grad()
    def call(i: int) -> Tensor:
        with torch.autocast(device, enabled=False):
            return a @ b

    call(0)
    return call


def count_flops(call: Call) -> int:
    """Return the FLOPs of a call: of convolutions, linear layers and attention, as computed.

    So what is recomputed counts again.
    """
    with sdpa_kernel(SDPBackend.MATH), Meter() as meter:  # of matrix products, which have formulas
        call(0)
    return meter.flops
