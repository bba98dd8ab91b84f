"""What a process that decodes does: from a list of picks to a batch.

Pixels leave it as bytes: the memory that processes share costs more to fill than the scaling to
floats, which `to_unit` does where the batch arrives.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from . import streams
from .data_sources import Source
from .image_decoding import BadImage, guard, to_mode, to_pixels
from .image_order import Picks

Batch = tuple[Tensor, dict[str, Tensor]]  # images [N, C, H, W] in [-1, 1]; {} or {"y": [N]}


@dataclass
class Batches(Dataset):
    """Batches by the list of picks that they hold.

    An item is the images, uint8 [N, C, H, W], or what `prepare` makes of their floats, a dict as
    for `Batch`, and the paths and faults of broken images; or the ValueError of one that may not
    be skipped. Without any good image, None stands for the images.
    """

    source: Source
    resolution: int
    mode: str
    random_crop: bool
    random_flip: bool
    seed: int
    numbers: np.ndarray | None  # the class of each entry
    label_dropout: float
    null_class: int | None
    skip_bad_images: bool
    once: bool
    prepare: Callable[[Tensor, dict[str, Tensor]], Batch] | None
    least: int | None  # pixels of the shorter side that suffice; None decodes all of them
    known_bad: dict[int, str] = field(default_factory=dict)

    def __getitem__(self, picks: Picks) -> tuple[Tensor, dict, list[tuple[str, str]]] | ValueError:
        bad, arrays, entries = {}, [], []
        crop = partial(
            to_pixels, image_size=self.resolution,
            random_crop=self.random_crop, random_flip=self.random_flip,
        )  # fmt: skip
        # Returned and not raised: torch would wrap what a worker raises into its traceback.
        try:
            for (_, entry), rng in zip(picks, self._generators(picks), strict=True):
                for image, good in self._read_good(entry, bad):
                    arrays.append(crop(image, rng=rng))
                    entries.append(good)
        except ValueError as error:
            return ValueError(str(error))
        if not arrays:
            return None, {}, list(bad.items())
        images = torch.from_numpy(np.stack(arrays))  # uint8 [N, C, H, W]
        cond = {} if self.numbers is None else {"y": self._labels(picks, entries)}
        if self.prepare is not None:
            images, cond = self.prepare(to_unit(images), cond)
        return images, cond, list(bad.items())

    def _generators(self, picks: Picks) -> list[random.Random]:
        """Return what draws the crop and flip of each image."""
        seeds = (streams.derived_seed(self.seed, number, streams.AUGMENT) for number, _ in picks)
        return [random.Random(seed) for seed in seeds]

    def _labels(self, picks: Picks, entries: list[int]) -> Tensor:
        """Return the classes of entries, some dropped, int64 [N]."""
        y = torch.from_numpy(self.numbers[entries])
        if not self.label_dropout:
            return y
        draws = streams.uniform(self.seed, [number for number, _ in picks], streams.DROP_LABEL)
        return y.masked_fill(torch.from_numpy(draws < self.label_dropout), self.null_class)

    def _read_good(self, entry: int, bad: dict[str, str]) -> list[tuple[Image.Image, int]]:
        """Return an entry's image, or the first good one after it, with the entry it is.

        In a single pass, which shows each image once, nothing stands for a broken one. Note the
        paths that are passed over, and why, in `bad`.
        """
        for _ in range(1 if self.once else len(self.source)):
            try:
                return [(self._read(entry), entry)]
            except BadImage as error:
                if not self.skip_bad_images:
                    raise ValueError(f"{error}, or give --skip_bad_images True") from None
                self.known_bad[entry] = bad[error.path] = error.reason
            entry = (entry + 1) % len(self.source)
        if self.once:
            return []
        raise ValueError(
            f"{self.source.flag} {self.source.data_dir!r} holds {len(self.source)} images, and "
            f"none can be read, such as {next(iter(bad))!r}"
        )

    def _read(self, entry: int) -> Image.Image:
        """Decode an entry, unless it is known to be broken."""
        read, flag, path = self.source.read, self.source.flag, self.source.path(entry)
        if entry in self.known_bad:
            raise BadImage(flag, path, self.known_bad[entry])
        return guard(lambda: to_mode(read(entry, self.least), self.mode), flag, path)


def to_unit(images: Tensor) -> Tensor:
    """Scale uint8 images to float32 in [-1, 1]; in memory they lie as before."""
    floats = torch.empty_like(images, dtype=torch.float32, pin_memory=images.is_pinned())
    return floats.copy_(images).div_(127.5).sub_(1)


def add_low_res(images: Tensor, cond: dict[str, Tensor], small_size: int) -> Batch:
    """Put images [N, C, H, W], shrunk by area to small_size squared, beside them as "low_res"."""
    low_res = F.interpolate(images, (small_size, small_size), mode="area")
    return images, {**cond, "low_res": low_res}
