"""One run, on any number of ranks: gradients, order of images, resumed runs."""

import csv
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from scripting import (
    CLASSIFIER,
    ROOT,
    SMALL,
    environment,
    flags_of,
    launch,
    launch_command,
    make_images,
)
from test_resume import TIMES, assert_same_run

sys.path.insert(0, str(Path(__file__).parent / "workers"))
import loops  # noqa: E402

from guided_diffusion import dist_util, logger  # noqa: E402

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The gradients of one rank with the whole batch in one piece."""
    folder = tmp_path_factory.mktemp("loops")
    make_images(folder / "data", count=10)
    dist_util.setup_dist("cpu")
    expected = {}
    with logger.session(str(folder / "log")):
        for dtype in TOLERANCES:
            for name in loops.SAMPLERS:
                expected[dtype, name] = loops.gradients(folder, dtype, -1, name)
    return folder, expected


def assert_same_gradients(found, expected):
    """Compare relative to the norm of each step's gradient."""
    for key, rows in found.items():
        dtype_name, _, sampler = key.split()
        dtype = getattr(torch, dtype_name.removeprefix("torch."))
        reference = expected[dtype, sampler]
        error = (rows - reference).norm(dim=1) / reference.norm(dim=1)
        assert error.max() < TOLERANCES[dtype], (key, error)


@pytest.mark.parametrize("microbatch", [1, 2, 3])
def test_micro_batches_train_the_same_run(alone, microbatch):
    """Timesteps, noise and augmentation are drawn before a batch is split."""
    folder, expected = alone
    with logger.session(str(folder / "log")):
        found = {
            f"{dtype} {microbatch} {name}": loops.gradients(folder, dtype, microbatch, name)
            for dtype, name in expected
        }
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("launcher, ranks", [("mpiexec", 2), ("torchrun", 2), ("mpiexec", 4)])
def test_ranks_train_the_same_run(alone, launcher, ranks):
    """A batch on one rank and its parts on several have the same gradient, to rounding."""
    folder, expected = alone
    worker = ROOT / "tests" / "workers" / "loops.py"
    done = launch(launcher, worker, [str(folder)], folder, ranks=ranks)
    assert done.returncode == 0, done.stderr
    found = torch.load(folder / f"gradients_{ranks}.pt", weights_only=True)
    assert len(found) == 8
    assert_same_gradients(found, expected)


