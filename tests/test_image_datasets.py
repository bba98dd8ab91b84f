"""guided_diffusion.image_datasets: which images and labels a training run sees."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_images import (
    WRITERS,
    assert_same,
    be_rank,
    grey_png,
    ids,
    load,
    noise_images,
    one_line_error,
    spoil,
    take,
    taken_by_ranks,
    write_csv,
    write_folder,
    write_zip,
)

from guided_diffusion import image_datasets, streams
from guided_diffusion.image_datasets import ImageDataset, add_low_res, find_images
from guided_diffusion.image_decoding import read_image, to_array


@pytest.fixture
def folder(tmp_path):
    """11 images with the grey values 0, 10, ..., 100 in file order; classes 0, 1, 2."""
    (tmp_path / "sub").mkdir()
    for k in range(11):
        where = tmp_path if k < 6 else tmp_path / "sub"
        grey_png(where / f"{k % 3}_{k:02d}.png", 10 * k)
    for value, path in enumerate(find_images(str(tmp_path))):
        grey_png(path, 10 * value)
    return str(tmp_path)


@pytest.fixture
def noisy(tmp_path):
    """11 images of noise, larger than needed, of the classes 0 to 10."""
    names = [f"{k:02d}_x.png" for k in range(11)]
    return write_folder(tmp_path / "noisy", names, noise_images(11, side=13))


AUGMENT = dict(random_crop=True, random_flip=True)
CHANCE = dict(**AUGMENT, class_cond=True, num_classes=11, label_dropout=0.4, seed=3)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Be rank 0 of 1, whatever launcher started the tests."""
    be_rank(monkeypatch, 0, 1)


# The order of a run


def test_ranks_share_one_run(noisy, monkeypatch):
    """Any number of ranks sees the same images, crops, flips and labels; others go on with it."""
    wanted = taken_by_ranks(monkeypatch, noisy, 1, 12, 4, **CHANCE)
    for world_size in (2, 3, 4):
        found = taken_by_ranks(monkeypatch, noisy, world_size, 12, 4, **CHANCE)
        assert_same(found, wanted)
    rest = taken_by_ranks(monkeypatch, noisy, 3, 6, 6, start=12, **CHANCE)
    assert_same(rest, (wanted[0][12:], wanted[1][12:]))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_seek_equals_having_come_there(noisy, num_workers):
    """Forward, back, after or before the first batch: bit for bit the same, chance included."""
    wanted = take(load(noisy, **CHANCE), 9)
    data = load(noisy, num_workers=num_workers, **CHANCE)
    data.seek(20)
    assert_same(take(data, 2), (wanted[0][20:28], wanted[1][20:28]))
    assert data.position == 28
    data.seek(3)  # no multiple of a batch
    assert_same(take(data, 3), (wanted[0][3:15], wanted[1][3:15]))
    data.close()
    assert_same(take(data, 1), (wanted[0][15:19], wanted[1][15:19]))
    data.close()


def test_each_epoch_shows_each_image_once(folder):
    """Batches are full and cross epochs; the orders of epochs differ."""
    data = load(folder, seed=1)
    shown = sum((ids(next(data)) for _ in range(11)), [])  # four epochs
    epochs = [tuple(shown[k : k + 11]) for k in range(0, 44, 11)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs) and len(set(epochs)) == 4


def test_deterministic_repeats_the_file_order(folder):
    """In file order, without leaving any image out at the end of an epoch."""
    data = load(folder, deterministic=True)
    assert sum((ids(next(data)) for _ in range(6)), []) == (list(range(11)) * 3)[:24]


def test_few_images_are_shown_more_than_once(folder):
    """A batch larger than the folder is full all the same, and a line says so."""
    lines = []
    images = ids(next(load(folder, batch_size=25, seed=0, report=lines.append)))
    assert sorted(images[:11]) == sorted(images[11:22]) == list(range(11)) and len(images) == 25
    assert len(lines) == 2 and "11 images" in lines[1] and "25" in lines[1]


def test_seeds_matter(noisy):
    """Another seed gives other images; the same one gives the same."""
    runs = [take(load(noisy, **{**CHANCE, "seed": seed}), 2)[0] for seed in (3, 4, 3)]
    assert torch.equal(runs[0], runs[2]) and not torch.equal(runs[0], runs[1])


def test_crops_flips_and_labels_have_streams_of_their_own(noisy):
    """Turning one kind of chance on or off leaves the others as they were."""
    wanted = take(load(noisy, **CHANCE), 6)
    assert torch.equal(take(load(noisy, **{**CHANCE, "label_dropout": 0}), 6)[0], wanted[0])
    centred = take(load(noisy, **{**CHANCE, "random_crop": False, "random_flip": False}), 6)
    assert torch.equal(centred[1], wanted[1]) and not torch.equal(centred[0], wanted[0])


