"""The training scripts with everything that their flags can ask for."""

import csv
import json
import os
import shutil
import signal
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from scripting import CLASSIFIER, SMALL, SUPER_RES, make_images, run_script, succeed
from test_resume import TIMES, assert_same_run

from guided_diffusion import checkpoint_sets, training
from guided_diffusion.respace import space_timesteps
from guided_diffusion.train_util import TrainLoop

COMMON = {"batch_size": 4, "num_workers": 0, "seed": 1}
STEPS = {
    "image_train": {"max_steps": 4},
    "super_res_train": {"max_steps": 4},
    "classifier_train": {"iterations": 4},
}
NETWORKS = {"image_train": SMALL, "super_res_train": SUPER_RES, "classifier_train": CLASSIFIER}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("training") / "data", count=10)


def flags_for(script, data):
    return NETWORKS[script] | COMMON | STEPS[script] | {"data_dir": data}


def rows_of(folder):
    with open(folder / "progress.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("script", STEPS)
def test_every_script_goes_on_exactly(script, data, tmp_path):
    """2 steps and 2 more are 4 steps, with averages, dropout, annealing and validation."""
    flags = flags_for(script, data) | {"ema_rate": "0.5,0.9", "log_interval": 2}
    if script == "classifier_train":
        flags |= {"val_data_dir": data, "eval_interval": 1, "anneal_lr": True}
    else:
        flags |= {"dropout": 0.2, "lr_anneal_steps": 4}
    short = {"save_interval": 2, "keep_checkpoints": 1}
    succeed(script, flags | short, log_dir=tmp_path / "whole")
    stopped = flags | short | {"log_dir": tmp_path / "parts"}
    stop_after(2, script, stopped)
    done = succeed(script, stopped | {"resume_checkpoint": "auto", "seed": -1})
    assert "seed 1\n" in done.out and "step 2" in done.out
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 4)


def stop_after(steps, script, flags):
    """Run a script that is stopped by a signal after some steps, so that all its flags stay."""
    run_step = TrainLoop.run_step

    def run_and_signal(loop, *batch):
        run_step(loop, *batch)
        if loop.step == steps - 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainLoop, "run_step", run_and_signal)
        done = succeed(script, flags)
    assert f"stopped by SIGUSR1 after step {steps}" in done.out


def test_a_classifier_has_an_average_if_asked(data, tmp_path):
    """By default none, as published; the loss scale then begins at 2^16 and the rate falls to 0."""
    flags = flags_for("classifier_train", data) | {"log_interval": 1, "anneal_lr": True, "lr": 0.4}
    succeed("classifier_train", flags, log_dir=tmp_path / "plain", classifier_use_fp16=True)
    assert not list((tmp_path / "plain").glob("ema*"))
    rows = rows_of(tmp_path / "plain")
    assert float(rows[0]["lg_loss_scale"]) == 16
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    succeed("classifier_train", flags, log_dir=tmp_path / "averaged", ema_rate="0.9")
    assert (tmp_path / "averaged" / "ema_0.9_000004.pt").exists()


def test_the_whole_validation_set_is_logged_with_each_checkpoint(data, tmp_path):
    """acc@1 and acc@5 over all images and by quarter, at multiples of save_interval and the end."""
    flags = flags_for("classifier_train", data) | {"val_data_dir": data, "log_interval": 1}
    succeed("classifier_train", flags, log_dir=tmp_path, save_interval=2)
    rows = rows_of(tmp_path)
    assert [bool(row["val_all_acc@1"]) for row in rows] == [False, False, True, False, True]
    assert any(row.startswith("val_all_acc@5_q") for row in rows[0])
    assert 0 <= float(rows[2]["val_all_acc@1"]) <= float(rows[2]["val_all_acc@5"]) <= 1


