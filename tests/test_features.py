"""Networks by name, features kept by content, and one pass over a set on any number of ranks."""

import builtins
import os
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from launching import ROOT
from PIL import Image
from test_inception import SHAPES, converted, make_constant
from test_layers import imported_files

from evaluations import features, measuring
from evaluations.command_line import NetworkConfig
from evaluations.feature_cache import FeatureCache
from evaluations.features import EXTRACTORS, Extractor, Features, load_extractor
from evaluations.image_sets import open_images
from guided_diffusion import dist_util


def see_little(images):
    """Return a few numbers of each image [n, H, W, 3]: a network for tests."""
    x = images.double() / 255
    means, deviations = x.mean(dim=(1, 2)), x.std(dim=(1, 2))
    corners = torch.cat([x[:, 0, 0], x[:, -1, -1]], dim=1)
    found = torch.cat([means, deviations], dim=1), corners, (9 * means).softmax(dim=1)
    return Features(*(array.float() for array in found))


def make_tiny(path=None, see=see_little):
    """Return such a network in Inception's place."""
    labels = {"inception_score": "Inception Score", "fid": "FID", "sfid": "sFID"}
    labels |= {"precision": "Precision", "recall": "Recall"} | features.MORE_LABELS
    widths = {"pooled": 6, "spatial": 6}
    return Extractor("inception", see, "tiny.pb", "0" * 64, labels, widths)


def draw(num, size=8, seed=0, shape=(3,)):
    """Return random images, uint8 [num, size, size, 3], each with a brightness of its own."""
    rng = np.random.default_rng(seed)
    bright = rng.uniform(30, 220, size=(num, 1, 1, *shape))
    return (bright + rng.uniform(-30, 30, size=(num, size, size, *shape))).astype(np.uint8)


def save_folder(folder, images):
    """Write images as PNGs that are listed in their order."""
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:05d}.png")
    return folder


@pytest.fixture(autouse=True)
def on_the_cpu():
    dist_util.setup_dist("cpu")


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(measuring, "PART", 4)


@pytest.fixture
def images(tmp_path):
    """A set of 11 images, and these themselves."""
    pixels = draw(11)
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    return open_images(tmp_path / "images.npz", "--sample"), pixels


def counting(see=see_little):
    """Return a network that counts the images it sees, and the list of the counts."""
    counts = []
    return make_tiny(see=lambda batch: counts.append(len(batch)) or see(batch)), counts


# -- networks --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """Weights made for the purpose, as a conversion to PyTorch holds them."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(
        converted({name: make_constant(name, shape) for name, shape in SHAPES.items()}), path
    )
    return path


def test_inception_sees_what_the_published_evaluator_sees(weights_file):
    """Through the extractor, in batches, the reference images give the reference numbers."""
    extractor = load_extractor("inception", str(weights_file))
    assert extractor.labels[extractor.distances["pooled"]] == "FID"
    assert extractor.labels[extractor.distances["spatial"]] == "sFID"
    with np.load(ROOT / "tests" / "reference" / "inception.npz") as npz:
        found = extractor(npz["images"], batch_size=4)
        expected = [npz[name] for name in ("pool3", "spatial", "softmax")]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * np.abs(other).max())
    assert {kind: getattr(found, kind).shape[1] for kind in extractor.widths} == extractor.widths


def test_what_inception_sees_is_known_by_its_name(monkeypatch):
    """Whatever the order in which the network returns it."""
    seen = SimpleNamespace(probabilities="p", spatial="s", pool_3="3", more=None)
    model = mock.Mock(return_value=seen, source="tiny.pb", digest="0" * 64)
    monkeypatch.setattr(features, "load_inception", lambda path: model)
    assert features.make_inception().see(None) == Features("3", "s", "p")


