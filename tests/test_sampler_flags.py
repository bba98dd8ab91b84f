"""Samplers and guidance on the command line: what is drawn, what is kept, what is refused."""

import json

import numpy as np
import pytest
import torch
from reference.fill import fill_
from scripting import CLASSIFIER, SMALL, SUPER_RES, run_script, succeed

from guided_diffusion import config
from guided_diffusion.sampling_flags import SAMPLERS
from guided_diffusion.script_util import CREATE
from guided_diffusion.trained_flags import KINDS

FEW = {"num_samples": 5, "batch_size": 3, "seed": 4}


def write_model(folder, name, kind, number, **flags):
    """Write a small network without zero layers, and its flags; return the path."""
    flags = config.defaults(*KINDS[kind]) | flags
    network, _ = CREATE[kind](**flags)
    torch.save(fill_(network, number).state_dict(), folder / f"{name}.pt")
    (folder / f"{name}.json").write_text(json.dumps(flags))
    return folder / f"{name}.pt"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Paths of small networks by name."""
    folder = tmp_path_factory.mktemp("models")
    null = SMALL | {"label_dropout": 0.1}
    upsampler = SUPER_RES | {"learn_sigma": False, "predict_xstart": True}
    return {
        name: write_model(folder, name, kind, number, **flags)
        for number, (name, kind, flags) in enumerate([
            ("model", "diffusion model", null),
            ("weak", "diffusion model", null | {"learn_sigma": False}),
            ("plain", "diffusion model", SMALL | {"class_cond": False}),
            ("linear", "diffusion model", null | {"noise_schedule": "linear",
                                                  "diffusion_steps": 40}),
            ("x_start", "diffusion model", null | {"predict_xstart": True}),
            ("classifier", "classifier", CLASSIFIER),
            ("upsampler", "upsampler", upsampler),
            ("weak_upsampler", "upsampler", upsampler | {"num_res_blocks": 2}),
        ])
    }  # fmt: skip


def drawn(folder):
    """Return the images in a folder, as integers."""
    (path,) = folder.glob("samples_*.npz")
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["arr_0"].astype(int)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_batches_do_not_change_the_images(sampler, models, tmp_path):
    """Every sampler, with its noise and all guidance at once: within rounding of one grey level."""
    flags = FEW | {
        "model_path": models["model"], "classifier_path": models["classifier"], "num_steps": 6,
        "sampler": sampler, "cfg_scale": 1.5, "guide_model_path": models["weak"],
        "guidance_interval": "0.1,5", "dynamic_threshold": 0.95,
    }  # fmt: skip
    for size in (2, 5):
        succeed("classifier_sample", flags, batch_size=size, log_dir=tmp_path / str(size))
    one, other = (drawn(tmp_path / str(size)) for size in (2, 5))
    assert one.shape == (5, 8, 8, 1) and len(np.unique(one.reshape(5, -1), axis=0)) == 5
    assert np.abs(one - other).max() <= 1


def test_two_ways_to_say_ddim_are_one_set(models, tmp_path):
    """--sampler ddim goes on with what --use_ddim True began, and the other way round."""
    flags = FEW | {"model_path": models["model"], "timestep_respacing": "4", "log_dir": tmp_path}
    succeed("image_sample", flags, use_ddim=True)
    assert "5 of 5 samples are there" in succeed("image_sample", flags, sampler="ddim").out
    told = run_script("image_sample", flags, sampler="dpmpp_2m").err
    assert '(sampler: "" there, dpmpp_2m here; use_ddim: True there, False here)' in told


@pytest.mark.parametrize(
    ("name", "there", "here"),
    [
        ("steps_by", "karras", "time"), ("fractional_t", False, True), ("num_steps", 4, 5),
        ("solver_order", 2, 3), ("cfg_scale", 1.5, 2.0), ("guidance_interval", "1,2", "1,3"),
        ("dynamic_threshold", 0.9, 0.95), ("guide_scale", 2.0, 3.0),
        ("guide_model_path", "weak", "model"),
    ],
)  # fmt: skip
def test_what_changes_the_images_is_in_the_manifest(name, there, here, models, tmp_path):
    """Other steps, other guidance, or another weaker network: refused by name."""
    flags = FEW | {
        "model_path": models["model"], "sampler": "unipc", "num_steps": 4, "steps_by": "logsnr",
        "cfg_scale": 2.0, "guide_model_path": models["weak"], "log_dir": tmp_path,
    }  # fmt: skip
    there, here = (models.get(value, value) for value in (there, here))
    succeed("image_sample", flags | {name: there})
    done = run_script("image_sample", flags | {name: here})
    assert done.code == 1 and f"holds other samples of this shape ({name}: " in done.err


def test_a_linear_network_with_other_steps(models, tmp_path):
    """The other schedule, another length of the chain; fractional timesteps reach the network."""
    flags = FEW | {"model_path": models["linear"], "sampler": "unipc", "num_steps": 7}
    for fractional in (False, True):
        succeed(
            "image_sample", flags, steps_by="karras", fractional_t=fractional,
            log_dir=tmp_path / str(fractional),
        )  # fmt: skip
    assert (drawn(tmp_path / "False") != drawn(tmp_path / "True")).any()


def test_upsamplers_are_solved_and_steered_too(models, tmp_path):
    """A guided cascade: solvers on both models, autoguidance of the upsampler."""
    base = tmp_path / "base"
    small = SMALL | {"image_size": 4, "channel_mult": "1,2", "attention_resolutions": "2"}
    path = write_model(tmp_path, "small", "diffusion model", 9, **small)
    succeed("image_sample", FEW, model_path=path, sampler="dpmpp_2m_sde", num_steps=5, log_dir=base)
    flags = FEW | {
        "model_path": models["upsampler"], "base_samples": base / "samples_5x4x4x1.npz",
        "sampler": "dpmpp_3m", "num_steps": 5, "steps_by": "logsnr",
    }  # fmt: skip
    guides = {"guide_model_path": models["weak_upsampler"], "guidance_interval": "0.05,50"}
    succeed("super_res_sample", flags, log_dir=tmp_path / "plain")
    succeed("super_res_sample", flags | guides, log_dir=tmp_path / "steered")
    plain, steered = (drawn(tmp_path / name) for name in ("plain", "steered"))
    assert plain.shape == (5, 8, 8, 1) and (plain != steered).any()


def test_an_upsampler_is_steered_by_one_of_its_sizes(models, tmp_path):
    """Another input size is another network, though its weights would fit."""
    flags = SUPER_RES | {"learn_sigma": False, "predict_xstart": True, "small_size": 2}
    other = write_model(tmp_path, "other", "upsampler", 8, **flags)
    np.savez(tmp_path / "base.npz", np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int64))
    done = run_script(
        "super_res_sample", FEW, model_path=models["upsampler"], guide_model_path=other,
        base_samples=tmp_path / "base.npz", log_dir=tmp_path / "out",
    )  # fmt: skip
    assert done.code == 1 and "small_size 2 there, 4 here" in done.err


def test_a_guide_without_a_flags_file(models, tmp_path):
    """Its null class is taken to be there as in the model; the samples are those with the file."""
    bare = tmp_path / "bare.pt"
    bare.write_bytes(models["weak"].read_bytes())
    flags = FEW | {"model_path": models["model"], "sampler": "dpmpp_2m", "num_steps": 4}
    for path in (bare, models["weak"]):
        succeed("image_sample", flags, guide_model_path=path, log_dir=tmp_path / path.stem)
    assert (drawn(tmp_path / "bare") == drawn(tmp_path / "weak")).all()


def test_unconditional_networks_steer_each_other(models, tmp_path):
    """A classifier's labels reach neither the model nor its guide."""
    plain = SMALL | {"class_cond": False, "num_res_blocks": 2}
    guide = write_model(tmp_path, "guide", "diffusion model", 7, **plain)
    flags = FEW | {
        "model_path": models["plain"], "classifier_path": models["classifier"],
        "guide_model_path": guide, "sampler": "dpmpp_2m", "num_steps": 4,
    }  # fmt: skip
    for scale in (1.0, 2.0):
        succeed("classifier_sample", flags, guide_scale=scale, log_dir=tmp_path / str(scale))
    assert (drawn(tmp_path / "1.0") != drawn(tmp_path / "2.0")).any()


