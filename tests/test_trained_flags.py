"""Laws of guided_diffusion/trained_flags.py: what a checkpoint's flags file decides."""

import argparse
import json
import shutil
from dataclasses import fields

import pytest
import torch

from guided_diffusion import config, script_util, trained_flags
from guided_diffusion.trained_flags import Trained

# The list: what may differ between training and use.
MAY_DIFFER = {
    "timestep_respacing", "dropout", "use_fp16", "classifier_use_fp16", "use_checkpoint", "use_kl",
    "rescale_learned_sigmas",
}  # fmt: skip
GROUPED = [
    (kind, f) for kind, groups in trained_flags.KINDS.items() for g in groups for f in fields(g)
]


def name_flag(item):
    return item if isinstance(item, str) else item.name


def other_value(f):
    """Return a value that differs from the default."""
    special = {"noise_schedule": "cosine", "classifier_pool": "spatial", "in_channels": 1}
    if f.name in special:
        return special[f.name]
    if f.type is bool:
        return not f.default
    if f.name.endswith("attention_resolutions"):
        return "32"
    return "1,2" if f.type is str else f.type(f.default + 1) if f.type is int else 0.5


def adopt(args, kind, saved, **options):
    """Adopt flags as from a flags file."""
    groups = trained_flags.KINDS[kind]
    trained = Trained(saved, config.fixed_names(*groups))
    args.model_path = "x.pt"
    return trained_flags.adopt_flags(args, trained, "model_path", *groups, **options)


def command(kind, **given):
    values = config.defaults(*trained_flags.KINDS[kind]) | given
    return argparse.Namespace(**values, given=set(given))


@pytest.mark.parametrize("kind, f", GROUPED, ids=name_flag)
def test_a_flag_that_was_not_given_is_adopted(kind, f):
    """The checkpoint's value replaces a default, never a copy of it."""
    args, saved = command(kind), {f.name: other_value(f)}
    adopted = adopt(args, kind, saved)
    assert getattr(adopted, f.name) == other_value(f)
    assert getattr(args, f.name) == f.default


@pytest.mark.parametrize("kind, f", GROUPED, ids=name_flag)
def test_a_flag_that_fixes_the_network_is_not_contradicted(kind, f):
    """Another value than the trained one is an error with both, unless the flag may differ."""
    args, saved = command(kind, **{f.name: other_value(f)}), {f.name: f.default}
    assert f.metadata["fixes"] == (f.name not in MAY_DIFFER)
    if f.name in MAY_DIFFER:
        adopted = adopt(args, kind, saved)
        assert getattr(adopted, f.name) == other_value(f)
        return
    with pytest.raises(ValueError) as error:
        adopt(args, kind, saved)
    was = '""' if f.default == "" else f.default
    assert str(error.value) == (
        f"--model_path x.pt: {f.name}: the checkpoint has {was}, the command line says "
        f"{other_value(f)}: leave --{f.name} out"
    )
    assert getattr(adopt(args, kind, saved, strict=False), f.name) == other_value(f)


@pytest.mark.parametrize("kind, f", GROUPED, ids=name_flag)
def test_to_repeat_a_trained_flag_is_no_contradiction(kind, f):
    """The published commands, with all flags, work beside a flags file."""
    value = other_value(f)
    args = command(kind, **{f.name: value})
    adopted = adopt(args, kind, {f.name: value})
    assert getattr(adopted, f.name) == value


def test_another_spelling_of_the_same_network_is_no_contradiction():
    """Order, spaces, sizes that no level has, and the default levels spelt out: all the same."""
    args = command("diffusion model", attention_resolutions="8, 16,7", channel_mult="1, 2,3.0,4")
    adopt(args, "diffusion model", config.defaults(*config.DIFFUSION_GROUPS))


def test_all_contradictions_are_told_at_once():
    """One line lists every flag that differs, and the remedy."""
    args = command("diffusion model", num_channels=128, image_size=64, num_heads=8)
    with pytest.raises(ValueError) as error:
        adopt(args, "diffusion model", {"num_channels": 256, "image_size": 64, "num_heads": 4})
    assert str(error.value) == (
        "--model_path x.pt: num_channels: the checkpoint has 256, the command line says 128; "
        "num_heads: the checkpoint has 4, the command line says 8: leave --num_channels, "
        "--num_heads out"
    )


@pytest.fixture
def make(tmp_path):
    """Return a function that writes a checkpoint with a flags file, and returns its path."""

    def write(name, kind, **changes):
        (tmp_path / f"{name}.pt").touch()
        flags = config.defaults(*trained_flags.KINDS[kind]) | changes
        (tmp_path / f"{name}.json").write_text(json.dumps(flags))
        return str(tmp_path / f"{name}.pt")

    return write


