"""The commands, from a folder of images to files of samples, as their users run them."""

import csv
import json
import os
import shlex
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from scripting import (
    CLASSIFIER,
    ROOT,
    SCRIPTS,
    SMALL,
    SUPER_RES,
    flags_of,
    launch,
    make_images,
    run_script,
    succeed,
)

from guided_diffusion import config

FEW = {"num_samples": 6, "batch_size": 4, "seed": 5}
FAST = {"use_ddim": True, "timestep_respacing": "ddim4"}
SUFFIXES = ("json", "pt")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images in `data` and a trained model of each kind in d, u, s and c."""
    place = tmp_path_factory.mktemp("scripts")
    common = {"data_dir": make_images(place / "data"), "batch_size": 4, "seed": 1}
    two = {"max_steps": 2, "ema_rate": "0.5,0.9999"}
    for folder, script, flags in [
        ("d", "image_train", SMALL | two | {"label_dropout": 0.2}),
        ("u", "image_train", SMALL | two | {"class_cond": False, "in_channels": 3}),
        ("s", "super_res_train", SUPER_RES | two),
        ("c", "classifier_train", CLASSIFIER | {"iterations": 2, "val_data_dir": place / "data"}),
    ]:
        succeed(script, common | flags, log_dir=place / folder)
    return place


def model(place, folder):
    return place / folder / "model000002.pt"


def read_npz(path):
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def load(path):
    return torch.load(path, weights_only=True)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("folder", ["d", "u", "s", "c"])
def test_training_leaves_the_published_files(folder, place):
    """Weights, an EMA per rate and the optimizer's state, the flags beside each set of weights."""
    found = {path.name for path in (place / folder).iterdir()}
    weights = ["model000002"]
    if folder != "c":
        weights += ["ema_0.5_000002", "ema_0.9999_000002"]
    expected = {f"{name}.{suffix}" for name in weights for suffix in SUFFIXES}
    assert expected | {"opt000002.pt", "log.txt", "progress.csv"} <= found
    assert {name for name in found if name.endswith(SUFFIXES)} - expected <= {
        "opt000002.pt",
        "state000002.pt",
    }


def test_flags_stand_beside_the_weights(place):
    """X.json holds what rebuilds the network and the process, and nothing about the run."""
    for folder, groups in [
        ("d", config.DIFFUSION_GROUPS),
        ("s", config.SUPER_RES_GROUPS),
        ("c", config.CLASSIFIER_GROUPS),
    ]:
        flags = json.loads((place / folder / "model000002.json").read_text())
        assert flags.keys() == config.defaults(*groups).keys()
        assert flags["num_classes"] == 3 and flags["noise_schedule"] == "cosine"


def test_training_says_where_it_writes(place, tmp_path, monkeypatch):
    """The folder is printed as an absolute path: --log_dir, $OPENAI_LOGDIR or one under logs/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    flags = FEW | FAST | {"model_path": model(place, "d")}
    assert f"Logging to {tmp_path}/here\n" in succeed("image_sample", flags, log_dir="here").out
    assert f"Logging to {tmp_path}/logs/20" in succeed("image_sample", flags).out
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "there"))
    assert f"Logging to {tmp_path}/there\n" in succeed("image_sample", flags).out
    names = ["here", *next(os.walk(tmp_path / "logs"))[1], "there"]
    assert len(names) == 3
    assert len(list(tmp_path.rglob("samples_6x8x8x1.npz"))) == 3


def test_training_starts_where_it_left(place, tmp_path):
    """A resumed run counts on from the file's number, with its optimizer and its averages."""
    common = SMALL | {"data_dir": place / "data", "batch_size": 4, "log_dir": tmp_path, "seed": 1}
    common |= {"log_interval": 1, "save_interval": 2, "ema_rate": "0.5"}
    succeed("image_train", common, max_steps=3)
    first = tmp_path / "model000003.pt"
    done = succeed("image_train", common, max_steps=6, resume_checkpoint=first)
    for name in ("model000003", "opt000003", "ema_0.5_000003"):
        assert f"{name}.pt" in done.out
    assert [float(row["step"]) for row in rows_of(tmp_path / "progress.csv")] == [0, 1, 2, 3, 4, 5]
    steps = {p.name[5:11] for p in tmp_path.glob("model*.pt")}
    assert steps == {"000002", "000003", "000004", "000006"}
    assert load(tmp_path / "opt000006.pt")["state"][0]["step"] == 6
    ema, before = load(tmp_path / "ema_0.5_000006.pt"), load(tmp_path / "ema_0.5_000003.pt")
    name = "out.2.bias"
    assert not torch.equal(ema[name], before[name])
    assert not torch.equal(ema[name], load(tmp_path / "model000006.pt")[name])


