"""Image folders as endless batches: finding the files, their classes, decoding and cropping.

An image's class is the part of its file name before the first "_"; folders do not matter. The
sorted class names are numbered from 0, as text, so pad numbers with zeros ("02" before "10").
"""

from __future__ import annotations

import math
import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from . import dist_util

Batch = tuple[Tensor, dict[str, Tensor]]  # images [N, C, H, W] in [-1, 1]; {} or {"y": [N]}

EXTENSIONS = ("jpg", "jpeg", "png", "gif")  # in any case
PIL_MODES = {1: "L", 3: "RGB"}  # number of channels -> what Pillow converts to
MAX_CLASSES_SHOWN = 12


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
    num_workers: int = 1,
    report: Callable[[str], None] | None = None,
    classes_from: str | None = None,
    flag: str = "--data_dir",
) -> Iterator[Batch]:
    """Check a folder of images and its subfolders, then return an iterator over batches of them.

    A batch is float32 images [N, C, image_size, image_size] in [-1, 1] and a dict, which under
    class_cond holds the class numbers "y", int64 [N]. Rank r of w sees the images r, r + w, ...

    By default the batches are shuffled, always full, and go on for ever; `deterministic` keeps
    the order of the files. `once` goes through the data a single time, in order, neither flipped
    nor randomly cropped; then the last batch may be short, and one rank may get a batch more than
    another. `in_channels` 3 decodes colour, 1 grey. More classes than `num_classes`, if given,
    are an error. `num_workers` processes decode beside the caller; 0 decodes in the caller.
    `report` is called with one line about the images found, on every rank.

    Raises:
        ValueError: The folder is missing, or holds no images or too few, or its classes do not
            fit. A broken image raises it later, from the iterator.
    """
    paths = find_images(data_dir, flag)
    names = class_names(find_images(classes_from)) if class_cond and classes_from else None
    num_shards = dist_util.get_world_size()
    if not once:
        _check_fills_batch(f"{flag} {data_dir!r}", len(paths), batch_size, num_shards)
    if report is not None:
        report(describe(paths, class_cond, names))
    dataset = ImageDataset(
        image_size,
        paths,
        classes=class_numbers(paths, num_classes, names) if class_cond else None,
        shard=dist_util.get_rank(),
        num_shards=num_shards,
        random_crop=random_crop and not once,
        random_flip=random_flip and not once,
        in_channels=in_channels,
    )
    shuffle = not (deterministic or once)
    return _iterate(_make_loader(dataset, batch_size, shuffle, once, num_workers), once)


def _check_fills_batch(source: str, num_images: int, batch_size: int, num_shards: int) -> None:
    """Raise ValueError unless the smallest shard fills a batch, else the loop would never yield."""
    smallest = num_images // num_shards
    if smallest >= batch_size:
        return
    ranks = f" on each of {num_shards} ranks" if num_shards > 1 else ""
    remedy = f"use --batch_size {smallest} or less" if smallest else "start fewer ranks"
    raise ValueError(
        f"{source} holds {num_images:,} images, too few for --batch_size "
        f"{batch_size}{ranks}: {remedy}, or add images"
    )


def _make_loader(
    dataset: ImageDataset, batch_size: int, shuffle: bool, once: bool, num_workers: int
) -> DataLoader:
    """Return a loader whose items are whole batches, or the ValueError of a broken image."""
    if batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {batch_size}")
    order = RandomSampler(dataset) if shuffle else SequentialSampler(dataset)
    return DataLoader(
        _Batches(dataset),
        sampler=BatchSampler(order, batch_size, drop_last=not once),
        batch_size=None,  # the sampler groups the indices already
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=_ignore_interrupts,
    )


