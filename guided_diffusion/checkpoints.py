"""Checkpoint files: their names, their atomic writing, and the flags beside them.

A training run leaves `modelNNNNNN.pt`, `ema_RATE_NNNNNN.pt`, `optNNNNNN.pt` and, last of each set,
`stateNNNNNN.pt`, where NNNNNN is the number of steps done, and a file `X.json` with
the flags of the network and the process beside every `X.pt` that holds weights. Importing this
module imports no torch, so that flags can be checked at once.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from . import dist_util, weight_files
from .flag_checks import is_remote
from .launchers import first_line

if TYPE_CHECKING:
    from torch import Tensor, nn


# Beside the checkpoints: the class names by number, and a table with the number of images of each.
CLASSES, CLASS_COUNTS = "classes.txt", "classes.csv"


def model_name(step: int) -> str:
    """Return the file name of the weights after `step` steps."""
    return f"model{step:06d}.pt"


def ema_name(rate: float | str, step: int) -> str:
    """Return the file name of the weight average with `rate` after `step` steps."""
    return f"ema_{rate}_{step:06d}.pt"


def opt_name(step: int) -> str:
    """Return the file name of the optimizer's state after `step` steps."""
    return f"opt{step:06d}.pt"


def state_name(step: int) -> str:
    """Return the file name of the rest of the training state, which completes a set."""
    return f"state{step:06d}.pt"


def step_of(filename: str) -> int:
    """Return NNNNNN of `path/to/modelNNNNNN.pt`, and 0 where there is no such number."""
    match = re.fullmatch(r".*model(\d+)\.pt", os.path.basename(filename))
    return int(match.group(1)) if match else 0


def flags_path(path: str) -> str:
    """Return the path of the flags file of checkpoint `path`."""
    return f"{os.path.splitext(path)[0]}.json"


def join(folder: str, name: str) -> str:
    """Join a local or remote folder and a name."""
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def exists(path: str) -> bool:
    """Tell whether there is a file `path`, local or remote."""
    return _remote("exists", path) if is_remote(path) else os.path.isfile(path)


def names_in(folder: str) -> list[str]:
    """Return the names of the files in a local or remote folder, sorted; none if there is none."""
    if is_remote(folder):
        return sorted(_remote("listdir", folder)) if _remote("isdir", folder) else []
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def size_of(path: str) -> int | None:
    """Return the size of a local or remote file in bytes, None if there is none."""
    if not exists(path):
        return None
    return _remote("stat", path).size if is_remote(path) else os.path.getsize(path)


def digest(path: str) -> str:
    """Return the SHA-256 of a local or remote file, in hexadecimal."""
    total = hashlib.sha256()
    with _remote("BlobFile", path, "rb") if is_remote(path) else open(path, "rb") as file:
        while block := file.read(2**20):
            total.update(block)
    return total.hexdigest()


def remove(path: str) -> None:
    """Remove a local or remote file, if it is there."""
    if exists(path):
        _remote("remove", path) if is_remote(path) else os.remove(path)


def make_folder(folder: str) -> None:
    """Make a local folder, if it is not there; remote ones need not be made.

    Raises:
        ValueError: if it cannot be made.
    """
    if not is_remote(folder):
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"the folder {folder} cannot be made ({error.strerror}): choose another one"
            ) from error


def _remote(name: str, path: str, *arguments: Any) -> Any:
    """Call one of blobfile's functions."""
    try:
        import blobfile

        return getattr(blobfile, name)(path, *arguments)
    except Exception as error:  # each storage service brings errors of its own
        raise ValueError(
            f"{path} cannot be reached ({first_line(error)}): check the address, and your access"
        ) from error


def write_bytes(path: str, content: bytes) -> None:
    """Write a local or remote file as `write_file` does."""
    write_file(path, lambda file: file.write(content))


def write_file(path: str, write: Callable[[Any], None], durable: bool = True) -> None:
    """Write a file so that `path` never holds half of it, even if the machine loses its power.

    Args:
        path: local or remote.
        write: fills an open binary file.
        durable: wait until the disk has it; else the file of a machine that loses its power may
            be missing or empty.

    Raises:
        OSError: if it cannot be written; one line that names it. No temporary file is left then.
    """
    try:
        _write_remote(path, write) if is_remote(path) else _write_local(path, write, durable)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise OSError(
            f"{path} cannot be written ({_why(error, path)}): make room there, or choose another "
            "folder; what was there before is as it was"
        ) from error


def reason_of(error: BaseException) -> str:
    """Return why a file cannot be written, in the words of the system if it has any.

    Args:
        error: what `write_file` or `make_folder` raised, or what the system did.
    """
    cause = error.__cause__ or error
    return getattr(cause, "strerror", None) or first_line(cause)


def temporary_name(path: str) -> str:
    """Return the name under which this process writes a file before it gets its own."""
    return f"{path}.tmp{os.getpid()}"


def touch(path: str) -> None:
    """Make an empty local file."""
    with open(path, "wb"):
        pass


def _why(error: Exception, path: str) -> str:
    """Return the reason why a file cannot be written, in the words of the system if it has any."""
    cause: BaseException | None = error
    while cause is not None:
        if getattr(cause, "errno", None):
            return os.strerror(cause.errno)
        cause = cause.__context__
    folder = os.path.dirname(path) or "."
    if os.path.isdir(folder) and shutil.disk_usage(folder).free < 2**20:
        return os.strerror(errno.ENOSPC)
    return first_line(error)


