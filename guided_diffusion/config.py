"""Every flag of every script, once: name, type, default, help and check.

A flag is a field of one of the dataclasses below, each of which is a group in `--help`. The
published dictionaries (`script_util.model_and_diffusion_defaults()` and their kin), the argument
parsers and the flags files beside checkpoints all derive from these fields. This module imports
nothing heavy, so that `--help` answers at once.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from .flag_checks import (
    Check,
    above,
    at_least,
    between,
    checkpoint_file,
    class_list,
    count_or_unset,
    device_name,
    ema_rates,
    fraction,
    image_folder,
    list_of,
    npz_file,
    one_of,
    output_folder,
    respacing,
    str2bool,
)
from .launchers import first_line, read_launch


def flag(
    default: Any,
    help: str,
    *,
    check: Check | None = None,
    fixes: bool = False,
    required: bool = False,
) -> Any:
    """Declare a flag.

    Args:
        default: its value when nobody sets it; the annotation beside it is its type.
        help: one phrase for `--help`.
        check: names what is wrong with a value, or returns None.
        fixes: True if the value fixes the trained network or process, so that a checkpoint's
            flags file may not be contradicted.
        required: True if the empty default is an error.
    """
    metadata = {"help": help, "check": check, "fixes": fixes, "required": required}
    return field(default=default, metadata=metadata)


# --------------------------------------------------------------------------------------------
# The flags, by group


@dataclass(frozen=True)
class RunConfig:
    """Where this run writes and computes."""

    log_dir: str = flag(
        "", "folder for all outputs (default: $OPENAI_LOGDIR, or logs/DATE)", check=output_folder
    )
    device: str = flag(
        "", "cpu, cuda, cuda:N or mps (default: cuda if there is one, else cpu)", check=device_name
    )
    seed: int = flag(
        -1, "seed of all random draws (-1: drawn and printed)", check=between(-1, 2**62)
    )
    use_bf16: bool = flag(False, "compute in bfloat16 autocast; weights stay float32")


@dataclass(frozen=True)
class DataConfig:
    """The images to read."""

    data_dir: str = flag(
        "", "folder of images, searched recursively", check=image_folder, required=True
    )


@dataclass(frozen=True)
class AugmentConfig:
    """How training images are varied."""

    random_flip: bool = flag(True, "mirror every other image, at random")
    random_crop: bool = flag(False, "crop at a random place and scale instead of the centre")


@dataclass(frozen=True)
class BatchConfig:
    """How many images go through the network at once."""

    batch_size: int = flag(1, "images in a batch of one process", check=at_least(1))


@dataclass(frozen=True)
class OptimConfig:
    """How the network is trained."""

    schedule_sampler: str = flag(
        "uniform", "how t is drawn: uniform or loss-second-moment",
        check=one_of("uniform", "loss-second-moment"),
    )  # fmt: skip
    lr: float = flag(1e-4, "learning rate of AdamW", check=above(0))
    weight_decay: float = flag(0.0, "weight decay of AdamW", check=at_least(0))
    microbatch: int = flag(
        -1, "images in one forward pass, to save memory (-1: the batch)", check=count_or_unset
    )
    log_interval: int = flag(10, "steps between two lines of the log", check=at_least(1))
    save_interval: int = flag(10000, "steps between two checkpoints", check=at_least(1))
    resume_checkpoint: str = flag("", "modelNNNNNN.pt from which to go on", check=checkpoint_file)


@dataclass(frozen=True)
class TrainConfig:
    """What only the diffusion trainers know."""

    max_steps: int = flag(0, "stop after this many steps (0: never)", check=at_least(0))
    lr_anneal_steps: int = flag(
        0, "let the learning rate fall to 0 over this many steps and stop", check=at_least(0)
    )
    ema_rate: str = flag("0.9999", "rates of the weight averages, commas between", check=ema_rates)
    fp16_scale_growth: float = flag(
        1e-3, "how much log2 of the fp16 loss scale grows in a step", check=at_least(0)
    )


@dataclass(frozen=True)
class ClassifierTrainConfig:
    """What only the classifier's trainer knows."""

    val_data_dir: str = flag(
        "", "folder of validation images (default: no validation)", check=image_folder
    )
    noised: bool = flag(True, "train on noised images, as guidance needs")
    iterations: int = flag(150000, "number of steps", check=at_least(1))
    anneal_lr: bool = flag(False, "let the learning rate fall linearly to 0")
    eval_interval: int = flag(5, "steps between two validation batches", check=at_least(1))


