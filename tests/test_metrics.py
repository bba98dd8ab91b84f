"""Metrics: laws of distances, closed forms, brute force, and numbers of the published evaluator."""

import numpy as np
import pytest
from launching import ROOT

from evaluations.metrics import frechet_distance, mean_and_covariance, precision_recall


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def published():
    """Features of two sets, and what the published evaluator says of them."""
    with np.load(ROOT / "tests" / "reference" / "metrics.npz") as npz:
        return dict(npz)


def gaussian(rng, dim=6, rank=None):
    """Return a mean, and a covariance of some rank."""
    root = rng.normal(size=(dim, rank or dim))
    return rng.normal(size=dim), root @ root.T


def brute_force(reference, sample, k):
    """Return precision and recall from whole matrices of distances in float64."""

    def distances(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(axis=2))

    def share(points, centres):
        radii = np.sort(distances(centres, centres), axis=1)[:, k]
        return (distances(points, centres) <= radii).any(axis=1).mean()

    return share(sample, reference), share(reference, sample)


# -- means and covariances -------------------------------------------------------------------------


def test_covariance_is_unbiased_and_in_float64(rng):
    """N - 1 in the denominator, and float16 features lose nothing on the way."""
    features = rng.normal(size=(40, 5)).astype(np.float16)
    mu, sigma = mean_and_covariance(features)
    assert mu.dtype == sigma.dtype == np.float64
    np.testing.assert_allclose(mu, features.astype(np.float64).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(features.astype(np.float64).T), rtol=1e-12)


# -- Frechet distance ------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [6, 2, 1])
def test_frechet_distance_is_a_distance(rng, rank):
    """It is 0 for equal Gaussians, also singular ones, symmetric, and above 0 otherwise."""
    one, other = gaussian(rng, rank=rank), gaussian(rng, rank=rank)
    assert frechet_distance(*one, *one) == pytest.approx(0, abs=1e-6)
    there, back = frechet_distance(*one, *other), frechet_distance(*other, *one)
    assert there == pytest.approx(back, rel=1e-10) and there > 0.1


def test_frechet_distance_does_not_see_rotations(rng):
    """An orthogonal change of the features changes nothing."""
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    pair = gaussian(rng), gaussian(rng)
    turned = [(turn @ mu, turn @ sigma @ turn.T) for mu, sigma in pair]
    assert frechet_distance(*turned[0], *turned[1]) == pytest.approx(
        frechet_distance(*pair[0], *pair[1]), rel=1e-9
    )


def test_frechet_distance_of_diagonal_gaussians(rng):
    """There it is |mu1 - mu2|^2 + |sd1 - sd2|^2, zeros among the deviations included."""
    mu1, mu2 = rng.normal(size=(2, 8))
    sd1, sd2 = rng.uniform(0, 3, size=(2, 8))
    sd1[:2] = sd2[1:3] = 0
    expected = ((mu1 - mu2) ** 2).sum() + ((sd1 - sd2) ** 2).sum()
    found = frechet_distance(mu1, np.diag(sd1**2), mu2, np.diag(sd2**2))
    assert found == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_agrees_with_the_root_of_a_matrix(rng):
    """The trace of (S1 S2)^(1/2) is that over the complex eigenvalues of the product."""
    (mu1, sigma1), (mu2, sigma2) = gaussian(rng, 30), gaussian(rng, 30)
    trace = np.sqrt(np.linalg.eigvals(sigma1 @ sigma2).astype(complex)).real.sum()
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2) - 2 * trace
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_fewer_samples_than_features(rng):
    """Covariances of 10 points in 50 dimensions are singular; a shift is still seen in full."""
    mu, sigma = mean_and_covariance(rng.normal(size=(10, 50)))
    assert frechet_distance(mu, sigma, mu + 1, sigma) == pytest.approx(50, rel=1e-8)


# -- precision and recall --------------------------------------------------------------------------


def test_a_set_covers_itself_and_nothing_far_away(rng):
    """Both scores are 1 of a set with itself, 0 of sets far apart."""
    points = rng.normal(size=(30, 4))
    assert precision_recall(points, points) == (1, 1)
    assert precision_recall(points, points + 100) == (0, 0)