def guided(model, classifier, **given):
    given |= {"model_path": model, "classifier_path": classifier}
    values = config.defaults(
        config.LoadConfig, config.GuidanceConfig, *config.DIFFUSION_GROUPS, config.ClassifierConfig
    )
    return argparse.Namespace(**values | given, given=set(given))


def test_a_classifier_brings_its_own_flags_alone(make):
    """A classifier's file gives classifier_* flags; everything else comes from the model's."""
    model = make("m", "diffusion model", num_channels=64, timestep_respacing="10", use_kl=True)
    classifier = make("c", "classifier", classifier_width=32, timestep_respacing="20")
    args = trained_flags.complete(guided(model, classifier))
    assert (args.num_channels, args.classifier_width) == (64, 32)
    assert args.timestep_respacing == "10" and args.use_kl


@pytest.mark.parametrize(
    "name",
    [
        "image_size",
        "in_channels",
        "num_classes",
        "diffusion_steps",
        "noise_schedule",
        "rescale_timesteps",
    ],
)
def test_a_classifier_must_share_the_models_world(name, make):
    """A difference in size, pixels, classes or noise is an error with both values."""
    f = next(f for f in config.all_fields() if f.name == name)
    model, classifier = (
        make("m", "diffusion model", class_cond=True),
        make("c", "classifier", **{name: other_value(f)}),
    )
    with pytest.raises(ValueError) as error:
        trained_flags.complete(guided(model, classifier))
    for word in ("--classifier_path", f"--{name} {other_value(f)}", f"--{name} {f.default}"):
        assert word in str(error.value)
    trained_flags.complete(guided(model, classifier, classifier_scale=0.0))


def test_a_model_without_labels_takes_the_classes_of_its_classifier(make):
    """To an unconditional model the number of classes means nothing: it is the classifier's."""
    args = guided(make("m", "diffusion model"), make("c", "classifier", num_classes=3))
    assert trained_flags.complete(args).num_classes == 3


def test_to_complete_twice_changes_nothing(make):
    """Completed flags are complete."""
    args = guided(make("m", "diffusion model", num_channels=64), make("c", "classifier"))
    once = trained_flags.complete(args)
    assert vars(trained_flags.complete(once)) == vars(once)


@pytest.mark.parametrize(
    "change, word",
    [
        ({"num_channels": "64"}, "--num_channels"),
        ({"num_channels": 64.0}, "--num_channels"),
        ({"num_channels": True}, "--num_channels"),
        ({"num_channels": 0}, "--num_channels 0"),
        ({"class_cond": 1}, "--class_cond"),
        ({"dropout": None}, "--dropout"),
        ({"noise_schedule": "cubic"}, "--noise_schedule cubic"),
    ],
)
def test_a_flags_file_is_checked_like_a_command_line(change, word, make):
    """A wrong type or value in the file is an error that names the file and the flag."""
    model = make("m", "diffusion model", **change)
    with pytest.raises(ValueError) as error:
        trained_flags.complete(guided(model, "", classifier_scale=0.0))
    assert "m.json" in str(error.value) and word in str(error.value)


def test_a_whole_number_may_stand_for_a_real_one(make):
    """JSON writers may drop the .0 of a float; names that no script knows are passed over."""
    model = make("m", "diffusion model", dropout=0, of_the_future=3)
    trained_flags.complete(guided(model, "", classifier_scale=0.0))


def test_a_resumed_run_has_the_flags_of_the_first(make):
    """Flags that are not repeated come from the checkpoint; a contradiction ends the command."""
    path = make("model000010", "diffusion model", num_channels=64)
    args = command("diffusion model", resume_checkpoint=path)
    assert trained_flags.resume(args).num_channels == 64
    with pytest.raises(ValueError, match="model000010.*num_channels: the checkpoint has 64, .* 32"):
        trained_flags.resume(command("diffusion model", resume_checkpoint=path, num_channels=32))
    with pytest.raises(ValueError, match="--resume_checkpoint .* holds a diffusion model"):
        trained_flags.resume(command("classifier", resume_checkpoint=path), "classifier")
    fresh = command("upsampler", resume_checkpoint="")
    resumed = vars(trained_flags.resume(fresh, "upsampler"))
    assert resumed == vars(fresh) | {"resume_asked": "", "notes": []}


# --------------------------------------------------------------------------------------------
# Checkpoints without a flags file

