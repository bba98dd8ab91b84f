"""Metrics: laws of distances, closed forms, brute force, and numbers of the published evaluator."""

import numpy as np
import pytest
import torch
from launching import ROOT

from evaluations import neighbours
from evaluations.metrics import (
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_and_covariance,
    precision_recall,
)


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


def inside(points, centres, k):
    """Tell by brute force in float64 which points [n] are in which balls [m] of the centres."""

    def squared_distances(a, b):
        return ((a[:, None].astype(np.float64) - b[None]) ** 2).sum(axis=2)

    radii = np.sort(squared_distances(centres, centres), axis=1)[:, k]
    return squared_distances(points, centres) <= radii


def brute_force(reference, sample, k=3):
    """Return precision and recall from whole matrices of distances."""
    hits = inside(sample, reference, k), inside(reference, sample, k)
    return tuple(hit.any(axis=1).mean() for hit in hits)


SETS = {  # draws a set of points from (rng, n): nothing to decide, much, or everything
    "spread": lambda rng, n: rng.normal(size=(n, 3)),
    "grid": lambda rng, n: rng.integers(0, 3, size=(n, 4)),
    "repeated": lambda rng, n: rng.normal(size=(5, 3))[rng.integers(0, 5, size=n)],
    "one_hot": lambda rng, n: np.eye(n, 90),
    "tenths": lambda rng, n: rng.integers(0, 3, size=(n, 3)) / 10 + 0.7,
    "large": lambda rng, n: rng.normal(size=(n, 3)) * 1e30,
    "far_away": lambda rng, n: rng.integers(-9, 10, size=(n, 3)) + 2.0**40,
    "many_scales": lambda rng, n: rng.normal(size=(n, 3)) * np.logspace(-9, 0, n)[:, None],
    "huge": lambda rng, n: rng.normal(size=(n, 3)) * 1e160,
    "float16": lambda rng, n: rng.normal(size=(n, 2)).astype(np.float16),
}  # fmt: skip


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


def test_frechet_distance_of_a_singular_and_a_full_covariance(rng):
    """The root of the rounding, 1e-8 of the largest deviation in each direction, adds nothing."""
    dim = 200
    root, (mu, full) = rng.normal(size=(dim, 2)), gaussian(rng, dim)
    shared = np.sqrt(np.linalg.eigvalsh(root.T @ full @ root)).sum()
    expected = np.trace(root @ root.T) + np.trace(full) - 2 * shared
    for pair in ((mu, root @ root.T, mu, full), (mu, full, mu, root @ root.T)):
        assert frechet_distance(*pair) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_does_not_count_rounding(rng):
    """A singular covariance with rounding on its diagonal counts as singular, factored or not."""
    half, mean = rng.normal(size=(200, 20)), np.zeros(200)
    singular, full = half @ half.T, np.cov(rng.normal(size=(1000, 200)), rowvar=False)
    noisy = singular + 3e-14 * singular.diagonal().max() * np.eye(200)
    np.linalg.cholesky(noisy)  # which works
    expected = frechet_distance(mean, singular, mean, full)
    assert frechet_distance(mean, noisy, mean, full) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_to_a_single_point(rng):
    """Without any variance it is the squared distance of the means, and the other's variance."""
    mu, sigma = gaussian(rng)
    nothing = np.zeros_like(sigma)
    assert frechet_distance(mu, sigma, mu + 1, nothing) == pytest.approx(6 + np.trace(sigma))
    assert frechet_distance(mu, nothing, mu + 1, nothing) == pytest.approx(6)


@pytest.mark.parametrize(
    ("sigma", "words"),
    [
        (-np.eye(3), "sigma2 is no covariance, since its eigenvalues run from -1 to -1"),
        (np.diag([1.0, 1, -0.01]), "sigma2 is no covariance, since its eigenvalues"),
        (np.eye(3) + np.eye(3, k=1), "sigma2 is no covariance, since it is not symmetric"),
        (np.eye(3) * 1j, "sigma2 must hold real numbers, got complex128"),
        (np.eye(3) > 0, "sigma2 must hold real numbers, got bool"),
        (np.eye(3).astype(str), "sigma2 must hold real numbers, got <U"),
    ],
)
def test_what_is_no_covariance_has_no_distance(sigma, words):
    """Their distance would be a number, and 0 for two of -1."""
    with pytest.raises(ValueError, match=words) as error:
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(3), sigma)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_rounded_covariances_have_a_distance(rng, kind):
    """Also those of few images, whose many eigenvalues of 0 are rounded to below 0."""
    one, other = (mean_and_covariance(rng.normal(size=(10, 300)) + i) for i in (0, 1))
    rounded = [array.astype(kind) for array in (*one, *other)]
    assert frechet_distance(*rounded) == pytest.approx(frechet_distance(*one, *other), rel=0.02)


