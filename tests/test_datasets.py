"""The converters in datasets/ and the judge in benchmarks/, on small data made here."""

import gzip
import importlib.util
import io
import struct
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]


def load_program(path):
    """Import a program that is no part of the package."""
    name = Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


fashion = load_program("datasets/fashion_mnist.py")
lsun = load_program("datasets/lsun_bedroom.py")
judging = load_program("benchmarks/fashion_classifier.py")


def idx(array):
    """Encode unsigned bytes as IDX: two zeros, type 8, the number of dimensions, the dimensions."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_source(folder, count=12, packed=True):
    """Write four small IDX files; return the images [N, 28, 28] and labels [N] of both splits."""
    folder.mkdir(exist_ok=True)
    rng, data = np.random.default_rng(0), {}
    for split, (prefix, _) in fashion.SPLITS.items():
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        data[split] = images, labels
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            path = folder / f"{prefix}-{name}-ubyte"
            if packed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(idx(array)))
            else:
                path.write_bytes(idx(array))
    return data


@pytest.fixture
def small_splits(monkeypatch):
    """Let Fashion-MNIST have 12 images a split."""
    monkeypatch.setattr(fashion, "SPLITS", {"train": ("train", 12), "test": ("t10k", 12)})


def fail(program, capsys, *argv):
    """Run a program that must fail; return its one line on stderr."""
    assert program.main([str(word) for word in argv]) != 0
    lines = capsys.readouterr().err.strip().split("\n")
    last = lines[-1].split("\r")[-1]  # what a progress bar wrote comes before
    assert "error: " in last
    return last


# Fashion-MNIST


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_survive_the_round_trip(tmp_path, small_splits, packed):
    """Every PNG is grey, equals its image, and is named by its label and position."""
    data = write_source(tmp_path / "idx", packed=packed)
    assert fashion.main([str(tmp_path / "out"), "--source", str(tmp_path / "idx")]) == 0
    for split, (images, labels) in data.items():
        files = sorted((tmp_path / "out" / split).iterdir(), key=lambda p: p.stem.split("_")[1])
        names = [f"{label}_{k:05d}.png" for k, label in enumerate(labels)]
        assert [path.name for path in files] == names
        found = [Image.open(path) for path in files]
        assert {image.mode for image in found} == {"L"}
        np.testing.assert_array_equal(np.stack([np.array(image) for image in found]), images)


def test_conversion_goes_on_where_it_stopped(tmp_path, small_splits, monkeypatch):
    """An interrupted run leaves no folder under its name, the next one writes only the rest."""
    write_source(tmp_path / "idx")
    command = [str(tmp_path / "out"), "--source", str(tmp_path / "idx"), "--split", "train"]
    replace, written = fashion.os.replace, []

    def stop_at_5(source, target):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(target)
        replace(source, target)

    monkeypatch.setattr(fashion.os, "replace", stop_at_5)
    with pytest.raises(KeyboardInterrupt):
        fashion.main(command)
    assert not (tmp_path / "out" / "train").exists()
    monkeypatch.setattr(fashion.os, "replace", replace)
    early = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/train.partial").iterdir()}
    assert fashion.main(command) == 0
    final = list((tmp_path / "out" / "train").iterdir())
    assert len(final) == 12 and not (tmp_path / "out/train.partial").exists()
    kept = sum(
        early.get(tmp_path / "out/train.partial" / p.name) == p.stat().st_mtime_ns for p in final
    )
    assert kept == 5
    assert fashion.main(command) == 0  # a third run finds all in place
    assert len(list((tmp_path / "out" / "train").iterdir())) == 12


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda raw: None, "holds no t10k-images-idx3-ubyte.gz"),
        (lambda raw: gzip.compress(raw)[:-100], "not a whole gzip file"),
        (lambda raw: gzip.compress(b"<html>not found</html>"), "no IDX file"),
        (lambda raw: gzip.compress(raw[:-1]), "announces 9,408 values, it holds 9,407"),
        (lambda raw: gzip.compress(raw[:9]), "is broken"),
        (lambda raw: gzip.compress(idx(np.zeros((11, 28, 28)))), "not (12, 28, 28)"),
        (lambda raw: gzip.compress(idx(np.zeros((12, 27, 28)))), "not (12, 28, 28)"),
    ],
)
def test_a_broken_source_writes_nothing(tmp_path, small_splits, capsys, damage, words):
    """One line with the remedy, and no folder, even if only the second split is broken."""
    write_source(tmp_path / "idx")
    path = tmp_path / "idx" / "t10k-images-idx3-ubyte.gz"
    broken = damage(gzip.decompress(path.read_bytes()))
    path.unlink() if broken is None else path.write_bytes(broken)
    message = fail(fashion, capsys, tmp_path / "out", "--source", tmp_path / "idx")
    assert words in message
    assert "apt install dataset-fashion-mnist" in message and fashion.HOMEPAGE in message
    assert not (tmp_path / "out").exists()


def test_labels_must_fit(tmp_path, small_splits, capsys):
    """As many labels as images, from 0 to 9."""
    write_source(tmp_path / "idx")
    path = tmp_path / "idx" / "train-labels-idx1-ubyte.gz"
    for labels, words in ((np.zeros(11), "for 12 images"), (np.full(12, 10), "the label 10")):
        path.write_bytes(gzip.compress(idx(labels)))
        assert words in fail(fashion, capsys, tmp_path / "out", "--source", tmp_path / "idx")


def test_an_incomplete_folder_is_not_overwritten(tmp_path, small_splits, capsys):
    """A folder that holds something else is the user's to remove."""
    write_source(tmp_path / "idx")
    (tmp_path / "out" / "train").mkdir(parents=True)
    assert "remove it" in fail(fashion, capsys, tmp_path / "out", "--source", tmp_path / "idx")
    (tmp_path / "file").touch()
    assert "OUT_DIR" in fail(fashion, capsys, tmp_path / "file", "--source", tmp_path / "idx")