def test_a_finished_run_that_is_resumed_ends_at_once(place, tmp_path):
    """There is nothing to do and nothing to write."""
    common = SUPER_RES | {"data_dir": place / "data", "batch_size": 4, "log_dir": tmp_path}
    succeed("super_res_train", common, max_steps=2, resume_checkpoint=model(place, "s"))
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize("folder, script, flags", [
    ("d", "image_train", {"max_steps": 3}),
    ("s", "super_res_train", {"max_steps": 3}),
    ("c", "classifier_train", {"iterations": 3}),
])  # fmt: skip
def test_every_trainer_resumes(folder, script, flags, place, tmp_path):
    """All three trainers go on from their files, and find the model's flags beside them."""
    flags = flags | {"data_dir": place / "data", "batch_size": 4, "log_dir": tmp_path}
    succeed(script, flags, resume_checkpoint=model(place, folder))
    assert (tmp_path / "model000003.pt").exists()
    assert load(tmp_path / "opt000003.pt")["state"][0]["step"] == 3
    one, other = (
        where / f"model00000{n}.json" for where, n in [(place / folder, 2), (tmp_path, 3)]
    )
    assert json.loads(one.read_text()) == json.loads(other.read_text())


def test_a_seed_repeats_a_training_run(place, tmp_path):
    """With --seed, the initial weights, the order of the images and the noise are the same."""
    flags = SMALL | {"data_dir": place / "data", "batch_size": 4, "max_steps": 2, "dropout": 0.1}
    for name, seed in [("a", 7), ("b", 7), ("c", 8)]:
        succeed("image_train", flags, seed=seed, log_dir=tmp_path / name)
    a, b, c = (load(tmp_path / name / "model000002.pt") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["time_embed.0.weight"], c["time_embed.0.weight"])


# --------------------------------------------------------------------------------------------
# Sampling


def sample(place, script, folder, **flags):
    """Draw samples into place/folder; return the arrays and the path of the grid."""
    shutil.rmtree(place / folder, ignore_errors=True)
    succeed(script, FEW | FAST | flags, log_dir=place / folder)
    [path] = (place / folder).glob("*.npz")
    return read_npz(path), path.with_suffix(".png")


@pytest.mark.parametrize("folder, channels", [("d", 1), ("u", 3)])
def test_image_sample_needs_no_model_flags(folder, channels, place):
    """The npz holds exactly num_samples uint8 NHWC images; a PNG grid shows them."""
    arrays, grid = sample(place, "image_sample", "out", model_path=model(place, folder))
    assert grid.name == f"samples_6x8x8x{channels}.png"
    assert arrays["arr_0"].shape == (6, 8, 8, channels) and arrays["arr_0"].dtype == np.uint8
    assert ("arr_1" in arrays) == (folder == "d")
    if folder == "d":
        assert arrays["arr_1"].dtype == np.int64 and arrays["arr_1"].shape == (6,)
        assert set(arrays["arr_1"]) <= {0, 1, 2}
    with Image.open(grid) as picture:
        assert picture.width > 6 * 64


