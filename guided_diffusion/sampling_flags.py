"""The flags of the scripts that draw images; see `config`, which has them with all others."""

import math
from dataclasses import dataclass
from typing import Any

from .flag_checks import (
    MASKS,
    at_least,
    between,
    checkpoint_file,
    class_list,
    count,
    image_source,
    interval,
    label_list,
    mask_source,
    one_of,
    or_unset,
)
from .flag_parsing import defaults, flag
from .presets import PRESETS

SAMPLERS = (
    "ancestral", "ddim", "plms", "ipndm", "heun", "dpmpp_2m", "dpmpp_3m", "dpmpp_3m_classic",
    "dpmpp_2m_sde", "unipc",
)  # fmt: skip
PUBLISHED_SAMPLERS = ("ancestral", "ddim")  # which take the steps of the process
GRIDS = ("published", "logsnr", "karras", "time")


@dataclass(frozen=True)
class LoadConfig:
    """The trained model, and how much to do with it."""

    preset: str = flag(
        "", f"a released or bundled model with its flags: {', '.join(PRESETS)}",
        check=one_of("", *PRESETS),
    )  # fmt: skip
    model_path: str = flag(
        "", "checkpoint; the .json beside it gives the flags", check=checkpoint_file, required=True
    )
    num_samples: int = flag(10000, "number of images", check=count(10**9))
    clip_denoised: bool = flag(True, "clip the predicted x_start to [-1, 1] in every step")


@dataclass(frozen=True)
class SampleConfig:
    """How images are drawn."""

    use_ddim: bool = flag(False, "DDIM instead of ancestral sampling")
    save_images: bool = flag(False, "write each image as a PNG file, too")
    save_every_t: int = flag(
        0, "draw film strips of the first chains, a picture every so many steps (0: none)",
        check=at_least(0),
    )  # fmt: skip


