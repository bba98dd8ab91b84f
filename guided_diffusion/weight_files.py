"""Files of tensors, torch's own and .safetensors: reading one never runs anything.

The names of a state dict keep their order, which optimizers and fp16 training count on. A
.safetensors file sorts its tensors by type, so the order stands in its metadata under "names".
Importing this module imports no torch.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import warnings
import zipfile
from contextlib import suppress
from typing import TYPE_CHECKING, Any, BinaryIO

from .launchers import first_line

if TYPE_CHECKING:
    from torch import Tensor

ENDING = ".safetensors"
EXPECTED = "expected tensors alone, as torch.save(model.state_dict(), path) writes them"

# What is often saved under a checkpoint's name -> how it begins.
STARTS = {
    "a pointer of git-lfs (git lfs pull fetches the file)": b"version https://git-lfs",
    "a web page": b"<",
    "an image": (b"\x89PNG", b"\xff\xd8\xff", b"GIF8"),
    "compressed (unpack it first)": (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"),
}


def is_safetensors(path: str | os.PathLike) -> bool:
    """Tell by its name which format a file has."""
    return os.fspath(path).lower().endswith(ENDING)


# Reading


def load(path: str | os.PathLike, **kwargs: Any) -> Any:
    """Read a file of tensors; see `dist_util.load_state_dict`."""
    file = _read_remote(str(path)) if "://" in str(path) else os.path.expanduser(path)
    if isinstance(file, str) and not os.path.isfile(file):
        what = "is a folder" if os.path.isdir(file) else "does not exist"
        raise ValueError(f"{path} {what}; expected a checkpoint file such as model000000.pt")
    if is_safetensors(path):
        return _load_safetensors(path, file, kwargs.get("map_location") or "cpu")
    import torch

    try:
        return _load_torch(file, {"map_location": "cpu", "weights_only": True, **kwargs})
    except torch.OutOfMemoryError:
        raise
    except (OSError, EOFError, LookupError, ValueError, RuntimeError, pickle.PickleError) as error:
        raise ValueError(f"{path} {_explain_refusal(error, file)}; {EXPECTED}") from error


def _load_torch(file: str | io.BytesIO, options: dict[str, Any]) -> Any:
    """Call torch.load, without `mmap` where it cannot map: addresses and files of old torches."""
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol|'torch.load' received a zip")
        if options.get("mmap") and isinstance(file, str):
            with suppress(RuntimeError, ValueError):
                return torch.load(file, **options)
        return torch.load(file, **options | {"mmap": False})


def _read_remote(path: str) -> io.BytesIO:
    """Fetch a remote file through blobfile."""
    try:
        import blobfile

        with blobfile.BlobFile(path, "rb") as file:
            return io.BytesIO(file.read())
    except Exception as error:  # each storage service brings errors of its own
        raise ValueError(
            f"{path} cannot be read ({first_line(error)}); download it and give its local path"
        ) from error


def _explain_refusal(error: Exception, file: str | io.BytesIO) -> str:
    """Say what is wrong with a file that torch.load refused."""
    code = re.search(r"(?:Unsupported|GLOBAL|class) \S*?([\w.]+\.\w+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and code:
        return f"holds Python objects ({code.group(1)}) that could run code"
    kind = _recognize(file)
    if kind:
        return f"is {kind}, not written by torch.save"
    if isinstance(error, pickle.UnpicklingError | LookupError | EOFError):
        return "is empty, cut short or not written by torch.save"
    return f"cannot be read, it may be cut short ({first_line(error).split('. ')[0]})"


def _recognize(file: str | io.BytesIO) -> str | None:
    """Say what else a file is, judged by how it begins and, of a zip, by the names in it."""
    try:
        with open(file, "rb") if isinstance(file, str) else io.BytesIO(file.getvalue()) as stream:
            start = stream.read(64)
            if start[8:10] == b'{"':
                return f"a file of safetensors (rename it to {ENDING})"
            if not start.startswith(b"PK"):
                start = start.lstrip()
                return next((what for what, sign in STARTS.items() if start.startswith(sign)), None)
            with zipfile.ZipFile(stream) as archive:
                names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return None
    ends = {os.path.splitext(name)[1] for name in names}
    if any("/code/" in name for name in names):
        return "a TorchScript program"
    return "a zip of arrays or other files" if ".pkl" not in ends else None


# .safetensors


def _safetensors(path: str | os.PathLike) -> Any:
    """Import the package that reads and writes `path`."""
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError(
            f"{path} needs the package safetensors, which is missing: pip install safetensors"
        ) from None
    return safetensors.torch


def _load_safetensors(
    path: str | os.PathLike, file: str | io.BytesIO, device: Any
) -> dict[str, Tensor]:
    """Read a .safetensors file, its names in the order in which they were saved."""
    package = _safetensors(path)
    try:
        if isinstance(file, str):
            weights = package.load_file(file)
            with open(file, "rb") as stream:
                header = _read_header(stream)
        else:
            weights, header = package.load(file.getvalue()), _read_header(file)
    except MemoryError:
        raise
    except Exception as error:  # the package's own, torch's and the system's
        raise ValueError(
            f"{path} is no whole {ENDING} file ({first_line(error)}): make or download it again"
        ) from error
    return {name: weights[name].to(device) for name in _saved_order(header)}


def _read_header(stream: BinaryIO) -> dict[str, Any]:
    """Read the table at the front of a file that the package has accepted."""
    size = int.from_bytes(stream.read(8), "little")
    return json.loads(stream.read(size))


def _saved_order(header: dict[str, Any]) -> list[str]:
    """Return the names of the tensors as they were saved, else as they lie in the file."""
    metadata = header.pop("__metadata__", None) or {}
    lying = sorted(header, key=lambda name: header[name]["data_offsets"])
    try:
        names = json.loads(metadata.get("names", "null"))
        return names if sorted(names) == sorted(lying) else lying
    except (ValueError, TypeError, RecursionError):  # written by a program that knows no order
        return lying


def save(file: BinaryIO, path: str | os.PathLike, state: Any) -> None:
    """Write tensors into an open file, in the format that the name `path` tells.

    Args:
        file: opened for writing bytes.
        path: the name that it will get.
        state: for .safetensors a dictionary of dense tensors, else whatever torch.save takes.

    Raises:
        ValueError: if `state` does not fit into the format, or its package is missing.
    """
    if not is_safetensors(path):
        import torch

        torch.save(state, file)
        return
    package = _safetensors(path)
    try:
        tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
        metadata = {"format": "pt", "names": json.dumps(list(tensors))}
        content = package.save(_unshare(tensors), metadata)
    except MemoryError:
        raise
    except Exception as error:  # the package's own, and Python's of what are no tensors
        raise ValueError(
            f"{path} can hold a dictionary of dense tensors alone ({first_line(error)}): save "
            "anything else as .pt"
        ) from error
    file.write(content)


def _unshare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that lie in the memory of another, of which the format knows nothing."""
    seen: set[int] = set()
    alone = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        alone[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return alone
