"""How a run ends: at its last step, on a signal, or because it has diverged."""

import csv
import os
import signal

import pytest
import torch
from test_train_util import TINY, Flat, batches, build, loop_of, squares

from guided_diffusion import checkpoint_sets, fp16_util, logger


@pytest.fixture
def diffusion():
    return build(**TINY)[1]


def weights_of(loop):
    """Copy masters and averages."""
    groups = [loop.mp_trainer.master_params, *loop.ema_params]
    return [param.detach().clone() for group in groups for param in group]


def broken_at(steps, how):
    """Return an objective whose loss, or only whose gradient, is not finite in some steps."""
    taken = []

    def objective(model, x_start, t, cond, noise):
        taken.append(len(taken))
        loss = squares(model, x_start, t, cond)["loss"]
        if taken[-1] in steps:
            if how == "gradient":  # the square root has an infinite slope at 0
                loss = loss + (loss - loss).sqrt() * 1e-20
            else:
                loss = loss * torch.tensor(float(how))
        return {"loss": loss}

    return objective


PRECISIONS = [{}, {"use_bf16": True}, {"use_fp16": True, "initial_lg_loss_scale": 4.0}]


def make_loop(diffusion, count, precision, **options):
    """Make a loop around two parameters; fp16 needs a network that can be converted."""
    model = Flat()
    model.convert_to_fp16 = lambda: None
    return loop_of(model, diffusion, batches(count), max_steps=count, **precision | options)


@pytest.mark.parametrize("how", ["nan", "inf", "-inf", "gradient"])
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_a_bad_step_is_not_taken(log_dir, diffusion, precision, how):
    """In every precision a non-finite loss or gradient leaves weights and averages as they are."""
    loop = make_loop(diffusion, 4, precision, loss_fn=broken_at({1}, how))
    history, log_step = [weights_of(loop)], loop.log_step
    loop.log_step = lambda: (history.append(weights_of(loop)), log_step())
    loop.run_loop()
    moved = [
        any(not torch.equal(a, b) for a, b in zip(*pair, strict=True))
        for pair in zip(history, history[1:], strict=False)
    ]
    assert moved == [True, False, True, True]
    assert loop.state.skipped == 1 and loop.state.skipped_in_row == 0
    assert all(value.isfinite().all() for value in history[-1])
    with open(log_dir / "progress.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["skipped"] for row in rows] == ["0", "1", "1", "1"]
    assert not any(value in ("nan", "inf", "-inf") for row in rows for value in row.values())


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_too_many_bad_steps_end_the_run(log_dir, diffusion, precision):
    """After --max_bad_steps in a row the run stops with an error, and saves nothing more."""
    loop = make_loop(
        diffusion, 50, precision, loss_fn=broken_at({1, *range(4, 99)}, "nan"), max_bad_steps=3,
        save_interval=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="3 steps in a row.*--max_bad_steps.*--lr"):
        loop.run_loop()
    assert loop.step == 6
    found = checkpoint_sets.find_newest(str(log_dir))
    assert found.endswith("model000006.pt")
    for path in log_dir.glob("*.pt"):
        content = torch.load(path, weights_only=True)
        for value in content.values():
            assert not torch.is_tensor(value) or value.isfinite().all(), path


def test_non_finite_weights_are_never_saved(log_dir, diffusion):
    """Whatever made them so: the error is one line, and the set before stays the newest."""
    loop = make_loop(diffusion, 2, {}, loss_fn=squares)
    loop.run_loop()
    before = {path.name for path in log_dir.iterdir()}
    for group in (loop.mp_trainer.master_params, loop.ema_params[1]):
        good = group[0].detach().clone()
        group[0].data.fill_(float("nan"))
        loop.step = 5
        with pytest.raises(ValueError, match="after step 5 some weights are not finite"):
            loop.save()
        group[0].data.copy_(good)
    assert {path.name for path in log_dir.iterdir()} == before
    loop.save()
    assert checkpoint_sets.find_newest(str(log_dir)).endswith("model000005.pt")


def test_the_loss_scale_has_a_floor(log_dir, diffusion):
    """It falls by 1 with each overflow, to 0 and no further, and grows again."""
    loop = make_loop(
        diffusion, 8, {"use_fp16": True, "initial_lg_loss_scale": 2.0}, max_bad_steps=9,
        loss_fn=broken_at(range(6), "gradient"), fp16_scale_growth=0.25,
    )  # fmt: skip
    scales, log_step = [], loop.log_step
    loop.log_step = lambda: (scales.append(loop.mp_trainer.lg_loss_scale), log_step())
    loop.run_loop()
    assert scales == [1, 0, 0, 0, 0, 0, 0.25, 0.5] and fp16_util.MIN_LOG_LOSS_SCALE == 0


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e9])
def test_a_long_gradient_is_cut(log_dir, diffusion, clip):
    """--grad_clip bounds the norm that the optimizer sees; the log shows the whole norm."""
    norms = []
    loop = make_loop(diffusion, 1, {}, loss_fn=squares, grad_clip=clip)
    step = loop.opt.step

    def look():
        norms.append(torch.cat([p.grad.flatten() for p in loop.model.parameters()]).norm().item())
        step()

    loop.opt.step = look
    loop.run_loop()
    logged = loop.mp_trainer.metrics["grad_norm"]
    assert logged > 1e-2
    assert norms[0] == pytest.approx(min(clip, logged) if clip else logged, rel=1e-5)


