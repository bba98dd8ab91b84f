"""guided_diffusion.data_sources: the same images from a folder, a zip, an npz and an LMDB."""

import io
import os
import pickle
import sys
import tracemalloc
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from toy_images import (
    WRITERS,
    grey_png,
    noise_images,
    one_line_error,
    png_bytes,
    write_folder,
    write_zip,
)

from guided_diffusion.data_sources import Names, _list_image_files_recursively, open_source
from guided_diffusion.image_decoding import BadImage
from guided_diffusion.npz_rows import StreamedRows

NAMES = ["0_b.png", "1_a.png", "1_c.png", "2_d.png"]  # sorted


def pixels(source):
    return np.stack([np.array(source.read(i).convert("RGB")) for i in range(len(source))])


@pytest.mark.parametrize("kind", WRITERS)
def test_every_source_gives_the_same_images(tmp_path, kind):
    """Same pixels in the same order, also in a process that got the source by pickle."""
    images = noise_images(4)
    path = WRITERS[kind](tmp_path / "data", NAMES, images)
    source = open_source(path)
    assert len(source) == 4 and source.describe().lower() == f"{kind} {path}"
    for copy in (source, pickle.loads(pickle.dumps(source))):
        np.testing.assert_array_equal(pixels(copy), images)
    if kind == "npz":
        assert list(source.names) == ["00000000", "00000001", "00000002", "00000003"]
        assert source.labels.tolist() == [0, 1, 1, 2]
    else:
        assert list(source.names) == NAMES and source.labels is None


@pytest.mark.parametrize("write", [write_folder, write_zip])
def test_folders_are_sorted_entry_by_entry(tmp_path, write):
    """A zip keeps the order of the tree: each folder's entries sorted, "/" before nothing."""
    names = ["a-b.png", "a/z.png", "a/é.png", "a.png", "b/c/d.png"]
    order = sorted(names, key=lambda name: name.split("/"))
    source = open_source(write(tmp_path / "x", names, noise_images(5)))
    assert list(source.names) == order and order[0] == "a/z.png"


