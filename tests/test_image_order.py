"""guided_diffusion.image_order: one order of images for all ranks, which no rank count changes."""

import itertools

import numpy as np
import pytest

from guided_diffusion import streams
from guided_diffusion.image_order import EpochOrder, endless_batches, single_pass


def taken(order, batch_size, world_size, num_steps, start=0):
    """Return what all ranks together see, in order."""
    ranks = [endless_batches(order, batch_size, r, world_size, start) for r in range(world_size)]
    return [pick for _ in range(num_steps) for rank in ranks for pick in next(rank)]


@pytest.mark.parametrize("batch_size, world_size", [(12, 1), (6, 2), (4, 3), (3, 4), (1, 12)])
def test_ranks_share_one_sequence(batch_size, world_size):
    """Any split of a step of 12 shows images 0, 1, 2, ..., each the entry of its own epoch."""
    picks = taken(EpochOrder(7, 3), batch_size, world_size, num_steps=5)
    numbers, entries = zip(*picks, strict=True)
    assert numbers == tuple(range(60))
    wanted = [streams.stream(3, epoch, streams.ORDER).permutation(7) for epoch in range(9)]
    assert entries == tuple(np.concatenate(wanted).tolist()[:60])


@pytest.mark.parametrize("num_entries", [1, 2, 5, 100])
def test_each_epoch_shows_each_entry_once(num_entries):
    """Every epoch is a permutation; epochs and seeds differ, unless there is nothing to permute."""
    orders = {}
    for seed in (0, 1):
        entries = [entry for _, entry in EpochOrder(num_entries, seed).picks(0, 10 * num_entries)]
        epochs = (
            list(itertools.batched(entries, num_entries))
            if hasattr(itertools, "batched")
            else list(zip(*[iter(entries)] * num_entries, strict=True))
        )
        assert all(sorted(epoch) == list(range(num_entries)) for epoch in epochs)
        orders[seed] = epochs
    if num_entries == 100:
        assert len({*orders[0], *orders[1]}) == 20


def test_without_a_seed_the_order_is_that_of_the_entries():
    """Then every epoch is 0, 1, ..., N - 1."""
    assert EpochOrder(3, None).picks(4, 10) == [(4, 1), (5, 2), (6, 0), (7, 1), (8, 2), (9, 0)]


def test_any_position_is_reached_without_what_lies_before(monkeypatch):
    """Epoch 10**9 costs one permutation, and a run in order one for each epoch."""
    drawn = []
    draw = EpochOrder._draw
    monkeypatch.setattr(EpochOrder, "_draw", lambda self, e: drawn.append(e) or draw(self, e))
    order = EpochOrder(100, 0)
    far = taken(order, 8, 2, 2, start=10**11 + 40)
    assert drawn == [10**9] and [number for number, _ in far] == list(
        range(*(10**11 + 40, 10**11 + 72))
    )
    drawn.clear()
    taken(order, 8, 2, 20)
    assert drawn == [0, 1, 2, 3]


@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
@pytest.mark.parametrize("start", [0, 4])
def test_a_single_pass_misses_nothing(world_size, start):
    """Rank r sees entries start + r, start + r + w, ...; only its last batch may be short."""
    seen = []
    for rank in range(world_size):
        batches = list(single_pass(11, 4, rank, world_size, start))
        found = [entry for batch in batches for _, entry in batch]
        assert found == list(range(start + rank, 11, world_size))
        assert all(len(batch) == 4 for batch in batches[:-1])
        seen += found
    assert sorted(seen) == list(range(start, 11))
