"""Rows of an array in an npz file, read or written without the rest of it in memory.

An npz is a zip with one .npy file for each array. Where that file is stored as it is, as `np.savez`
does it, the array is mapped into memory and the system fetches the pages that are looked at. One
that is compressed or at an address is streamed. Nothing in the file is ever unpickled.
"""

from __future__ import annotations

import io
import os
import struct
import sys
import zipfile
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.lib import format as npy

from .image_decoding import is_url, one_line, open_binary

HEAD = 2**16  # bytes from the front of a .npy file that surely hold its header
CHUNK = 2**20  # bytes in a read where rows are skipped


def open_rows(
    path: str | os.PathLike, name: str = "arr_0", *, flag: str = "", optional: bool = False
) -> np.ndarray | StreamedRows | None:
    """Open an array of an npz file for reading by rows, that is, along its first axis.

    Args:
        path: a local file, or an address that blobfile understands.
        name: the array's; `np.savez` calls those without a name arr_0, arr_1 and so on.
        flag: whom an error names before the file.
        optional: return None if the file has no such array.

    Returns:
        a read-only np.memmap or, where there is nothing to map, StreamedRows.

    Raises:
        ValueError: if the file cannot be read, is no npz or has no such array, or if the array
            is cut short, a single value, or made of Python objects.
    """
    path, shown = os.fspath(path), f"{flag} {os.fspath(path)}".strip()
    try:
        with open_binary(path) as file, zipfile.ZipFile(file) as archive:
            names = [entry.removesuffix(".npy") for entry in archive.namelist()]
            if name in names:
                entry = archive.getinfo(f"{name}.npy")
                mapped_from = _find_stored(file, entry)
                with archive.open(entry) as stream:
                    head = io.BytesIO(stream.read(HEAD))
    except MemoryError:
        raise
    except Exception as error:  # zipfile, zlib and blobfile raise a dozen kinds
        _refuse(shown, error)
    if name not in names:
        if optional:
            return None
        found = ", ".join(names) or "nothing"
        raise ValueError(f"{shown} has no array {name}, but {found}: save it under that name")
    header = _Header(head, shown, name)
    header.check_size(entry.file_size)
    if is_url(path) or mapped_from is None or not header.size:
        return StreamedRows(path, entry, header)
    return header.map(path, mapped_from)


def _refuse(shown: str, error: Exception) -> NoReturn:
    raise ValueError(
        f"{shown} is no npz that can be read ({one_line(error)}): make or download it again"
    ) from error


def _find_stored(file: BinaryIO, entry: zipfile.ZipInfo) -> int | None:
    """Return where in the file an entry's bytes begin, None if they are compressed."""
    return (
        find_data(file, entry.header_offset) if entry.compress_type == zipfile.ZIP_STORED else None
    )


def find_data(file: BinaryIO, header: int) -> int:
    """Return where in a zip the bytes of an entry begin whose header begins at byte `header`."""
    file.seek(header)
    # The header of an entry: 26 bytes told by the directory too, and two lengths.
    return header + 30 + sum(struct.unpack("<26x2H", file.read(30)))


class _Header:
    """What a .npy file says of its array before the bytes of it."""

    def __init__(self, stream: BinaryIO, shown: str, name: str):
        self.shown, self.name = shown, name
        try:
            version = npy.read_magic(stream)
            read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
            self.shape, is_fortran, self.dtype = read(stream)
        except Exception as error:  # of numpy, and of Python's parser
            raise self.error(f"without a header that can be read ({one_line(error)})") from error
        self.length, self.order = stream.tell(), "F" if is_fortran else "C"
        if self.dtype.hasobject or self.dtype.names:
            raise self.error(f"of {self.dtype}, not of numbers")
        if not self.shape or min(self.shape) < 0:
            raise self.error(f"of shape {self.shape}, without rows")
        self.size = self.dtype.itemsize
        for side in self.shape:
            self.size *= side
        if self.size > sys.maxsize:
            raise self.error(f"of shape {self.shape}, more than a machine can hold")

    def error(self, problem: str) -> ValueError:
        """Return an error that names the file and the array."""
        return ValueError(f"{self.shown} has an array {self.name} {problem}: save it by np.savez")

    def check_size(self, size: int) -> None:
        """Compare the array's bytes with those of the .npy file, header included."""
        if size != self.length + self.size:
            raise self.error(f"{list(self.shape)} of {self.size:,} bytes in {size:,}")

    def map(self, path: str, start: int) -> np.memmap:
        """Map the array, whose .npy file begins at byte `start`."""
        try:
            return np.memmap(path, self.dtype, "r", start + self.length, self.shape, self.order)
        except (OSError, ValueError) as error:  # the file is shorter than its directory says
            _refuse(self.shown, error)


