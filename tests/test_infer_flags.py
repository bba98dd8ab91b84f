"""Laws of guided_diffusion/infer_flags.py: what names and shapes tell about a network."""

import json
import random
import warnings
from pathlib import Path

import pytest
import torch

from guided_diffusion import config, infer_flags, script_util
from guided_diffusion.infer_flags import KINDS, infer

RELEASED = json.loads((Path(__file__).parent / "reference" / "checkpoints.json").read_text())
CREATE = {
    "diffusion model": script_util.create_model,
    "upsampler": script_util.sr_create_model,
    "classifier": script_util.create_classifier,
}
FIELDS = {f.name: f for f in config.all_fields()}
NUM_DRAWS = 150


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Leave out the initialisation, which takes most of the time and changes no shape."""
    layers = [torch.nn.Linear, torch.nn.modules.conv._ConvNd, torch.nn.GroupNorm]
    for layer in [*layers, torch.nn.Embedding]:
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)


def shapes_of(kind, flags):
    """Build a network without memory for its weights, and return its names and shapes."""
    values = config.defaults(*KINDS[kind]) | flags
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # sizes that are no level's
        model = CREATE[kind](**script_util._own(CREATE[kind], values))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def kind_of(name):
    """Return the kind of a released checkpoint."""
    return next((k for k in ("upsampler", "classifier") if k in name), "diffusion model")


def published(name):
    """Return the flags of the published command that concern this checkpoint."""
    known = config.defaults(*KINDS[kind_of(name)])
    kinds = {bool: config.str2bool}
    return {
        flag: kinds.get(FIELDS[flag].type, FIELDS[flag].type)(text)
        for flag, text in RELEASED[name]["flags"].items()
        if flag in known
    }


def released_shapes(name):
    return {k: tuple(shape) for k, shape in RELEASED[name]["state_dict"].items()}


# --------------------------------------------------------------------------------------------
# The released checkpoints


@pytest.mark.parametrize("name", RELEASED)
def test_a_published_command_agrees_with_what_its_checkpoint_shows(name):
    """Each flag of the README is repeated by the tensors or left open by them."""
    shapes, given = released_shapes(name), published(name)
    found = infer(shapes, given)
    assert found.kind == kind_of(name)
    assert infer_flags.departures(found.shown | given, given) == []
    assert not found.assumed.keys() & (given.keys() | found.shown.keys())
    assert shapes_of(found.kind, found.shown | found.assumed | given) == shapes


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_checkpoint_alone_shows_its_network(name):
    """Without any flag the same network is built; what cannot be shown is assumed, and so told."""
    shapes = released_shapes(name)
    found = infer(shapes)
    assert shapes_of(found.kind, found.shown | found.assumed) == shapes
    everything = config.fixed_names(*KINDS[found.kind])
    idle = {"num_classes", "label_dropout", "learn_sigma", "predict_xstart"}
    assert everything - idle <= found.shown.keys() | found.assumed.keys() <= everything
    size = "large_size" if found.kind == "upsampler" else "image_size"
    if name != "128_512_upsampler.pt":  # it has the levels of the one for 256
        assert (found.shown | found.assumed)[size] == published(name)[size]


def test_what_a_network_shows_and_what_it_does_not():
    """The published 256 x 256 model: flags that it shows, flags that are assumed."""
    found = infer(released_shapes("256x256_diffusion.pt"))
    assert found.shown == {
        "in_channels": 3, "learn_sigma": True, "class_cond": True, "num_classes": 1000,
        "num_channels": 256, "channel_mult": "1,1,2,2,4,4", "num_res_blocks": 2,
        "attention_resolutions": "32,16,8", "use_scale_shift_norm": True, "resblock_updown": True,
    }  # fmt: skip
    assert found.assumed == {
        "image_size": 256, "num_heads": 4, "num_heads_upsample": -1, "num_head_channels": -1,
        "use_new_attention_order": False, "label_dropout": 0.0, "diffusion_steps": 1000,
        "noise_schedule": "linear", "predict_xstart": False, "rescale_timesteps": False,
    }  # fmt: skip


def test_the_attention_pool_shows_the_image_size():
    """One position for each pixel of the lowest resolution, which is halved once per level."""
    for size in (64, 128, 256, 512):
        found = infer(released_shapes(f"{size}x{size}_classifier.pt"))
        assert found.shown["image_size"] == size
        assert found.shown["classifier_depth"] == (4 if size == 64 else 2)
        assert found.assumed.keys() == {
            "classifier_num_head_channels", "diffusion_steps", "noise_schedule",
            "rescale_timesteps",
        }  # fmt: skip


# --------------------------------------------------------------------------------------------
# Random networks


def draw_trunk(rng):
    """Draw the flags that all kinds have, the levels' sizes among them."""
    num_levels = rng.choice([1, 2, 2, 3, 4, 5, 6])
    size = 2 ** rng.randint(num_levels - 1, 7)
    channels = rng.choice([32, 64, 96])
    factors = [1, 1, 2, 3] + ([0.5] if channels == 64 else [])
    sizes = [size >> level for level in range(num_levels)]
    return size, {
        "num_channels": channels,
        "channel_mult": ",".join(str(rng.choice(factors)) for _ in sizes),
        "num_res_blocks": rng.choice([1, 1, 2, 3]),
        "attention_resolutions": ",".join(str(s) for s in sizes if rng.random() < 0.4),
        "use_scale_shift_norm": rng.random() < 0.5,
        "resblock_updown": rng.random() < 0.5,
    }


