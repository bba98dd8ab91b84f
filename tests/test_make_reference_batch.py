"""Reference batches: layout, the training crop, statistics of all; kills, ranks, other flags."""

import os
import signal
import subprocess
import time
import weakref
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from scripting import environment, files_below, launch_command
from test_evaluator import TINY, run_here, run_there, scores_of, tiny
from test_features import counting, draw, make_tiny, save_folder

from evaluations import (
    evaluator,
    image_sets,
    make_reference_batch,
    measuring,
    metrics,
    reference_batch,
)
from guided_diffusion import checkpoint_sets
from guided_diffusion.image_datasets import center_crop_arr, load_data


@pytest.fixture
def folder(tmp_path):
    """A folder of 29 images of different sizes and shapes, some grey."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(29):
        shape = (*rng.integers(9, 30, size=2), *([3] * (i % 4 != 0)))
        pixels = (rng.uniform(30, 220) + rng.uniform(-30, 30, size=shape)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture
def small_sections(monkeypatch):
    """Parts of 4 images, and sections of 8."""
    monkeypatch.setattr(measuring, "PART", 4)
    monkeypatch.setattr(reference_batch, "SECTION", 8)


def cropped(folder, size):
    """Return all images of a folder as training crops them."""
    paths = sorted(folder.iterdir())
    return np.stack([center_crop_arr(Image.open(path).convert("RGB"), size) for path in paths])


def arguments(folder, out, **more):
    flags = {"data_dir": folder, "image_size": 8, "num_images": 10, "batch_size": 3} | more
    return [*(str(word) for name in flags for word in (f"--{name}", flags[name])), out]


def make(folder, out, **more):
    """Make a reference batch in this process."""
    return run_here(make_reference_batch.main, *arguments(folder, out, **more))


# -- what is in it ---------------------------------------------------------------------------------


def test_layout_and_content(folder, tmp_path, small_sections):
    """As published: images of uint8, evenly spread; statistics, float64, of all images."""
    done = make(folder, tmp_path / "batch.npz")
    assert done.code == 0, done.err
    assert f"saved {tmp_path}/batch.npz: arr_0 [10, 8, 8, 3]" in done.out
    with np.load(tmp_path / "batch.npz") as npz:
        batch = dict(npz)
    assert list(batch) == ["arr_0", "mu", "sigma", "mu_s", "sigma_s"]
    images = cropped(folder, 8)
    np.testing.assert_array_equal(batch["arr_0"], images[[29 * i // 10 for i in range(10)]])
    seen = make_tiny()(images, 100)
    for suffix, kind in {"": "pooled", "_s": "spatial"}.items():
        mu, sigma = metrics.mean_and_covariance(getattr(seen, kind))
        assert batch[f"mu{suffix}"].dtype == batch[f"sigma{suffix}"].dtype == np.float64
        np.testing.assert_allclose(batch[f"mu{suffix}"], mu, rtol=1e-12)
        np.testing.assert_allclose(batch[f"sigma{suffix}"], sigma, rtol=0, atol=1e-12)
    assert files_below(tmp_path) - files_below(folder.parent) == set()
    assert not (tmp_path / "batch.npz.parts").exists()


def test_crops_are_those_of_training(folder, tmp_path):
    """load_data, unflipped, yields the same pixels."""
    assert make(folder, tmp_path / "batch.npz", num_images=29).code == 0
    flags = {"data_dir": str(folder), "batch_size": 29, "image_size": 8, "num_workers": 0}
    data = load_data(**flags, once=True, random_flip=False)
    images, _ = next(data)
    pixels = ((images.permute(0, 2, 3, 1) + 1) * 127.5).round().numpy().astype(np.uint8)
    with np.load(tmp_path / "batch.npz") as npz:
        np.testing.assert_array_equal(npz["arr_0"], pixels)


def test_the_evaluator_takes_it(folder, tmp_path):
    """Against all of its own images the distances are 0, from stored statistics."""
    assert make(folder, tmp_path / "batch.npz").code == 0
    whole = save_folder(tmp_path / "cropped", cropped(folder, 8))
    done = run_here(evaluator.main, tmp_path / "batch.npz", whole, "--cache_dir", "none")
    found = scores_of(done.out)
    assert "statistics: pooled stored, spatial stored" in done.err
    assert found["FID"] == pytest.approx(0, abs=1e-9) == found["sFID"]
    assert found["Recall"] == 1


def test_an_npz_can_be_the_source_and_few_images_are_all_taken(tmp_path):
    """Images of the right size stay as they are; of fewer than are wanted all are in the batch."""
    pixels = draw(7)
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    assert make(tmp_path / "images.npz", tmp_path / "batch.npz", num_images=10_000).code == 0
    with np.load(tmp_path / "batch.npz") as npz:
        np.testing.assert_array_equal(npz["arr_0"], pixels)


def test_statistics_of_another_network_say_so(tmp_path):
    """The npz names it; the evaluator uses them with that network and no other."""
    pytest.importorskip("efficientnet_lite_pytorch")
    np.savez(tmp_path / "images.npz", arr_0=draw(5))
    batch = tmp_path / "batch.npz"
    lite = {"features": "efficientnet_lite0", "device": "cpu"}
    done = make(tmp_path / "images.npz", batch, **lite)
    assert done.code == 0, done.err
    with np.load(batch) as npz:
        assert list(npz) == ["arr_0", "mu", "sigma", "features"] and npz["mu"].shape == (1280,)
    both = [batch, tmp_path / "images.npz", "--cache_dir", "none"]
    same = run_here(evaluator.main, *both, "--features", "efficientnet_lite0")
    assert scores_of(same.out)["FD (EfficientNet-Lite0)"] == pytest.approx(0, abs=1e-6)
    assert "reference: 5 images 8x8" in same.err and "pooled stored" in same.err
    other = run_here(evaluator.main, *both)
    assert other.code == 0 and "holds statistics of 'efficientnet_lite0' features" in other.err
    assert "stored" not in other.err


# -- kills and ranks -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_images", [1, 255, 256, 9999, 10_000, 50_000, 10**6])
def test_sections_cover_all_images_in_order(num_images):
    """Each image is in one section, none is empty, and there are not too many."""
    sections = reference_batch.divide(num_images)
    parts = [part for section in sections for part in section]
    assert parts == measuring.parts_of(num_images) and all(sections)
    assert [i for part in parts[:3] for i in part] == list(range(min(num_images, 768)))
    assert parts[-1].stop == num_images and len(sections) <= 32


@pytest.mark.parametrize("num_ranks", range(1, 17))
def test_no_rank_waits_long_for_another(num_ranks):
    """Of 10,000 images each of up to 16 ranks has some, and of up to 8 none much over its share."""
    sections = reference_batch.divide(10_000)
    loads = [
        sum(len(part) for section in sections[rank::num_ranks] for part in section)
        for rank in range(num_ranks)
    ]
    assert min(loads) > 0
    assert num_ranks > 8 or max(loads) < 1.4 * 10_000 / num_ranks


def test_killed_and_started_again_the_bytes_are_the_same(folder, tmp_path):
    """SIGKILL while a section is half seen, in a process of its own: nothing is left over."""
    command = ("make_reference_batch", *arguments(folder, "batch.npz", device="cpu"))
    alone = run_there(tiny(*command[:-1], "alone.npz"), tmp_path)
    assert alone.returncode == 0, alone.stderr
    process = subprocess.Popen(
        tiny(*command, delay=0.15), cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL
    )
    parts = tmp_path / "batch.npz.parts"
    deadline = time.monotonic() + 60
    while not (parts / "section01.npz").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "batch.npz").exists() and (parts / "section01.npz").exists()
    first = (parts / "section00.npz").stat().st_mtime_ns
    assert first <= (parts / "section01.npz").stat().st_mtime_ns
    done = run_there(tiny(*command), tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "batch.npz").read_bytes() == (tmp_path / "alone.npz").read_bytes()
    assert not parts.exists()


@pytest.mark.parametrize("moment", [1, 2, 5, 9, 10, 11])
def test_any_moment_is_good_for_a_kill(folder, tmp_path, monkeypatch, small_sections, moment):
    """Cut off at the n-th replacement of a file, the last of which is that of the npz itself."""
    monkeypatch.setattr(reference_batch, "SAVE_EVERY", 0)
    assert make(folder, tmp_path / "alone.npz").code == 0
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) == moment:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        assert make(folder, tmp_path / "batch.npz").code == 130
    assert not (tmp_path / "batch.npz").exists()
    done = make(folder, tmp_path / "batch.npz")
    assert done.code == 0, done.err
    assert (tmp_path / "batch.npz").read_bytes() == (tmp_path / "alone.npz").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"images", "alone.npz", "batch.npz"}


def test_a_run_that_was_killed_after_the_last_step(folder, tmp_path):
    """Then only the folder is to be removed; without it the npz is someone else's."""
    out = tmp_path / "batch.npz"
    assert make(folder, out).code == 0
    content = out.read_bytes()
    (tmp_path / "batch.npz.parts").mkdir()
    done = make(folder, out)
    assert done.code == 0 and "is complete" in done.out
    assert not (tmp_path / "batch.npz.parts").exists() and out.read_bytes() == content
    done = make(folder, out)
    assert done.code == 1 and "batch.npz exists: choose another name" in done.err
    assert out.read_bytes() == content