def test_precision_and_recall_tell_quality_from_variety(rng):
    """A narrow set within the reference is all precision; swapped, it is all recall."""
    wide, narrow = rng.normal(size=(200, 2)), 0.05 * rng.normal(size=(200, 2))
    precision, recall = precision_recall(wide, narrow)
    assert precision == 1 and recall < 0.1
    assert precision_recall(narrow, wide) == (recall, precision)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_equal_brute_force_in_blocks_of_any_size(rng, k):
    """The sizes of blocks divide the sets or not, and are smaller than k or larger than a set."""
    reference, sample = rng.normal(size=(50, 3)), 0.8 * rng.normal(size=(37, 3)) + 0.3
    expected = brute_force(reference, sample, k)
    for block_size in (1, 2, 10, 49, 1000):
        assert precision_recall(reference, sample, k, block_size) == expected


def test_equal_points_and_balls_without_extent():
    """Where k + 1 points coincide the radius is 0, and the ball holds its centre alone."""
    reference = np.zeros((5, 2))
    sample = np.repeat([[0.0, 0.0], [1e-9, 0.0]], 4, axis=0)
    assert precision_recall(reference, sample) == (0.5, 1)


def test_a_large_common_offset_costs_no_digits(rng):
    """Distances come from differences: far from the origin they are as exact as near it."""
    reference, sample = rng.integers(-9, 10, size=(2, 60, 3)).astype(np.float64)
    offset = 2.0**40
    assert precision_recall(reference + offset, sample + offset) == precision_recall(
        reference, sample
    )


# -- the published evaluator -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small", "blocks"])
def test_published_numbers(published, name):
    """The distance to 1e-6; precision and recall to 0.005, for theirs were made in float16."""
    reference, sample = published[f"{name}/ref"], published[f"{name}/sample"]
    statistics = *mean_and_covariance(reference), *mean_and_covariance(sample)
    assert frechet_distance(*statistics) == pytest.approx(float(published[f"{name}/fid"]), rel=1e-6)
    theirs = [published[f"{name}/precision"].item(), published[f"{name}/recall"].item()]
    assert precision_recall(reference, sample) == pytest.approx(theirs, abs=0.005)
    exact = brute_force(reference.astype(np.float64), sample.astype(np.float64), 3)
    assert precision_recall(reference, sample) == exact


# -- what is no input ------------------------------------------------------------------------------

EYE, ZERO, NAN = np.eye(3), np.zeros(3), np.full(3, np.nan)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((NAN, EYE, ZERO, EYE), "mu1 has 3 values"),
        ((ZERO, EYE, ZERO, np.full((3, 3), np.inf)), "sigma2 has 9 values"),
        ((ZERO, EYE, np.zeros(4), np.eye(4)), "same features"),
        ((ZERO, np.ones((3, 2)), ZERO, EYE), "[D, D]"),
        ((EYE, EYE, EYE, EYE), "[D, D]"),
        ((1.0, 1.0, 1.0, 1.0), "[D, D]"),
    ],
)
def test_frechet_distance_refuses(arguments, words):
    with pytest.raises(ValueError) as error:
        frechet_distance(*arguments)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("features", [np.zeros((1, 3)), np.zeros(3), np.zeros((2, 0)), [NAN, ZERO]])
def test_mean_and_covariance_refuse(features):
    with pytest.raises(ValueError, match="features (must be|has 3 values)"):
        mean_and_covariance(features)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reference": np.zeros((3, 2))}, "reference must be .* N >= 4"),
        ({"sample": np.full((5, 2), np.inf)}, "sample has 10 values"),
        ({"sample": np.zeros((5, 3))}, "reference has 2 features, sample 3"),
        ({"k": 0}, "at least 1"),
        ({"block_size": 0}, "at least 1"),
    ],
)
def test_precision_and_recall_refuse(change, words):
    both = {"reference": np.zeros((5, 2)), "sample": np.zeros((5, 2))}
    with pytest.raises(ValueError, match=words):
        precision_recall(**both | change)
