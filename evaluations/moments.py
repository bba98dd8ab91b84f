"""Mean and covariance of features that come in parts, of which none is kept.

Updates and merges follow Chan, Golub and LeVeque (1979): the scatter of a union is that of its
parts and that between their means. Nothing is ever squared before its mean is subtracted, so a
common offset costs hardly a digit.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from .checks import check_table


class Moments:
    """Number, mean and scatter of the rows seen so far, in float64.

    Attributes:
        count: the number N of rows.
        mean: [D].
        scatter: [D, D], the sum over the rows x of (x - mean) (x - mean)^T.
    """

    def __init__(self, dim: int):
        self.count = 0
        self.mean = np.zeros(dim)
        self.scatter = np.zeros((dim, dim))

    def add(self, features: ArrayLike, name: str = "features") -> None:
        """Add rows [n, D]; `name` is what an error calls them.

        Raises:
            ValueError: they are no table of finite numbers with D columns.
        """
        features = check_table(features, name).astype(np.float64)
        if features.shape[1] != len(self.mean):
            raise ValueError(f"{name} has {features.shape[1]} columns, not {len(self.mean)}")
        count, mean = len(features), features.mean(axis=0)
        features -= mean
        # The scatter between the means is that of one more row: so there is but one product.
        between = (mean - self.mean) * (self.count * count / (self.count + count)) ** 0.5
        rows = np.concatenate([features, between[None]])
        self._join(count, mean, rows.T @ rows)

    def merge(self, other: Moments) -> None:
        """Add the rows that another one has seen, which stays as it is."""
        assert other.mean.shape == self.mean.shape, (other.mean.shape, self.mean.shape)
        if other.count:
            shift = other.mean - self.mean
            weight = self.count * other.count / (self.count + other.count)
            self.scatter += np.outer(shift * weight, shift)
            self._join(other.count, other.mean, other.scatter)

    def _join(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        self.scatter += scatter
        self.count += count
        self.mean += (mean - self.mean) * (count / self.count)

    def covariance(self) -> np.ndarray:
        """Return the covariance [D, D], with N - 1 below.

        Raises:
            ValueError: fewer than two rows were seen.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 images or more, got {self.count}")
        return self.scatter / (self.count - 1)


def merged(parts: Iterable[Moments]) -> Moments:
    """Return the moments of all rows of some parts, of which there is at least one.

    Parts may be made one by one: none is kept after it has been added.
    """
    whole = None
    for part in parts:
        whole = whole or Moments(len(part.mean))
        whole.merge(part)
        del part  # before the next one is made
    assert whole is not None, "no parts"
    return whole
