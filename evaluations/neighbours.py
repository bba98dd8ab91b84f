"""Scores by nearest neighbours: precision and recall, density and coverage. Exact, and fast.

Each point owns a ball that reaches to its k-th nearest neighbour in its own set. Whether a point
lies in a ball is what brute force in float64 says, sum((a - b)^2) <= radius^2, ties included. But
nearly all pairs are decided by one matrix product, |a|^2 + |b|^2 - 2 a b, together with a bound on
its rounding; differences are taken only for the few whose bounds enclose the radius.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .checks import check_same_width, check_table

BLOCK_SIZE = 1024
EPSILON = np.finfo(np.float64).eps
TINY = np.finfo(np.float64).tiny
IN_DIFFERENCES = 2**22  # numbers in an array of differences


def precision_recall(
    reference: ArrayLike,
    sample: ArrayLike,
    k: int = 3,
    block_size: int = BLOCK_SIZE,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Return improved precision and recall of features `sample` [M, D] against [N, D].

    Precision is the share of samples within some ball of the reference, recall the share of the
    reference within some ball of the samples (arXiv:1904.06991, eq. 1 and 2).

    Args:
        reference: features of real images.
        sample: features of generated images.
        k: which neighbour; the point itself does not count.
        block_size: so many by so many distances are in memory at once. The result does not depend
            on it.
        device: where the matrix products are made; it must know float64.

    Raises:
        ValueError: a set is no table of finite numbers with more than k rows, the sets differ in
            D, or k or the block size is no positive number.
    """
    real, ours = _check(reference, sample, k, block_size, device)
    balls_real, balls_ours = _radii(real, k), _radii(ours, k)
    covered_ours, covered_real = np.zeros(len(ours), bool), np.zeros(len(real), bool)
    for a in real.blocks():
        for b in ours.blocks():
            bounds = _bounds(a, b)
            covered_ours[b.where] |= _inside(a, b, bounds, balls_real[a.where, None]).any(axis=0)
            covered_real[a.where] |= _inside(a, b, bounds, balls_ours[None, b.where]).any(axis=1)
    return ours.share(covered_ours), real.share(covered_real)


