"""The flags of the programs in this folder. This module imports nothing heavy."""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from guided_diffusion.config import DataConfig, RunConfig
from guided_diffusion.flag_checks import (
    above,
    count,
    image_source,
    one_of,
    or_unset,
    output_file,
    output_folder,
)
from guided_diffusion.flag_parsing import flag, read_flags, same_as


@dataclass(frozen=True)
class SetsConfig:
    """What is compared; the two may also stand without the names of their flags."""

    reference: str = flag(
        "", "real images: an npz such as a published reference batch, a folder or a zip",
        check=image_source, required=True,
    )  # fmt: skip
    sample: str = flag(
        "", "images to score: an npz, a folder or a zip", check=image_source, required=True
    )
    json: str = flag("", "also write the scores to this file", check=output_file(".json"))
    more_scores: bool = flag(False, "also kernel distance, density and coverage")


@dataclass(frozen=True)
class BatchConfig:
    """The images that become a reference batch, and where it goes."""

    data_dir: str = same_as(DataConfig, "data_dir")
    image_size: int = flag(64, "height and width to crop them to", check=count(2**15))
    out: str = flag("", "the npz to write", check=output_file(".npz"), required=True)
    num_images: int = flag(
        10_000, "images to put into it, for precision and recall", check=count(10**6, least=4)
    )


@dataclass(frozen=True)
class NetworkConfig:
    """The network that looks at the images."""

    features: str = flag(
        "inception", "inception, or efficientnet_lite0, which needs no download",
        check=one_of("inception", "efficientnet_lite0"),
    )  # fmt: skip
    inception: str = flag(
        "", "classify_image_graph_def.pb, or a conversion of it to PyTorch (default: downloaded)"
    )
    batch_size: int = flag(
        -1, "images that it sees at once (-1: 64, on a CPU 4)",
        check=or_unset(-1, count(256)),  # measuring.PART: more are never read together
    )  # fmt: skip
    device: str = same_as(RunConfig, "device")
    dist_timeout: float = same_as(RunConfig, "dist_timeout")


@dataclass(frozen=True)
class CacheConfig:
    """Where features are kept for the next time."""

    cache_dir: str = flag(
        "", "a folder, or none (default: features in $GUIDED_DIFFUSION_CACHE or ~/.cache)",
        check=output_folder,
    )  # fmt: skip
    cache_gb: float = flag(
        10.0, "most gigabytes to keep there; what was not used for long goes first", check=above(0)
    )


def parse(
    description: str | None,
    *groups: type,
    argv: Iterable[str] | None = None,
    positional: Sequence[str] = (),
) -> argparse.Namespace:
    """Read a command line; a mistake ends the process. See `flag_parsing.read_flags`.

    Here what is not set is None.
    """
    args = read_flags(
        description, *groups, argv=argv, positional=positional,
        expand=lambda given, values: {}, find_conflict=lambda flags: None,
    )  # fmt: skip
    unset = {name: None for name, value in vars(args).items() if value in ("", -1)}
    return argparse.Namespace(**vars(args) | unset)
