"""What make_reference_batch.py does: statistics of all images, and some of them, in one npz.

The images are divided into sections, whatever the number of ranks. What was seen of a section is
kept in a folder beside the npz that is to be, and renewed now and then. So a run that was killed
goes on where it was, and ends in the same bytes as one that was not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import time
from typing import Any

import numpy as np

from guided_diffusion import checkpoints, dist_util
from guided_diffusion.data_sources import Source, open_source

from .features import Extractor, load_extractor
from .image_sets import FEATURES, SUFFIXES, CroppedImages, read_ahead
from .measuring import Progress, add_moments, parts_of
from .moments import Moments, merged

SECTION = 5000  # images in one, at least
MAX_SECTIONS = 32  # each takes up to 66 MB
SAVE_EVERY = 30.0  # seconds
ENDING = ".parts"  # of the folder beside the npz
PLAN, IMAGES, BATCH = "plan.json", "arr_0.npy", "batch.npz"  # files in it


def make(args: argparse.Namespace) -> None:
    """Write a reference batch. All ranks call this, and reach the same folder.

    Args:
        args: the flags of make_reference_batch.py. Of fewer images than num_images all are taken.

    Raises:
        ValueError: the images cannot be read, the file is there already, or the folder beside it
            is of a run with other flags.
    """
    folder = f"{os.path.abspath(args.out)}{ENDING}"
    if dist_util.any_rank(os.path.exists(args.out)):
        _clean(args.out, folder)
        return
    source = open_source(args.data_dir, "--data_dir")
    images = CroppedImages(source, args.image_size)
    extractor = load_extractor(args.features, args.inception)
    batch_size = args.batch_size or extractor.batch_size
    if dist_util.is_main():
        _begin(folder, _plan(args, source, extractor) | {"batch_size": batch_size})
    dist_util.barrier()
    sections = divide(len(images))
    see(images, extractor, batch_size, folder, sections)
    dist_util.wait_patiently("waiting for the statistics of all ranks")
    if dist_util.is_main():
        _write(args, images, extractor, folder, len(sections))
    dist_util.wait_patiently("waiting for the reference batch")


def _clean(path: str, folder: str) -> None:
    """Remove the folder of a finished run that was killed before it could; else complain."""
    dist_util.barrier()
    if not os.path.isdir(folder):
        raise ValueError(f"--out {path} exists: choose another name, or remove it")
    if dist_util.is_main():
        shutil.rmtree(folder)
        print(f"{path} is complete")
    dist_util.barrier()


def divide(num_images: int) -> list[list[range]]:
    """Return the parts of each section: contiguous, and for any number of ranks the same."""
    parts = parts_of(num_images)
    num_sections = max(1, min(MAX_SECTIONS, num_images // SECTION, len(parts)))
    ends = [len(parts) * i // num_sections for i in range(num_sections + 1)]
    return [parts[start:end] for start, end in zip(ends[:-1], ends[1:], strict=True)]


# --------------------------------------------------------------------------------------------
# The plan: what must not change between a run and the one that goes on with it


def _plan(args: argparse.Namespace, source: Source, extractor: Extractor) -> dict[str, Any]:
    names = hashlib.sha256()
    for name in source.names:
        names.update(os.fsencode(name) + b"\0")
    flags = ("image_size", "num_images", "features")
    plan = {flag: getattr(args, flag) for flag in flags}
    plan |= {"images": len(source), "names": names.hexdigest(), "network": extractor.identity}
    if os.path.isfile(args.data_dir):
        plan["bytes"] = os.path.getsize(args.data_dir)
    return plan


def _begin(folder: str, plan: dict[str, Any]) -> None:
    """Make the folder with its plan, or compare the plan of the folder that is there."""
    path = os.path.join(folder, PLAN)
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        checkpoints.write_bytes(path, json.dumps(plan).encode())
        return
    try:
        found = dict(json.loads(checkpoints.read_file(path)))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: remove {folder} to start anew") from error
    for key in plan | found:
        if found.get(key) != plan.get(key):
            raise ValueError(
                f"{folder} is of a run with other {key} ({found.get(key)} there, {plan.get(key)} "
                "here): repeat its flags to go on, or remove the folder to start anew"
            )


# --------------------------------------------------------------------------------------------
# Sections


def see(
    images: CroppedImages,
    extractor: Extractor,
    batch_size: int,
    folder: str,
    sections: list[list[range]],
) -> None:
    """Let the network see this rank's share of the sections, as far as it has not yet.

    Args:
        images: all of them.
        extractor: the network.
        batch_size: images that it sees at once.
        folder: where to keep what was seen.
        sections: the parts of each.
    """
    numbers = range(dist_util.get_rank(), len(sections), dist_util.get_world_size())
    states = {number: _load(_path(folder, number)) for number in numbers}
    total = sum(len(part) for number in numbers for part in sections[number])
    done = sum(len(part) for n in numbers for part in sections[n][: states[n][0]])
    with dist_util.stage("looking at the images"), Progress("images", total, done=done) as bar:
        for number in numbers:
            num_done, seen = states.pop(number)
            saved = time.monotonic()
            for _, pixels in read_ahead(images, sections[number][num_done:]):
                features = extractor(pixels, batch_size, bar.move)._asdict()
                add_moments(seen, features, [*extractor.distances], "the images")
                num_done += 1
                is_last = num_done == len(sections[number])
                if is_last or time.monotonic() > saved + SAVE_EVERY:
                    _save(_path(folder, number), num_done, seen)
                    saved = time.monotonic()


def _path(folder: str, number: int) -> str:
    return os.path.join(folder, f"section{number:02d}.npz")


def _save(path: str, num_done: int, seen: dict[str, Moments]) -> None:
    """Keep what was seen of the first parts of a section."""
    arrays = {"num_done": np.array([num_done])}
    for kind, moments in seen.items():
        arrays |= {f"{kind}_{key}": np.array(value) for key, value in vars(moments).items()}
    checkpoints.write_file(path, lambda file: np.savez(file, **arrays))


def _load(path: str) -> tuple[int, dict[str, Moments]]:
    """Return how many parts of a section were seen, and what."""
    if not os.path.exists(path):
        return 0, {}
    try:
        with np.load(path, allow_pickle=False) as npz:
            seen = {}
            for kind in SUFFIXES:
                if f"{kind}_count" in npz.files:
                    moments = seen[kind] = Moments(0)
                    moments.count = int(npz[f"{kind}_count"])
                    moments.mean, moments.scatter = npz[f"{kind}_mean"], npz[f"{kind}_scatter"]
            return int(npz["num_done"][0]), seen
    except Exception as error:  # a disk and numpy have a dozen ways to say that it is damaged
        raise ValueError(f"{path} is damaged: remove it, to look at its images again") from error


# --------------------------------------------------------------------------------------------
# The file


def _write(
    args: argparse.Namespace,
    images: CroppedImages,
    extractor: Extractor,
    folder: str,
    num_sections: int,
) -> None:
    """Put the statistics of all sections and some evenly spread images into the npz."""
    num = min(args.num_images, len(images))
    arrays: dict[str, np.ndarray] = {"arr_0": _pick(images, num, folder)}
    seen = [_load(_path(folder, number))[1] for number in range(num_sections)]
    for kind in extractor.distances:
        moments = merged(of_section[kind] for of_section in seen)
        arrays[f"mu{SUFFIXES[kind]}"] = moments.mean
        arrays[f"sigma{SUFFIXES[kind]}"] = moments.covariance()
    if extractor.name != "inception":
        arrays[FEATURES] = np.array([extractor.name])
    path = os.path.join(folder, BATCH)
    checkpoints.write_file(path, lambda file: np.savez(file, **arrays))
    os.replace(path, args.out)
    shutil.rmtree(folder)
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
    print(f"saved {os.path.abspath(args.out)}: {shapes}; statistics of {len(images)} images")


def _pick(images: CroppedImages, num: int, folder: str) -> np.ndarray:
    """Return `num` evenly spread images [num, H, W, 3], in a file and not in memory."""
    path = os.path.join(folder, IMAGES)
    shape = (num, *images.size, 3)
    picked = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    numbers = [len(images) * i // num for i in range(num)]
    with Progress("writing", num) as bar:
        for part in parts_of(num):
            picked[part.start : part.stop] = images.read(numbers[part.start : part.stop])
            bar.move(len(part))
    return picked