def test_files_are_found_in_order_in_subfolders(tmp_path):
    """Four extensions in any case; the entries of each folder in sorted order; nothing else."""
    for name in ["b.png", "a.JPG", "c.txt", "png", "sub/z.jpeg", "sub/deep.png/y.Gif"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = _list_image_files_recursively(str(tmp_path))
    names = [os.path.relpath(path, tmp_path) for path in found]
    assert names == ["a.JPG", "b.png", "sub/deep.png/y.Gif", "sub/z.jpeg"]
    assert list(open_source(f"{tmp_path}/").names) == names


def test_links_are_followed_but_not_in_circles(tmp_path):
    """A link to a folder elsewhere counts, one to a folder around it does not."""
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data2").mkdir()
    grey_png(tmp_path / "data" / "a.png", 0)
    grey_png(tmp_path / "data2" / "b.png", 0)
    (tmp_path / "data" / "sub" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "there").symlink_to(tmp_path / "data2")
    assert list(open_source(str(tmp_path / "data")).names) == ["a.png", "there/b.png"]


def test_names_are_a_sequence_of_any_file_names():
    """Names that are no UTF-8, empty or long come back as they were."""
    wanted = ["a", "", "é/中", os.fsdecode(b"\xff_x"), "z" * 1000]
    names = Names(wanted)
    assert list(names) == wanted and names[-1] == wanted[-1] and len(names) == 5
    assert list(Names([])) == []
    with pytest.raises(IndexError):
        names[5]


@pytest.fixture
def memory_storage(tmp_path, monkeypatch):
    """Map mem:// to a folder by a stand-in for blobfile."""
    import blobfile as bf

    def local(url):
        return url.replace("mem:/", str(tmp_path), 1)

    monkeypatch.setattr(bf, "listdir", lambda url: sorted(os.listdir(local(url)), reverse=True))
    monkeypatch.setattr(bf, "isdir", lambda url: os.path.isdir(local(url)))
    monkeypatch.setattr(bf, "join", lambda *parts: "/".join(parts))
    monkeypatch.setattr(bf, "BlobFile", lambda url, mode: io.BytesIO(Path(local(url)).read_bytes()))
    return tmp_path


@pytest.mark.parametrize("kind", ["folder", "zip", "npz"])
def test_addresses_are_read_through_blobfile(memory_storage, kind):
    """A data_dir with "://" goes to blobfile."""
    images = noise_images(4)
    path = WRITERS[kind](memory_storage / "x", NAMES, images)
    url = f"mem://{Path(path).name}"
    source = open_source(url)
    np.testing.assert_array_equal(pixels(source), images)
    assert source.path(1) == (f"{url}/00000001" if kind == "npz" else f"{url}/1_a.png")


@pytest.mark.parametrize("shape", [(3, 8, 6), (3, 8, 6, 1), (3, 8, 6, 3)])
def test_arrays_may_be_grey_or_coloured(tmp_path, shape):
    """Height comes before width, and a last axis of 1 is grey; labels may be absent."""
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez_compressed(tmp_path / "x.npz", images)
    source = open_source(str(tmp_path / "x.npz"))
    assert source.read(2).size == (6, 8) and source.labels is None
    np.testing.assert_array_equal(np.array(source.read(2)), images[2].squeeze())


def test_arrays_are_not_held_in_memory(tmp_path):
    """An npz by np.savez is read where it lies, whatever its size: 5 MB take a tenth of that."""
    np.savez(tmp_path / "x.npz", np.ones((400, 64, 64, 3), np.uint8), np.arange(400))
    tracemalloc.start()
    source = open_source(str(tmp_path / "x.npz"))
    assert np.array(source.read(300)).all() and source.labels[300] == 300
    assert len(pickle.loads(pickle.dumps(source))) == 400  # as workers get it that are not forked
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 5e5


def test_arrays_for_which_there_is_no_room_are_told(tmp_path, monkeypatch):
    """A compressed one must fit into memory; the line says how it need not."""
    np.savez_compressed(tmp_path / "x.npz", noise_images(3))
    monkeypatch.setattr(StreamedRows, "__array__", mock.Mock(side_effect=MemoryError("9 TiB")))
    message = one_line_error(lambda: open_source(str(tmp_path / "x.npz")))
    assert f"--data_dir {str(tmp_path / 'x.npz')!r}" in message
    assert "does not fit into memory: save it by np.savez, uncompressed" in message


def test_zip_entries_of_a_mac_and_with_a_prefix(tmp_path):
    """Shadows under __MACOSX/ are no images, and a zip may follow other bytes."""
    path = Path(write_zip(tmp_path / "x", [*NAMES, "__MACOSX/._a.png"], noise_images(5)))
    path.write_bytes(b"#!/bin/sh unpack me\n" + path.read_bytes())
    source = open_source(str(path))
    assert list(source.names) == NAMES
    np.testing.assert_array_equal(pixels(source), noise_images(5)[:4])


# Errors


def test_missing_data_is_named(tmp_path):
    """No folder given, no such folder, a file of another kind, a folder without images."""
    assert "--data_dir is missing" in one_line_error(lambda: open_source(""))
    assert "--data_dir is missing" in one_line_error(lambda: open_source(None))
    message = one_line_error(lambda: open_source("/no/such/folder", "--val_data_dir"))
    assert "--val_data_dir '/no/such/folder' does not exist" in message and ".npz" in message
    assert "does not exist" in one_line_error(lambda: open_source("/no/such.zip"))
    (tmp_path / "notes.txt").touch()
    message = one_line_error(lambda: open_source(str(tmp_path / "notes.txt")))
    assert "is a file" in message and "LMDB" in message
    message = one_line_error(lambda: open_source(str(tmp_path)))
    assert str(tmp_path) in message and ".jpg, .jpeg, .png, .gif" in message


def bad_npz(path, damage):
    """Write an npz with something wrong in it."""
    images = noise_images(3)
    arrays = {
        "pickled": {"arr_0": np.array([None, 1])},
        "other name": {"images": images},
        "float": {"arr_0": images / 255},
        "2 channels": {"arr_0": images[..., :2]},
        "one image": {"arr_0": images[0, 0]},
        "empty": {"arr_0": images[:0]},
        "short labels": {"arr_0": images, "arr_1": np.arange(2)},
        "float labels": {"arr_0": images, "arr_1": np.arange(3.0)},
        "pickled labels": {"arr_0": images, "arr_1": np.array([None] * 3)},
    }
    if damage in arrays:
        np.savez(path, **arrays[damage])
    elif damage == "npy":
        with open(path, "wb") as file:
            np.save(file, images)
    else:
        path.write_bytes(b"" if damage == "no bytes" else b"PK\x03\x04 nonsense")


DAMAGED_NPZ = {
    "pickled": "not of numbers", "other name": "no array arr_0", "float": "float64",
    "2 channels": "uint8", "one image": "[8, 3]", "empty": "no images", "short labels": "arr_1",
    "float labels": "float64", "pickled labels": "not of numbers", "npy": "no npz that can be read",
    "no bytes": "no npz that can be read", "text": "no npz that can be read",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED_NPZ)
def test_damaged_arrays_are_told(tmp_path, damage):
    """One line with the flag, the file and what is wrong; nothing is ever unpickled."""
    bad_npz(tmp_path / "x.npz", damage)
    message = one_line_error(lambda: open_source(str(tmp_path / "x.npz")))
    assert message.replace("'", "").startswith(f"--data_dir {tmp_path / 'x.npz'} ")
    assert DAMAGED_NPZ[damage] in message


def encrypted(path):
    """Claim that the first entry of a zip is encrypted, in its directory."""
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "no images", "encrypted", "bzip2"])
def test_damaged_zips_are_told(tmp_path, damage):
    """One line with the flag, the file and the remedy, before the first batch."""
    path = tmp_path / "x.zip"
    method = zipfile.ZIP_BZIP2 if damage == "bzip2" else zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w", method) as archive:
        name = "notes.txt" if damage == "no images" else "a.png"
        archive.writestr(name, png_bytes(noise_images(1)[0]))
    if damage == "encrypted":
        encrypted(path)
    elif damage in ("empty", "text", "cut"):
        path.write_bytes({"empty": b"", "text": b"zip"}.get(damage, path.read_bytes()[:100]))
    message = one_line_error(lambda: open_source(str(path)))
    assert f"--data_dir {str(path)!r}" in message


