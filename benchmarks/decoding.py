"""How fast training images are read, and what --fast_decode changes of their pixels.

    python benchmarks/decoding.py

Photographs are made up: noise with the spectrum of natural images, of two sharpnesses: that of a
picture that was shrunk, 500 x 375, and that of a lens, 2000 x 1500 and 4000 x 3000; JPEG of
quality 90. They become squares of --size pixels, the central ones.

"published" is the published loader, written down again: one worker, whose batches are floats.
"here" is load_data, with as many workers as --workers says, which needs as many cores. "decode and
resize" is Pillow alone, what no loader can do without.

The ways take turns, and each figure is the median of all rounds. CPU time is that of all processes
together; unlike images/s it says something on a machine that is busy with other things, too.
"""

import argparse
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import blobfile as bf
import numpy as np
import torch
from PIL import Image
from sweeping import markdown
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from guided_diffusion.image_datasets import find_images, load_data
from guided_diffusion.image_decoding import center_crop_arr, decode

BATCH = 16
SETS = {  # (width, height): blur of the lens in pixels, different photographs, files
    (500, 375): (0.0, 32, 512),
    (2000, 1500): (1.0, 8, 96),
    (4000, 3000): (1.0, 4, 32),
}
SIDES = (512, 2100)  # between which the sides of photographs of any size lie
Way = Callable[[], None]


# Photographs


def photograph(width: int, height: int, blur: float, seed: int) -> Image.Image:
    """Return noise whose amplitude falls with frequency as that of natural images, blurred.

    Args:
        width: in pixels.
        height: in pixels.
        blur: deviation of the Gaussian that stands for the lens, in pixels.
        seed: of the noise.
    """
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    amplitude = np.exp(-2 * (np.pi * blur * frequency) ** 2) / frequency**1.2
    amplitude[0, 0] = 0
    planes = []
    for _ in range(3):
        noise = rng.standard_normal((2, *frequency.shape))
        plane = np.fft.irfft2((noise[0] + 1j * noise[1]) * amplitude, s=(height, width))
        planes.append(plane / plane.std())
    grey, red, blue = planes
    colours = np.stack([grey + 0.3 * red, grey, grey + 0.3 * blue], axis=2)
    return Image.fromarray((colours * 50 + 120).clip(0, 255).astype(np.uint8))


def gradient(width: int, height: int, seed: int) -> Image.Image:
    """Return a few soft waves: a sky, a wall out of focus."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / min(width, height)
    waves = [np.cos(2 * np.pi * (a * x + b * y + c)) for a, b, c in rng.uniform(-2, 2, (3, 3))]
    return Image.fromarray((np.stack(waves, axis=2) * 90 + 128).astype(np.uint8))


def save(images: Iterable[Image.Image], folder: Path, num_files: int = 0) -> Path:
    """Write images as JPEG, each under as many names as make it `num_files`."""
    folder.mkdir()
    for k, image in enumerate(images):
        image.save(folder / f"{k:04d}.jpg", quality=90)
    for made in range(k + 1, num_files):
        os.link(folder / f"{made % (k + 1):04d}.jpg", folder / f"{made:04d}.jpg")
    return folder


# Ways to read them


class Published(Dataset):
    """What the published loader does with an image, in its order of operations."""

    def __init__(self, paths: list[str], size: int):
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[np.ndarray, dict]:
        with bf.BlobFile(self.paths[i], "rb") as file:
            image = Image.open(file)
            image.load()
        arr = published_crop(image.convert("RGB"), self.size)
        if random.random() < 0.5:
            arr = arr[:, ::-1]
        return np.transpose(arr.astype(np.float32) / 127.5 - 1, [2, 0, 1]), {}


def published_crop(image: Image.Image, size: int) -> np.ndarray:
    """Halve an image while possible, resize it, and cut out the centre."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.BOX)
    scale = size / min(image.size)
    arr = np.array(image.resize(tuple(round(side * scale) for side in image.size), Image.BICUBIC))
    top, left = (arr.shape[0] - size) // 2, (arr.shape[1] - size) // 2
    return arr[top : top + size, left : left + size]


def read_published(folder: Path, size: int) -> None:
    """Read a folder by the published loader."""
    dataset = Published(find_images(str(folder)), size)
    for _ in DataLoader(dataset, batch_size=BATCH, num_workers=1):
        pass


def read_here(folder: Path, size: int, workers: int, fast: bool) -> None:
    """Read a folder by load_data."""
    for _ in load_data(
        data_dir=str(folder), batch_size=BATCH, image_size=size, num_workers=workers, once=True,
        fast_decode=fast,
    ):  # fmt: skip
        pass


