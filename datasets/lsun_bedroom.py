"""Convert an LSUN database (LMDB) into a folder of square PNGs.

    python datasets/lsun_bedroom.py bedroom_train_lmdb data/lsun_bedroom

writes data/lsun_bedroom/bedroom_NNNNNNN.png, where NNNNNNN is the position in the database. An
image is resized with a box filter until its shorter side fits, then cropped around its centre.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from tqdm import tqdm


def open_database(path: Path):
    """Open an LMDB folder for reading.

    Raises:
        ValueError: There is no database, or lmdb is not installed.
    """
    try:
        import lmdb
    except ImportError:
        raise ValueError("the package lmdb is missing: pip install lmdb") from None
    if not (path / "data.mdb").is_file():
        raise ValueError(
            f"LMDB_DIR {str(path)!r} holds no data.mdb: download and unpack an LSUN category "
            "with the tools of https://github.com/fyu/lsun"
        )
    try:
        return lmdb.open(str(path), readonly=True, lock=False, readahead=False, max_readers=100)
    except lmdb.Error as error:
        raise ValueError(f"LMDB_DIR {str(path)!r} cannot be read: {error}") from error


def read_values(database) -> Iterator[bytes]:
    """Yield every value of an open database, in the order of the keys."""
    with database.begin(write=False) as transaction, transaction.cursor() as cursor:
        yield from cursor.iternext(keys=False, values=True)


def decode_square(value: bytes, image_size: int) -> Image.Image:
    """Decode a webp image, shrink its shorter side to image_size, and cut out the centre."""
    image = Image.open(io.BytesIO(value)).convert("RGB")
    scale = image_size / min(image.size)
    width, height = (round(scale * side) for side in image.size)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    resized = image.resize((width, height), Image.BOX)
    return resized.crop((left, top, left + image_size, top + image_size))


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG; an interrupted write leaves no file under that name."""
    temp = path.with_name("half.tmp")
    image.save(temp, format="png")
    os.replace(temp, path)


def convert(lmdb_dir: Path, out_dir: Path, image_size: int, prefix: str) -> int:
    """Write every image that `out_dir` does not hold yet; return the size of the database.

    Raises:
        ValueError: The database is missing or one of its images is broken.
    """
    database = open_database(lmdb_dir)
    total = database.stat()["entries"]
    if not total:
        raise ValueError(f"LMDB_DIR {str(lmdb_dir)!r} holds no images")
    out_dir.mkdir(parents=True, exist_ok=True)
    for k, value in enumerate(tqdm(read_values(database), total=total, unit="img")):
        path = out_dir / f"{prefix}_{k:07d}.png"
        if path.exists():
            continue
        try:
            image = decode_square(value, image_size)
        except Exception as error:  # Pillow's decoders raise a dozen kinds for damaged data
            raise ValueError(
                f"LMDB_DIR {str(lmdb_dir)!r}: entry {k} is no readable image ({error}); "
                "download the database again"
            ) from error
        save_png(image, path)
    database.close()
    return total


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lmdb_dir", metavar="LMDB_DIR", type=Path, help="folder of data.mdb")
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="folder to write into")
    parser.add_argument(
        "--image-size", "--image_size", type=int, default=256, help="side of the PNGs (256)"
    )
    parser.add_argument(
        "--prefix", default="bedroom", help="start of the file names, and so their class (bedroom)"
    )
    args = parser.parse_args(argv)
    try:
        if args.image_size < 1:
            raise ValueError(f"--image-size must be at least 1, got {args.image_size}")
        total = convert(args.lmdb_dir, args.out_dir, args.image_size, args.prefix)
    except (ValueError, OSError) as error:
        print(f"lsun_bedroom.py: error: {error}", file=sys.stderr)
        return 1
    print(f"{total:,} images in {args.out_dir.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
