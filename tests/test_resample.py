"""Timestep samplers: the published numbers, unbiased weights, agreement across ranks."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from guided_diffusion.resample import (
    SCHEDULE_SAMPLERS,
    LossSecondMomentResampler,
    ScheduleSampler,
    UniformSampler,
    create_named_schedule_sampler,
)

REFERENCE = np.load(Path(__file__).parent / "reference" / "diffusion.npz")


def steps(count):
    """Stand in for a process: samplers read its length only."""
    return SimpleNamespace(num_timesteps=count)


def test_the_second_moment_sampler_agrees_with_the_reference():
    sampler = create_named_schedule_sampler("loss-second-moment", steps(20))
    sampler.update_with_all_losses(REFERENCE["second_moment/ts"], REFERENCE["second_moment/losses"])
    np.testing.assert_allclose(sampler.weights(), REFERENCE["second_moment/weights"], rtol=1e-12)
    np.random.seed(0)
    t, weights = sampler.sample(16, "cpu")
    assert (t.dtype, weights.dtype) == (torch.int64, torch.float32)
    np.testing.assert_array_equal(t.numpy(), REFERENCE["second_moment/sample_t"])
    np.testing.assert_allclose(weights.numpy(), REFERENCE["second_moment/sample_w"], rtol=1e-6)


def test_uniform_draws_have_weight_one():
    t, weights = UniformSampler(steps(7)).sample(500, torch.device("cpu"))
    assert set(t.tolist()) == set(range(7))
    torch.testing.assert_close(weights, torch.ones(500))


class Skewed(ScheduleSampler):
    def weights(self):
        return np.array([1.0, 2.0, 5.0, 12.0])


def test_importance_weights_are_unbiased():
    """Sum over t of p(t) w(t) f(t) must be the plain mean of f; so it is on average over draws."""
    np.random.seed(0)
    t, weights = Skewed().sample(200_000, "cpu")
    f = torch.tensor([3.0, -1.0, 4.0, 1.0])
    assert float((weights * f[t]).mean()) == pytest.approx(float(f.mean()), abs=0.03)
    p = np.array([1, 2, 5, 12]) / 20
    np.testing.assert_allclose(weights.numpy(), 1 / (4 * p[t.numpy()]), rtol=1e-6)


def test_draws_are_uniform_until_every_timestep_has_a_history():
    sampler = LossSecondMomentResampler(steps(3), history_per_term=2)
    sampler.update_with_all_losses([0, 0, 1, 1, 2], [9.0, 9.0, 1.0, 1.0, 1.0])
    np.testing.assert_array_equal(sampler.weights(), np.ones(3))
    sampler.update_with_all_losses([2], [1.0])
    weights = sampler.weights()
    assert weights.sum() == pytest.approx(1)
    assert weights[0] / weights[1] == pytest.approx(9, rel=0.01)


def test_a_full_history_forgets_its_oldest_loss():
    sampler = LossSecondMomentResampler(steps(2), history_per_term=3, uniform_prob=0.0)
    sampler.update_with_all_losses([0] * 4 + [1] * 3, [100.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    np.testing.assert_allclose(sampler.weights(), [0.5, 0.5])


def test_no_timestep_is_ever_forgotten():
    sampler = LossSecondMomentResampler(steps(4), history_per_term=1, uniform_prob=0.2)
    sampler.update_with_all_losses([0, 1, 2, 3], [1.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(sampler.weights(), [0.85, 0.05, 0.05, 0.05])


@pytest.mark.parametrize("name", SCHEDULE_SAMPLERS)
def test_samplers_by_name(name):
    t, weights = create_named_schedule_sampler(name, steps(5)).sample(3, "cpu")
    assert t.shape == weights.shape == (3,)


def test_an_unknown_sampler_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"--schedule_sampler.*loss-second-moment.*'best'"):
        create_named_schedule_sampler("best", steps(5))


BATCHES = [([0, 1, 1], [1.0, 2.0, 3.0]), ([2, 0], [4.0, 5.0])]  # ranks may differ in size


def history(batches):
    sampler = LossSecondMomentResampler(steps(3), history_per_term=2)
    for ts, losses in batches:
        sampler.update_with_local_losses(torch.tensor(ts), torch.tensor(losses, requires_grad=True))
    return sampler._loss_history


def test_one_process_learns_from_its_own_batch():
    expected = np.array([[1, 5], [2, 3], [4, 0]])
    np.testing.assert_array_equal(history(BATCHES), expected)


def run_rank(rank, folder):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    np.save(f"{folder}/{rank}.npy", history([BATCHES[rank]]))
    dist.destroy_process_group()


def test_all_ranks_learn_from_all_batches(tmp_path):
    mp.spawn(run_rank, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        np.testing.assert_array_equal(np.load(tmp_path / f"{rank}.npy"), history(BATCHES))
