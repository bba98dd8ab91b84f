"""Rows of an npz file: what numpy would load, but only as much of it as is asked for."""

import io
import os
import tracemalloc
import zipfile

import numpy as np
import pytest

from guided_diffusion import npz_rows
from guided_diffusion.npz_rows import StreamedRows, open_rows, stream_npz

SAVE = {"stored": np.savez, "compressed": np.savez_compressed}
KEYS = [0, -1, slice(2, 5), slice(None), slice(6, 0, -2), [3, 3, 1], [], np.arange(7) > 4]


class Harmful:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return (os.makedirs, ("harm",))


@pytest.fixture
def array():
    return np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)


@pytest.mark.parametrize("how", SAVE)
@pytest.mark.parametrize("layout", ["C", "F"])
@pytest.mark.parametrize("dtype", ["u1", "<f4", ">i8"])
def test_rows_are_those_of_numpy(how, layout, dtype, array, tmp_path):
    """Whatever numpy's rules select along the first axis, the values, shape and dtype are its."""
    array = np.asarray(array.astype(dtype), order=layout)
    SAVE[how](tmp_path / "x.npz", array, np.arange(7))
    rows = open_rows(tmp_path / "x.npz")
    assert isinstance(rows, np.memmap if how == "stored" else StreamedRows)
    assert (rows.shape, rows.dtype, rows.ndim, len(rows)) == (array.shape, array.dtype, 4, 7)
    for key in KEYS:
        np.testing.assert_array_equal(rows[key], array[key])
    np.testing.assert_array_equal(np.asarray(rows), array)
    assert open_rows(tmp_path / "x.npz", "arr_1")[3] == 3


@pytest.mark.parametrize("how", SAVE)
def test_few_rows_cost_little_memory(how, tmp_path):
    """Rows in the middle of 64 MB take a hundredth of that."""
    SAVE[how](tmp_path / "x.npz", np.zeros((1000, 64, 1000), np.uint8))
    tracemalloc.start()
    found = open_rows(tmp_path / "x.npz")[500:502]
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.shape == (2, 64, 1000) and most < 3e6


@pytest.mark.parametrize("layout", ["C", "F"])
def test_a_compressed_array_is_read_once(layout, array, tmp_path, monkeypatch):
    """Whatever its layout, all rows in rising order cost one pass over the file."""
    np.savez_compressed(tmp_path / "x.npz", np.asarray(array, order=layout))
    opened, real = [], npz_rows.open_binary
    monkeypatch.setattr(npz_rows, "open_binary", lambda path: opened.append(path) or real(path))
    rows = open_rows(tmp_path / "x.npz")
    opened.clear()
    found = [rows[i : i + 2] for i in range(0, 7, 2)]
    np.testing.assert_array_equal(np.concatenate(found), array)
    assert len(opened) == 1


def test_the_numbers_of_all_rows_need_not_fit_into_memory(tmp_path):
    """An array may have more rows than there is room for their numbers."""
    np.savez_compressed(tmp_path / "x.npz", np.zeros((10**7, 1), np.uint8))
    rows = open_rows(tmp_path / "x.npz")
    tracemalloc.start()
    assert rows[10:13].shape == (3, 1) and rows[20].shape == (1,)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 3e6


def test_an_array_cannot_be_written(array, tmp_path):
    """The file is only read."""
    np.savez(tmp_path / "x.npz", array)
    with pytest.raises(ValueError, match="read-only"):
        open_rows(tmp_path / "x.npz")[0] = 0


@pytest.mark.parametrize("how", SAVE)
def test_no_rows_and_no_array(how, tmp_path):
    """An empty array has no rows; one that is not there is None if that is allowed."""
    SAVE[how](tmp_path / "x.npz", np.zeros((0, 4), np.float32))
    assert open_rows(tmp_path / "x.npz")[:].shape == (0, 4)
    assert open_rows(tmp_path / "x.npz", "arr_1", optional=True) is None
    with pytest.raises(ValueError, match=r"^--npz \S*x.npz has no array arr_1, but arr_0"):
        open_rows(tmp_path / "x.npz", "arr_1", flag="--npz")


