"""Laws of guided_diffusion/script_util.py: from flags to networks, of any size and kind."""

import argparse
import warnings
from functools import partial

import pytest
import torch
from scripting import CLASSIFIER, SMALL, SUPER_RES

from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion import script_util

KINDS = {
    "diffusion": (
        script_util.create_model_and_diffusion,
        script_util.model_and_diffusion_defaults,
        SMALL,
    ),
    "upsampler": (
        script_util.sr_create_model_and_diffusion,
        script_util.sr_model_and_diffusion_defaults,
        SUPER_RES,
    ),
    "classifier": (
        script_util.create_classifier_and_diffusion,
        script_util.classifier_and_diffusion_defaults,
        CLASSIFIER,
    ),
}
NAMES = {  # the flags that set the levels of each kind
    "diffusion": ("image_size", "channel_mult", "attention_resolutions"),
    "upsampler": ("large_size", "channel_mult", "attention_resolutions"),
    "classifier": ("image_size", "classifier_channel_mult", "classifier_attention_resolutions"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind, **changes):
    """Build a network and process on the meta device, without memory for the weights."""
    create, defaults, small = KINDS[kind]
    with torch.device("meta"):
        return create(**defaults() | small | changes)


def run(kind, model, size, **inputs):
    """Apply a network on the meta device to two grey images of a size."""
    x, t = torch.zeros(2, 1, size, size, device="meta"), torch.zeros(2, device="meta")
    if kind == "upsampler":
        inputs["low_res"] = torch.zeros(2, 1, 4, 4, device="meta")
    return model(x, t, **inputs)


def labels():
    return torch.zeros(2, dtype=torch.long, device="meta")


@every_kind
@pytest.mark.parametrize("size, mult", [(28, "1,2,2"), (6, "1,2"), (20, "1,1,2"), (7, "1")])
def test_any_size_that_can_be_halved_works(kind, size, mult):
    """--channel_mult with L levels makes every size work that 2^(L-1) divides."""
    size_name, mult_name, attention_name = NAMES[kind]
    flags = {size_name: size, mult_name: mult, attention_name: str(size)}
    model, _ = build(kind, **flags)
    if kind == "classifier":
        assert run(kind, model, size).shape == (2, 3)
    else:
        assert run(kind, model, size, y=labels()).shape == (2, 2, size, size)


@every_kind
@pytest.mark.parametrize("size, mult", [(9, "1,2"), (30, "1,2,2"), (28, "1,1,2,2")])
def test_other_sizes_name_both_flags(kind, size, mult):
    """A size that cannot be halved often enough is an error with both flags and values."""
    size_name, mult_name, attention_name = NAMES[kind]
    with pytest.raises(ValueError) as error:
        build(kind, **{size_name: size, mult_name: mult, attention_name: ""})
    for word in (f"--{size_name} {size}", f"--{mult_name} {mult}"):
        assert word in str(error.value)


@every_kind
def test_sizes_without_default_levels_ask_for_them(kind):
    """Only the published sizes have levels by default; the error for another names both flags."""
    size_name, mult_name, _ = NAMES[kind]
    with pytest.raises(ValueError, match=f"--{size_name} 32 .*--{mult_name}"):
        build(kind, **{size_name: 32, mult_name: ""})


@every_kind
@pytest.mark.parametrize("size, levels", [(64, 4), (128, 5), (256, 6), (512, 7)])
def test_published_sizes_have_the_published_levels(kind, size, levels):
    """64, 128, 256 and 512 need no --channel_mult; the 512 upsampler has a level less."""
    size_name, mult_name, attention_name = NAMES[kind]
    flags = {size_name: size, mult_name: "", attention_name: ""}
    width = {"classifier_width": 64} if kind == "classifier" else {"num_channels": 64}
    model, _ = build(kind, **flags, **width)
    names = [name for name, _ in model.named_modules()]
    assert max(int(n.split(".")[1]) for n in names if n.startswith("input_blocks.")) == (
        2 * (levels - (kind == "upsampler" and size == 512)) - 1
    )


@every_kind
def test_a_resolution_without_a_level_is_named_in_a_warning(kind):
    """Such a resolution adds no attention, which would otherwise go unnoticed."""
    *_, attention_name = NAMES[kind]
    with pytest.warns(UserWarning, match=f"--{attention_name} 3: .*8, 4"):
        with_unknown, _ = build(kind, **{attention_name: "4,3"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        without, _ = build(kind, **{attention_name: "4"})
    assert list(with_unknown.state_dict()) == list(without.state_dict())


@every_kind
def test_without_resolutions_only_the_middle_attends(kind):
    """An empty list of resolutions leaves the attention of the middle block, always there."""
    model, _ = build(kind, **{NAMES[kind][2]: ""})
    attending = {name.split(".")[0] for name in model.state_dict() if "qkv" in name}
    assert attending - {"out"} == {"middle_block"}  # the classifier's pool attends as well


@pytest.mark.parametrize("kind", ["diffusion", "upsampler"])
def test_label_dropout_adds_a_null_class(kind):
    """With --label_dropout the network knows one class more, whatever the rate."""
    tables = [build(kind, label_dropout=rate)[0].label_emb.weight for rate in (0.0, 0.1, 0.5)]
    assert [len(table) for table in tables] == [3, 4, 4]


@pytest.mark.parametrize("kind", ["diffusion", "upsampler"])
def test_class_cond_decides_about_labels(kind):
    """Only a class-conditional network has an embedding of labels."""
    model, _ = build(kind, class_cond=False)
    assert not [name for name in model.state_dict() if "label" in name]
    assert run(kind, model, 8).shape == (2, 2, 8, 8)


@every_kind
def test_options_reach_the_network(kind):
    """Attention order, head width, pixels and learn_sigma are those of the flags."""
    if kind == "classifier":
        model, _ = build(kind, classifier_num_head_channels=16, num_classes=7, in_channels=3)
        assert [m.num_heads for m in model.modules() if hasattr(m, "qkv")][-1] == 4
        assert model(torch.zeros(2, 3, 8, 8, device="meta"), labels()).shape == (2, 7)
        return
    model, process = build(kind, use_new_attention_order=True, learn_sigma=False)
    assert "QKVAttention" in {type(module).__name__ for module in model.modules()}
    assert run(kind, model, 8, y=labels()).shape == (2, 1, 8, 8)
    assert process.model_var_type == gd.ModelVarType.FIXED_LARGE


@every_kind
def test_all_defaults_hold_the_pixels(kind):
    """num_classes and in_channels stand in every dictionary, with the published values."""
    for defaults in (
        KINDS[kind][1], script_util.diffusion_defaults, script_util.classifier_defaults,
    ):  # fmt: skip
        assert defaults()["num_classes"] == 1000 and defaults()["in_channels"] == 3


@every_kind
def test_defaults_are_fresh(kind):
    """A program may change the dictionary that it got."""
    defaults = KINDS[kind][1]
    defaults()["num_classes"] = 7
    assert defaults()["num_classes"] == 1000


@pytest.mark.parametrize(
    "flags, means, variances, loss",
    [
        ({}, "EPSILON", "FIXED_LARGE", "MSE"),
        ({"sigma_small": True}, "EPSILON", "FIXED_SMALL", "MSE"),
        ({"learn_sigma": True}, "EPSILON", "LEARNED_RANGE", "MSE"),
        ({"predict_xstart": True, "use_kl": True}, "START_X", "FIXED_LARGE", "RESCALED_KL"),
        ({"rescale_learned_sigmas": True}, "EPSILON", "FIXED_LARGE", "RESCALED_MSE"),
        ({"use_kl": True, "rescale_learned_sigmas": True}, "EPSILON", "FIXED_LARGE", "RESCALED_KL"),
    ],
)
def test_flags_choose_the_process(flags, means, variances, loss):
    """Each flag of the process sets one of its three types."""
    process = script_util.create_gaussian_diffusion(**flags)
    assert process.model_mean_type.name == means
    assert process.model_var_type.name == variances
    assert process.loss_type.name == loss
    assert process.num_timesteps == 1000


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_channels": 48}, "--num_channels 48 --channel_mult 1,2 32"),
        ({"channel_mult": "1,0.5"}, "--num_channels 32 --channel_mult 1,0.5 16"),
        ({"num_heads": 3}, "--num_heads 3 divide 64"),
        ({"num_heads_upsample": 3}, "--num_heads_upsample 3 divide 64"),
        ({"num_head_channels": 40}, "--num_head_channels 40 divide 64"),
    ],
)
@pytest.mark.parametrize("kind", ["diffusion", "upsampler"])
def test_widths_and_heads_must_fit(kind, change, words):
    """Groups of 32 channels are normalised, and heads share the channels evenly."""
    with pytest.raises(ValueError) as error:
        build(kind, **change)
    assert all(word in str(error.value) for word in words.split()), error.value


def test_heads_do_not_matter_where_there_is_another_rule():
    """With --num_head_channels, or without attention at a level, --num_heads is not asked."""
    build("diffusion", num_heads=3, num_head_channels=32)
    build("diffusion", num_channels=96, channel_mult="1,2", num_heads=64, attention_resolutions="4")


def test_a_parser_made_from_defaults_reads_them_back():
    """add_dict_to_argparser and args_to_dict work as a pair, as in published programs."""
    defaults = script_util.model_and_diffusion_defaults() | {"free": None, "lr": 0.5}
    parser = argparse.ArgumentParser()
    script_util.add_dict_to_argparser(parser, defaults)
    assert script_util.args_to_dict(parser.parse_args([]), defaults) == defaults
    argv = ["--class_cond", "yes", "--image_size", "32", "--free", "text", "--lr", "2"]
    args = parser.parse_args(argv)
    found = (args.class_cond, args.image_size, args.free, args.lr)
    assert found == (True, 32, "text", 2.0)


def test_the_published_call_builds_the_default_network():
    """create_X(**X_defaults()) works for each kind, with the sizes of the published defaults."""
    create, defaults, _ = KINDS["diffusion"]
    with torch.device("meta"):
        model, process = create(**defaults())
        classifier = script_util.create_classifier(**script_util.classifier_defaults())
        sr, _ = script_util.sr_create_model_and_diffusion(
            **script_util.sr_model_and_diffusion_defaults()
        )
    x, t = partial(torch.zeros, device="meta"), torch.zeros(1, device="meta")
    assert model(x(1, 3, 64, 64), t).shape == (1, 3, 64, 64)
    assert classifier(x(1, 3, 64, 64), t).shape == (1, 1000)
    assert sr(x(1, 3, 256, 256), t, low_res=x(1, 3, 64, 64)).shape == (1, 3, 256, 256)
    assert process.num_timesteps == 1000
