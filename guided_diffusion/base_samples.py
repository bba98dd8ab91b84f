"""The small images that an upsampler enlarges: an npz of samples, or a folder of image files."""

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
        self.path, self.noise = args.base_samples, args.low_res_noise
        self.shape = (args.small_size, args.small_size, args.in_channels)
        is_npz = self.path.lower().endswith(".npz")
        self.images = self._open_npz() if is_npz else _Files(self.path, self.shape)
        labels = self._npz_labels() if is_npz else self.images.labels(args)
        if labels is None and args.class_cond:
            raise ValueError(
                f"{FLAG} {self.path} has no labels, as --class_cond needs: an npz has them in "
                f"arr_1, a folder in its file names, CLASS_anything.png, or in {LABELS_TABLE}"
            )
        self.labels = None if labels is None else self._checked(labels, args.num_classes)

    def __len__(self) -> int:
        return len(self.images)

    def _open_npz(self) -> np.ndarray:
        images = open_rows(self.path, "arr_0", flag=FLAG)
        if images.dtype != np.uint8 or images.shape[1:] != self.shape or not len(images):
            raise ValueError(
                f"{FLAG} {self.path} holds {images.dtype} {list(images.shape)}; the upsampler "
                f"takes uint8 [N, {', '.join(map(str, self.shape))}]"
            )
        return images

    def _npz_labels(self) -> np.ndarray | None:
        labels = open_rows(self.path, "arr_1", flag=FLAG, optional=True)
        if labels is None:
            return None
        if labels.shape != (len(self.images),) or labels.dtype.kind not in "iu":
            raise ValueError(
                f"{FLAG} {self.path}: arr_1 must hold {len(self.images)} whole numbers"
            )
        return np.array(labels)

    def _checked(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(
                f"{FLAG} {self.path} has labels from {labels.min()} to {labels.max()}; "
                f"--num_classes {num_classes} allows 0 to {num_classes - 1}"
            )
        return labels.astype(np.int64)

    def digests(self) -> dict[str, str]:
        """Return a hash of what is upsampled."""
        is_npz = not isinstance(self.images, _Files)
        digest = checkpoints.digest(self.path) if is_npz else self.images.digest()
        return {"base_samples": digest}

    def cond(self, indices: range, seed: int) -> dict[str, Tensor]:
        """Return the input of some samples as {"low_res": [N, C, H, W] in [-1, 1]}.

        Under --low_res_noise with normal noise of that deviation, which hides what small images
        that were drawn have and those of the training have not (Ho et al. 2022, Cascaded
        diffusion models, section 4).
        """
        chosen = np.stack([self.images[i % len(self.images)] for i in indices])
        x = torch.from_numpy(chosen).permute(0, 3, 1, 2).float() / 127.5 - 1
        if self.noise:
            x += self.noise * torch.from_numpy(normal(seed, indices, LOW_RES, tuple(x.shape[1:])))
        return {"low_res": x}


class _Files:
    """The image files of a folder or a zip, in the order of their names, as arrays.

    Args:
        path: the folder or zip.
        shape: (H, W, C) that each image must have.
    """

    def __init__(self, path: str, shape: tuple[int, int, int]):
        self.source, self.shape = open_source(path, FLAG), shape
        self.mode = "L" if shape[2] == 1 else "RGB"
        for i in range(len(self.source)):
            size = _size(self.source, i)
            if size != shape[:2]:
                raise ValueError(
                    f"{FLAG}: {self.source.path(i)} is {size[0]} x {size[1]}; the upsampler takes "
                    f"{shape[0]} x {shape[1]}: resize the images, or give the --small_size that it "
                    "was trained with"
                )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> np.ndarray:
        return np.array(self.source.read(i).convert(self.mode)).reshape(self.shape)

    def labels(self, args: argparse.Namespace) -> np.ndarray | None:
        """Return the class of each image, from a table beside them or their names, or None."""
        table = os.path.join(args.base_samples, LABELS_TABLE)
        files = [name.rsplit("/", 1)[-1] for name in self.source.names]
        if os.path.isfile(table):
            found = classes_in(self.source, table)
        elif args.class_cond and all("_" in name for name in files):
            found = classes_in(self.source, "filename")
        else:
            return None
        where = f"{FLAG} {args.base_samples}"
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


def _size(source: Source, i: int) -> tuple[int, int]:
    """Return height and width of an entry, from its header."""

    def read_header():
        with source.open(i) as file, Image.open(file) as image:
            return image.size[::-1]

    return guard(read_header, FLAG, source.path(i))
