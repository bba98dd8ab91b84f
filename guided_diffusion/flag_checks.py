"""What is wrong with the value of a flag: each check returns a phrase, or None for a good value.

The message that reaches the user is "--flag value" and the phrase, so a phrase names the remedy.
"""

import argparse
import os
import re
from collections.abc import Callable
from typing import Any

LARGEST = 10**6  # number in a list of levels or sizes; beyond it no network can be built

Check = Callable[[Any], "str | None"]  # value -> what is wrong with it, or None


def str2bool(v: Any) -> bool:
    """Read yes/true/t/y/1 or no/false/f/n/0, in any case.

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    if isinstance(v, bool):
        return v
    if v.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if v.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, got {v!r}")


def at_least(low: float) -> Check:
    """Accept numbers from `low` on."""
    return lambda value: None if value >= low else f"must be at least {low}"


def count(most: int, least: int = 1) -> Check:
    """Accept whole numbers from `least` to `most`."""

    def check(value: int) -> str | None:
        """Judge a number."""
        if value < least:
            return f"must be at least {least}"
        return None if value <= most else f"must be at most {most}"

    return check


def above(low: float, most: float = float("inf")) -> Check:
    """Accept numbers greater than `low`, up to `most`."""

    def check(value: float) -> str | None:
        """Judge a number."""
        if not value > low:
            return f"must be greater than {low}"
        return None if value <= most else f"must be at most {most:g}"

    return check


def between(low: float, high: float) -> Check:
    """Accept numbers from `low` to `high`."""
    return lambda value: None if low <= value <= high else f"must lie between {low} and {high}"


def fraction(value: float) -> str | None:
    """Accept 0 <= value < 1."""
    return None if 0 <= value < 1 else "must lie in [0, 1)"


def one_of(*choices: Any) -> Check:
    """Accept the given values."""
    names = ", ".join(str(choice) for choice in choices if choice != "")
    return lambda value: None if value in choices else f"must be one of {names}"


def or_unset(unset: float, check: Check) -> Check:
    """Accept `unset`, and what `check` accepts."""

    def either(value: float) -> str | None:
        """Judge a number."""
        problem = None if value == unset else check(value)
        return problem and f"{problem}, or be {unset:g}"

    return either


def count_or_unset(value: int) -> str | None:
    """Accept a positive count, or -1 for none."""
    return (
        None if value == -1 or 0 < value <= 10**6 else "must be positive, or -1 to leave it unset"
    )


def list_of(kind: type, example: str) -> Check:
    """Accept comma-separated numbers from 0 on, 0 excluded (or an empty string)."""

    def check(value: str) -> str | None:
        """Judge a text."""
        try:
            good = all(0 < kind(item) <= LARGEST for item in value.split(",")) if value else True
        except ValueError:
            good = False
        return None if good else f"must be positive numbers with commas between, such as {example}"

    return check


def read_interval(value: str) -> tuple[float, float] | None:
    """Read "LO,HI" as two numbers, "" as None.

    Raises:
        ValueError: if it is something else, or not 0 <= LO < HI; HI may be inf.
    """
    if not value:
        return None
    low, high = (float(item) for item in value.split(","))
    if not 0 <= low < high:
        raise ValueError(f"not 0 <= {low} < {high}")
    return low, high


def interval(value: str) -> str | None:
    """Accept "LO,HI" with 0 <= LO < HI, or an empty string."""
    try:
        read_interval(value)
    except ValueError:
        return "must be two sigmas with a comma between, 0 <= LO < HI, such as 0.3,5 or 0,inf"
    return None


def ema_rates(value: str) -> str | None:
    """Accept comma-separated rates in [0, 1], or an empty string for no average."""
    try:
        good = not value or all(0 <= float(item) <= 1 for item in value.split(","))
    except ValueError:
        good = False
    return None if good else "must be rates between 0 and 1, such as 0.999,0.9999"


def class_list(value: str) -> str | None:
    """Accept comma-separated class numbers or names (or an empty string)."""
    items = [item.strip() for item in value.split(",")] if value else []
    if not all(items):
        return "must be class numbers or names with commas between, such as 207,360"
    negative = next((item for item in items if re.fullmatch(r"-\d+", item, re.ASCII)), None)
    return f"holds {negative}: classes are numbered from 0 on" if negative else None


def respacing(value: str) -> str | None:
    """Accept "250", "10,20,30", "ddim25" or an empty string; what fits the chain shows later."""
    good = re.fullmatch(r"ddim\s*\d+|\s*\d+\s*(,\s*\d+\s*)*", value, re.ASCII) or not value
    return None if good else "must be a number of steps, such as 250 or ddim25, or 10,20,30"


def device_name(value: str) -> str | None:
    """Accept cpu, cuda, cuda:N, mps or an empty string; whether there is one shows later."""
    good = re.fullmatch(r"cpu|cuda(:\d+)?|mps|", value, re.ASCII)
    return None if good else "must be cpu, cuda, cuda:N or mps"


def is_remote(path: str) -> bool:
    """Tell addresses that blobfile opens (gs://, az://, https://) from local paths."""
    return "://" in path


def checkpoint_file(value: str) -> str | None:
    """Accept a file, an address or an empty string."""
    remedy = "give a checkpoint file, such as model010000.pt"
    return _file(value, remedy)


def npz_file(value: str) -> str | None:
    """Accept a file, an address or an empty string."""
    return _file(value, "give an npz file, such as samples_100x64x64x3.npz")


def _file(value: str, remedy: str) -> str | None:
    if not value or is_remote(value) or os.path.isfile(value):
        return None
    return f"{'is a folder' if os.path.isdir(value) else 'does not exist'}: {remedy}"


def checkpoint_source(value: str) -> str | None:
    """Accept a file, a folder, an address, "auto" or an empty string."""
    if value in ("", "auto") or is_remote(value) or os.path.exists(os.path.expanduser(value)):
        return None
    return "does not exist: give a modelNNNNNN.pt, the folder of a run, or auto"


def image_source(value: str) -> str | None:
    """Accept a folder, a zip, an npz, an address or an empty string; what is in it shows later."""
    if not value or is_remote(value) or os.path.isdir(value):
        return None
    if not os.path.exists(value):
        return "does not exist: name the folder of the images, a zip or an npz"
    known = value.lower().endswith((".zip", ".npz"))
    return None if known else "is a file, but no zip or npz: name the folder of the images"


def label_source(value: str) -> str | None:
    """Accept "filename", "folder" or a JSON or CSV file."""
    if value in ("filename", "folder"):
        return None
    if not value.lower().endswith((".json", ".csv")):
        return "must be filename, folder, or the path of a .json or .csv file"
    return None if is_remote(value) or os.path.isfile(value) else "does not exist: give its path"


LABEL_LISTS = (".txt", ".csv", ".json", ".npy", ".npz")


def label_list(value: str) -> str | None:
    """Accept the path of a list of labels, or an empty string; what is in it shows later."""
    if value and not value.lower().endswith(LABEL_LISTS):
        return f"must be a file ending in {', '.join(LABEL_LISTS)}"
    return _file(value, "give the path of a list of classes")


# Masks by name -> what is drawn anew, as shares of the height (from, to) and of the width (from,
# to): the pixels i of n with from * n <= i < to * n.
MASKS = {
    "centre": (0.25, 0.75, 0.25, 0.75),
    "left": (0.0, 1.0, 0.0, 0.5),
    "right": (0.0, 1.0, 0.5, 1.0),
    "top": (0.0, 0.5, 0.0, 1.0),
    "bottom": (0.5, 1.0, 0.0, 1.0),
}


def mask_source(value: str) -> str | None:
    """Accept a name in MASKS, a file, an address or an empty string."""
    names = f"give a PNG that is white where to draw anew, or one of {', '.join(MASKS)}"
    return None if value in MASKS else _file(value, names)


def output_file(*endings: str) -> Check:
    """Accept a local path with one of some endings, in a folder that can be written, or ""."""

    def check(value: str) -> str | None:
        """Judge a text."""
        if not value:
            return None
        if not value.lower().endswith(endings):
            return f"must end in {' or '.join(endings)}"
        if os.path.isdir(value):
            return "is a folder: give the name of a file in it"
        return output_folder(os.path.dirname(value) or ".")

    return check


def output_folder(value: str) -> str | None:
    """Accept a folder that can be written or made, or an empty string."""
    if not value:
        return None
    if is_remote(value):
        return "is not a local path: choose a folder on this machine"
    path = os.path.abspath(os.path.expanduser(value))
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    if not os.path.isdir(path):
        return f"cannot be a folder, since {path} is a file: choose another"
    if not os.access(path, os.W_OK | os.X_OK):
        return f"cannot be written, since {path} is not yours to write into: choose another"
    return None


png_file = output_file(".png")
weights_file = output_file(".pt", ".safetensors")

PATHS = (
    checkpoint_file, checkpoint_source, npz_file, image_source, label_source, label_list,
    mask_source, output_folder, png_file, weights_file,
)  # fmt: skip
