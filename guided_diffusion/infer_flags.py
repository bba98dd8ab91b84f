"""What the tensors of a network tell about the flags that it was trained with.

A network is {name: shape} here, as its state dict has them; neither torch nor numpy is needed.
Names and shapes show most flags that fix a network, but not how it splits its attention into heads,
nor, as it is convolutional, the size of its images, nor anything about the process of noising.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import config

KINDS = {  # what a checkpoint may be -> the groups of its flags
    "diffusion model": config.DIFFUSION_GROUPS,
    "upsampler": config.SUPER_RES_GROUPS,
    "classifier": config.CLASSIFIER_GROUPS,
}
CLASSIFIER_NAMES = {"num_channels": "classifier_width", "num_res_blocks": "classifier_depth"}

Flags = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Inferred:
    """The flags of a network.

    Attributes:
        kind: a key of KINDS.
        shown: flags that the tensors show.
        assumed: flags that they do not show and that nobody gave.
    """

    kind: str
    shown: Flags
    assumed: Flags


@dataclass(frozen=True)
class _Levels:
    """One way to read the blocks of an encoder: residual blocks per level, and what levels are."""

    depth: int
    widths: tuple[int, ...]
    attended: tuple[bool, ...]


@dataclass(frozen=True)
class _Reading:
    """The flags that a network shows if its encoder has these levels, at a size it may not show."""

    levels: _Levels
    shown: Flags
    size: Flags

    @property
    def flags(self) -> Flags:
        return self.size | self.shown


def infer(shapes: Shapes, given: Flags | None = None, likely: Flags | None = None) -> Inferred:
    """Infer the flags of a network from the names and shapes of its tensors.

    Args:
        shapes: name -> shape.
        given: flags that the user gave. They decide where the tensors allow several readings.
        likely: flags to assume rather than the defaults.

    Raises:
        ValueError: if the tensors are those of another network.
    """
    given, likely = given or {}, likely or {}
    try:
        kind = _kind(shapes)
        readings = [_read(kind, shapes, levels, given, likely) for levels in _splits(shapes)]
        best, *rivals = _by_plausibility(kind, readings, given, likely)
    except (LookupError, ValueError, ArithmeticError) as error:
        raise ValueError("they are of no network of this project") from error
    unsure = {name for other in rivals for name in best.shown.keys() - other.shown.keys()}
    unsure |= {name for other in rivals for name in departures(best.flags, other.shown)}
    shown = {name: value for name, value in best.shown.items() if name not in unsure}
    guesses = _assume(kind, shapes, best, likely)
    open_names = config.fixed_names(*KINDS[kind]) - shown.keys() - given.keys()
    open_names -= _without_effect(kind, guesses | given)
    assumed = {name: value for name, value in guesses.items() if name in open_names}
    return Inferred(kind, shown, assumed)


def departures(theirs: Flags, mine: Flags) -> list[str]:
    """Return the flags in both that make another network of `mine` than of `theirs`.

    Args:
        theirs: flags of a whole network; its levels decide which spellings mean the same.
        mine: other values of some of them.
    """
    return [
        name for name in theirs
        if name in mine
        and canonical(name, theirs[name], theirs) != canonical(name, mine[name], theirs)
    ]  # fmt: skip


def canonical(name: str, value: Any, flags: Flags) -> Any:
    """Return the value of a flag in a form that is equal for equal networks.

    Args:
        name: of the flag.
        value: of the flag.
        flags: of the network in which it stands.
    """
    prefix = "classifier_" if name.startswith("classifier_") else ""
    if name == f"{prefix}channel_mult":
        return _widths(value, prefix, flags)
    if name == f"{prefix}attention_resolutions":
        levels = _widths(flags.get(f"{prefix}channel_mult", ""), prefix, flags)
        sizes = {_size_of(flags) >> level for level in range(len(levels))}
        return sizes & {int(item) for item in value.split(",") if item.strip()}
    return value


def _size_of(flags: Flags) -> int:
    """Return the image size of a network, 0 if it is not among the flags."""
    return flags.get("large_size", flags.get("image_size", 0))


def _widths(channel_mult: str, prefix: str, flags: Flags) -> tuple[int, ...]:
    """Return the channels of each level; none if the image size has no default levels."""
    channels = flags.get("classifier_width" if prefix else "num_channels", 1)
    table = _table("large_size" in flags)
    default = table.get(_size_of(flags), ())
    mult = [float(m) for m in channel_mult.split(",")] if channel_mult.strip() else default
    return tuple(int(m * channels) for m in mult)


def _table(is_upsampler: bool) -> dict[int, tuple[float, ...]]:
    return config.SUPER_RES_CHANNEL_MULT if is_upsampler else config.UNET_CHANNEL_MULT


# --------------------------------------------------------------------------------------------
# Reading the tensors


def _kind(shapes: Shapes) -> str:
    """Tell which network the tensors make: one with a way back up, or with twice the channels."""
    if not any(name.startswith("output_blocks.") for name in shapes):
        return "classifier"
    in_channels = shapes["input_blocks.0.0.weight"][1]
    return "upsampler" if in_channels in (2, 6) else "diffusion model"


def _blocks(shapes: Shapes, part: str) -> list[Shapes]:
    """Return the tensors of each block of `part`, under their names within the block."""
    found: dict[int, dict[str, tuple]] = {}
    for name, shape in shapes.items():
        match = re.fullmatch(rf"{part}\.(\d+)\.(.+)", name)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = shape
    return [found[number] for number in range(len(found))]


def _splits(shapes: Shapes) -> list[_Levels]:
    """Return the ways in which the encoder's blocks can be divided into levels.

    Each level has as many blocks: first the stem or what halves the resolution, then the residual
    blocks. A decoder shows how many; a classifier has none, and may allow several readings.
    """
    blocks, decoder = _blocks(shapes, "input_blocks"), _blocks(shapes, "output_blocks")
    steps = range(2, len(blocks) + 1)
    if decoder:
        enlarging = re.compile(r"[12]\.(conv|in_layers\.0)\.weight")
        ends = [n for n, block in enumerate(decoder, 1) if any(map(enlarging.fullmatch, block))]
        steps = ends[:1] or [len(decoder)]
    splits = [_split(blocks, step) for step in steps if len(blocks) % step == 0]
    return [levels for levels in splits if levels]


def _split(blocks: list[Shapes], step: int) -> _Levels | None:
    """Divide blocks into levels of `step`; None if these could not be levels."""
    levels = []
    for start in range(0, len(blocks), step):
        first, *rest = blocks[start : start + step]
        kinds = {(_width(block), "1.qkv.weight" in block) for block in rest}
        before = blocks[start - 1] if start else rest[0]  # neither stem nor halving changes width
        if len(kinds) != 1 or "1.qkv.weight" in first or _width(first) != _width(before):
            return None
        levels.append(kinds.pop())
    convolutions = [n for n, block in enumerate(blocks) if "0.op.weight" in block]
    if convolutions and convolutions != list(range(step, len(blocks), step)):
        return None
    widths, attended = zip(*levels, strict=True)
    return _Levels(step - 1, widths, attended)


def _width(block: Shapes) -> int:
    """Return the channels that a block of the encoder puts out."""
    names = ("0.out_layers.3.weight", "0.op.weight", "0.weight")
    return block[next((name for name in names if name in block), names[0])][0]


def _read(kind: str, shapes: Shapes, levels: _Levels, given: Flags, likely: Flags) -> _Reading:
    """Return what the tensors show if the encoder is to be divided into these levels."""
    channels, num_levels = shapes["time_embed.0.weight"][1], len(levels.widths)
    mult = ",".join(_multiplier(width, channels) for width in levels.widths)
    ends = _classifier_ends if kind == "classifier" else _unet_ends
    shown = ends(shapes, num_levels, given)
    size = shown.get("image_size") or _guess_size(kind, mult, given, likely)
    attended = [size >> level for level, attends in enumerate(levels.attended) if attends]
    film = shapes["input_blocks.1.0.emb_layers.1.weight"][0] == 2 * levels.widths[0]
    trunk = {
        "num_channels": channels,
        "channel_mult": mult,
        "num_res_blocks": levels.depth,
        "attention_resolutions": ",".join(map(str, attended)),
        "use_scale_shift_norm": film,
    }
    if num_levels > 1:
        halving = f"input_blocks.{levels.depth + 1}.0.op.weight"
        trunk["resblock_updown"] = halving not in shapes
    shown |= {_name(kind, name): value for name, value in trunk.items()}
    return _Reading(levels, shown, {_size_name(kind): size})


def _name(kind: str, name: str) -> str:
    """Return the name that a flag of the trunk has for this kind of network."""
    if kind != "classifier":
        return name
    return CLASSIFIER_NAMES.get(name, f"classifier_{name}")


def _multiplier(width: int, channels: int) -> str:
    """Return, as short as can be, the factor that makes `width` of `channels`."""
    if width % channels == 0:
        return str(width // channels)
    ratio = width / channels
    texts = (f"{ratio:.{digits}g}" for digits in range(1, 18))
    exact = next((text for text in texts if float(text) * channels == width), None)
    return exact or repr(math.nextafter(ratio, math.inf))  # products are rounded down


def _unet_ends(shapes: Shapes, num_levels: int, given: Flags) -> Flags:
    """Return what input and output of a U-Net show: channels and classes."""
    inputs, outputs = shapes["input_blocks.0.0.weight"][1], shapes["out.2.weight"][0]
    channels = inputs // 2 if _kind(shapes) == "upsampler" else inputs
    if channels not in (1, 3) or outputs not in (channels, 2 * channels):
        raise ValueError(f"{inputs} channels in, {outputs} out")
    flags = {"in_channels": channels, "learn_sigma": outputs == 2 * channels}
    flags["class_cond"] = "label_emb.weight" in shapes
    if flags["class_cond"]:
        has_null_class = given.get("label_dropout", 0) > 0
        flags["num_classes"] = shapes["label_emb.weight"][0] - has_null_class
    return flags


def _classifier_ends(shapes: Shapes, num_levels: int, given: Flags) -> Flags:
    """Return what input and output of a classifier show: channels, classes, pool, maybe a size."""
    flags: Flags = {"in_channels": shapes["input_blocks.0.0.weight"][1]}
    if flags["in_channels"] not in (1, 3):
        raise ValueError(f"{flags['in_channels']} channels in")
    if "out.2.positional_embedding" in shapes:
        pool, last = "attention", "out.2.c_proj.weight"
        # One position for each pixel of the lowest resolution, and one for their mean.
        lowest = math.isqrt(shapes["out.2.positional_embedding"][1] - 1)
        flags["image_size"] = lowest << (num_levels - 1)
    elif "out.1.weight" in shapes:
        pool, last = "spatial_v2", "out.3.weight"
    elif "out.3.weight" in shapes:
        pool, last = "adaptive", "out.3.weight"
    else:
        pool, last = "spatial", "out.2.weight"
    return flags | {"classifier_pool": pool, "num_classes": shapes[last][0]}


# --------------------------------------------------------------------------------------------
# What they do not show


def _size_name(kind: str) -> str:
    return "large_size" if kind == "upsampler" else "image_size"


def _guess_size(kind: str, mult: str, given: Flags, likely: Flags) -> int:
    """Return the given or likely image size, or the one that has these levels by default."""
    name, wanted = _size_name(kind), likely | given
    if name in wanted:
        return wanted[name]
    factors = tuple(map(float, mult.split(",")))
    matching = [size for size, levels in _table(kind == "upsampler").items() if levels == factors]
    default = config.defaults(*KINDS[kind])[name]
    return (matching or [max(default, 2 ** (len(factors) - 1))])[0]


def _by_plausibility(
    kind: str, readings: list[_Reading], given: Flags, likely: Flags
) -> list[_Reading]:
    """Return the most plausible reading first, then others that what was given allows as well."""
    usual = config.defaults(*KINDS[kind])
    del usual[_size_name(kind)]
    depth, mult = _name(kind, "num_res_blocks"), _name(kind, "channel_mult")

    def objections(reading: _Reading) -> tuple[bool, int]:
        (size,), num_levels = reading.size.values(), len(reading.levels.widths)
        return size % 2 ** (num_levels - 1) > 0, len(departures(reading.flags, given))

    def oddity(reading: _Reading) -> tuple:
        unlikely = len(departures(reading.flags, likely))
        unlike, one_level = departures(reading.flags, usual), len(reading.levels.widths) == 1
        return unlikely, mult in unlike, one_level, depth in unlike, len(unlike)

    first, *others = sorted(readings, key=lambda r: (*objections(r), *oddity(r), r.levels.depth))
    if any(objections(first)):  # the command line contradicts each reading: tell it the best one
        return [first]
    return [first] + [reading for reading in others if not any(objections(reading))]


def _assume(kind: str, shapes: Shapes, read: _Reading, likely: Flags) -> Flags:
    """Return values for the flags that fix a network and its process."""
    guesses = config.defaults(*KINDS[kind]) | likely | read.flags
    if kind == "upsampler" and "small_size" not in likely:
        guesses["small_size"] = max(1, guesses["large_size"] // 4)
    if kind == "classifier":
        widths = [shape[1] for name, shape in shapes.items() if name.endswith("qkv.weight")]
        if any(width % guesses["classifier_num_head_channels"] for width in widths):
            guesses["classifier_num_head_channels"] = 32  # which divides every width
    return guesses


def _without_effect(kind: str, flags: Flags) -> set[str]:
    """Return the flags that fix nothing in a network of these flags."""
    if kind == "classifier":
        return {"learn_sigma", "predict_xstart"}
    unused = set() if flags["class_cond"] else {"num_classes", "label_dropout"}
    by_channels = flags["num_head_channels"] != -1
    return unused | ({"num_heads", "num_heads_upsample"} if by_channels else set())
