"""Images that samples are made from, of an npz or of files, such as those of an upsampler."""

import argparse
import hashlib
import os
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import checkpoints
from .class_labels import classes_in
from .data_sources import Source, open_source
from .image_decoding import guard
from .npz_rows import open_rows
from .sample_labels import known_names, numbers_of
from .streams import LOW_RES, UP_CHAIN, UP_NOISE, normal

FLAG = "--base_samples"
LABELS_TABLE = "labels.csv"  # in a folder of images: name and class of each
GREY = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F")  # modes of Pillow without colour


class Given(Protocol):
    """Images from which samples are made: sample i from image i mod their number.

    Attributes:
        labels: the class of each image, int64 [M], or None if there are none.
        purposes: of the streams of random numbers of the samples, as for `streams.ChainNoise`.
    """

    labels: np.ndarray | None
    purposes: tuple[int, int]

    def cond(self, indices: range, seed: int) -> dict[str, Tensor]:
        """Return what the sampler is told of some samples, name -> [N, ...]."""

    def digests(self) -> dict[str, str]:
        """Return hashes of what is read, by flag."""


class ImageSet:
    """Images of one size, of an npz as a sampler writes it, or of the files of a folder or zip.

    Args:
        path: the npz, folder or zip.
        shape: (H, W, C) that each image must have.
        args: gives num_classes, class_cond and model_path, for the labels.
        flag: that names the path, for errors.
        taker: what takes the images, for errors.
        remedy: what else to do than to resize images of another size.
        keep_colour: refuse files in colour where grey images are wanted, rather than convert them.

    Attributes:
        labels: the class of each image, int64 [M], or None if there are none.

    Raises:
        ValueError: if there are no such images, or their labels are none.
    """

    def __init__(
        self,
        path: str,
        shape: tuple[int, int, int],
        args: argparse.Namespace,
        *,
        flag: str = FLAG,
        taker: str = "the upsampler",
        remedy: str = "give the --small_size that it was trained with",
        keep_colour: bool = False,
    ):
        self.path, self.shape, self.flag, self.taker = path, shape, flag, taker
        if path.lower().endswith(".npz"):
            self._images = self._open_npz()
            labels = self._npz_labels()
        else:
            self._images = _Files(path, shape, flag, taker, remedy, keep_colour)
            labels = self._images.labels(args)
        self.labels = None if labels is None else self._checked(labels, args.num_classes)

    def __len__(self) -> int:
        return len(self._images)

    def _open_npz(self) -> np.ndarray:
        images = open_rows(self.path, "arr_0", flag=self.flag)
        if images.dtype != np.uint8 or images.shape[1:] != self.shape or not len(images):
            raise ValueError(
                f"{self.flag} {self.path} holds {images.dtype} {list(images.shape)}; {self.taker} "
                f"takes uint8 [N, {', '.join(map(str, self.shape))}]"
            )
        return images

    def _npz_labels(self) -> np.ndarray | None:
        labels = open_rows(self.path, "arr_1", flag=self.flag, optional=True)
        if labels is None:
            return None
        if labels.shape != (len(self._images),) or labels.dtype.kind not in "iu":
            raise ValueError(
                f"{self.flag} {self.path}: arr_1 must hold {len(self._images)} whole numbers"
            )
        return np.array(labels)

    def _checked(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(
                f"{self.flag} {self.path} has labels from {labels.min()} to {labels.max()}; "
                f"--num_classes {num_classes} allows 0 to {num_classes - 1}"
            )
        return labels.astype(np.int64)

    def require_labels(self, wanted_by: str, more: str = "") -> None:
        """Raise a ValueError if there are no labels; `more` is a further remedy."""
        if self.labels is None:
            raise ValueError(
                f"{self.flag} {self.path} has no labels, as {wanted_by} needs: an npz has them in "
                f"arr_1, a folder in its file names, CLASS_anything.png, or in {LABELS_TABLE}{more}"
            )

    def digest(self) -> str:
        """Return a hash of the images."""
        is_files = isinstance(self._images, _Files)
        return self._images.digest() if is_files else checkpoints.digest(self.path)

    def take(self, indices: range) -> np.ndarray:
        """Return images in turn, image i mod M for each index: uint8 [N, H, W, C]."""
        return np.stack([self._images[i % len(self)] for i in indices])


def to_tensor(images: np.ndarray) -> Tensor:
    """Turn uint8 [N, H, W, C] into [N, C, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


class BaseSamples:
    """The images of --base_samples; sample i upsamples image i mod their number.

    Args:
        args: gives base_samples, low_res_noise, small_size, in_channels, class_cond, num_classes
            and model_path.

    Attributes:
        labels: the class of each image, int64 [M], or None if there are none.

    Raises:
        ValueError: if there are no images of this size and number of channels or, under
            class_cond, no labels.
    """

    purposes = UP_NOISE, UP_CHAIN

    def __init__(self, args: argparse.Namespace):
        self.noise = args.low_res_noise
        shape = (args.small_size, args.small_size, args.in_channels)
        self.images = ImageSet(args.base_samples, shape, args)
        if args.class_cond:
            self.images.require_labels("--class_cond")
        self.labels = self.images.labels

    def __len__(self) -> int:
        return len(self.images)

    def digests(self) -> dict[str, str]:
        """Return a hash of what is upsampled."""
        return {"base_samples": self.images.digest()}

    def cond(self, indices: range, seed: int) -> dict[str, Tensor]:
        """Return the input of some samples as {"low_res": [N, C, H, W] in [-1, 1]}.

        Under --low_res_noise with normal noise of that deviation, which hides what small images
        that were drawn have and those of the training have not (Ho et al. 2022, Cascaded
        diffusion models, section 4).
        """
        x = to_tensor(self.images.take(indices))
        if self.noise:
            x += self.noise * torch.from_numpy(normal(seed, indices, LOW_RES, tuple(x.shape[1:])))
        return {"low_res": x}


class _Files:
    """The image files of a folder or a zip, in the order of their names, as arrays.

    The arguments are those of `ImageSet`.
    """

    def __init__(
        self,
        path: str,
        shape: tuple[int, int, int],
        flag: str,
        taker: str,
        remedy: str,
        keep_colour: bool,
    ):
        self.source, self.shape, self.flag = open_source(path, flag), shape, flag
        self.mode = "L" if shape[2] == 1 else "RGB"
        for i in range(len(self.source)):
            size, mode = _header(self.source, i)
            if size != shape[:2]:
                raise ValueError(
                    f"{flag}: {self.source.path(i)} is {size[0]} x {size[1]}; {taker} takes "
                    f"{shape[0]} x {shape[1]}: resize the images, or {remedy}"
                )
            if keep_colour and self.mode == "L" and mode not in GREY:
                raise ValueError(
                    f"{flag}: {self.source.path(i)} is in colour ({mode}); {taker} takes grey "
                    "images: convert them"
                )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> np.ndarray:
        return np.array(self.source.read(i).convert(self.mode)).reshape(self.shape)

    def labels(self, args: argparse.Namespace) -> np.ndarray | None:
        """Return the class of each image, from a table beside them or their names, or None."""
        table = os.path.join(self.source.data_dir, LABELS_TABLE)
        files = [name.rsplit("/", 1)[-1] for name in self.source.names]
        if os.path.isfile(table):
            found = classes_in(self.source, table)
        elif args.class_cond and all("_" in name for name in files):
            found = classes_in(self.source, "filename")
        else:
            return None
        where = f"{self.flag} {self.source.data_dir}"
        try:
            return numbers_of(found, known_names(args), args.num_classes, where)
        except ValueError:
            if args.class_cond:
                raise
            return None  # names that nobody needs

    def digest(self) -> str:
        """Return a hash of the names and contents of all files."""
        total = hashlib.sha256()
        for i, name in enumerate(self.source.names):
            with self.source.open(i) as file:
                total.update(name.encode(errors="surrogateescape") + b"\0" + file.read())
        return total.hexdigest()


def _header(source: Source, i: int) -> tuple[tuple[int, int], str]:
    """Return (height, width) of an entry and Pillow's mode of it, without decoding it."""

    def read_header():
        with source.open(i) as file, Image.open(file) as image:
            return image.size[::-1], image.mode

    return guard(read_header, source.flag, source.path(i))