@dataclass(frozen=True)
class LoadConfig:
    """The trained model, and how much to do with it."""

    model_path: str = flag(
        "", "checkpoint; the .json beside it gives the flags", check=checkpoint_file, required=True
    )
    num_samples: int = flag(10000, "number of images", check=at_least(1))
    clip_denoised: bool = flag(True, "clip the predicted x_start to [-1, 1] in every step")


@dataclass(frozen=True)
class SampleConfig:
    """How images are drawn."""

    use_ddim: bool = flag(False, "DDIM instead of ancestral sampling")


@dataclass(frozen=True)
class LabelConfig:
    """Of which classes."""

    classes: str = flag(
        "", "classes to draw, in turn, such as 207,360 (default: random)", check=class_list
    )


@dataclass(frozen=True)
class GuidanceConfig:
    """The classifier that steers sampling."""

    classifier_path: str = flag("", "checkpoint of the noisy classifier", check=checkpoint_file)
    classifier_scale: float = flag(1.0, "guidance scale; 0 samples without the classifier")


@dataclass(frozen=True)
class BaseSamplesConfig:
    """The images to upsample."""

    base_samples: str = flag(
        "", "npz of small images, as a sampler writes it", check=npz_file, required=True
    )


@dataclass(frozen=True)
class PixelConfig:
    """What the images and their labels are."""

    num_classes: int = flag(1000, "number of classes", check=at_least(1), fixes=True)
    in_channels: int = flag(3, "3 for colour, 1 for grey images", check=one_of(1, 3), fixes=True)


@dataclass(frozen=True)
class SizeConfig:
    """The image size."""

    image_size: int = flag(64, "height and width in pixels", check=at_least(1), fixes=True)


@dataclass(frozen=True)
class SuperResConfig:
    """The two image sizes."""

    large_size: int = flag(256, "height and width of the output", check=at_least(1), fixes=True)
    small_size: int = flag(64, "height and width of the input", check=at_least(1), fixes=True)


@dataclass(frozen=True)
class ModelConfig:
    """The UNet."""

    num_channels: int = flag(128, "channels at multiplier 1", check=at_least(1), fixes=True)
    num_res_blocks: int = flag(2, "residual blocks per level", check=at_least(1), fixes=True)
    num_heads: int = flag(4, "attention heads", check=at_least(1), fixes=True)
    num_heads_upsample: int = flag(
        -1, "attention heads of the decoder (-1: as num_heads)", check=count_or_unset, fixes=True
    )
    num_head_channels: int = flag(
        -1, "channels per head; set, it decides the number of heads", check=count_or_unset,
        fixes=True,
    )  # fmt: skip
    attention_resolutions: str = flag(
        "16,8", "feature map sizes with attention", check=list_of(int, "32,16,8"), fixes=True
    )
    channel_mult: str = flag(
        "", "channel multiplier of each level (default: by image size)",
        check=list_of(float, "1,2,3,4"), fixes=True,
    )  # fmt: skip
    dropout: float = flag(0.0, "dropout in the residual blocks", check=fraction)
    class_cond: bool = flag(False, "condition on the class label", fixes=True)
    use_checkpoint: bool = flag(False, "recompute activations to save memory")
    use_scale_shift_norm: bool = flag(True, "scale and shift by the embedding", fixes=True)
    resblock_updown: bool = flag(False, "change resolution in residual blocks", fixes=True)
    use_fp16: bool = flag(False, "compute in float16")
    use_new_attention_order: bool = flag(False, "split qkv before the heads", fixes=True)
    label_dropout: float = flag(
        0.0, "share of labels replaced by a null class in training", check=fraction, fixes=True
    )