def test_chance_follows_the_image_number(noisy):
    """Crop and flip of image k are those of a generator seeded from (seed, k), in any epoch."""
    data = load(
        noisy, batch_size=30, deterministic=True, random_crop=True, random_flip=True, seed=3
    )
    for k, found in enumerate(next(data)[0]):
        rng = random.Random(streams.derived_seed(3, k, streams.AUGMENT))
        image = read_image(find_images(noisy)[k % 11], "L")
        assert np.array_equal(found, to_array(image, 8, True, True, rng))


def test_torch_seed_fixes_the_run_if_no_seed_is_given(noisy):
    """As with the published loader, torch.manual_seed decides, for each call anew."""
    runs = []
    for _ in range(2):
        torch.manual_seed(7)
        runs += [take(load(noisy, **{**CHANCE, "seed": None}), 2)[0] for _ in range(2)]
    assert torch.equal(runs[0], runs[2]) and torch.equal(runs[1], runs[3])
    assert not torch.equal(runs[0], runs[1])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_iterating_leaves_global_generators_alone(noisy, num_workers):
    """Neither Python's, numpy's nor torch's generator moves, so that what else draws is fixed."""
    data = load(noisy, num_workers=num_workers, **CHANCE)

    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    take(data, 2)
    data.seek(1)
    take(data, 1)
    assert states() == before
    data.close()


# A single pass


@pytest.mark.parametrize("world_size", [1, 3, 16])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_once_covers_every_image_over_all_ranks(folder, monkeypatch, world_size, num_workers):
    """Each image is handed out once, to rank (position mod ranks), the last batch short."""
    seen = []
    for rank in range(world_size)[: 3 if num_workers else None]:
        be_rank(monkeypatch, rank, world_size)
        data = load(folder, once=True, num_workers=num_workers)
        found = [image for batch in data for image in ids(batch)]
        assert found == list(range(rank, 11, world_size))
        assert list(data) == []
        data.seek(0)
        assert [image for batch in data for image in ids(batch)] == found
        seen += found
    assert num_workers or sorted(seen) == list(range(11))


def test_once_neither_flips_nor_crops(noisy):
    """Scores do not depend on chance: random_flip, random_crop and the seed have no say."""
    chance = load(noisy, batch_size=11, once=True, random_flip=True, random_crop=True)
    plain = load(noisy, batch_size=11, deterministic=True, seed=5)
    assert torch.equal(next(chance)[0], next(plain)[0])


# Images and labels


def test_images_are_scaled_to_minus_one_and_one(tmp_path):
    """Black is -1 and white is 1, float32, channels first."""
    grey_png(tmp_path / "a_0.png", 0)
    grey_png(tmp_path / "b_0.png", 255)
    images, cond = next(load(str(tmp_path), batch_size=2, deterministic=True, in_channels=3))
    assert images.shape == (2, 3, 8, 8) and images.dtype == torch.float32 and cond == {}
    assert images[0].unique().tolist() == [-1] and images[1].unique().tolist() == [1]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_every_source_gives_the_same_batches(tmp_path, kind, num_workers):
    """Folder, zip, npz and LMDB: the same pixels, labels and classes, from a worker too."""
    images = noise_images(4)
    path = WRITERS[kind](tmp_path / "data", ["0_b.png", "1_a.png", "1_c.png", "2_d.png"], images)
    data = load(path, class_cond=True, deterministic=True, in_channels=3, num_workers=num_workers)
    for _ in range(2):
        found, y = take(data, 1)
        assert y.tolist() == [0, 1, 1, 2] and y.dtype == torch.int64
        wanted = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert data.classes == ["0", "1", "2"] and data.class_counts == [1, 2, 1]
    assert data.num_entries == 4
    data.close()


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_labels_from_folders_and_files(tmp_path, kind):
    """`labels` says where classes stand; a label follows its image through the shuffle."""
    names = ["cat/1.png", "cat/2.png", "dog/1.png"]
    images = np.stack([np.full((8, 8), 10 * k, np.uint8) for k in range(3)])
    path = WRITERS[kind](tmp_path / "x", names, images)
    table = write_csv(tmp_path / "labels.csv", zip(names, [2, 0, 1], strict=True))
    for labels, wanted in (("folder", {0: 0, 1: 0, 2: 1}), (table, {0: 2, 1: 0, 2: 1})):
        data = load(path, batch_size=3, class_cond=True, labels=labels, seed=1)
        images, y = take(data, 2)
        assert dict(zip(ids((images, None)), y.tolist(), strict=True)) == wanted
        assert data.classes == (["cat", "dog"] if labels == "folder" else ["0", "1", "2"])
    assert load(path, labels="folder").classes is None


