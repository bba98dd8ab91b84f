"""Where the weights of Inception-v3 come from: a file that is given, kept or downloaded.

The file is TensorFlow's graph or one of two known conversions of it to PyTorch; its content tells
which. Nothing in it is ever run. Its SHA-256 is printed, and kept beside it in the cache.
"""

import os
from contextlib import suppress
from typing import Any

import torch

from guided_diffusion import checkpoints, dist_util, downloads

from .graph_reader import read_constants
from .inception import Inception

GRAPH = "classify_image_graph_def.pb"
URL = f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/{GRAPH}"
NUM_BYTES = 95_673_916  # of the graph
CONVERSIONS = (
    "pt_inception-2015-12-05-6726825d.pth",  # of pytorch-fid
    "weights-inception-2015-12-05-6726825d.pth",  # of torch-fidelity
)
CACHE = "GUIDED_DIFFUSION_CACHE"  # the variable that names the folder of kept files
TORCH_STARTS = (b"PK", b"\x80")  # how the two formats of torch.save begin


def load_inception(path: str | None = None, device: torch.device | str | None = None) -> Inception:
    """Return the network. All ranks call this; rank 0 downloads what is not there, and prints.

    Args:
        path: of classify_image_graph_def.pb, or of the conversion of pytorch-fid or of
            torch-fidelity. None takes one of these from `cache_folder()`, and downloads the graph
            into it on first use.
        device: where to compute; None means this rank's.

    Raises:
        ValueError: there is no such file, it cannot be downloaded, is damaged or another network,
            or has changed since its first use. One line that says what to do.
    """
    path = dist_util.share("the weights of Inception-v3", lambda: find_weights(path))
    digest = _digest(path)
    weights = read_file(path)
    try:
        model = Inception(weights)
    except ValueError as error:
        raise ValueError(
            f"{path} does not hold the Inception-v3 of 2015: {error}; {_advice()}"
        ) from error
    if dist_util.is_main():
        _remember(path, digest)
    model.source, model.digest = path, digest
    return model.to(device or dist_util.dev())


# --------------------------------------------------------------------------------------------
# Finding


def cache_folder() -> str:
    """Return the folder of kept files: $GUIDED_DIFFUSION_CACHE, else one for this user."""
    user = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    folder = os.environ.get(CACHE) or os.path.join(user, "guided-diffusion")
    return os.path.abspath(os.path.expanduser(folder))


def find_weights(path: str | None = None) -> str:
    """Return the path of a file of weights: the given one, a kept one, or one downloaded now.

    Raises:
        ValueError: the given one is not there, or the download fails.
    """
    if path is not None:
        path = os.path.abspath(os.path.expanduser(path))
        if not os.path.isfile(path):
            raise ValueError(f"--inception {path} is no file: {_advice()}")
        return path
    kept = [os.path.join(cache_folder(), name) for name in (GRAPH, *CONVERSIONS)]
    found = next(filter(os.path.isfile, kept), None)
    if found is None:
        found = kept[0]
        elsewhere = f"set ${CACHE} to another folder"
        downloads.download(
            downloads.Wanted(URL, NUM_BYTES, remedy=_advice(), elsewhere=elsewhere), found
        )
    return found


def _advice() -> str:
    return (
        f"download {URL} and put it into {cache_folder()}, or give its place with --inception; "
        f"pytorch-fid's {CONVERSIONS[0]} and torch-fidelity's {CONVERSIONS[1]} serve as well"
    )


# --------------------------------------------------------------------------------------------
# Reading


def read_file(path: str) -> dict[str, Any]:
    """Return the tensors of a file by the names that they have in it.

    Raises:
        ValueError: it cannot be read, or is neither a TensorFlow graph nor a state dict.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(2)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}) on every rank") from error
    if not start.startswith(TORCH_STARTS):
        return read_constants(path)
    weights = dist_util.load_state_dict(path, map_location="cpu", mmap=True)
    if not isinstance(weights, dict):
        raise ValueError(f"{path} holds no state dict but one {type(weights).__name__}")
    return {name: value for name, value in weights.items() if torch.is_tensor(value)}


def _digest(path: str) -> str:
    """Return the SHA-256 of a file, which must be what it was at its first use."""
    try:
        digest = checkpoints.digest(path)
        kept = f"{path}.sha256"
        known = (
            checkpoints.read_file(kept).decode(errors="replace").split()
            if os.path.exists(kept)
            else []
        )
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from error
    if known and known[0] != digest:
        raise ValueError(
            f"{path} has SHA-256 {digest}, but at its first use it had {known[0][:64]}: remove it, "
            f"or {kept} if you changed it yourself"
        )
    return digest


def _remember(path: str, digest: str) -> None:
    """Print the SHA-256 of a good file, and keep it beside a file in the cache."""
    line = f"{digest}  {os.path.basename(path)}"
    print(f"{digest}  {path}", flush=True)
    if os.path.dirname(path) == cache_folder() and not os.path.exists(f"{path}.sha256"):
        with suppress(OSError):  # a folder that others may not change needs no memory
            checkpoints.write_bytes(f"{path}.sha256", f"{line}\n".encode())
