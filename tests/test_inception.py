"""Inception-v3 of 2015: numbers of the published evaluator, and weights from every kind of file.

The weights are made for the purpose, as the reference numbers were; no test needs a network.
"""

import hashlib
import math
import os
import socket
import zlib

import numpy as np
import pytest
import torch
from launching import ROOT
from serving import serving
from test_graph_reader import SHAPES, graph_of, listed, node, tensor

from evaluations import inception_weights
from evaluations.inception import (
    NORMALIZATION,
    UNITS,
    Inception,
    constants,
    read_weights,
    resize,
)
from evaluations.inception_weights import CONVERSIONS, GRAPH, load_inception
from guided_diffusion import downloads

NAMES = ("pool3", "spatial", "softmax")  # of the reference arrays


def make_constant(name, shape):
    """Return the reference weights by that name."""
    numbers = np.random.default_rng([0, zlib.crc32(name.encode())]).standard_normal(shape)
    if name.endswith("/conv2d_params"):
        numbers *= math.sqrt(2 / math.prod(shape[:3]))
    elif name.endswith("/moving_variance"):
        numbers = 1 + 0.1 * abs(numbers)
    elif name.endswith("/gamma"):
        numbers = 1 + 0.1 * numbers
    else:
        numbers *= 2 / math.sqrt(2048) if name == "softmax/weights" else 0.1
    return numbers.astype(np.float32)


def converted(weights):
    """Return TensorFlow's constants as the conversions to PyTorch hold them."""
    state = {"fc.weight": weights["softmax/weights"].T, "fc.bias": weights["softmax/biases"]}
    for unit in UNITS:
        kernel = weights[f"{unit.name}/conv2d_params"]
        state[f"{unit.torch_name}.conv.weight"] = kernel.transpose(3, 2, 0, 1)
        for name, torch_name in (NORMALIZATION | {"gamma": "weight"}).items():
            state[f"{unit.torch_name}.bn.{torch_name}"] = weights[f"{unit.name}/batchnorm/{name}"]
        state[f"{unit.torch_name}.bn.num_batches_tracked"] = np.int64(0)
    return {name: torch.tensor(array) for name, array in state.items()}


@pytest.fixture(scope="module")
def weights():
    """All constants of the graph."""
    return {name: make_constant(name, shape) for name, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def network(weights):
    return Inception(weights)


@pytest.fixture(scope="module")
def reference():
    """Images, and what the published evaluator sees in them."""
    with np.load(ROOT / "tests" / "reference" / "inception.npz") as npz:
        return {name: torch.tensor(array) for name, array in npz.items()}


@pytest.fixture(scope="module")
def features(network, reference):
    """What the network sees in the first two reference images."""
    return network(reference["images"][:2])


def assert_close(found, expected, tolerance=1e-4):
    """Compare relative to the largest absolute value."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


# -- the network -----------------------------------------------------------------------------------


def test_published_numbers(network, reference):
    """All three outputs to 1e-4 of the largest number, as the evaluator on TensorFlow has them."""
    for found, name in zip(network(reference["images"]), NAMES, strict=True):
        assert_close(found, reference[name])


def test_names_and_shapes_are_those_of_the_graph():
    """Every constant is one of the graph's; only gamma and the biases of the classes are unused."""
    used = {c.name: [c.shape[c.axes.index(i)] for i in range(len(c.axes))] for c in constants()}
    unused = {name for name in SHAPES if name.endswith("/gamma")} | {"softmax/biases"}
    assert used == {name: shape for name, shape in SHAPES.items() if name not in unused}


@pytest.mark.parametrize("batch", [[0], [1, 0], [0, 2, 4, 1, 3, 5]])
def test_an_image_does_not_see_its_batch(network, reference, batch):
    """Batches of any size and order give the same features, to rounding."""
    for found, name in zip(network(reference["images"][batch]), NAMES, strict=True):
        assert_close(found, reference[name][batch])
    alone = network(reference["images"][batch[:1]])
    for found, one in zip(network(reference["images"][batch]), alone, strict=True):
        assert_close(found[:1], one, 1e-5)


def test_modes_and_gradients(network, reference, features):
    """Training mode changes nothing, nothing trains, and gradients reach float images."""
    network.train()
    images = reference["images"][:2].float().requires_grad_()
    found = network(images)
    network.eval()
    for one, other in zip(found, features, strict=True):
        assert torch.equal(one, other)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    (gradient,) = torch.autograd.grad(found.pool_3.sum(), images)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_precision_on_gpus_is_full_within_and_the_callers_outside(network, reference):
    """TensorFloat-32 is off where the features are made, and as it was afterwards."""
    flags, seen = torch.backends.cudnn.conv, []
    before = flags.fp32_precision
    unit = network.units["conv"]
    with unit.register_forward_hook(lambda *_: seen.append(flags.fp32_precision)):
        network(reference["images"][:1])
    assert seen == ["ieee"] and flags.fp32_precision == before


def test_probabilities_and_the_order_of_spatial_features(network, reference, features):
    """Probabilities are those of 1008 classes without bias; spatial features end in channels."""
    torch.testing.assert_close(features.probabilities.sum(dim=1), torch.ones(2))
    logits = features.pool_3 @ network.softmax.T
    torch.testing.assert_close(features.probabilities, logits.softmax(dim=1))
    seen = []
    unit = network.units["mixed_6/conv"]
    with unit.register_forward_hook(lambda module, args, out: seen.append(out)):
        network(reference["images"][:2])
    expected = torch.stack(
        [seen[0][:, c, y, x].relu() for y in range(17) for x in range(17) for c in range(7)], dim=1
    )
    assert torch.equal(features.spatial, expected)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(1, 3, 32, 32), "must be .N, H, W, 3., got .1, 3, 32, 32."),
        (torch.zeros(32, 32, 3), "must be .N, H, W, 3."),
        (torch.zeros(0, 32, 32, 3), "must be .N, H, W, 3."),
        (torch.zeros(1, 32, 32, 3, dtype=torch.int64), "uint8 or floats"),
    ],
)
def test_other_things_than_images_are_refused(network, images, words):
    with pytest.raises(ValueError, match=words):
        network(images)