def test_an_address_is_streamed(array, tmp_path, monkeypatch):
    """At an address even a stored array is read from the front."""
    np.savez(tmp_path / "x.npz", array)
    monkeypatch.setattr(npz_rows, "open_binary", lambda path: (tmp_path / "x.npz").open("rb"))
    rows = open_rows("gs://bucket/x.npz")
    assert isinstance(rows, StreamedRows)
    np.testing.assert_array_equal(rows[2:4], array[2:4])


def broken_files(folder, array):
    """Write what is no npz of rows; yield each path and a word of what open_rows says."""
    np.savez(folder / "good.npz", array)
    whole = (folder / "good.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (folder / "text.npz").write_text("hello")
    (folder / "empty.npz").touch()
    np.save(folder / "plain.npy", array)
    np.savez(folder / "objects.npz", np.array([Harmful(), 1], dtype=object))
    np.savez(folder / "fields.npz", np.zeros(2, [("a", int)]))
    np.savez(folder / "single.npz", np.array(3))
    npy = (folder / "plain.npy").read_bytes()
    for name, content in {
        "short": npy[:-1],
        "long": npy + b"x",
        "negative": npy.replace(b"(7,", b"(-7"),
        "huge": npy.replace(b"(7, ", b"(7e9"),
        "code": npy.replace(b"{'descr'", b"f(descr)"),
        "magic": b"x" + npy,
        "version": npy[:6] + b"\x09" + npy[7:],
    }.items():
        with zipfile.ZipFile(folder / f"{name}.npz", "w") as archive:
            archive.writestr("arr_0.npy", content)
    with zipfile.ZipFile(folder / "endless.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        header = io.BytesIO()
        content = {"shape": (2**63, 1), "fortran_order": False, "descr": "|u1"}
        np.lib.format.write_array_header_1_0(header, content)
        archive.writestr("arr_0.npy", header.getvalue())
        archive.infolist()[0].file_size = len(header.getvalue()) + 2**63  # as it will say
    words = {
        "endless": "more than",
        "objects": "not of numbers",
        "fields": "not of numbers",
        "single": "without rows",
    }
    words |= dict.fromkeys(["short", "long"], "bytes")
    words |= dict.fromkeys(["negative", "huge", "code", "magic", "version"], "arr_0")
    for path in sorted(folder.glob("*.np?")):
        if path.stem not in ("good",):
            yield path, words.get(path.stem, "no npz that can be read")


def test_what_is_broken_is_refused_in_one_line(array, tmp_path, monkeypatch):
    """A file that is no npz of numbers is named with what is wrong; nothing in it runs."""
    monkeypatch.chdir(tmp_path)
    for path, words in list(broken_files(tmp_path, array)):
        with pytest.raises(ValueError, match=words) as caught:
            open_rows(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists()
    with pytest.raises(ValueError, match="nowhere.npz is no npz that can be read .*No such file"):
        open_rows(tmp_path / "nowhere.npz")


def test_damage_within_is_found_when_it_is_read(tmp_path):
    """A compressed array with a flipped byte is refused, not returned."""
    path = tmp_path / "x.npz"
    array = np.random.default_rng(0).integers(0, 9, (50, 1000))
    np.savez_compressed(path, array)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x.npz is no npz that can be read"):
        open_rows(path)[:]


def test_a_file_cut_after_its_opening_is_found(tmp_path):
    """A file that shrinks while it is streamed is refused, not padded."""
    path = tmp_path / "x.npz"
    np.savez_compressed(path, np.random.default_rng(0).integers(0, 99, (50, 1000)))
    rows = open_rows(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="x.npz is no npz that can be read"):
        rows[40]


def test_an_npz_in_blocks_is_that_of_numpy(array):
    """Byte by byte what np.savez writes, so that a rerun can be compared by its hash."""
    whole, blocks = io.BytesIO(), io.BytesIO()
    arrays = {"arr_0": array, "mu": np.arange(10.0), "names": np.array(["a", "long"])}
    np.savez(whole, **arrays)
    parts = {name: (a.shape, a.dtype, iter([a[:1], a[1:3], a[3:]])) for name, a in arrays.items()}
    stream_npz(blocks, parts)
    assert blocks.getvalue() == whole.getvalue()