@pytest.mark.parametrize("decades", [0, 3, 6, 9, 14])
def test_the_distance_is_as_exact_as_singular_values(rng, decades, monkeypatch):
    """However far the eigenvalues are apart: where their roots are not exact, others are taken."""
    calls, svd = [], np.linalg.svd
    monkeypatch.setattr(np.linalg, "svd", lambda *a, **k: calls.append(1) or svd(*a, **k))
    spectrum = np.logspace(0, -decades, 80)
    bases = [np.linalg.qr(rng.normal(size=(80, 80)))[0] for _ in range(2)]
    sigmas = [basis * spectrum @ basis.T for basis in bases]
    roots = svd((bases[0] * np.sqrt(spectrum)).T @ (bases[1] * np.sqrt(spectrum)), compute_uv=False)
    expected = 2 * spectrum.sum() - 2 * roots.sum()
    mean = np.zeros(80)
    assert frechet_distance(mean, sigmas[0], mean, sigmas[1]) == pytest.approx(expected, rel=1e-6)
    assert bool(calls) == (decades > 6)


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


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("k", [1, 3, 5])
def test_neighbours_equal_brute_force_also_at_ties(rng, kind, k):
    """Blocks that divide the sets or not, smaller than k or larger than a set: exact equality."""
    reference, sample = SETS[kind](rng, 30), SETS[kind](rng, 22)
    with np.errstate(over="ignore"):
        expected = brute_force(reference, sample, k)
        hits = inside(sample, reference, k)
        for block_size in (2, 11, 1000):
            assert precision_recall(reference, sample, k, block_size) == expected
            density, coverage = density_coverage(reference, sample, k, block_size)
            assert density == hits.sum() / (k * 22) and coverage == hits.any(axis=0).mean()


def test_few_pairs_need_differences(rng, monkeypatch):
    """The products decide: differences are for neighbours, and repeats cost none at all."""
    taken = []
    squared = neighbours._squared
    monkeypatch.setattr(
        neighbours, "_squared", lambda a, b, i, j: taken.append(len(i)) or squared(a, b, i, j)
    )
    reference, sample = rng.normal(size=(400, 64)), rng.normal(size=(300, 64))
    assert precision_recall(reference, sample, block_size=100) == brute_force(reference, sample)
    assert sum(taken) < 20 * 700
    taken.clear()
    assert precision_recall(np.tile(sample[:1], (5000, 1)), sample) == (1 / 300, 1)
    assert sum(taken) < 20 * 301


@pytest.mark.parametrize("kind", [*SETS, "clusters"])
def test_neighbours_do_not_depend_on_how_precise_products_are(rng, kind, monkeypatch):
    """Whether a GPU rounds the factors, or float32 leaves too many pairs open: float64 decides."""
    sets = SETS | {
        "clusters": lambda rng, n: rng.normal(size=(n, 9)) + 1e6 * (np.arange(n) % 2)[:, None]
    }
    reference, sample = sets[kind](rng, 64), sets[kind](rng, 50)
    with np.errstate(over="ignore"):
        expected = brute_force(reference, sample)
        for many in (0, 1e9):
            monkeypatch.setattr(neighbours, "MANY", many)
            assert precision_recall(reference, sample, block_size=40) == expected
        monkeypatch.setattr(neighbours, "_is_full_precision", lambda device: False)
        assert precision_recall(reference, sample, block_size=40) == expected


def test_open_pairs_are_decided_by_a_better_product(rng, monkeypatch):
    """Far from the common centre float32 decides nothing, and yet differences stay few."""
    taken, squared = [], neighbours._squared
    monkeypatch.setattr(
        neighbours, "_squared", lambda a, b, i, j: taken.append(len(i)) or squared(a, b, i, j)
    )
    far = 1e4 * (np.arange(600) % 2)[:, None]
    reference, sample = rng.normal(size=(600, 64)) + far, rng.normal(size=(600, 64)) + far
    assert precision_recall(reference, sample, block_size=200) == brute_force(reference, sample)
    assert sum(taken) < 20 * 1200


def test_rounded_products_are_noticed():
    """bfloat16 factors, as torch may be told to use, are no float32 product."""
    kept = torch.get_float32_matmul_precision()
    assert neighbours._is_full_precision("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert not neighbours._is_full_precision("cpu")
    assert torch.get_float32_matmul_precision() == kept


def test_equal_points_and_balls_without_extent():
    """Where k + 1 points coincide the radius is 0, and the ball holds its centre alone."""
    reference = np.zeros((5, 2))
    sample = np.repeat([[0.0, 0.0], [1e-9, 0.0]], 4, axis=0)
    assert precision_recall(reference, sample) == (0.5, 1)


def test_density_and_coverage_of_a_set_with_itself(rng):
    """Each ball holds its centre and k neighbours, so density is 1 + 1 / k; all are covered."""
    points = rng.normal(size=(60, 4))
    assert density_coverage(points, points, k=5) == (pytest.approx(6 / 5), 1)
    assert density_coverage(points, points + 100) == (0, 0)


def test_an_outlier_among_real_images_raises_precision_but_hardly_density(rng):
    """Its wide ball takes in any sample; density counts how few balls do."""
    reference, sample = rng.normal(size=(100, 2)), rng.normal(size=(80, 2)) + 30
    far = np.concatenate([reference, [[60.0, 60.0]]])
    assert precision_recall(far, sample, k=5)[0] == 1
    assert density_coverage(far, sample, k=5)[0] == pytest.approx(1 / 5)


# -- kernel distance -------------------------------------------------------------------------------


def test_kernel_distance_is_the_unbiased_estimate(rng):
    """It equals the sums over all pairs, whatever the size of the blocks."""
    x, y = rng.normal(size=(23, 4)), rng.normal(size=(17, 4)) + 0.5

    def kernel(a, b):
        return (a @ b / 4 + 1) ** 3

    within = [
        np.mean([kernel(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j])
        for s in (x, y)
    ]
    expected = sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y])
    for block_size in (1, 5, 100):
        assert kernel_distance(x, y, block_size) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, ">f4", np.float16, np.uint8])
