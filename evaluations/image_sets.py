"""Sets of images of one size, read a part at a time: an npz, a folder, a zip or an LMDB.

An npz may be a published reference batch: beside the images arr_0 it then holds means and
covariances of what the network sees in many more, under mu, sigma, mu_s and sigma_s.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import Image

from guided_diffusion.data_sources import Source, open_source
from guided_diffusion.image_decoding import center_crop_arr
from guided_diffusion.npz_rows import open_rows

from .checks import count_broken

SUFFIXES = {"pooled": "", "spatial": "_s"}  # of mu and sigma in a file, by kind of features
FEATURES = "features"  # the array that names the network, where it is not Inception
MIN_IMAGES = 4  # k + 1 for the neighbours of precision and recall
MAX_IMAGES, MAX_SIDE = 10**7, 2**13  # beyond which a header is a mistake or a trap
READERS = 8  # threads that decode, at most


class Gaussian(NamedTuple):
    """A mean [D] and a covariance [D, D]."""

    mu: np.ndarray
    sigma: np.ndarray


class ImageSet:
    """Images by number, all of one height and width.

    Attributes:
        path: where they are.
        flag: whom errors name before the path.
        size: (H, W).
        features: the network that the stored statistics come from.
    """

    path: str
    flag: str
    size: tuple[int, int]
    features = "inception"

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        """Return images, uint8 [n, H, W, 3]; grey is repeated.

        Raises:
            ValueError: one cannot be read, or has another size, or there is no room for them.
        """
        try:
            return self._read(numbers)
        except MemoryError as error:
            raise self.error(
                f"holds images of {'x'.join(map(str, self.size))}, of which {len(numbers)} do not "
                "fit into memory: scale them down"
            ) from error

    def _read(self, numbers: Sequence[int]) -> np.ndarray:
        raise NotImplementedError

    def has_statistics(self) -> bool:
        """Tell whether there are any stored statistics."""
        return False

    def statistics(self, kind: str, width: int) -> Gaussian | None:
        """Return stored statistics of `width` "pooled" or "spatial" features, or None.

        Raises:
            ValueError: half of them is missing, they are no statistics, or of another width; that
                is known before they are read.
        """
        return None

    def error(self, problem: str) -> ValueError:
        """Return an error that names the set."""
        return ValueError(f"{self.flag} {self.path} {problem}")


def open_images(path: str, flag: str, min_images: int = 1) -> ImageSet:
    """Return the images at a path.

    Args:
        path: an .npz, a .zip, a folder tree or an LMDB folder.
        flag: whom errors name before the path.
        min_images: how many there must be.

    Raises:
        ValueError: they cannot be read, are no images, or too few.
    """
    is_npz = os.fspath(path).lower().endswith(".npz")
    images = NpzImages(path, flag) if is_npz else FileImages(open_source(path, flag))
    if len(images) < min_images:
        raise images.error(f"holds {len(images)} images: at least {min_images} are needed")
    return images


class NpzImages(ImageSet):
    """The array arr_0 of an npz file."""

    def __init__(self, path: str, flag: str):
        self.path, self.flag = path, flag
        self._rows = open_rows(path, "arr_0", flag=flag)
        shape = self._rows.shape
        is_one = len(shape) == 3 and shape[2] <= 4  # [H, W, 3], with no N
        is_layout = (len(shape) == 3 and not is_one) or (len(shape) == 4 and shape[3] in (1, 3))
        if self._rows.dtype != np.uint8 or not is_layout or 0 in shape[1:]:
            raise self.error(
                f"has arr_0 of {self._rows.dtype} {list(shape)}: save images as uint8 "
                "[N, H, W, 3], or [N, H, W] for grey, rounded from 0 to 255"
            )
        if shape[0] > MAX_IMAGES or max(shape[1:3]) > MAX_SIDE:
            raise self.error(
                f"has arr_0 of shape {list(shape)}: at most {MAX_IMAGES:,} images of at most "
                f"{MAX_SIDE}x{MAX_SIDE} can be scored, so divide them or scale them down"
            )
        self.size = shape[1:3]
        name = open_rows(path, FEATURES, flag=flag, optional=True)
        if name is not None and name.dtype.kind == "U" and name.shape == (1,):
            self.features = str(name[0])

    def __len__(self) -> int:
        return len(self._rows)

    def _read(self, numbers: range) -> np.ndarray:
        images = np.array(self._rows[numbers.start : numbers.stop : numbers.step])
        images = images.reshape(len(images), *self.size, -1)
        return images if images.shape[3] == 3 else images.repeat(3, axis=3)

    def has_statistics(self) -> bool:
        """Tell whether there are any stored statistics."""
        names = [f"mu{suffix}" for suffix in SUFFIXES.values()]
        return any(
            open_rows(self.path, n, flag=self.flag, optional=True) is not None for n in names
        )

    def statistics(self, kind: str, width: int) -> Gaussian | None:
        """Return stored statistics of `width` "pooled" or "spatial" features, or None."""
        names = [name + SUFFIXES[kind] for name in ("mu", "sigma")]
        found = [open_rows(self.path, name, flag=self.flag, optional=True) for name in names]
        missing = [name for name, array in zip(names, found, strict=True) if array is None]
        if len(missing) == 1:
            raise self.error(
                f"has no {missing[0]}, but its companion: save mu and sigma, or neither"
            )
        if missing:
            return None
        self._check_shapes(names, found, kind, width)
        return self._gaussian(names, found)

    def _check_shapes(self, names: list[str], found: list, kind: str, width: int) -> None:
        """Raise an error if what was found under two names is of no or of other features."""
        dim = found[0].shape[0]
        if [array.shape for array in found] != [(dim,), (dim, dim)]:
            shapes = " and ".join(str(list(array.shape)) for array in found)
            raise self.error(f"has {' and '.join(names)} of {shapes}: they must be [D] and [D, D]")
        if dim != width:
            raise self.error(
                f"holds statistics of {dim} {kind} features, but --features {self.features} has "
                f"{width}: they are those of another network"
            )

    def _gaussian(self, names: list[str], found: list) -> Gaussian:
        """Return statistics that were found under their names, if they hold finite floats."""
        for name, array in zip(names, found, strict=True):
            if array.dtype.kind != "f":
                raise self.error(f"has {name} of {array.dtype}: it must hold floats")
            if broken := count_broken(np.asarray(array)):
                raise self.error(
                    f"has {name} with {broken} values that are not finite: make it again"
                )
        return Gaussian(*(np.array(array, np.float64) for array in found))


class FileImages(ImageSet):
    """The image files of a folder tree, a zip or an LMDB folder."""

    def __init__(self, source: Source):
        self.path, self.flag = source.data_dir, source.flag
        self._source = source
        self._threads = ThreadPoolExecutor(min(READERS, os.cpu_count() or 1), "decode")
        width, height = source.read(0).size
        self.size = (height, width)

    def __len__(self) -> int:
        return len(self._source)

    def _read(self, numbers: Sequence[int]) -> np.ndarray:
        return np.stack(list(self._threads.map(self._read_one, numbers)))

    def _read_one(self, number: int) -> np.ndarray:
        image: Image.Image = self._source.read(number)
        if image.size != self.size[::-1]:
            first, other = (self._source.names[i] for i in (0, number))
            raise self.error(
                f"holds images of different sizes: {first} is {'x'.join(map(str, self.size))}, "
                f"{other} {image.height}x{image.width}; crop them to one, as "
                "make_reference_batch.py does"
            )
        return np.array(image.convert("RGB"))


class CroppedImages(FileImages):
    """The images of a source, cropped and scaled as for training."""

    def __init__(self, source: Source, image_size: int):
        super().__init__(source)
        self.size = (image_size, image_size)

    def _read_one(self, number: int) -> np.ndarray:
        return center_crop_arr(self._source.read(number).convert("RGB"), self.size[0])


def read_ahead(images: ImageSet, parts: Iterable[range]) -> Iterator[tuple[range, np.ndarray]]:
    """Yield parts of a set with their images, each read while the caller works on the one before.

    Args:
        images: the set.
        parts: numbers of images.
    """
    with ThreadPoolExecutor(1, "read") as thread:
        waiting = None
        for part in parts:
            before, waiting = waiting, (part, thread.submit(images.read, part))
            if before:
                yield before[0], before[1].result()
        if waiting:
            yield waiting[0], waiting[1].result()
