"""guided_diffusion.image_datasets: which images and labels a training run sees."""

import io
import itertools
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion import dist_util, image_datasets
from guided_diffusion.image_datasets import (
    ImageDataset,
    center_crop_arr,
    describe,
    drop_labels,
    load_data,
    random_crop_arr,
)

REFERENCE = Path(__file__).parent / "reference" / "images.npz"


def grey_png(path, value, size=(8, 8)):
    """Write an image of one grey value, by which a test knows it again."""
    Image.new("L", size, value).save(path)


@pytest.fixture
def folder(tmp_path):
    """11 images with the grey values 0, 10, ..., 100 in file order; classes 0, 1, 2."""
    (tmp_path / "sub").mkdir()
    for k in range(11):
        where = tmp_path if k < 6 else tmp_path / "sub"
        grey_png(where / f"{k % 3}_{k:02d}.png", 10 * k)
    order = image_datasets.find_images(str(tmp_path))
    for value, path in enumerate(order):
        grey_png(path, 10 * value)
    return str(tmp_path)


def load(data_dir, **kwargs):
    """Call load_data with small defaults, in this process."""
    options = dict(batch_size=4, image_size=8, in_channels=1, num_workers=0, random_flip=False)
    return load_data(data_dir=data_dir, **{**options, **kwargs})


def ids(batch):
    """Return which of the images 0, 1, ... of `folder` a batch holds."""
    return ((batch[0].mean(dim=(1, 2, 3)) + 1) * 127.5 / 10).round().int().tolist()


def be_rank(monkeypatch, rank, world_size):
    monkeypatch.setattr(dist_util, "get_rank", lambda: rank)
    monkeypatch.setattr(dist_util, "get_world_size", lambda: world_size)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Be rank 0 of 1, whatever launcher started the tests."""
    be_rank(monkeypatch, 0, 1)


def one_line_error(call):
    """Return the message of the ValueError that `call` raises, which must be one line."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


# Crops


@pytest.mark.parametrize("size", [64, 200])
def test_center_crop_equals_the_published_one(size):
    """Within 1 of 255, since Pillow's resampling may differ between releases."""
    ref = np.load(REFERENCE)
    found = center_crop_arr(Image.fromarray(ref["source"]), size)
    np.testing.assert_allclose(found.astype(int), ref[f"center_crop_{size}"].astype(int), atol=1)


def test_random_crop_draws_as_the_published_one():
    """The same draws from Python's generator in the same order: 64, then 200, after seed 0."""
    ref = np.load(REFERENCE)
    random.seed(0)
    for size in (64, 200):
        found = random_crop_arr(Image.fromarray(ref["source"]), size)
        wanted = ref[f"random_crop_{size}"]
        np.testing.assert_allclose(found.astype(int), wanted.astype(int), atol=1)


def test_halving_averages_two_by_two_pixels():
    """An image of exactly twice the size, or four times, is reduced by averages alone."""
    arr = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    for factor in (2, 4):
        size = 32 // factor
        wanted = arr.reshape(size, factor, size, factor).mean(axis=(1, 3))
        found = center_crop_arr(Image.fromarray(arr), size)
        np.testing.assert_allclose(found, wanted, atol=2)  # rounds up to four times


@pytest.mark.parametrize("crop", [center_crop_arr, random_crop_arr])
@pytest.mark.parametrize("side", [(5, 9), (30, 7), (64, 64)])
def test_crops_have_the_asked_size(crop, side):
    """Small images are enlarged, in grey as in colour."""
    for mode, shape in (("L", (16, 16)), ("RGB", (16, 16, 3))):
        arr = crop(Image.new(mode, side), 16)
        assert arr.shape == shape and arr.dtype == np.uint8


# Decoding


def test_images_are_scaled_to_minus_one_and_one(tmp_path):
    """Black is -1 and white is 1, float32, channels first."""
    grey_png(tmp_path / "a_0.png", 0)
    grey_png(tmp_path / "b_0.png", 255)
    images, cond = next(load(str(tmp_path), batch_size=2, deterministic=True, in_channels=3))
    assert images.shape == (2, 3, 8, 8) and images.dtype == torch.float32 and cond == {}
    assert images[0].unique().tolist() == [-1] and images[1].unique().tolist() == [1]


def test_grey_decoding_weighs_colours_like_pillow(tmp_path):
    """in_channels 1 is Pillow's "L" conversion, 3 its "RGB" conversion."""
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(colours)
    image.save(tmp_path / "x.png")
    for channels, wanted in (
        (1, np.array(image.convert("L"))[None]),
        (3, np.moveaxis(colours, 2, 0)),
    ):
        dataset = ImageDataset(
            8, [str(tmp_path / "x.png")], random_flip=False, in_channels=channels
        )
        arr, _ = dataset[0]
        np.testing.assert_allclose((arr + 1) * 127.5, wanted, atol=1e-4)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_image_is_converted(tmp_path, mode, channels):
    """Bilevel, palette, alpha, CMYK and 16-bit files all become [C, 8, 8]."""
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    Image.new(mode, (8, 8)).save(path)
    assert ImageDataset(8, [str(path)], in_channels=channels)[0][0].shape == (channels, 8, 8)