def test_other_data_is_numbered_by_the_classes_of_training(folder, tmp_path_factory):
    """Validation images of some classes keep the numbers that these have in training."""
    few = tmp_path_factory.mktemp("val")
    grey_png(few / "2_x.png", 0)
    train = load(folder, class_cond=True)
    data = load(str(few), class_cond=True, classes=train.classes, flag="--val_data_dir")
    assert next(data)[1]["y"].tolist() == [2] * 4 and data.classes == ["0", "1", "2"]
    grey_png(few / "9_x.png", 0)
    message = one_line_error(
        lambda: load(str(few), class_cond=True, classes=train.classes, flag="--val_data_dir")
    )
    assert "--val_data_dir" in message and "'9'" in message


def test_labels_are_dropped_by_image_number(noisy):
    """Label k becomes num_classes if the stream of k says so: a share of the rate; 0 drops none."""
    plain = take(load(noisy, **{**CHANCE, "label_dropout": 0}), 50)[1]
    y = take(load(noisy, **CHANCE), 50)[1]
    drawn = torch.from_numpy(streams.uniform(3, range(200), streams.DROP_LABEL) < 0.4)
    assert torch.equal(y, torch.where(drawn, 11, plain))
    assert (plain < 11).all() and 50 < drawn.sum() < 110
    for missing in ({"class_cond": False}, {"num_classes": None}):
        message = one_line_error(lambda missing=missing: load(noisy, **{**CHANCE, **missing}))
        assert "--label_dropout" in message


@pytest.mark.parametrize("num_workers", [0, 1])
def test_prepare_sees_each_batch(folder, num_workers):
    """It runs where images are decoded; add_low_res gives means over areas."""
    prepare = partial(add_low_res, small_size=2)
    images, cond = next(load(folder, class_cond=True, prepare=prepare, num_workers=num_workers))
    assert set(cond) == {"y", "low_res"} and cond["low_res"].shape == (4, 1, 2, 2)
    means = images.reshape(4, 1, 2, 4, 2, 4).mean(dim=(3, 5))
    torch.testing.assert_close(cond["low_res"], means)


def test_report_gets_the_description(folder):
    """load_data says once what it has found: number, source, classes."""
    lines = []
    load(folder, class_cond=True, report=lines.append)
    assert lines == [f"11 images from folder {folder}, 3 classes: 0 (4), 1 (4), 2 (3)"]


def test_dataset_shards_images_and_classes_alike():
    """ImageDataset(…, shard, num_shards) takes every num_shards-th image and its class."""
    dataset = ImageDataset(8, list("abcdefg"), classes=[0, 1, 2, 3, 4, 5, 6], shard=1, num_shards=3)
    assert len(dataset) == 2 and dataset.local_images == ["b", "e"]
    assert dataset.local_classes == [1, 4]


def test_dataset_draws_from_the_global_generator(noisy):
    """As published, an ImageDataset of its own crops and flips by Python's `random`."""
    dataset = ImageDataset(8, find_images(noisy)[:1], classes=[5], random_crop=True)
    random.seed(1)
    first, again = dataset[0], dataset[0]
    random.seed(1)
    assert np.array_equal(dataset[0][0], first[0]) and not np.array_equal(again[0], first[0])
    assert first[1]["y"] == 5 and first[1]["y"].dtype == np.int64


# Workers


@pytest.mark.parametrize(
    "cores, environ, world_size, wanted",
    [(4, {}, 1, 4), (64, {}, 1, 8), (64, {}, 16, 4), (2, {}, 4, 1),
     (64, {"LOCAL_WORLD_SIZE": "16"}, 64, 4), (64, {"SLURM_NTASKS_PER_NODE": "32"}, 64, 2)],
)  # fmt: skip
def test_workers_follow_the_cores(monkeypatch, cores, environ, world_size, wanted):
    """The cores of the host, shared among its ranks, from 1 to 8."""
    for name in image_datasets.LOCAL_SIZES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert image_datasets.default_num_workers(world_size) == wanted


def workers_of_this_process():
    return {child.pid for child in multiprocessing.active_children()}


def test_workers_start_late_and_end(folder):
    """None before the first batch, none after close, seek, an error or the end of the stream."""
    before = workers_of_this_process()
    data = load(folder, num_workers=2)
    data.seek(5)
    assert workers_of_this_process() == before
    next(data)
    started = workers_of_this_process() - before
    assert len(started) == 2
    data.seek(0)
    assert workers_of_this_process() == before
    next(data)
    data.close()
    assert workers_of_this_process() == before