def test_an_average_is_sampled_like_the_weights(place):
    """An EMA file has flags of its own."""
    arrays, _ = sample(place, "image_sample", "out", model_path=place / "d" / "ema_0.5_000002.pt")
    assert arrays["arr_0"].shape == (6, 8, 8, 1)


@pytest.mark.parametrize("flags", [{}, {"use_ddim": False, "timestep_respacing": "4"}])
def test_a_seed_repeats_the_samples(flags, place):
    """The same --seed gives the same images and labels; another seed gives others."""
    flags = {"model_path": model(place, "d")} | flags
    (one, _), (two, _), (other, _) = (
        sample(place, "image_sample", "out", **flags, **FEW | {"seed": seed}) for seed in (5, 5, 6)
    )
    assert np.array_equal(one["arr_0"], two["arr_0"]) and np.array_equal(one["arr_1"], two["arr_1"])
    assert not np.array_equal(one["arr_0"], other["arr_0"])


def test_classes_are_drawn_in_turn(place):
    """--classes 2,0 asks for 2, 0, 2, 0, ..."""
    arrays, _ = sample(place, "image_sample", "out", model_path=model(place, "d"), classes="2,0")
    assert arrays["arr_1"].tolist() == [2, 0, 2, 0, 2, 0]


def test_classes_may_be_a_list_or_all(place, tmp_path):
    """--labels_file takes a file's classes in turn, --class_balanced all classes."""
    (tmp_path / "labels.txt").write_text("1\n1\n2\n")
    for flags, expected in [
        ({"labels_file": tmp_path / "labels.txt"}, [1, 1, 2, 1, 1, 2]),
        ({"class_balanced": True}, [0, 1, 2, 0, 1, 2]),
    ]:
        arrays, _ = sample(place, "image_sample", "out", model_path=model(place, "d"), **flags)
        assert arrays["arr_1"].tolist() == expected


