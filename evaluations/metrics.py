"""Distances between two sets of images, computed on the features that a network sees in them.

Frechet distance (Heusel et al. 2017, arXiv:1706.08500): how far apart two Gaussians are that have
the means and covariances of the features. Precision and recall (Kynkaanniemi et al. 2019,
arXiv:1904.06991): how many samples look real, and how much of the real variety they cover.
Pure functions on arrays, in float64: they neither read files nor print.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


def mean_and_covariance(features: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean [D] and the covariance [D, D], with N - 1 below, of features [N, D].

    Raises:
        ValueError: they are no table of finite numbers with two rows or more.
    """
    features = _table(features, "features", min_rows=2)
    mu = features.mean(axis=0)
    centred = features - mu
    return mu, centred.T @ centred / (len(features) - 1)


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """Return the squared Frechet distance of two Gaussians, means [D] and covariances [D, D].

    It is |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)), eq. 6 of arXiv:1706.08500. With factors
    S = F F^T, the eigenvalues of S1 S2 are the squared singular values of F1^T F2. So the trace of
    the root is the sum of these singular values: all is real, and S may be singular.

    Raises:
        ValueError: a shape does not fit, or a number is not finite.
    """
    arrays = {"mu1": mu1, "sigma1": sigma1, "mu2": mu2, "sigma2": sigma2}
    mu1, sigma1, mu2, sigma2 = (np.asarray(array, np.float64) for array in arrays.values())
    shapes = [mu1.shape, sigma1.shape, mu2.shape, sigma2.shape]
    dim = mu1.size
    if dim == 0 or shapes != [(dim,), (dim, dim)] * 2:
        raise ValueError(
            f"mu1, sigma1, mu2, sigma2 must be [D], [D, D], [D], [D, D], got {shapes}: "
            "do both sets come from the same features?"
        )
    for name, array in zip(arrays, (mu1, sigma1, mu2, sigma2), strict=True):
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has {_count_broken(array)} values that are not finite")
    roots = np.linalg.svd(_factor(sigma1).T @ _factor(sigma2), compute_uv=False)
    traces = np.trace(sigma1) + np.trace(sigma2) - 2 * roots.sum()
    return max(0.0, float(np.square(mu1 - mu2).sum() + traces))  # rounding may go below 0


def _factor(sigma: np.ndarray) -> np.ndarray:
    """Return F [D, D] with F F^T = sigma, of a symmetric matrix without negative eigenvalues."""
    eigenvalues, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    return vectors * np.sqrt(eigenvalues.clip(min=0))  # those below 0 are rounding


def precision_recall(
    reference: ArrayLike, sample: ArrayLike, k: int = 3, block_size: int = 1024
) -> tuple[float, float]:
    """Return improved precision and recall of features `sample` [M, D] against [N, D].

    Each point owns a ball that reaches to its k-th nearest neighbour in its own set. Precision is
    the share of samples within some ball of the reference, recall the share of the reference
    within some ball of the samples (arXiv:1904.06991, eq. 1 and 2).

    Args:
        reference: features of real images.
        sample: features of generated images.
        k: which neighbour; the point itself does not count.
        block_size: so many by so many distances are in memory at once. The result is exact and
            does not depend on it.

    Raises:
        ValueError: a set is no table of finite numbers with more than k rows, the sets differ in
            D, or k or the block size is no positive number.
    """
    if k < 1 or block_size < 1:
        raise ValueError(f"k and block_size must be at least 1, got {k} and {block_size}")
    real = torch.from_numpy(_table(reference, "reference", min_rows=k + 1)).split(block_size)
    ours = torch.from_numpy(_table(sample, "sample", min_rows=k + 1)).split(block_size)
    if real[0].shape[1] != ours[0].shape[1]:
        raise ValueError(
            f"reference has {real[0].shape[1]} features, sample {ours[0].shape[1]}: both sets "
            "must come from the same network"
        )
    return _share_within(ours, real, _radii(real, k)), _share_within(real, ours, _radii(ours, k))


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the distances [n, m] of points [n, D] and [m, D], without cancellation."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(blocks: tuple[Tensor, ...], k: int) -> list[Tensor]:
    """Return, for the points [n, D] of each block, the distances [n] to their k-th neighbours."""
    radii = []
    for points in blocks:
        nearest = points.new_empty(len(points), 0)
        for others in blocks:
            found = torch.cat([nearest, _distances(points, others)], dim=1)
            # k + 1, since the point itself is among them, at distance 0.
            nearest = found.topk(min(k + 1, found.shape[1]), largest=False).values
        radii.append(nearest.amax(dim=1))
    return radii


def _share_within(
    blocks: tuple[Tensor, ...], centres: tuple[Tensor, ...], radii: list[Tensor]
) -> float:
    """Return the share of points that lie within, or on, some ball."""
    count = 0
    for points in blocks:
        within = torch.zeros(len(points), dtype=torch.bool)
        for centre, radius in zip(centres, radii, strict=True):
            within |= (_distances(points, centre) <= radius).any(dim=1)
        count += int(within.sum())
    return count / sum(map(len, blocks))


def _table(features: ArrayLike, name: str, min_rows: int) -> np.ndarray:
    """Return features as float64 [N, D] if they are a table of enough rows of finite numbers."""
    table = np.ascontiguousarray(features, dtype=np.float64)
    if table.ndim != 2 or len(table) < min_rows or table.shape[1] == 0:
        raise ValueError(f"{name} must be [N, D] with N >= {min_rows}, got {list(table.shape)}")
    if not np.isfinite(table).all():
        raise ValueError(
            f"{name} has {_count_broken(table)} values that are not finite: look at the images "
            "with such pixels, or at the network that read them"
        )
    return table


def _count_broken(array: np.ndarray) -> int:
    return int((~np.isfinite(array)).sum())