def test_half_of_the_images_are_mirrored(tmp_path):
    """Flipping mirrors left and right, never top and bottom, about every other time."""
    arr = np.zeros((8, 8), np.uint8)
    arr[0, 0] = 255
    Image.fromarray(arr).save(tmp_path / "x.png")
    dataset = ImageDataset(8, [str(tmp_path / "x.png")], in_channels=1)
    random.seed(0)
    bright = Counter(divmod(int(dataset[0][0].argmax()), 8) for _ in range(400))
    assert set(bright) == {(0, 0), (0, 7)} and 150 < bright[0, 7] < 250


# Order, shards and labels


def test_files_are_found_in_order_in_subfolders(tmp_path):
    """Four extensions in any case; the entries of each folder in sorted order; nothing else."""
    for name in ["b.png", "a.JPG", "c.txt", "png", "sub/z.jpeg", "sub/deep.png/y.Gif"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = image_datasets._list_image_files_recursively(str(tmp_path))
    names = [os.path.relpath(path, tmp_path) for path in found]
    assert names == ["a.JPG", "b.png", "sub/deep.png/y.Gif", "sub/z.jpeg"]


def test_addresses_are_read_through_blobfile(tmp_path, monkeypatch):
    """A data_dir with "://" goes to blobfile: here a stand-in that maps mem:// to a folder."""
    import blobfile as bf

    (tmp_path / "x" / "sub").mkdir(parents=True)
    grey_png(tmp_path / "x" / "sub" / "a_1.png", 10)
    grey_png(tmp_path / "x" / "a_0.png", 0)

    def local(url):
        return url.replace("mem:/", str(tmp_path), 1)

    def local_bytes(url):
        return Path(local(url)).read_bytes()

    monkeypatch.setattr(bf, "listdir", lambda url: sorted(os.listdir(local(url)), reverse=True))
    monkeypatch.setattr(bf, "isdir", lambda url: os.path.isdir(local(url)))
    monkeypatch.setattr(bf, "join", lambda *parts: "/".join(parts))
    monkeypatch.setattr(bf, "BlobFile", lambda url, mode: io.BytesIO(local_bytes(url)))
    assert ids(next(load("mem://x", batch_size=2, deterministic=True))) == [0, 1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_once_covers_every_image_over_all_ranks(folder, monkeypatch, world_size, num_workers):
    """Each image is handed out once, to rank (position mod ranks), the last batch short."""
    seen = []
    for rank in range(world_size):
        be_rank(monkeypatch, rank, world_size)
        batches = list(load(folder, once=True, num_workers=num_workers))
        found = [image for batch in batches for image in ids(batch)]
        assert found == list(range(rank, 11, world_size))
        assert all(len(batch[0]) == 4 for batch in batches[:-1])
        seen += found
    assert sorted(seen) == list(range(11))


def test_once_neither_flips_nor_crops(tmp_path):
    """Scores do not depend on chance: random_flip and random_crop have no say."""
    arr = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    for k in range(8):
        Image.fromarray(arr).save(tmp_path / f"{k}.png")
    images, _ = next(
        load(str(tmp_path), batch_size=8, once=True, random_flip=True, random_crop=True)
    )
    assert (images == images[:1]).all()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_each_epoch_shows_no_image_twice(folder, monkeypatch, num_workers):
    """Shuffled batches are full, belong to the rank's shard, and come anew for ever."""
    be_rank(monkeypatch, 1, 2)  # images 1, 3, 5, 7, 9
    data = load(folder, batch_size=2, num_workers=num_workers)
    epochs = [sum((ids(next(data)) for _ in range(2)), []) for _ in range(10)]
    assert all(len(set(epoch)) == 4 for epoch in epochs)
    assert set(itertools.chain(*epochs)) == {1, 3, 5, 7, 9}
    assert len({tuple(epoch) for epoch in epochs}) > 3


def test_torch_seed_fixes_the_order(folder):
    """The same torch seed gives the same batches, flips in the worker included."""
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        data = load(folder, random_flip=True, random_crop=True, num_workers=1)
        runs.append(torch.stack([next(data)[0] for _ in range(6)]))
    assert torch.equal(*runs)


def test_deterministic_repeats_the_file_order(folder):
    """Full batches in file order, the rest of each epoch left out, as published."""
    data = load(folder, deterministic=True)
    assert [ids(next(data)) for _ in range(4)] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 2


def test_labels_number_the_sorted_names(tmp_path):
    """Names, not paths, are sorted as text; a label follows its image through the shuffle."""
    (tmp_path / "0").mkdir()
    for k, name in enumerate(["0/zebra_1", "ant_1", "10_x_y", "9_x", "ant_2"]):
        grey_png(tmp_path / f"{name}.png", 10 * k)
    images, cond = next(load(str(tmp_path), batch_size=5, class_cond=True, num_classes=4))
    assert cond["y"].dtype == torch.int64
    by_image = dict(zip(ids((images, cond)), cond["y"].tolist(), strict=True))
    assert by_image == {0: 3, 1: 2, 2: 0, 3: 1, 4: 2}


def test_dataset_shards_images_and_classes_alike():
    """ImageDataset(…, shard, num_shards) takes every num_shards-th image and its class."""
    dataset = ImageDataset(8, list("abcdefg"), classes=[0, 1, 2, 3, 4, 5, 6], shard=1, num_shards=3)
    assert len(dataset) == 2
    assert dataset.local_images == ["b", "e"] and dataset.local_classes == [1, 4]


def test_describe_counts_classes_in_one_line():
    """The line shows number, name and count, and cuts a long list short."""
    paths = ["x/cat_1.png", "x/cat_2.png", "x/ant_1.png"]
    assert describe(paths) == "3 images"
    assert describe(paths, class_cond=True) == "3 images, 2 classes: 0 = ant (1), 1 = cat (2)"
    digits = [f"{k}_0.png" for k in range(3)]
    assert describe(digits, True) == "3 images, 3 classes: 0 (1), 1 (1), 2 (1)"
    assert describe([f"n{k:04d}_0.png" for k in range(1000)], True).endswith("11 = n0011 (1), ...")


def test_report_gets_the_description(folder):
    """load_data describes what it has found to its caller, once."""
    lines = []
    load(folder, class_cond=True, report=lines.append)
    assert lines == ["11 images, 3 classes: 0 (4), 1 (4), 2 (3)"]


# The null class


def test_labels_are_dropped_at_the_rate():
    """A share `rate` of the labels becomes the null class; the others stay as they are."""
    y = torch.arange(10).repeat(1000)
    torch.manual_seed(0)
    ((images, cond),) = drop_labels([(torch.zeros(1), {"y": y})], 0.1, 10)
    dropped = cond["y"] == 10
    assert abs(dropped.float().mean().item() - 0.1) < 0.01
    assert torch.equal(cond["y"][~dropped], y[~dropped])
    assert cond["y"].dtype == torch.int64 and images.shape == (1,)


def test_rate_0_changes_nothing():
    """At rate 0 the data passes through untouched and no random number is drawn."""
    data = [(torch.zeros(1), {"y": torch.zeros(4, dtype=torch.int64)})]
    state = torch.get_rng_state()
    assert drop_labels(data, 0.0, 10) is data
    assert torch.equal(state, torch.get_rng_state())


# Errors, each one line that names flag, value and remedy, before the first batch where possible


def test_missing_folders_are_named(tmp_path):
    """No folder, no such folder, a file, a folder without images."""
    assert "--data_dir" in one_line_error(lambda: load(""))
    message = one_line_error(lambda: load("/no/such/folder"))
    assert "--data_dir '/no/such/folder' does not exist" in message
    (tmp_path / "notes.txt").touch()
    assert "is a file" in one_line_error(lambda: load(str(tmp_path / "notes.txt")))
    message = one_line_error(lambda: load(str(tmp_path)))
    assert str(tmp_path) in message and ".jpg, .jpeg, .png, .gif" in message


@pytest.mark.parametrize("world_size, batch_size", [(1, 12), (2, 6), (12, 1)])
def test_too_few_images_are_told(folder, monkeypatch, world_size, batch_size):
    """A rank that cannot fill a batch would wait for ever; the error says so at once."""
    be_rank(monkeypatch, 0, world_size)
    message = one_line_error(lambda: load(folder, batch_size=batch_size))
    assert f"--batch_size {batch_size}" in message and "11 images" in message
    assert (f"{world_size} ranks" in message) == (world_size > 1)


def test_bad_numbers_are_told(folder):
    """batch_size must be positive and in_channels 1 or 3."""
    assert "--batch_size" in one_line_error(lambda: load(folder, batch_size=0))
    assert "--in_channels" in one_line_error(lambda: load(folder, in_channels=4))


def test_file_names_must_give_classes(tmp_path):
    """Under class_cond a name without "_" would make every file its own class."""
    for k in range(4):
        grey_png(tmp_path / f"{k}.png", k)
    next(load(str(tmp_path)))
    message = one_line_error(lambda: load(str(tmp_path), class_cond=True))
    assert "--class_cond" in message and "4 of 4" in message and "0.png" in message


def test_classes_must_not_outnumber_num_classes(folder):
    """Otherwise a label would index beyond the embedding, deep inside the network."""
    message = one_line_error(lambda: load(folder, class_cond=True, num_classes=2))
    assert "--num_classes 2" in message and "--num_classes 3" in message
    next(load(folder, class_cond=True, num_classes=3))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("damage", ["empty", "text", "cut.png", "cut.jpg"])
def test_broken_images_are_named(tmp_path, damage, num_workers):
    """One line with the path, from a worker process too, which torch would wrap in a traceback."""
    path = tmp_path / ("x_0.jpg" if damage == "cut.jpg" else "x_0.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    contents = {"empty": b"", "text": b"not an image"}
    path.write_bytes(contents.get(damage, whole[: len(whole) // 2]))
    data = load(str(tmp_path), batch_size=1, num_workers=num_workers)
    message = one_line_error(lambda: next(data))
    assert str(path) in message and "repair or remove" in message
