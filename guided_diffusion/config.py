"""Every flag of every script, once: name, type, default, help and check.

A flag is a field of one of the dataclasses below, each of which is a group in `--help`. The
published dictionaries (`script_util.model_and_diffusion_defaults()` and their kin), the argument
parsers and the flags files beside checkpoints all derive from these fields. This module imports
nothing heavy, so that `--help` answers at once.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from .flag_checks import (
    above,
    at_least,
    between,
    checkpoint_file,
    checkpoint_source,
    count,
    count_or_unset,
    device_name,
    ema_rates,
    fraction,
    image_source,
    label_source,
    list_of,
    npz_file,
    one_of,
    output_folder,
    png_file,
    respacing,
    str2bool,
    weights_file,
)
from .flag_parsing import defaults, find_mistake, fixed_names, flag, read_flags, run
from .presets import expand
from .sampling_flags import (  # noqa: F401 - groups, too
    BaseSamplesConfig,
    GuidanceConfig,
    InpaintConfig,
    LabelConfig,
    LoadConfig,
    SampleConfig,
    SteeringConfig,
    StepsConfig,
)
from .sampling_flags import find_conflict as find_sampling_conflict

__all__ = ["defaults", "find_mistake", "fixed_names", "flag", "parse_flags", "run", "str2bool"]

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
        -1,
        "seed of all random draws (-1: drawn and printed, or that of the resumed run)",
        check=between(-1, 2**62),
    )
    use_bf16: bool = flag(False, "compute in bfloat16 autocast; weights stay float32")
    compile: bool = flag(False, "run blocks as kernels of torch.compile: slow to start")
    dist_timeout: float = flag(
        1800.0,
        "seconds after which a rank that waits for another gives up: more than a save takes",
        check=above(0, most=1e7),
    )


@dataclass(frozen=True)
class DryRunConfig:
    """Before the run; every script has this."""

    dry_run: bool = flag(False, "print flags, parameters, operations and memory, and stop")


@dataclass(frozen=True)
class DataConfig:
    """The images to read."""

    data_dir: str = flag(
        "", "images: a folder, searched recursively, a zip, an npz or an LMDB folder",
        check=image_source, required=True,
    )  # fmt: skip
    labels: str = flag(
        "filename", "where classes come from: filename, folder, or a JSON or CSV file",
        check=label_source,
    )  # fmt: skip
    num_workers: int = flag(
        -1, "processes that decode images (-1: by the cores, 0: none)", check=count(1000, least=-1)
    )
    skip_bad_images: bool = flag(False, "skip and count images that cannot be read")
    fast_decode: bool = flag(False, "decode large JPEGs at a fraction of their size: other pixels")


@dataclass(frozen=True)
class AugmentConfig:
    """How training images are varied."""

    random_flip: bool = flag(True, "mirror every other image, at random")
    random_crop: bool = flag(False, "crop at a random place and scale instead of the centre")


@dataclass(frozen=True)
class BatchConfig:
    """How many images go through the network at once."""

    batch_size: int = flag(1, "images in a batch of one process", check=count(10**6))


@dataclass(frozen=True)
class OptimConfig:
    """How the network is trained."""

    schedule_sampler: str = flag(
        "uniform", "how t is drawn: uniform or loss-second-moment",
        check=one_of("uniform", "loss-second-moment"),
    )  # fmt: skip
    lr: float = flag(1e-4, "learning rate of AdamW", check=above(0, most=1000))
    weight_decay: float = flag(0.0, "weight decay of AdamW", check=at_least(0))
    microbatch: int = flag(
        -1, "images in one forward pass, to save memory (-1: the batch)", check=count_or_unset
    )
    ema_rate: str = flag("0.9999", "rates of the weight averages, commas between", check=ema_rates)
    grad_clip: float = flag(0.0, "largest norm of the gradient (0: any)", check=at_least(0))
    max_bad_steps: int = flag(
        100, "stop when so many steps in a row have no finite loss and gradient", check=count(10**9)
    )
    shard_params: bool = flag(False, "share weights and optimizer among the ranks (FSDP)")


@dataclass(frozen=True)
class KeepConfig:
    """What is logged and kept, and where to go on."""

    log_interval: int = flag(10, "steps between two lines of the log", check=count(10**9))
    tensorboard: bool = flag(False, "write TensorBoard files, too")
    save_interval: int = flag(10000, "steps between two checkpoints", check=count(10**9))
    keep_checkpoints: int = flag(0, "sets of checkpoints to keep (0: all)", check=at_least(0))
    resume_checkpoint: str = flag(
        "", "from where to go on: modelNNNNNN.pt, a folder, or auto (the newest set of this run)",
        check=checkpoint_source,
    )  # fmt: skip
    init_from: str = flag(
        "", "weights with which to begin a new run; what fits is taken", check=checkpoint_file
    )


@dataclass(frozen=True)
class TrainConfig:
    """What only the diffusion trainers know."""

    max_steps: int = flag(0, "stop after this many steps (0: never)", check=at_least(0))
    lr_anneal_steps: int = flag(
        0, "let the learning rate fall to 0 over this many steps and stop", check=at_least(0)
    )
    fp16_scale_growth: float = flag(
        1e-3, "how much log2 of the fp16 loss scale grows in a step", check=between(0, 10)
    )
    sample_interval: int = flag(
        0, "steps between two pictures of samples of the first EMA (0: none)", check=at_least(0)
    )


@dataclass(frozen=True)
class ClassifierTrainConfig:
    """What only the classifier's trainer knows."""

    val_data_dir: str = flag(
        "", "validation images, as --data_dir (default: no validation)", check=image_source
    )
    noised: bool = flag(True, "train on noised images, as guidance needs")
    iterations: int = flag(150000, "number of steps", check=count(10**9))
    anneal_lr: bool = flag(False, "let the learning rate fall linearly to 0")
    eval_interval: int = flag(5, "steps between two validation batches", check=count(10**9))