# -- the resize of TensorFlow 1 --------------------------------------------------------------------


def resize_directly(image, size):
    """Return an image [H, W] at another size, pixel by pixel, in float64."""
    height, width = image.shape
    out = np.empty((size, size))
    for i, j in np.ndindex(size, size):
        y, x = i * height / size, j * width / size
        top, left = int(y), int(x)
        corner = image[np.ix_([top, min(top + 1, height - 1)], [left, min(left + 1, width - 1)])]
        out[i, j] = [1 - y + top, y - top] @ corner @ [1 - x + left, x - left]
    return out


@pytest.mark.parametrize(("height", "width"), [(8, 8), (32, 24), (1, 3), (64, 100), (37, 37)])
def test_resize_is_the_formula(height, width):
    """Larger or smaller, square or not: source = i * H / size, without offset or smoothing."""
    image = np.random.default_rng(0).uniform(0, 255, (height, width))
    found = resize(torch.tensor(image, dtype=torch.float32)[None, None], 37)[0, 0]
    np.testing.assert_allclose(found, resize_directly(image, 37), atol=2e-3)


def test_resize_keeps_what_needs_no_change():
    """Images of the right size stay bit for bit; at twice the size every other pixel is one."""
    image = torch.rand(2, 3, 20, 20)
    assert torch.equal(resize(image, 20), image)
    assert torch.equal(resize(image, 40)[:, :, ::2, ::2], image)
    assert torch.equal(resize(image, 10), image[:, :, ::2, ::2])


# -- weights from files ----------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no way to the internet."""
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(downloads, "PAUSE", 0)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setattr(inception_weights, "URL", f"http://127.0.0.1:{port}/{GRAPH}")
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def small_graph():
    """The bytes of a graph of the right names and shapes, with one number for each tensor."""
    return b"".join(node(name, tensor(shape, listed(0.5))) for name, shape in SHAPES.items())


def small_state():
    """The same numbers as a state dict; a tensor of one number takes no room in a file."""
    return {c.torch_name: torch.tensor(0.5).expand(c.shape) for c in constants()}


def assert_same_network(network, other):
    """Compare two networks bit for bit."""
    mine, theirs = network.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_graph_in_full_size(tmp_path, weights, network):
    """95 MB of the real names and shapes come back bit for bit."""
    path = tmp_path / "graph"
    path.write_bytes(graph_of(weights))
    assert_same_network(load_inception(str(path), "cpu"), network)