@dataclass(frozen=True)
class StepsConfig:
    """By which steps."""

    sampler: str = flag(
        "", f"{', '.join(SAMPLERS)} (default: ddim under --use_ddim, else ancestral)",
        check=one_of("", *SAMPLERS),
    )  # fmt: skip
    num_steps: int = flag(
        0, "steps of a chain, instead of --timestep_respacing (0: as that says)",
        check=count(10**6, least=0),
    )  # fmt: skip
    steps_by: str = flag(
        "", "how --num_steps are spread: published (default for ancestral and ddim), logsnr "
        "(default for all others), karras or time",
        check=one_of("", *GRIDS),
    )  # fmt: skip
    fractional_t: bool = flag(False, "let solvers step between the timesteps of the training, too")
    eta: float = flag(
        -1.0, "noise of ddim and dpmpp_2m_sde, 0 to 1 (-1: 0 for ddim, 1 for the other)",
        check=or_unset(-1, between(0, 1)),
    )  # fmt: skip
    solver_order: int = flag(2, "order of unipc, 2 or 3", check=one_of(2, 3))
    s_churn: float = flag(0.0, "noise that heun adds before its steps", check=at_least(0))
    s_tmin: float = flag(0.0, "lowest sigma at which it does", check=at_least(0))
    s_tmax: float = flag(1e6, "highest sigma at which it does", check=at_least(0))
    s_noise: float = flag(
        1.0, "deviation of the noise that heun and dpmpp_2m_sde add, in units of what it should be",
        check=between(0, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class SteeringConfig:
    """By what the network is steered."""

    cfg_scale: float = flag(
        1.0, "classifier-free guidance scale, of a network with a null class (1: none)",
        check=between(-1000, 1000),
    )  # fmt: skip
    guide_model_path: str = flag(
        "", "checkpoint of a weaker network to push away from (autoguidance)", check=checkpoint_file
    )
    guide_scale: float = flag(2.0, "scale of autoguidance (1: none)", check=between(-1000, 1000))
    guidance_interval: str = flag(
        "", "guide only where LO < sigma <= HI, such as 0.3,5 (default: everywhere)",
        check=interval,
    )  # fmt: skip
    dynamic_threshold: float = flag(
        0.0, "limit x_start by this share of its pixels, such as 0.995 (0: by --clip_denoised)",
        check=between(0, 1),
    )  # fmt: skip


@dataclass(frozen=True)
class LabelConfig:
    """Of which classes."""

    classes: str = flag(
        "", "classes to draw, in turn, by number or name, such as 207,360 (default: random)",
        check=class_list,
    )  # fmt: skip
    class_balanced: bool = flag(False, "draw all classes in turn, equally often")
    labels_file: str = flag(
        "", "classes to draw, in turn: lines of a .txt or .csv, or a list in a .json, .npy or .npz",
        check=label_list,
    )  # fmt: skip


@dataclass(frozen=True)
class GuidanceConfig:
    """The classifier that steers sampling."""

    classifier_path: str = flag("", "checkpoint of the noisy classifier", check=checkpoint_file)
    classifier_scale: float = flag(1.0, "guidance scale; 0 samples without the classifier")


@dataclass(frozen=True)
class BaseSamplesConfig:
    """The images to upsample."""

    base_samples: str = flag(
        "", "small images: an npz, as a sampler writes it, or a folder or zip of image files",
        check=image_source, required=True,
    )  # fmt: skip
    low_res_noise: float = flag(
        0.0, "noise added to them, its standard deviation where pixels range over [-1, 1]",
        check=between(0, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class InpaintConfig:
    """The images to draw in, and what to draw anew."""

    images: str = flag(
        "", "images: an npz, as a sampler writes it, or a folder or zip of image files",
        check=image_source, required=True,
    )  # fmt: skip
    mask: str = flag(
        "", f"what is drawn anew: the white of a PNG of their size, or {', '.join(MASKS)}",
        check=mask_source, required=True,
    )  # fmt: skip
    resamplings: int = flag(10, "how often each stretch of the chain is walked", check=count(1000))
    jump_length: int = flag(10, "steps of a stretch", check=count(10**6))


# Flags that only some samplers read -> these samplers.
ONLY_FOR = {
    "eta": ("ddim", "dpmpp_2m_sde"),
    "solver_order": ("unipc",),
    **dict.fromkeys(("s_churn", "s_tmin", "s_tmax"), ("heun",)),
    "s_noise": ("heun", "dpmpp_2m_sde"),
}


def sampler_of(flags: dict[str, Any]) -> str:
    """Return the name of the sampler that flags choose."""
    return flags.get("sampler") or ("ddim" if flags.get("use_ddim") else "ancestral")


def steps_of(flags: dict[str, Any]) -> str:
    """Return the name of the grid that flags choose for --num_steps."""
    usual = "published" if sampler_of(flags) in PUBLISHED_SAMPLERS else "logsnr"
    return flags.get("steps_by") or usual


def has_guide(flags: dict[str, Any]) -> bool:
    """Tell whether a weaker network is called."""
    return bool(flags.get("guide_model_path")) and flags["guide_scale"] != 1


def find_conflict(flags: dict[str, Any]) -> str | None:
    """Say which flags of samplers and guidance do not go together, or return None.

    Args:
        flags: name -> value, of all flags of a script.
    """
    get, usual = flags.get, defaults(StepsConfig)
    sampler = sampler_of(flags)
    if "resamplings" in flags and sampler != "ancestral":
        given = f"--sampler {sampler}" if get("sampler") else f"--use_ddim {get('use_ddim')}"
        return f"{given} cannot inpaint, which takes ancestral steps: leave it out"
    if get("use_ddim") and sampler != "ddim":
        return f"--use_ddim True and --sampler {sampler} are two samplers: give one of them"
    if get("num_steps") and get("timestep_respacing"):
        return (
            f"--num_steps {get('num_steps')} and --timestep_respacing {get('timestep_respacing')} "
            "both choose the steps: give one of them"
        )
    if get("num_steps", 0) > get("diffusion_steps", math.inf):
        return (
            f"--num_steps {get('num_steps')} is more than the --diffusion_steps "
            f"{get('diffusion_steps')} of the training: give at most that"
        )
    if get("steps_by") and not get("num_steps"):
        return f"--steps_by {get('steps_by')} spreads --num_steps: give that, too"
    if get("fractional_t") and (sampler in PUBLISHED_SAMPLERS or not get("num_steps")):
        others = ", ".join(name for name in SAMPLERS if name not in PUBLISHED_SAMPLERS)
        return f"--fractional_t True needs --num_steps and, as --sampler, one of {others}"
    for name, samplers in ONLY_FOR.items():
        if get(name, usual[name]) != usual[name] and sampler not in samplers:
            return f"--{name} {get(name)} is for --sampler {' or '.join(samplers)}: leave it out"
    for name in ("s_tmin", "s_tmax", "s_noise"):
        if sampler == "heun" and get(name, usual[name]) != usual[name] and not get("s_churn"):
            return f"--{name} {get(name)} is of the noise of --s_churn: give that, too"
    if get("s_tmin", 0) > get("s_tmax", math.inf):
        return f"--s_tmin {get('s_tmin')} is above --s_tmax {get('s_tmax')}: exchange them"
    return _find_guidance_conflict(flags)


def _find_guidance_conflict(flags: dict[str, Any]) -> str | None:
    get, usual, path = flags.get, defaults(SteeringConfig), flags.get("guide_model_path")
    if get("cfg_scale", 1) != 1 and not (get("class_cond") and get("label_dropout")):
        return (
            f"--cfg_scale {get('cfg_scale')} needs a network with a null class, which was trained "
            "with --class_cond True and --label_dropout: leave it out (or give --label_dropout, "
            "if this network was so trained and has no flags file)"
        )
    if get("guide_scale", usual["guide_scale"]) != usual["guide_scale"] and not path:
        return f"--guide_scale {get('guide_scale')} scales --guide_model_path: give that, too"
    guided = get("cfg_scale", 1) != 1 or has_guide(flags) or get("classifier_scale")
    if get("guidance_interval") and not guided:
        return (
            f"--guidance_interval {get('guidance_interval')} limits guidance, but there is none: "
            "give --cfg_scale, --guide_model_path or, with a classifier, --classifier_scale"
        )
    return None