def start(script, launcher, folder, ranks, flags):
    """Run a script as some ranks."""
    items = [item for name, value in flags.items() for item in (f"--{name}", str(value))]
    done = launch(launcher, ROOT / "scripts" / f"{script}.py", items, folder.parent, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return done


def train(launcher, folder, data, steps, ranks=2, batch_size=2, **flags):
    """Run image_train as some ranks."""
    flags = SMALL | {
        "data_dir": data, "batch_size": batch_size, "max_steps": steps, "log_dir": folder,
        "log_interval": 2, "save_interval": 100, "ema_rate": "0.5,0.9", "dropout": 0.2,
        "device": "cpu", "num_workers": 0, "resume_checkpoint": "auto",
    } | flags  # fmt: skip
    return start("image_train", launcher, folder, ranks, flags)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data") / "data", count=10)


@pytest.mark.parametrize("launcher, ranks", [("mpiexec", 2), ("torchrun", 2), ("mpiexec", 4)])
def test_ranks_go_on_exactly(launcher, ranks, data, tmp_path):
    """Two jobs, one after the other, leave the files and rows of one with all their steps."""
    same = {"ranks": ranks, "batch_size": 4 // ranks}
    train(launcher, tmp_path / "whole", data, 5, seed=4, **same)
    train(launcher, tmp_path / "parts", data, 3, seed=4, **same)
    done = train(launcher, tmp_path / "parts", data, 5, **same)  # the seed is in the state
    assert "seed 4" in done.stdout and "from " + str(tmp_path / "parts" / "opt0") in done.stdout
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 5)


def test_two_ranks_go_on_from_a_published_set(data, tmp_path):
    """Weights, average and optimizer, no flags and no state: found by its folder, loaded by all."""
    train("mpiexec", tmp_path / "ours", data, 2, ranks=1, batch_size=4, seed=4)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    for name in ("model{}.pt", "ema_0.5_{}.pt", "opt{}.pt"):
        shutil.copy(tmp_path / "ours" / name.format("000002"), theirs / name.format("000002"))
    state = torch.load(theirs / "opt000002.pt", weights_only=True)
    for moments in state["state"].values():  # as older versions of torch wrote it
        moments["step"] = int(moments["step"])
    names = ("params", "lr", "betas", "eps", "weight_decay", "amsgrad")
    state["param_groups"] = [{n: group[n] for n in names} for group in state["param_groups"]]
    torch.save(state, theirs / "opt000002.pt")
    done = train("mpiexec", tmp_path / "new", data, 3, resume_checkpoint=theirs)
    for told in ("model: from", "optimizer: from", "EMA 0.5: from", "EMA 0.9: cold", "state: cold"):
        assert told in done.stdout, told
    assert sorted(p.name for p in (tmp_path / "new").glob("state*")) == ["state000003.pt"]


def test_a_classifier_goes_on_exactly_on_two_ranks(data, tmp_path):
    """With float16, validation, annealing and an average, all of which the state remembers."""
    flags = CLASSIFIER | {
        "data_dir": data, "val_data_dir": data, "eval_interval": 2, "anneal_lr": True, "seed": 7,
        "classifier_use_fp16": True, "ema_rate": "0.5,0.9", "save_interval": 2, "batch_size": 2,
        "keep_checkpoints": 1, "device": "cpu", "num_workers": 0, "log_interval": 2,
    }  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    start("classifier_train", "mpiexec", whole, 2, flags | {"log_dir": whole, "iterations": 4})
    worker = ROOT / "tests" / "workers" / "stopping.py"
    stopped = flags_of(flags | {"log_dir": parts, "iterations": 4})
    done = launch("mpiexec", worker, ["classifier_train", "SIGTERM", *stopped], tmp_path)
    assert done.returncode == 0 and "stopped by" in done.stdout, done.stderr
    again = flags | {"log_dir": parts, "iterations": 4, "resume_checkpoint": "auto"}
    start("classifier_train", "mpiexec", parts, 2, again)
    assert_same_run(whole, parts, 4)


def test_other_ranks_go_on_with_the_next_image(data, tmp_path):
    """A run of two ranks goes on with one: the same images, noise and timesteps, so the same loss.

    Without dropout, which is drawn anew, the runs differ by rounding alone.
    """
    for folder, rest in (("same", 2), ("other", 1)):
        train("mpiexec", tmp_path / folder, data, 3, seed=4, dropout=0)
        train("mpiexec", tmp_path / folder, data, 5, ranks=rest, batch_size=4 // rest, dropout=0)
    rows = []
    for folder in ("same", "other"):
        with open(tmp_path / folder / "progress.csv") as file:
            rows.append([r for r in csv.DictReader(file)])
    assert len(rows[0]) == len(rows[1]) == 3
    for one, other in zip(*rows, strict=True):
        for name in set(one) - TIMES:
            assert bool(one[name]) == bool(other[name]), name  # a quarter may have no images
            if one[name]:
                assert float(one[name]) == pytest.approx(float(other[name]), rel=1e-4), name


def test_the_whole_validation_set_is_shared(data, tmp_path):
    """Three ranks, sharded or not, log of ten images what one rank logs; no rank waits in vain."""
    flags = CLASSIFIER | {
        "data_dir": data, "val_data_dir": data, "iterations": 1, "lr": 1e-12, "seed": 2,
        "device": "cpu", "num_workers": 0,
    }  # fmt: skip
    rows = []
    for ranks, more in [(1, {}), (3, {}), (3, {"shard_params": True, "microbatch": 1})]:
        folder = tmp_path / str(len(rows))
        own = {"log_dir": folder, "batch_size": 6 // ranks} | more
        start("classifier_train", "mpiexec", folder, ranks, flags | own)
        with open(folder / "progress.csv") as file:
            rows.append(list(csv.DictReader(file))[-1])
    names = [name for name in rows[0] if name.startswith("val_all")]
    assert {"val_all_loss", "val_all_acc@1", "val_all_acc@5", "val_all_acc@1_q3"} <= set(names)
    for row in rows[1:]:
        for name in names:
            assert float(row[name]) == pytest.approx(float(rows[0][name]), rel=1e-4), name


@pytest.mark.parametrize("launcher, number", [("mpiexec", "SIGUSR1"), ("torchrun", "SIGTERM")])
def test_a_signal_to_one_rank_ends_all(launcher, number, data, tmp_path):
    """All ranks finish the same step, save one set, and exit 0; the run then goes on exactly."""
    flags = SMALL | {
        "data_dir": data, "batch_size": 2, "log_dir": tmp_path / "run", "device": "cpu",
        "num_workers": 1, "seed": 4, "log_interval": 2, "ema_rate": "0.5,0.9",
    }  # fmt: skip
    worker = ROOT / "tests" / "workers" / "stopping.py"
    done = launch(launcher, worker, ["image_train", number, *flags_of(flags)], tmp_path)
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / f"end{rank}.txt").exists() for rank in (0, 1))
    assert "another rank after step 4" in done.stdout
    assert sorted(p.name for p in (tmp_path / "run").glob("state*")) == ["state000004.pt"]


def test_ranks_stop_when_their_launcher_is_killed(data, tmp_path):
    """Without it they would train on unseen: they save, end, and the same command goes on."""
    flags = SMALL | {
        "data_dir": data, "batch_size": 2, "log_dir": tmp_path / "run", "device": "cpu",
        "num_workers": 0, "seed": 4, "log_interval": 1,
    }  # fmt: skip
    script = ROOT / "scripts" / "image_train.py"
    agent = subprocess.Popen(
        launch_command("torchrun", script, flags_of(flags)), env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    rows = tmp_path / "run" / "progress.csv"
    wait_for(lambda: rows.exists() and rows.read_text())  # the loop has begun
    agent.kill()
    agent.wait()
    wait_for(lambda: list((tmp_path / "run").glob("state*")))
    wait_for(lambda: "stopped by" in (tmp_path / "run" / "log.txt").read_text())


def wait_for(is_done):
    """Wait until something has happened, but no more than a minute."""
    deadline = time.monotonic() + 60
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.05)