def _ignore_interrupts(_worker: int) -> None:
    """Leave Ctrl-C to the main process, which may want one more batch before it stops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _iterate(loader: DataLoader, once: bool) -> Iterator[Batch]:
    """Yield the loader's batches, once or for ever; raise what a worker has handed over."""
    while True:
        for item in loader:
            if isinstance(item, ValueError):
                del loader  # its worker would live on in this frame, which the traceback keeps
                raise item
            yield item
        if once:
            return


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
        if in_channels not in PIL_MODES:
            raise ValueError(f"--in_channels must be 3 (colour) or 1 (grey), got {in_channels}")
        self.resolution = resolution
        self.local_images = image_paths[shard::num_shards]
        self.local_classes = None if classes is None else classes[shard::num_shards]
        self.random_crop = random_crop
        self.random_flip = random_flip
        self.mode = PIL_MODES[in_channels]

    def __len__(self) -> int:
        return len(self.local_images)

    def __getitem__(self, idx: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        pil_image = read_image(self.local_images[idx], self.mode)
        crop = random_crop_arr if self.random_crop else center_crop_arr
        arr = crop(pil_image, self.resolution)  # [H, W, 3], or [H, W] if grey
        if self.random_flip and random.random() < 0.5:
            arr = arr[:, ::-1]
        arr = arr[None] if arr.ndim == 2 else arr.transpose(2, 0, 1)
        cond = {}
        if self.local_classes is not None:
            cond["y"] = np.array(self.local_classes[idx], dtype=np.int64)
        return arr.astype(np.float32) / 127.5 - 1, cond


class _Batches(Dataset):
    """An ImageDataset asked for a list of indices at a time."""

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def __getitem__(self, indices: list[int]) -> Batch | ValueError:
        # Returned and not raised: torch would wrap what a worker raises into its traceback.
        try:
            images, conds = zip(*[self.dataset[k] for k in indices], strict=True)
        except ValueError as error:
            return ValueError(str(error))
        cond = {key: torch.from_numpy(np.stack([c[key] for c in conds])) for key in conds[0]}
        return torch.from_numpy(np.stack(images)), cond


def read_image(path: str, mode: str = "RGB") -> Image.Image:
    """Decode an image file and convert it to a Pillow mode, "RGB" or "L".

    Raises:
        ValueError: The file cannot be read or is no whole image.
    """
    try:
        with _open_binary(path) as file:
            return Image.open(file).convert(mode)
    except Exception as error:  # Pillow's decoders raise a dozen kinds for a damaged file
        reason = " ".join(str(error).split())
        raise ValueError(
            f"--data_dir holds the image {path!r}, which cannot be read ({reason}): "
            "repair or remove it"
        ) from error


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
    min_crop_frac: float = 0.8,
    max_crop_frac: float = 1.0,
) -> np.ndarray:
    """Cut a random square, whose side is such a fraction of the shorter side, at image_size.

    Draws from Python's `random`. Returns uint8 [image_size, image_size, 3], without the last
    axis if the image is grey.
    """
    smallest = math.ceil(image_size / max_crop_frac)
    largest = math.ceil(image_size / min_crop_frac)
    arr = np.array(_resize_shorter_side(pil_image, random.randrange(smallest, largest + 1)))
    top = random.randrange(arr.shape[0] - image_size + 1)
    left = random.randrange(arr.shape[1] - image_size + 1)
    return arr[top : top + image_size, left : left + image_size]