@pytest.mark.parametrize("script", ["image_train", "super_res_train"])
def test_pictures_are_drawn_while_training(script, data, tmp_path):
    """--sample_interval 2 leaves a grid of 20 samples, or of the ten images to enlarge."""
    flags = flags_for(script, data) | {"sample_interval": 2, "log_dir": tmp_path, "lr": 0.01}
    flags |= {"ema_rate": "0.1"}
    succeed(script, flags)
    pictures = sorted(path.name for path in tmp_path.glob("samples_*.png"))
    assert pictures == ["samples_000002.png", "samples_000004.png"]
    with Image.open(tmp_path / pictures[0]) as picture:
        columns, zoom = picture.width // 68, 64
        assert columns == 10 and picture.height >= zoom
    assert not np.array_equal(*(np.array(Image.open(tmp_path / name)) for name in pictures))


@pytest.mark.parametrize("steps", [20, 100, 1000, 4000])
def test_pictures_take_few_even_steps(steps):
    """At most 25 DDIM steps, which never begin at the very last timestep of a long chain."""
    used = space_timesteps(steps, training._few_steps(steps))
    assert 10 <= len(used) <= 25
    assert steps <= 25 or max(used) < steps - 1


def test_tensorboard_on_request(data, tmp_path):
    """--tensorboard adds an event file to the usual ones."""
    flags = flags_for("image_train", data)
    succeed("image_train", flags, log_dir=tmp_path / "with", tensorboard=True)
    succeed("image_train", flags, log_dir=tmp_path / "without")
    assert list((tmp_path / "with").rglob("events.out*"))
    assert not list((tmp_path / "without").rglob("events.out*"))
    assert (tmp_path / "with" / "progress.csv").exists()


def test_rows_tell_how_training_goes(data, tmp_path):
    """Speed, memory, time left, rate, norms and losses by quarter stand in each row."""
    succeed("image_train", flags_for("image_train", data), log_dir=tmp_path, log_interval=1)
    rows = rows_of(tmp_path)
    names = (
        "loss mse vb grad_norm param_norm lr images_per_second seconds_per_step peak_memory_mb "
        "time_left samples step skipped"
    )
    assert all(row[name] for row in rows for name in names.split())
    assert all(float(row["peak_memory_mb"]) > 50 for row in rows)
    assert rows[-1]["time_left"] == "0:00:00" and [r["samples"] for r in rows][-1] == "16"
    assert any(name.startswith("mse_q") for name in rows[0])


def test_classes_stand_beside_the_checkpoints(data, tmp_path):
    """classes.txt names them by number, and a run does not go on with other classes."""
    own = shutil.copytree(data, tmp_path / "own")
    for path in sorted(own.iterdir()):
        path.rename(own / path.name.replace("0_", "cat_").replace("1_", "dog_"))
    flags = flags_for("image_train", own) | {"log_dir": tmp_path / "run"}
    done = succeed("image_train", flags)
    assert "0 = 2 (3), 1 = cat (4), 2 = dog (3)" in done.out
    assert (tmp_path / "run" / "classes.txt").read_text() == "2\ncat\ndog\n"
    table = (tmp_path / "run" / "classes.csv").read_text()
    assert table == "class,name,images\n0,2,3\n1,cat,4\n2,dog,3\n"
    for path in own.glob("2_*"):
        path.rename(own / path.name.replace("2_", "ant_"))
    done = run_script("image_train", flags | {"resume_checkpoint": "auto", "max_steps": 5})
    assert done.code == 1 and "classes.txt" in done.err and "'ant'" in done.err


def test_a_folder_a_zip_and_labels_train_the_same_run(data, tmp_path):
    """The source of the images and the way their classes are told make no difference."""
    by_folder = tmp_path / "folders"
    for path in sorted(data.iterdir()):
        target = by_folder / path.name.split("_")[0]
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target / path.name)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted(data.iterdir()):
            archive.write(path, path.name)
    labels = {path.name: int(path.name[0]) for path in data.iterdir()}
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    ends = []
    for source in [
        {"data_dir": data},
        {"data_dir": tmp_path / "images.zip"},
        {"data_dir": data, "labels": tmp_path / "labels.json"},
    ]:
        flags = flags_for("image_train", data) | source | {"max_steps": 2}
        succeed("image_train", flags, log_dir=tmp_path / "run")
        ends.append(torch.load(tmp_path / "run" / "model000002.pt", weights_only=True))
    for end in ends[1:]:
        assert all(torch.equal(end[name], ends[0][name]) for name in end)
    flags = flags_for("image_train", by_folder) | {"labels": "folder", "max_steps": 1}
    assert "0 (4), 1 (3), 2 (3)" in succeed("image_train", flags, log_dir=tmp_path / "f").out


