"""Turn the Fashion-MNIST IDX files into two folders of grey PNGs named D_NNNNN.png.

    python datasets/fashion_mnist.py data/fashion_mnist

writes data/fashion_mnist/train (60,000 images) and data/fashion_mnist/test (10,000), 28 x 28
grey. D is the label, 0 to 9, and NNNNN the position in the IDX file, so that
`--data_dir data/fashion_mnist/train --class_cond True` trains on labelled images.
"""

from __future__ import annotations

import argparse
import gzip
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
HOMEPAGE = "https://github.com/zalandoresearch/fashion-mnist"
CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SPLITS = {"train": ("train", 60_000), "test": ("t10k", 10_000)}  # folder -> file prefix, count
REMEDY = (
    f"install the Debian package (apt install dataset-fashion-mnist) or put the four "
    f"*-ubyte.gz files of {HOMEPAGE} into a folder and name it with --source"
)


def read_idx(path: Path) -> np.ndarray:
    """Read an IDX file of unsigned bytes, gzipped if its name ends in .gz.

    Raises:
        ValueError: The file is broken: not IDX, truncated, or longer than its header says.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            raw = file.read()
    except (EOFError, gzip.BadGzipFile, gzip.zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}); {REMEDY}") from None
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is no IDX file of bytes (it starts {raw[:4]!r}); {REMEDY}")
    dims = np.frombuffer(raw, ">u4", count=min(raw[3], (len(raw) - 4) // 4), offset=4)
    start, wanted = 4 + 4 * raw[3], int(np.prod(dims, dtype=np.int64))
    if len(dims) != raw[3] or len(raw) - start != wanted:
        raise ValueError(
            f"{path} is broken: its header announces {wanted:,} values, "
            f"it holds {max(len(raw) - start, 0):,}; {REMEDY}"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(dims.tolist())


def find_idx(source: Path, name: str) -> Path:
    """Return the path of the IDX file `name` in `source`, gzipped or unpacked.

    Raises:
        ValueError: There is neither.
    """
    for path in (source / f"{name}.gz", source / name):
        if path.is_file():
            return path
    raise ValueError(f"--source {str(source)!r} holds no {name}.gz; {REMEDY}")


def read_split(source: Path, prefix: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Read the images [N, 28, 28] and labels [N] of one split, both uint8.

    Raises:
        ValueError: A file is missing or broken, or is not Fashion-MNIST with `count` images.
    """
    image_path = find_idx(source, f"{prefix}-images-idx3-ubyte")
    label_path = find_idx(source, f"{prefix}-labels-idx1-ubyte")
    images, labels = read_idx(image_path), read_idx(label_path)
    if images.ndim != 3 or images.shape[1:] != (28, 28) or len(images) != count:
        raise ValueError(f"{image_path} has shape {images.shape}, not ({count}, 28, 28); {REMEDY}")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"{label_path} has shape {labels.shape} for {len(images)} images; {REMEDY}"
        )
    if labels.max(initial=0) >= len(CLASS_NAMES):
        raise ValueError(f"{label_path} holds the label {labels.max()}, not 0 to 9; {REMEDY}")
    return images, labels


def png_names(labels: np.ndarray) -> list[str]:
    """Return the file name of each image: its label [N], then its position."""
    return [f"{label}_{index:05d}.png" for index, label in enumerate(labels)]


def write_folder(images: np.ndarray, labels: np.ndarray, folder: Path) -> bool:
    """Write images [N, H, W] into `folder`; return False if it holds them already.

    The folder appears under its name only once it is whole; an interrupted run goes on from
    the images that it had written.

    Raises:
        ValueError: The folder exists and holds something else.
    """
    names = png_names(labels)
    if folder.is_dir():
        if set(names) <= set(os.listdir(folder)):
            return False
        raise ValueError(f"{folder} exists but lacks some images; remove it and run this again")
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    temp = partial / "half.tmp"
    present = set(os.listdir(partial))
    todo = [k for k, name in enumerate(names) if name not in present]
    for k in tqdm(todo, desc=folder.name, unit="img", unit_scale=True):
        Image.fromarray(images[k]).save(temp, format="png")
        os.replace(temp, partial / names[k])
    partial.rename(folder)
    return True


def convert(source: Path, out_dir: Path, splits: list[str]) -> None:
    """Read every split first, so that a broken source writes nothing, then write the folders."""
    data = {}
    for split in splits:
        prefix, count = SPLITS[split]
        data[split] = read_split(source, prefix, count)
    for split, (images, labels) in data.items():
        wrote = write_folder(images, labels, out_dir / split)
        what = "wrote" if wrote else "already there:"
        print(f"{what} {len(images):,} images in {(out_dir / split).resolve()}")


def check_room(out_dir: Path) -> None:
    """Raise ValueError unless `out_dir` is, or can become, a folder that is written to."""
    parent = out_dir
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"OUT_DIR {str(out_dir)!r}: cannot write to {str(parent)!r}")
    blocks = shutil.disk_usage(parent).free // 4096
    if blocks < 80_000:  # one block a file, for 70,000 files
        raise ValueError(f"OUT_DIR {str(out_dir)!r}: under 320 MB are free there; free some space")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="folder to write into")
    parser.add_argument(
        "--source",
        type=Path,
        default=DEBIAN_FOLDER,
        help="folder of the *-ubyte.gz files (default: %(default)s)",
    )
    parser.add_argument(
        "--split", choices=[*SPLITS, "all"], default="all", help="which folder to write"
    )
    args = parser.parse_args(argv)
    try:
        check_room(args.out_dir)
        convert(args.source, args.out_dir, list(SPLITS) if args.split == "all" else [args.split])
    except (ValueError, OSError) as error:
        print(f"fashion_mnist.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