def _resize_shorter_side(pil_image: Image.Image, size: int) -> Image.Image:
    """Resize so that the shorter side becomes `size`."""
    # Bicubic alone is poor at strong reductions, so average 2 x 2 pixels first, while possible.
    while min(pil_image.size) >= 2 * size:
        pil_image = pil_image.resize(tuple(side // 2 for side in pil_image.size), Image.BOX)
    scale = size / min(pil_image.size)
    return pil_image.resize(tuple(round(side * scale) for side in pil_image.size), Image.BICUBIC)


def find_images(data_dir: str, flag: str = "--data_dir") -> list[str]:
    """Return the sorted paths of all images in a folder and its subfolders.

    Raises:
        ValueError: The folder is not given, not there, or holds no images.
    """
    if not data_dir:
        raise ValueError(f"{flag} is missing: name the folder that holds the images")
    if not _is_url(data_dir) and not os.path.isdir(data_dir):
        state = "is a file, not a folder" if os.path.exists(data_dir) else "does not exist"
        raise ValueError(f"{flag} {data_dir!r} {state}: name the folder of the images")
    paths = _list_image_files_recursively(data_dir)
    if not paths:
        raise ValueError(
            f"{flag} {data_dir!r} and its subfolders hold no images; "
            f"looked for file names ending in .{', .'.join(EXTENSIONS)}"
        )
    return paths


def _list_image_files_recursively(data_dir: str) -> list[str]:
    """Return the paths of all images below a folder; each folder is listed in sorted order."""
    paths = []
    for path, is_folder in _list_folder(data_dir):
        if is_folder:
            paths.extend(_list_image_files_recursively(path))
        elif path.lower().endswith(tuple(f".{extension}" for extension in EXTENSIONS)):
            paths.append(path)
    return paths


def _list_folder(folder: str) -> list[tuple[str, bool]]:
    """Return the sorted entries of a folder as paths, each with whether it is a folder."""
    if not _is_url(folder):
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries)
        return [(os.path.join(folder, name), is_folder) for name, is_folder in found]
    import blobfile as bf  # slow to import, and needed for URLs only

    names = sorted(name.rstrip("/") for name in bf.listdir(folder))
    urls = [bf.join(folder, name) for name in names]
    return [(url, not url.lower().endswith(EXTENSIONS) and bf.isdir(url)) for url in urls]


def _open_binary(path: str):
    """Open a local file or a URL for reading."""
    if not _is_url(path):
        return open(path, "rb")
    import blobfile as bf

    return bf.BlobFile(path, "rb")


def _is_url(path: str) -> bool:
    """Tell gs://, az:// and https:// addresses from local paths."""
    return "://" in os.fspath(path)


def class_name(path: str) -> str:
    """Return the part of a file name before its first "_"."""
    return os.path.basename(path).split("_")[0]


def class_names(paths: Sequence[str]) -> list[str]:
    """Return the class names of image files in the order of their numbers: sorted, as text.

    Raises:
        ValueError: A file name has no "_".
    """
    nameless = [path for path in paths if "_" not in os.path.basename(path)]
    if nameless:
        raise ValueError(
            f"--class_cond True needs file names like CLASS_anything.png, but {len(nameless)} of "
            f"{len(paths)} images have no '_' in theirs, such as {nameless[0]!r}: rename them"
        )
    return sorted({class_name(path) for path in paths})


def class_numbers(
    paths: Sequence[str], num_classes: int | None = None, names: Sequence[str] | None = None
) -> list[int]:
    """Return the class number of every path: the place of its class name among `names`.

    Args:
        paths: Image files.
        num_classes: Upper limit on the number of classes; None for no limit.
        names: The class names by number; None for those of `paths`, sorted.

    Raises:
        ValueError: A file name has no "_" or an unknown class, or there are too many classes.
    """
    found = class_names(paths)
    names = found if names is None else list(names)
    unknown = [name for name in found if name not in set(names)]
    if unknown:
        raise ValueError(
            f"--val_data_dir holds images of the class {unknown[0]!r}, which --data_dir lacks: "
            f"remove these {len(unknown)} classes, or add them to --data_dir"
        )
    if num_classes is not None and len(names) > num_classes:
        raise ValueError(
            f"--num_classes {num_classes} is less than the {len(names)} classes of the images "
            f"(the file names' parts before '_', such as {names[num_classes]!r}): "
            f"use --num_classes {len(names)}, or rename the files"
        )
    numbers = {name: number for number, name in enumerate(names)}
    return [numbers[class_name(path)] for path in paths]


def describe(
    paths: Sequence[str], class_cond: bool = False, names: Sequence[str] | None = None
) -> str:
    """Say in one line how many images there are and, under class_cond, of which classes."""
    line = f"{len(paths):,} images"
    if not class_cond:
        return line
    counts = Counter(map(class_name, paths))
    names = sorted(counts) if names is None else names
    shown = [
        f"{'' if name == str(number) else f'{number} = '}{name} ({counts[name]:,})"
        for number, name in enumerate(names[:MAX_CLASSES_SHOWN])
    ]
    more = ["..."] if len(names) > MAX_CLASSES_SHOWN else []
    classes = "1 class" if len(names) == 1 else f"{len(names):,} classes"
    return f"{line}, {classes}: {', '.join(shown + more)}"


def drop_labels(data: Iterable[Batch], rate: float, num_classes: int) -> Iterable[Batch]:
    """Replace each label by the null class num_classes with probability `rate`.

    So trained, one network serves both parts of classifier-free guidance (Ho and Salimans,
    2022, arXiv:2207.12598). Draws from torch's global generator, and at rate 0 not at all.
    """
    return _drop_labels(data, rate, num_classes) if rate > 0 else data


def _drop_labels(data: Iterable[Batch], rate: float, num_classes: int) -> Iterator[Batch]:
    for images, cond in data:
        y = cond["y"]  # [N]
        dropped = torch.rand(y.shape, device=y.device) < rate
        yield images, {**cond, "y": y.masked_fill(dropped, num_classes)}


def add_low_res(data: Iterable[Batch], small_size: int) -> Iterator[Batch]:
    """Put each batch, shrunk by area to [N, C, small_size, small_size], beside it as "low_res"."""
    for batch, cond in data:
        low_res = F.interpolate(batch, (small_size, small_size), mode="area")
        yield batch, cond | {"low_res": low_res}
