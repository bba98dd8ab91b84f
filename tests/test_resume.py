"""A run that stops and goes on is the run that never stopped; and everything near to that."""

import csv
import random
import shutil

import numpy as np
import pytest
import torch
from reference.fill import fill_
from scripting import make_images
from test_train_util import TINY, build

from guided_diffusion import checkpoints, dist_util, logger
from guided_diffusion.image_datasets import load_data
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.train_util import TrainLoop

TIMES = {"images_per_second", "seconds_per_step", "peak_memory_mb", "time_left"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(make_images(tmp_path_factory.mktemp("images") / "data", count=10))


@pytest.fixture(autouse=True)
def cpu():
    dist_util.setup_dist("cpu")


def disturb():
    """Leave the global generators as another process would find them."""
    random.seed(123)
    np.random.seed(123)
    torch.manual_seed(123)


def run(folder, data_dir, steps, resume="", seed=5, sampler="uniform", **options):
    """Train a tiny network with dropout up to a step; return the loop."""
    disturb()
    with logger.session(str(folder)):
        model, diffusion = build(
            **TINY,
            dropout=0.2,
            learn_sigma=True,
            label_dropout=0.2,
            use_fp16=options.get("use_fp16", False),
        )
        fill_(model, seed)
        data = load_data(
            data_dir=data_dir, batch_size=4, image_size=8, class_cond=True, in_channels=1,
            seed=seed, random_crop=True, num_classes=3, label_dropout=0.2, num_workers=0,
        )  # fmt: skip
        schedule_sampler = create_named_schedule_sampler(sampler, diffusion)
        if sampler != "uniform" and not resume:  # past its warm-up, in which draws are uniform
            schedule_sampler.update_with_all_losses(2 * 5 * [*range(20)], 10 * [*range(20)])
        same = dict(
            batch_size=4, microbatch=3, lr=1e-3, ema_rate="0.5,0.9", log_interval=3,
            save_interval=1000, seed=seed, max_steps=steps, resume_checkpoint=resume,
            schedule_sampler=schedule_sampler,
        )  # fmt: skip
        loop = TrainLoop(model=model, diffusion=diffusion, data=data, **same | options)
        loop.run_loop()
        data.close()
    return loop


def equal(one, other):
    """Compare nested containers of tensors bit by bit."""
    if torch.is_tensor(one):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def rows_of(folder):
    """Return the rows of progress.csv without the figures that measure time and memory."""
    with open(folder / "progress.csv") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def assert_same_run(one, other, step):
    """All files of a step and all rows of the log agree, bit by bit."""
    names = sorted(path.name for path in one.glob(f"*{step:06d}.pt"))
    assert len(names) == 5 and names == sorted(path.name for path in other.glob(f"*{step:06d}.pt"))
    for name in names:
        mine, theirs = (torch.load(folder / name, weights_only=True) for folder in (one, other))
        if name.startswith("state"):
            del mine["files"], theirs["files"]  # sizes vary with how tensors share their memory
        assert equal(mine, theirs), name
    assert rows_of(one) == rows_of(other)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampler": "loss-second-moment", "seed": 11},
        {"use_fp16": True, "initial_lg_loss_scale": 8.0},
        {"use_bf16": True, "grad_clip": 0.5},
        {"microbatch": -1, "lr_anneal_steps": 9, "seed": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_going_on_is_not_having_stopped(tmp_path, data_dir, options, stop):
    """Weights, EMAs, moments, state and rows of 7 steps are those of `stop` and 7 - `stop`."""
    run(tmp_path / "whole", data_dir, 7, **options)
    run(tmp_path / "parts", data_dir, stop, **options)
    run(tmp_path / "parts", data_dir, 7, resume=str(tmp_path / "parts"), **options)
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 7)


def test_a_loss_aware_sampler_remembers(tmp_path, data_dir):
    """A resumed run draws with the weights that were learnt, not with those of a fresh sampler."""
    loop = run(tmp_path, data_dir, 1, sampler="loss-second-moment")
    weights = loop.schedule_sampler.weights()
    assert weights.max() > 2 * weights.min()
    resumed = run(tmp_path, data_dir, 1, sampler="loss-second-moment", resume=str(tmp_path))
    np.testing.assert_array_equal(resumed.schedule_sampler.weights(), weights)


def test_the_log_shows_what_was_read(tmp_path, data_dir, capsys):
    """Model, each average, optimizer and state: from which file."""
    run(tmp_path, data_dir, 2)
    capsys.readouterr()
    run(tmp_path, data_dir, 3, resume=str(tmp_path / "model000002.pt"), ema_rate="0.5,0.99")
    out = capsys.readouterr().out
    for name in ("model", "ema_0.5_", "opt", "state"):
        assert f"from {tmp_path}/{name}000002.pt" in out
    assert "EMA 0.99: cold" in out and "8 images seen" in out and "seed 5" in out


def test_rows_past_the_step_are_dropped(tmp_path, data_dir):
    """Going back to an earlier set takes the later rows out of progress.csv and log.txt."""
    run(tmp_path / "a", data_dir, 9, save_interval=4)
    assert [row["step"] for row in rows_of(tmp_path / "a")] == ["0", "3", "6", "8"]
    run(tmp_path / "a", data_dir, 7, resume=str(tmp_path / "a" / "model000004.pt"))
    run(tmp_path / "whole", data_dir, 7)
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "whole")
    tables = (tmp_path / "a" / "log.txt").read_text().split("| step ")[1:]
    assert [int(table.split("|")[1]) for table in tables] == [0, 3, 6]


