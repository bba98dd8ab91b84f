"""Images for people: bytes out of a network's range, and grids of them as PNG files."""

import math
import os

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from . import checkpoints, logger


def to_uint8(x: Tensor) -> np.ndarray:
    """Turn images [N, C, H, W] in [-1, 1] into uint8 [N, H, W, C]."""
    return ((x + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def class_names(model_path: str) -> list[str] | None:
    """Return the lines of classes.txt beside a checkpoint, or None if there is no such file."""
    path = checkpoints.join(os.path.dirname(model_path), checkpoints.CLASSES)
    if not checkpoints.exists(path):
        return None
    return checkpoints.read_class_names(path)


def save_grid(
    images: np.ndarray,
    labels: np.ndarray | None,
    path: str,
    names: list[str] | None = None,
    most: int = 100,
) -> None:
    """Save a PNG with the first images [N, H, W, C], each under its label."""
    images = images[:most]
    columns = min(len(images), max(10, math.isqrt(len(images))))
    height, width = images.shape[1:3]
    zoom = max(1, 64 // height)
    cell, text = (width * zoom + 4, height * zoom + 4), 0 if labels is None else 14
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * cell[0], rows * (cell[1] + text)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = i % columns * cell[0] + 2, i // columns * (cell[1] + text) + 2
        picture = Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image)
        picture = picture.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
        sheet.paste(picture.convert("RGB"), (x, y + text))
        if labels is not None:
            label = int(labels[i])
            known = names is not None and label < len(names)
            name = names[label] if known else str(label)
            name = name.encode(errors="replace").decode()  # file names need not be text
            draw.text((x, y), name, fill="black")
    checkpoints.write_file(path, lambda file: sheet.save(file, format="PNG"))
    logger.log(f"saved {os.path.abspath(path)}")