@pytest.mark.parametrize("packed", [False, True])
def test_a_damaged_zip_entry_is_a_broken_image(tmp_path, packed):
    """A changed byte in one entry is found by its checksum; the others stay readable."""
    path = tmp_path / "x.zip"
    images = noise_images(2)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else 0) as archive:
        for name, arr in zip("ab", images, strict=True):
            file = io.BytesIO()
            Image.fromarray(arr).save(file, format="bmp")  # which has no checksum of its own
            archive.writestr(f"{name}.png", file.getvalue())
    data = bytearray(path.read_bytes())
    data[data.index(b"a.png") + 60] ^= 255
    path.write_bytes(data)
    source = open_source(str(path))
    with pytest.raises(BadImage) as caught:
        source.read(0)
    assert f"{path}/a.png" in str(caught.value) and "\n" not in str(caught.value)
    np.testing.assert_array_equal(np.array(source.read(1)), images[1])


def test_lmdb_errors_are_told(tmp_path, monkeypatch):
    """Not a database, an empty one, one whose values are no images, and no package."""
    lmdb = pytest.importorskip("lmdb")
    for name, content in (("text", b"nonsense" * 2000), ("empty", b"")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.mdb").write_bytes(content)
        message = one_line_error(lambda name=name: open_source(str(tmp_path / name)))
        assert "--data_dir" in message and "LMDB" in message and name in message
    lmdb.open(str(tmp_path / "none"), map_size=1 << 20).close()
    assert "without entries" in one_line_error(lambda: open_source(str(tmp_path / "none")))
    with lmdb.open(str(tmp_path / "none")) as database, database.begin(write=True) as out:
        out.put(b"key", b"no image")
    source = open_source(str(tmp_path / "none"))
    assert "none/key" in one_line_error(lambda: source.read(0))
    monkeypatch.setitem(sys.modules, "lmdb", None)
    assert "pip install lmdb" in one_line_error(lambda: open_source(str(tmp_path / "none")))


def test_webp_in_lmdb_decodes(tmp_path):
    """LSUN ships webp under keys without an ending."""
    lmdb = pytest.importorskip("lmdb")
    arr, file = noise_images(1)[0], io.BytesIO()
    Image.fromarray(arr).save(file, format="webp", lossless=True)
    with lmdb.open(str(tmp_path)) as database, database.begin(write=True) as out:
        out.put(b"00ff", file.getvalue())
    np.testing.assert_array_equal(pixels(open_source(str(tmp_path)))[0], arr)