@dataclass(frozen=True)
class ViewConfig:
    """Which images to show, and where."""

    npz: str = flag("", "npz of images, as a sampler writes it", check=npz_file, required=True)
    out: str = flag("", "PNG to write (default: beside the npz)", check=png_file)
    start: int = flag(0, "number of the first image to show", check=at_least(0))
    num_images: int = flag(100, "most images to show", check=count(10**5))
    columns: int = flag(0, "images in a row (0: as many as make it square)", check=at_least(0))


@dataclass(frozen=True)
class ConvertConfig:
    """What to convert into what."""

    source: str = flag("", "checkpoint to read", check=checkpoint_file, required=True)
    target: str = flag("", "file to write, .pt or .safetensors", check=weights_file, required=True)


@dataclass(frozen=True)
class PixelConfig:
    """What the images and their labels are."""

    num_classes: int = flag(1000, "number of classes", check=count(10**7), fixes=True)
    in_channels: int = flag(3, "3 for colour, 1 for grey images", check=one_of(1, 3), fixes=True)


@dataclass(frozen=True)
class SizeConfig:
    """The image size."""

    image_size: int = flag(64, "height and width in pixels", check=count(2**15), fixes=True)


@dataclass(frozen=True)
class SuperResConfig:
    """The two image sizes."""

    large_size: int = flag(256, "height and width of the output", check=count(2**15), fixes=True)
    small_size: int = flag(64, "height and width of the input", check=count(2**15), fixes=True)


@dataclass(frozen=True)
class ModelConfig:
    """The UNet."""

    num_channels: int = flag(128, "channels at multiplier 1", check=count(2**15), fixes=True)
    num_res_blocks: int = flag(2, "residual blocks per level", check=count(1000), fixes=True)
    num_heads: int = flag(4, "attention heads", check=count(2**15), fixes=True)
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
    diffusion_steps: int = flag(1000, "length T of the chain", check=count(10**6), fixes=True)
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
    classifier_width: int = flag(128, "channels at multiplier 1", check=count(2**15), fixes=True)
    classifier_depth: int = flag(2, "residual blocks per level", check=count(1000), fixes=True)
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
        64, "channels per attention head", check=count(2**15), fixes=True
    )


# image size -> channel multiplier of each level, where --channel_mult is not given
UNET_CHANNEL_MULT = {
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}
SUPER_RES_CHANNEL_MULT = UNET_CHANNEL_MULT | {512: (1, 1, 2, 2, 4, 4)}

# What each kind of checkpoint keeps in its flags file.
DIFFUSION_GROUPS = (SizeConfig, PixelConfig, ModelConfig, DiffusionConfig)
SUPER_RES_GROUPS = (SuperResConfig, PixelConfig, ModelConfig, DiffusionConfig)
CLASSIFIER_GROUPS = (SizeConfig, PixelConfig, ClassifierConfig, DiffusionConfig)


def all_fields() -> list[Any]:
    """Return the fields of every group."""
    groups = [g for g in globals().values() if isinstance(g, type) and is_dataclass(g)]
    return [f for group in groups for f in fields(group)]


def find_conflict(flags: dict[str, Any]) -> str | None:
    """Say which of a script's flags do not go together, or return None.

    Args:
        flags: name -> value, completed by what stands beside the checkpoints.
    """
    get = flags.get
    for fp16 in ("use_fp16", "classifier_use_fp16"):
        if get("use_bf16") and get(fp16):
            return f"--use_bf16 True and --{fp16} True exclude each other: give one of them"
        if get("shard_params") and get(fp16):
            return f"--shard_params True does not work with --{fp16} True: use --use_bf16 True"
    if get("shard_params") and get("compile"):
        return "--shard_params True does not work with --compile True: leave one of them out"
    if get("labels", "filename") != "filename" and get("class_cond") is False:
        return f"--labels {get('labels')} needs --class_cond True: give both, or leave it out"
    if get("label_dropout") and not get("class_cond"):
        return f"--label_dropout {get('label_dropout')} needs labels: give --class_cond True too"
    if get("classifier_scale") and get("classifier_path") == "":
        return "--classifier_path is missing: give it, or --classifier_scale 0 to do without"
    chosen = [name for name in ("classes", "class_balanced", "labels_file") if get(name)]
    if len(chosen) > 1:
        return f"--{chosen[0]} and --{chosen[1]} both choose the classes: give one of them"
    if chosen and not get("class_cond") and "classifier_path" not in flags:
        shown = f"--{chosen[0]} {get(chosen[0])}"
        return f"{shown} needs a model with --class_cond True: leave it out"
    return find_sampling_conflict(flags)


def parse_flags(
    description: str | None,
    *groups: type,
    argv: Iterable[str] | None = None,
    overrides: dict[str, Any] | None = None,
    positional: Sequence[str] = (),
) -> argparse.Namespace:
    """Read a command line; a mistake ends the process. See `flag_parsing.read_flags`."""
    return read_flags(
        description, *groups, DryRunConfig, argv=argv, overrides=overrides, positional=positional,
        expand=expand, find_conflict=find_conflict,
    )  # fmt: skip
