"""Where images come from: a folder tree, a zip, an npz of arrays, or an LMDB database.

`open_source` looks at a path and returns a Source: entries in a fixed order, each with a name and
an image, some with a label. A Source keeps no file open, so that worker processes may share it.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import BinaryIO

import numpy as np
from PIL import Image

from .image_decoding import decode, guard, is_url, one_line, open_binary
from .npz_rows import StreamedRows, find_data, open_rows

EXTENSIONS = ("jpg", "jpeg", "png", "gif")  # of images in folders and zips, in any case
REMEDY = (
    "name a folder of images, a .zip of images, an .npz with the array arr_0, "
    "or an LMDB folder (it holds data.mdb)"
)

# Names


class Names(Sequence):
    """Strings in one array of bytes.

    A list of a million strings would be copied into every worker, page by page, as reading an
    element counts a reference in its memory.
    """

    def __init__(self, names: Iterable[str]):
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([0] + [len(name) for name in encoded])
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i %= len(self)
        return os.fsdecode(self._bytes[self._ends[i] : self._ends[i + 1]].tobytes())


# Sources


class Source:
    """Images by number. A subclass sets `names` and defines `open`, or `read` itself.

    Attributes:
        kind: what it is, in a word.
        names: the entries' names in order: paths relative to the source, with "/".
        labels: class numbers that the source carries, int64 [N], or None.
    """

    kind = "source"
    names: Sequence[str]
    labels: np.ndarray | None = None

    def __init__(self, data_dir: str, flag: str = "--data_dir"):
        self.data_dir = data_dir
        self.flag = flag

    def __len__(self) -> int:
        return len(self.names)

    def describe(self) -> str:
        """Say in a few words what this is."""
        return f"{self.kind} {self.data_dir}"

    def path(self, i: int) -> str:
        """Return what errors call entry i."""
        return f"{self.data_dir}/{self.names[i]}"

    def open(self, i: int) -> BinaryIO:
        """Open the encoded image of entry i."""
        raise NotImplementedError

    def read(self, i: int, least: int | None = None) -> Image.Image:
        """Return entry i, decoded to at most 8 bits a channel, in whatever mode it has.

        Args:
            i: the number of the entry.
            least: how many pixels suffice for the shorter side, as for `image_decoding.decode`.

        Raises:
            BadImage: it is no whole image.
            ValueError: the storage failed.
        """

        def decode_entry():
            with self.open(i) as file:
                return decode(file, least)

        return guard(decode_entry, self.flag, self.path(i))

    def error(self, problem: str) -> ValueError:
        """Return an error that names the flag and its value."""
        return ValueError(f"{self.flag} {self.data_dir!r} {problem}")


class FolderSource(Source):
    """The image files of a folder and its subfolders, also at an address."""

    kind = "folder"

    def __init__(self, data_dir: str, flag: str = "--data_dir"):
        super().__init__(data_dir, flag)
        self._root = f"{data_dir.rstrip('/')}/" if is_url(data_dir) else os.path.join(data_dir, "")
        paths = find_images(data_dir, flag)
        self.names = Names(path[len(self._root) :].replace(os.sep, "/") for path in paths)

    def path(self, i: int) -> str:
        """Return the path or address of entry i."""
        return self._root + self.names[i]

    def open(self, i: int) -> BinaryIO:
        """Open the file of entry i."""
        return open_binary(self.path(i))


class ZipSource(Source):
    """The image files in a zip archive, in the order they would have as a folder tree.

    Where each entry lies is kept in arrays: the objects of `zipfile` for a million entries would
    take a gigabyte in every worker.
    """

    kind = "zip"
    METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)

    def __init__(self, data_dir: str, flag: str = "--data_dir"):
        super().__init__(data_dir, flag)
        entries = {entry.filename: entry for entry in self._list() if _is_image(entry.filename)}
        if not entries:
            raise self.error(f"holds no images; looked for names ending in {_extensions()}")
        names = sorted(entries, key=lambda name: name.split("/"))
        self.names = Names(names)
        self._place = np.array([self._locate(entries[name]) for name in names], np.int64)  # [N, 5]

    def _list(self) -> list[zipfile.ZipInfo]:
        try:
            with open_binary(self.data_dir) as file, zipfile.ZipFile(file) as archive:
                return archive.infolist()
        except Exception as error:  # zipfile and blobfile raise a dozen kinds
            raise self.error(
                f"is no zip that can be read ({one_line(error)}): make or download it again"
            ) from error

    def _locate(self, entry: zipfile.ZipInfo) -> tuple[int, ...]:
        if entry.flag_bits & 1 or entry.compress_type not in self.METHODS:
            how = "encrypted" if entry.flag_bits & 1 else "compressed by a rare method"
            raise self.error(f"has the entry {entry.filename!r} {how}: pack it as a plain zip")
        place = entry.header_offset, entry.compress_size, entry.file_size
        return *place, entry.compress_type, entry.CRC

    def open(self, i: int) -> BinaryIO:
        """Unpack entry i."""
        start, num_packed, size, method, checksum = self._place[i].tolist()
        with open_binary(self.data_dir) as file:
            file.seek(find_data(file, start))
            packed = file.read(num_packed)
        whole = packed
        if method == zipfile.ZIP_DEFLATED:
            whole = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, max(size, 1))
        if len(whole) != size or zlib.crc32(whole) != checksum:
            raise ValueError("its checksum in the zip is wrong")
        return io.BytesIO(whole)


class NpzSource(Source):
    """The array arr_0 of an npz file, uint8 [N, H, W] or [N, H, W, 1 or 3], labels in arr_1.

    Images are read where they lie if the file is local and not compressed: then worker processes
    share what the system keeps of it. Others can only be read in their order, and training asks
    for them in any: these are held in memory.
    """

    kind = "npz"

    def __init__(self, data_dir: str, flag: str = "--data_dir"):
        super().__init__(data_dir, flag)
        self.images = self._check_images(open_rows(data_dir, "arr_0", flag=flag))
        self.labels = self._check_labels(open_rows(data_dir, "arr_1", flag=flag, optional=True))
        self.names = Names(f"{i:08d}" for i in range(len(self.images)))

    def __reduce__(self) -> tuple:
        return type(self), (self.data_dir, self.flag)  # not the images: the file is opened anew

    def _check_images(self, images: np.ndarray | StreamedRows) -> np.ndarray:
        layout = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))
        if images.dtype != np.uint8 or not layout:
            raise self.error(
                f"has arr_0 of {images.dtype} {list(images.shape)}: "
                "save images as uint8 [N, H, W] or [N, H, W, 1 or 3]"
            )
        if 0 in images.shape:
            raise self.error(f"has an empty arr_0, {list(images.shape)}: it holds no images")
        try:
            images = np.asarray(images)
        except MemoryError as error:
            raise self.error(
                f"has arr_0 of {list(images.shape)}, which does not fit into memory: save it by "
                "np.savez, uncompressed, on a disk of this machine"
            ) from error
        return images[..., 0] if images.shape[3:] == (1,) else images

    def _check_labels(self, labels: np.ndarray | StreamedRows | None) -> np.ndarray | None:
        if labels is None:
            return None
        if labels.shape != self.images.shape[:1] or labels.dtype.kind not in "iu":
            raise self.error(
                f"has arr_1 of {labels.dtype} {list(labels.shape)}: "
                f"save labels as int64 [{len(self.images)}]"
            )
        return np.asarray(labels).astype(np.int64)

    def read(self, i: int, least: int | None = None) -> Image.Image:
        """Return image i."""
        return Image.fromarray(self.images[i])


class LmdbSource(Source):
    """The values of an LMDB database, encoded images, in the order of their keys."""

    kind = "LMDB"

    def __init__(self, data_dir: str, flag: str = "--data_dir"):
        super().__init__(data_dir, flag)
        lmdb = self._import()
        try:
            with self._open_database(lmdb) as database, database.begin() as transaction:
                keys = transaction.cursor().iternext(keys=True, values=False)
                self.names = Names(map(os.fsdecode, keys))
        except lmdb.Error as error:
            raise self.error(
                f"is no LMDB that can be read ({one_line(error)}): make or download it again"
            ) from error
        if not self.names:
            raise self.error("is an LMDB without entries: download it again")

    def _import(self):
        try:
            import lmdb
        except ImportError:
            raise self.error("is an LMDB, but the package is missing: pip install lmdb") from None
        return lmdb

    def _open_database(self, lmdb):
        return lmdb.open(self.data_dir, readonly=True, lock=False, readahead=False)

    def open(self, i: int) -> BinaryIO:
        """Fetch the value of entry i."""
        # Opened anew for each image (50 us), as a database must not be open across a fork.
        with self._open_database(self._import()) as database, database.begin() as transaction:
            return io.BytesIO(transaction.get(os.fsencode(self.names[i]), b""))


def _is_lmdb(path: str) -> bool:
    return not is_url(path) and os.path.isfile(os.path.join(path, "data.mdb"))


def _is_file_named(extension: str) -> Callable[[str], bool]:
    def matches(path: str) -> bool:
        return path.lower().endswith(extension) and (is_url(path) or os.path.isfile(path))

    return matches


SOURCES = (
    (_is_lmdb, LmdbSource),
    (_is_file_named(".zip"), ZipSource),
    (_is_file_named(".npz"), NpzSource),
    (lambda path: is_url(path) or os.path.isdir(path), FolderSource),
)


def open_source(data_dir: str, flag: str = "--data_dir") -> Source:
    """Return the images at a path or address: a folder tree, .zip, .npz or LMDB folder.

    Raises:
        ValueError: there is nothing, or no image, or what is there cannot be read.
    """
    data_dir = os.fspath(data_dir or "")
    for matches, kind in SOURCES:
        if data_dir and matches(data_dir):
            return kind(data_dir, flag)
    if not data_dir:
        raise ValueError(f"{flag} is missing: {REMEDY}")
    state = "is a file of another kind" if os.path.exists(data_dir) else "does not exist"
    raise ValueError(f"{flag} {data_dir!r} {state}: {REMEDY}")


# Folders


def find_images(data_dir: str, flag: str = "--data_dir") -> list[str]:
    """Return the sorted paths of all images in a folder and its subfolders.

    Raises:
        ValueError: the folder is not given, not there, cannot be listed, or holds no images.
    """
    if not data_dir:
        raise ValueError(f"{flag} is missing: name the folder that holds the images")
    if not is_url(data_dir) and not os.path.isdir(data_dir):
        state = "is a file, not a folder" if os.path.exists(data_dir) else "does not exist"
        raise ValueError(f"{flag} {data_dir!r} {state}: name the folder of the images")
    try:
        paths = _list_image_files_recursively(data_dir)
    except Exception as error:  # each storage service brings errors of its own
        raise ValueError(f"{flag} {data_dir!r} cannot be listed: {one_line(error)}") from error
    if not paths:
        raise ValueError(
            f"{flag} {data_dir!r} and its subfolders hold no images; "
            f"looked for file names ending in {_extensions()}"
        )
    return paths


def _is_image(name: str) -> bool:
    """Tell images by their names; a Mac packs shadows of files under __MACOSX/."""
    endings = tuple(f".{extension}" for extension in EXTENSIONS)
    return name.lower().endswith(endings) and not name.startswith("__MACOSX/")


def _extensions() -> str:
    return f".{', .'.join(EXTENSIONS)}"


def _list_image_files_recursively(data_dir: str) -> list[str]:
    """Return the paths of all images below a folder; each folder is listed in sorted order."""
    paths = []
    for path, is_folder in _list_folder(data_dir):
        if is_folder:
            paths.extend(_list_image_files_recursively(path))
        elif _is_image(path):
            paths.append(path)
    return paths


def _list_folder(folder: str) -> list[tuple[str, bool]]:
    """Return the sorted entries of a folder as paths, each with whether it is a folder."""
    if not is_url(folder):
        with os.scandir(folder) as entries:
            found = sorted((entry.name, _is_folder(entry, folder)) for entry in entries)
        return [(os.path.join(folder, name), is_folder) for name, is_folder in found]
    import blobfile as bf

    names = sorted(name.rstrip("/") for name in bf.listdir(folder))
    urls = [bf.join(folder, name) for name in names]
    return [(url, not url.lower().endswith(EXTENSIONS) and bf.isdir(url)) for url in urls]


def _is_folder(entry: os.DirEntry, parent: str) -> bool:
    """Tell folders from files; a link to a folder that holds the link is neither."""
    if not entry.is_dir():
        return False
    around = os.path.join(os.path.realpath(parent), "")
    return not (
        entry.is_symlink() and around.startswith(os.path.join(os.path.realpath(entry.path), ""))
    )