def test_conversions_give_the_same_network(weights, network):
    """Both conversions hold the graph's numbers, transposed; their gamma is not applied either."""
    assert_same_network(Inception(converted(weights)), network)


def test_names_in_the_conversions():
    """Some names of every kind of block, as pytorch-fid and torch-fidelity have them."""
    names = {unit.name: unit.torch_name for unit in UNITS}
    assert len(names) == len(set(names.values())) == 94
    expected = {
        "conv": "Conv2d_1a_3x3",
        "conv_4": "Conv2d_4a_3x3",
        "mixed/conv": "Mixed_5b.branch1x1",
        "mixed/tower/conv_1": "Mixed_5b.branch5x5_2",
        "mixed_2/tower_1/conv_2": "Mixed_5d.branch3x3dbl_3",
        "mixed_3/conv": "Mixed_6a.branch3x3",
        "mixed_3/tower/conv": "Mixed_6a.branch3x3dbl_1",
        "mixed_4/tower/conv_2": "Mixed_6b.branch7x7_3",
        "mixed_7/tower_1/conv_4": "Mixed_6e.branch7x7dbl_5",
        "mixed_7/tower_2/conv": "Mixed_6e.branch_pool",
        "mixed_8/tower/conv_1": "Mixed_7a.branch3x3_2",
        "mixed_8/tower_1/conv_3": "Mixed_7a.branch7x7x3_4",
        "mixed_9/tower/mixed/conv": "Mixed_7b.branch3x3_2a",
        "mixed_10/tower_1/mixed/conv_1": "Mixed_7c.branch3x3dbl_3b",
    }
    assert {name: names[name] for name in expected} == expected


@pytest.mark.parametrize("old_format", [False, True])
def test_the_content_tells_the_format(tmp_path, small_graph, old_format):
    """Names do not matter, and both formats of torch.save are known."""
    (tmp_path / "a.pth").write_bytes(small_graph)
    extra = {
        "fc.bias": torch.zeros(1008),
        "Mixed_5b.branch1x1.bn.num_batches_tracked": torch.tensor(0),
    }
    torch.save(
        small_state() | extra, tmp_path / "b.pb", _use_new_zipfile_serialization=not old_format
    )
    one, other = (load_inception(str(tmp_path / name), "cpu") for name in ("a.pth", "b.pb"))
    assert_same_network(one, other)


class Harmful:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return (os.makedirs, ("harm",))


def changed(name, value):
    """Return a state dict with one tensor replaced, or without it."""
    state = small_state() | {name: value}
    return {name: value for name, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (Harmful(), "could run code"),
        ([1, 2], "no state dict"),
        ({"weight": torch.zeros(3)}, "there is no conv/conv2d_params"),
        (changed("fc.weight", torch.zeros(1).expand(1000, 2048)), "is [1000, 2048], not [1008"),
        (changed("fc.weight", None), "there is no fc.weight"),
        (changed("Conv2d_2a_3x3.bn.bias", torch.full((32,), math.nan)), "not finite"),
        (changed("Conv2d_2a_3x3.bn.running_var", torch.full((32,), -1.0)), "below 0"),
        (changed("Conv2d_2a_3x3.bn.bias", torch.zeros(32, dtype=torch.int32)), "floating-point"),
        (changed("Conv2d_2a_3x3.bn.bias", torch.zeros(32).to_sparse()), "floating-point"),
    ],
)
def test_other_checkpoints_end_in_one_line(tmp_path, cache, state, words):
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    with pytest.raises(ValueError) as error:
        load_inception(str(path), "cpu")
    assert words in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_graph_of_another_network_is_named(tmp_path, cache):
    """The line says what is wrong, and where to get the right file."""
    path = tmp_path / GRAPH
    path.write_bytes(graph_of({"conv/conv2d_params": np.zeros((3, 3, 3, 8), np.float32)}))
    with pytest.raises(ValueError, match="2015: conv/conv2d_params is .3, 3, 3, 8., not") as error:
        load_inception(str(path), "cpu")
    assert inception_weights.URL in str(error.value) and "\n" not in str(error.value)


