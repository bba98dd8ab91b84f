"""The training loop: parity with the published code, resuming, micro-batches, overflow."""

import csv
import json
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from reference.fill import draw, fill_
from torch.optim import AdamW

from guided_diffusion import sharding
from guided_diffusion.fp16_util import MixedPrecisionTrainer
from guided_diffusion.losses import classifier_losses
from guided_diffusion.nn import update_ema
from guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
from guided_diffusion.train_util import (
    TrainLoop,
    find_ema_checkpoint,
    parse_resume_step_from_filename,
)

REFERENCE = np.load(Path(__file__).parent / "reference" / "training.npz")
RUN = dict(
    num_channels=32, num_res_blocks=1, image_size=32, channel_mult="1,2",
    attention_resolutions="16", num_heads=2, learn_sigma=True, class_cond=True,
    resblock_updown=True, noise_schedule="cosine", rescale_learned_sigmas=True,
)  # fmt: skip
TINY = dict(
    num_channels=32, num_res_blocks=1, image_size=8, channel_mult="1,2",
    attention_resolutions="4", in_channels=1, num_classes=3, class_cond=True, diffusion_steps=20,
    noise_schedule="cosine",
)  # fmt: skip


def build(**options):
    return create_model_and_diffusion(**model_and_diffusion_defaults() | options)


def published_run(use_fp16):
    """Repeat the six steps of the reference run; return its log, weights and average."""
    model, diffusion = build(**RUN, use_fp16=use_fp16)
    fill_(model, 42).train()
    trainer = MixedPrecisionTrainer(model=model, use_fp16=use_fp16, fp16_scale_growth=1e-3)
    if use_fp16:
        model.convert_to_fp16()
    opt = sharding.make_optimizer(trainer.master_params, lr=1e-3, weight_decay=0.05)
    ema = deepcopy(trainer.master_params)
    log = []
    for step in range(6):
        x_start = (0.5 * draw(f"x{step}", (4, 3, 32, 32), 42)).clamp(-1, 1)
        noise = draw(f"noise{step}", (4, 3, 32, 32), 42)
        t = torch.tensor([(137 * step + 251 * i) % 1000 for i in range(4)])
        y = torch.tensor([31 * step + i for i in range(4)])
        trainer.zero_grad()
        losses = diffusion.training_losses(model, x_start, t, dict(y=y), noise)
        terms = [losses[name].mean().item() for name in ("loss", "mse", "vb")]
        log.append([*terms, trainer.lg_loss_scale])
        trainer.backward(losses["loss"].mean())
        took_step = trainer.optimize(opt)
        log[-1].append(float(took_step))
        if took_step:
            update_ema(ema, trainer.master_params, rate=0.9)
    states = [trainer.master_params_to_state_dict(p) for p in (trainer.master_params, ema)]
    return np.array(log), states, len(trainer.master_params)


def test_the_fused_optimizer_is_adamw():
    """Step by step, and its file goes on in a plain one, and that of a plain one in a fused one."""
    params, others = ([torch.linspace(-1, 1, 7).requires_grad_()] for _ in range(2))
    fused = sharding.make_optimizer(params, lr=0.1, weight_decay=0.05)
    plain = AdamW(others, lr=0.1, weight_decay=0.05)
    assert fused.param_groups[0]["fused"] and not plain.param_groups[0]["fused"]
    for step in range(6):
        for opt in (fused, plain):
            (param,) = opt.param_groups[0]["params"]
            param.grad = torch.sin(param.detach() * 3 + step)
            opt.step()
        torch.testing.assert_close(*params, *others, rtol=1e-5, atol=1e-6)
        if step == 2:  # each goes on from the other's file
            files = [sharding.optimizer_state(opt) for opt in (plain, fused)]
            assert not any(file["param_groups"][0]["fused"] for file in files)
            for opt, file in zip((fused, plain), files, strict=True):
                sharding.load_optimizer_state(opt, file)
            assert fused.param_groups[0]["fused"] and not plain.param_groups[0]["fused"]