@dataclass(frozen=True)
class DiffusionConfig:
    """How images are noised, and what the network is asked to predict."""

    learn_sigma: bool = flag(False, "predict a variance next to each mean", fixes=True)
    diffusion_steps: int = flag(1000, "length T of the chain", check=at_least(1), fixes=True)
    noise_schedule: str = flag(
        "linear", "how the betas grow: linear or cosine", check=one_of("linear", "cosine"),
        fixes=True,
    )  # fmt: skip
    timestep_respacing: str = flag(
        "", "steps to keep: 250, or 10,20,30 by section, or ddim25", check=respacing
    )
    use_kl: bool = flag(False, "train on the variational bound")
    predict_xstart: bool = flag(False, "predict x_start instead of the noise", fixes=True)
    rescale_timesteps: bool = flag(False, "hand t to the network as if T were 1000", fixes=True)
    rescale_learned_sigmas: bool = flag(False, "weigh the bound as the published recipe does")


@dataclass(frozen=True)
class ClassifierConfig:
    """The noisy classifier."""

    classifier_use_fp16: bool = flag(False, "compute in float16")
    classifier_width: int = flag(128, "channels at multiplier 1", check=at_least(1), fixes=True)
    classifier_depth: int = flag(2, "residual blocks per level", check=at_least(1), fixes=True)
    classifier_attention_resolutions: str = flag(
        "32,16,8", "feature map sizes with attention", check=list_of(int, "32,16,8"), fixes=True
    )
    classifier_use_scale_shift_norm: bool = flag(True, "scale and shift by t", fixes=True)
    classifier_resblock_updown: bool = flag(
        True, "change resolution in residual blocks", fixes=True
    )
    classifier_pool: str = flag(
        "attention", "last layer: adaptive, attention, spatial or spatial_v2",
        check=one_of("adaptive", "attention", "spatial", "spatial_v2"), fixes=True,
    )  # fmt: skip
    classifier_channel_mult: str = flag(
        "", "channel multiplier of each level (default: by image size)",
        check=list_of(float, "1,2,3,4"), fixes=True,
    )  # fmt: skip
    classifier_num_head_channels: int = flag(
        64, "channels per attention head", check=at_least(1), fixes=True
    )


# What each kind of checkpoint keeps in its flags file.
DIFFUSION_GROUPS = (SizeConfig, PixelConfig, ModelConfig, DiffusionConfig)
SUPER_RES_GROUPS = (SuperResConfig, PixelConfig, ModelConfig, DiffusionConfig)
CLASSIFIER_GROUPS = (SizeConfig, PixelConfig, ClassifierConfig, DiffusionConfig)


def all_fields() -> list[Any]:
    """Return the fields of every group."""
    groups = [g for g in globals().values() if isinstance(g, type) and is_dataclass(g)]
    return [f for group in groups for f in fields(group)]


def defaults(*groups: type) -> dict[str, Any]:
    """Return flag name -> default for the groups, in order."""
    return {f.name: f.default for group in groups for f in fields(group)}


def fixed_names(*groups: type) -> set[str]:
    """Return the names of the flags that fix the trained network or process."""
    return {f.name for group in groups for f in fields(group) if f.metadata["fixes"]}


