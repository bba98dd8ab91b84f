"""Scores by nearest neighbours: precision and recall, density and coverage. Exact, and fast.

Each point owns a ball that reaches to its k-th nearest neighbour in its own set. Whether a point
lies in a ball is what brute force in float64 says, sum((a - b)^2) <= radius^2, ties included. But
nearly all pairs are decided by one matrix product in float32, |a|^2 + |b|^2 - 2 a b, together with
a bound on its rounding; differences are taken only for the few whose bounds enclose the radius.
"""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .checks import check_same_width, check_table

BLOCK_SIZE = 1024
IN_DIFFERENCES = 2**22  # numbers in an array of differences
MANY = 1 / 128  # of the pairs of two blocks: so many differences cost as much as a better product


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
            pairs = _Pairs(a, b)
            covered_ours[b.where] |= pairs.inside(balls_real[a.where, None]).any(axis=0)
            covered_real[a.where] |= pairs.inside(balls_ours[None, b.where]).any(axis=1)
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
            inside = _Pairs(a, b).inside(balls[a.where, None])  # [n, m]
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
        short: these in the dtype of the first product, float32 or float64.
        squares: the squared lengths of these [n], in float64.
    """

    where: slice
    rows: np.ndarray
    centred: Tensor
    short: Tensor
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
        self._dtype = torch.float32 if _is_full_precision(device) else torch.float64
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
            squares = centred.square().sum(dim=1)
            yield _Block(where, rows, centred, centred.to(self._dtype), squares)


def _is_full_precision(device: torch.device | str) -> bool:
    """Tell whether a float32 product is one, or of rounded factors (TF32, bfloat16), as allowed."""
    rounded_away = 1 + 2**-12
    x = torch.full((512, 512), rounded_away, device=device)
    return bool(((x @ x).double() / 512 - rounded_away**2).abs().max() < 2**-20)


# --------------------------------------------------------------------------------------------
# Distances


class _Pairs:
    """All pairs of two blocks of n and m points, and between what their squared distances lie.

    These are the squared distances as brute force in float64 rounds them.

    Attributes:
        a: a block of n points.
        b: a block of m.
        lower: [n, m].
        upper: [n, m].
    """

    def __init__(self, a: _Block, b: _Block):
        self.a, self.b = a, b
        self._set_bounds(a.short, b.short)

    def _set_bounds(self, a: Tensor, b: Tensor) -> None:
        """Compute the bounds from the product of two matrices [n, D] and [m, D] of one dtype.

        With u half of the dtype's epsilon and s = |a|^2 + |b|^2, the product is within 2 D u s of
        its value, and in float64 the squares, and the sum of squared differences, are as near to
        theirs. A dozen single roundings remain, of centring, narrowing and adding up: 32 u s is
        more than these. Numbers near 0 may be flushed, which is a matter of the smallest one, and
        products that overflow leave no bounds: a pair without any is open.
        """
        self._is_short, kind, dim = a.dtype != torch.float64, torch.finfo(a.dtype), a.shape[1]
        sums = self.a.squares[:, None] + self.b.squares
        slack = sums * (2 * (dim + 8) * kind.eps) + 4 * dim * kind.tiny * (1 + sums)
        product = (a @ b.T).to(torch.float64)
        near = sums - 2 * product.where(product.isfinite(), torch.nan)
        self.lower, self.upper = near - slack, near + slack

    def transposed(self) -> "_Pairs":
        """Return the same with the blocks in the other order."""
        other = copy(self)
        other.a, other.b, other.lower, other.upper = self.b, self.a, self.lower.T, self.upper.T
        return other

    def squared(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Return the squared distances [P] of points i [P] of a to points j [P] of b."""
        return _squared(self.a, self.b, i, j)

    def refined(self, num_open: int) -> bool:
        """Compute better bounds, if there are any, and if so many pairs are open; tell if so."""
        if not self._is_short or num_open <= MANY * self.lower.numel():
            return False
        self._set_bounds(self.a.centred, self.b.centred)
        return True

    def inside(self, squared_radii: np.ndarray) -> np.ndarray:
        """Tell which pairs [n, m] are at most a radius apart, [n, 1] or [1, m]."""
        limits = torch.from_numpy(squared_radii).to(self.lower.device)
        inside = self.upper <= limits
        # With NaN no comparison holds, and the pair is open.
        i, j = torch.nonzero(~(inside | (self.lower > limits)), as_tuple=True)
        if self.refined(len(i)):
            return self.inside(squared_radii)
        i, j, inside = i.cpu().numpy(), j.cpu().numpy(), inside.cpu().numpy()
        limits = np.broadcast_to(squared_radii, inside.shape)
        inside[i, j] = self.squared(i, j) <= limits[i, j]
        return inside

    def candidates(self, squared: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the pairs (i [P], j [P]) that may be among the `num` nearest of a point of a.

        Args:
            squared: the squared distances [n] within which it has as many already.
            num: how many.
        """
        limits = torch.from_numpy(squared).to(self.lower.device)
        if len(self.b.rows) >= num:
            best = self.upper.topk(num, dim=1, largest=False).values[:, -1]
            limits = torch.minimum(limits, best)
        i, j = torch.nonzero(~(self.lower > limits[:, None]), as_tuple=True)
        if self.refined(len(i) - num * len(squared)):
            return self.candidates(squared, num)
        return i.cpu().numpy(), j.cpu().numpy()


def _squared(a: _Block, b: _Block, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Return the squared distances [P] of points i [P] to points j [P], by differences."""
    step = max(1, IN_DIFFERENCES // a.rows.shape[1])
    found = np.empty(len(i))
    for at in (slice(start, start + step) for start in range(0, len(i), step)):
        found[at] = np.square(a.rows[i[at]] - b.rows[j[at]]).sum(axis=1)
    return found


def _radii(points: _Points, k: int) -> np.ndarray:
    """Return the squared distance of each distinct point [n] to its k-th neighbour."""
    nearest = _Nearest(points, k + 1)  # the point itself is among them, at distance 0
    for number, a in enumerate(points.blocks()):
        for b in points.blocks(number):
            pairs = _Pairs(a, b)
            nearest.see(pairs)
            if b.where != a.where:
                nearest.see(pairs.transposed())
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

    def see(self, pairs: _Pairs) -> None:
        """Let the points of one block see those of another."""
        a, b = pairs.a, pairs.b
        i, j = pairs.candidates(self.squared[a.where, -1], self._num)
        squared = pairs.squared(i, j)
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
