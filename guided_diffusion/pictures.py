"""Images for people: bytes out of a network's range, and grids of them as PNG files."""

import math
import os

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from . import checkpoints, logger
from .npz_rows import open_rows


def to_uint8(x: Tensor) -> np.ndarray:
    """Turn images [N, C, H, W] in [-1, 1] into uint8 [N, H, W, C]."""
    return ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def class_names(model_path: str) -> list[str] | None:
    """Return the lines of classes.txt beside a checkpoint, or None if there is no such file."""
    path = checkpoints.join(os.path.dirname(model_path), checkpoints.CLASSES)
    if not checkpoints.exists(path):
        return None
    return checkpoints.read_class_names(path)


def read_images(path: str, start: int, end: int) -> tuple[np.ndarray, str]:
    """Read images `start` to `end` - 1 of the array arr_0 of an npz file, and no others.

    Returns:
        uint8 [N, H, W, C], and what is shown, in a line.

    Raises:
        ValueError: if there is no such array, or no such image in it.
    """
    rows = open_rows(path, flag="--npz")
    layout = rows.ndim == 3 or (rows.ndim == 4 and rows.shape[3] in (1, 3))
    if not layout or 0 in rows.shape[1:] or not (rows.dtype == np.uint8 or rows.dtype.kind == "f"):
        raise ValueError(
            f"--npz {path} has an array arr_0 of {rows.dtype} {list(rows.shape)}: give images, "
            "uint8 or float [N, H, W] or [N, H, W, 1 or 3]"
        )
    if start >= len(rows):
        raise ValueError(f"--start {start}: --npz {path} holds {len(rows)} images: begin before")
    images = np.asarray(rows[start:end])
    images = images if images.ndim == 4 else images[..., None]
    note = f"images {start} to {start + len(images) - 1} of {len(rows)}, {rows.dtype}"
    if images.dtype != np.uint8:
        images, how = _scale(images.astype(np.float64))
        note = f"{note}, {how}"
    return images, note


def _scale(values: np.ndarray) -> tuple[np.ndarray, str]:
    """Turn numbers into bytes: those in [-1, 1] as `to_uint8`, others from lowest to highest."""
    values = np.where(np.isfinite(values), values, np.nan)
    low, high = np.nanmin(values, initial=np.inf), np.nanmax(values, initial=-np.inf)
    how = "from -1, black, to 1, white"
    if low < -1 or high > 1:
        how = f"not in [-1, 1] but scaled: from {low:.4g}, black, to {high:.4g}, white"
        values = (values - low) * (2 / max(high - low, 1e-300)) - 1
    return ((np.nan_to_num(values, nan=-1) + 1) * 127.5).clip(0, 255).astype(np.uint8), how


def read_labels(path: str, start: int, end: int) -> np.ndarray | None:
    """Read labels `start` to `end` - 1 in arr_1 of an npz file.

    Returns:
        integers [N], or None if arr_1 is not there or holds no label for each image.
    """
    labels, images = open_rows(path, "arr_1", flag="--npz", optional=True), open_rows(path)
    if labels is None or labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        return None
    return np.asarray(labels[start:end])


def columns_of_square(count: int) -> int:
    """Return in how many columns `count` images make a square, or nearly so."""
    return math.isqrt(count - 1) + 1


def save_grid(
    images: np.ndarray,
    labels: np.ndarray | None,
    path: str,
    names: list[str] | None = None,
    most: int = 100,
    columns: int | None = None,
) -> None:
    """Save a PNG with the first images [N, H, W, C], each under its label.

    Args:
        images: uint8, with one channel or three.
        labels: integers [N].
        path: of the PNG.
        names: of the classes, by number.
        most: images that are shown.
        columns: images in a row, by default ten or as many as make a square.
    """
    images = images[:most]
    columns = min(len(images), columns or max(10, math.isqrt(len(images))))
    height, width = images.shape[1:3]
    zoom = max(1, 64 // height)
    cell, text = (width * zoom + 4, height * zoom + 4), 0 if labels is None else 14
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * cell[0], rows * (cell[1] + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = i % columns * cell[0] + 2, i // columns * (cell[1] + text) + 2
        _paste(sheet, image, zoom, (x, y + text))
        if labels is not None:
            name = _shorten(caption(int(labels[i]), names), draw, cell[0] - 2)
            draw.text((x, y), name, fill="black")
    checkpoints.write_file(path, lambda file: sheet.save(file, format="PNG"))
    logger.log(f"saved {os.path.abspath(path)}")


def save_film(
    film: np.ndarray, labels: np.ndarray | None, path: str, names: list[str] | None = None
) -> None:
    """Save a PNG with the chains of some images, each two strips: x_t, and x_start as predicted.

    Args:
        film: uint8 [N, 2, F, H, W, C], F pictures from the noisiest to the last.
        labels: int64 [N], written above each pair of strips; or None.
        path: of the PNG.
        names: what to print for each label.
    """
    count, strips, frames, height, width, _ = film.shape
    zoom = max(1, 64 // height)
    cell, text = (width * zoom + 2, height * zoom + 2), 4 if labels is None else 16
    block = strips * cell[1] + text
    sheet = Image.new("RGB", (frames * cell[0], count * block), "white")
    draw = ImageDraw.Draw(sheet)
    for i, strip, frame in np.ndindex(count, strips, frames):
        corner = (frame * cell[0], i * block + text + strip * cell[1])
        _paste(sheet, film[i, strip, frame], zoom, corner)
    for i in range(0 if labels is None else count):
        draw.text((2, i * block + 2), caption(int(labels[i]), names), fill="black")
    checkpoints.write_file(path, lambda file: sheet.save(file, format="PNG"))
    logger.log(f"saved {os.path.abspath(path)}")


def to_picture(image: np.ndarray) -> Image.Image:
    """Turn uint8 [H, W, 1 or 3] into a picture of Pillow, grey or in colour."""
    return Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)


def _paste(sheet: Image.Image, image: np.ndarray, zoom: int, corner: tuple[int, int]) -> None:
    """Put an image, each pixel enlarged to `zoom` squared, onto a sheet."""
    height, width = image.shape[:2]
    picture = to_picture(image).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
    sheet.paste(picture.convert("RGB"), corner)


def caption(label: int, names: list[str] | None) -> str:
    """Return what to print for a label: its name if it is known, else its number."""
    name = names[label] if names is not None and 0 <= label < len(names) else str(label)
    return name.encode(errors="replace").decode()  # file names need not be text


def _shorten(text: str, draw: ImageDraw.ImageDraw, width: int) -> str:
    """Cut a text that is wider than `width` pixels; a dot stands for the rest."""
    while len(text) > 1 and draw.textlength(text) > width:
        text = f"{text[:-2]}."
    return text