def test_fine_tuning_on_other_classes(data, tmp_path):
    """--init_from takes the network's flags from the file beside the weights, but yours win."""
    flags = flags_for("image_train", data) | {"max_steps": 1}
    succeed("image_train", flags, log_dir=tmp_path / "a")
    few = {name: flags[name] for name in (*COMMON, "data_dir", "max_steps")}
    done = succeed(
        "image_train", few, log_dir=tmp_path / "b", num_classes=5,
        init_from=tmp_path / "a" / "ema_0.9999_000001.pt",
    )  # fmt: skip
    assert "not taken over: label_emb.weight ([3, 128] there, [5, 128] here)" in done.out
    written = json.loads((tmp_path / "b" / "model000001.json").read_text())
    assert written["num_classes"] == 5 and written["num_channels"] == 32
    done = succeed(  # a job that is started again goes on instead
        "image_train", few | {"max_steps": 2}, log_dir=tmp_path / "b", num_classes=5,
        init_from=tmp_path / "a" / "ema_0.9999_000001.pt", resume_checkpoint="auto",
    )  # fmt: skip
    assert f"model: from {tmp_path}/b/model000001.pt" in done.out


def test_a_seed_given_again_must_not_differ_unseen(data, tmp_path):
    """Another --seed wins over the run's, with a line that says so."""
    flags = flags_for("image_train", data) | {"log_dir": tmp_path}
    succeed("image_train", flags, max_steps=1)
    done = succeed("image_train", flags, max_steps=2, resume_checkpoint="auto")
    assert "replaces" not in done.out
    done = succeed("image_train", flags, max_steps=3, resume_checkpoint="auto", seed=9)
    assert "--seed 9 replaces the run's 1" in done.out


def test_a_new_run_beside_an_old_one_is_warned(data, tmp_path):
    """A later --resume_checkpoint auto would go on from the sets of the old run."""
    flags = flags_for("image_train", data) | {"log_dir": tmp_path}
    assert "later step" not in succeed("image_train", flags).out
    done = succeed("image_train", flags, max_steps=1)
    assert "model000004.pt is of a later step" in done.out


def test_bad_images_are_skipped_on_request(data, tmp_path):
    """They are named once, and training goes on with the next image."""
    own = shutil.copytree(data, tmp_path / "own")
    (own / "0_0.png").write_bytes(b"broken")
    flags = flags_for("image_train", own) | {"max_steps": 6}
    assert run_script("image_train", flags, log_dir=tmp_path / "a").code == 1
    done = succeed("image_train", flags, log_dir=tmp_path / "b", skip_bad_images=True)
    assert done.out.count("skipped: ") == 1 and "1 skipped, could not be read: " in done.out


def test_a_run_that_never_saved_begins_anew(data, tmp_path):
    """Killed before its first checkpoint, its rows go; a run that is not to go on appends."""
    flags = flags_for("image_train", data) | {"log_dir": tmp_path, "max_steps": 2}
    flags |= {"log_interval": 1}
    succeed("image_train", flags)
    for path in [*tmp_path.glob("state*"), *tmp_path.glob("opt*")]:
        path.unlink()
    done = succeed("image_train", flags, resume_checkpoint="auto")
    assert "no complete set yet, a new run begins" in done.out
    assert [row["step"] for row in rows_of(tmp_path)] == ["0", "1"]
    assert (tmp_path / "log.txt").read_text().count("| step ") == 2
    succeed("image_train", flags)
    assert len(rows_of(tmp_path)) == 4


