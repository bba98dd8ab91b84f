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
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np

from guided_diffusion import checkpoints, dist_util
from guided_diffusion.checkpoint_sets import reserved
from guided_diffusion.data_sources import Source, open_source
from guided_diffusion.npz_rows import stream_npz
from guided_diffusion.progress import Progress

from .features import Extractor, load_extractor
from .image_sets import FEATURES, MIN_IMAGES, SUFFIXES, CroppedImages, read_ahead
from .measuring import add_moments, parts_of
from .moments import Moments, merged

SECTION = 625  # images in one, at least: 10,000 make 16, enough for the GPUs of a host or two
MAX_SECTIONS = 32  # each takes up to 66 MB
SAVE_EVERY = 30.0  # seconds
ENDING = ".parts"  # of the folder beside the npz
PLAN, BATCH = "plan.json", "batch.npz"  # files in it, beside the sections
OWN = re.compile(r"(plan\.json|section\d+\.npz|batch\.npz)(\.tmp\d+)?")


def make(args: argparse.Namespace) -> None:
    """Write a reference batch. All ranks call this, and reach the same folder.

    Args:
        args: the flags of make_reference_batch.py. Of fewer images than num_images all are taken.

    Raises:
        ValueError: the images cannot be read or are too few, the file is there already, or the
            folder beside it is in use, of a run with other flags, or of no run at all.
        OSError: the file or the folder cannot be written.
    """
    folder = f"{os.path.abspath(args.out)}{ENDING}"
    if dist_util.any_rank(os.path.exists(args.out)):
        _clean(args.out, folder)
        return
    source = open_source(args.data_dir, "--data_dir")
    if len(source) < MIN_IMAGES:
        raise source.error(f"holds {len(source)} images: at least {MIN_IMAGES} are needed")
    images = CroppedImages(source, args.image_size)
    extractor = load_extractor(args.features, args.inception)
    batch_size = args.batch_size or extractor.batch_size
    sections = divide(len(images))
    with _own(folder, args.out):
        if dist_util.is_main():
            plan = _plan(args, source, extractor)
            plan |= {"batch_size": batch_size, "sections": len(sections)}
            _begin(folder, plan, args.out)
        dist_util.barrier()
        see(images, extractor, batch_size, folder, sections)
        dist_util.wait_patiently("waiting for the statistics of all ranks")
        if dist_util.is_main():
            _write(args, images, extractor, folder, len(sections))
        dist_util.wait_patiently("waiting for the reference batch")


def _clean(path: str, folder: str) -> None:
    """Remove the folder of a finished run that was killed before it could; else complain."""
    if not dist_util.any_rank(os.path.isdir(folder)):
        raise _exists(path)
    with _own(folder, path):
        if dist_util.is_main():
            _check_is_ours(folder)
            _remove(folder)
            print(f"{path} is complete")
        dist_util.barrier()


def _exists(path: str) -> ValueError:
    return ValueError(f"--out {path} exists: choose another name, or remove it")