def test_a_published_set_goes_on(tmp_path, data_dir, capsys):
    """Without state and flags the weights, averages and moments go on, and the log says the rest.

    Numbers of images are those of a run with the present batch, so the order is the run's.
    """
    run(tmp_path, data_dir, 2)
    (tmp_path / "state000002.pt").unlink()
    whole = run(tmp_path / "whole", data_dir, 3)
    capsys.readouterr()
    loop = run(tmp_path, data_dir, 3, resume=str(tmp_path))
    out = capsys.readouterr().out
    assert "state: cold" in out and "goes on with image 8, by steps and batch size" in out
    assert loop.state.images == whole.state.images == 12 and loop.state.step == 3
    assert loop.opt.state_dict()["state"][0]["step"] == 3


def test_without_its_optimizer_a_set_goes_on_cold(tmp_path, data_dir, capsys):
    """As one does who wants another learning rate."""
    run(tmp_path, data_dir, 2)
    (tmp_path / "opt000002.pt").unlink()
    path = str(tmp_path / "model000002.pt")
    loop = run(tmp_path, data_dir, 3, resume=path, lr=5e-4)
    assert "optimizer: cold" in capsys.readouterr().out
    assert loop.opt.param_groups[0]["lr"] == 5e-4
    assert loop.opt.state_dict()["state"][0]["step"] == 1


def test_the_saved_learning_rate_wins(tmp_path, data_dir, capsys):
    """As published; the log says which."""
    run(tmp_path, data_dir, 2, lr=1e-3)
    loop = run(tmp_path, data_dir, 3, resume=str(tmp_path), lr=5e-4)
    assert loop.opt.param_groups[0]["lr"] == 1e-3
    assert "with its learning rate 0.001" in capsys.readouterr().out


def test_a_run_keeps_its_seed(tmp_path, data_dir):
    """Without a seed a resumed run has that of its state, a new one draws it from torch."""
    run(tmp_path / "a", data_dir, 1, seed=77)
    assert begin(tmp_path / "b", resume_checkpoint=str(tmp_path / "a")).state.seed == 77
    torch.manual_seed(1)
    first = torch.randint(2**62, ()).item()
    assert begin(tmp_path / "b", torch_seed=1).state.seed == first
    assert begin(tmp_path / "b", seed=3, torch_seed=1).state.seed == 3


