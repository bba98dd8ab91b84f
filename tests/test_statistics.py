"""Streaming means and covariances: the same in parts of any size, in any order, on any rank."""

import numpy as np
import pytest

from evaluations.moments import Moments, merged


@pytest.fixture
def features():
    rng = np.random.default_rng(0)
    return rng.normal(size=(101, 7)) @ rng.normal(size=(7, 7)) + 1000


def seen(*parts):
    """Return the moments of some parts, one after the other."""
    moments = Moments(parts[0].shape[1])
    for part in parts:
        moments.add(part)
    return moments


def assert_same(moments, features):
    """Compare with what numpy says of all features at once, to 1e-10."""
    covariance = np.cov(features.T)
    assert moments.count == len(features)
    np.testing.assert_allclose(moments.mean, features.mean(axis=0), rtol=1e-13)
    scale = np.abs(covariance).max()
    np.testing.assert_allclose(moments.covariance(), covariance, rtol=0, atol=1e-10 * scale)


@pytest.mark.parametrize("size", [1, 2, 10, 100, 101, 500])
def test_any_batch_size_gives_the_same(features, size):
    """Single rows too, which have no scatter of their own."""
    assert_same(seen(*(features[i : i + size] for i in range(0, 101, size))), features)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 150])
def test_any_number_of_ranks_gives_the_same(features, ranks):
    """Each has every so many-th batch; one that has none does no harm, not as the first either."""
    parts = [Moments(7) for _ in range(ranks)]
    for number, start in enumerate(range(0, 101, 4)):
        parts[number % ranks].add(features[start : start + 4])
    assert_same(merged(parts), features)
    assert_same(merged(reversed(parts)), features)


def test_merging_leaves_the_parts_alone(features):
    one, other = seen(features[:50]), seen(features[50:])
    merged([one, other])
    assert_same(one, features[:50])
    assert_same(other, features[50:])


def test_a_common_offset_costs_hardly_a_digit():
    """A million times what the features vary by: squaring first would leave nothing of them."""
    rows = np.random.default_rng(0).integers(-8, 9, size=(64, 3)).astype(np.float64)
    near, far = (seen(*np.split(rows + offset, 8)) for offset in (0, 2.0**23))
    np.testing.assert_allclose(far.covariance(), near.covariance(), rtol=0, atol=1e-10 * 25)


def test_small_types_lose_nothing(features):
    """float16 and float32 are made float64 before anything is added up."""
    for dtype in (np.float16, np.float32):
        narrow = features.astype(dtype)
        assert_same(seen(narrow[:60], narrow[60:]), narrow.astype(np.float64))


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (np.zeros(3), "must be .N, D."),
        (np.zeros((0, 3)), "N >= 1"),
        (np.zeros((2, 4)), "4 columns, not 3"),
        (np.full((2, 3), np.nan), "features of SAMPLE has 6 values that are not finite"),
        (np.zeros((2, 3), complex), "real numbers"),
    ],
)
def test_other_things_than_features_are_refused(features, words):
    """And nothing of them is added."""
    moments = seen(np.ones((2, 3)))
    with pytest.raises(ValueError, match=words):
        moments.add(features, "features of SAMPLE")
    assert moments.count == 2


def test_one_row_has_no_covariance():
    with pytest.raises(ValueError, match="2 images or more, got 1"):
        seen(np.zeros((1, 3))).covariance()
