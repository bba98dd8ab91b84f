"""Networks whose blocks run as compiled kernels (--compile).

torch.compile takes one block at a time, in place: weights, their names and files stay as they are,
blocks of the same shape share their kernels, and what is in no block, such as the embedding of t,
stays as it is written. The work is done when a block first meets a shape, and torch keeps the
kernels on the disk for the next run.
"""

import os
import shutil
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from . import logger
from .sharding import blocks_of

MOST_SHAPES = 512  # of all blocks together; torch gives up at a few


def compile_blocks(network: nn.Module, **options: Any) -> None:
    """Let each block of a network run as compiled kernels from its next call on.

    Args:
        network: a network of `unet`, on its device.
        options: of `torch.compile`, such as `backend` or `mode`.

    Raises:
        ValueError: on the CPU, if there is no C++ compiler.
    """
    device = next(network.parameters()).device
    if device.type == "cpu" and not _compiler():
        raise ValueError(
            "--compile True needs a C++ compiler for networks on the CPU: install g++ or clang++, "
            "or leave the flag out"
        )
    dynamo = torch._dynamo.config
    for limit in ("recompile_limit", "cache_size_limit"):  # the newer and the older name
        if hasattr(dynamo, limit):
            setattr(dynamo, limit, max(getattr(dynamo, limit), MOST_SHAPES))
    parts = [*blocks_of(network), network.out]
    for part in parts:
        part.compile(dynamic=False, **options)
    logger.log(
        f"--compile True: {len(parts)} blocks are compiled in their first calls, which takes up to "
        "minutes, and less in the next run"
    )


def _compiler() -> str | None:
    """Return the path of the C++ compiler that torch would use."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next(filter(None, map(shutil.which, names)), None)


def as_written() -> AbstractContextManager:
    """Return a block in which networks run as they are written, though they are compiled.

    For a few calls with a shape of their own, which is not worth a compilation.
    """
    return torch.compiler.set_stance("force_eager")
