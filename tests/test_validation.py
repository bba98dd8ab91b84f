"""Validation: the same draws each time, over all images, whatever the batch."""

import numpy as np
import torch

from guided_diffusion import logger, streams, validation
from guided_diffusion.train_state import TrainState


def echo(model, x_start, t, cond, noise):
    """A loss that shows what it was given."""
    assert not torch.is_grad_enabled() and not model.training
    return {"loss": noise.mean(dim=(1, 2, 3)) + t + x_start[:, 0, 0, 0], "t": t.float()}


class Images:
    """A validation set of N images whose first pixel is their number, once or for ever."""

    def __init__(self, count, batch_size):
        self.images = torch.arange(count).float()[:, None, None, None].expand(-1, 1, 2, 2)
        self.batch_size, self.place = batch_size, 0

    def seek(self, number):
        self.place = number

    def __iter__(self):
        return self

    def __next__(self):
        batch = self.images[self.place : self.place + self.batch_size]
        if len(batch) == 0:
            raise StopIteration
        self.place += len(batch)
        return batch, {}


def whole(batch_size, microbatch=100):
    """Return what log_whole_set logs about 10 images."""
    validator = validation.Validator(echo, 20, whole=Images(10, batch_size), microbatch=microbatch)
    validator.log_whole_set(torch.nn.Linear(1, 1), TrainState(seed=3))
    kvs = logger.getkvs()
    logger.get_current().restore_window({"values": {}, "counts": {}})
    return kvs


def test_the_whole_set_counts_once_each_time(log_dir):
    """Means over all 10 images, equal for every batch and micro-batch, and the same again."""
    first = whole(4)
    t = (streams_of(range(10)) * 20).astype(int)
    np.testing.assert_allclose(first["val_all_t"], t.mean())
    for quarter in range(4):
        mine = t[t // 5 == quarter]
        if len(mine):
            np.testing.assert_allclose(first[f"val_all_t_q{quarter}"], mine.mean())
    for other in (whole(4), whole(10), whole(3, microbatch=1)):
        assert other.keys() == first.keys()
        np.testing.assert_allclose([*other.values()], [*first.values()], rtol=1e-6)


def streams_of(numbers):
    return streams.uniform(3, numbers, streams.VAL_TIMESTEP)


def test_batches_have_numbers_of_their_own(log_dir):
    """The draws of a batch follow from its place among all, which the state keeps."""
    state, model = TrainState(seed=3), torch.nn.Linear(1, 1)
    validator = validation.Validator(echo, 20, data=Images(10, 4), microbatch=100)
    validator.log_batch(model, state)
    validator.log_batch(model, state)
    assert state.val_images == 8 and model.training
    t = (streams_of(range(8)) * 20).astype(int)
    np.testing.assert_allclose(logger.getkvs()["val_t"], t.mean())
    validator.log_whole_set(model, state)  # there is none: nothing happens
    assert not [key for key in logger.getkvs() if key.startswith("val_all")]
