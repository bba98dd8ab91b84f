"""Laws of guided_diffusion/presets.py: the released and the bundled models, by name."""

import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from scripting import run_script

from guided_diffusion import config, presets, script_util, trained_flags
from guided_diffusion.presets import PRESETS, expand
from guided_diffusion.trained_flags import KINDS

RELEASED = json.loads((Path(__file__).parent / "reference" / "checkpoints.json").read_text())
CREATE = {
    "diffusion model": script_util.create_model,
    "upsampler": script_util.sr_create_model,
    "classifier": script_util.create_classifier,
}
FILES = [
    (name, kind, preset.files[kind])
    for name, preset in PRESETS.items() if not preset.bundled
    for kind in preset.files
]  # fmt: skip
SCALES = {  # of the published README
    "imagenet64": 1.0, "imagenet128": 0.5, "imagenet256": 1.0, "imagenet256_uncond": 10.0,
    "imagenet512": 4.0,
}  # fmt: skip
SAMPLING = [config.RunConfig, config.LoadConfig, config.BatchConfig, config.SampleConfig]
GROUPS = {
    "image": [*SAMPLING, *config.DIFFUSION_GROUPS],
    "classifier": [
        *SAMPLING, config.GuidanceConfig, *config.DIFFUSION_GROUPS, config.ClassifierConfig
    ],
    "super_res": [*SAMPLING, *config.SUPER_RES_GROUPS],
}  # fmt: skip


def parse(script, *argv):
    return config.parse_flags("", *GROUPS[script], argv=argv, overrides={"batch_size": 16})


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A folder that has all files of all presets, empty."""
    monkeypatch.setattr(presets, "MODELS", str(tmp_path))
    for preset in PRESETS.values():
        for file in preset.files.values():
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).touch()
    return tmp_path


# --------------------------------------------------------------------------------------------
# The table


def test_the_table_has_every_released_file():
    """Each of the 15 checkpoints belongs to a preset."""
    assert {file for _, _, file in FILES} == RELEASED.keys()


@pytest.mark.parametrize("name, kind, file", FILES)
def test_a_preset_has_the_published_flags(name, kind, file):
    """What the README gives for a checkpoint is in the table, and nothing contradicts it."""
    fields = {f.name: f for f in config.all_fields()}
    network = trained_flags.whole_network(PRESETS[name].network[kind], kind)
    for flag, text in RELEASED[file]["flags"].items():
        if flag in ("dropout", "use_fp16") or flag not in config.defaults(*KINDS[kind]):
            continue
        read = config.str2bool if fields[flag].type is bool else fields[flag].type
        assert network[flag] == read(text), flag
    assert PRESETS[name].network[kind].keys() <= config.fixed_names(*KINDS[kind])


@pytest.mark.parametrize("name, kind, file", FILES)
def test_a_presets_network_is_that_of_its_checkpoint(name, kind, file):
    """The network has exactly the names and shapes of the released state dict."""
    flags = config.defaults(*KINDS[kind])
    flags |= trained_flags.whole_network(PRESETS[name].network[kind], kind)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # attention at sizes that are no level's
        model = CREATE[kind](**script_util._own(CREATE[kind], flags))
    shapes = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert shapes == RELEASED[file]["state_dict"]


@pytest.mark.parametrize("name", [name for name in PRESETS if not PRESETS[name].bundled])
def test_a_preset_samples_as_the_readme_does(name):
    """Four images at a time, 100 in all; LSUN by 1000 steps, the others by 250."""
    sampling = PRESETS[name].sampling
    assert (sampling["batch_size"], sampling["num_samples"]) == (4, 100)
    assert sampling["timestep_respacing"] == ("1000" if name.startswith("lsun") else "250")
    assert sampling.get("classifier_scale") == SCALES.get(name)
    model = next(file for kind, file in PRESETS[name].files.items() if kind != "classifier")
    assert str(sampling["use_fp16"]) == RELEASED[model]["flags"]["use_fp16"]


@pytest.mark.parametrize("preset", PRESETS.values())
def test_sampling_flags_are_flags_that_fix_nothing(preset):
    """A preset's sampling flags exist, have their types, and leave the network alone."""
    fields = {f.name: f for f in config.all_fields()}
    for flag, value in preset.sampling.items():
        assert type(value) is fields[flag].type and not fields[flag].metadata["fixes"]
        assert config.find_mistake(fields[flag], value) is None