def divide(num_images: int) -> list[list[range]]:
    """Return the parts of each section: contiguous, and for any number of ranks the same."""
    parts = parts_of(num_images)
    num_sections = max(1, min(MAX_SECTIONS, num_images // SECTION, len(parts)))
    ends = [len(parts) * i // num_sections for i in range(num_sections + 1)]
    return [parts[start:end] for start, end in zip(ends[:-1], ends[1:], strict=True)]


# --------------------------------------------------------------------------------------------
# The folder, while the file is not there yet


@contextmanager
def _own(folder: str, out: str) -> Iterator[None]:
    """Make the folder and keep other runs out of it within the block; all ranks enter it.

    Raises:
        ValueError: another run has it.
        OSError: it, or something within the block, cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(reserved(folder))
        except ValueError as error:
            if not isinstance(error.__cause__, (BlockingIOError, FileNotFoundError)):
                raise _unwritable(out, error) from error
            raise ValueError(
                f"{folder} is in use by another run: wait for its end, or choose another --out"
            ) from error
        try:
            yield
        except ConnectionError:  # to another rank, or to whoever reads what is printed
            raise
        except OSError as error:
            raise _unwritable(out, error) from error


def _unwritable(out: str, error: Exception) -> OSError:
    return OSError(
        f"--out {out} or {os.path.basename(out)}{ENDING} beside it cannot be written "
        f"({checkpoints.reason_of(error)}): make room there and repeat the command, or choose "
        "another --out"
    )


def _check_is_ours(folder: str) -> None:
    """Raise a ValueError if a folder holds something, and no run of this program has made it."""
    names = os.listdir(folder)
    begun = all(name.startswith(f"{PLAN}.tmp") for name in names)  # killed at its first file
    if PLAN not in names and not begun:
        raise ValueError(
            f"{folder} holds files of something else: move it away, or choose another --out"
        )


def _remove(folder: str) -> None:
    """Remove a run's own files, the plan last, and the folder if nothing else is in it."""
    names = filter(OWN.fullmatch, os.listdir(folder))
    for name in sorted(names, key=lambda name: name == PLAN):
        os.remove(os.path.join(folder, name))
    with suppress(OSError):
        os.rmdir(folder)


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


def _begin(folder: str, plan: dict[str, Any], out: str) -> None:
    """Put the plan into an empty folder, or compare the plan that is there."""
    path = os.path.join(folder, PLAN)
    _check_is_ours(folder)
    if os.path.exists(out):  # another run has ended while this one waited for the folder
        _remove(folder)
        raise _exists(out)
    if not os.path.exists(path):
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
    before = {number: _load(_path(folder, number), kinds=())[0] for number in numbers}
    total = sum(len(part) for number in numbers for part in sections[number])
    done = sum(len(part) for number in numbers for part in sections[number][: before[number]])
    with dist_util.stage("looking at the images"), Progress(total, "images", done, ranks=1) as bar:
        for number in numbers:
            if before[number] == len(sections[number]):
                continue
            num_done, seen = _load(_path(folder, number))
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


def _load(path: str, kinds: Iterable[str] = tuple(SUFFIXES)) -> tuple[int, dict[str, Moments]]:
    """Return how many parts of a section were seen, and what, as far as those kinds go."""
    if not os.path.exists(path):
        return 0, {}
    try:
        with np.load(path, allow_pickle=False) as npz:
            seen = {}
            for kind in kinds:
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
    arrays: dict[str, np.ndarray] = {}
    for kind in extractor.distances:
        paths = (_path(folder, number) for number in range(num_sections))
        moments = merged(_load(path, kinds=[kind])[1][kind] for path in paths)
        arrays[f"mu{SUFFIXES[kind]}"] = moments.mean
        arrays[f"sigma{SUFFIXES[kind]}"] = moments.covariance()
    if extractor.name != "inception":
        arrays[FEATURES] = np.array([extractor.name])
    parts = {"arr_0": ((num, *images.size, 3), np.dtype(np.uint8), _picked(images, num))}
    parts |= {name: (array.shape, array.dtype, [array]) for name, array in arrays.items()}
    path = os.path.join(folder, BATCH)
    checkpoints.write_file(path, lambda file: stream_npz(file, parts))
    os.replace(path, args.out)
    _remove(folder)
    shapes = ", ".join(f"{name} {list(shape)}" for name, (shape, *_) in parts.items())
    print(f"saved {os.path.abspath(args.out)}: {shapes}; statistics of {len(images)} images")


def _picked(images: CroppedImages, num: int) -> Iterator[np.ndarray]:
    """Yield `num` evenly spread images, uint8 [n, H, W, 3], some at a time."""
    numbers = [len(images) * i // num for i in range(num)]
    with Progress(num, "writing", ranks=1) as bar:
        for part in parts_of(num):
            yield images.read(numbers[part.start : part.stop])
            bar.move(len(part))