def test_init_from_takes_what_fits(tmp_path, data_dir, capsys):
    """Another number of classes leaves the label embedding behind, and the line says so."""
    source = run(tmp_path / "a", data_dir, 2)
    capsys.readouterr()
    path = str(tmp_path / "a" / "model000002.pt")
    loop = begin(tmp_path / "b", num_classes=7, init_from=path)
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("model:"))
    assert "a new run from step 0" in line
    assert "label_emb.weight ([4, 128] there, [7, 128] here)" in line
    assert loop.resume_step == 0 and not loop.opt.state
    theirs = source.model.state_dict()
    for name, value in loop.model.state_dict().items():
        assert name == "label_emb.weight" or torch.equal(value, theirs[name]), name
    for average in loop.ema_params:
        assert equal(list(average), [p.detach() for p in loop.model.parameters()])


def begin(folder, num_classes=3, torch_seed=0, **options):
    """Make a loop without taking a step."""
    with logger.session(str(folder)):
        dropout = 0.2 if num_classes == 3 else 0.0  # a null class more
        model, diffusion = build(
            **TINY | {"num_classes": num_classes, "learn_sigma": True, "label_dropout": dropout}
        )
        torch.manual_seed(torch_seed)
        same = dict(
            batch_size=4, microbatch=-1, lr=1e-3, ema_rate="0.5", log_interval=1,
            save_interval=1, resume_checkpoint="",
        )  # fmt: skip
        return TrainLoop(model=model, diffusion=diffusion, data=iter([]), **same | options)


def test_init_from_needs_something_that_fits(tmp_path):
    """Weights of another world are no beginning."""
    torch.save({"something": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"--init_from .*other\.pt has no tensor that fits"):
        begin(tmp_path / "b", init_from=str(tmp_path / "other.pt"))


def test_a_copied_set_goes_on_elsewhere(tmp_path, data_dir):
    """A folder with one set, moved to another place, is all that a run needs."""
    run(tmp_path / "whole", data_dir, 4)
    run(tmp_path / "a", data_dir, 2)
    shutil.copytree(tmp_path / "a", tmp_path / "moved")
    shutil.rmtree(tmp_path / "a")
    loop = run(tmp_path / "moved", data_dir, 4, resume=str(tmp_path / "moved"))
    assert_same_run(tmp_path / "whole", tmp_path / "moved", 4)
    assert checkpoints.step_of(loop.resume_checkpoint) == 2


class PublishedLoop(TrainLoop):
    """A program's own loop in the way of the published one, which knows nothing of states."""

    def run_loop(self):
        while self.step + self.resume_step < self.max_steps:
            batch, cond = next(self.data)
            self.run_step(batch, cond)
            if self.step % self.log_interval == 0:
                logger.dumpkvs()
            self.step += 1
        self.save()

    def run_step(self, batch, cond):
        self.forward_backward(batch, cond)
        if self.mp_trainer.optimize(self.opt):
            self._update_ema()
        self._anneal_lr()
        self.log_step()


@pytest.mark.parametrize("start", [1, 4])
def test_a_program_with_its_own_loop_goes_on(tmp_path, data_dir, monkeypatch, start):
    """Each step has timesteps and noise of its own, and a resumed run those that are due."""
    import test_resume

    monkeypatch.setattr(test_resume, "TrainLoop", PublishedLoop)
    whole = run(tmp_path / "whole", data_dir, 6, log_interval=1)
    assert whole.state.images == 24
    run(tmp_path / "parts", data_dir, start, log_interval=1)
    parts = run(tmp_path / "parts", data_dir, 6, log_interval=1, resume=str(tmp_path / "parts"))
    assert equal(whole.model.state_dict(), parts.model.state_dict())
    rows = rows_of(tmp_path / "parts")
    assert [row["step"] for row in rows] == list("012345") and rows == rows_of(tmp_path / "whole")
    assert len({row["loss"] for row in rows}) == 6


def test_other_data_is_told(tmp_path, data_dir, capsys):
    """A run that goes on with more images than it began with has another order, and says so."""
    run(tmp_path / "run", data_dir, 1)
    more = shutil.copytree(data_dir, tmp_path / "more")
    shutil.copy(more / "0_0.png", more / "0_99.png")
    capsys.readouterr()
    run(tmp_path / "run", data_dir, 2, resume=str(tmp_path / "run"))
    assert "another order" not in capsys.readouterr().out
    run(tmp_path / "run", str(more), 3, resume=str(tmp_path / "run"))
    assert "number of images: 10 when the run began, 11 now" in capsys.readouterr().out