def decode_and_resize(folder: Path, size: int, fast: bool) -> None:
    """Do what no loader can do without, in this process."""
    for path in find_images(str(folder)):
        with open(path, "rb") as file:
            image = Image.open(file)
            if fast:
                image.draft(None, (size, size))
            image.load()
        while min(image.size) >= 2 * size:
            image = image.resize(tuple(side // 2 for side in image.size), Image.BOX)
        scale = size / min(image.size)
        image.resize(tuple(round(side * scale) for side in image.size), Image.BICUBIC)


# Measuring


def cpu_seconds() -> float:
    """Return what this process and its ended children have computed."""
    each = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in each)


def measure(ways: dict[str, Way], rounds: int, label: str) -> dict[str, list[tuple[float, float]]]:
    """Let the ways take turns; return the seconds and CPU seconds of each round."""
    taken = {name: [] for name in ways}
    for number in tqdm(range(rounds + 1), desc=label):
        for name, way in ways.items():
            start, start_cpu = time.perf_counter(), cpu_seconds()
            way()
            if number:  # the first round warms up
                took = time.perf_counter() - start, cpu_seconds() - start_cpu
                taken[name].append(took)
    return taken


def speed_rows(
    folder: Path, label: str, is_large: bool, args: argparse.Namespace
) -> list[list[str]]:
    """Return the rows of a folder: images/s and CPU time of each way, and how they compare."""
    one = partial(read_here, folder, args.size)
    ways = {"published, 1 worker": partial(read_published, folder, args.size)}
    for name, fast in (("", False), (" --fast_decode", True))[: 2 if is_large else 1]:
        for workers in sorted({1, args.workers}):
            plural = "s" if workers > 1 else ""
            ways[f"here{name}, {workers} worker{plural}"] = partial(one, workers, fast)
        ways[f"decode and resize{name}"] = partial(decode_and_resize, folder, args.size, fast)
    taken, num = measure(ways, args.rounds, label), len(find_images(str(folder)))
    rows, (base, *_) = [], taken.values()
    for name, rounds in taken.items():
        wall, cpu = (statistics.median(column) / num for column in zip(*rounds, strict=True))
        ratios = [
            statistics.median(b[k] / r[k] for b, r in zip(base, rounds, strict=True))
            for k in range(2)
        ]
        rows.append([
            label, name, f"{1 / wall:.0f}", f"{ratios[0]:.2f}", f"{cpu * 1e3:.2f}",
            f"{ratios[1]:.2f}",
        ])  # fmt: skip
    return rows


def pixel_row(folder: Path, label: str, size: int) -> list[str]:
    """Return the row of a folder: how far the pixels of each way are from the published ones."""
    plain, fast = [], []
    for path in find_images(str(folder)):
        with open(path, "rb") as file:
            wanted = published_crop(Image.open(file).convert("RGB"), size).astype(int)
            file.seek(0)
            plain.append(center_crop_arr(decode(file).convert("RGB"), size) - wanted)
            file.seek(0)
            fast.append(center_crop_arr(decode(file, size).convert("RGB"), size) - wanted)
    plain, fast = np.stack(plain), np.stack(fast)
    return [
        label, str(abs(plain).max()), f"{abs(fast).mean():.2f}", str(abs(fast).max()),
        f"{fast.mean():+.2f}",
    ]  # fmt: skip


def print_tables(place: Path, args: argparse.Namespace) -> None:
    """Make the photographs below a folder, and print how fast they are read, and how exactly."""
    speeds, pixels = [], []
    for (width, height), (blur, count, num_files) in SETS.items():
        label = f"{width} x {height}"
        images = (photograph(width, height, blur, seed) for seed in range(count))
        folder = save(images, place / label, num_files)
        mean = np.mean([path.stat().st_size for path in folder.iterdir()])
        label += f", {mean / 1000:.0f} kB"
        speeds += speed_rows(folder, label, min(width, height) >= 2 * args.size, args)
        pixels.append(pixel_row(folder, label, args.size))
    rng = np.random.default_rng(0)
    sides = rng.integers(*SIDES, (16, 2)).tolist()
    made = {
        f"photographs of any size, {SIDES[0]} to {SIDES[1]}": partial(photograph, blur=1.0),
        "soft gradients of the same sizes": gradient,
    }
    for label, make in made.items():
        images = (make(*side, seed=seed) for seed, side in enumerate(sides))
        pixels.append(pixel_row(save(images, place / label), label, args.size))
    head = ["JPEG", "way", "images/s", "times published", "CPU ms/image", "times less"]
    print(markdown(head, speeds))
    print(f"\nPixels at {args.size}, in greys of 255, against the published ones:\n")
    head = ["JPEG", "here, most", "--fast_decode, mean", "most", "mean with its sign"]
    print(markdown(head, pixels))


def main() -> int:
    """Read the flags and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="height and width of the squares")
    parser.add_argument("--rounds", type=int, default=5, help="how often each way is measured")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        print_tables(Path(place), args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