# LSUN


@pytest.fixture
def database(tmp_path):
    """An LMDB of three webp images, of which the second is wide; their pixels."""
    lmdb = pytest.importorskip("lmdb")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (32, side, 3), dtype=np.uint8) for side in (32, 48, 32)]
    with lmdb.open(str(tmp_path / "lmdb")) as env, env.begin(write=True) as transaction:
        for k, image in enumerate(images):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "webp", lossless=True)
            transaction.put(b"key%d" % k, file.getvalue())
    return tmp_path / "lmdb", images


def test_lsun_images_are_cropped_and_box_resized(tmp_path, database):
    """The centred square, box-resized: halving averages 2 x 2 pixels, rounded twice."""
    path, images = database
    for _ in range(2):
        assert lsun.main([str(path), str(tmp_path / "out"), "--image-size", "16"]) == 0
        names = sorted(p.name for p in (tmp_path / "out").iterdir())
        assert names == [f"bedroom_{k:07d}.png" for k in range(3)]
    for name, image in zip(names, images, strict=True):
        start = (image.shape[1] - 32) // 2
        square = image[:, start : start + 32].astype(float)
        wanted = square.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
        np.testing.assert_allclose(np.array(Image.open(tmp_path / "out" / name)), wanted, atol=1.01)


def test_lsun_errors_are_one_line(tmp_path, database, capsys, monkeypatch):
    """No database, a broken image, no lmdb package."""
    path, _ = database
    assert "data.mdb" in fail(lsun, capsys, tmp_path / "none", tmp_path / "out")
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "data.mdb").write_bytes(b"junk" * 5000)
    assert "cannot be read" in fail(lsun, capsys, tmp_path / "junk", tmp_path / "out")
    import lmdb

    with lmdb.open(str(path)) as env, env.begin(write=True) as transaction:
        transaction.put(b"key1", b"no image")
    assert "entry 1" in fail(lsun, capsys, path, tmp_path / "out")
    assert "--image-size" in fail(lsun, capsys, path, tmp_path / "out", "--image-size", 0)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    assert "pip install lmdb" in fail(lsun, capsys, path, tmp_path / "out")


# The judge


@pytest.fixture(scope="module")
def toy():
    """Images [100, 28, 28, 1] of ten classes that differ in where they are bright; labels."""
    rng = np.random.default_rng(0)
    labels = np.arange(100) % 10
    images = rng.integers(0, 60, (100, 28, 28, 1), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 5, 4:24] += 190
    return images, labels


@pytest.fixture(scope="module")
def judge(toy):
    return judging.train(*toy, num_epochs=7, batch_size=20)


def test_judge_learns_and_survives_its_file(judge, toy, tmp_path):
    """A saved judge, read back, sees what it saw before: here the right labels."""
    judging.save(judge, tmp_path / "judge.pt")
    again = judging.load_judge(tmp_path / "judge.pt")
    np.testing.assert_array_equal(judging.predict(judge, toy[0]), judging.predict(again, toy[0]))
    assert judging.accuracy(again, *toy) > 0.9


