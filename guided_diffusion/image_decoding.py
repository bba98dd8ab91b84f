"""From an encoded image to an array: decoding, 16 bits to 8, crops, flips.

Pillow decodes. What it raises for a damaged file becomes one line that names the file.
"""

from __future__ import annotations

import errno
import math
import os
import random
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

MIN_CROP_FRAC = 0.8  # of the shorter side: the least that a random crop covers

# In the info of a JPEG decoded at a fraction of its size: its exact width and height there, as the
# last pixels may be padding in part. No text within a file can be such a key.
EXTENT = ("decoded", "extent")

# Of these a file may be guilty; of others, such as too many open files, it is not.
FAULTS_OF_A_FILE = {None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP}


class BadImage(ValueError):
    """An entry is no whole image.

    Attributes:
        path: the file, and the entry within it, if it holds several.
        reason: what is wrong, in one line.
    """

    def __init__(self, flag: str, path: str, reason: str):
        super().__init__(
            f"{flag} holds the image {path!r}, which cannot be read ({reason}): repair or remove it"
        )
        self.path = path
        self.reason = reason


# Decoding


def read_image(
    path_or_file: str | os.PathLike | BinaryIO, mode: str = "RGB", flag: str = "--data_dir"
) -> Image.Image:
    """Decode an image and convert it to a Pillow mode, "RGB" or "L".

    Args:
        path_or_file: a local path, an address that blobfile understands, or an open file.
        mode: what `convert` of Pillow takes.
        flag: whom an error names.

    Raises:
        BadImage: it cannot be read or is no whole image.
    """
    if hasattr(path_or_file, "read"):
        path = str(getattr(path_or_file, "name", "<file>"))
        return guard(lambda: to_mode(decode(path_or_file), mode), flag, path)

    def read():
        with open_binary(path_or_file) as file:
            return to_mode(decode(file), mode)

    return guard(read, flag, os.fspath(path_or_file))


def guard(read: Callable[[], Image.Image], flag: str, path: str) -> Image.Image:
    """Return what `read` returns; what it raises becomes one line, BadImage if the file's fault."""
    try:
        return read()
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds for a damaged file
        if _is_failure_of_storage(error):
            raise ValueError(f"{flag}: reading {path!r} failed ({one_line(error)})") from error
        raise BadImage(flag, path, one_line(error)) from error


def _is_failure_of_storage(error: Exception) -> bool:
    """Tell errors that another image would have met too, or this one would not a minute later."""
    if isinstance(error, OSError) and error.errno not in FAULTS_OF_A_FILE:
        return True
    return type(error).__module__.split(".")[0] in ("blobfile", "urllib3")


def decode(file: BinaryIO, least: int | None = None) -> Image.Image:
    """Decode an image, the first frame of an animation, to at most 8 bits a channel.

    Args:
        file: an open file.
        least: how many pixels suffice for the shorter side. A JPEG with at least twice as many is
            decoded at a half, a quarter or an eighth of its size. None: decode all pixels.
    """
    image = Image.open(file)
    # None leaves the mode; a format that cannot be reduced ignores the call.
    reduced = image.draft(None, (least, least)) if least is not None else None
    image.load()
    if reduced:
        image.info[EXTENT] = reduced[1][2:]
    image.info.pop("transparency", None)  # it is dropped anyway, and Pillow would warn
    return _to_8_bits(image)


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to a Pillow mode; in that mode it is returned as it is, not copied."""
    return image if image.mode == mode else image.convert(mode)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey from 0..65535 to 0..255, where Pillow's `convert` would clip it."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.nan_to_num(np.asarray(image), posinf=65535)  # [H, W]
    if image.mode in ("I", "F") and values.max() <= 255:
        return image
    scaled = np.rint(values.clip(0, 65535).astype(np.float64) / 257)
    return Image.fromarray(scaled.astype(np.uint8))


def open_binary(path: str | os.PathLike) -> BinaryIO:
    """Open a local file, or an address through blobfile, for reading."""
    if not is_url(path):
        return open(path, "rb")
    import blobfile as bf  # slow to import, and needed for addresses only

    return bf.BlobFile(path, "rb")


def is_url(path: str | os.PathLike) -> bool:
    """Tell gs://, az:// and https:// addresses from local paths."""
    return "://" in os.fspath(path)