def test_two_ranks_make_the_same_bytes(folder, tmp_path):
    """Sections do not depend on ranks, and are merged in their order."""
    words = arguments(folder, "alone.npz", device="cpu")
    alone = run_there(tiny("make_reference_batch", *words), tmp_path)
    assert alone.returncode == 0, alone.stderr
    program = tmp_path / "tiny.py"
    program.write_text(TINY)
    words = ["make_reference_batch", 4, 0, *words[:-1], "two.npz"]
    done = run_there(launch_command("mpiexec", program, words), tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "alone.npz").read_bytes()
    assert done.stdout.count("saved ") == 1


def test_sections_are_not_in_memory_together(folder, tmp_path, monkeypatch):
    """Neither at the end nor when a run goes on: of seven sections one, and what they amount to."""
    monkeypatch.setattr(measuring, "PART", 4)
    monkeypatch.setattr(reference_batch, "SECTION", 4)
    with monkeypatch.context() as patch:
        patch.setattr(reference_batch, "_write", mock.Mock(side_effect=KeyboardInterrupt))
        assert make(folder, tmp_path / "batch.npz").code == 130
    assert len(list((tmp_path / "batch.npz.parts").glob("section*.npz"))) == 7
    alive, most = weakref.WeakSet(), []

    class Counted(reference_batch.Moments):
        def __init__(self, dim):
            super().__init__(dim)
            alive.add(self)
            most.append(len(alive))

    monkeypatch.setattr(reference_batch, "Moments", Counted)
    assert make(folder, tmp_path / "batch.npz").code == 0
    assert len(most) >= 14 and max(most) <= 2


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_size": 4}, "other image_size (8 there, 4 here)"),
        ({"num_images": 9}, "other num_images"),
        ({"batch_size": 2}, "other batch_size"),
        ({"data_dir": "fewer"}, "other images"),
        ({"data_dir": "renamed"}, "other names"),
    ],
)
def test_a_folder_of_another_run_is_refused(folder, tmp_path, monkeypatch, change, words):
    """With any flag changed that changes the result; the folder stays as it is."""
    files = sorted(folder.iterdir())
    for name, count in {"fewer": 28, "renamed": 29}.items():
        (tmp_path / name).mkdir()
        for i, path in enumerate(files[:count]):
            (tmp_path / name / (path.name if name == "fewer" else f"a{i:03d}.png")).write_bytes(
                path.read_bytes()
            )
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            reference_batch, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert make(folder, tmp_path / "batch.npz").code == 130
    before = files_below(tmp_path)
    data_dir = change.pop("data_dir", folder)
    done = make(data_dir, tmp_path / "batch.npz", **change)
    assert done.code == 1 and words in done.err and "repeat its flags" in done.err
    assert files_below(tmp_path) == before
    assert make(folder, tmp_path / "batch.npz").code == 0