def test_efficientnet_sees_on_its_own():
    """No file is asked for, its distance is no FID, and no image sees its batch."""
    pytest.importorskip("efficientnet_lite_pytorch")
    extractor = load_extractor("efficientnet_lite0")
    assert extractor.labels[extractor.distances["pooled"]] == "FD (EfficientNet-Lite0)"
    assert not any("FID" in label or "fid" in key for key, label in extractor.labels.items())
    images = draw(3, size=20)
    found = extractor(images, batch_size=3)
    assert found.pooled.shape == (3, extractor.widths["pooled"]) and found.pooled.std() > 0.05
    assert found.spatial is None and found.probabilities is None
    alone = extractor(images[1:2], batch_size=1)
    np.testing.assert_allclose(alone.pooled, found.pooled[1:2], atol=1e-4)
    large = torch.from_numpy(draw(1, size=224))  # needs no resize; the means are those of training
    network = extractor.see.args[0]
    direct = network.extract_features((large.permute(0, 3, 1, 2) - 127.0) / 128).mean(dim=(2, 3))
    np.testing.assert_allclose(extractor(large.numpy(), 1).pooled, direct, atol=1e-4)
    assert extractor.identity == load_extractor("efficientnet_lite0").identity


def test_networks_that_cannot_be_had(monkeypatch):
    """A wrong name lists the right ones; a missing package tells how to get it."""
    with pytest.raises(ValueError, match="must be one of inception, efficientnet_lite0"):
        load_extractor("vgg")
    with pytest.raises(ValueError, match="--inception x.pb is of no use to --features eff"):
        load_extractor("efficientnet_lite0", "x.pb")
    real = builtins.__import__

    def importing(name, *arguments):
        if name.startswith("efficientnet"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(ValueError, match=r'pip install "guided-diffusion\[eval\]"'):
        load_extractor("efficientnet_lite0")


@pytest.mark.parametrize("name", EXTRACTORS)
def test_the_command_line_knows_the_networks(name):
    """Each name that the flag accepts is one of the networks', and each of theirs is accepted."""
    (flag,) = (f for f in fields(NetworkConfig) if f.name == "features")
    assert flag.metadata["check"](name) is None and name in flag.metadata["help"]


# -- features that are kept ------------------------------------------------------------------------


def test_features_are_kept_by_content(tmp_path):
    """The same pixels are never seen twice, whatever the batch; one changed pixel is."""
    extractor, counts = counting()
    pixels = draw(5)
    first = FeatureCache(str(tmp_path), extractor, 2).features(pixels)
    assert counts == [2, 2, 1]
    again = FeatureCache(str(tmp_path), extractor, 3).features(pixels.copy())
    assert counts == [2, 2, 1]
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    pixels[4, 7, 7, 2] ^= 1
    FeatureCache(str(tmp_path), extractor, 5).features(pixels)
    assert counts == [2, 2, 1, 5]
    FeatureCache(str(tmp_path), extractor, 5).features(pixels.reshape(5, 4, 16, 3))
    assert counts == [2, 2, 1, 5, 5]


def test_other_weights_have_other_features(tmp_path):
    """The hash of the network belongs to the key."""
    extractor, counts = counting()
    pixels = draw(2)
    FeatureCache(str(tmp_path), extractor, 2).features(pixels)
    other = Extractor(**vars(extractor) | {"digest": "1" * 64})
    FeatureCache(str(tmp_path), other, 2).features(pixels)
    assert counts == [2, 2]


def test_none_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(tmp_path))
    extractor, counts = counting()
    for folder in ("none", "none", None, None):
        FeatureCache(folder, extractor, 2).features(draw(2))
    assert counts == [2, 2, 2] and [path.name for path in tmp_path.iterdir()] == ["features"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-30],
        lambda content: content[:300] + bytes([content[300] ^ 1]) + content[301:],
        lambda content: b"no npz at all",
    ],
)
def test_a_damaged_file_is_made_anew(tmp_path, damage):
    """Cut short, a flipped bit, or another thing: the features are computed again, and kept."""
    extractor, counts = counting()
    cache, pixels = FeatureCache(str(tmp_path), extractor, 9), draw(3)
    first = cache.features(pixels)
    (path,) = tmp_path.rglob("*.npz")
    content = path.read_bytes()
    path.write_bytes(damage(content))
    np.testing.assert_array_equal(cache.features(pixels).pooled, first.pooled)
    assert counts == [3, 3] and path.read_bytes() == content