def signalling(count, step, number):
    """Yield batches, and send this process a signal with one of them."""
    for place, batch in enumerate(batches(count)):
        if place == step:
            os.kill(os.getpid(), number)
        yield batch


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_run_after_its_step(log_dir, diffusion, number, capsys):
    """The step is finished, a whole set is saved, and the loop returns as at its end."""
    loop = loop_of(
        Flat(), diffusion, signalling(9, 2, number), loss_fn=squares, max_steps=9, log_interval=2
    )
    loop.run_loop()
    assert loop.step == 3
    newest = checkpoint_sets.find_newest(str(log_dir))
    assert newest.endswith("model000003.pt")
    assert checkpoint_sets.read_state(newest)["step"] == 3
    out = capsys.readouterr().out
    assert f"stopped by {signal.Signals(number).name} after step 3" in out
    assert f"--log_dir {log_dir} --resume_checkpoint auto" in out


def test_a_signal_after_a_save_saves_no_second_time(log_dir, diffusion, monkeypatch):
    """What is just saved is not written again."""
    loop = loop_of(
        Flat(), diffusion, signalling(9, 3, signal.SIGTERM), loss_fn=squares, max_steps=9,
        save_interval=4,
    )  # fmt: skip
    saved, save = [], loop.save
    loop.save = lambda: (saved.append(loop.step), save())
    loop.run_loop()
    assert saved == [4]


def test_a_run_without_an_end_says_so(log_dir, diffusion, capsys):
    """Neither max_steps nor lr_anneal_steps: a line at the start."""
    loop = loop_of(Flat(), diffusion, signalling(3, 0, signal.SIGTERM), loss_fn=squares)
    loop.run_loop()
    out = capsys.readouterr().out
    assert "--max_steps" in out and "until stopped" in out
    assert loop.step == 1 and not [line for line in out.splitlines() if "time_left" in line]


def test_the_first_step_is_told_at_once(log_dir, diffusion, capsys):
    """Before any row or checkpoint, with where the next checkpoint will be."""
    loop = loop_of(
        Flat(), diffusion, batches(2), loss_fn=squares, max_steps=2, log_interval=1000,
        save_interval=500,
    )  # fmt: skip
    loop.run_loop()
    told = capsys.readouterr().out.split("saving")[0]
    assert "step 0: loss 0." in told and "the next checkpoint after 2 steps" in told


def test_the_log_names_the_file_to_sample_from(log_dir, diffusion, capsys):
    """An average counts once less than 5% of it is initial weights; till then the log says so."""
    loop = loop_of(
        Flat(), diffusion, batches(8), loss_fn=squares, max_steps=8, save_interval=2,
        ema_rate="0.5,0.6,0.9999",
    )  # fmt: skip
    loop.run_loop()
    told = [x for x in capsys.readouterr().out.splitlines() if "is saved" in x]
    assert f"model000002.pt for now; 25% of {log_dir}/ema_0.5_000002.pt is still" in told[0]
    assert told[1].endswith("ema_0.5_000004.pt is still the weights it began with")
    assert told[3].endswith(f"sample from {log_dir}/ema_0.6_000008.pt")


def test_without_an_average_the_weights_are_used(log_dir, diffusion, capsys):
    """A classifier keeps none unless asked."""
    loop_of(Flat(), diffusion, batches(1), loss_fn=squares, max_steps=1, ema_rate="").run_loop()
    assert f"use {log_dir}/model000001.pt" in capsys.readouterr().out
    assert not list(log_dir.glob("ema*"))


def test_old_sets_go_as_new_ones_come(log_dir, diffusion, capsys):
    """--keep_checkpoints 2 leaves the last two sets."""
    loop_of(
        Flat(), diffusion, batches(4), loss_fn=squares, max_steps=4, save_interval=1,
        keep_checkpoints=2,
    ).run_loop()  # fmt: skip
    assert sorted(p.name for p in log_dir.glob("model*.pt")) == ["model000003.pt", "model000004.pt"]
    assert "deleted the sets of step 2" in capsys.readouterr().out


def test_a_picture_is_of_the_average_and_leaves_no_trace(log_dir, diffusion):
    """The preview sees the first EMA in eval mode; training goes on as without it."""
    ends, seen = [], []

    def preview(model, step):
        assert not model.training
        torch.rand(3)
        seen.append((step, model.weight.item()))

    for draw in (None, preview):
        torch.manual_seed(5)
        loop = loop_of(
            Flat(), diffusion, batches(5), loss_fn=squares, max_steps=5, preview=draw,
            sample_interval=2, ema_rate="0.9,0.5",
        )  # fmt: skip
        loop.run_loop()
        ends.append([*weights_of(loop), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert [step for step, _ in seen] == [2, 4]
    weights = torch.load(log_dir / "model000005.pt", weights_only=True)["weight"].item()
    assert all(abs(value - 1) < abs(weights - 1) for _, value in seen)
    assert logger.get_dir() == str(log_dir)
