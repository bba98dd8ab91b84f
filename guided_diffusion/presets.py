"""The released models, and the bundled ones, by name: their files and the flags that go with them.

The values are those of the published README. What fixes a network stands in `network`, one table
for each kind of checkpoint; how to sample from it stands in `sampling`, and any flag on the command
line wins over that.
"""

import os
from dataclasses import dataclass, field
from typing import Any

URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"
MODELS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "models")

Flags = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """A model and what belongs to it.

    Attributes:
        files: kind of checkpoint ("diffusion model", "upsampler", "classifier") -> file in MODELS.
        network: kind of checkpoint -> the flags that fix it, where they are not the defaults.
        sampling: flags that say how to sample; the command line wins over them.
        bundled: the files come with the project, their flags beside them.
        classes: the file in MODELS with the class names by number, "" if there is none.
    """

    files: dict[str, str]
    network: dict[str, Flags] = field(default_factory=dict)
    sampling: Flags = field(default_factory=dict)
    bundled: bool = False
    classes: str = ""


# What all released networks, and all released diffusion models of 256 x 256 and more, share.
ADM = {
    "attention_resolutions": "32,16,8", "diffusion_steps": 1000, "learn_sigma": True,
    "num_res_blocks": 2, "resblock_updown": True, "use_scale_shift_norm": True,
    "noise_schedule": "linear",
}  # fmt: skip
ADM_256 = ADM | {"image_size": 256, "num_channels": 256, "num_head_channels": 64}
IMAGENET = "imagenet_classes.txt"
PUBLISHED = {"batch_size": 4, "num_samples": 100, "timestep_respacing": "250", "use_fp16": True}


def _guided(size: int, scale: float, network: Flags, name: str = "", **more: Any) -> Preset:
    """Return the preset of an ImageNet model and the classifier of its size."""
    classifier = {"image_size": size} | more.pop("classifier", {})
    return Preset(
        {
            "diffusion model": name or f"{size}x{size}_diffusion.pt",
            "classifier": f"{size}x{size}_classifier.pt",
        },
        {"diffusion model": {"class_cond": True} | network, "classifier": classifier},
        PUBLISHED | {"classifier_scale": scale} | more,
        classes=IMAGENET,
    )


def _lsun(name: str) -> Preset:
    """Return the preset of an LSUN model; the best samples take all 1000 steps."""
    network = {"diffusion model": ADM_256 | {"class_cond": False}}
    return Preset({"diffusion model": name}, network, PUBLISHED | {"timestep_respacing": "1000"})


def _upsampler(name: str, **network: Any) -> Preset:
    """Return the preset of an upsampler."""
    network = ADM | {"num_channels": 192, "class_cond": True} | network
    return Preset({"upsampler": name}, {"upsampler": network}, PUBLISHED, classes=IMAGENET)


PRESETS = {
    "imagenet64": _guided(
        64, 1.0,
        ADM | {
            "image_size": 64, "num_channels": 192, "num_head_channels": 64, "num_res_blocks": 3,
            "noise_schedule": "cosine", "use_new_attention_order": True,
        },
        classifier={"classifier_depth": 4},
    ),
    "imagenet128": _guided(
        128, 0.5, ADM | {"image_size": 128, "num_channels": 256, "num_heads": 4}
    ),
    "imagenet256": _guided(256, 1.0, ADM_256),
    "imagenet256_uncond": _guided(
        256, 10.0, ADM_256 | {"class_cond": False}, "256x256_diffusion_uncond.pt"
    ),
    "imagenet512": _guided(512, 4.0, ADM_256 | {"image_size": 512}, use_fp16=False),
    "lsun_bedroom": _lsun("lsun_bedroom.pt"),
    "lsun_cat": _lsun("lsun_cat.pt"),
    "lsun_horse": _lsun("lsun_horse.pt"),
    "lsun_horse_nodropout": _lsun("lsun_horse_nodropout.pt"),
    "upsample_64_256": _upsampler(
        "64_256_upsampler.pt", large_size=256, small_size=64, num_heads=4
    ),
    "upsample_128_512": _upsampler(
        "128_512_upsampler.pt", large_size=512, small_size=128, num_head_channels=64,
        attention_resolutions="32,16",
    ),
    "fashion": Preset(
        {
            "diffusion model": "fashion/diffusion.pt",
            "classifier": "fashion/classifier.pt",
            "upsampler": "fashion/upsampler.pt",
        },
        sampling={
            "batch_size": 100, "num_samples": 100, "timestep_respacing": "50",
            "classifier_scale": 2.0,
        },
        bundled=True,
    ),
}  # fmt: skip


# --------------------------------------------------------------------------------------------
# From a name to files and flags

SCRIPTS = {  # kind of checkpoint -> what draws from it
    "diffusion model": "image_sample.py or classifier_sample.py",
    "upsampler": "super_res_sample.py",
}


def expand(given: Flags, defaults: Flags) -> Flags:
    """Return the flags that --preset stands for; see `flag_parsing.read_flags`.

    Args:
        given: flags that the user gave, maybe among them a preset.
        defaults: of all flags of the script.

    Raises:
        ValueError: if the preset has not what the script needs, or a file is not there.
    """
    name = given.get("preset")
    if name not in PRESETS:  # none was given, or the check of the flag will tell
        return {}
    preset = PRESETS[name]
    kind = "upsampler" if "large_size" in defaults else "diffusion model"
    if kind not in preset.files:
        (other,) = preset.files.keys() & SCRIPTS.keys()
        raise ValueError(f"--preset {name} is {article(other)} {other}: use {SCRIPTS[other]}")
    is_guided = given.get("classifier_scale", defaults.get("classifier_scale", 0)) != 0
    if is_guided and "classifier_path" not in given and "classifier" not in preset.files:
        raise ValueError(
            f"--preset {name} has no classifier: use image_sample.py, or give --classifier_scale 0"
        )
    draws = "use_ddim" in defaults  # else it scores or encodes, by the whole chain unless told
    wanted = set(preset.sampling) & set(defaults) if draws else {"use_fp16"}
    flags = {flag: value for flag, value in preset.sampling.items() if flag in wanted}
    if not is_guided:  # by the script's own default
        flags.pop("classifier_scale", None)
    if given.get("use_bf16"):  # which excludes the published float16
        flags.pop("use_fp16", None)
    if "model_path" not in given:
        flags["model_path"] = _find_file(name, kind)
    if is_guided and "classifier_path" not in given:
        flags["classifier_path"] = _find_file(name, "classifier")
    return flags


def article(kind: str) -> str:
    """Return the article of a kind of checkpoint."""
    return "an" if kind == "upsampler" else "a"


def _find_file(name: str, kind: str) -> str:
    """Return the path of a preset's file."""
    preset = PRESETS[name]
    path = os.path.join(MODELS, preset.files[kind])
    if not os.path.isfile(path):
        remedy = "restore it" if preset.bundled else f"fetch it by python models/download.py {name}"
        raise ValueError(f"--preset {name} needs {path}, which is not there: {remedy}")
    return path


def by_file(path: str) -> Preset | None:
    """Return the preset of a released file, known by its name alone; else None."""
    name = os.path.basename(path)
    return next((p for p in PRESETS.values() if name in p.files.values()), None)