class StreamedRows:
    """An array that is read from the front, as much of it as is asked for.

    Rows in rising order cost one pass over the file, a step back begins another. In Fortran's
    order each row is spread over the whole file, which is therefore read once, and kept. An open
    file stays behind, so give it to no forked process.

    Attributes:
        shape: of the whole array.
        dtype: of the whole array.
    """

    def __init__(self, path: str, entry: zipfile.ZipInfo, header: _Header):
        self.shape, self.dtype = header.shape, header.dtype
        self._path, self._entry, self._header = path, entry, header
        self._stream: Any = None
        self._next = 0  # the row at which the stream stands

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        """Return rows, by numpy's rules for one axis: a number, a slice, a list or a mask."""
        if self._header.order == "F":
            return self._whole[key]
        # The numbers of all rows need not fit into memory.
        numbers = range(len(self)) if isinstance(key, int | slice) else np.arange(len(self))
        wanted = np.array(numbers[key])
        rising, places = np.unique(wanted, return_inverse=True)
        rows = np.empty((len(rising), *self.shape[1:]), self.dtype)
        for i, row in enumerate(rising.tolist()):
            rows[i] = self._read_row(row)
        is_in_order = np.array_equal(rising, wanted)
        return rows if is_in_order else rows[places.reshape(wanted.shape)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)

    @cached_property
    def _whole(self) -> np.ndarray:
        size = self._header.size
        flat = np.empty(size, np.uint8)  # fails at once if there is no room for it
        self._rewind()
        for start in range(0, size, CHUNK):
            part = self._read(min(CHUNK, size - start))
            flat[start : start + len(part)] = np.frombuffer(part, np.uint8)
        return flat.view(self.dtype).reshape(self.shape, order="F")

    def _read_row(self, row: int) -> np.ndarray:
        """Return row `row`, having skipped those before it."""
        size = self._header.size // len(self)
        if self._stream is None or row < self._next:
            self._rewind()
        skipped = (row - self._next) * size
        while skipped:
            skipped -= len(self._read(min(skipped, CHUNK)))
        self._next = row + 1
        return np.frombuffer(self._read(size), self.dtype).reshape(self.shape[1:])

    def _rewind(self) -> None:
        """Open the file anew, and go to the first row."""
        try:
            archive = zipfile.ZipFile(open_binary(self._path))  # noqa: SIM115 - it stays open
            self._stream = archive.open(self._entry)
        except Exception as error:  # zipfile and blobfile raise a dozen kinds
            _refuse(self._header.shown, error)
        self._next = 0
        self._read(self._header.length)

    def _read(self, size: int) -> bytes:
        """Read exactly so many bytes."""
        try:
            found = self._stream.read(size)
            if len(found) < size:
                raise EOFError("it is cut short")
        except MemoryError:
            raise
        except Exception as error:  # zipfile, zlib and blobfile raise a dozen kinds
            self._stream = None
            _refuse(self._header.shown, error)
        return found


def stream_npz(
    file: BinaryIO, arrays: Mapping[str, tuple[tuple[int, ...], np.dtype, Iterable[np.ndarray]]]
) -> None:
    """Write arrays as `np.savez` would, with a block of each in memory at a time.

    Args:
        file: open for writing.
        arrays: of each by its name the shape, the dtype and the rows, in blocks.
    """
    with zipfile.ZipFile(file, "w") as archive:
        for name, (shape, dtype, blocks) in arrays.items():
            descr = npy.dtype_to_descr(dtype)
            header = {"descr": descr, "fortran_order": False, "shape": shape}
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                npy.write_array_header_1_0(entry, header)
                for block in blocks:
                    entry.write(np.ascontiguousarray(block, dtype).data)
