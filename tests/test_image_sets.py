"""Sets of images: npz files, folders and zips alike, a part at a time; what is no set of images."""

import io
import math
import re
import shutil
import time
import tracemalloc
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from test_features import draw, save_folder

from evaluations import image_sets, measuring
from evaluations.image_sets import open_images


def zipped(folder):
    """Pack a folder into a zip beside it."""
    return Path(shutil.make_archive(str(folder), "zip", folder))


@pytest.mark.parametrize("grey", [False, True])
def test_npz_folder_and_zip_hold_the_same(tmp_path, grey):
    """Grey is repeated to three channels, whatever its layout."""
    pixels = draw(6, shape=() if grey else (3,))
    expected = pixels[..., None].repeat(3, axis=3) if grey else pixels
    folder = save_folder(tmp_path / "images", pixels)
    np.savez(tmp_path / "stored.npz", arr_0=pixels)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=pixels[..., None] if grey else pixels)
    for path in (folder, zipped(folder), tmp_path / "stored.npz", tmp_path / "packed.npz"):
        images = open_images(str(path), "--sample")
        assert len(images) == 6 and images.size == (8, 8)
        for part in (range(0, 4), range(4, 6), range(1, 3)):
            np.testing.assert_array_equal(images.read(part), expected[part.start : part.stop])


def test_an_npz_is_not_held_in_memory(tmp_path):
    """Opening it and reading a part of it takes the memory of the part."""
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((400, 64, 64, 3), np.uint8))
    np.savez_compressed(tmp_path / "packed.npz", arr_0=np.zeros((400, 64, 64, 3), np.uint8))
    for name in ("large.npz", "packed.npz"):
        tracemalloc.start()
        images = open_images(str(tmp_path / name), "--sample")
        for part in measuring.parts_of(400)[:1]:
            images.read(range(part.start, 20))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3e6, (name, peak)  # the whole has 4.9 MB, the part 0.25


GOOD = draw(4)
WIDTHS = {"pooled": 2, "spatial": 3}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"arr_0": GOOD.astype(np.float32)}, "arr_0 of float32 .4, 8, 8, 3.: save images as uint8"),
        ({"arr_0": GOOD.transpose(0, 3, 1, 2)}, "arr_0 of uint8 .4, 3, 8, 8."),
        ({"arr_0": GOOD[0, :, 0]}, "arr_0 of uint8 .8, 3."),
        ({"arr_0": GOOD[0]}, "arr_0 of uint8 .8, 8, 3.: save images as uint8"),
        ({"arr_0": GOOD[:, :0]}, "arr_0 of uint8 .4, 0, 8, 3."),
        ({"images": GOOD}, "no array arr_0, but images"),
        ({"arr_0": GOOD[:1]}, "holds 1 images: at least 4"),
        ({"arr_0": GOOD[:0]}, "holds 0 images: at least 4"),
        ({"arr_0": np.array([None])}, "not of numbers"),
        ({"arr_0": GOOD, "mu": np.zeros(3)}, "has no sigma, but its companion"),
        ({"arr_0": GOOD, "sigma_s": np.eye(3)}, "has no mu_s, but its companion"),
        ({"arr_0": GOOD, "mu": np.zeros(3), "sigma": np.eye(4)}, "must be .D. and .D, D."),
        ({"arr_0": GOOD, "mu": np.eye(3), "sigma": np.eye(3)}, "must be .D. and .D, D."),
        ({"arr_0": GOOD, "mu": np.zeros(3, int), "sigma": np.eye(3)}, "mu of int64: it must hold"),
        ({"arr_0": GOOD, "mu": np.full(3, np.nan), "sigma": np.eye(3)}, "mu with 3 values that"),
        ({"arr_0": GOOD, "mu_s": np.zeros(3), "sigma_s": np.full((3, 3), np.inf)}, "sigma_s with"),
    ],
)  # fmt: skip
def test_an_npz_of_other_things_is_refused_in_one_line(tmp_path, arrays, words):
    """Each message names the flag and the file."""
    path = str(tmp_path / "bad.npz")
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=f"^--reference {re.escape(path)} .*{words}") as error:
        images = open_images(path, "--reference", min_images=4)
        for kind in ("pooled", "spatial"):
            images.statistics(kind, 3)
    assert "\n" not in str(error.value)


def write_claim(path, shape, fortran_order=False):
    """Write an npz that claims images of a shape, of which hardly a byte is there."""
    header = io.BytesIO()
    content = {"shape": shape, "fortran_order": fortran_order, "descr": "|u1"}
    np.lib.format.write_array_header_1_0(header, content)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", header.getvalue() + bytes(100))
        # What the directory at the end of the file will say.
        archive.infolist()[0].file_size = len(header.getvalue()) + math.prod(shape)
    return path


