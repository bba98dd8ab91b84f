"""Images as an endless stream of batches, in an order that depends on a seed alone.

Image number k of a run is entry k mod N of epoch k // N, and each epoch has an order of its own.
A step takes the next numbers, and its ranks share them out; so whoever knows how many images a run
has seen can go on with it, with as many ranks as there are now.
"""

from __future__ import annotations

import atexit
import os
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import dist_util
from .class_labels import class_numbers, describe_classes, label_entries
from .data_sources import Source, _list_image_files_recursively, find_images, open_source
from .image_batches import Batch, Batches, add_low_res, to_unit
from .image_decoding import (
    center_crop_arr,
    one_line,
    random_crop_arr,
    read_image,
    side_needed,
    to_array,
)
from .image_order import EpochOrder, Picks, endless_batches, single_pass

__all__ = [
    "ImageDataset",
    "ImageStream",
    "add_low_res",
    "center_crop_arr",
    "class_numbers",
    "find_images",
    "load_data",
    "random_crop_arr",
    "read_image",
    "_list_image_files_recursively",
]

PIL_MODES = {1: "L", 3: "RGB"}  # number of channels -> what Pillow converts to
MAX_WORKERS = 8  # by default
PREFETCH = 2  # batches that each worker decodes ahead
LOCAL_SIZES = (
    "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "SLURM_NTASKS_PER_NODE",
)


def load_data(
    *,
    data_dir: str,
    batch_size: int,
    image_size: int,
    class_cond: bool = False,
    deterministic: bool = False,
    random_crop: bool = False,
    random_flip: bool = True,
    in_channels: int = 3,
    num_classes: int | None = None,
    once: bool = False,
    num_workers: int | None = None,
    report: Callable[[str], None] | None = None,
    classes: Sequence[str] | None = None,
    flag: str = "--data_dir",
    seed: int | None = None,
    labels: str = "filename",
    skip_bad_images: bool = False,
    label_dropout: float = 0.0,
    prepare: Callable[[Tensor, dict[str, Tensor]], Batch] | None = None,
    ranks: tuple[int, int] | None = None,
    fast_decode: bool = False,
) -> ImageStream:
    """Check a source of images, then return an iterator over batches of them.

    A batch is float32 images [N, C, image_size, image_size] in [-1, 1] and a dict, which under
    class_cond holds the class numbers "y", int64 [N]. All ranks call this with equal arguments.

    Args:
        data_dir: a folder tree, a .zip, an .npz or an LMDB folder.
        batch_size: images in a batch of one rank.
        image_size: height and width of the batches.
        class_cond: whether to read labels.
        deterministic: keep the order of the files in every epoch.
        random_crop: cut out squares at random instead of the central one.
        random_flip: mirror every other image, by chance.
        in_channels: 3 decodes colour, 1 grey.
        num_classes: upper limit on the classes, and the null class of label_dropout.
        once: go through the data a single time, in order, neither flipped nor randomly cropped;
            rank r of w sees the entries r, r + w, ..., and the last batch may be short.
        num_workers: processes that decode; 0 decodes in the caller, None follows the cores.
        report: called with lines about the data, on every rank.
        classes: class names by number, if not the data's own: those of the training data.
        flag: whom errors about data_dir name.
        seed: of order, crops, flips and label dropout; None draws one from torch's generator.
        labels: "filename", "folder", or the path of a .json or .csv file.
        skip_bad_images: put the next good image in the place of a broken one; with `once`, none.
        label_dropout: share of the labels that become num_classes. So trained, one network serves
            both parts of classifier-free guidance (Ho and Salimans, 2022, arXiv:2207.12598).
        prepare: called on each batch in the worker; returns the batch to hand out.
        ranks: rank and number of ranks to read for, by default those of the job.
        fast_decode: decode JPEGs of at least twice the size needed at a half, a quarter or an
            eighth of their size: faster, and of slightly other pixels.

    Raises:
        ValueError: the data is missing or empty, or its classes do not fit. A broken image raises
            it later, from the iterator.
    """
    if label_dropout and (not class_cond or num_classes is None):
        raise ValueError(f"--label_dropout {label_dropout} needs --class_cond and --num_classes")
    if batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {batch_size}")
    report = report or (lambda line: None)
    source = open_source(data_dir, flag)
    numbers = names = None
    if class_cond:
        numbers, names = label_entries(source, labels, num_classes, classes)
    report(describe(source, numbers, names))
    if names is not None and len(names) == len(source) > 1:
        report(f"each image is a class of its own: is --labels {labels} what you mean?")
    elif names is not None and num_classes is not None and len(names) < num_classes:
        report(f"{len(names)} of --num_classes {num_classes} have images")
    if seed is None:
        seed = 0 if once else _draw_seed()  # a single pass leaves nothing to chance
    batches = Batches(
        source=source,
        resolution=image_size,
        mode=_mode(in_channels),
        random_crop=random_crop and not once,
        random_flip=random_flip and not once,
        seed=seed,
        numbers=numbers,
        label_dropout=label_dropout,
        null_class=num_classes,
        skip_bad_images=skip_bad_images,
        once=once,
        prepare=prepare,
        least=side_needed(image_size, random_crop and not once) if fast_decode else None,
    )
    rank, world_size = ranks or (dist_util.get_rank(), dist_util.get_world_size())
    if once:
        plan = partial(single_pass, len(source))
    else:
        plan = partial(endless_batches, EpochOrder(len(source), None if deterministic else seed))
        if len(source) < batch_size * world_size:
            report(
                f"{len(source):,} images are fewer than the {batch_size * world_size:,} of a step: "
                "each is shown more than once in it"
            )
    return ImageStream(
        batches,
        partial(plan, batch_size, rank, world_size),
        batch_size * world_size,
        default_num_workers(world_size) if num_workers is None else num_workers,
        report,
        names,
    )


