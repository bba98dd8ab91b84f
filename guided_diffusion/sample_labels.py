"""Which class each sample is of: drawn at random, or from a list taken in turn."""

import argparse
import csv
import io
import json
import os
from typing import Any

import numpy as np

from . import checkpoints
from .pictures import class_names
from .presets import MODELS, PRESETS, by_file
from .streams import LABEL, stream

HEADERS = ("class", "classes", "label", "labels")  # of the column of classes in a table


class Labels:
    """The label of any sample: the list's entry i mod its length, without a list a random class.

    Args:
        chosen: the list, int64 [M], or None.
        num_classes: random labels are below it.
        seed: of the random ones.
    """

    def __init__(self, chosen: np.ndarray | None, num_classes: int, seed: int):
        self.chosen = chosen
        self.num_classes = num_classes
        self.seed = seed

    def of(self, indices: range) -> np.ndarray:
        """Return the labels of some samples, int64 [N]."""
        if self.chosen is not None:
            return self.chosen[np.array(indices, np.int64) % len(self.chosen)]
        draws = (stream(self.seed, i, LABEL).integers(self.num_classes) for i in indices)
        return np.fromiter(draws, np.int64, len(indices))


def choose_classes(args: argparse.Namespace) -> np.ndarray | None:
    """Return the classes that the flags ask for, int64 [M], None if they ask for random ones.

    Args:
        args: gives classes, class_balanced, labels_file, num_classes, model_path and, if the
            script has it, classifier_path.

    Raises:
        ValueError: if a class is unknown or ambiguous, or the file cannot be read.
    """
    names = known_names(args)
    if args.class_balanced:
        return np.arange(args.num_classes)
    if args.classes:
        items = next(csv.reader([args.classes], skipinitialspace=True))  # names may be quoted
        return numbers_of(items, names, args.num_classes, "--classes")
    if args.labels_file:
        where = f"--labels_file {args.labels_file}"
        return numbers_of(_read_list(args.labels_file, where), names, args.num_classes, where)
    return None


def known_names(args: argparse.Namespace) -> list[str] | None:
    """Return the class names beside the model or its classifier, or those of its release."""
    for path in filter(None, (args.model_path, getattr(args, "classifier_path", ""))):
        names = class_names(path)
        if names is not None:
            return names
    preset = PRESETS.get(getattr(args, "preset", "")) or by_file(args.model_path)
    path = os.path.join(MODELS, preset.classes) if preset and preset.classes else ""
    # A package that was installed without the project's folders has no such file.
    return checkpoints.read_class_names(path) if checkpoints.exists(path) else None


def numbers_of(
    items: list[str], names: list[str] | None, num_classes: int, where: str
) -> np.ndarray:
    """Return the class numbers that some numbers and names stand for, int64 [M].

    A name counts whatever its capitals; a whole number is always a number.

    Args:
        items: numbers or names.
        names: the known names by number, or None.
        num_classes: the numbers must be below it.
        where: the flag, for errors.

    Raises:
        ValueError: if there is none, or a class is unknown, ambiguous or out of range.
    """
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(names or []):
        numbers.setdefault(name.strip().casefold(), []).append(number)
    found = []
    for item in map(str.strip, items):
        is_number = item.isascii() and item.isdecimal()
        known = [int(item[:18])] if is_number else numbers.get(item.casefold(), [])
        if len(known) > 1:
            shown = " or ".join(map(str, known))
            raise ValueError(f"{where}: {len(known)} classes are called {item!r}: give {shown}")
        if not known:
            raise ValueError(f"{where}: {item!r} is no class: {_remedy(names, num_classes)}")
        if known[0] >= num_classes:
            raise ValueError(
                f"{where}: the class {item} is out of range: the model knows the classes 0 to "
                f"{num_classes - 1}"
            )
        found += known
    if not found:
        raise ValueError(f"{where} names no class: write one on each line")
    return np.array(found, np.int64)


def _remedy(names: list[str] | None, num_classes: int) -> str:
    """Say what can be given instead of an unknown name."""
    if not names:
        return f"there is no classes.txt beside the model, so give numbers, 0 to {num_classes - 1}"
    more = ", ..." if len(names) > 12 else ""
    return f"give a number, or one of {', '.join(names[:12])}{more}"


def _read_list(path: str, where: str) -> list[str]:
    """Return the entries of a list of labels: the lines of a text, or an array."""
    try:
        content = checkpoints.read_file(path)
        if os.path.splitext(path)[1].lower() in (".npy", ".npz"):
            return list(map(str, _read_array(content).tolist()))
        text = content.decode("utf-8-sig")
        if path.lower().endswith(".json"):
            return _check_list(json.loads(text))
        if path.lower().endswith(".csv"):
            rows = [row for row in csv.reader(io.StringIO(text)) if any(row)]
            return [row[-1] for row in rows if row[-1].strip().casefold() not in HEADERS]
        return [line for line in text.splitlines() if line.strip()]
    except Exception as error:  # of the disk, the encoding, numpy or zipfile
        reason = " ".join(str(error).split())
        raise ValueError(f"{where} cannot be read as a list of classes ({reason})") from error


def _check_list(items: Any) -> list[str]:
    """Return the numbers and names of a JSON list as text."""
    if not isinstance(items, list) or not all(type(item) in (int, str) for item in items):
        raise ValueError("it is no list of numbers and names")
    return list(map(str, items))


def _read_array(content: bytes) -> np.ndarray:
    """Return the labels in an npy file, or an npz of samples (arr_1) or of labels (arr_0)."""
    data = np.load(io.BytesIO(content), allow_pickle=False)
    if not isinstance(data, np.ndarray):
        data = data["arr_1" if "arr_1" in data.files else "arr_0"]
    if data.ndim != 1 or data.dtype.kind not in "iu":
        raise ValueError(f"it holds {data.dtype} {list(data.shape)}, not whole numbers [N]")
    return data