def test_a_finished_run_that_is_started_again_changes_nothing(data, tmp_path):
    """A job that a scheduler starts once too often says so, and leaves every file as it is."""
    flags = flags_for("classifier_train", data) | {"val_data_dir": data, "log_dir": tmp_path}
    succeed("classifier_train", flags, log_interval=3)
    rows = rows_of(tmp_path)
    assert rows[-1]["val_all_loss"]
    done = succeed("classifier_train", flags, log_interval=3, resume_checkpoint="auto")
    assert "step 4 of 4: there is nothing left to do" in done.out
    assert rows_of(tmp_path) == rows


@pytest.mark.parametrize("log_interval", [1, 3])
def test_the_last_validation_is_no_part_of_the_run(log_interval, data, tmp_path):
    """What the end of a shorter run has logged besides its steps is dropped when it goes on."""
    flags = flags_for("classifier_train", data) | {"val_data_dir": data, "eval_interval": 2}
    flags |= {"log_interval": log_interval}
    succeed("classifier_train", flags | {"iterations": 5}, log_dir=tmp_path / "whole")
    succeed("classifier_train", flags | {"iterations": 2}, log_dir=tmp_path / "parts")
    assert rows_of(tmp_path / "parts")[-1]["val_all_loss"]
    flags |= {"iterations": 5, "resume_checkpoint": "auto"}
    succeed("classifier_train", flags, log_dir=tmp_path / "parts")
    whole, parts = (
        [{name: value for name, value in row.items() if name not in TIMES} for row in rows]
        for rows in (rows_of(tmp_path / "whole"), rows_of(tmp_path / "parts"))
    )
    assert whole == parts


def test_class_names_need_not_be_text(data, tmp_path):
    """File names may not be UTF-8, or have line ends that only Unicode knows."""
    own = shutil.copytree(data, tmp_path / "own")
    for path in sorted(own.glob("0_*")):
        path.rename(os.fsdecode(os.fsencode(own) + b"/caf\xe9" + os.fsencode(path.name[1:])))
    for path in sorted(own.glob("1_*")):
        path.rename(own / ("a\u2028b" + path.name[1:]))
    flags = flags_for("image_train", own) | {"log_dir": tmp_path / "run", "sample_interval": 2}
    succeed("image_train", flags, max_steps=2)
    succeed("image_train", flags, max_steps=4, resume_checkpoint="auto")
    assert (tmp_path / "run" / "samples_000004.png").exists()


def test_an_average_or_a_renamed_file_has_no_set(data, tmp_path):
    """What stands beside it under the number 0 is not its optimizer or average."""
    flags = flags_for("image_train", data) | {"ema_rate": "0.5"}
    succeed("image_train", flags, log_dir=tmp_path, max_steps=4)
    for name in ("opt{}.pt", "ema_0.5_{}.pt", "model{}.pt"):  # as the published code saves first
        shutil.copy(tmp_path / name.format("000004"), tmp_path / name.format("000000"))
    shutil.copy(tmp_path / "model000004.pt", tmp_path / "my_model000004.pt")
    for name in ("ema_0.5_000004.pt", "my_model000004.pt"):
        done = succeed(
            "image_train", flags, log_dir=tmp_path / "new", max_steps=1,
            resume_checkpoint=tmp_path / name,
        )  # fmt: skip
        assert "optimizer: cold" in done.out and "EMA 0.5: cold" in done.out


def test_two_jobs_in_one_folder(data, tmp_path, monkeypatch):
    """The second one, started by mistake, ends with one line and changes nothing."""
    monkeypatch.setattr(checkpoint_sets, "PATIENCE", 0.2)
    flags = flags_for("image_train", data) | {"log_dir": tmp_path, "log_interval": 1}
    succeed("image_train", flags)
    before = (tmp_path / "progress.csv").read_text()
    with checkpoint_sets.reserved(str(tmp_path)):
        done = run_script("image_train", flags, resume_checkpoint="auto", max_steps=9)
    assert done.code == 1 and "in use by another run" in done.err
    assert (tmp_path / "progress.csv").read_text() == before
