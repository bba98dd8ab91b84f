"""Which images of a run each step and each rank gets: a function of seed and position alone.

Image number k of a run is entry k mod N of epoch k // N, and each epoch has an order of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from . import streams

Picks = list[tuple[int, int]]  # what a batch holds: numbers within the run, and their entries


class EpochOrder:
    """Which entry each image number of a run is.

    Args:
        num_entries: N, the number of entries.
        seed: of the epochs' orders; None for the order of the entries in every epoch.
    """

    def __init__(self, num_entries: int, seed: int | None):
        self.num_entries = num_entries
        self.seed = seed
        self._epoch = lru_cache(maxsize=2)(self._draw)  # a batch may lie across two

    def _draw(self, epoch: int) -> np.ndarray:
        if self.seed is None:
            return np.arange(self.num_entries)
        return streams.stream(self.seed, epoch, streams.ORDER).permutation(self.num_entries)

    def picks(self, start: int, stop: int) -> Picks:
        """Return the image numbers from start to stop, each with its entry."""
        entries = []
        while (number := start + len(entries)) < stop:
            epoch, done = divmod(number, self.num_entries)
            entries += self._epoch(epoch)[done : done + stop - number].tolist()
        return list(zip(range(start, stop), entries, strict=True))


def endless_batches(
    order: EpochOrder, batch_size: int, rank: int, world_size: int, start: int
) -> Iterator[Picks]:
    """Yield one rank's part of each step, for ever; the first step begins at number `start`."""
    while True:
        mine = start + rank * batch_size
        yield order.picks(mine, mine + batch_size)
        start += world_size * batch_size


def single_pass(
    num_entries: int, batch_size: int, rank: int, world_size: int, start: int
) -> Iterator[Picks]:
    """Yield every world_size-th entry from start + rank on, a batch at a time, to the last."""
    mine = range(start + rank, num_entries, world_size)
    for at in range(0, len(mine), batch_size):
        yield [(entry, entry) for entry in mine[at : at + batch_size]]
