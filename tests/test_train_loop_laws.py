"""Laws of the training loop: which weights, precision, mode and rates a step goes by."""

import pytest
import torch
from test_train_util import TINY, Flat, batches, build, loop_of, squares

from guided_diffusion.resample import LossAwareSampler, UniformSampler


@pytest.fixture
def diffusion():
    return build(**TINY)[1]


class Weighted(UniformSampler):
    """Uniform timesteps with importance weights of the test's choice."""

    def __init__(self, diffusion, importance):
        super().__init__(diffusion)
        self.importance = torch.tensor(importance)

    def sample(self, batch_size, device):
        return super().sample(batch_size, device)[0], self.importance[:batch_size]


def gradient(diffusion, batch, cond, importance):
    """Return the gradient of both parameters that one batch leaves, [2]."""
    model = Flat()
    sampler = Weighted(diffusion, importance)
    loop = loop_of(model, diffusion, [], loss_fn=squares, schedule_sampler=sampler)
    loop.forward_backward(batch, cond)
    return torch.cat([model.weight.grad.flatten(), model.bias.grad])


def test_importance_weights_multiply_each_loss(log_dir, diffusion):
    """Weights of 2 double the gradient; one weight of N leaves that image's gradient alone."""
    batch, cond = next(batches(1))
    plain = gradient(diffusion, batch, cond, [1.0] * 4)
    assert plain.abs().min() > 0
    torch.testing.assert_close(gradient(diffusion, batch, cond, [2.0] * 4), 2 * plain)
    second = gradient(diffusion, batch[1:2], {"y": cond["y"][1:2]}, [1.0])
    torch.testing.assert_close(gradient(diffusion, batch, cond, [0.0, 4.0, 0.0, 0.0]), second)


@pytest.mark.parametrize("use_bf16", [True, False])
def test_bf16_is_autocast_around_the_objective(log_dir, diffusion, use_bf16):
    """In training and in validation, use_bf16 and nothing else makes matrix products bfloat16."""
    seen = []

    def objective(model, x_start, t, cond, noise):
        enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        seen.append((enabled, dtype if enabled else None))
        return squares(model, x_start, t, cond)

    loop = loop_of(
        Flat(), diffusion, batches(1), loss_fn=objective, max_steps=1, use_bf16=use_bf16,
        val_data=batches(1), eval_interval=1,
    )  # fmt: skip
    loop.run_loop()
    assert seen == [(True, torch.bfloat16) if use_bf16 else (False, None)] * 2
    assert loop.model.weight.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


def test_validation_is_in_eval_mode_and_training_is_not(log_dir, diffusion):
    """A validation batch sees neither dropout nor gradients, the step after it both again."""
    seen = []

    def objective(model, x_start, t, cond, noise):
        seen.append((model.training, torch.is_grad_enabled()))
        return squares(model, x_start, t, cond)

    loop = loop_of(
        Flat(), diffusion, batches(2), loss_fn=objective, max_steps=2, val_data=batches(2),
        eval_interval=1,
    )  # fmt: skip
    loop.run_loop()
    assert seen == [(True, True), (False, False)] * 2
    assert loop.model.training


class Pupil(LossAwareSampler):
    """A sampler that remembers what it drew and what it was taught."""

    def __init__(self, diffusion):
        self.num_timesteps, self.drawn, self.lessons = diffusion.num_timesteps, [], []

    def weights(self):
        return torch.arange(1, self.num_timesteps + 1).numpy()  # so that importance is not 1

    def sample(self, batch_size, device):
        self.drawn.append(super().sample(batch_size, device))
        return self.drawn[-1]

    def update_with_local_losses(self, local_ts, local_losses):
        self.lessons.append((local_ts, local_losses))

    def update_with_all_losses(self, ts, losses):
        raise AssertionError("only update_with_local_losses may call this")


@pytest.mark.parametrize("microbatch", [-1, 3, 1])
def test_a_loss_aware_sampler_learns_from_the_whole_batch(log_dir, diffusion, microbatch):
    """It draws once a step, and is taught these timesteps with their losses [N], unweighted."""
    batch, cond = next(batches(1))
    sampler, model = Pupil(diffusion), Flat()
    loop = loop_of(
        model, diffusion, [], loss_fn=squares, schedule_sampler=sampler, microbatch=microbatch,
    )  # fmt: skip
    loop.forward_backward(batch, cond)
    [(t, _)], [(ts, losses)] = sampler.drawn, sampler.lessons
    assert torch.equal(ts, t)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, squares(model, batch, None, cond)["loss"].detach())


def test_weight_decay_reaches_the_optimizer_and_its_file(log_dir, diffusion):
    """The saved optimizer state tells the weight decay and learning rate of the run."""
    loop_of(
        Flat(), diffusion, batches(1), loss_fn=squares, max_steps=1, weight_decay=0.05,
    ).run_loop()  # fmt: skip
    groups = torch.load(log_dir / "opt000001.pt", weights_only=True)["param_groups"]
    assert [(group["weight_decay"], group["lr"]) for group in groups] == [(0.05, 1e-2)] * len(
        groups
    )


def test_each_update_goes_by_the_learning_rate_of_its_place(log_dir, diffusion):
    """Of N annealed updates, the optimizer takes number i, from 0 on, at lr (1 - i / N)."""
    loop = loop_of(Flat(), diffusion, batches(4), loss_fn=squares, lr_anneal_steps=4)
    rates, take_step = [], loop.opt.step

    def step(*args, **kwargs):
        rates.append(loop.opt.param_groups[0]["lr"])
        return take_step(*args, **kwargs)

    loop.opt.step = step
    loop.run_loop()
    torch.testing.assert_close(rates, [1e-2, 0.75e-2, 0.5e-2, 0.25e-2])


@pytest.mark.parametrize("rates", ["0.9,0.5", "0.5,0.9", "0,1", "0.5"])
def test_each_average_is_of_the_rate_in_its_name(log_dir, diffusion, rates):
    """ema_RATE_N.pt is the average, with that rate, of the start and the weights of each step."""
    loop = loop_of(
        Flat(), diffusion, batches(3), loss_fn=squares, max_steps=3, ema_rate=rates,
    )  # fmt: skip
    weights, log_step = [loop.model.weight.item()], loop.log_step

    def remember():
        weights.append(loop.model.weight.item())
        log_step()

    loop.log_step = remember
    loop.run_loop()
    assert len(set(weights)) == 4
    for rate in rates.split(","):
        average = weights[0]
        for weight in weights[1:]:
            average = float(rate) * average + (1 - float(rate)) * weight
        path = log_dir / f"ema_{float(rate)}_000003.pt"
        saved = torch.load(path, weights_only=True)["weight"].item()
        assert saved == pytest.approx(average, rel=1e-6), rate