def _write_remote(path: str, write: Callable[[Any], None]) -> None:
    with _remote("BlobFile", path, "wb") as file:
        write(file)


def _write_local(path: str, write: Callable[[Any], None], durable: bool) -> None:
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.remove(temporary)
        raise
    if durable:
        _sync_folder(os.path.dirname(path) or ".")


def _sync_folder(folder: str) -> None:
    """Make a renaming last; some file systems know no such thing for folders."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save(path: str, state: Any) -> None:
    """Save tensors at `path`, atomically, in the format that its ending tells."""
    write_file(path, lambda file: weight_files.save(file, path, state))


def save_flags(path: str, flags: dict[str, Any]) -> None:
    """Write the flags file of checkpoint `path`."""
    text = json.dumps(flags, indent=1, sort_keys=True) + "\n"
    write_bytes(flags_path(path), text.encode())


def load_flags(path: str) -> dict[str, Any]:
    """Read the flags beside checkpoint `path`; an empty dict if there is no such file.

    Raises:
        ValueError: if the file is not a JSON object.
    """
    name = flags_path(path)
    if not exists(name):
        return {}
    try:
        flags = json.loads(read_file(name))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON ({error}); restore or remove it") from error
    if not isinstance(flags, dict):
        raise ValueError(f"{name} must hold a JSON object of flags; restore or remove it")
    return flags


def read_file(path: str) -> bytes:
    """Return the bytes of a local or remote file."""
    if is_remote(path):
        with _remote("BlobFile", path, "rb") as file:
            return file.read()
    with open(path, "rb") as file:
        return file.read()


def read_class_names(path: str) -> list[str]:
    """Return the lines of a classes.txt; file names need not be valid text."""
    return read_file(path).decode(errors="surrogateescape").removesuffix("\n").split("\n")


def kind_of(flags: dict[str, Any]) -> str:
    """Return what a flags file describes: an upsampler, a classifier or a diffusion model."""
    if "large_size" in flags:
        return "upsampler"
    return "classifier" if "classifier_width" in flags else "diffusion model"


def read_weights(
    model: nn.Module, path: str, hint: str = "", mmap: bool = False
) -> dict[str, Tensor]:
    """Read the weights of `model` from checkpoint `path`. Every rank reads for itself.

    Args:
        model: the network that they must fit; it may be on the meta device.
        path: a state dict, as `save` or the published code wrote it.
        hint: what to do about weights of another network.
        mmap: map the file into memory if that is possible, for weights that are copied at once.

    Raises:
        ValueError: if the file cannot be read or its tensors do not fit the network.
    """
    weights = read_tensors(path, mmap)
    problem = _mismatch(model.state_dict(), weights)
    if problem:
        raise ValueError(f"{path} does not fit the network of these flags: {problem}{hint}")
    return weights


def read_tensors(path: str, mmap: bool = False) -> dict[str, Tensor]:
    """Read a file that must hold a state dict; see `read_weights`."""
    import torch

    weights = dist_util.load_state_dict(path, map_location="cpu", mmap=mmap)
    good = isinstance(weights, dict) and weights and all(map(torch.is_tensor, weights.values()))
    if not good or not all(isinstance(name, str) for name in weights):
        raise ValueError(
            f"{path} holds no weights: give a modelNNNNNN.pt or ema_RATE_NNNNNN.pt, not the "
            "optimizer's or another file"
        )
    return weights


def load_weights(model: nn.Module, path: str, hint: str = "") -> None:
    """Load checkpoint `path` into `model`; see `read_weights`."""
    model.load_state_dict(read_weights(model, path, hint, mmap=True))


def load_what_fits(model: nn.Module, path: str) -> tuple[int, list[str]]:
    """Load the tensors of checkpoint `path` that `model` has, too, with the same shape.

    Returns:
        the number of tensors that were loaded, and a phrase for each that was not.

    Raises:
        ValueError: if the file cannot be read, or nothing in it fits.
    """
    mine, weights = model.state_dict(), read_tensors(path, mmap=True)
    fitting = {k: v for k, v in weights.items() if k in mine and v.shape == mine[k].shape}
    if not fitting:
        raise ValueError(f"--init_from {path} has no tensor that fits the network of these flags")
    model.load_state_dict(fitting, strict=False)
    left = [
        f"{name} ({list(weights[name].shape)} there, {list(mine[name].shape)} here)"
        if name in weights else f"{name} (not there)"
        for name in mine.keys() - fitting.keys()
    ]  # fmt: skip
    return len(fitting), sorted(left) + [f"{name} (not here)" for name in weights.keys() - mine]


def _mismatch(expected: dict[str, Any], found: dict[str, Any]) -> str | None:
    """Describe the first difference between two state dicts, or return None."""
    for name, tensor in expected.items():
        if name not in found:
            return f"it has no {name}"
        if found[name].shape != tensor.shape:
            return f"{name} is {list(found[name].shape)} there, {list(tensor.shape)} here"
    extra = [name for name in found if name not in expected]
    return f"it also has {extra[0]}" if extra else None