def test_judge_training_is_a_function_of_its_seed(toy):
    """Two runs with one seed end in the same weights."""
    runs = [judging.train(*toy, num_epochs=1, batch_size=50, seed=3).state_dict() for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_diversity_is_one_for_real_and_zero_for_copies(judge, toy):
    """Real images are as diverse as themselves; copies of one image per label are not at all."""
    images, labels = toy
    assert judging.diversity(judge, images, labels, images, labels) == pytest.approx(1)
    copies = images[labels]  # the first ten images have the labels 0 to 9
    assert judging.diversity(judge, copies, labels, images, labels) == pytest.approx(0, abs=1e-5)


def test_mean_distance_counts_each_pair_once():
    """Equal to a loop over all pairs."""
    points = np.random.default_rng(0).standard_normal((7, 3))
    pairs = [np.linalg.norm(points[i] - points[j]) for i in range(7) for j in range(i)]
    assert judging.mean_distance(points) == pytest.approx(np.mean(pairs))


def test_judge_errors_are_one_line(judge, tmp_path, capsys):
    """No judge, a broken judge, broken samples, samples of another size, no data."""
    path = tmp_path / "judge.pt"
    npz = tmp_path / "samples.npz"
    assert "train it" in fail(judging, capsys, "--judge", path, "--score", npz)
    path.write_bytes(b"junk")
    assert "holds no judge" in fail(judging, capsys, "--judge", path, "--score", npz)
    judging.save(judge, path)
    assert "no npz file" in fail(judging, capsys, "--judge", path, "--score", npz)
    np.savez(npz, np.zeros((2, 8, 8, 3), np.uint8), np.zeros(2, np.int64))
    assert "[N, 28, 28, 1]" in fail(judging, capsys, "--judge", path, "--score", npz)
    assert "--judge" in fail(judging, capsys, "--out", path, "--score", npz)
    assert "does not exist" in fail(judging, capsys, "--data_dir", tmp_path / "none")


@pytest.fixture
def guidance_table(monkeypatch):
    """The program that compares guidance scales, with the judge's module as it is here."""
    monkeypatch.setitem(sys.modules, "fashion_classifier", judging)
    return load_program("benchmarks/guidance_table.py")


def labelled_folder(folder, images, labels):
    """Write images [N, 28, 28, 1] as the PNGs that the judge compares with."""
    folder.mkdir()
    for k, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(image[..., 0]).save(folder / f"{label}_{k:05d}.png")
    return folder


def test_both_programs_score_with_the_judge_they_are_given(
    judge, toy, tmp_path, capsys, guidance_table, monkeypatch
):
    """--judge names the file to load: real images as samples are as diverse as real ones."""
    judging.save(judge, tmp_path / "j.pt")
    test, npz = labelled_folder(tmp_path / "test", *toy), tmp_path / "samples.npz"
    np.savez(npz, *toy)
    options = ["--judge", str(tmp_path / "j.pt")]
    assert judging.main([*options, "--score", str(npz), "--data_dir", str(tmp_path)]) == 0
    assert "diversity 1.000" in capsys.readouterr().out
    monkeypatch.setattr(guidance_table, "draw", lambda scale, args: npz)
    assert guidance_table.main([*options, "--test_dir", str(test), "--scales", "0,2"]) == 0
    rows = capsys.readouterr().out.strip().split("\n")
    assert len(rows) == 4 and all(row.endswith("| 1.000 |") for row in rows[2:])


def test_guidance_table_errors_are_one_line(
    judge, toy, tmp_path, capsys, guidance_table, monkeypatch
):
    """No judge, no test images, a launcher that is not there, and a sampler that fails."""
    path = tmp_path / "j.pt"
    assert "train it" in fail(guidance_table, capsys, "--judge", path)
    judging.save(judge, path)
    none = tmp_path / "none"
    assert "does not exist" in fail(guidance_table, capsys, "--judge", path, "--test_dir", none)
    test = labelled_folder(tmp_path / "test", *toy)
    options = ("--judge", path, "--test_dir", test, "--out", tmp_path / "out")
    for error, words in (
        (FileNotFoundError(2, "No such file or directory", "mpiexec"), "mpiexec"),
        (subprocess.CalledProcessError(3, ["mpiexec"]), "exit code 3"),
    ):
        monkeypatch.setattr(guidance_table.subprocess, "run", mock.Mock(side_effect=error))
        assert words in fail(guidance_table, capsys, *options)