def test_a_guide_of_scale_one_is_none(models):
    """It is not loaded, and a dry run does not count it."""
    flags = {"model_path": models["model"], "num_steps": 4, "dry_run": True}
    out = succeed("image_sample", flags, guide_model_path=models["weak"], guide_scale=1.0).out
    assert "weaker network" not in out


def test_a_preset_gives_way_to_num_steps(tmp_path):
    """The 50 steps of the bundled preset are no contradiction."""
    done = succeed(
        "classifier_sample", {"preset": "fashion", "sampler": "unipc", "num_steps": 3},
        dry_run=True,
    )  # fmt: skip
    assert "an image, 3 x (0.516 + 0.383)" in done.out


def test_a_dry_run_counts_what_the_interval_saves(models):
    """The second pass, the weaker network and the classifier only where they are called."""
    flags = {
        "model_path": models["model"], "classifier_path": models["classifier"], "num_steps": 10,
        "sampler": "heun", "steps_by": "time", "cfg_scale": 2.0, "guidance_interval": "0.2,1",
        "guide_model_path": models["weak"], "dry_run": True,
    }  # fmt: skip
    out = succeed("classifier_sample", flags).out
    line = next(line for line in out.splitlines() if line.startswith("  an image, "))
    counts = [int(word.split()[-1]) for word in line.split(" x ")[:-1]]
    assert counts == [19 + counts[1], counts[1], counts[1]] and 0 < counts[1] < 19
    assert "weights, weaker network" in out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"model_path": "plain", "cfg_scale": 2.0}, "--cfg_scale 2.0 needs a network with a null"),
        ({"guide_model_path": "plain"}, "is of another kind than --model_path"),
        ({"guide_model_path": "linear"}, "noise_schedule linear there, cosine here"),
        ({"guide_model_path": "x_start"}, "predict_xstart True there, False here"),
        ({"guide_model_path": "classifier"}, "holds a classifier: give a file with a diffusion"),
        ({"guide_model_path": "nowhere.pt"}, "--guide_model_path nowhere.pt does not exist"),
        ({"num_steps": 21}, "--num_steps 21 is more than the --diffusion_steps 20"),
        ({"num_steps": -1}, "--num_steps -1 must be at least 0"),
        ({"sampler": "euler"}, "--sampler euler must be one of ancestral, ddim"),
        ({"sampler": "unipc", "solver_order": 4}, "--solver_order 4 must be one of 2, 3"),
        ({"dynamic_threshold": 1.5}, "--dynamic_threshold 1.5 must lie between 0 and 1"),
        ({"sampler": "ddim", "eta": 2.0}, "--eta 2.0 must lie between 0 and 1, or be -1"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(flags, told, models, tmp_path):
    """The flag, the value, the remedy; a non-zero exit code; no folder."""
    flags = {name: models.get(value, value) for name, value in flags.items()}
    values = FEW | {"model_path": models["model"]} | flags
    done = run_script("image_sample", values, log_dir=tmp_path / "out")
    assert done.code in (1, 2) and told in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
