"""Random numbers as a function of a seed, an index and a purpose, for training and for sampling.

What is drawn for image `index` of a run depends on nothing else: not on the batch it is in, the
rank that holds it, or what was drawn before. So a run that is stopped and goes on, or that goes on
with other ranks, draws the same numbers. The generator is NumPy's Philox, which is counter-based.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

# What a stream is for. Streams of one seed and index that differ in it share no number.
NOISE, LABEL, CHAIN = 0, 1, 2  # of a sample: starting noise, class, noise within the chain
ORDER = 3  # of an epoch (index = epoch): the order of its images
AUGMENT, DROP_LABEL = 4, 5  # of a training image: its crop and flip, its label's fate
TIMESTEP, TRAIN_NOISE = 6, 7  # of a training image: t, and the noise in x_t
VAL_TIMESTEP, VAL_NOISE = 8, 9  # of a validation image: the same
START = 10  # of a rank at a place in the run: dropout; see train_state.seed_rank
SAMPLE = 11  # of an image drawn while training
UP_NOISE, UP_CHAIN = 13, 14  # of an upsampled image, as NOISE and CHAIN: its input has those
INPAINT_NOISE, INPAINT_CHAIN = 15, 16  # of an image that is drawn anew in part: the same
LOW_RES = 12  # of a sample: the noise added to the small image that is upsampled


def stream(seed: int, index: int, purpose: int) -> np.random.Generator:
    """Return the random numbers of `index`: a counter-based generator, keyed by seed and index.

    Args:
        seed: 0 to 2**62.
        index: 0 or more: of an image in its run, of an epoch, of a rank.
        purpose: one of the constants above.
    """
    return np.random.Generator(np.random.Philox(key=[seed, index], counter=[0, 0, 0, purpose]))


def normal(seed: int, indices: Iterable[int], purpose: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return a standard normal array for each index, float32 [N, *shape]."""
    indices = list(indices)
    draws = np.empty((len(indices), *shape), np.float32)
    for row, index in zip(draws, indices, strict=True):
        stream(seed, index, purpose).standard_normal(dtype=np.float32, out=row)
    return draws


def uniform(seed: int, indices: Iterable[int], purpose: int) -> np.ndarray:
    """Return a number in [0, 1) for each index, float64 [N]."""
    return np.array([stream(seed, index, purpose).random() for index in indices])


def derived_seed(seed: int, index: int, purpose: int) -> int:
    """Return a seed in [0, 2**63) for a generator of another kind."""
    return int(stream(seed, index, purpose).integers(2**63))


class NoiseAhead:
    """The noise of training images, drawn for the next batch while the network has the present one.

    Args:
        seed: of the run.
        purpose: of the streams, as for `normal`.
    """

    def __init__(self, seed: int, purpose: int):
        self._draw = partial(normal, seed, purpose=purpose)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="noise")
        self._awaited: tuple[Any, Future] | None = None

    def take(self, numbers: range, shape: tuple[int, ...], following: range) -> np.ndarray:
        """Return the noise of some images, float32 [N, *shape], and begin with the `following`."""
        key, drawn = self._awaited or (None, None)
        noise = drawn.result() if key == (numbers, shape) else self._draw(numbers, shape=shape)
        ahead = self._thread.submit(self._draw, following, shape=shape)
        self._awaited = (following, shape), ahead
        return noise


class ChainNoise:
    """The noise of a batch of samples, one block after the other, drawn while the network works.

    First the starting noise of each image, then the noise of each step of its chain. What an image
    gets depends on the seed, its index and the number of the block alone.

    Args:
        thread: draws the next block.
        seed: of the run.
        indices: of the images.
        shape: of an image.
        purposes: of the stream of the start, and of that of the steps.
    """

    def __init__(
        self,
        thread: ThreadPoolExecutor,
        seed: int,
        indices: Iterable[int],
        shape: tuple[int, ...],
        purposes: tuple[int, int] = (NOISE, CHAIN),
    ):
        self._thread = thread
        self._blocks = self._draw(seed, list(indices), shape, *purposes)
        self._awaited = thread.submit(next, self._blocks)

    @staticmethod
    def _draw(
        seed: int, indices: list[int], shape: tuple[int, ...], start: int, steps: int
    ) -> Iterator[np.ndarray]:
        yield normal(seed, indices, start, shape)
        chains = [stream(seed, index, steps) for index in indices]
        while True:
            block = np.empty((len(indices), *shape), np.float32)
            for row, chain in zip(block, chains, strict=True):
                chain.standard_normal(dtype=np.float32, out=row)
            yield block

    def take(self) -> np.ndarray:
        """Return the next block, float32 [N, *shape], and let the one after it be drawn."""
        block = self._awaited.result()
        self._awaited = self._thread.submit(next, self._blocks)
        return block


def chain_noises(
    seed: int,
    batches: Iterable[range],
    shape: tuple[int, ...],
    purposes: tuple[int, int],
    prepare: Callable[[range], Any],
) -> Iterator[tuple[range, ChainNoise, Any]]:
    """Yield each batch of images with its noise and its inputs; those of the next are begun before.

    Args:
        seed: of the run.
        batches: the indices of each.
        shape: of an image.
        purposes: as for `ChainNoise`.
        prepare: makes the other inputs of a batch, in the thread that draws.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="noise") as thread:
        made = (
            (
                indices,
                ChainNoise(thread, seed, indices, shape, purposes),
                thread.submit(prepare, indices),
            )
            for indices in batches
        )
        present = next(made, None)
        while present is not None:
            following = next(made, None)
            indices, noise, prepared = present
            yield indices, noise, prepared.result()
            present = following