@pytest.mark.parametrize(
    ("shape", "fortran_order", "words"),
    [
        ((4, 16_000, 16_000, 3), False, "at most 8192x8192 can be scored, so divide them or"),
        ((4, 10**8, 10**8, 3), False, "at most 8192x8192 can be scored"),
        ((10**9, 1, 1, 3), False, "at most 10,000,000 images"),
        ((2**61, 2, 2, 1), True, "more than a machine can hold"),
        ((1000, 1000, 1000, 3), False, "no npz that can be read .*make or download it again"),
        ((1000, 1000, 1000, 3), True, "no npz that can be read .*make or download it again"),
    ],
)
def test_shapes_that_are_a_mistake_or_a_trap_are_refused(tmp_path, shape, fortran_order, words):
    """In one line, and without the memory that they claim to need."""
    path = write_claim(tmp_path / "claim.npz", shape, fortran_order)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"--sample {path} .*{words}") as error:
        open_images(str(path), "--sample").read(range(4))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(error.value) and (fortran_order or most < 1e8)


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_images_for_which_there_is_no_room_are_told(tmp_path, monkeypatch, kind):
    """One line with the flag, what was asked for, and the remedy."""
    np.savez(tmp_path / "images.npz", arr_0=GOOD)
    path = tmp_path / "images.npz" if kind == "npz" else save_folder(tmp_path / "images", GOOD)
    images = open_images(str(path), "--sample")
    reader = mock.MagicMock()
    reader.__getitem__.side_effect = reader.read.side_effect = MemoryError("9 TiB")
    monkeypatch.setattr(images, "_rows" if kind == "npz" else "_source", reader)
    with pytest.raises(
        ValueError, match=f"^--sample {path} holds images of 8x8, of which 3 do"
    ) as error:
        images.read(range(3))
    assert "scale them down" in str(error.value)


def test_files_that_are_no_images_are_refused_in_one_line(tmp_path):
    """Cut files, texts, sizes that differ, empty folders."""
    np.savez(tmp_path / "cut.npz", arr_0=GOOD)
    content = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.zip").write_text("no zip")
    (tmp_path / "empty").mkdir()
    save_folder(tmp_path / "mixed", [*GOOD[:2], GOOD[2, :4]])
    save_folder(tmp_path / "broken", GOOD)
    (tmp_path / "broken" / "00002.png").write_bytes(b"no picture")
    for name, words in {
        "cut.npz": "no npz that can be read", "text.zip": "no zip that can be read",
        "empty": "hold no images", "nowhere": "does not exist",
        "mixed": "different sizes: 00000.png is 8x8, 00002.png 4x8", "broken": "00002.png",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=words) as error:
            images = open_images(str(tmp_path / name), "--sample")
            images.read(range(len(images)))
        assert "\n" not in str(error.value) and str(error.value).startswith("--sample"), name


def test_statistics_of_a_published_batch_are_read(tmp_path):
    """All four arrays, as float64; without them there are none."""
    stored = {"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.ones(3), "sigma_s": 2 * np.eye(3)}
    np.savez(tmp_path / "batch.npz", arr_0=GOOD, **stored)
    np.savez(tmp_path / "plain.npz", arr_0=GOOD, mu=stored["mu"], sigma=np.float32(stored["sigma"]))
    batch = open_images(str(tmp_path / "batch.npz"), "--reference")
    assert batch.features == "inception"
    for kind, suffix in {"pooled": "", "spatial": "_s"}.items():
        for name, array in batch.statistics(kind, WIDTHS[kind])._asdict().items():
            assert array.dtype == np.float64
            np.testing.assert_array_equal(array, stored[name + suffix])
    plain = open_images(str(tmp_path / "plain.npz"), "--reference")
    assert plain.statistics("pooled", 2).sigma.dtype == np.float64
    assert plain.statistics("spatial", 3) is None


def test_statistics_of_another_width_are_not_read(tmp_path):
    """Zeros for 800 MB take hardly any bytes on the disk; their header is enough to refuse them."""
    path = tmp_path / "batch.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in {"arr_0": GOOD, "mu": np.zeros(10_000)}.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array)
        with archive.open("sigma.npy", "w") as file:
            header = {"shape": (10_000, 10_000), "fortran_order": False, "descr": "<f8"}
            np.lib.format.write_array_header_1_0(file, header)
            for _ in range(100):
                file.write(bytes(8 * 10**6))
    images = open_images(str(path), "--reference")
    tracemalloc.start()
    with pytest.raises(ValueError, match="of 10000 pooled features, but --features inception has"):
        images.statistics("pooled", 2048)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6 and images.has_statistics()


def test_reading_keeps_one_part_ahead_and_no_more(tmp_path, monkeypatch):
    """The next part is read while this one is worked on; memory never holds a third."""
    monkeypatch.setattr(measuring, "PART", 4)
    pixels = draw(11)
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    images = open_images(str(tmp_path / "images.npz"), "--sample")
    started = []
    read = image_sets.NpzImages.read
    monkeypatch.setattr(
        image_sets.NpzImages, "read", lambda self, part: started.append(part) or read(self, part)
    )
    parts = image_sets.read_ahead(images, measuring.parts_of(11))
    first, found = next(parts)
    deadline = time.monotonic() + 10
    while len(started) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert started == [range(0, 4), range(4, 8)] and first == range(0, 4)
    np.testing.assert_array_equal(found, pixels[:4])
    assert [part for part, _ in parts] == [range(4, 8), range(8, 11)]
