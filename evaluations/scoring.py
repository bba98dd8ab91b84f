"""From two sets of images to their scores: what evaluator.py does."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from guided_diffusion import checkpoints, dist_util
from guided_diffusion.image_decoding import is_url

from . import metrics
from .feature_cache import FeatureCache
from .features import Extractor, load_extractor
from .image_sets import MIN_IMAGES, Gaussian, ImageSet, open_images
from .measuring import Measured, measure

USUAL = 50_000  # samples behind a published FID
SETS = ("reference", "sample")


def evaluate(args: argparse.Namespace) -> None:
    """Score a set of images, print the scores and write them. All ranks call this.

    Args:
        args: the flags of evaluator.py.

    Raises:
        ValueError: a set cannot be read, or does not go with the network.
    """
    start = time.monotonic()
    sets = {name: open_images(getattr(args, name), f"--{name}", MIN_IMAGES) for name in SETS}
    extractor = load_extractor(args.features, args.inception)
    stored = {name: stored_statistics(images, extractor) for name, images in sets.items()}
    cache = FeatureCache(args.cache_dir, extractor, args.batch_size)
    seen = {
        name: measure(
            images,
            cache,
            moments=[kind for kind in extractor.distances if kind not in stored[name]],
            probabilities=name == "sample",
        )
        for name, images in sets.items()
    }
    if dist_util.is_main():
        cache.trim(args.cache_gb * 1e9)
        for line in [*_describe(sets, stored, seen), *_warnings(sets, stored, seen, extractor)]:
            print(line, file=sys.stderr, flush=True)
        print("Computing evaluations...", file=sys.stderr, flush=True)
        scores = compute(seen, stored, extractor, more=args.more_scores)
        report = scores | _circumstances(sets, stored, extractor, time.monotonic() - start)
        for key, value in scores.items():
            print(f"{extractor.labels[key]}: {value}", flush=True)
        if args.json:
            write_json(args.json, report)
    dist_util.wait_patiently("waiting for the scores")


# --------------------------------------------------------------------------------------------
# Scores


def stored_statistics(images: ImageSet, extractor: Extractor) -> dict[str, Gaussian]:
    """Return the statistics of a network's features that a set brings along, by kind.

    Raises:
        ValueError: they are no statistics, or those of other features.
    """
    if images.features != extractor.name:
        return {}
    found = {kind: images.statistics(kind, width) for kind, width in extractor.widths.items()}
    return {kind: gaussian for kind, gaussian in found.items() if gaussian is not None}


def compute(
    seen: dict[str, Measured],
    stored: dict[str, dict[str, Gaussian]],
    extractor: Extractor,
    more: bool = False,
) -> dict[str, float]:
    """Return the scores by key, in the order of the published evaluator.

    Args:
        seen: what the network sees in "reference" and "sample".
        stored: statistics that are used instead of those of what is seen.
        extractor: the network.
        more: also the scores that the published evaluator does not know.
    """
    scores = {}
    reference, sample = (seen[name] for name in SETS)
    if sample.probabilities is not None:
        scores["inception_score"] = metrics.inception_score(sample.probabilities)
    for kind, key in extractor.distances.items():
        one, other = (stored[name].get(kind) or _gaussian(seen[name], kind) for name in SETS)
        try:
            scores[key] = metrics.frechet_distance(*one, *other)
        except ValueError as error:
            label = extractor.labels[key]
            raise ValueError(f"{label} of reference (1) and sample (2): {error}") from error
    pair, device = (reference.pooled, sample.pooled), _precise_device()
    scores["precision"], scores["recall"] = metrics.precision_recall(*pair, device=device)
    if more:
        scores["kernel_distance"] = metrics.kernel_distance(*pair, device=device)
        scores["density"], scores["coverage"] = metrics.density_coverage(*pair, device=device)
    return scores


def _gaussian(seen: Measured, kind: str) -> Gaussian:
    """Return mean and covariance of a kind of features."""
    return Gaussian(seen.moments[kind].mean, seen.moments[kind].covariance())


def _precise_device() -> torch.device:
    """Return this rank's device, if it knows float64, else the CPU."""
    device = dist_util.dev()
    return torch.device("cpu") if device.type == "mps" else device


# --------------------------------------------------------------------------------------------
# What is said of them


def write_json(path: str, report: dict[str, Any]) -> None:
    """Write scores and circumstances, all or nothing, into a folder that is made if need be.

    Raises:
        OSError: they cannot be written; one line that names the flag.
    """
    text = json.dumps(report, indent=2, allow_nan=False)
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        checkpoints.write_bytes(path, f"{text}\n".encode())
    except OSError as error:
        remedy = "make room there, or choose another file; the scores are those printed above"
        raise OSError(
            f"--json {path} cannot be written ({checkpoints.reason_of(error)}): {remedy}"
        ) from error


def _source(stored: dict[str, Gaussian], kind: str) -> str:
    return "stored" if kind in stored else "computed"


def _describe(sets: dict, stored: dict, seen: dict) -> Iterator[str]:
    """Yield a line on each set: what it is, and whence its statistics come."""
    for name, images in sets.items():
        kinds = [*stored[name], *seen[name].moments]
        sources = ", ".join(f"{kind} {_source(stored[name], kind)}" for kind in kinds)
        size = "x".join(map(str, images.size))
        yield f"{name}: {len(images)} images {size} of {images.path}; statistics: {sources}"


def _warnings(sets: dict, stored: dict, seen: dict, extractor: Extractor) -> Iterator[str]:
    """Yield a line on each thing that makes the scores mean less than they seem to."""
    distance = extractor.labels[extractor.distances["pooled"]]
    for name, images in sets.items():
        dim, num = seen[name].pooled.shape[1], len(images)
        if images.features != extractor.name and images.has_statistics():
            yield (
                f"warning: the {name} holds statistics of {images.features[:40]!r} features: "
                "computed from its images instead"
            )
        if "pooled" not in seen[name].moments:
            continue  # the number of images behind stored statistics is not known
        if num <= dim:
            yield (
                f"warning: the {name} has {num} images for {dim} features: its covariance is "
                f"singular, and {distance} much too large"
            )
        elif num < USUAL:
            what = "samples" if name == "sample" else "reference images"
            yield (
                f"warning: {num} {what}: {distance} grows as their number falls, so compare only "
                f"figures of as many; published ones are of {USUAL}"
            )
    if sets["reference"].size != sets["sample"].size:
        yield "warning: reference and sample have different sizes, which the scores will see"


def _circumstances(
    sets: dict, stored: dict, extractor: Extractor, seconds: float
) -> dict[str, Any]:
    """Return what the JSON file has beside the scores."""
    found: dict[str, Any] = {}
    for name, images in sets.items():
        found[f"num_{name}"] = len(images)
        found[name] = images.path if is_url(images.path) else os.path.abspath(images.path)
    sources = {name: {k: _source(stored[name], k) for k in extractor.distances} for name in SETS}
    return found | {
        "statistics": sources,
        "features": extractor.name,
        "weights_sha256": extractor.digest,
        "versions": _versions(),
        "num_ranks": dist_util.get_world_size(),
        "device": str(dist_util.dev()),
        "seconds": round(seconds, 3),
    }


def _versions() -> dict[str, str]:
    try:
        own = version("guided-diffusion")
    except PackageNotFoundError:  # run from its folder
        own = "not installed"
    known = {"python": platform.python_version(), "numpy": np.__version__}
    return {"guided_diffusion": own, "torch": torch.__version__} | known
