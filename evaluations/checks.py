"""What features must be before anything is computed from them: a table of finite numbers."""

import numpy as np
from numpy.typing import ArrayLike

ROWS = 4096  # that are looked at together


def check_table(features: ArrayLike, name: str, min_rows: int = 1) -> np.ndarray:
    """Return features as an array [N, D], uncopied if they are one, in whatever type they have.

    Args:
        features: numbers; also an np.memmap, of which a part at a time is read.
        name: what an error calls them.
        min_rows: how many rows there must be.

    Raises:
        ValueError: they are no table of finite numbers with so many rows.
    """
    table = np.asarray(features)
    if table.ndim != 2 or len(table) < min_rows or table.shape[1] == 0:
        raise ValueError(f"{name} must be [N, D] with N >= {min_rows}, got {list(table.shape)}")
    if table.dtype.kind not in "fiub":
        raise ValueError(f"{name} must be real numbers, got {table.dtype}")
    broken = sum(count_broken(table[i : i + ROWS]) for i in range(0, len(table), ROWS))
    if broken:
        raise ValueError(
            f"{name} has {broken} values that are not finite: look at the images "
            "with such pixels, or at the network that read them"
        )
    return table


def check_same_width(reference: np.ndarray, sample: np.ndarray) -> None:
    """Raise a ValueError if two tables differ in D."""
    if reference.shape[1] != sample.shape[1]:
        raise ValueError(
            f"reference has {reference.shape[1]} features, sample {sample.shape[1]}: both sets "
            "must come from the same network"
        )


def count_broken(array: np.ndarray) -> int:
    """Return how many numbers of an array are infinite or none."""
    return int((~np.isfinite(array)).sum())