def test_workers_ignore_signals(folder):
    """A signal to all processes of a job leaves them at work: the main process decides."""
    data = load(folder, num_workers=1)
    wanted = [ids(next(data)) for _ in range(12)]
    data.seek(0)
    before = workers_of_this_process()
    found = [ids(next(data))]
    (pid,) = workers_of_this_process() - before
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(pid, number)
    assert found + [ids(next(data)) for _ in range(11)] == wanted
    data.close()


def test_a_dead_worker_is_told_in_one_line(folder):
    """If the system kills a worker, torch's error becomes one that says which flag to turn."""

    def killed():
        yield torch.zeros(1), {}, []
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. \nIt is ...")

    data = load(folder, num_workers=1)
    data._items = killed()
    next(data)
    message = one_line_error(lambda: next(data))
    assert "--num_workers 1" in message and "Bus error" in message and "or 0" in message


def test_a_program_ends_while_workers_are_alive(folder):
    """Python's end would wait for ever for workers that ignore SIGTERM."""
    code = (
        "from guided_diffusion.image_datasets import load_data\n"
        f"data = load_data(data_dir={folder!r}, batch_size=2, image_size=8, num_workers=1)\n"
        "print(next(data)[0].shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "") and "[2, 3, 8, 8]" in done.stdout


# Broken images


def test_bad_numbers_are_told(folder):
    """batch_size must be positive and in_channels 1 or 3."""
    assert "--batch_size" in one_line_error(lambda: load(folder, batch_size=0))
    assert "--in_channels" in one_line_error(lambda: load(folder, in_channels=4))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_broken_images_are_named(folder, num_workers):
    """One line with the path, from a worker process too, which torch would wrap in a traceback."""
    path = find_images(folder)[2]
    Path(path).write_bytes(b"no image")
    data = load(folder, batch_size=2, deterministic=True, num_workers=num_workers)
    before = workers_of_this_process()
    assert ids(next(data)) == [0, 1]
    for _ in range(2):
        message = one_line_error(lambda: next(data))
        assert repr(path) in message and "--skip_bad_images" in message
        assert workers_of_this_process() == before
    grey_png(path, 20)
    assert ids(next(data)) == [2, 3]
    data.close()


@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_skipped_images_are_replaced_by_the_next_good_one(tmp_path, write):
    """With its label, in the place of each broken image; also across the end of the data."""
    names = [f"{k}_x.png" for k in range(6)]
    images = np.stack([np.full((8, 8), 10 * k, np.uint8) for k in range(6)])
    # Zip: entries with an even number lie unpacked in it, so that these can be spoilt.
    bad = (2, 3, 5) if write is write_folder else (2, 4)
    path, lines = write(tmp_path / "x", names, images), []
    spoil(path, [names[k] for k in bad], images[list(bad)])
    data = load(
        path, batch_size=6, deterministic=True, class_cond=True,
        skip_bad_images=True, report=lines.append,
    )  # fmt: skip
    wanted = [0, 1, 4, 4, 4, 0] if write is write_folder else [0, 1, 3, 3, 5, 5]
    for _ in range(3):
        batch = next(data)
        assert ids(batch) == batch[1]["y"].tolist() == wanted
    told = [line for line in lines if line.startswith("skipped: ")]
    assert len(data.bad_images) == len(bad) == len(told)
    for k, line in zip(bad, told, strict=True):
        assert line.startswith(f"skipped: {path}/{names[k]} (") and line.endswith(")")


def test_skipping_is_the_same_for_any_ranks_and_workers(noisy, monkeypatch):
    """What takes the place of a broken image depends on the data alone."""
    for path in find_images(noisy)[3:5]:
        Path(path).write_bytes(b"")
    options = dict(**CHANCE, skip_bad_images=True)
    wanted = taken_by_ranks(monkeypatch, noisy, 1, 12, 3, **options)
    assert_same(taken_by_ranks(monkeypatch, noisy, 3, 12, 3, **options), wanted)
    assert_same(taken_by_ranks(monkeypatch, noisy, 1, 12, 3, num_workers=1, **options), wanted)
    rest = taken_by_ranks(monkeypatch, noisy, 2, 12, 2, start=12, **options)
    assert_same(rest, (wanted[0][12:], wanted[1][12:]))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_nothing_but_broken_images_is_an_error(folder, num_workers):
    """Skipping ends when every image was tried."""
    for path in find_images(folder):
        Path(path).write_bytes(b"no image")
    data = load(folder, skip_bad_images=True, num_workers=num_workers)
    message = one_line_error(lambda: next(data))
    assert f"--data_dir {folder!r}" in message and "none" in message and "11 images" in message