def test_the_first_line_tells_how_to_go_on(place, tmp_path, monkeypatch):
    """Without --log_dir, as a command that finds the folder, and the seed in it, again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    flags = FAST | {"model_path": model(place, "d"), "num_samples": 3, "batch_size": 3}
    first = succeed("image_sample", flags).out.splitlines()[0]
    assert first.startswith("to go on after an interruption: python ")
    words = shlex.split(first.partition(": ")[2])
    names = [word.removeprefix("--") for word in words[2::2]]
    again = run_script("image_sample", dict(zip(names, words[3::2], strict=True)))
    assert again.code == 0 and "3 of 3 samples are there" in again.out
    assert len(list(tmp_path.rglob("*.npz"))) == 1


def test_an_interrupted_command_says_that_it_can_go_on(place, tmp_path):
    """Ctrl-C ends it with the usual exit code, and the folder to name again."""
    flags = FEW | FAST | {"model_path": model(place, "d"), "log_dir": tmp_path}
    with mock.patch("guided_diffusion.sample_util.draw_samples", side_effect=KeyboardInterrupt):
        done = run_script("image_sample", flags)
    assert done.code == 130
    assert f"the same command with --log_dir {tmp_path} goes on" in done.out
    succeed("image_sample", flags)


def test_other_flags_in_the_same_folder_are_refused(place, tmp_path):
    """One line that names what differs, and the images stay."""
    flags = FEW | FAST | {"model_path": model(place, "d"), "log_dir": tmp_path}
    succeed("image_sample", flags)
    [path] = tmp_path.glob("*.npz")
    before = path.read_bytes()
    done = run_script("image_sample", flags, clip_denoised=False, seed=6)
    assert done.code == 1 and len(done.err.strip().splitlines()) == 1
    assert "clip_denoised: True there, False here; seed: 5 there, 6 here" in done.err
    assert path.read_bytes() == before


@pytest.mark.parametrize("folder", ["d", "u"])
def test_classifier_sample_always_keeps_labels(folder, place):
    """Guided samples carry the labels that the classifier was asked for."""
    flags = {"model_path": model(place, folder), "classifier_path": model(place, "c")}
    if folder == "u":  # the classifier of grey images cannot guide a colour model
        flags |= {"classifier_scale": 0}
    arrays, _ = sample(place, "classifier_sample", "out", **flags)
    assert arrays["arr_1"].dtype == np.int64 and arrays["arr_1"].shape == (6,)


def test_scale_zero_is_no_guidance(place):
    """At scale 0 classifier_sample needs no classifier and equals image_sample."""
    flags = {"model_path": model(place, "d")}
    plain, _ = sample(place, "image_sample", "out", **flags)
    zero, _ = sample(place, "classifier_sample", "out", **flags, classifier_scale=0)
    flags["classifier_path"] = model(place, "c")
    strong, _ = sample(place, "classifier_sample", "out", **flags, classifier_scale=50)
    np.testing.assert_array_equal(plain["arr_0"], zero["arr_0"])
    np.testing.assert_array_equal(plain["arr_1"], zero["arr_1"])
    np.testing.assert_array_equal(plain["arr_1"], strong["arr_1"])
    assert not np.array_equal(plain["arr_0"], strong["arr_0"])


@pytest.mark.parametrize("use_ddim", [True, False])
def test_super_res_sample_keeps_the_labels_of_its_base(use_ddim, place):
    """Base images are taken in turn, with their labels, until num_samples are drawn."""
    base = np.random.default_rng(0).integers(0, 256, (4, 4, 4, 1), dtype=np.uint8)
    np.savez(place / "base.npz", base, np.array([0, 1, 2, 1]))
    flags = {"model_path": model(place, "s"), "base_samples": place / "base.npz"}
    flags |= {"use_ddim": use_ddim, "timestep_respacing": "ddim4" if use_ddim else "4"}
    arrays, grid = sample(place, "super_res_sample", "out", **flags)
    assert arrays["arr_0"].shape == (6, 8, 8, 1) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == [0, 1, 2, 1, 0, 1] and arrays["arr_1"].dtype == np.int64
    assert grid.exists()


def test_image_files_are_upsampled_like_the_npz(place, tmp_path):
    """What --save_images leaves is a base as good as the npz, with its labels."""
    base, _ = sample(place, "image_sample", "out", model_path=model(place, "d"), save_images=True)
    for path in (place / "out").glob("*x1/*.png"):
        with Image.open(path) as picture:
            picture.resize((4, 4)).save(path)
    [folder] = [path for path in (place / "out").iterdir() if path.is_dir()]
    pixels = [np.array(Image.open(path))[..., None] for path in sorted(folder.glob("*.png"))]
    np.savez(tmp_path / "base.npz", np.stack(pixels), base["arr_1"])
    flags = {"model_path": model(place, "s"), "low_res_noise": 0.1}
    one, _ = sample(tmp_path, "super_res_sample", "a", base_samples=folder, **flags)
    other, _ = sample(
        tmp_path, "super_res_sample", "b", base_samples=tmp_path / "base.npz", **flags
    )
    for name in ("arr_0", "arr_1"):
        np.testing.assert_array_equal(one[name], other[name])


def test_samplers_chain_into_the_upsampler(place, tmp_path):
    """What image_sample writes, super_res_sample reads."""
    data = make_images(tmp_path / "data", size=4)
    flags = SMALL | {"image_size": 4, "attention_resolutions": "2", "max_steps": 1}
    succeed("image_train", flags, data_dir=data, batch_size=4, log_dir=tmp_path / "m")
    base, grid = sample(tmp_path, "image_sample", "base", model_path=tmp_path / "m/model000001.pt")
    flags = {"model_path": model(place, "s"), "base_samples": grid.with_suffix(".npz")}
    arrays, _ = sample(tmp_path, "super_res_sample", "large", **flags)
    np.testing.assert_array_equal(arrays["arr_1"], base["arr_1"])


def test_image_nll_scores_each_image_once(place, tmp_path):
    """24 images in batches of 10 give 24 scores, in the order of the files."""
    flags = {"model_path": model(place, "d"), "data_dir": place / "data", "seed": 3}
    flags |= {"timestep_respacing": "4", "log_dir": tmp_path}
    done = succeed("image_nll", flags, batch_size=10)
    assert "done 24 samples" in done.out
    bpd = read_npz(tmp_path / "bpd.npz")["arr_0"]
    assert bpd.shape == (24,) and len(np.unique(bpd)) == 24 and np.isfinite(bpd).all()
    for name in ("vb", "mse", "xstart_mse"):
        assert read_npz(tmp_path / f"{name}_terms.npz")["arr_0"].shape == (4,)
    vb = read_npz(tmp_path / "vb_terms.npz")["arr_0"]
    assert 0 <= bpd.mean() - vb.sum() < 0.1  # the rest is the bound's prior term
    assert "done 7 samples" in succeed("image_nll", flags, batch_size=5, num_samples=7).out


def test_a_preset_scores_the_whole_chain(tmp_path):
    """Its steps are for sampling."""
    make_images(tmp_path / "data", count=2, size=28)
    flags = {"preset": "fashion", "data_dir": tmp_path / "data", "dry_run": True}
    assert "1000 x" in succeed("image_nll", flags).out


def test_image_nll_scores_no_image_in_place_of_a_broken_one(place, tmp_path):
    """A single pass skips it: 24 good images among 25 give 24 scores."""
    own = shutil.copytree(place / "data", tmp_path / "data")
    flags = {"model_path": model(place, "d"), "timestep_respacing": "2", "seed": 3}
    flags |= {"batch_size": 1, "data_dir": own}
    first = sorted(own.iterdir())[0]
    first.rename(own / f"{first.name[0]}_zz.png")
    (own / first.name).write_bytes(b"broken")
    done = succeed("image_nll", flags, log_dir=tmp_path / "a", skip_bad_images=True)
    assert "done 24 samples" in done.out and f"skipped: {own}/{first.name}" in done.out


def test_image_invert_tells_the_error_of_the_round_trip(place, tmp_path):
    """Latents and reconstructions of the first images of a folder, in its order."""
    flags = {"model_path": model(place, "d"), "data_dir": place / "data", "log_dir": tmp_path}
    done = succeed("image_invert", flags, num_samples=10, batch_size=4)
    assert "round trip of 10 images, 20 steps each way: mean absolute error" in done.out
    latents = read_npz(tmp_path / "latents_10x8x8x1.npz")
    assert latents["arr_0"].dtype == np.float32 and latents["arr_1"].tolist() == [0] * 8 + [1, 1]
    assert read_npz(tmp_path / "reconstructions_10x8x8x1.npz")["arr_0"].dtype == np.uint8
    assert read_npz(tmp_path / "errors.npz")["arr_0"].shape == (10,)


@pytest.mark.parametrize("names", [("Dress", "sneaker"), ("3", "7"), ("03", "Sneaker")])
def test_given_images_have_the_classes_that_the_model_knows(names, tmp_path):
    """By name or number, also where not all classes are among them."""
    (tmp_path / "data").mkdir()
    for name in names:
        Image.new("L", (28, 28)).save(tmp_path / "data" / f"{name}_0.png")
    flags = {"data_dir": tmp_path / "data", "timestep_respacing": "2", "log_dir": tmp_path / "out"}
    succeed("image_invert", flags, model_path=ROOT / "models" / "fashion" / "diffusion.pt")
    assert read_npz(tmp_path / "out" / "latents_2x28x28x1.npz")["arr_1"].tolist() == [3, 7]


def test_a_film_that_comes_too_late_is_told(place, tmp_path):
    """The images of a whole set stay as they are, and the set is not refused."""
    flags = FEW | FAST | {"model_path": model(place, "d"), "log_dir": tmp_path}
    succeed("image_sample", flags)
    done = succeed("image_sample", flags, save_every_t=2)
    assert "no film" in done.out and "6 of 6 samples are there" in done.out


@pytest.mark.parametrize(
    "script",
    ["image_sample", "classifier_sample", "super_res_sample", "image_nll", "image_invert"],
)
def test_a_dry_run_tells_and_writes_nothing(script, place, tmp_path):
    """Flags, parameters, operations and memory; no folder is made."""
    base = tmp_path / "base.npz"
    np.savez(base, np.zeros((2, 4, 4, 1), np.uint8), np.array([0, 1]))
    flags = {"log_dir": tmp_path / "out", "dry_run": True, "timestep_respacing": "4"}
    flags["model_path"] = model(place, "s" if script == "super_res_sample" else "d")
    if script == "super_res_sample":
        flags["base_samples"] = base
    if script == "classifier_sample":
        flags["classifier_path"] = model(place, "c")
    if script in ("image_nll", "image_invert"):
        flags["data_dir"] = place / "data"
    done = succeed(script, flags)
    assert "GFLOP" in done.out and "timestep_respacing" in done.out
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------
# Several ranks, another folder


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_two_ranks_train_one_model(launcher, place, tmp_path):
    """Both ranks end with the weights that rank 0 wrote, having seen batch_size images each."""
    flags = SMALL | {"data_dir": place / "data", "batch_size": 4, "max_steps": 2, "seed": 1}
    flags |= {"log_dir": "run", "log_interval": 1, "device": "cpu"}
    done = launch(launcher, ROOT / "tests" / "workers" / "training.py", flags_of(flags), tmp_path)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "run" / "progress.csv")
    assert [float(row["samples"]) for row in rows] == [8, 16]
    written = load(tmp_path / "run" / "model000002.pt").values()
    for rank in (0, 1):
        params = load(tmp_path / f"rank{rank}.pt")
        assert all(torch.equal(a, b) for a, b in zip(written, params, strict=True))
    assert done.stdout.count(f"Logging to {tmp_path}/run\n") == 1


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_two_ranks_draw_what_one_draws(launcher, place, tmp_path):
    """The images do not depend on the number of ranks, and no rank but the first prints."""
    flags = FEW | FAST | {"model_path": model(place, "d"), "batch_size": 2}  # ranks 0, 1 and 0
    alone, _ = sample(place, "image_sample", "out", **flags)
    flags |= {"log_dir": "two", "device": "cpu"}
    done = launch(launcher, SCRIPTS["image_sample"], flags_of(flags), tmp_path)
    assert done.returncode == 0, done.stderr
    together = read_npz(tmp_path / "two" / "samples_6x8x8x1.npz")
    np.testing.assert_array_equal(together["arr_1"], alone["arr_1"])
    difference = together["arr_0"].astype(int) - alone["arr_0"]
    assert np.abs(difference).max() <= 1  # of rounding, if the number of threads differs
    assert done.stdout.count("seed 5") == 1 and done.stdout.count("saved ") == 2


def test_two_ranks_make_one_mistake(tmp_path):
    """Under mpiexec, a wrong flag is told by rank 0; other ranks name themselves; nothing stays."""
    flags = {"model_path": tmp_path / "nowhere.pt", "log_dir": "two"}
    done = launch("mpiexec", SCRIPTS["image_sample"], flags_of(flags), tmp_path)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    first, *others = [line for line in done.stderr.splitlines() if "error: " in line]
    assert first.startswith("image_sample.py: error: --model_path")
    assert others in ([], [first.replace("error", "rank 1: error", 1)])
    assert not list(tmp_path.iterdir())
