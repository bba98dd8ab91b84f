"""Networks whose blocks run as compiled kernels (--compile).

torch.compile takes one block at a time, in place: weights, their names and files stay as they are,
blocks of the same shape share their kernels, and what is in no block, such as the embedding of t,
stays as it is written. The work is done when a block first meets a shape, and torch keeps the
kernels on the disk for the next run.
"""

import os
import shutil
import sys
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from . import logger
from .sharding import blocks_of

MOST_SHAPES = 4096  # of all blocks together; torch gives up at a few
LIMITS = (  # of torch, by the newer and the older names
    "recompile_limit", "accumulated_recompile_limit",
    "cache_size_limit", "accumulated_cache_size_limit",
)  # fmt: skip
# The one that torch takes.
COMPILER = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def compile_blocks(network: nn.Module, **options: Any) -> None:
    """Let each block of a network run as compiled kernels from its next call on.

    Args:
        network: a network of `unet`, on its device.
        options: of `torch.compile`, such as `backend` or `mode`.

    Raises:
        ValueError: on the CPU, if there is no C++ compiler.
    """
    on_cpu = next(network.parameters()).device.type == "cpu"
    if on_cpu and options.get("backend", "inductor") == "inductor" and not shutil.which(COMPILER):
        raise ValueError(
            f"--compile True needs a C++ compiler for networks on the CPU: install {COMPILER}, "
            "or leave the flag out"
        )
    dynamo = torch._dynamo.config
    for limit in LIMITS:
        if hasattr(dynamo, limit):
            setattr(dynamo, limit, max(getattr(dynamo, limit), MOST_SHAPES))
    dynamo.optimize_ddp = False  # which would split what is compiled; it is in blocks already
    parts = [*blocks_of(network), network.out]
    for part in parts:
        part.compile(dynamic=False, **options)
    logger.log(
        f"--compile True: {len(parts)} blocks are compiled in their first calls, which takes up to "
        "minutes, and less in the next run"
    )


def as_written() -> AbstractContextManager:
    """Return a block in which networks run as they are written, though they are compiled.

    For a few calls with a shape of their own, which is not worth a compilation.
    """
    return torch.compiler.set_stance("force_eager")
