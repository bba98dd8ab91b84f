"""One pass over a set of images, shared among all ranks, that leaves what the scores need."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from guided_diffusion import dist_util
from guided_diffusion.progress import Progress

from .feature_cache import FeatureCache
from .image_sets import ImageSet, read_ahead
from .moments import Moments, merged

PART = 256  # images that are read, seen and kept together, whatever the batch size


@dataclass
class Measured:
    """What a network sees in a set of N images.

    Attributes:
        pooled: [N, D], float32.
        probabilities: [N, C], float32, if they were wanted and there are any.
        moments: of the wanted kinds of features, by kind.
    """

    pooled: np.ndarray
    probabilities: np.ndarray | None = None
    moments: dict[str, Moments] = field(default_factory=dict)


def measure(
    images: ImageSet,
    cache: FeatureCache,
    *,
    moments: Sequence[str] = (),
    probabilities: bool = False,
) -> Measured | None:
    """Let a network see each image once. All ranks call this with equal arguments.

    Args:
        images: the set.
        cache: gives the features.
        moments: of which kinds of features mean and covariance are wanted.
        probabilities: whether those of the classes are wanted.

    Returns:
        on rank 0 what it sees, to rounding the same for any number of ranks; None elsewhere.

    Raises:
        ValueError: an image cannot be read, or a feature is not finite.
    """
    mine = parts_of(len(images))[dist_util.get_rank() :: dist_util.get_world_size()]
    rows: list[tuple[range, dict[str, np.ndarray | None]]] = []
    seen: dict[str, Moments] = {}
    what = images.flag.lstrip("-")
    with dist_util.stage(f"looking at the {what}"), Progress(len(images), what) as bar:
        for part, pixels in read_ahead(images, mine):
            features = cache.features(pixels, bar.move)._asdict()
            add_moments(seen, features, moments, f"{images.flag} {images.path}")
            wanted = ["pooled"] + ["probabilities"] * probabilities
            rows.append((part, {kind: features[kind] for kind in wanted}))
    return _join(rows, seen)


def parts_of(num_images: int) -> list[range]:
    """Return the numbers of the images, by parts of equal size and a last one."""
    return [range(start, min(start + PART, num_images)) for start in range(0, num_images, PART)]


def add_moments(
    seen: dict[str, Moments], features: dict[str, Any], kinds: Sequence[str], name: str
) -> None:
    """Add features [n, D] of some kinds to what was seen of each; a network may lack a kind."""
    for kind in kinds:
        if features[kind] is not None:
            moments = seen.setdefault(kind, Moments(features[kind].shape[1]))
            moments.add(features[kind], f"{kind} features of {name}")


def _join(rows: list, seen: dict[str, Moments]) -> Measured | None:
    """Gather rows and moments of all ranks on rank 0."""
    dist_util.wait_patiently("waiting for the features of all ranks")
    everything = dist_util.gather_objects((rows, seen))
    if not dist_util.is_main():
        return None
    rows = sorted((row for mine, _ in everything for row in mine), key=lambda row: row[0].start)
    kinds = [kind for kind, array in rows[0][1].items() if array is not None]
    arrays = {kind: np.concatenate([found[kind] for _, found in rows]) for kind in kinds}
    moments = {
        kind: merged(m[kind] for _, m in everything if kind in m)
        for kind in everything[0][1]  # rank 0 has the first part, and so all kinds there are
    }
    return Measured(**arrays, moments=moments)