def test_files_of_other_things_are_not_believed(tmp_path):
    """A file with features of another number of images, or other types, is made anew."""
    extractor, counts = counting()
    cache, pixels = FeatureCache(str(tmp_path), extractor, 9), draw(3)
    cache.features(pixels)
    (path,) = tmp_path.rglob("*.npz")
    for wrong in (
        {"pooled": np.zeros((2, 6), np.float32)},
        {"pooled": np.zeros((3, 6))},
        {"x": [0]},
    ):
        np.savez(path, **wrong)
        assert cache.features(pixels).pooled.any()
    assert counts == [3] * 4


def test_a_disk_that_takes_nothing_is_told_of_once(tmp_path, capsys):
    """The features are there nevertheless."""
    (tmp_path / "file").touch()
    cache = FeatureCache(str(tmp_path / "file" / "folder"), make_tiny(), 2)
    for seed in (0, 1):
        assert cache.features(draw(2, seed=seed)).pooled.shape == (2, 6)
    assert capsys.readouterr().err.count("features are not kept in") == 1


def test_a_kill_leaves_no_half_features(tmp_path):
    """A run that dies while it writes leaves a file of another name, and the next one goes on."""
    extractor, counts = counting()
    pixels = draw(3)
    with (
        mock.patch("os.replace", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        FeatureCache(str(tmp_path), extractor, 9).features(pixels)
    assert not list(tmp_path.rglob("*.npz"))
    for _ in range(2):
        FeatureCache(str(tmp_path), extractor, 9).features(pixels)
    assert counts == [3, 3]


def test_what_nobody_asked_for_lately_makes_room(tmp_path):
    """The oldest files go until the rest fits; those of others stay, whatever they are called."""
    extractor, counts = counting()
    cache, sets = FeatureCache(str(tmp_path), extractor), [draw(2, seed=seed) for seed in range(3)]
    other = FeatureCache(str(tmp_path), Extractor(**vars(extractor) | {"digest": "1" * 64}))
    for network, pixels in [(cache, 2), (cache, 1), (other, 0), (cache, 0)]:
        network.features(sets[pixels])
        for path in tmp_path.rglob("*.npz"):
            os.utime(path, ns=(0, path.stat().st_mtime_ns - 10**12))
    strangers = [tmp_path / "a.npz", next(tmp_path.glob("*/")) / "mine.npz"]
    for path in strangers:
        path.write_bytes(b"0" * 10**6)
    sizes = {path.stat().st_size for path in tmp_path.glob("*/*.npz") if path not in strangers}
    assert len(sizes) == 1 and counts == [2] * 4
    cache.features(sets[2])  # the oldest, until it is asked for
    cache.trim(3 * sizes.pop())
    assert len([*tmp_path.glob("*/*.npz")]) == 3 + 1 and all(map(Path.exists, strangers))
    cache.features(sets[2]), cache.features(sets[0]), other.features(sets[0])
    assert counts == [2] * 4
    cache.features(sets[1])
    assert counts == [2] * 5


# -- one pass over a set ---------------------------------------------------------------------------


@pytest.mark.parametrize("part", [1, 4, 11, 100])
def test_a_pass_sees_each_image_once_and_in_order(images, tmp_path, monkeypatch, part):
    """Rows are those of the images, and moments those of the rows, however the set is cut."""
    monkeypatch.setattr(measuring, "PART", part)
    extractor, counts = counting()
    cache = FeatureCache("none", extractor, 3)
    seen = measuring.measure(images[0], cache, moments=("pooled", "spatial"), probabilities=True)
    direct = make_tiny()(images[1], 11)
    np.testing.assert_array_equal(seen.pooled, direct.pooled)
    np.testing.assert_array_equal(seen.probabilities, direct.probabilities)
    for kind in ("pooled", "spatial"):
        rows = getattr(direct, kind).astype(np.float64)
        np.testing.assert_allclose(seen.moments[kind].covariance(), np.cov(rows.T), atol=1e-12)
    assert sum(counts) == 11 and max(counts) <= 3


def test_what_is_not_wanted_is_not_kept(images):
    seen = measuring.measure(images[0], FeatureCache("none", make_tiny(), 3), moments=("spatial",))
    assert seen.probabilities is None and set(seen.moments) == {"spatial"}


def test_a_killed_pass_goes_on_where_it_was(images, tmp_path, small_parts):
    """What was seen before the kill is not seen again."""
    extractor, counts = counting()

    def see_twice(batch):
        if len(counts) == 2:
            raise KeyboardInterrupt
        return see_little(batch)

    dying = Extractor(
        **vars(extractor) | {"see": lambda b: see_twice(b) if counts.append(len(b)) is None else 0}
    )
    with pytest.raises(KeyboardInterrupt):
        measuring.measure(images[0], FeatureCache(str(tmp_path / "cache"), dying, 4))
    assert counts == [4, 4]
    counts.clear()
    measuring.measure(images[0], FeatureCache(str(tmp_path / "cache"), extractor, 4))
    assert counts == [4, 3]


@pytest.mark.parametrize("kind", Features._fields)
def test_only_what_is_finite_is_kept(tmp_path, kind):
    """Of all kinds of features: one that is not would be told of each time anew."""
    pixels = draw(2)

    def broken(batch):
        seen = see_little(batch)
        return seen._replace(**{kind: getattr(seen, kind) * torch.inf})

    FeatureCache(str(tmp_path), make_tiny(see=broken)).features(pixels)
    assert not list(tmp_path.rglob("*.npz"))
    FeatureCache(str(tmp_path), make_tiny()).features(pixels)
    assert len(list(tmp_path.rglob("*.npz"))) == 1


def test_a_network_that_yields_nan_is_told_of(images, tmp_path):
    """By the name of the set, and nothing of it is kept."""
    broken = make_tiny(see=lambda batch: Features(torch.full((len(batch), 6), torch.nan)))
    cache = FeatureCache(str(tmp_path / "cache"), broken, 4)
    with pytest.raises(
        ValueError, match="pooled features of --sample .*npz has 66 values that are"
    ):
        measuring.measure(images[0], cache, moments=("pooled",))
    assert not (tmp_path / "cache").exists()


def test_the_name_of_no_module_hides_another():
    """Programs here are run by path, so their folder comes first where modules are looked for."""
    names = {path.stem for path in (ROOT / "evaluations").glob("*.py")}
    assert not names & set(sys.stdlib_module_names)


def test_a_small_part_of_the_package_is_leant_on():
    """Ranks, flags, files and readers of images; no networks, no processes, no training."""
    found = set().union(
        *(imported_files(path.read_text()) for path in (ROOT / "evaluations").glob("*.py"))
    )
    assert found <= {"checkpoint_sets", "checkpoints", "data_sources", "dist_util"} | {
        "config", "downloads", "flag_checks", "flag_parsing", "image_decoding", "launchers",
        "npz_rows", "progress",
    }  # fmt: skip


def test_files_stand_in_layers():
    """A file imports only files that the README names before it, and the README names them all."""
    folder = ROOT / "evaluations"
    listed = (folder / "README.md").read_text().rpartition("```\n")[0].rpartition("```\n")[2]
    order = re.findall(r"(\w+)\.py", listed)
    assert set(order) == {path.stem for path in folder.glob("*.py")} - {"__init__"}
    for name in order:
        source = (folder / f"{name}.py").read_text()
        found = re.findall(r"^ *from (?:\.|evaluations)(\w*) import (.*)", source, re.M)
        names = {
            word for module, rest in found for word in ([module] if module else rest.split(", "))
        }
        assert names <= set(order[: order.index(name)]), name