def one_line(error: BaseException) -> str:
    """Return an error's text as one line without the address of an object in memory."""
    if isinstance(error, UnidentifiedImageError):
        return "no image format that Pillow knows"
    return " ".join(str(error).split()) or type(error).__name__


# Crops


def side_needed(image_size: int, random_crop: bool) -> int:
    """Return how long the shorter side of an image must be for no crop to enlarge it."""
    return math.ceil(image_size / MIN_CROP_FRAC) if random_crop else image_size


def to_array(
    pil_image: Image.Image,
    image_size: int,
    random_crop: bool = False,
    random_flip: bool = False,
    rng: random.Random = random,
) -> np.ndarray:
    """Crop, perhaps mirror, and scale an image: float32 [C, image_size, image_size] in [-1, 1]."""
    arr = to_pixels(pil_image, image_size, random_crop, random_flip, rng)
    return arr.astype(np.float32) / 127.5 - 1


def to_pixels(
    pil_image: Image.Image,
    image_size: int,
    random_crop: bool = False,
    random_flip: bool = False,
    rng: random.Random = random,
) -> np.ndarray:
    """Crop and perhaps mirror an image: uint8 [C, image_size, image_size], a view of [H, W, C]."""
    if random_crop:
        arr = random_crop_arr(pil_image, image_size, rng=rng)
    else:
        arr = center_crop_arr(pil_image, image_size)  # [H, W, 3], or [H, W] if grey
    if random_flip and rng.random() < 0.5:
        arr = arr[:, ::-1]
    return arr[None] if arr.ndim == 2 else arr.transpose(2, 0, 1)


def center_crop_arr(pil_image: Image.Image, image_size: int) -> np.ndarray:
    """Shrink or enlarge an image to cover image_size squared, and cut out the centre.

    Returns uint8 [image_size, image_size, 3], without the last axis if the image is grey.
    """
    arr = np.array(_resize_shorter_side(pil_image, image_size))
    top = (arr.shape[0] - image_size) // 2
    left = (arr.shape[1] - image_size) // 2
    return arr[top : top + image_size, left : left + image_size]


def random_crop_arr(
    pil_image: Image.Image,
    image_size: int,
    min_crop_frac: float = MIN_CROP_FRAC,
    max_crop_frac: float = 1.0,
    rng: random.Random = random,
) -> np.ndarray:
    """Cut a random square, whose side is such a fraction of the shorter side, at image_size.

    Draws from `rng`, by default Python's global generator. Returns uint8
    [image_size, image_size, 3], without the last axis if the image is grey.
    """
    smallest = math.ceil(image_size / max_crop_frac)
    largest = math.ceil(image_size / min_crop_frac)
    arr = np.array(_resize_shorter_side(pil_image, rng.randrange(smallest, largest + 1)))
    top = rng.randrange(arr.shape[0] - image_size + 1)
    left = rng.randrange(arr.shape[1] - image_size + 1)
    return arr[top : top + image_size, left : left + image_size]


def _resize_shorter_side(pil_image: Image.Image, size: int) -> Image.Image:
    """Resize so that the shorter side becomes `size`."""
    extent = pil_image.info.get(EXTENT, pil_image.size)
    box, sides = (0, 0, *extent), tuple(map(int, extent))
    # Bicubic alone is poor at strong reductions, so average 2 x 2 pixels first, while possible.
    while min(sides) >= 2 * size:
        sides = tuple(side // 2 for side in sides)
        pil_image, box = pil_image.resize(sides, Image.BOX, box), None
    scale = size / min(sides)
    return pil_image.resize(tuple(round(side * scale) for side in sides), Image.BICUBIC, box)