def test_constants_of_one_number_serve(small_graph):
    """Arrays that may not be written to raise no warning."""
    read = read_weights({n: np.broadcast_to(np.float32(1), shape) for n, shape in SHAPES.items()})
    assert all((array == 1).all() for array in read.values())


# -- where files are -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [GRAPH, *CONVERSIONS])
def test_a_kept_file_is_found_and_its_digest_remembered(cache, small_graph, capsys, name):
    """Any of the three; a file that differs at a later use is refused."""
    path = cache / name
    path.write_bytes(small_graph)
    digest = hashlib.sha256(small_graph).hexdigest()
    network = load_inception(device="cpu")
    assert (network.source, network.digest) == (str(path), digest)
    assert capsys.readouterr().out == f"{digest}  {path}\n"
    assert (cache / f"{name}.sha256").read_text() == f"{digest}  {name}\n"
    path.write_bytes(small_graph + b"\x20\x01")  # still a graph
    with pytest.raises(ValueError, match=f"at its first use it had {digest}"):
        load_inception(device="cpu")


def test_nothing_is_written_beside_a_given_file(tmp_path, cache, small_graph, capsys):
    """--inception reads only; the digest is printed."""
    path = tmp_path / "given" / "weights"
    path.parent.mkdir()
    path.write_bytes(small_graph)
    load_inception(str(path), "cpu")
    assert capsys.readouterr().out.endswith(f"  {path}\n")
    assert [p.name for p in path.parent.iterdir()] == ["weights"] and not list(cache.iterdir())


@pytest.mark.parametrize("given", [None, "missing.pb", "."])
def test_without_weights_the_error_says_what_to_do(tmp_path, cache, given):
    """What to download and where to put it; nothing is left behind."""
    with pytest.raises(ValueError) as error:
        load_inception(given and str(tmp_path / given), "cpu")
    line = str(error.value)
    for words in (inception_weights.URL, str(cache), "--inception", *CONVERSIONS):
        assert words in line
    assert "\n" not in line and not list(cache.iterdir())


@pytest.fixture
def plan(cache, monkeypatch, small_graph):
    """Let the published address be a server on this machine, with a smaller graph; its plan."""
    with serving("/graph", small_graph) as server:
        address = f"http://127.0.0.1:{server.server_port}/graph"
        monkeypatch.setattr(inception_weights, "URL", address)
        monkeypatch.setattr(inception_weights, "NUM_BYTES", len(small_graph))
        yield server.plan


def test_the_first_use_downloads_and_the_second_does_not(cache, plan, small_graph, capsys):
    """The graph is kept with its digest, and a bar shows how far it is."""
    first = load_inception(device="cpu")
    assert (cache / GRAPH).read_bytes() == small_graph and "100%" in capsys.readouterr().err
    assert_same_network(load_inception(device="cpu"), first)
    assert sorted(p.name for p in cache.iterdir()) == [GRAPH, f"{GRAPH}.sha256"]
    assert len(plan.requests) == 1


def test_a_download_that_broke_off_goes_on_at_the_next_use(cache, plan, small_graph):
    """No byte of the 95 MB comes twice; until then nothing has the name of the graph."""
    plan.cuts = [1000] + [0] * 5
    with pytest.raises(ValueError, match="broke off .* go on from 1,000 bytes, or download http"):
        load_inception(device="cpu")
    assert not (cache / GRAPH).exists()
    load_inception(device="cpu")
    assert (cache / GRAPH).read_bytes() == small_graph and plan.sent == len(small_graph)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"statuses": [404]}, "cannot be downloaded .404"),
        ({"content": b"<!DOCTYPE html>"}, "has 15 bytes instead of"),
        ({"content": bytes(10**7), "tells_size": False}, "has more bytes instead of"),
    ],
)
def test_a_bad_download_leaves_nothing(cache, plan, change, words):
    """Another file or an error page never gets the name of the graph; the line says what to do."""
    vars(plan).update(change)
    with pytest.raises(ValueError, match=words) as error:
        load_inception(device="cpu")
    line = str(error.value)
    assert "\n" not in line and "--inception" in line and not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_named(cache, plan, monkeypatch):
    (cache / "file").touch()
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(cache / "file" / "below"))
    with pytest.raises(ValueError, match="cannot be written .Not a directory.: .*CACHE"):
        load_inception(device="cpu")
