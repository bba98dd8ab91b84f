"""The state file: what a run needs besides weights, averages and optimizer."""

import io
import random

import numpy as np
import pytest
import torch

from guided_diffusion import dist_util, logger, train_state
from guided_diffusion.train_state import TrainState


def through_a_file(value):
    """Save and load as a checkpoint is saved and loaded: nothing but tensors and plain values."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def draw_all():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3)


def same(one, other):
    return one[:4] == other[:4] and torch.equal(one[4], other[4])


@pytest.mark.parametrize("seed", [0, 1])
def test_random_generators_go_on(log_dir, seed):
    """Python's, numpy's and torch's generators draw after a restart what they would have drawn."""
    train_state.seed_globally(seed)
    draw_all()  # leaves half a Gaussian in Python's and numpy's generators
    captured = through_a_file(train_state.capture_random())
    expected = draw_all()
    train_state.seed_globally(99)
    train_state.restore_random(captured)
    assert same(draw_all(), expected)


def test_a_picture_leaves_no_trace(log_dir):
    """Within random_kept anything may be drawn."""
    train_state.seed_globally(4)
    expected = draw_all()
    train_state.seed_globally(4)
    with train_state.random_kept():
        draw_all()
    assert same(draw_all(), expected)


def test_counters_survive_the_file(log_dir):
    """What is saved is what is read."""
    state = TrainState(
        step=3, images=48, val_images=4, seed=2**62, lg_loss_scale=19.5, skipped=2,
        skipped_in_row=1, last_row=2, ema_began={"0.9": 1}, sampler={"counts": torch.arange(3)},
    )  # fmt: skip
    logger.logkv_mean("loss", 0.1)
    logger.logkv_mean("loss", 0.2)
    logger.logkv("name", "x")
    saved = through_a_file(state.to_dict())
    read = TrainState.from_dict(saved, "state.pt")
    assert torch.equal(read.sampler.pop("counts"), state.sampler.pop("counts")) and read == state
    [rank] = saved["ranks"]
    assert rank["log"] == {"values": {"loss": 0.1 + 0.2, "name": "x"}, "counts": {"loss": 2}}


DAMAGES = [
    {"step": "many"},
    {"step": -4},
    {"images": None},
    {"seed": 0.5},
    {"seed": 2**80},
    {"ema_began": 3},
    {"lg_loss_scale": "high"},
    {"lg_loss_scale": 1e300},
    {"ranks": 3},
    {"ranks": [3]},
    {"ranks": [{}]},
    {"ranks": [{"random": {}, "log": {}}]},
]


@pytest.mark.parametrize("change", DAMAGES, ids=str)
def test_a_damaged_state_is_told(log_dir, change):
    """One line, with the path and the remedy."""
    saved = TrainState().to_dict() | change
    with pytest.raises(ValueError, match=r"x/state\.pt is damaged: .* start it cold"):
        TrainState.from_dict(saved, "x/state.pt")
    del saved[next(iter(change))]
    with pytest.raises(ValueError, match="damaged"):
        TrainState.from_dict(saved, "x/state.pt")


def test_any_number_in_the_log_can_be_saved(log_dir):
    """Numbers of numpy and torch are saved as plain ones or tensors, and go on adding up."""
    for value in (np.float64(0.5), np.float32(0.5), np.int64(2), torch.tensor(0.5), True):
        logger.logkv_mean("mean", value)
        logger.logkv(f"last {type(value).__name__}", value)
    saved = through_a_file(TrainState().to_dict())
    logger.get_current().restore_window(saved["ranks"][0]["log"])
    logger.logkv_mean("mean", 0.5)
    assert logger.getkvs()["mean"] == (0.5 + 0.5 + 2 + 0.5 + 1 + 0.5) / 6


def test_steps_are_counted(log_dir):
    """Only skipped steps one after the other are too many."""
    state = TrainState(step=7)
    for took_step in (False, False, True, False, False):
        state.count(took_step, max_bad_steps=3)
    assert (state.skipped, state.skipped_in_row) == (4, 2)
    with pytest.raises(ValueError, match="3 steps in a row, up to step 7, .*--lr.*--grad_clip"):
        state.count(False, max_bad_steps=3)


def saved_ranks(count):
    """Return what `count` ranks keep: a mean of rank + 1, once or twice, and a random state."""
    ranks = []
    for rank in range(count):
        window = {"values": {"a": rank + 1.0, "step": 5}, "counts": {"a": 1 + rank % 2}}
        train_state.seed_globally(rank)
        ranks.append({"random": train_state.capture_random(), "log": window})
    return ranks


def test_each_rank_gets_back_its_own(log_dir, monkeypatch):
    """With as many ranks as before, each goes on with its generators and its window."""
    ranks = saved_ranks(2)
    monkeypatch.setattr(dist_util, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist_util, "get_rank", lambda: 1)
    train_state.restore_rank(ranks, seed=1, images=10)
    train_state_of_1 = draw_all()
    train_state.seed_globally(1)
    assert same(draw_all(), train_state_of_1)
    assert logger.getkvs() == {"a": 1.0, "step": 5}


def test_other_ranks_share_what_was_kept(log_dir, monkeypatch):
    """With another number of ranks rank 0 gets all sums, and dropout a seed of rank and place."""
    ranks, draws = saved_ranks(3), []
    for rank in (0, 1):
        monkeypatch.setattr(dist_util, "get_world_size", lambda: 2)
        monkeypatch.setattr(dist_util, "get_rank", lambda rank=rank: rank)
        logger.get_current().restore_window({"values": {}, "counts": {}})
        train_state.restore_rank(ranks, seed=1, images=10)
        draws.append(draw_all())
        assert logger.getkvs() == ({} if rank else {"a": (1 + 2 + 3) / 4, "step": 5})
    assert not same(*draws)
    train_state.seed_rank(1, images=11)
    assert not same(draw_all(), draws[1])
