"""Scores of a set of images, computed on what a network sees in them, mostly against real ones.

Frechet distance (Heusel et al. 2017, arXiv:1706.08500): how far apart two Gaussians are that have
the means and covariances of the features. Kernel distance (Binkowski et al. 2018,
arXiv:1801.01401): the same for all moments up to the third. Inception Score (Salimans et al. 2016,
arXiv:1606.03498): how sure a classifier is of each image, and how various its answers are.
Precision, recall, density and coverage are in neighbours.py, and can be had from here.
Pure functions on arrays, in float64: they neither read files nor print.
"""

from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .checks import ROWS, check_same_width, check_table, count_broken
from .moments import Moments
from .neighbours import density_coverage, precision_recall

ASYMMETRY = 1e-4  # of a covariance, relative to its largest entry, that rounding may have left
NEGATIVE = 1e-3  # eigenvalue, relative to the largest one: what float16 leaves of 0
NEGLIGIBLE = 1e-8  # error of a trace, relative to those of the covariances
TINY = np.finfo(np.float64).tiny

__all__ = [
    "density_coverage",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "mean_and_covariance",
    "precision_recall",
]


def mean_and_covariance(features: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean [D] and the covariance [D, D], with N - 1 below, of features [N, D].

    Raises:
        ValueError: they are no table of finite numbers with two rows or more.
    """
    features = check_table(features, "features", min_rows=2)
    moments = Moments(features.shape[1])
    for rows in _blocks(features):
        moments.add(rows)
    return moments.mean, moments.covariance()


def frechet_distance(mu1: ArrayLike, sigma1: ArrayLike, mu2: ArrayLike, sigma2: ArrayLike) -> float:
    """Return the squared Frechet distance of two Gaussians, means [D] and covariances [D, D].

    It is |mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)), eq. 6 of arXiv:1706.08500. With factors
    S = F F^T, the eigenvalues of S1 S2 are the squared singular values of F1^T F2. So the trace of
    the root is the sum of these singular values: all is real, and S may be singular.

    Raises:
        ValueError: a shape does not fit, a number is not real or not finite, or a sigma is no
            covariance: not symmetric, or with variances below 0.
    """
    given = {"mu1": mu1, "sigma1": sigma1, "mu2": mu2, "sigma2": sigma2}
    mu1, sigma1, mu2, sigma2 = _check_gaussians(given)
    product = _factor(sigma1, "sigma1").T @ _factor(sigma2, "sigma2")
    traces = np.trace(sigma1) + np.trace(sigma2)
    traces -= 2 * _nuclear_norm(product, NEGLIGIBLE * traces)
    return max(0.0, float(np.square(mu1 - mu2).sum() + traces))  # rounding may go below 0


def _nuclear_norm(product: np.ndarray, tolerance: float) -> float:
    """Return the sum of the singular values of a matrix, to about a tolerance or better.

    They are the roots of the eigenvalues of P^T P, which take a quarter of the time. But these have
    an error relative to the largest one, and roots of small ones a larger one than that.
    """
    largest = np.abs(product).max(initial=0.0)
    if largest == 0:
        return 0.0
    if product.shape[0] < product.shape[1]:
        product = product.T  # or P^T P would have eigenvalues of 0
    product, tolerance = product / largest, tolerance / largest
    return float(largest) * _sum_of_roots(product, tolerance)


def _sum_of_roots(product: np.ndarray, tolerance: float) -> float:
    squares = np.linalg.eigvalsh(product.T @ product).clip(min=0)
    error = squares[-1] * len(squares) ** 0.5 * np.finfo(np.float64).eps
    if np.minimum(error / np.sqrt(squares + TINY), np.sqrt(error)).sum() <= tolerance:
        return float(np.sqrt(squares).sum())
    return float(np.linalg.svd(product, compute_uv=False).sum())


def _check_gaussians(given: dict[str, ArrayLike]) -> list[np.ndarray]:
    """Return mu1, sigma1, mu2 and sigma2 as float64, or raise a ValueError that names one."""
    arrays = {name: np.asarray(array) for name, array in given.items()}
    shapes = [array.shape for array in arrays.values()]
    dim = arrays["mu1"].size
    if dim == 0 or shapes != [(dim,), (dim, dim)] * 2:
        raise ValueError(
            f"mu1, sigma1, mu2, sigma2 must be [D], [D, D], [D], [D, D], got {shapes}: "
            "do both sets come from the same features?"
        )
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu":
            raise ValueError(f"{name} must hold real numbers, got {array.dtype}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has {count_broken(array)} values that are not finite")
    return [array.astype(np.float64, copy=False) for array in arrays.values()]


def _factor(sigma: np.ndarray, name: str) -> np.ndarray:
    """Return F [D, R] with F F^T = sigma, a covariance [D, D] of rank R.

    Raises:
        ValueError: it is not symmetric, or has an eigenvalue below 0; `name` is what the error
            calls it. Both to the rounding of float16.
    """
    if np.abs(sigma - sigma.T).max() > ASYMMETRY * np.abs(sigma).max():
        raise ValueError(f"{name} is no covariance, since it is not symmetric: compute it again")
    sigma = (sigma + sigma.T) / 2
    rounding = sigma.diagonal().max() * len(sigma) * np.finfo(np.float64).eps
    with suppress(np.linalg.LinAlgError):  # it is singular, to rounding, or no covariance
        lower = np.linalg.cholesky(sigma)
        if np.square(lower.diagonal()).min() > rounding:
            return lower  # the usual case, and an eighth of the work
    eigenvalues, vectors = np.linalg.eigh(sigma)
    if eigenvalues[0] < -NEGATIVE * abs(eigenvalues[-1]):
        raise ValueError(
            f"{name} is no covariance, since its eigenvalues run from {eigenvalues[0]:.3g} to "
            f"{eigenvalues[-1]:.3g} and none may be below 0: compute it again"
        )
    # What is smaller is rounding, whose root is not small. (Of fewer images than features most is.)
    kept = eigenvalues > eigenvalues[-1] * len(sigma) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(eigenvalues[kept])


def inception_score(probabilities: ArrayLike, split_size: int = 5000) -> float:
    """Return the Inception Score of class probabilities [N, C]: 1 at worst, C at best.

    It is exp of the mean divergence of an image's classes from those of all images of its split,
    averaged over splits in the order of the images. The last split may be shorter.

    Args:
        probabilities: each row sums up to 1.
        split_size: images in a split.

    Raises:
        ValueError: they are no table of probabilities, or a split has no image.
    """
    if split_size < 1:
        raise ValueError(f"split_size must be at least 1, got {split_size}")
    probabilities = check_table(probabilities, "probabilities")
    return float(np.mean([_score(split) for split in _blocks(probabilities, split_size)]))


def _score(split: np.ndarray) -> float:
    """Return the Inception Score of class probabilities [n, C] of one split."""
    split = split.astype(np.float64)
    if split.min() < 0 or not np.allclose(split.sum(axis=1), 1, rtol=0, atol=1e-3):
        raise ValueError("probabilities must not be below 0, and each row must sum up to 1")
    ratio = np.divide(split, split.mean(axis=0), out=np.ones_like(split), where=split > 0)
    return np.exp((split * np.log(ratio)).sum() / len(split))


def kernel_distance(
    reference: ArrayLike,
    sample: ArrayLike,
    block_size: int = ROWS,
    device: torch.device | str = "cpu",
) -> float:
    """Return the kernel distance, known as KID, of features `sample` [M, D] to [N, D].

    It is the unbiased estimate of the squared maximum mean discrepancy under the kernel
    (x y / D + 1)^3, so it may fall below 0. All pairs count, where others average over random
    subsets: the expectation is the same, the variance smaller, and there is no seed.

    Args:
        reference: features of real images.
        sample: features of generated images.
        block_size: so many by so many kernels are in memory at once.
        device: where the kernels are computed; it must know float64.

    Raises:
        ValueError: a set is no table of finite numbers with 2 rows or more, they differ in D, or
            the block size is not positive.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    real = check_table(reference, "reference", min_rows=2)
    ours = check_table(sample, "sample", min_rows=2)
    check_same_width(real, ours)
    across = sum(
        _kernels(a, b).sum().item()
        for a in _on(device, _blocks(real, block_size))
        for b in _on(device, _blocks(ours, block_size))
    )
    within = sum(_mean_within(table, block_size, device) for table in (real, ours))
    return within - 2 * across / (len(real) * len(ours))


def _mean_within(table: np.ndarray, block_size: int, device: torch.device | str) -> float:
    """Return the mean kernel of two different rows of a table."""
    total = 0.0
    for i, a in enumerate(_on(device, _blocks(table, block_size))):
        own = _kernels(a, a)
        later = _on(device, _blocks(table[(i + 1) * block_size :], block_size))
        total += (own.sum() - own.trace()).item()
        total += 2 * sum(_kernels(a, b).sum().item() for b in later)
    return total / (len(table) * (len(table) - 1))


def _kernels(a: Tensor, b: Tensor) -> Tensor:
    """Return the kernels [n, m] of rows [n, D] and [m, D]."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def _on(device: torch.device | str, blocks: Iterator[np.ndarray]) -> Iterator[Tensor]:
    """Yield blocks in float64 on a device."""
    return (torch.from_numpy(block.astype(np.float64)).to(device) for block in blocks)


def _blocks(table: np.ndarray, size: int = ROWS) -> Iterator[np.ndarray]:
    """Yield a table by so many rows, and at last those that remain."""
    return (table[start : start + size] for start in range(0, len(table), size))