def test_kernel_distance_of_all_types_is_in_float64(rng, dtype):
    """Whatever the features are stored as, it is what numpy computes in float64 from them."""
    x, y = (rng.uniform(0, 200, size=(num, 50)).astype(dtype) for num in (40, 30))
    xx, xy, yy = (
        (a.astype(np.float64) @ b.T.astype(np.float64) / 50 + 1) ** 3
        for a, b in ((x, x), (x, y), (y, y))
    )
    means = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (xx, yy)]
    expected = sum(means) - 2 * xy.mean()
    error = abs(kernel_distance(x, y, block_size=16) - expected)
    assert error <= 1e-12 * xy.mean()  # the terms, of which little remains


@pytest.mark.parametrize("score", [precision_recall, density_coverage, kernel_distance])
def test_all_scores_are_computed_where_they_are_told_to(rng, score):
    """A device without numbers has no answer; a GPU has that of the CPU."""
    x, y = rng.normal(size=(2, 40, 5))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        score(x, y, device="meta")
    if torch.cuda.is_available():
        assert score(x, y, device="cuda") == pytest.approx(score(x, y), rel=1e-12)


def test_kernel_distance_has_no_bias(rng):
    """Over many small sets of one distribution it averages to 0; of two, to what it is."""
    x, y = rng.normal(size=(2, 400, 10, 3))
    same = [kernel_distance(a, b) for a, b in zip(x, y, strict=True)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 20
    assert kernel_distance(rng.normal(size=(900, 3)), rng.normal(size=(800, 3)) + 1) > 0.5


# -- Inception Score -------------------------------------------------------------------------------


def test_inception_score_of_no_and_of_full_knowledge():
    """1 if all images look alike; the number of classes if each is sure and all are there."""
    assert inception_score(np.full((20, 4), 0.25)) == pytest.approx(1)
    assert inception_score(np.tile(np.eye(4), (5, 1))) == pytest.approx(4)
    assert inception_score(np.eye(4).repeat(5, axis=0), split_size=5) == pytest.approx(1)


def test_inception_score_is_the_mean_over_splits(rng):
    """The last split is shorter, and counts as much as the others."""
    probabilities = rng.dirichlet(np.ones(6), size=25)
    parts = [inception_score(probabilities[i : i + 10]) for i in (0, 10, 20)]
    assert inception_score(probabilities, split_size=10) == pytest.approx(np.mean(parts), rel=1e-12)


# -- the published evaluator -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small", "blocks"])
def test_published_numbers(published, name):
    """The distance to 1e-6; precision and recall to 0.005, for theirs were made in float16."""
    reference, sample = published[f"{name}/ref"], published[f"{name}/sample"]
    statistics = *mean_and_covariance(reference), *mean_and_covariance(sample)
    assert frechet_distance(*statistics) == pytest.approx(float(published[f"{name}/fid"]), rel=1e-6)
    theirs = [published[f"{name}/precision"].item(), published[f"{name}/recall"].item()]
    assert precision_recall(reference, sample) == pytest.approx(theirs, abs=0.005)
    exact = brute_force(reference, sample)
    assert precision_recall(reference, sample) == exact
    score = inception_score(published[f"{name}/preds"], split_size=100)
    assert score == pytest.approx(float(published[f"{name}/inception_score_split100"]), rel=1e-6)


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


@pytest.mark.parametrize("score", [precision_recall, density_coverage, kernel_distance])
def test_all_scores_refuse_sets_of_different_networks(score):
    with pytest.raises(ValueError, match="same network"):
        score(np.zeros((6, 2)), np.zeros((6, 3)))


@pytest.mark.parametrize(
    ("probabilities", "words"),
    [
        (np.full((4, 2), 0.6), "sum up to 1"),
        ([[1.5, -0.5]], "below 0"),
        ([[np.nan, 1]], "1 values that are not finite"),
        (np.zeros((0, 3)), "N >= 1"),
        ([["a", "b"]], "real numbers"),
        (np.full((2, 2), 0.5j), "real numbers"),
    ],
)
def test_inception_score_refuses(probabilities, words):
    with pytest.raises(ValueError, match=words):
        inception_score(probabilities)
