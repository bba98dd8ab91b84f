"""A mistake in a command ends in one clear line, an exit code and nothing written."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from scripting import (
    CLASSIFIER,
    SCRIPTS,
    SMALL,
    SUPER_RES,
    files_below,
    make_images,
    run_script,
    succeed,
)

TRAIN = {"batch_size": 4, "max_steps": 2, "save_interval": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images, a model of each kind, and files that are something else."""
    place = tmp_path_factory.mktemp("place")
    data = make_images(place / "data")
    common = {"data_dir": data, "batch_size": 4}
    for folder, script, flags in [
        ("d", "image_train", SMALL | {"max_steps": 1}),
        ("u", "image_train", SMALL | {"max_steps": 1, "class_cond": False}),
        ("s", "super_res_train", SUPER_RES | {"max_steps": 1}),
        ("c", "classifier_train", CLASSIFIER | {"iterations": 1}),
    ]:
        succeed(script, common | flags, log_dir=place / folder)
    make_broken_files(place)
    make_broken_sets(place)
    make_broken_data(place)
    return place


def make_broken_files(place):
    """Write what people give by mistake."""
    weights = place / "d" / "model000001.pt"
    (place / "none").mkdir()
    (place / "texts").mkdir()
    (place / "texts" / "notes.txt").write_text("no image")
    make_images(place / "nameless", count=4)
    for path in list((place / "nameless").iterdir()):
        path.rename(path.with_name(path.name.replace("_", "")))
    make_images(place / "broken", count=4)
    for path in (place / "broken").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    shutil.copy(weights, place / "bare.pt")
    shutil.copy(place / "c" / "model000001.pt", place / "bare_classifier.pt")
    shutil.copy(weights, place / "bad_json.pt")
    (place / "bad_json.json").write_text("{")
    shutil.copy(weights, place / "odd_json.pt")
    (place / "odd_json.json").write_text(json.dumps(SMALL | {"num_channels": "many"}))
    shutil.copy(weights, place / "list_json.pt")
    (place / "list_json.json").write_text("[1]")
    (place / "short.pt").write_bytes(weights.read_bytes()[:5000])
    (place / "empty.pt").touch()
    (place / "text.pt").write_text("hello")
    (place / "code.pt").write_bytes(pickle.dumps(Harmful()))
    torch.save({"a": Harmful()}, place / "code_in_zip.pt")
    images = np.zeros((2, 4, 4, 1), np.uint8)
    np.savez(place / "base.npz", images, np.array([0, 1]))
    np.savez(place / "base_unlabelled.npz", images)
    np.savez(place / "base_large.npz", np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 1]))
    np.savez(place / "base_float.npz", images.astype(np.float32), np.array([0, 1]))
    np.savez(place / "base_few_labels.npz", images, np.array([0]))
    np.savez(place / "base_high_label.npz", images, np.array([0, 3]))
    np.savez(place / "base_named.npz", images=images)
    np.savez(place / "base_object.npz", np.array([{}, []], dtype=object))
    (place / "base_text.npz").write_text("hello")


