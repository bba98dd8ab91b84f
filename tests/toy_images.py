"""What the tests of images share: small images that a test knows again, in every kind of source."""

import csv
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion import dist_util
from guided_diffusion.image_datasets import load_data

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


def spoil(path, names, images):
    """Overwrite images of a folder, or of a zip in which they lie unpacked."""
    path = Path(path)
    for name, arr in zip(names, images, strict=True):
        if path.is_dir():
            (path / name).write_bytes(b"no image")
        else:
            whole = png_bytes(arr)
            path.write_bytes(path.read_bytes().replace(whole, bytes(len(whole))))


# Batches


def load(data_dir, **kwargs):
    """Call load_data with small defaults, in this process."""
    options = dict(batch_size=4, image_size=8, in_channels=1, num_workers=0, random_flip=False)
    return load_data(data_dir=data_dir, **{**options, **kwargs})


def ids(batch):
    """Return which of the images 0, 1, ... of `folder` a batch holds."""
    return ((batch[0].mean(dim=(1, 2, 3)) + 1) * 127.5 / 10).round().int().tolist()


def take(data, num):
    """Return the next batches as one: images [N, C, H, W] and labels [N], or None."""
    batches = [next(data) for _ in range(num)]
    y = torch.cat([cond["y"] for _, cond in batches]) if "y" in batches[0][1] else None
    return torch.cat([images for images, _ in batches]), y


def assert_same(found, wanted):
    """Compare two results of `take` bit for bit."""
    assert torch.equal(found[0], wanted[0])
    assert wanted[1] is None or torch.equal(found[1], wanted[1])


def be_rank(monkeypatch, rank, world_size):
    """Let the loader believe it is one rank of several."""
    monkeypatch.setattr(dist_util, "get_rank", lambda: rank)
    monkeypatch.setattr(dist_util, "get_world_size", lambda: world_size)


def taken_by_ranks(monkeypatch, data_dir, world_size, global_batch, num_steps, start=0, **kwargs):
    """Return what the ranks see of some steps, put together in the order of the run."""
    parts = []
    for rank in range(world_size):
        be_rank(monkeypatch, rank, world_size)
        data = load(data_dir, batch_size=global_batch // world_size, **kwargs)
        data.seek(start)
        parts.append([take(data, 1) for _ in range(num_steps)])
    whole = [part[step] for step in range(num_steps) for part in parts]
    return torch.cat([images for images, _ in whole]), torch.cat([y for _, y in whole])
