"""What the tests of images share: small images that a test knows again, in every kind of source."""

import csv
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIDE = 8


def grey_png(path, value, size=(SIDE, SIDE)):
    """Write an image of one grey value, by which a test knows it again."""
    Image.new("L", size, value).save(path)


def one_line_error(call):
    """Return the message of the ValueError that `call` raises, which must be one line."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def png_bytes(arr):
    """Encode uint8 [H, W] or [H, W, 3] as PNG."""
    file = io.BytesIO()
    Image.fromarray(arr).save(file, format="png")
    return file.getvalue()


def noise_images(num, side=SIDE, channels=3):
    """Return uint8 [num, side, side, channels]."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (num, side, side, channels), dtype=np.uint8)


def write_folder(path, names, images):
    """Write PNGs under such names below a folder."""
    for name, arr in zip(names, images, strict=True):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(png_bytes(arr))
    return str(path)


def write_zip(path, names, images):
    """Write PNGs into a zip, in reverse order, packed and unpacked by turns."""
    path = Path(f"{path}.zip")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no image")
        for k, (name, arr) in reversed(list(enumerate(zip(names, images, strict=True)))):
            method = zipfile.ZIP_DEFLATED if k % 2 else zipfile.ZIP_STORED
            archive.writestr(name, png_bytes(arr), method)
    return str(path)


def write_npz(path, names, images):
    """Write an npz whose labels are the names' whole numbers before the first "_"."""
    labels = np.array([int(name.split("/")[-1].split("_")[0]) for name in names])
    np.savez(f"{path}.npz", np.stack(images), labels)
    return f"{path}.npz"


def write_lmdb(path, names, images):
    """Write an LMDB with the names as keys."""
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(path), map_size=1 << 24) as database, database.begin(write=True) as out:
        for name, arr in zip(names, images, strict=True):
            out.put(name.encode(), png_bytes(arr))
    return str(path)


WRITERS = {"folder": write_folder, "zip": write_zip, "npz": write_npz, "lmdb": write_lmdb}


def write_csv(path, rows):
    """Write rows as CSV."""
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)