def test_sections_of_another_size_are_not_mixed(folder, tmp_path, monkeypatch, small_sections):
    """A run that another edition of the program began is refused, not joined to this one's."""
    with monkeypatch.context() as patch:
        patch.setattr(reference_batch, "_write", mock.Mock(side_effect=KeyboardInterrupt))
        assert make(folder, tmp_path / "batch.npz").code == 130
    monkeypatch.setattr(reference_batch, "SECTION", 16)
    done = make(folder, tmp_path / "batch.npz")
    assert done.code == 1 and "other sections (3 there, 1 here)" in done.err


@pytest.mark.parametrize(
    ("file", "content"),
    [("plan.json", b"{"), ("plan.json", b"[1]"), ("plan.json", b"\xff"), ("section00.npz", b"PK")],
)
def test_a_damaged_folder_is_told_of(folder, tmp_path, monkeypatch, file, content):
    """In one line that says what to remove."""
    with monkeypatch.context() as patch:
        patch.setattr(
            reference_batch, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert make(folder, tmp_path / "batch.npz").code == 130
    (tmp_path / "batch.npz.parts" / file).write_bytes(content)
    done = make(folder, tmp_path / "batch.npz")
    assert done.code == 1 and f"{file} is damaged: remove" in done.err
    assert "Traceback" not in done.err and not (tmp_path / "batch.npz").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data_dir": "nowhere"}, "--data_dir nowhere does not exist"),
        ({"data_dir": "empty"}, "hold no images"),
        ({"image_size": 0}, "--image_size 0 must be at least 1"),
        ({"num_images": 3}, "--num_images 3 must be at least 4"),
        ({"data_dir": "three.npz"}, "--data_dir 'three.npz' holds 3 images: at least 4"),
        ({"batch_size": 257}, "--batch_size 257 must be at most 256"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(folder, tmp_path, monkeypatch, change, words):
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "three.npz", arr_0=draw(3))
    monkeypatch.chdir(tmp_path)
    before = files_below(tmp_path)
    done = make(change.pop("data_dir", folder), "batch.npz", **change)
    assert done.code in (1, 2) and words in done.err and "Traceback" not in done.err
    assert files_below(tmp_path) == before


def test_a_broken_image_is_named_and_what_was_seen_before_is_kept(folder, tmp_path, small_sections):
    """Once it is repaired the run goes on with its section: the two before it are done."""
    good = (folder / "020.png").read_bytes()
    (folder / "020.png").write_bytes(good[:-40])
    done = make(folder, tmp_path / "batch.npz")
    assert done.code == 1 and "020.png" in done.err and "Traceback" not in done.err
    (folder / "020.png").write_bytes(good)
    network, counts = counting()
    words = arguments(folder, tmp_path / "batch.npz")
    assert run_here(make_reference_batch.main, *words, network=lambda path: network).code == 0
    assert sum(counts) == 29 - 20


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("file", ["diary.txt", "batch.npz"])
def test_a_folder_of_something_else_is_left_alone(folder, tmp_path, complete, file):
    """Without a plan it is none of ours, whatever is in it, and whether the npz is there or not."""
    out, parts = tmp_path / "mine.npz", tmp_path / "mine.npz.parts"
    if complete:
        assert make(folder, out).code == 0
    parts.mkdir()
    (parts / file).write_text("precious")
    done = make(folder, out)
    assert done.code == 1 and "mine.npz.parts holds files of something else" in done.err
    assert files_below(parts) == {file} and (parts / file).read_text() == "precious"
    assert out.exists() == complete


def test_files_that_were_added_to_the_folder_stay(folder, tmp_path, monkeypatch):
    """A run removes what it has made, temporary files of killed ones included, and no more."""
    parts = tmp_path / "batch.npz.parts"
    parts.mkdir()
    (parts / "plan.json.tmp7").write_text("{")  # a run was killed at its first file
    with monkeypatch.context() as patch:
        patch.setattr(reference_batch, "_write", mock.Mock(side_effect=KeyboardInterrupt))
        assert make(folder, tmp_path / "batch.npz").code == 130
    for name in ("diary.txt", "section00.npz.tmp7"):
        (parts / name).write_text("precious")
    assert make(folder, tmp_path / "batch.npz").code == 0
    assert files_below(parts) == {"diary.txt"}


@pytest.mark.parametrize("complete", [False, True])
def test_another_run_in_the_folder_is_told_of(folder, tmp_path, monkeypatch, complete):
    """Whether it is at work or about to remove the folder, which stays as it is."""
    monkeypatch.setattr(checkpoint_sets, "PATIENCE", 0)
    out = tmp_path / "batch.npz"
    if complete:
        assert make(folder, out).code == 0
    with checkpoint_sets.reserved(f"{out}.parts"):
        done = make(folder, out)
    assert done.code == 1 and "batch.npz.parts is in use by another run" in done.err
    assert "another --out" in done.err and "--log_dir" not in done.err
    assert (tmp_path / "batch.npz.parts").exists()


def test_a_run_that_waited_for_another_one_finds_its_file(folder, tmp_path, monkeypatch):
    """It does not write it again, and leaves no folder."""
    real, out = reference_batch.reserved, tmp_path / "batch.npz"

    def reserved(path):
        out.write_text("of the other run")
        return real(path)

    monkeypatch.setattr(reference_batch, "reserved", reserved)
    done = make(folder, out)
    assert done.code == 1 and "batch.npz exists: choose another name" in done.err
    assert out.read_text() == "of the other run" and not (tmp_path / "batch.npz.parts").exists()


@pytest.mark.parametrize("is_file", [False, True])
def test_what_cannot_be_written_is_told_by_the_flag(folder, tmp_path, is_file):
    """A full disk, or a file where a folder should be; there is no --log_dir to change."""
    if is_file:
        (tmp_path / "batch.npz.parts").write_text("")
    full = mock.patch("guided_diffusion.checkpoints._write_local", side_effect=OSError(28, "full"))
    with full:
        done = make(folder, tmp_path / "batch.npz")
    assert done.code == 1 and f"--out {tmp_path}/batch.npz or " in done.err
    assert "cannot be written (" in done.err and "make room there" in done.err
    assert "--log_dir" not in done.err and "Traceback" not in done.err


def test_images_take_their_room_on_the_disk_as_they_come(folder, tmp_path, monkeypatch):
    """A file that has its length before its bytes would end in a bus error on a full disk."""
    monkeypatch.setattr(measuring, "PART", 4)
    real, lengths = image_sets.CroppedImages.read, []

    def read(self, numbers):
        if isinstance(numbers, list):  # images of the batch, and not a part to be seen
            files = (tmp_path / "batch.npz.parts").iterdir()
            lengths.append(sum(f.stat().st_size for f in files if "section" not in f.name))
        return real(self, numbers)

    monkeypatch.setattr(image_sets.CroppedImages, "read", read)
    assert make(folder, tmp_path / "batch.npz", image_size=64, num_images=29).code == 0
    assert len(lengths) == 8
    assert all(found < 4 * i * 64 * 64 * 3 + 2000 for i, found in enumerate(lengths))


def test_the_other_end_of_the_command_line(tmp_path):
    """The npz may stand first, or be named; it must be given, and end in .npz."""
    for words in (["a.txt"], ["--out", "a.txt"], ["a.txt", "--data_dir", tmp_path]):
        done = run_here(make_reference_batch.main, *words, "--data_dir", tmp_path)
        assert done.code == 2 and "--out a.txt must end in .npz" in done.err
    done = run_here(make_reference_batch.main, "--data_dir", tmp_path)
    assert done.code == 2 and "--out is missing" in done.err