def test_the_bundled_files_are_there():
    """They come with the project, and their flags beside them."""
    for file in PRESETS["fashion"].files.values():
        path = os.path.join(presets.MODELS, file)
        assert os.path.isfile(path) and os.path.isfile(path.removesuffix("pt") + "json")


# --------------------------------------------------------------------------------------------
# On the command line


def test_a_preset_stands_for_its_files_and_flags(models):
    """They replace defaults and a script's own, and do not count as given."""
    args = parse("classifier", "--preset", "imagenet64")
    assert args.model_path == str(models / "64x64_diffusion.pt")
    assert args.classifier_path == str(models / "64x64_classifier.pt")
    assert (args.batch_size, args.num_samples, args.timestep_respacing) == (4, 100, "250")
    assert (args.classifier_scale, args.use_fp16) == (1.0, True)
    assert args.preset == "imagenet64" and args.given == {"preset"}


def test_the_command_line_wins_over_a_preset(models):
    """What the user gave stays, files among it; only that is `given`."""
    argv = ["--preset", "imagenet512", "--batch_size", "9", "--model_path", __file__]
    args = parse("classifier", *argv, "--classifier_scale", "3")
    assert (args.batch_size, args.model_path, args.classifier_scale) == (9, __file__, 3.0)
    assert args.classifier_path == str(models / "512x512_classifier.pt")
    assert args.given == {"preset", "batch_size", "model_path", "classifier_scale"}


def test_a_script_takes_what_it_has_flags_for(models):
    """image_sample.py draws from the model of a preset without its classifier."""
    args = parse("image", "--preset", "imagenet64")
    assert args.model_path == str(models / "64x64_diffusion.pt")
    assert not hasattr(args, "classifier_path") and not hasattr(args, "classifier_scale")


def test_without_guidance_no_classifier_is_needed(models):
    """Scale 0 does without the file."""
    args = parse("classifier", "--preset", "lsun_cat", "--classifier_scale", "0")
    assert args.model_path == str(models / "lsun_cat.pt") and args.classifier_path == ""


def test_one_bundled_preset_serves_every_script(models):
    """The file is the one that the script loads."""
    for script, file in [("image", "diffusion.pt"), ("super_res", "upsampler.pt")]:
        assert parse(script, "--preset", "fashion").model_path == str(models / "fashion" / file)


def test_bfloat16_replaces_the_published_float16(models):
    """The two exclude each other, and the user's wins."""
    args = parse("image", "--preset", "imagenet64", "--use_bf16", "True")
    assert args.use_bf16 and not args.use_fp16


def test_without_a_preset_nothing_changes():
    """Neither an empty name nor a wrong one stands for anything; the check tells the latter."""
    assert expand({}, {"preset": ""}) == expand({"preset": ""}, {"preset": ""}) == {}
    assert expand({"preset": "cats"}, {"preset": ""}) == {}


@pytest.mark.parametrize(
    "script, argv, words",
    [
        ("image", ["upsample_64_256"], "--preset upsample_64_256 an upsampler super_res_sample.py"),
        ("super_res", ["lsun_cat"], "--preset lsun_cat a diffusion model use image_sample.py"),
        ("classifier", ["lsun_cat"], "lsun_cat has no classifier image_sample.py scale 0"),
        ("image", ["cats"], "--preset cats must be one of imagenet64 fashion"),
    ],
)
def test_a_preset_that_does_not_serve_names_the_remedy(script, argv, words, models, capsys):
    """One line says what the preset is and which script draws from it."""
    with pytest.raises(SystemExit) as end:
        parse(script, "--preset", *argv)
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.count("\n") == 1
    assert all(word in told for word in words.split()), told