UNET = {
    "num_channels": 32, "channel_mult": "1,2", "num_res_blocks": 1, "num_heads": 1,
    "attention_resolutions": "4", "class_cond": True, "learn_sigma": True, "num_classes": 3,
    "in_channels": 1,
}  # fmt: skip
TRAINED = {
    "diffusion model": UNET | {"image_size": 8},
    "upsampler": UNET | {"large_size": 8, "small_size": 4},
    "classifier": {
        "image_size": 8, "classifier_width": 32, "classifier_channel_mult": "1,2",
        "classifier_depth": 1, "classifier_attention_resolutions": "4", "num_classes": 3,
        "classifier_num_head_channels": 32, "in_channels": 1,
    },
}  # fmt: skip
CREATE = {
    "diffusion model": script_util.create_model_and_diffusion,
    "upsampler": script_util.sr_create_model_and_diffusion,
    "classifier": script_util.create_classifier_and_diffusion,
}


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A folder with the weights of each kind, d.pt, u.pt and c.pt, and what is no weights."""
    place = tmp_path_factory.mktemp("bare")
    for kind, flags in TRAINED.items():
        model, _ = CREATE[kind](**config.defaults(*trained_flags.KINDS[kind]) | flags)
        torch.save(model.state_dict(), place / f"{kind[0]}.pt")
    torch.save(
        torch.load(place / "d.pt"), place / "old.pt", _use_new_zipfile_serialization=False
    )  # fmt: skip
    torch.save({"a": torch.zeros(2)}, place / "other.pt")
    torch.save({"a": {"step": 1}}, place / "opt.pt")
    torch.save({1: torch.zeros(2)}, place / "numbered.pt")
    torch.save([torch.zeros(2)], place / "list.pt")
    (place / "short.pt").write_bytes((place / "d.pt").read_bytes()[:5000])
    (place / "text.pt").write_text("hello")
    return place


def bare_guided(bare, **given):
    """Return a command line for the weights of a model and a classifier."""
    return guided(str(bare / "d.pt"), str(bare / "c.pt"), **given)


def unguided(path, **given):
    return guided(str(path), "", classifier_scale=0.0, **given)


@pytest.mark.parametrize("file", ["d.pt", "old.pt"])
def test_weights_alone_give_the_flags_that_they_show(bare, file):
    """The rest is assumed, and one line says so: what was read and what was not."""
    args = trained_flags.complete(unguided(bare / file, image_size=8, diffusion_steps=20))
    assert {name: getattr(args, name) for name in UNET if name != "num_heads"} == {
        name: value for name, value in UNET.items() if name != "num_heads"
    }
    (note,) = args.notes
    read, assumed = note.split("; assumed, since weights do not show it: ")
    assert read.startswith(f"{bare / file} has no flags file: read from its weights: ")
    assert "num_channels 32" in read and "attention_resolutions 4" in read
    assert assumed.startswith("num_heads 4, ") and "noise_schedule linear" in assumed
    assert assumed.endswith("; give those that differ")
    assert "image_size" not in note and "diffusion_steps" not in note  # they were given


def test_what_weights_do_not_show_is_the_users(bare):
    """Heads, schedule and size are taken as they are given; what the weights show is not."""
    given = {"num_heads": 2, "noise_schedule": "cosine", "image_size": 16, "predict_xstart": True}
    args = trained_flags.complete(unguided(bare / "d.pt", **given))
    assert {name: getattr(args, name) for name in given} == given
    assert args.attention_resolutions == "8"  # the same level, at twice the size
    told = "num_channels: the checkpoint has 32, the command line says 64"
    with pytest.raises(ValueError, match=f"--model_path .*d.pt: .*{told}"):
        trained_flags.complete(unguided(bare / "d.pt", num_channels=64, learn_sigma=False))


def test_inferred_flags_are_complete(bare):
    """To complete them again changes nothing, the notes among them."""
    once = trained_flags.complete(bare_guided(bare))
    assert len(once.notes) == 2
    assert vars(trained_flags.complete(once)) == vars(once)


def test_an_inferred_classifier_has_the_world_of_its_model(bare, make):
    """It is assumed to know the model's noise; what it shows must be the model's, too."""
    model = make("m", "diffusion model", **TRAINED["diffusion model"], noise_schedule="cosine")
    args = trained_flags.complete(guided(model, str(bare / "c.pt")))
    assert (args.noise_schedule, args.classifier_width) == ("cosine", 32)
    assert "noise_schedule cosine" in args.notes[0] and str(bare / "c.pt") in args.notes[0]
    model = make("n", "diffusion model", **TRAINED["diffusion model"] | {"image_size": 16})
    with pytest.raises(ValueError, match="--classifier_path .* --image_size 8, but .* 16"):
        trained_flags.complete(guided(model, str(bare / "c.pt")))


def test_an_inferred_model_has_the_world_of_its_classifier(bare, make):
    """What the model's weights do not show is assumed as the classifier shows or has it."""
    args = trained_flags.complete(bare_guided(bare))
    assert (args.image_size, args.attention_resolutions, args.noise_schedule) == (8, "4", "linear")
    assert "image_size 8" in args.notes[0] and str(bare / "d.pt") in args.notes[0]
    classifier = make("k", "classifier", **TRAINED["classifier"], noise_schedule="cosine")
    args = trained_flags.complete(guided(str(bare / "d.pt"), classifier))
    assert (args.image_size, args.noise_schedule, len(args.notes)) == (8, "cosine", 1)
    with pytest.raises(ValueError, match="--classifier_path .* --noise_schedule cosine, .* linear"):
        trained_flags.complete(guided(str(bare / "d.pt"), classifier, noise_schedule="linear"))


