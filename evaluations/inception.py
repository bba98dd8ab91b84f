"""The Inception-v3 of 2015 in PyTorch: the network in whose features FID and its kin are defined.

It is neither the network of the paper (arXiv:1512.00567) nor torchvision's: its weights and its
quirks are those of one TensorFlow graph, classify_image_graph_def.pb. The quirks: images are
resized as TensorFlow 1 did it, averages at the border count no padding, the last block takes the
maximum instead, normalisation has no gamma, and the class probabilities are those without bias.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 299  # height and width of what the convolutions see
NUM_FEATURES, NUM_CLASSES = 2048, 1008
NUM_SPATIAL_CHANNELS = 7  # about as many numbers as pool_3 has
NUM_SPATIAL = 17 * 17 * NUM_SPATIAL_CHANNELS
EPSILON = 0.001  # added to variances
NORMALIZATION = {"beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


class InceptionFeatures(NamedTuple):
    """What the network sees in N images.

    Attributes:
        pool_3: [N, 2048], means over the image of the last block.
        spatial: [N, 2023], the first 7 channels of mixed_6/conv, by row, column and channel.
        probabilities: [N, 1008], softmax of the class scores without their bias.
    """

    pool_3: Tensor
    spatial: Tensor
    probabilities: Tensor


# --------------------------------------------------------------------------------------------
# The graph. A block joins its branches along the channels. A branch is its name in TensorFlow, its
# name in the conversions to PyTorch, and its steps: pools, and units CHANNELS@HEIGHTxWIDTH. A unit
# has stride 1 and keeps the size; `!` leaves out the padding, `/2` does so and has stride 2. Two
# units with + between them see the same input, and their outputs are joined.

POOLS = {
    "max/2": partial(F.max_pool2d, kernel_size=3, stride=2),
    "max": partial(F.max_pool2d, kernel_size=3, stride=1, padding=1),
    "average": partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False),
}
STEM = "32@3x3/2 32@3x3! 64@3x3 max/2 80@1x1 192@3x3! max/2"
STEM_IN_TORCH = {  # names that no rule gives
    "Conv2d_1": "Conv2d_1a_3x3",
    "Conv2d_2": "Conv2d_2a_3x3",
    "Conv2d_3": "Conv2d_2b_3x3",
    "Conv2d_4": "Conv2d_3b_1x1",
    "Conv2d_5": "Conv2d_4a_3x3",
}


def _block_35(width: int) -> list[tuple[str, str, str]]:
    """Return the branches of a block at 35 x 35 pixels."""
    return [
        ("", "1x1", "64@1x1"),
        ("tower", "5x5", "48@1x1 64@5x5"),
        ("tower_1", "3x3dbl", "64@1x1 96@3x3 96@3x3"),
        ("tower_2", "_pool", f"average {width}@1x1"),
    ]


def _block_17(width: int) -> list[tuple[str, str, str]]:
    """Return the branches of a block at 17 x 17 pixels."""
    return [
        ("", "1x1", "192@1x1"),
        ("tower", "7x7", f"{width}@1x1 {width}@1x7 192@7x1"),
        ("tower_1", "7x7dbl", f"{width}@1x1 {width}@7x1 {width}@1x7 {width}@7x1 192@1x7"),
        ("tower_2", "_pool", "average 192@1x1"),
    ]


def _block_8(pool: str) -> list[tuple[str, str, str]]:
    """Return the branches of a block at 8 x 8 pixels."""
    return [
        ("", "1x1", "320@1x1"),
        ("tower", "3x3", "384@1x1 384@1x3+384@3x1"),
        ("tower_1", "3x3dbl", "448@1x1 384@3x3 384@1x3+384@3x1"),
        ("tower_2", "_pool", f"{pool} 192@1x1"),
    ]


BLOCKS = {  # (in TensorFlow, in PyTorch) -> branches
    ("mixed", "5b"): _block_35(32),
    ("mixed_1", "5c"): _block_35(64),
    ("mixed_2", "5d"): _block_35(64),
    ("mixed_3", "6a"): [
        ("", "3x3", "384@3x3/2"),
        ("tower", "3x3dbl", "64@1x1 96@3x3 96@3x3/2"),
        ("pool", "", "max/2"),
    ],
    ("mixed_4", "6b"): _block_17(128),
    ("mixed_5", "6c"): _block_17(160),
    ("mixed_6", "6d"): _block_17(160),
    ("mixed_7", "6e"): _block_17(192),
    ("mixed_8", "7a"): [
        ("tower", "3x3", "192@1x1 320@3x3/2"),
        ("tower_1", "7x7x3", "192@1x1 192@1x7 192@7x1 192@3x3/2"),
        ("pool", "", "max/2"),
    ],
    ("mixed_9", "7b"): _block_8("average"),
    ("mixed_10", "7c"): _block_8("max"),
}


class Unit(NamedTuple):
    """A convolution with its normalisation and ReLU.

    Attributes:
        name: in TensorFlow.
        torch_name: in the conversions to PyTorch.
        shape: of the kernel, (out, in, height, width).
        stride: 1 or 2.
        padded: whether images keep their size, with zeros beyond the border.
    """

    name: str
    torch_name: str
    shape: tuple[int, int, int, int]
    stride: int
    padded: bool


Step = str | list[Unit]  # a pool, or units that see the same input


def _read_unit(text: str, name: str, torch_name: str, width: int) -> Unit:
    """Return the unit that a word of the table describes, with `width` channels before it."""
    out, height, width_of_kernel, ending = re.fullmatch(r"(\d+)@(\d)x(\d)(!|/2)?", text).groups()
    shape = int(out), width, int(height), int(width_of_kernel)
    torch_name = STEM_IN_TORCH.get(torch_name, torch_name)
    return Unit(name, torch_name, shape, stride=2 if ending == "/2" else 1, padded=not ending)


def _endings(place: int, num_places: int, forks: bool) -> list[tuple[str, str]]:
    """Return how the names of the units at a place of a branch end, in TensorFlow and PyTorch."""
    if forks:
        return [("mixed/conv", f"_{place}a"), ("mixed/conv_1", f"_{place}b")]
    return [("conv" + f"_{place - 1}" * (place > 1), f"_{place}" * (num_places > 1))]


def _read_branch(text: str, prefix: str, torch_name: str, width: int) -> tuple[list[Step], int]:
    """Return the steps of a branch that sees `width` channels, and how many it yields."""
    num_places = sum(word not in POOLS for word in text.split())
    steps: list[Step] = []
    place = 0
    for word in text.split():
        if word in POOLS:
            steps.append(word)
            continue
        place += 1
        endings = _endings(place, num_places, "+" in word)
        step = [
            _read_unit(spec, prefix + ending, torch_name + torch_ending, width)
            for spec, (ending, torch_ending) in zip(word.split("+"), endings, strict=True)
        ]
        steps.append(step)
        width = sum(unit.shape[0] for unit in step)
    return steps, width


def _read_graph() -> dict[str, list[list[Step]]]:
    """Return the branches of each block, the stem first."""
    stem, width = _read_branch(STEM, "", "Conv2d", 3)
    graph = {"stem": [stem]}
    for (block, torch_block), branches in BLOCKS.items():
        graph[block] = []
        width_in, width = width, 0
        for branch, torch_branch, text in branches:
            prefix = f"{block}/{branch}/" if branch else f"{block}/"
            torch_name = f"Mixed_{torch_block}.branch{torch_branch}"
            steps, width_out = _read_branch(text, prefix, torch_name, width_in)
            graph[block].append(steps)
            width += width_out
    return graph


GRAPH = _read_graph()
UNITS = [
    unit
    for branches in GRAPH.values()
    for steps in branches
    for step in steps
    if not isinstance(step, str)
    for unit in step
]


# --------------------------------------------------------------------------------------------
# Weights


class Constant(NamedTuple):
    """A tensor of weights under its two names, with its shape in PyTorch.

    Attributes:
        name: in TensorFlow's graph.
        torch_name: in a state dict.
        shape: in a state dict.
        axes: where these axes lie in TensorFlow.
    """

    name: str
    torch_name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]


def constants() -> Iterator[Constant]:
    """Yield the tensors that the network needs; gamma and the biases of the classes it does not."""
    for unit in UNITS:
        name, torch_name = f"{unit.name}/batchnorm", f"{unit.torch_name}.bn"
        yield Constant(
            f"{unit.name}/conv2d_params", f"{unit.torch_name}.conv.weight", unit.shape, (3, 2, 0, 1)
        )
        for ending, torch_ending in NORMALIZATION.items():
            yield Constant(f"{name}/{ending}", f"{torch_name}.{torch_ending}", unit.shape[:1], (0,))
    yield Constant("softmax/weights", "fc.weight", (NUM_CLASSES, NUM_FEATURES), (1, 0))


def read_weights(weights: Mapping[str, np.ndarray | Tensor]) -> dict[str, Tensor]:
    """Return the tensors of `constants()` under TensorFlow's names, laid out as in PyTorch.

    Args:
        weights: constants of the graph, or the state dict of a conversion. What else is in there
            is ignored, the gamma of a conversion too: it came along from the graph, which does
            not apply it.

    Raises:
        ValueError: a tensor is missing, has another shape or values that are not finite.
    """
    in_torch = f"{UNITS[0].torch_name}.conv.weight" in weights
    found = {}
    for name, torch_name, shape, axes in constants():
        key = torch_name if in_torch else name
        if key not in weights:
            raise ValueError(f"there is no {key}")
        value = weights[key]
        expected = list(shape) if in_torch else [shape[axes.index(i)] for i in range(len(axes))]
        if list(value.shape) != expected:
            raise ValueError(f"{key} is {list(value.shape)}, not {expected}")
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)
        if tensor.layout != torch.strided or not tensor.is_floating_point():
            raise ValueError(f"{key} holds other things than floating-point numbers")
        if not tensor.float().isfinite().all():
            raise ValueError(f"{key} has values that are not finite")
        found[name] = tensor if in_torch else tensor.permute(axes)
    return found


def _fold(unit: Unit, weights: dict[str, Tensor]) -> nn.Conv2d:
    """Return one convolution with a bias that stands for a convolution and its normalisation.

    (w * x - mean) / sqrt(variance + epsilon) + beta, with the root moved into w.
    """
    kernel = weights[f"{unit.name}/conv2d_params"].double()
    beta, mean, variance = (weights[f"{unit.name}/batchnorm/{n}"].double() for n in NORMALIZATION)
    if variance.min() < 0:
        raise ValueError(f"{unit.name}/batchnorm/moving_variance has values below 0")
    scale = (variance + EPSILON).rsqrt()
    out, width, *size = unit.shape
    padding = [side // 2 for side in size] if unit.padded else 0
    conv = nn.Conv2d(width, out, size, unit.stride, padding, device="meta")
    kernel = (kernel * scale[:, None, None, None]).float()
    # Channels last is how images come, and a fifth faster.
    kernel = kernel.contiguous(memory_format=torch.channels_last)
    conv.weight = nn.Parameter(kernel, requires_grad=False)
    conv.bias = nn.Parameter((beta - mean * scale).float(), requires_grad=False)
    return conv


# --------------------------------------------------------------------------------------------
# The network


def resize(images: Tensor, size: int = SIZE) -> Tensor:
    """Return images [N, C, H, W] as [N, C, size, size], bilinear as TensorFlow 1 has it.

    Pixel i is taken at i * H / size: no offset by half a pixel, and no smoothing where the image
    shrinks. The positions are float32, as there.
    """
    for axis in (3, 2):
        last = images.shape[axis] - 1
        step = torch.tensor(images.shape[axis], dtype=torch.float32) / size
        places = torch.arange(size, dtype=torch.float32) * step
        below = places.floor().long().clamp(max=last)
        share = (places - below).to(images)
        below = below.to(images.device)
        near = images.index_select(axis, below)
        far = images.index_select(axis, (below + 1).clamp(max=last))
        images = near + (far - near) * (share if axis == 3 else share[:, None])
    return images


class Inception(nn.Module):
    """The network with its weights, which do not train: it has no state but these.

    Attributes:
        source: the file of the weights, None for others.
        digest: the SHA-256 of that file in hexadecimal.
    """

    def __init__(self, weights: Mapping[str, np.ndarray | Tensor]):
        """Build it from weights that `read_weights` understands, and raise what that raises."""
        super().__init__()
        weights = read_weights(weights)
        self.units = nn.ModuleDict({unit.name: _fold(unit, weights) for unit in UNITS})
        # A copy, since the tensors of a file may lie in the file.
        softmax = weights["softmax/weights"].float().clone(memory_format=torch.contiguous_format)
        self.softmax = nn.Parameter(softmax, requires_grad=False)
        self.source: str | None = None
        self.digest: str | None = None

    def forward(self, images: Tensor) -> InceptionFeatures:
        """Return the features of images, each on its own whatever the batch.

        Args:
            images: RGB [N, H, W, 3] of any size, on any device: uint8, or floats that run from 0
                to 255 too.

        Raises:
            ValueError: the shape or type is another.
        """
        _check(images)
        x = images.to(self.softmax.device).to(self.softmax.dtype).permute(0, 3, 1, 2)
        x = (resize(x) - 128) / 128
        with full_precision():
            for block, branches in GRAPH.items():
                x = torch.cat([self._run(steps, x) for steps in branches], dim=1)
                if block == "mixed_6":  # its first branch is mixed_6/conv, [N, 192, 17, 17]
                    spatial = x[:, :NUM_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        pool_3 = x.mean(dim=(2, 3))
        return InceptionFeatures(pool_3, spatial, F.linear(pool_3, self.softmax).softmax(dim=1))

    def _run(self, steps: list[Step], x: Tensor) -> Tensor:
        """Return what a branch makes of x [N, C, H, W]."""
        for step in steps:
            if isinstance(step, str):
                x = POOLS[step](x)
            else:
                x = torch.cat([self.units[unit.name](x).relu() for unit in step], dim=1)
        return x


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep convolutions from TensorFloat-32, three digits and the default on GPUs, in the block."""
    cudnn = torch.backends.cudnn
    if hasattr(cudnn, "conv"):  # newer releases of torch, which do not like the older flag
        flags, name, full = cudnn.conv, "fp32_precision", "ieee"
    else:
        flags, name, full = cudnn, "allow_tf32", False
    before = getattr(flags, name)
    setattr(flags, name, full)
    try:
        yield
    finally:
        setattr(flags, name, before)


def _check(images: Tensor) -> None:
    """Raise ValueError for what are no images."""
    if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise ValueError(f"images must be [N, H, W, 3], got {list(images.shape)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"images must be uint8 or floats from 0 to 255, got {images.dtype}")