def density_coverage(
    reference: ArrayLike,
    sample: ArrayLike,
    k: int = 5,
    block_size: int = BLOCK_SIZE,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Return density and coverage (Naeem et al. 2020, arXiv:2002.09797, eq. 4 and 5).

    Density is the number of balls of the reference around a sample, on average and over k: one
    outlier with its wide ball counts little, and more than 1 is possible. Coverage is the share of
    the reference whose balls hold a sample. Arguments and errors are those of `precision_recall`.
    """
    real, ours = _check(reference, sample, k, block_size, device)
    balls = _radii(real, k)
    num_inside, covered = 0, np.zeros(len(real), bool)
    for a in real.blocks():
        for b in ours.blocks():
            inside = _inside(a, b, _bounds(a, b), balls[a.where, None])  # [n, m]
            num_inside += int(real.counts[a.where] @ inside @ ours.counts[b.where])
            covered[a.where] |= inside.any(axis=1)
    return num_inside / (k * ours.counts.sum()), real.share(covered)


def _check(
    reference: ArrayLike,
    sample: ArrayLike,
    k: int,
    block_size: int,
    device: torch.device | str,
) -> tuple["_Points", "_Points"]:
    """Return both sets of points, or raise a ValueError."""
    if k < 1 or block_size < 1:
        raise ValueError(f"k and block_size must be at least 1, got {k} and {block_size}")
    reference = check_table(reference, "reference", min_rows=k + 1)
    sample = check_table(sample, "sample", min_rows=k + 1)
    check_same_width(reference, sample)
    centre = reference[:block_size].mean(axis=0, dtype=np.float64)
    return (
        _Points(reference, centre, block_size, device),
        _Points(sample, centre, block_size, device),
    )


# --------------------------------------------------------------------------------------------
# Points


@dataclass
class _Block:
    """Some points.

    Attributes:
        where: their places in the set.
        rows: as they are, float64 [n, D].
        centred: the same less a centre common to all, on the device: it takes a common offset,
            which would cost digits, out of the products.
        squares: the squared lengths of these [n].
    """

    where: slice
    rows: np.ndarray
    centred: Tensor
    squares: Tensor


class _Points:
    """The distinct points of a set, each with how often it occurs.

    A set may hold a point a thousand times, if a model draws one image over and over. As a
    thousand points these would leave the radius undecided for a million pairs.
    """

    def __init__(
        self, table: np.ndarray, centre: np.ndarray, block_size: int, device: torch.device | str
    ):
        self._table, self._centre = table, centre
        self._block_size, self._device = block_size, device
        digests = np.array(
            [blake2b(row.tobytes(), digest_size=16).digest() for row in table], "S16"
        )
        _, self._first, self.counts = np.unique(digests, return_index=True, return_counts=True)
        order = np.argsort(self._first)  # as in the table, where neighbours may be alike
        self._first, self.counts = self._first[order], self.counts[order]

    def __len__(self) -> int:
        return len(self._first)

    def share(self, chosen: np.ndarray) -> float:
        """Return the share of the set that some distinct points, a mask [n], stand for."""
        return int(self.counts[chosen].sum()) / int(self.counts.sum())

    def blocks(self, first: int = 0) -> Iterator[_Block]:
        """Yield the points block by block, from block number `first` on."""
        for start in range(first * self._block_size, len(self), self._block_size):
            where = slice(start, min(start + self._block_size, len(self)))
            rows = self._table[self._first[where]].astype(np.float64)
            # A difference of two numbers is exact to its own last digit, wherever the centre is.
            centred = torch.from_numpy(rows - self._centre).to(self._device)
            yield _Block(where, rows, centred, centred.square().sum(dim=1))


# --------------------------------------------------------------------------------------------
# Distances


class _Bounds:
    """Between what the squared distances of two blocks lie, as brute force rounds them.

    Attributes:
        lower: [n, m].
        upper: [n, m].
    """

    def __init__(self, lower: Tensor, upper: Tensor):
        self.lower, self.upper = lower, upper

    @cached_property
    def transposed(self) -> "_Bounds":
        """The bounds for the blocks in the other order."""
        return _Bounds(self.lower.T, self.upper.T)


def _bounds(a: _Block, b: _Block) -> _Bounds:
    """Return bounds on the squared distances of blocks of n and m points.

    With u = EPSILON / 2 and s = |a|^2 + |b|^2, the squares and the product are within 2 D u s of
    their values, and the sum of squared differences within 2 D u s of its own. A dozen single
    roundings remain, of centring and of adding up: 32 u s is more than these.
    """
    dim = a.centred.shape[1]
    sums = a.squares[:, None] + b.squares
    slack = sums * (2 * (dim + 8) * EPSILON) + dim * TINY
    near = torch.addmm(sums, a.centred, b.centred.T, alpha=-2)
    return _Bounds(near - slack, near + slack)


def _squared(a: _Block, b: _Block, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Return the squared distances [P] of points i [P] to points j [P], by differences."""
    step = max(1, IN_DIFFERENCES // a.rows.shape[1])
    found = np.empty(len(i))
    for at in (slice(start, start + step) for start in range(0, len(i), step)):
        found[at] = np.square(a.rows[i[at]] - b.rows[j[at]]).sum(axis=1)
    return found


def _inside(a: _Block, b: _Block, bounds: _Bounds, squared_radii: np.ndarray) -> np.ndarray:
    """Tell which pairs [n, m] are at most a radius apart, [n, 1] or [1, m]."""
    limits = torch.from_numpy(squared_radii).to(bounds.lower.device)
    inside = bounds.upper <= limits
    # Where numbers overflow no comparison holds, and the pair is open.
    i, j = torch.nonzero(~(inside | (bounds.lower > limits)), as_tuple=True)
    i, j, inside = i.cpu().numpy(), j.cpu().numpy(), inside.cpu().numpy()
    limits = np.broadcast_to(squared_radii, inside.shape)
    inside[i, j] = _squared(a, b, i, j) <= limits[i, j]
    return inside


def _radii(points: _Points, k: int) -> np.ndarray:
    """Return the squared distance of each distinct point [n] to its k-th neighbour."""
    nearest = _Nearest(points, k + 1)  # the point itself is among them, at distance 0
    for number, a in enumerate(points.blocks()):
        for b in points.blocks(number):
            bounds = _bounds(a, b)
            nearest.see(a, b, bounds)
            if b.where != a.where:
                nearest.see(b, a, bounds.transposed)
    return nearest.reach()


class _Nearest:
    """The nearest distinct points seen so far of each point of a set.

    Attributes:
        squared: their squared distances in rising order [n, num].
        counts: how often each of them occurs [n, num].
    """

    def __init__(self, points: _Points, num: int):
        self._points, self._num = points, num
        self.squared = np.full((len(points), num), np.inf)
        self.counts = np.zeros((len(points), num), np.int64)

    def see(self, a: _Block, b: _Block, bounds: _Bounds) -> None:
        """Let the points of block a see those of block b."""
        limits = torch.from_numpy(self.squared[a.where, -1]).to(bounds.lower.device)
        if len(b.rows) >= self._num:
            best = bounds.upper.topk(self._num, dim=1, largest=False).values[:, -1]
            limits = torch.minimum(limits, best)
        i, j = torch.nonzero(~(bounds.lower > limits[:, None]), as_tuple=True)
        i, j = i.cpu().numpy(), j.cpu().numpy()
        squared = _squared(a, b, i, j)
        # What was known and what is new, by point and then by distance: the first `num` of each.
        known = np.repeat(np.arange(len(a.rows)), self._num)
        owner = np.concatenate([known, i])
        squared = np.concatenate([self.squared[a.where].ravel(), squared])
        counts = np.concatenate([self.counts[a.where].ravel(), self._points.counts[b.where][j]])
        order = np.lexsort((counts == 0, squared, owner))  # no point is an infinite distance away
        starts = np.searchsorted(owner[order], np.arange(len(a.rows)))
        kept = order[starts[:, None] + np.arange(self._num)]
        self.squared[a.where], self.counts[a.where] = squared[kept], counts[kept]

    def reach(self) -> np.ndarray:
        """Return how far, squared [n], each point must reach to see `num` points with repeats."""
        seen = self.counts.cumsum(axis=1)  # [n, num]
        return self.squared[np.arange(len(seen)), (seen >= self._num).argmax(axis=1)]