# --------------------------------------------------------------------------------------------
# From the command line


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the list of all flags."""

    def error(self, message: str):
        _fail(f"{message} (--help lists all flags)", code=2)


def _fail(message: str, code: int) -> None:
    """Print one line on stderr and end the process.

    A mistake in the command is made by all ranks alike: rank 0 tells it, and when it ends, the
    launcher ends the others, who speak only if they are still there.
    """
    rank = read_launch(os.environ).rank
    if rank > 0:
        time.sleep(2)
    line = " ".join(message.split())
    who = f"{os.path.basename(sys.argv[0])}: " + (f"rank {rank}: " if rank else "")
    print(f"{who}error: {line}", file=sys.stderr, flush=True)
    sys.exit(code)


def _add_flag(group: Any, f: Any, default: Any) -> None:
    value = f" [{default}]" if default != "" else ""
    shown = f"{f.metadata['help']}{value}".replace("%", "%%")
    kind = str2bool if f.type is bool else f.type
    group.add_argument(
        f"--{f.name}", type=kind, default=argparse.SUPPRESS, metavar=f.type.__name__, help=shown
    )


def find_mistake(f: Any, value: Any) -> str | None:
    """Say what is wrong with the value of one flag, or return None.

    Args:
        f: the field that declares the flag.
        value: of the flag's type.
    """
    if f.metadata["required"] and value == "":
        return f"--{f.name} is missing: {f.metadata['help']}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"--{f.name} {value} must be a finite number"
    problem = f.metadata["check"] and f.metadata["check"](value)
    shown = repr(value) if value == "" or str(value) != str(value).strip() else value
    return f"--{f.name} {shown} {problem}" if problem else None


def find_conflict(flags: dict[str, Any]) -> str | None:
    """Say which of a script's flags do not go together, or return None.

    Args:
        flags: name -> value, completed by what stands beside the checkpoints.
    """
    get = flags.get
    for fp16 in ("use_fp16", "classifier_use_fp16"):
        if get("use_bf16") and get(fp16):
            return f"--use_bf16 True and --{fp16} True exclude each other: give one of them"
    if get("label_dropout") and not get("class_cond"):
        return f"--label_dropout {get('label_dropout')} needs labels: give --class_cond True too"
    if get("classifier_scale") and get("classifier_path") == "":
        return "--classifier_path is missing: give it, or --classifier_scale 0 to do without"
    if get("classes"):
        if not get("class_cond") and "classifier_path" not in flags:
            return f"--classes {get('classes')} needs a model with --class_cond True: leave it out"
        if max(map(int, get("classes").split(","))) >= get("num_classes"):
            known = f"the model knows the classes 0 to {get('num_classes') - 1}"
            return f"--classes {get('classes')} is out of range: {known}"
    return None


def parse_flags(
    description: str | None,
    *groups: type,
    argv: Iterable[str] | None = None,
    overrides: dict[str, Any] | None = None,
) -> argparse.Namespace:
    """Read a command line into a namespace of flag values; a mistake ends the process.

    Args:
        description: printed above the flags.
        groups: the dataclasses whose flags the program has.
        argv: the command line, sys.argv[1:] by default.
        overrides: defaults of this program where they differ.

    Returns:
        a namespace with every flag, and `given`, the set of names that the user set.
    """
    usage = "%(prog)s [-h] [--FLAG VALUE ...]"
    parser = _Parser(description=description, usage=usage, allow_abbrev=False)
    values = defaults(*groups) | (overrides or {})
    for group in groups:
        section = parser.add_argument_group(group.__doc__.rstrip("."))
        for f in fields(group):
            _add_flag(section, f, values[f.name])
    given = vars(parser.parse_args(None if argv is None else list(argv)))
    values |= given
    mistakes = [find_mistake(f, values[f.name]) for group in groups for f in fields(group)]
    if "model_path" not in values:  # else a file will complete the flags
        mistakes.append(find_conflict(values))
    for mistake in filter(None, mistakes):
        parser.error(mistake)
    return argparse.Namespace(**values, given=set(given))


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; a user's mistake ends in one line on stderr and exit code 1.

    The whole traceback is shown when GUIDED_DIFFUSION_TRACEBACK is set.
    """
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("GUIDED_DIFFUSION_TRACEBACK"):
            raise
        _fail(str(error), code=1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" and "allocate memory" not in str(error):
            raise
        remedy = "use a smaller --batch_size or, in training, --microbatch or --use_checkpoint True"
        _fail(f"out of memory ({first_line(error)}): {remedy}", code=1)
    except KeyboardInterrupt:
        sys.exit(130)
