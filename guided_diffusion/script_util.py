"""Flags to models and back: the published constructor and dictionary functions.

Every function here turns plain flag values, as `config.py` declares them, into the objects of
`unet.py`, `gaussian_diffusion.py` and `respace.py`.
"""

import argparse
import os
import warnings
from typing import Any

from . import config, dist_util, logger
from . import gaussian_diffusion as gd
from .config import SUPER_RES_CHANNEL_MULT, UNET_CHANNEL_MULT, defaults
from .flag_checks import str2bool as str2bool  # the published home of the name
from .respace import SpacedDiffusion, space_timesteps
from .unet import EncoderUNetModel, SuperResModel, UNetModel

NUM_CLASSES = config.PixelConfig.num_classes


# --------------------------------------------------------------------------------------------
# The published dictionaries of flags


def diffusion_defaults() -> dict[str, Any]:
    """Return the flags of the diffusion process and their defaults."""
    return defaults(config.DiffusionConfig) | defaults(config.PixelConfig)


def classifier_defaults() -> dict[str, Any]:
    """Return the flags of the noisy classifier and their defaults."""
    return defaults(config.SizeConfig, config.PixelConfig, config.ClassifierConfig)


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Return the flags of the diffusion model and its process and their defaults."""
    return defaults(*config.DIFFUSION_GROUPS)


def classifier_and_diffusion_defaults() -> dict[str, Any]:
    """Return the flags of the classifier and its process and their defaults."""
    return defaults(*config.CLASSIFIER_GROUPS)


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """Return the flags of the upsampler and its process and their defaults."""
    return defaults(*config.SUPER_RES_GROUPS)


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: dict[str, Any]) -> None:
    """Add a flag to `parser` for each entry; the type is that of the default, str for None."""
    helps = {f.name: f.metadata["help"] for f in config.all_fields()}
    for name, default in default_dict.items():
        kind = str if default is None else str2bool if isinstance(default, bool) else type(default)
        parser.add_argument(f"--{name}", default=default, type=kind, help=helps.get(name))


def args_to_dict(args: argparse.Namespace, keys: Any) -> dict[str, Any]:
    """Return {key: args.key}."""
    return {key: getattr(args, key) for key in keys}


# --------------------------------------------------------------------------------------------
# Models


def create_model_and_diffusion(
    image_size,
    class_cond,
    learn_sigma,
    num_channels,
    num_res_blocks,
    channel_mult,
    num_heads,
    num_head_channels,
    num_heads_upsample,
    attention_resolutions,
    dropout,
    diffusion_steps,
    noise_schedule,
    timestep_respacing,
    use_kl,
    predict_xstart,
    rescale_timesteps,
    rescale_learned_sigmas,
    use_checkpoint,
    use_scale_shift_norm,
    resblock_updown,
    use_fp16,
    use_new_attention_order,
    num_classes=NUM_CLASSES,
    in_channels=3,
    label_dropout=0.0,
) -> tuple[UNetModel, SpacedDiffusion]:
    """Build the diffusion model and its process from the flags of `model_and_diffusion_defaults`.

    Raises:
        ValueError: names the flags that do not go together.
    """
    flags = locals()
    model = create_model(**_own(create_model, flags))
    return model, _process(flags)


def create_model(
    image_size,
    num_channels,
    num_res_blocks,
    channel_mult="",
    learn_sigma=False,
    class_cond=False,
    use_checkpoint=False,
    attention_resolutions="16",
    num_heads=1,
    num_head_channels=-1,
    num_heads_upsample=-1,
    use_scale_shift_norm=False,
    dropout=0,
    resblock_updown=False,
    use_fp16=False,
    use_new_attention_order=False,
    num_classes=NUM_CLASSES,
    in_channels=3,
    label_dropout=0.0,
) -> UNetModel:
    """Build the UNet; see `create_model_and_diffusion`.

    With `label_dropout` the model has one class more, the null class with index `num_classes`.
    """
    return _unet(UNetModel, image_size, UNET_CHANNEL_MULT, locals())


def sr_create_model_and_diffusion(
    large_size,
    small_size,
    class_cond,
    learn_sigma,
    num_channels,
    num_res_blocks,
    num_heads,
    num_head_channels,
    num_heads_upsample,
    attention_resolutions,
    dropout,
    diffusion_steps,
    noise_schedule,
    timestep_respacing,
    use_kl,
    predict_xstart,
    rescale_timesteps,
    rescale_learned_sigmas,
    use_checkpoint,
    use_scale_shift_norm,
    resblock_updown,
    use_fp16,
    channel_mult="",
    use_new_attention_order=False,
    num_classes=NUM_CLASSES,
    in_channels=3,
    label_dropout=0.0,
) -> tuple[SuperResModel, SpacedDiffusion]:
    """Build the upsampler and its process from the flags of `sr_model_and_diffusion_defaults`.

    Raises:
        ValueError: names the flags that do not go together.
    """
    flags = locals()
    model = sr_create_model(**_own(sr_create_model, flags))
    return model, _process(flags)


def sr_create_model(
    large_size,
    small_size,
    num_channels,
    num_res_blocks,
    learn_sigma,
    class_cond,
    use_checkpoint,
    attention_resolutions,
    num_heads,
    num_head_channels,
    num_heads_upsample,
    use_scale_shift_norm,
    dropout,
    resblock_updown,
    use_fp16,
    channel_mult="",
    use_new_attention_order=False,
    num_classes=NUM_CLASSES,
    in_channels=3,
    label_dropout=0.0,
) -> SuperResModel:
    """Build the upsampler; see `sr_create_model_and_diffusion`.

    `small_size` does not change the network, which brings any input to `large_size`.
    """
    if small_size > large_size:
        raise ValueError(f"--small_size {small_size} is larger than --large_size {large_size}")
    return _unet(SuperResModel, large_size, SUPER_RES_CHANNEL_MULT, locals(), "large_size")


def create_classifier_and_diffusion(
    image_size,
    classifier_use_fp16,
    classifier_width,
    classifier_depth,
    classifier_attention_resolutions,
    classifier_use_scale_shift_norm,
    classifier_resblock_updown,
    classifier_pool,
    learn_sigma,
    diffusion_steps,
    noise_schedule,
    timestep_respacing,
    use_kl,
    predict_xstart,
    rescale_timesteps,
    rescale_learned_sigmas,
    num_classes=NUM_CLASSES,
    in_channels=3,
    classifier_channel_mult="",
    classifier_num_head_channels=64,
) -> tuple[EncoderUNetModel, SpacedDiffusion]:
    """Build the classifier and its process from the flags of `classifier_and_diffusion_defaults`.

    Raises:
        ValueError: names the flags that do not go together.
    """
    flags = locals()
    classifier = create_classifier(**_own(create_classifier, flags))
    return classifier, _process(flags)


def create_classifier(
    image_size,
    classifier_use_fp16,
    classifier_width,
    classifier_depth,
    classifier_attention_resolutions,
    classifier_use_scale_shift_norm,
    classifier_resblock_updown,
    classifier_pool,
    num_classes=NUM_CLASSES,
    in_channels=3,
    classifier_channel_mult="",
    classifier_num_head_channels=64,
) -> EncoderUNetModel:
    """Build the noisy classifier; see `create_classifier_and_diffusion`."""
    channel_mult, downsampling = _levels(
        image_size, classifier_channel_mult, classifier_attention_resolutions, UNET_CHANNEL_MULT,
        ("image_size", "classifier_channel_mult", "classifier_attention_resolutions"),
    )  # fmt: skip
    widths = _widths(classifier_width, channel_mult, "classifier_width", "classifier_channel_mult")
    attended = _attended(widths, downsampling)
    _check_heads(attended, classifier_num_head_channels, "classifier_num_head_channels")
    return EncoderUNetModel(
        image_size=image_size,
        in_channels=in_channels,
        model_channels=classifier_width,
        out_channels=num_classes,
        num_res_blocks=classifier_depth,
        attention_resolutions=downsampling,
        channel_mult=channel_mult,
        use_fp16=classifier_use_fp16,
        num_head_channels=classifier_num_head_channels,
        use_scale_shift_norm=classifier_use_scale_shift_norm,
        resblock_updown=classifier_resblock_updown,
        pool=classifier_pool,
    )


def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str = "",
) -> SpacedDiffusion:
    """Build the diffusion process, respaced to `timestep_respacing` (all steps if empty).

    Raises:
        ValueError: names the flags that do not go together.
    """
    if noise_schedule == "linear" and steps <= 20:
        raise ValueError(
            f"--diffusion_steps {steps} is too short for --noise_schedule linear, whose last beta, "
            f"20 / {steps}, must be below 1: use 21 steps or more, or the cosine schedule"
        )
    if use_kl:
        loss_type = gd.LossType.RESCALED_KL
    else:
        loss_type = gd.LossType.RESCALED_MSE if rescale_learned_sigmas else gd.LossType.MSE
    fixed = gd.ModelVarType.FIXED_SMALL if sigma_small else gd.ModelVarType.FIXED_LARGE
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=gd.get_named_beta_schedule(noise_schedule, steps),
        model_mean_type=gd.ModelMeanType.START_X if predict_xstart else gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.LEARNED_RANGE if learn_sigma else fixed,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
    )


CREATE = {  # what a checkpoint may be (see trained_flags.KINDS) -> what builds it and its process
    "diffusion model": create_model_and_diffusion,
    "upsampler": sr_create_model_and_diffusion,
    "classifier": create_classifier_and_diffusion,
}


# --------------------------------------------------------------------------------------------
# The seed


def choose_seed(seed: int) -> int:
    """Return `seed`, or, for -1, one drawn now; it is logged, and the same on all ranks."""
    drawn = int.from_bytes(os.urandom(4), "little") >> 1
    chosen = dist_util.broadcast_object(drawn if seed == -1 else seed)
    logger.log(f"seed {chosen}")
    return chosen


# --------------------------------------------------------------------------------------------
# From flags to constructor arguments


def _own(function, flags: dict[str, Any]) -> dict[str, Any]:
    """Pick the flags that `function` takes."""
    code = function.__code__
    return {name: flags[name] for name in code.co_varnames[: code.co_argcount]}


def _process(flags: dict[str, Any]) -> SpacedDiffusion:
    """Build the process from the flags of a model."""
    own = {key: flags[key] for key in defaults(config.DiffusionConfig) if key != "diffusion_steps"}
    return create_gaussian_diffusion(steps=flags["diffusion_steps"], **own)


def _unet(
    kind: type, size: int, table: dict[int, tuple], flags: dict[str, Any], size_name="image_size"
) -> UNetModel:
    """Build a UNet or an upsampler for `size` pixels from its flags."""
    channel_mult, downsampling = _levels(
        size, flags["channel_mult"], flags["attention_resolutions"], table,
        (size_name, "channel_mult", "attention_resolutions"),
    )  # fmt: skip
    widths = _widths(flags["num_channels"], channel_mult, "num_channels", "channel_mult")
    by_channels = flags["num_head_channels"] != -1
    for name in ["num_head_channels"] if by_channels else ["num_heads", "num_heads_upsample"]:
        _check_heads(_attended(widths, downsampling), flags[name], name)
    rows = flags["num_classes"] + (flags["label_dropout"] > 0)
    same = (
        "in_channels num_res_blocks dropout use_checkpoint use_fp16 num_heads num_head_channels "
        "num_heads_upsample use_scale_shift_norm resblock_updown use_new_attention_order"
    )
    return kind(
        image_size=size,
        model_channels=flags["num_channels"],
        out_channels=flags["in_channels"] * (2 if flags["learn_sigma"] else 1),
        attention_resolutions=downsampling,
        channel_mult=channel_mult,
        num_classes=rows if flags["class_cond"] else None,
        **{name: flags[name] for name in same.split()},
    )


def _levels(
    size: int,
    channel_mult: str,
    attention_resolutions: str,
    table: dict[int, tuple],
    names: tuple[str, str, str],
) -> tuple[tuple, tuple[int, ...]]:
    """Return the channel multiplier of each level and the downsampling factors with attention.

    Raises:
        ValueError: if the size cannot be halved once per level.
    """
    size_name, mult_name, attention_name = names
    if not channel_mult and size not in table:
        raise ValueError(
            f"--{size_name} {size} has no default levels (those have {sorted(table)}): "
            f"give --{mult_name}, one multiplier per level, such as 1,2,2"
        )
    mult = _numbers(channel_mult, mult_name) if channel_mult else table[size]
    if size % 2 ** (len(mult) - 1):
        raise ValueError(
            f"--{size_name} {size} is not divisible by {2 ** (len(mult) - 1)}, as the "
            f"{len(mult)} levels of --{mult_name} {','.join(map(str, mult))} need"
        )
    levels = {size >> level: 2**level for level in range(len(mult))}
    wanted = [int(n) for n in _numbers(attention_resolutions, attention_name)]
    for resolution in wanted:
        if resolution not in levels:
            warnings.warn(
                f"--{attention_name} {resolution}: no level of this network has that size "
                f"(they have {', '.join(map(str, levels))}), so it adds no attention",
                stacklevel=4,
            )
    return mult, tuple(levels[n] for n in wanted if n in levels)


def _numbers(text: str | tuple, name: str) -> tuple:
    """Read '1,2,2' or '0.5,1' as numbers, whole ones as int."""
    items = text.split(",") if isinstance(text, str) else text
    try:
        values = [float(item) for item in items if item != ""]
    except ValueError:
        values = [0.0]
    if not all(value > 0 for value in values):
        raise ValueError(f"--{name} {text} must be positive numbers with commas between")
    return tuple(int(value) if value == int(value) else value for value in values)


def _widths(channels: int, channel_mult: tuple, name: str, mult_name: str) -> list[int]:
    """Return the channels of each level.

    Raises:
        ValueError: if a width is not divisible by 32, the number of groups that are normalised.
    """
    widths = [int(channels * mult) for mult in channel_mult]
    for width in [channels * channel_mult[0], *widths]:
        if width % 32:
            raise ValueError(
                f"--{name} {channels} with --{mult_name} {','.join(map(str, channel_mult))} gives "
                f"a level of {width:g} channels: each must be a multiple of 32"
            )
    return widths


def _attended(widths: list[int], downsampling: tuple[int, ...]) -> list[int]:
    """Return the widths of the levels with attention, and of the last, which always has it."""
    return [w for level, w in enumerate(widths) if 2**level in downsampling] + widths[-1:]


def _check_heads(widths: list[int], value: int, name: str) -> None:
    """Raise a ValueError if `value` heads, or channels per head, do not divide a width."""
    for width in widths:
        if value != -1 and width % value:
            raise ValueError(f"--{name} {value} does not divide {width}, the channels of a level")