@pytest.mark.parametrize("use_fp16", [False, True])
def test_gradients_exist_only_within_a_step(use_fp16):
    """After `zero_grad` there are none, so that activations do not come on top of them."""
    model, _ = build(**RUN, use_fp16=use_fp16)
    trainer = MixedPrecisionTrainer(model=model, use_fp16=use_fp16)
    trainer.backward(sum(param.sum().float() for param in model.parameters()))
    assert all(param.grad is not None for param in model.parameters())
    trainer.zero_grad()
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize(
    "name, log_tolerance, norm_tolerance", [("fp32", 1e-4, 2e-3), ("fp16", 2e-2, 2e-2)]
)
def test_six_steps_agree_with_the_published_code(name, log_tolerance, norm_tolerance):
    """Losses, loss scales, weights and EMA follow the published run, in both precisions."""
    log, states, num_masters = published_run(use_fp16=name == "fp16")
    np.testing.assert_allclose(log, REFERENCE[f"{name}/log"], rtol=log_tolerance)
    assert num_masters == REFERENCE[f"{name}/num_master_params"]
    for state, which in zip(states, ("params", "ema"), strict=True):
        assert sorted(state) == list(REFERENCE["names"])
        values = [state[key].detach().double() for key in REFERENCE["names"]]
        sums, norms = REFERENCE[f"{name}/{which}_sum_norm"].T
        np.testing.assert_allclose([v.norm() for v in values], norms, rtol=norm_tolerance)
        most = [v.numel() ** 0.5 * v.norm() for v in values]  # the largest sum of this norm
        errors = np.abs([v.sum() for v in values] - sums) / most
        # A bias before a normalization has no gradient but rounding, which Adam amplifies.
        walks = [key.endswith("in_layers.2.bias") for key in REFERENCE["names"]]
        assert errors[~np.array(walks)].max() < norm_tolerance


class Flat(torch.nn.Module):
    """A network with two parameters, one of each fp16 group."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, 1))
        self.bias = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, t, **cond):
        return x * self.weight + self.bias


def squares(model, x_start, t, cond, noise=None):
    """A loss that draws nothing at random."""
    return {"loss": ((model(x_start, t) - 0.5) ** 2).mean(dim=(1, 2, 3))}


def loop_of(model, diffusion, data, **options):
    same = dict(
        batch_size=4, microbatch=-1, lr=1e-2, ema_rate="0.5,0.9", log_interval=1,
        save_interval=1000, resume_checkpoint="",
    )  # fmt: skip
    return TrainLoop(model=model, diffusion=diffusion, data=iter(data), **same | options)


def batches(count, channels=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        images = torch.rand(4, channels, 8, 8, generator=generator) * 2 - 1
        yield images, {"y": torch.randint(3, (4,), generator=generator)}


@pytest.mark.parametrize("microbatch", [1, 2, 3])
def test_any_microbatch_gives_the_same_gradient(log_dir, microbatch):
    """Splitting a batch is a matter of memory: the gradient stays that of the batch's mean."""
    _, diffusion = build(**TINY)
    grads = []
    for size in (-1, microbatch):
        model = Flat()
        loop = loop_of(model, diffusion, [], microbatch=size, loss_fn=squares)
        loop.forward_backward(*next(batches(1)))
        grads.append(torch.cat([model.weight.grad.flatten(), model.bias.grad]))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=0)


def test_an_overflowing_step_leaves_weights_and_averages_alone(log_dir):
    """A gradient beyond float16 skips the optimizer and every EMA, and lowers the loss scale."""
    model, diffusion = build(**TINY, use_fp16=True)
    fill_(model, 0).convert_to_fp16()
    loop = loop_of(model, diffusion, [], use_fp16=True)
    loop.mp_trainer.lg_loss_scale = 60.0  # 2**60 times any gradient of float16 is infinite
    masters = [p.detach().clone() for p in loop.mp_trainer.master_params]
    averages = [[p.detach().clone() for p in params] for params in loop.ema_params]
    for params in averages:
        params[0].add_(1)  # so that an update would show
    loop.ema_params = [[p.clone() for p in params] for params in averages]
    loop.run_step(*next(batches(1)))
    assert loop.mp_trainer.lg_loss_scale == 59.0
    for now, before in zip(loop.mp_trainer.master_params, masters, strict=True):
        assert torch.equal(now, before)
    for now, before in zip(loop.ema_params, averages, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))
    loop.mp_trainer.lg_loss_scale = 4.0
    loop.run_step(*next(batches(1)))
    assert not torch.equal(loop.mp_trainer.master_params[0], masters[0])


