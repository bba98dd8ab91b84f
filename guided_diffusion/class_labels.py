"""Classes of images: read from file names, folders, a JSON or CSV file, or the source itself.

Class names are numbered from 0 in sorted order, as text, so pad numbers with zeros ("02" before
"10"). Only a file of labels, or an npz, whose classes are all whole numbers numbers them itself.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from .data_sources import Source
from .image_decoding import one_line, open_binary

MAX_CLASSES = 1_000_000  # far more than anyone has; a greater number is a mistake
MAX_CLASSES_SHOWN = 12

# Each entry's class, all class names by number, and where they come from, for errors
Labelling = tuple[Sequence[str], Sequence[str], str]


def label_entries(
    source: Source,
    labels: str = "filename",
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[np.ndarray, list[str]]:
    """Return the class number of every entry, int64 [N], and the class names by number.

    Args:
        source: the images.
        labels: "filename": the part of the file name before its first "_", or the labels that
            the source carries. "folder": the first folder on the way to the image. Else the
            path of a .json or .csv file.
        num_classes: upper limit on the number of classes; None for no limit.
        classes: class names by number, such as those of the training data; None for the
            source's own.

    Raises:
        ValueError: an image has no class or one unknown to `classes`, there are too many
            classes, or the file of labels cannot be read.
    """
    found, names, origin = _choose(labels)(source)
    return number_classes(found, names, origin, num_classes, classes, source.flag)


def number_classes(
    found: Sequence[str],
    names: Sequence[str],
    origin: str,
    num_classes: int | None,
    classes: Sequence[str] | None,
    flag: str,
) -> tuple[np.ndarray, list[str]]:
    """Return the place of each class found among `classes`, or else among `names`."""
    names = list(names if classes is None else classes)
    numbers = {name: number for number, name in enumerate(names)}
    unknown = sorted(set(found) - set(numbers))
    if unknown:
        raise ValueError(
            f"{flag} holds images of the class {unknown[0]!r}, which the training data lacks: "
            f"remove the images of these {len(unknown)} classes, or add some to --data_dir"
        )
    if num_classes is not None and len(names) > num_classes:
        raise ValueError(
            f"--num_classes {num_classes} is less than the {len(names)} classes of the images "
            f"({origin}, such as {names[num_classes]!r}): "
            f"use --num_classes {len(names)}, or correct the classes"
        )
    return np.array([numbers[name] for name in found], np.int64), names


def class_numbers(
    paths: Sequence[str], num_classes: int | None = None, names: Sequence[str] | None = None
) -> list[int]:
    """Return the class number of every path by its file name, among `names` if given."""
    found = by_filename(paths)
    numbers, _ = number_classes(*found, num_classes, names, "--data_dir")
    return numbers.tolist()


def describe_classes(names: Sequence[str], counts: Sequence[int]) -> str:
    """Say in one line which classes there are, by number, and how many images of each."""
    shown = [
        f"{'' if name == str(number) else f'{number} = '}{_printable(name)} ({counts[number]:,})"
        for number, name in enumerate(names[:MAX_CLASSES_SHOWN])
    ]
    more = ["..."] if len(names) > MAX_CLASSES_SHOWN else []
    classes = "1 class" if len(names) == 1 else f"{len(names):,} classes"
    return f"{classes}: {', '.join(shown + more)}"


def _printable(name: str) -> str:
    return name if name.isprintable() else repr(name)


# Where the class of an entry stands


def _choose(labels: str) -> Callable[[Source], Labelling]:
    """Return the reader of classes that --labels asks for."""
    if labels in READERS:
        return READERS[labels]
    if labels.lower().endswith(tuple(PARSERS)):
        return lambda source: _by_file(source, labels)
    raise ValueError(
        f"--labels {labels!r} is none of {', '.join(READERS)}, or a file ending in "
        f"{' or '.join(PARSERS)}: choose one of them"
    )


def by_filename(names: Sequence[str]) -> Labelling:
    """Take the part of each file name before its first "_"."""
    nameless = [name for name in names if "_" not in os.path.basename(name)]
    if nameless:
        raise ValueError(
            f"--class_cond True needs file names like CLASS_anything.png, but {len(nameless)} of "
            f"{len(names)} images have no '_' in theirs, such as {nameless[0]!r}: rename them, "
            "or say by --labels where the classes stand (folder, or a .json or .csv file)"
        )
    found = [os.path.basename(name).split("_")[0] for name in names]
    return found, sorted(set(found)), "the file names' parts before '_'"


def _by_filename_or_carried(source: Source) -> Labelling:
    """Take the labels that the source carries, else those of the file names."""
    if source.labels is None:
        return by_filename(source.names)
    return _by_number(source.labels.tolist(), source.labels.tolist(), f"{source.flag}'s arr_1")


def _by_folder(source: Source) -> Labelling:
    """Take the first folder in each entry's name."""
    loose = [name for name in source.names if "/" not in name]
    if loose:
        raise ValueError(
            f"--labels folder needs images in a folder for each class, but {len(loose)} of "
            f"{len(source)} in {source.describe()} are in none, such as {loose[0]!r}: "
            "move them, or choose other --labels"
        )
    found = [name.split("/", 1)[0] for name in source.names]
    return found, sorted(set(found)), "the first folders"


