"""Laws of guided_diffusion/trained_flags.py: what a checkpoint's flags file decides."""

import argparse
import json
from dataclasses import fields

import pytest

from guided_diffusion import config, trained_flags

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
    return "1,2" if f.type is str else f.type(f.default + 1) if f.type is int else 0.5


def command(kind, **given):
    values = config.defaults(*trained_flags.KINDS[kind]) | given
    return argparse.Namespace(**values, given=set(given))


@pytest.mark.parametrize("kind, f", GROUPED, ids=name_flag)
def test_a_flag_that_was_not_given_is_adopted(kind, f):
    """The checkpoint's value replaces a default, never a copy of it."""
    args, saved = command(kind), {f.name: other_value(f)}
    adopted = trained_flags.adopt_flags(args, saved, "x.pt", *trained_flags.KINDS[kind])
    assert getattr(adopted, f.name) == other_value(f)
    assert getattr(args, f.name) == f.default


@pytest.mark.parametrize("kind, f", GROUPED, ids=name_flag)
def test_a_flag_that_fixes_the_network_is_not_contradicted(kind, f):
    """Another value than the trained one is an error with both, unless the flag may differ."""
    args, saved = command(kind, **{f.name: other_value(f)}), {f.name: f.default}
    groups = trained_flags.KINDS[kind]
    assert f.metadata["fixes"] == (f.name not in MAY_DIFFER)
    if f.name in MAY_DIFFER:
        adopted = trained_flags.adopt_flags(args, saved, "x.pt", *groups)
        assert getattr(adopted, f.name) == other_value(f)
        return
    with pytest.raises(ValueError) as error:
        trained_flags.adopt_flags(args, saved, "x.pt", *groups)
    for word in (f"--{f.name} {other_value(f)}", "x.pt", f"--{f.name} {f.default}"):
        assert word in str(error.value)


@pytest.mark.parametrize("kind, f", GROUPED, ids=name_flag)
def test_to_repeat_a_trained_flag_is_no_contradiction(kind, f):
    """The published commands, with all flags, work beside a flags file."""
    value = other_value(f)
    args = command(kind, **{f.name: value})
    adopted = trained_flags.adopt_flags(args, {f.name: value}, "x.pt", *trained_flags.KINDS[kind])
    assert getattr(adopted, f.name) == value


def test_spaces_in_a_list_are_no_contradiction():
    """'16, 8' is '16,8'."""
    args = command("diffusion model", attention_resolutions="16, 8")
    trained_flags.adopt_flags(args, {"attention_resolutions": "16,8"}, "x", config.ModelConfig)


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


def test_a_file_without_flags_leaves_the_command_line(tmp_path):
    """Weights from elsewhere have no flags file; the command line then says it all."""
    (tmp_path / "bare.pt").touch()
    args = guided(str(tmp_path / "bare.pt"), "", classifier_scale=0.0, num_channels=64)
    assert trained_flags.complete(args).num_channels == 64


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
    with pytest.raises(ValueError, match="--num_channels 32 contradicts .*model000010"):
        trained_flags.resume(command("diffusion model", resume_checkpoint=path, num_channels=32))
    with pytest.raises(ValueError, match="--resume_checkpoint .* holds a diffusion model"):
        trained_flags.resume(command("classifier", resume_checkpoint=path), "classifier")
    fresh = command("upsampler", resume_checkpoint="")
    resumed = vars(trained_flags.resume(fresh, "upsampler"))
    assert resumed == vars(fresh) | {"resume_asked": ""}