def test_a_resumed_run_equals_an_uninterrupted_one(log_dir):
    """2 steps, stop, resume, 2 steps leave the weights, EMAs and moments of 4 steps."""
    _, diffusion = build(**TINY)
    whole = loop_of(Flat(), diffusion, batches(4), loss_fn=squares, max_steps=4)
    whole.run_loop()
    loop_of(Flat(), diffusion, batches(2), loss_fn=squares, max_steps=2).run_loop()
    rest = list(batches(4))[2:]
    path = str(log_dir / "model000002.pt")
    resumed = loop_of(Flat(), diffusion, rest, loss_fn=squares, max_steps=4, resume_checkpoint=path)
    assert resumed.resume_step == 2
    resumed.run_loop()
    assert torch.equal(whole.model.weight, resumed.model.weight)
    for mine, theirs in zip(whole.ema_params, resumed.ema_params, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    moments = [list(loop.opt.state.values())[0]["exp_avg_sq"] for loop in (whole, resumed)]
    assert torch.equal(*moments)


def test_files_are_numbered_by_updates_and_carry_flags(log_dir):
    """Saves fall on multiples of save_interval and on the end; each weights file has its flags."""
    _, diffusion = build(**TINY)
    loop = loop_of(
        Flat(), diffusion, batches(5), loss_fn=squares, max_steps=5, save_interval=2,
        flags={"image_size": 8},
    )  # fmt: skip
    loop.run_loop()
    saved = {p.name for p in log_dir.iterdir() if p.suffix in (".pt", ".json")}
    expected = set()
    for step in (2, 4, 5):
        weights = {f"{kind}{step:06d}" for kind in ("model", "ema_0.5_", "ema_0.9_")}
        expected |= {f"{name}.{end}" for name in weights for end in ("pt", "json")}
        expected |= {f"opt{step:06d}.pt", f"state{step:06d}.pt"}
    assert saved == expected
    assert json.loads((log_dir / "ema_0.9_000004.json").read_text()) == {"image_size": 8}


def test_the_learning_rate_falls_to_zero_where_training_ends(log_dir):
    """Annealing is linear in the steps taken, and lr_anneal_steps is also the end."""
    _, diffusion = build(**TINY)
    loop = loop_of(Flat(), diffusion, batches(9), loss_fn=squares, lr_anneal_steps=4)
    rates = []
    loop.log_step = lambda: rates.append(loop.opt.param_groups[0]["lr"])
    loop.run_loop()
    np.testing.assert_allclose(rates, [1e-2 * (1 - i / 4) for i in range(4)])


def test_validation_never_touches_the_weights(log_dir):
    """Validation losses are logged under their own name, and training goes on as without them."""
    _, diffusion = build(**TINY)
    ends = []
    for val_data in (None, batches(9, seed=1)):
        loop = loop_of(
            Flat(), diffusion, batches(3), loss_fn=squares, max_steps=3,
            val_data=val_data, eval_interval=2, log_prefix="train_",
        )  # fmt: skip
        loop.run_loop()
        ends.append(loop.model.weight.detach().clone())
    assert torch.equal(*ends)
    with open(log_dir / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["val_loss"]) for row in rows[-3:]] == [True, False, True]
    assert float(rows[0]["train_loss"]) > 0


def test_classifier_losses_see_the_noise_of_their_timestep():
    """Noised training hands x_t and t to the classifier, clean training x_start and t = 0."""
    _, diffusion = build(**TINY)
    seen = []

    def classifier(x, timesteps):
        seen.append((x, timesteps))
        return torch.eye(10)[:4] * 9

    x_start, t = torch.zeros(4, 1, 8, 8), torch.full((4,), 19)
    cond = {"y": torch.tensor([0, 1, 2, 9])}
    losses = classifier_losses(diffusion, True, classifier, x_start, t, cond)
    assert losses["acc@1"].tolist() == [1, 1, 1, 0] and losses["loss"].argmax() == 3
    classifier_losses(diffusion, False, classifier, x_start, t, cond)
    (noisy, its_t), (clean, zero) = seen
    assert noisy.std() > 0.5 and its_t is t
    assert torch.equal(clean, x_start) and zero.tolist() == [0] * 4


@pytest.mark.parametrize(
    "name, step",
    [("a/model000012.pt", 12), ("model1234567.pt", 1234567), ("ema_0.99_000012.pt", 0)],
)
def test_the_step_is_read_from_the_file_name(name, step):
    """Only modelNNNNNN.pt tells how many updates it has seen, in whatever folder it lies."""
    assert parse_resume_step_from_filename(name) == step


def test_ema_files_are_found_beside_the_model(tmp_path):
    """The average that belongs to a model has its rate and step in its name."""
    (tmp_path / "ema_0.9999_000010.pt").touch()
    model = str(tmp_path / "model000010.pt")
    assert find_ema_checkpoint(model, 10, 0.9999) == str(tmp_path / "ema_0.9999_000010.pt")
    assert find_ema_checkpoint(model, 20, 0.9999) is None
    assert find_ema_checkpoint("", 10, 0.9999) is None
