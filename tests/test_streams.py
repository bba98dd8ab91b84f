"""Random numbers as functions of seed, index and purpose."""

import numpy as np
import pytest

from guided_diffusion import streams

PURPOSES = [value for name, value in vars(streams).items() if name.isupper()]


def test_a_purpose_is_a_stream_of_its_own():
    """No two purposes share a number, or one use of a seed would follow from another."""
    assert len(set(PURPOSES)) == len(PURPOSES) == 17
    draws = [tuple(streams.stream(3, 5, purpose).integers(2**62, size=2)) for purpose in PURPOSES]
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize("seed, index", [(0, 0), (2**62, 3), (7, 2**50)])
def test_what_is_drawn_depends_on_nothing_else(seed, index):
    """The numbers of an image are the same alone, in a batch, and after any other draws."""
    alone = streams.stream(seed, index, streams.NOISE).standard_normal((3, 4), dtype=np.float32)
    batch = streams.normal(seed, range(index, index + 3), streams.NOISE, (3, 4))
    assert batch.dtype == np.float32 and batch.shape == (3, 3, 4)
    np.testing.assert_array_equal(batch[0], alone)
    later = streams.normal(seed, [index + 9, index], streams.NOISE, (3, 4))
    np.testing.assert_array_equal(later[1], alone)


def test_neighbours_are_independent():
    """Seeds and indices beside each other give unrelated numbers: correlations within chance."""
    rows = [
        streams.normal(seed, [index], streams.TRAIN_NOISE, (4000,))[0]
        for seed in (0, 1) for index in (0, 1, 2)
    ]  # fmt: skip
    correlations = np.corrcoef(rows)[np.triu_indices(len(rows), 1)]
    assert np.abs(correlations).max() < 5 / 4000**0.5


def test_numbers_have_their_distribution():
    """Uniform numbers lie in [0, 1) with mean 1/2, normal ones have mean 0 and variance 1."""
    numbers = streams.uniform(1, range(2000), streams.TIMESTEP)
    assert numbers.dtype == np.float64 and numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 5 * (1 / 12 / 2000) ** 0.5
    noise = streams.normal(1, range(2), streams.NOISE, (50, 50))
    assert abs(noise.mean()) < 5 / 5000**0.5 and abs(noise.var() - 1) < 0.1
    assert 0 <= streams.derived_seed(1, 2, streams.CHAIN) < 2**63


def test_drawing_ahead_changes_nothing():
    """Whether the next batch was foreseen or not, its noise is that of its numbers."""
    ahead = streams.NoiseAhead(5, streams.TRAIN_NOISE)
    batches = [range(0, 4), range(4, 8), range(20, 24), range(24, 26)]
    for numbers in batches:
        following = range(numbers.stop, numbers.stop + 4)  # wrong twice
        noise = ahead.take(numbers, (2, 3), following)
        expected = streams.normal(5, numbers, streams.TRAIN_NOISE, (2, 3))
        np.testing.assert_array_equal(noise, expected)


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 4], [6], [5, 1]])
def test_the_noise_of_a_chain_is_that_of_its_image(sizes):
    """Block k of image i is the same in any batch: the start, then what follows in its chain."""
    ends = np.cumsum(sizes).tolist()
    batches = [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    found = np.empty((6, 3, 2, 5), np.float32)  # image, block, shape
    purposes = (streams.NOISE, streams.CHAIN)
    for indices, noise, prepared in streams.chain_noises(7, batches, (2, 5), purposes, len):
        assert prepared == len(indices)
        for block in range(3):
            found[indices.start : indices.stop, block] = noise.take()
    np.testing.assert_array_equal(found[:, 0], streams.normal(7, range(6), streams.NOISE, (2, 5)))
    for i in range(6):
        chain = streams.stream(7, i, streams.CHAIN)
        expected = chain.standard_normal((2, 2, 5), dtype=np.float32)
        np.testing.assert_array_equal(found[i, 1:], expected)


def test_the_noise_of_the_next_batch_is_begun_before(monkeypatch):
    """While a batch is drawn, the thread has the start of the one after it."""
    begun = []
    draw = streams.normal
    monkeypatch.setattr(
        streams, "normal", lambda seed, i, *rest: begun.append(list(i)) or draw(seed, i, *rest)
    )
    batches, purposes = [range(0, 2), range(2, 4), range(4, 6)], (streams.NOISE, streams.CHAIN)
    pairs = streams.chain_noises(7, batches, (3,), purposes, len)
    indices, noise, _ = next(pairs)
    noise.take()
    noise.take()  # by then the only thread is past the start of the next batch
    assert indices == range(0, 2) and begun == [[0, 1], [2, 3]]
    pairs.close()