def make_broken_sets(place):
    """Copy the set in d, and damage one file of each copy."""
    for name in ("nan", "seed", "dice", "cut", "later", "opt", "ema"):
        shutil.copytree(place / "d", place / name)
    state = torch.load(place / "d" / "state000001.pt", weights_only=True)
    torch.save(state | {"images": "many"}, place / "nan" / "state000001.pt")
    torch.save(state | {"seed": "x"}, place / "seed" / "state000001.pt")
    state["ranks"][0]["random"]["torch"] = torch.zeros(3, dtype=torch.uint8)
    torch.save(state, place / "dice" / "state000001.pt")
    whole = (place / "d" / "state000001.pt").read_bytes()
    (place / "cut" / "state000001.pt").write_bytes(whole[: len(whole) // 2])
    torch.save(state | {"format": 99}, place / "later" / "state000001.pt")
    shutil.copy(place / "c" / "opt000001.pt", place / "opt" / "opt000001.pt")
    shutil.copy(place / "c" / "model000001.pt", place / "ema" / "ema_0.9999_000001.pt")
    torch.save({"something": torch.zeros(2)}, place / "other.pt")


def make_broken_data(place):
    """Write label files and archives that do not fit."""
    names = sorted(path.name for path in (place / "data").iterdir())
    (place / "broken.json").write_text("{")
    (place / "few.csv").write_text(f"{names[0]},0\n")
    (place / "high.csv").write_text("".join(f"{name},{i}\n" for i, name in enumerate(names)))
    (place / "text.zip").write_text("hello")
    (place / "few.xml").write_text("<a/>")
    make_images(place / "torn", count=2, size=4)
    for path in (place / "torn").iterdir():
        path.write_bytes(path.read_bytes()[:45])
    (place / "names.txt").write_text("0\ncat\n")
    (place / "empty.txt").touch()
    (place / "full").mkdir()
    (place / "full" / "samples_2x8x8x1.json").write_text("[]")
    make_images(place / "other_classes", count=4)
    for path in list((place / "other_classes").iterdir()):
        path.rename(path.with_name("cat_" + path.name))


class Harmful:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return (os.makedirs, ("harm",))


def command(script, place):
    """Return flags with which a script works."""
    model, data = {"model_path": place / "d" / "model000001.pt"}, {"data_dir": place / "data"}
    sample = {"num_samples": 2, "batch_size": 2}
    classifier = {"classifier_path": place / "c" / "model000001.pt"}
    upsample = {
        "model_path": place / "s" / "model000001.pt", "base_samples": place / "base.npz",
    }  # fmt: skip
    return {
        "image_train": data | SMALL | TRAIN,
        "super_res_train": data | SUPER_RES | TRAIN,
        "classifier_train": data | CLASSIFIER | {"batch_size": 4, "iterations": 2},
        "image_sample": model | sample,
        "classifier_sample": model | sample | classifier,
        "super_res_sample": upsample | sample,
        "image_nll": model | data | {"batch_size": 4},
        "image_invert": model | data | {"batch_size": 4},
        "npz_view": {"npz": place / "base.npz"},
        "convert_checkpoint": {"source": place / "bare.pt", "target": place / "new.safetensors"},
    }[script]


def check_refusal(done, *words):
    """Assert that a run failed with one line that holds these words."""
    bars = "img/s", "s/img"  # of the progress bar, the second on a slow machine
    lines = [
        line
        for line in done.err.replace("\r", "\n").splitlines()
        if line.strip() and not any(bar in line for bar in bars)
    ]
    assert done.code not in (0, None), done.out
    assert len(lines) == 1, done.err
    assert "error: " in lines[0] and "Traceback" not in done.err
    missing = [word for word in words if word not in lines[0]]
    assert not missing, (missing, lines[0])


# script, the flags that are wrong (PLACE/ stands for the folder of `place`), words of the error
CASES = [
    ("image_train", {"data_dir": "PLACE/nowhere"}, "--data_dir nowhere exist folder"),
    ("image_train", {"data_dir": "PLACE/bare.pt"}, "--data_dir bare.pt file folder"),
    ("image_train", {"data_dir": "PLACE/none"}, "--data_dir none images png"),
    ("image_train", {"data_dir": "PLACE/texts"}, "--data_dir texts images png"),
    ("image_train", {"data_dir": "PLACE/nameless"}, "--class_cond True _ rename"),
    ("image_train", {"data_dir": "PLACE/broken"}, "--data_dir broken/ .png repair"),
    ("image_nll", {"data_dir": "PLACE/broken"}, "--data_dir broken/ .png repair"),
    ("image_nll", {"data_dir": "PLACE/nowhere"}, "--data_dir nowhere exist folder"),
    ("classifier_train", {"val_data_dir": "PLACE/none"}, "none images png"),
    ("classifier_train", {"num_classes": 2}, "--num_classes 2 3"),
    ("image_train", {"num_classes": 0}, "--num_classes 0 at least 1"),
    ("image_train", {"imagesize": 8}, "--imagesize --help"),
    ("image_train", {"class_cond": "maybe"}, "--class_cond maybe True False"),
    ("image_train", {"batch_size": "two"}, "--batch_size two int"),
    ("image_train", {"batch_size": 0}, "--batch_size 0 at least 1"),
    ("image_train", {"microbatch": 0}, "--microbatch 0 -1"),
    ("image_train", {"lr": 0}, "--lr 0 greater"),
    ("image_train", {"lr": "nan"}, "--lr nan finite"),
    ("image_train", {"lr": "inf"}, "--lr inf finite"),
    ("image_train", {"dropout": "nan"}, "--dropout nan"),
    ("classifier_sample", {"classifier_scale": "nan"}, "--classifier_scale nan finite"),
    ("image_train", {"ema_rate": "often"}, "--ema_rate often 0.9999"),
    ("image_train", {"ema_rate": "0.9,1.5"}, "--ema_rate 0.9,1.5 0.9999"),
    ("image_train", {"image_size": 9}, "--image_size 9 2 --channel_mult"),
    ("image_train", {"image_size": 24, "channel_mult": ""}, "--image_size 24 --channel_mult"),
    ("super_res_train", {"large_size": 9}, "--large_size 9 2 --channel_mult"),
    ("super_res_train", {"small_size": 16}, "--small_size 16 --large_size 8"),
    ("classifier_train", {"image_size": 9}, "--image_size 9 2 --classifier_channel_mult"),
    ("image_train", {"in_channels": 2}, "--in_channels 2 1, 3"),
    ("image_train", {"channel_mult": "1,x"}, "--channel_mult 1,x 1,2,3,4"),
    ("image_train", {"num_channels": 40}, "--num_channels 40 32"),
    ("classifier_train", {"classifier_width": 40}, "--classifier_width 40 32"),
    ("image_train", {"num_heads": 3}, "--num_heads 3 divide"),
    ("image_train", {"num_head_channels": 48}, "--num_head_channels 48 divide"),
    (
        "classifier_train",
        {"classifier_num_head_channels": 48},
        "--classifier_num_head_channels 48 divide",
    ),
    ("image_train", {"attention_resolutions": "a"}, "--attention_resolutions a 32,16,8"),
    ("image_train", {"noise_schedule": "cubic"}, "--noise_schedule cubic linear cosine"),
    ("image_train", {"schedule_sampler": "x"}, "--schedule_sampler x uniform loss-second-moment"),
    ("classifier_train", {"classifier_pool": "max"}, "--classifier_pool max attention spatial_v2"),
    ("image_sample", {"timestep_respacing": "fast"}, "--timestep_respacing fast ddim25"),
    ("image_sample", {"timestep_respacing": "21"}, "timestep_respacing 21 20"),
    ("image_sample", {"timestep_respacing": "ddim19"}, "timestep_respacing ddim19"),
    ("image_train", {"noise_schedule": "linear", "diffusion_steps": 10}, "--diffusion_steps 20"),
    ("image_train", {"device": "tpu"}, "--device tpu cpu cuda"),
    ("image_train", {"device": "cuda:99"}, "--device cuda:99 available cpu"),
    ("image_train", {"log_dir": "PLACE/bare.pt"}, "--log_dir bare.pt file"),
    ("image_train", {"log_dir": "PLACE/bare.pt/below"}, "--log_dir bare.pt file"),
    ("image_train", {"log_dir": "/proc/nowhere"}, "--log_dir /proc/nowhere"),
    ("image_sample", {"log_dir": "s3://bucket"}, "--log_dir s3://bucket local"),
    ("image_train", {"use_fp16": True, "use_bf16": True}, "--use_bf16 --use_fp16"),
    ("image_train", {"shard_params": True, "compile": True}, "--shard_params --compile"),
    (
        "classifier_train",
        {"classifier_use_fp16": True, "use_bf16": True},
        "--use_bf16 --classifier_use_fp16",
    ),
    ("image_train", {"class_cond": False, "label_dropout": 0.1}, "--label_dropout --class_cond"),
    ("image_train", {"seed": -2}, "--seed -2"),
    (
        "image_train",
        {"resume_checkpoint": "PLACE/model9.pt"},
        "--resume_checkpoint model9.pt exist",
    ),
    ("image_train", {"resume_checkpoint": "PLACE/short.pt"}, "short.pt cut short"),
    (
        "image_train",
        {"resume_checkpoint": "PLACE/c/model000001.pt"},
        "--resume_checkpoint model000001.pt classifier",
    ),
    (
        "image_train",
        {"resume_checkpoint": "PLACE/d/model000001.pt", "noise_schedule": "linear"},
        "--noise_schedule linear cosine model000001.pt",
    ),
    ("image_train", {"resume_checkpoint": "PLACE/none"}, "--resume_checkpoint none complete set"),
    ("image_train", {"resume_checkpoint": "PLACE/d/opt000001.pt"}, "opt000001.pt model000001.pt"),
    ("image_train", {"resume_checkpoint": "PLACE/nan/model000001.pt"}, "state000001.pt damaged"),
    ("image_train", {"resume_checkpoint": "PLACE/seed/model000001.pt"}, "state000001.pt damaged"),
    ("image_train", {"resume_checkpoint": "PLACE/dice/model000001.pt"}, "state damaged remove"),
    ("image_train", {"resume_checkpoint": "PLACE/cut/model000001.pt"}, "state000001.pt cut short"),
    ("image_train", {"resume_checkpoint": "PLACE/later/model000001.pt"}, "state000001.pt format"),
    ("image_train", {"resume_checkpoint": "PLACE/opt/model000001.pt"}, "opt000001.pt optimizer"),
    ("image_train", {"resume_checkpoint": "PLACE/ema/model000001.pt"}, "ema_0.9999_ not fit"),
    ("image_train", {"init_from": "PLACE/model9.pt"}, "--init_from model9.pt exist"),
    ("image_train", {"init_from": "PLACE/empty.pt"}, "empty.pt torch.save"),
    ("image_train", {"init_from": "PLACE/other.pt"}, "--init_from other.pt no tensor fits"),
    ("image_train", {"init_from": "PLACE/c/model000001.pt"}, "--init_from classifier"),
    (
        "image_train",
        {"init_from": "PLACE/bare.pt", "resume_checkpoint": "PLACE/d"},
        "--init_from --resume_checkpoint one of them",
    ),
    ("image_train", {"labels": "names"}, "--labels names filename folder .json .csv"),
    ("image_train", {"labels": "PLACE/x.csv"}, "--labels x.csv exist"),
    ("image_train", {"labels": "PLACE/broken.json"}, "--labels broken.json"),
    ("image_train", {"labels": "PLACE/few.csv"}, "--labels few.csv"),
    ("image_train", {"labels": "PLACE/high.csv"}, "--labels high.csv --num_classes 3"),
    ("image_train", {"labels": "folder"}, "--labels folder"),
    ("image_train", {"data_dir": "PLACE/text.zip"}, "--data_dir text.zip"),
    ("image_train", {"data_dir": "PLACE/base_named.npz"}, "--data_dir base_named.npz arr_0"),
    ("image_train", {"data_dir": "PLACE/base_float.npz"}, "--data_dir base_float.npz uint8"),
    ("image_train", {"num_workers": -2}, "--num_workers -2 at least -1"),
    ("image_train", {"grad_clip": -1}, "--grad_clip -1 at least 0"),
    ("image_train", {"grad_clip": "nan"}, "--grad_clip nan finite"),
    ("image_train", {"max_bad_steps": 0}, "--max_bad_steps 0 at least 1"),
    ("image_train", {"keep_checkpoints": -1}, "--keep_checkpoints -1 at least 0"),
    ("image_train", {"sample_interval": -1}, "--sample_interval -1 at least 0"),
    ("image_train", {"dist_timeout": 0}, "--dist_timeout 0 greater than 0"),
    ("image_train", {"shard_params": True, "use_fp16": True}, "--shard_params --use_fp16 bf16"),
    (
        "classifier_train",
        {"shard_params": True, "classifier_use_fp16": True},
        "--shard_params --classifier_use_fp16 bf16",
    ),
    ("classifier_train", {"val_data_dir": "PLACE/other_classes"}, "--val_data_dir 'cat'"),
    ("image_sample", {"num_samples": 0}, "--num_samples 0 at least 1"),
    ("image_sample", {"model_path": "PLACE/model9.pt"}, "--model_path model9.pt exist"),
    ("image_sample", {"model_path": "PLACE/data"}, "--model_path data folder"),
    ("image_sample", SMALL | {"model_path": "PLACE/text.pt"}, "text.pt torch.save"),
    ("image_sample", SMALL | {"model_path": "PLACE/empty.pt"}, "empty.pt torch.save"),
    ("image_sample", SMALL | {"model_path": "PLACE/short.pt"}, "short.pt cut short"),
    ("image_sample", SMALL | {"model_path": "PLACE/code.pt"}, "code.pt torch.save"),
    (
        "image_sample",
        SMALL | {"model_path": "PLACE/code_in_zip.pt"},
        "code_in_zip.pt makedirs code",
    ),
    ("image_sample", {"model_path": "PLACE/d/opt000001.pt"}, "opt000001.pt no weights"),
    (
        "image_sample",
        SMALL | {"model_path": "PLACE/bare.pt", "num_channels": 64},
        "--model_path bare.pt num_channels: the checkpoint has 32, the command line says 64 leave",
    ),
    ("image_sample", {"model_path": "PLACE/other.pt"}, "--model_path other.pt no network give"),
    ("image_sample", {"preset": "cats"}, "--preset cats imagenet64 fashion"),
    ("image_sample", {"preset": "upsample_64_256"}, "--preset upsampler super_res_sample.py"),
    (
        "image_sample",
        {"preset": "imagenet256", "model_path": "PLACE/bare.pt", "num_channels": 128},
        "--model_path num_channels: the checkpoint has 256, the command line says 128",
    ),
    (
        "image_sample",
        {"preset": "imagenet256", "model_path": "PLACE/other.pt"},
        "--model_path other.pt no network give",
    ),
    (
        "image_sample",
        {"preset": "imagenet256", "model_path": "PLACE/bare_classifier.pt"},
        "--model_path bare_classifier.pt a classifier: give",
    ),
    (
        "image_sample",
        {"preset": "imagenet256", "model_path": "PLACE/bare.pt"},
        "--model_path bare.pt --preset imagenet256 num_channels: the file has 32, the preset 256",
    ),
    ("image_sample", {"model_path": "PLACE/bad_json.pt"}, "bad_json.json JSON remove"),
    ("image_sample", {"model_path": "PLACE/odd_json.pt"}, "odd_json.json --num_channels int many"),
    ("image_sample", {"model_path": "PLACE/list_json.pt"}, "list_json.json JSON object"),
    ("image_sample", {"num_channels": 64}, "--num_channels 64 model000001.pt 32"),
    ("image_sample", {"noise_schedule": "linear"}, "--noise_schedule linear cosine model000001.pt"),
    ("image_sample", {"model_path": "PLACE/c/model000001.pt"}, "--model_path classifier"),
    ("image_nll", {"model_path": "PLACE/s/model000001.pt"}, "--model_path upsampler"),
    ("super_res_sample", {"model_path": "PLACE/d/model000001.pt"}, "--model_path diffusion model"),
    ("image_sample", {"classes": "0,3"}, "--classes 3 0 to 2"),
    ("image_sample", {"classes": "cat"}, "--classes 'cat' number 0, 1, 2"),
    ("image_sample", {"classes": "0,,1"}, "--classes 0,,1 207,360"),
    ("image_sample", {"classes": "-1"}, "--classes -1 from 0 on"),
    ("image_sample", {"classes": "1", "class_balanced": True}, "--classes --class_balanced one"),
    ("image_sample", {"labels_file": "PLACE/x.txt"}, "--labels_file x.txt exist"),
    ("image_sample", {"labels_file": "PLACE/few.xml"}, "--labels_file few.xml .txt .csv .npy"),
    ("image_sample", {"labels_file": "PLACE/names.txt"}, "--labels_file names.txt 'cat'"),
    ("image_sample", {"labels_file": "PLACE/empty.txt"}, "--labels_file empty.txt no class line"),
    ("image_sample", {"labels_file": "PLACE/base_object.npz"}, "--labels_file base_object.npz"),
    ("image_sample", {"save_every_t": -1}, "--save_every_t -1 at least 0"),
    ("image_sample", {"num_samples": 0}, "--num_samples 0 at least 1"),
    ("image_sample", {"preset": "imagenet"}, "--preset imagenet imagenet64 fashion"),
    ("image_sample", {"preset": "upsample_64_256"}, "--preset upsampler super_res_sample.py"),
    ("classifier_sample", {"preset": "lsun_cat", "classifier_path": ""}, "--classifier_path"),
    ("super_res_sample", {"preset": "lsun_cat"}, "--preset lsun_cat image_sample.py"),
    ("image_sample", {"log_dir": "PLACE/full"}, "samples_2x8x8x1.json --log_dir"),
    (
        "image_sample",
        {"model_path": "PLACE/u/model000001.pt", "classes": "1"},
        "--classes 1 --class_cond",
    ),
    ("classifier_sample", {"classes": "3"}, "--classes 3 0 to 2"),
    ("classifier_sample", {"classifier_path": "PLACE/x.pt"}, "--classifier_path x.pt exist"),
    (
        "classifier_sample",
        {"classifier_path": "PLACE/d/model000001.pt"},
        "--classifier_path diffusion model",
    ),
    ("super_res_sample", {"base_samples": "PLACE/x.npz"}, "--base_samples x.npz exist"),
    ("super_res_sample", {"base_samples": "PLACE/base_large.npz"}, "--base_samples 8 [N, 4, 4, 1]"),
    ("super_res_sample", {"base_samples": "PLACE/base_float.npz"}, "--base_samples float32 uint8"),
    ("super_res_sample", {"base_samples": "PLACE/base_unlabelled.npz"}, "arr_1 --class_cond"),
    ("super_res_sample", {"base_samples": "PLACE/base_few_labels.npz"}, "--base_samples arr_1 2"),
    ("super_res_sample", {"base_samples": "PLACE/base_high_label.npz"}, "3 --num_classes 3"),
    ("super_res_sample", {"base_samples": "PLACE/base_named.npz"}, "--base_samples arr_0"),
    ("super_res_sample", {"base_samples": "PLACE/base_object.npz"}, "--base_samples arr_0"),
    ("super_res_sample", {"base_samples": "PLACE/base_text.npz"}, "--base_samples base_text.npz"),
    ("super_res_sample", {"base_samples": "PLACE/none"}, "--base_samples none images png"),
    ("super_res_sample", {"base_samples": "PLACE/data"}, "--base_samples data .png 8 x 8 4 x 4"),
    ("super_res_sample", {"base_samples": "PLACE/broken"}, "--base_samples broken .png 8 x 8"),
    ("super_res_sample", {"base_samples": "PLACE/torn"}, "--base_samples torn .png repair"),
    ("super_res_sample", {"base_samples": "PLACE/text.zip"}, "--base_samples text.zip"),
    ("super_res_sample", {"low_res_noise": -0.1}, "--low_res_noise -0.1 0"),
    ("super_res_sample", {"low_res_noise": "nan"}, "--low_res_noise nan finite"),
    ("image_invert", {"data_dir": "PLACE/none"}, "--data_dir none images png"),
    ("image_invert", {"model_path": "PLACE/c/model000001.pt"}, "--model_path classifier"),
    ("npz_view", {"npz": "PLACE/base_text.npz"}, "base_text.npz npz"),
    ("npz_view", {"npz": "PLACE/base.npz", "out": "PLACE/a.jpg"}, "--out a.jpg .png"),
    ("npz_view", {"npz": "PLACE/base.npz", "start": 2}, "--start 2 images"),
    ("convert_checkpoint", {"target": "PLACE/bare.pt"}, "--target bare.pt exists"),
    ("convert_checkpoint", {"target": "PLACE/bare.bin"}, "--target bare.bin .pt .safetensors"),
    ("convert_checkpoint", {"source": "PLACE/code_in_zip.pt"}, "code_in_zip.pt could run code"),
    ("convert_checkpoint", {"source": "PLACE/d/opt000001.pt"}, "opt000001.pt weights"),
]


def name_case(case):
    script, flags, _ = case
    return "-".join([script, *(f"{k}={v}" for k, v in list(flags.items())[-2:])]).replace("/", ".")


@pytest.mark.parametrize("case", CASES, ids=name_case)
def test_a_mistake_ends_in_one_line(case, place, monkeypatch):
    """A wrong flag is named, with its value and a remedy, in one line; no file is left behind."""
    script, wrong, words = case
    monkeypatch.chdir(place)
    wrong = {
        k: v.replace("PLACE", str(place)) if isinstance(v, str) else v for k, v in wrong.items()
    }
    has_log = script not in ("npz_view", "convert_checkpoint")
    flags = command(script, place) | ({"log_dir": place / "new" / "run"} if has_log else {}) | wrong
    before = files_below(place)
    done = run_script(script, flags)
    check_refusal(done, *words.split())
    assert files_below(place) == before


@pytest.mark.parametrize("name", ["image_size", "num_classes", "noise_schedule", "diffusion_steps"])
def test_a_classifier_of_another_world_is_refused(name, place):
    """A classifier guides only models with its image size, classes and noise."""
    other = {"image_size": 16, "num_classes": 4, "noise_schedule": "linear", "diffusion_steps": 40}
    shutil.copy(place / "c" / "model000001.pt", place / f"other_{name}.pt")
    (place / f"other_{name}.json").write_text(json.dumps(CLASSIFIER | {name: other[name]}))
    flags = command("classifier_sample", place) | {"classifier_path": place / f"other_{name}.pt"}
    done = run_script("classifier_sample", flags, log_dir=place / "new")
    check_refusal(done, "--classifier_path", f"--{name}", str(other[name]), "model_path")
    assert not (place / "new").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_flags_at_all_name_the_first_missing_one(script, tmp_path, monkeypatch):
    """Each script without flags says which flag it needs."""
    monkeypatch.chdir(tmp_path)
    reads_images = script.endswith(("train", "nll", "invert"))
    wanted = "--data_dir" if reads_images else "--model_path"
    wanted = {"convert_checkpoint": "--source", "npz_view": "--npz"}.get(script, wanted)
    check_refusal(run_script(script), wanted, "missing")
    assert not files_below(tmp_path)


def test_mistakes_come_before_torch(place, tmp_path):
    """A wrong flag, a missing file and a contradiction are found before torch is imported."""
    program = (
        "import sys, runpy\n"
        "sys.argv = sys.argv[1:]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    print('torch' in sys.modules, end.code)\n"
    )
    model = str(place / "d" / "model000001.pt")
    for flags in (
        ["--model_path", model, "--num_samples", "0"],
        ["--model_path", model + "x"],
        ["--model_path", model, "--learn_sigma", "False"],
        ["--model_path", str(place / "c" / "model000001.pt")],
    ):
        command = [sys.executable, "-c", program, str(SCRIPTS["image_sample"]), *flags]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
        assert done.stdout.split()[0] == "False" and done.stdout.split()[1] != "0"
        assert done.stderr.startswith("image_sample.py: error: --") and done.stderr.count("\n") == 1
    assert not files_below(tmp_path)


@pytest.mark.parametrize("script", ["image_sample", "image_train"])
def test_a_dated_folder_goes_too(script, place, tmp_path, monkeypatch):
    """Without --log_dir a mistake leaves no logs/DATE; in an old folder it adds no file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    wrong = command(script, place) | {"resume_checkpoint": place / "text.pt"}
    if script == "image_sample":
        wrong = command(script, place) | {"timestep_respacing": "21"}
    assert run_script(script, wrong).code == 1
    assert not files_below(tmp_path)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "log.txt").write_text("of before\n")
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "old"))
    assert run_script(script, wrong).code == 1
    assert files_below(tmp_path) == {"old", "old/log.txt"}
    assert (tmp_path / "old" / "log.txt").read_text().startswith("of before\n")


def test_auto_needs_a_folder(place, tmp_path, monkeypatch):
    """Without --log_dir or $OPENAI_LOGDIR there is no folder to look into."""
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_LOGDIR", "DIFFUSION_BLOB_LOGDIR"):
        monkeypatch.delenv(name, raising=False)
    flags = command("image_train", place) | {"resume_checkpoint": "auto"}
    check_refusal(run_script("image_train", flags), "--resume_checkpoint auto", "--log_dir")
    assert not files_below(tmp_path)


def test_a_full_disk_is_one_line(place, tmp_path):
    """Where no more than a few kilobytes can be written, the error names the file; no set is left.

    A limit on the size of files stands for the disk; its signal is ignored, so writes fail.
    """
    flags = command("image_train", place) | {"log_dir": tmp_path / "run", "num_workers": 0}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        done = run_script("image_train", flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    check_refusal(done, "model000001.pt cannot be written", "too large", "another folder")
    assert not [path for path in files_below(tmp_path / "run") if ".pt" in path]


def test_a_mistake_that_shows_late_keeps_the_log(place, tmp_path):
    """Once a line of numbers is written, the log stays and tells the story."""
    shutil.copytree(place / "data", tmp_path / "data")
    (tmp_path / "data" / "0_0.png").write_bytes(b"no image")
    flags = command("image_train", place) | {"max_steps": 50, "log_interval": 1, "batch_size": 1}
    flags |= {"data_dir": tmp_path / "data", "log_dir": tmp_path / "run", "seed": 1}
    check_refusal(run_script("image_train", flags), "--data_dir", "0_0.png")
    assert (tmp_path / "run" / "progress.csv").read_text().count("\n") > 1
    assert "training" in (tmp_path / "run" / "log.txt").read_text()