@pytest.mark.parametrize(
    "file, kind, words",
    [
        ("u.pt", "diffusion model", "--model_path u.pt holds an upsampler: with a diffusion model"),
        ("c.pt", "diffusion model", "--model_path c.pt holds a classifier: with a diffusion model"),
        ("d.pt", "upsampler", "--model_path d.pt holds a diffusion model: with an upsampler"),
        ("other.pt", "diffusion model", "--model_path other.pt no network of this project"),
        ("opt.pt", "diffusion model", "opt.pt holds no weights"),
        ("numbered.pt", "diffusion model", "numbered.pt holds no weights"),
        ("list.pt", "diffusion model", "list.pt holds no weights"),
        ("short.pt", "diffusion model", "short.pt cut short"),
        ("text.pt", "diffusion model", "text.pt torch.save"),
    ],
)
def test_a_file_with_something_else_is_told(bare, file, kind, words):
    """Another kind of network, another network, or no weights at all: one line."""
    args = command(kind, model_path=str(bare / file))
    with pytest.raises(ValueError) as error:
        trained_flags.complete(args, kind)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words.split()), error.value


def test_a_run_goes_on_from_weights_alone(bare):
    """What they show may not be contradicted by a run that goes on, but by one that begins."""
    path = str(bare / "model000010.pt")
    shutil.copy(bare / "d.pt", path)
    args = trained_flags.resume(command("diffusion model", resume_checkpoint=path, image_size=8))
    assert args.num_channels == 32 and len(args.notes) == 1
    wrong = command("diffusion model", resume_checkpoint=path, num_channels=64)
    with pytest.raises(ValueError, match="--resume_checkpoint .*num_channels: .* 32, .* 64"):
        trained_flags.resume(wrong)
    begin = command("diffusion model", resume_checkpoint="", init_from=path, num_channels=64)
    args = trained_flags.resume(begin)
    assert (args.num_channels, args.num_res_blocks) == (64, 1)


def test_a_run_may_begin_with_part_of_a_network(bare):
    """Tensors that make no network say nothing about the flags; what fits is taken later."""
    begin = command("diffusion model", resume_checkpoint="", init_from=str(bare / "other.pt"))
    args = trained_flags.resume(begin)
    assert vars(args) == vars(begin) | {"resume_asked": "", "notes": []}


def released(monkeypatch, tmp_path, **changes):
    """Make a tiny network pass for a released one, and return the path of its weights."""
    network = TRAINED["diffusion model"] | {"noise_schedule": "cosine", "num_heads": 2} | changes
    preset = trained_flags.presets.Preset(
        {"diffusion model": "tiny.pt"}, {"diffusion model": network}
    )
    monkeypatch.setitem(trained_flags.presets.PRESETS, "tiny", preset)
    return tmp_path / "tiny.pt"


def test_a_released_file_is_known_by_its_name(bare, tmp_path, monkeypatch):
    """What its weights do not show comes from the preset, and the user may say otherwise."""
    path = released(monkeypatch, tmp_path)
    shutil.copy(bare / "d.pt", path)
    args = trained_flags.complete(unguided(path))
    assert (args.image_size, args.noise_schedule, args.num_heads) == (8, "cosine", 2)
    assert "assumed, from its name: image_size 8" in args.notes[0]
    args = trained_flags.complete(unguided(path, noise_schedule="linear", image_size=16))
    assert (args.image_size, args.noise_schedule, args.num_heads) == (16, "linear", 2)


def test_a_name_that_its_weights_belie_means_nothing(bare, tmp_path, monkeypatch):
    """Another network under a released name is inferred as any other."""
    path = released(monkeypatch, tmp_path, num_channels=64)
    shutil.copy(bare / "d.pt", path)
    args = trained_flags.complete(unguided(path))
    assert (args.image_size, args.noise_schedule, args.num_heads) == (64, "linear", 4)
    assert "since weights do not show it" in args.notes[0]