def draw(kind, rng):
    """Draw valid flags of a network."""
    size, trunk = draw_trunk(rng)
    pixels = {"in_channels": rng.choice([1, 3]), "num_classes": rng.randint(1, 20)}
    if kind == "classifier":
        pools = ["adaptive", "attention", "spatial", "spatial_v2"]
        flags = {infer_flags._name(kind, name): value for name, value in trunk.items()}
        flags |= {"classifier_pool": rng.choice(pools), "classifier_num_head_channels": 32}
        return pixels | flags | {"image_size": size}
    sizes = {"image_size": size}
    if kind == "upsampler":
        sizes = {"large_size": size, "small_size": max(1, size // 2)}
    flags = {"class_cond": rng.random() < 0.5, "learn_sigma": rng.random() < 0.5}
    if flags["class_cond"]:
        flags["label_dropout"] = rng.choice([0.0, 0.1])
    return pixels | trunk | flags | sizes


HIDDEN = {"image_size", "large_size", "small_size", "label_dropout", "classifier_num_head_channels"}


def visible(flags):
    """Return the names of the drawn flags that tensors show."""
    unseen = set(HIDDEN)
    if flags.get("class_cond") is False:
        unseen |= {"num_classes"}
    if "," not in flags.get("channel_mult", flags.get("classifier_channel_mult")):
        unseen |= {"resblock_updown", "classifier_resblock_updown"}
    return flags.keys() - unseen


@pytest.mark.parametrize("kind", KINDS)
def test_random_networks_show_their_flags(kind):
    """Given what tensors hide, all else comes back; whatever is assumed, it builds the network."""
    rng = random.Random(0)
    for number in range(NUM_DRAWS):
        flags = draw(kind, rng)
        shapes = shapes_of(kind, flags)
        given = {name: flags[name] for name in flags if name in HIDDEN | {"classifier_depth"}}
        found = infer(shapes, given)
        assert found.kind == kind
        assert found.shown.keys() - HIDDEN == visible(flags), flags
        assert infer_flags.departures(found.shown | given, flags) == [], flags
        assert set(found.assumed) <= config.fixed_names(*KINDS[kind]) - given.keys()
        if kind == "classifier" or number % 5 == 0:  # there is but one reading of a decoder
            alone = infer(shapes)
            assert shapes_of(kind, alone.shown | alone.assumed) == shapes, flags


# --------------------------------------------------------------------------------------------
# What is not plain


def even_classifier(**changes):
    """Return shapes that can be read as 4, 2 or 1 levels of 1, 3 or 7 residual blocks."""
    flags = {
        "image_size": 32, "classifier_width": 32, "classifier_channel_mult": "1,1,1,1",
        "classifier_depth": 1, "classifier_attention_resolutions": "", "classifier_pool": "spatial",
        "classifier_num_head_channels": 32,
    }  # fmt: skip
    return shapes_of("classifier", flags | changes)


UNSURE = {"classifier_depth", "classifier_channel_mult", "classifier_resblock_updown"}


def test_a_reading_among_several_is_assumed_not_shown():
    """Blocks that are all alike may be divided into levels in several ways."""
    found = infer(even_classifier())
    assert found.assumed.keys() >= UNSURE and not found.shown.keys() & UNSURE
    assert "classifier_width" in found.shown


@pytest.mark.parametrize(
    "given, depth",
    [
        ({"classifier_depth": 3}, 3),
        ({"classifier_channel_mult": "1,1"}, 3),
        ({"classifier_channel_mult": "1.0, 1,1,1"}, 1),
        ({"image_size": 6}, 3),
        ({"image_size": 5}, 7),
        ({"classifier_depth": 7}, 7),
    ],
)
def test_a_given_flag_decides_between_readings(given, depth):
    """What the user says is taken if the tensors allow it."""
    found = infer(even_classifier(), given)
    assert (found.shown | found.assumed | given)["classifier_depth"] == depth
    given_flags = config.defaults(*KINDS["classifier"]) | found.shown | found.assumed | given
    assert shapes_of("classifier", given_flags) == even_classifier()


def test_a_given_flag_that_no_reading_has_is_contradicted():
    """Then one of the readings is shown, so that there is something to tell."""
    found = infer(even_classifier(), {"classifier_depth": 2})
    assert found.shown["classifier_depth"] in (1, 3, 7)


def test_likely_values_come_before_the_defaults():
    """They are assumed for what is not shown, and decide between readings."""
    found = infer(even_classifier(), {}, {"classifier_depth": 3, "noise_schedule": "cosine"})
    assert found.assumed["classifier_depth"] == 3
    assert found.assumed["noise_schedule"] == "cosine"


def test_convolutions_that_halve_show_the_levels():
    """Without resblock_updown even a classifier of equal blocks has one reading."""
    found = infer(even_classifier(classifier_resblock_updown=False))
    assert found.shown["classifier_depth"] == 1
    assert found.shown["classifier_resblock_updown"] is False


def test_a_null_class_is_no_class():
    """With label_dropout the embedding has a row more; the user must say so."""
    flags = {"class_cond": True, "num_classes": 10, "label_dropout": 0.1}
    shapes = shapes_of("diffusion model", flags)
    assert infer(shapes).shown["num_classes"] == 11
    assert infer(shapes, {"label_dropout": 0.2}).shown["num_classes"] == 10


def test_sizes_without_a_default_are_the_smallest_that_can_be_halved():
    """Eight levels need 128 pixels; where the default of 64 can be halved, it is assumed."""
    deep = shapes_of(
        "diffusion model",
        {"image_size": 256, "channel_mult": "1,1,1,1,1,1,1,1", "num_channels": 32},
    )
    assert infer(deep).assumed["image_size"] == 128
    flat = shapes_of("diffusion model", {"image_size": 256, "channel_mult": "1,2"})
    assert infer(flat).assumed["image_size"] == 64


NETWORK = config.defaults(*config.DIFFUSION_GROUPS)


@pytest.mark.parametrize(
    "name, one, other, equal",
    [
        ("attention_resolutions", "16,8", "8, 16", True),
        ("attention_resolutions", "16,8", "16,8,7,128", True),
        ("attention_resolutions", "16,8", "16", False),
        ("attention_resolutions", "16,8", "32,16,8", False),
        ("channel_mult", "", "1,2,3,4", True),
        ("channel_mult", "1,2", "1.0, 2", True),
        ("channel_mult", "", "1,2,3", False),
        ("channel_mult", "0.5,1", "0.5,2", False),
        ("num_channels", 128, 64, False),
    ],
)
def test_equal_networks_have_equal_flags(name, one, other, equal):
    """Spellings of one network are no contradiction, other networks are."""
    theirs = NETWORK | {name: one}
    assert infer_flags.departures(theirs, {name: other}) == ([] if equal else [name])


def test_512_pixels_mean_other_levels_to_an_upsampler():
    """The default levels are those of the kind of network."""
    both = {"channel_mult": "1,1,2,2,4,4"}
    upsampler = config.defaults(*config.SUPER_RES_GROUPS) | {"large_size": 512}
    assert infer_flags.departures(upsampler, both) == []
    assert infer_flags.departures(NETWORK | {"image_size": 512}, both) == ["channel_mult"]


def test_a_multiplier_is_the_shortest_that_gives_the_width():
    """0.5 rather than 0.50, and what has no short name gives the width all the same."""
    assert infer_flags._multiplier(64, 128) == "0.5"
    assert infer_flags._multiplier(640, 64) == "10"
    for channels in range(1, 200):
        for width in range(32, 400, 32):
            assert int(float(infer_flags._multiplier(width, channels)) * channels) == width


def without(shapes, *words):
    return {name: shape for name, shape in shapes.items() if not any(w in name for w in words)}


UNET = {"image_size": 8, "channel_mult": "1,2", "num_channels": 32, "num_res_blocks": 1}


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {},
        lambda s: {"something": (2,)},
        lambda s: without(s, "time_embed"),
        lambda s: without(s, "input_blocks.1."),
        lambda s: without(s, "input_blocks.3."),
        lambda s: without(s, "output_blocks.2."),
        lambda s: without(s, "out.2"),
        lambda s: without(s, "out_layers"),
        lambda s: s | {"out.2.weight": (5, 32, 3, 3)},
        lambda s: s | {"input_blocks.0.0.weight": (32, 4, 3, 3)},
        lambda s: s | {"input_blocks.0.0.weight": ()},
        lambda s: s | {"input_blocks.0.0.weight": (64, 3, 3, 3)},
        lambda s: s | {"time_embed.0.weight": (0, 0)},
        lambda s: {f"module.{name}": shape for name, shape in s.items()},
    ],
)
def test_tensors_of_another_network_are_told(change):
    """What is no network of ours is one error, whatever is missing."""
    with pytest.raises(ValueError, match="no network of this project"):
        infer(change(shapes_of("diffusion model", UNET)))


@pytest.mark.parametrize("name", ["diffusion", "classifier", "upsampler"])
def test_the_bundled_weights_show_what_stands_beside_them(name):
    """What is inferred from them does not contradict their flags file, and is all there."""
    folder = Path(__file__).parent.parent / "models" / "fashion"
    weights = torch.load(folder / f"{name}.pt", mmap=True, weights_only=True)
    flags = json.loads((folder / f"{name}.json").read_text())
    given = {key: flags[key] for key in HIDDEN & flags.keys()}
    found = infer({key: tuple(tensor.shape) for key, tensor in weights.items()}, given)
    assert found.kind == ("diffusion model" if name == "diffusion" else name)
    assert infer_flags.departures(found.shown | given, flags) == []
    assert len(found.shown) >= 9