READERS = {"filename": _by_filename_or_carried, "folder": _by_folder}


def _by_number(found: Iterable[int], known: Iterable[int], where: str) -> Labelling:
    """Let whole numbers be the class numbers; the highest of all known gives their number."""
    known = set(known)
    lowest, highest = min(known), max(known)
    if lowest < 0 or highest >= MAX_CLASSES:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(
            f"{where} holds the class {str(wrong)[:30]}: classes are numbered from 0 on, "
            f"below {MAX_CLASSES:,}; correct it"
        )
    return list(map(str, found)), [str(k) for k in range(highest + 1)], f"numbered in {where}"


# Files of labels


def _by_file(source: Source, path: str) -> Labelling:
    """Look every entry up in a JSON or CSV file."""
    table = _read_table(path, source)
    found = _look_up(table, source, path)
    where = f"--labels {path!r}"
    numbers = {value: _whole_number(value) for value in set(table.values())}
    if None not in numbers.values():
        return _by_number([numbers[value] for value in found], numbers.values(), where)
    found = list(map(str, found))
    return found, sorted(set(map(str, table.values()))), f"in {where}"


def classes_in(source: Source, labels: str) -> list[str]:
    """Return the class of every entry as it is spelled; arguments are those of `label_entries`."""
    if labels in READERS:
        return list(READERS[labels](source)[0])
    return list(map(str, _look_up(_read_table(labels, source), source, labels)))


def _read_table(path: str, source: Source) -> dict[str, int | str]:
    """Return the class of each name in a file of labels.

    Raises:
        ValueError: there is no such file, it cannot be read, or it contradicts itself.
    """
    where = f"--labels {path!r}"
    try:
        with open_binary(path) as file:
            text = file.read().decode("utf-8-sig")
        rows = PARSERS[os.path.splitext(path)[1].lower()](text, source)
    except FileNotFoundError:
        raise ValueError(f"{where} does not exist: name a .json or .csv file") from None
    except Exception as error:  # of the file system, the encoding, json, csv or this file
        raise ValueError(f"{where} cannot be read ({one_line(error)}): correct it") from error
    table = {}
    for name, value in rows:
        if table.setdefault(name, value) != value:
            raise ValueError(
                f"{where} gives {name!r} two classes, {table[name]!r} and {value!r}: keep one"
            )
    if not table:
        raise ValueError(f"{where} holds no labels: list [name, class] for each image")
    return table


def _parse_json(text: str, _source: Source) -> list[tuple[str, int | str]]:
    """Read {"name": class, ...}, [["name", class], ...] or {"labels": either}."""
    data = json.loads(text, object_pairs_hook=list)  # an object becomes pairs as well
    if not isinstance(data, list):
        raise ValueError("it is neither an object nor a list")
    for pair in data:
        if isinstance(pair, tuple) and pair[0] == "labels" and not isinstance(pair[1], int | str):
            data = pair[1] or []
            break
    return [_check_pair(pair) for pair in data]


def _parse_csv(text: str, source: Source) -> list[tuple[str, int | str]]:
    """Read rows name,class; the first may be a header."""
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if any(row)]
    pairs = [_check_pair([cell.strip() for cell in row]) for row in rows]
    if pairs and "." not in pairs[0][0] and pairs[0][0] not in set(source.names):
        pairs = pairs[1:]
    return pairs


PARSERS = {".json": _parse_json, ".csv": _parse_csv}


def _check_pair(pair: Sequence) -> tuple[str, int | str]:
    """Return a name with "/" between folders, and its class, an int or a string."""
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
        raise ValueError(f"{str(pair)[:80]!r} is not a name and a class")
    name, value = pair
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise ValueError(f"{name!r} has the class {str(value)[:80]!r}, no name or whole number")
    return name.replace("\\", "/").removeprefix("./"), value


def _whole_number(value: int | str) -> int | None:
    """Return the number that a class is or spells, or None."""
    if isinstance(value, int):
        return value
    return int(value[:30]) if re.fullmatch(r"-?[0-9]+", value) else None


def _look_up(table: dict[str, int | str], source: Source, path: str) -> list[int | str]:
    """Return the class of every entry, by its whole name or by its file name alone.

    Raises:
        ValueError: an entry has no class, or its file name is not the only one.
    """
    files = Counter(name.rsplit("/", 1)[-1] for name in source.names)
    found, missing, twofold = [], [], []
    for name in source.names:
        file_name = name.rsplit("/", 1)[-1]
        if name in table:
            found.append(table[name])
        elif file_name in table:
            found.append(table[file_name])
            twofold += [file_name] * (files[file_name] > 1)
        else:
            missing.append(name)
    if twofold:
        raise ValueError(
            f"--labels {path!r} names {twofold[0]!r}, but {source.describe()} holds "
            f"{files[twofold[0]]} of that name: write the path with its folders"
        )
    if missing:
        raise ValueError(
            f"--labels {path!r} gives no class for {len(missing)} of {len(source)} images, such as "
            f"{missing[0]!r}: add them (paths relative to {source.flag}), or remove these images"
        )
    return found