def _draw_seed() -> int:
    """Return a seed from rank 0's torch generator, the same on all ranks."""
    return int(dist_util.share("data_seed", lambda: str(torch.randint(2**62, ()).item())))


def _mode(in_channels: int) -> str:
    """Return what images of this many channels are called by Pillow."""
    if in_channels not in PIL_MODES:
        raise ValueError(f"--in_channels must be 3 (colour) or 1 (grey), got {in_channels}")
    return PIL_MODES[in_channels]


def default_num_workers(world_size: int) -> int:
    """Return how many cores each rank of this host has for decoding, from 1 to MAX_WORKERS.

    How many ranks the host has is what the launcher says, else all of them. If each rank is bound
    to cores of its own, this is less than could be: then say --num_workers.
    """
    bound = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
    told = [int(os.environ[name]) for name in LOCAL_SIZES if os.environ.get(name, "").isdigit()]
    num_local = min(told[0], world_size) if told else world_size
    return min(MAX_WORKERS, max(1, len(bound) // max(1, num_local)))


def describe(
    source: Source, numbers: np.ndarray | None = None, names: Sequence[str] | None = None
) -> str:
    """Say in one line how many images there are, and of which classes if they are numbered."""
    line = f"{len(source):,} images from {source.describe()}"
    if numbers is None:
        return line
    counts = np.bincount(numbers, minlength=len(names)).tolist()
    return f"{line}, {describe_classes(names, counts)}"


class ImageStream(Iterator):
    """An iterator over batches that can be sent to any image number of the run.

    Workers start with the first batch after construction or `seek`.

    Attributes:
        classes: class names by number; None without labels.
        class_counts: number of images of each; None without labels.
        num_entries: number of images in the source.
        position: the image number at which the next step begins.
    """

    def __init__(
        self,
        batches: Batches,
        plan: Callable[[int], Iterator[Picks]],
        step: int,
        num_workers: int,
        report: Callable[[str], None],
        classes: list[str] | None = None,
    ):
        self.num_entries = len(batches.source)
        self.classes = classes
        self.class_counts = None
        if classes is not None:
            self.class_counts = np.bincount(batches.numbers, minlength=len(classes)).tolist()
        self.position = 0
        self._batches, self._plan, self._step = batches, plan, step
        self._num_workers, self._report = num_workers, report
        self._items, self._is_over, self._bad = None, False, set()
        _streams.add(self)

    @property
    def bad_images(self) -> frozenset[str]:
        """The broken images skipped so far by this rank."""
        return frozenset(self._bad)

    @property
    def seed(self) -> int:
        """The seed of order, crops and flips."""
        return self._batches.seed

    def seek(self, image_number: int) -> None:
        """Let the next batch begin at this image number of the run, whatever came before."""
        assert image_number >= 0, image_number
        self.close()
        self.position, self._is_over = int(image_number), False

    def close(self) -> None:
        """End the workers. The next batch, if one is asked for, starts new ones."""
        self._items = None

    def __next__(self) -> Batch:
        if self._is_over:
            raise StopIteration
        if self._items is None:
            self._items = iter(self._make_loader())
        item = self._next_item()
        if isinstance(item, ValueError):
            self.close()  # else the traceback would keep the workers alive
            raise item
        images, cond, bad = item
        self.position += self._step
        self._tell(bad)
        if images is None:
            return next(self)
        return images if self._batches.prepare else to_unit(images), cond

    def _next_item(self) -> tuple | list | ValueError:
        try:
            return next(self._items)
        except StopIteration:
            self._is_over = True
            self.close()
            raise
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            self.close()
            return ValueError(
                f"--num_workers {self._num_workers}: a process that decodes images has died "
                f"({one_line(error)}): use fewer, or 0, or give the machine more shared memory"
            )

    def _make_loader(self) -> DataLoader:
        """Return a loader whose items are whole batches, or the ValueError of a broken image."""
        return DataLoader(
            self._batches,
            sampler=self._plan(self.position),
            batch_size=None,  # the plan groups the entries already
            num_workers=self._num_workers,
            prefetch_factor=PREFETCH if self._num_workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_ignore_signals,
            generator=torch.Generator(),  # else it would draw from the global one
        )

    def _tell(self, bad: list[tuple[str, str]]) -> None:
        """Report each broken image once."""
        for path, reason in bad:
            if path not in self._bad:
                self._bad.add(path)
                self._report(f"skipped: {path} ({reason})")


_streams = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """End all workers: at exit Python sends SIGTERM, which they ignore, and would wait for them."""
    for stream in list(_streams):
        stream.close()


def _ignore_signals(_worker: int) -> None:
    """Leave signals to the main process, which wants a few more batches before it stops."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class ImageDataset(Dataset):
    """One shard of a list of image files, decoded, resized and cropped to a square.

    Item i is an image, float32 [C, resolution, resolution] in [-1, 1], and a dict, which holds
    the class "y" as an int64 array of shape [] if `classes` were given.
    """

    def __init__(
        self,
        resolution: int,
        image_paths: Sequence[str],
        classes: Sequence[int] | None = None,
        shard: int = 0,
        num_shards: int = 1,
        random_crop: bool = False,
        random_flip: bool = True,
        in_channels: int = 3,
    ):
        self.resolution = resolution
        self.local_images = image_paths[shard::num_shards]
        self.local_classes = None if classes is None else classes[shard::num_shards]
        self.random_crop = random_crop
        self.random_flip = random_flip
        self.mode = _mode(in_channels)

    def __len__(self) -> int:
        return len(self.local_images)

    def __getitem__(self, idx: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        image = read_image(self.local_images[idx], self.mode)
        cond = {}
        if self.local_classes is not None:
            cond["y"] = np.array(self.local_classes[idx], dtype=np.int64)
        return to_array(image, self.resolution, self.random_crop, self.random_flip), cond