@pytest.mark.parametrize(
    "preset, words",
    [
        ("imagenet64", "64x64_diffusion.pt models/download.py imagenet64"),
        ("fashion", "diffusion.pt restore"),
    ],
)
def test_a_file_that_is_not_there_names_the_remedy(preset, words, tmp_path, monkeypatch, capsys):
    """Released files can be downloaded, bundled ones restored."""
    monkeypatch.setattr(presets, "MODELS", str(tmp_path))
    with pytest.raises(SystemExit):
        parse("image", "--preset", preset)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and all(word in told for word in words.split()), told


# --------------------------------------------------------------------------------------------
# Down to the network


def test_a_preset_fixes_its_network(models):
    """The table of the preset is the flags file of its checkpoints; both must fit together."""
    args = trained_flags.complete(parse("classifier", "--preset", "imagenet64"))
    assert (args.num_channels, args.num_res_blocks, args.noise_schedule) == (192, 3, "cosine")
    assert (args.classifier_depth, args.image_size, args.use_new_attention_order) == (4, 64, True)
    assert (args.timestep_respacing, args.notes) == ("250", [])
    assert vars(trained_flags.complete(args)) == vars(args)


@pytest.mark.parametrize("name, kind", [(n, k) for n, k, _ in FILES if k != "classifier"])
def test_every_preset_can_be_completed(name, kind, models):
    """Each goes from its name to a whole command line, the classifier's flags among them."""
    script = "super_res" if kind == "upsampler" else "classifier" if name in SCALES else "image"
    args = trained_flags.complete(parse(script, "--preset", name), kind)
    network = trained_flags.whole_network(PRESETS[name].network[kind], kind)
    assert {flag: getattr(args, flag) for flag in network} == network


@pytest.mark.parametrize(
    "script, preset, flag, value, told",
    [
        ("image", "imagenet256", "num_channels", "128", "the checkpoint has 256, the command line"),
        ("image", "imagenet64", "noise_schedule", "linear", "the checkpoint has cosine, the"),
        ("classifier", "imagenet64", "classifier_depth", "2", "the checkpoint has 4, the"),
        ("super_res", "upsample_64_256", "large_size", "512", "the checkpoint has 256, the"),
    ],
)
def test_what_fixes_a_presets_network_cannot_be_changed(
    script, preset, flag, value, told, models
):  # fmt: skip
    """The command line wins over sampling flags alone."""
    kind = "upsampler" if script == "super_res" else "diffusion model"
    args = parse(script, "--preset", preset, f"--{flag}", value)
    with pytest.raises(ValueError, match=f"{flag}: {told}"):
        trained_flags.complete(args, kind)


def test_a_published_command_may_be_repeated_beside_its_preset(models):
    """Each flag of the README agrees with the preset's network, as it is or in its effect."""
    flags = RELEASED["64x64_diffusion.pt"]["flags"]
    argv = [word for name, value in flags.items() for word in (f"--{name}", value)]
    trained_flags.complete(parse("image", "--preset", "imagenet64", *argv))


def test_a_file_beside_a_presets_model_wins_over_its_table(models):
    """Whoever trained a checkpoint on has its flags beside it."""
    flags = config.defaults(*config.DIFFUSION_GROUPS) | {"num_channels": 64}
    (models / "lsun_cat.json").write_text(json.dumps(flags))
    args = trained_flags.complete(parse("image", "--preset", "lsun_cat"))
    assert args.num_channels == 64


def test_a_bundled_preset_keeps_its_sampling_flags():
    """The flags files of bundled models hold sampling flags, too: the preset's win over those."""
    args = trained_flags.complete(parse("classifier", "--preset", "fashion"))
    assert (args.timestep_respacing, args.classifier_scale) == ("50", 2.0)
    assert args.in_channels == 1
    args = trained_flags.complete(
        parse("classifier", "--preset", "fashion", "--timestep_respacing", "25")
    )
    assert args.timestep_respacing == "25"


def test_a_preset_is_all_that_a_script_needs(tmp_path):
    """The bundled model draws images without a path."""
    done = run_script(
        "image_sample", preset="fashion", num_samples=2, timestep_respacing="2",
        log_dir=tmp_path / "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert list((tmp_path / "run").glob("samples_2x*.npz"))
