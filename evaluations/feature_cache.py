"""Features that were computed before, kept by the content of the images and of the network.

A file holds the features of one part of a set. Its name is a hash of the pixels, so whoever asks
for the same images again, in whatever file they are, need not wait. 50,000 images take a gigabyte,
so what nobody asked for lately makes room. All of it can be deleted at any time.
"""

import hashlib
import os
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

from guided_diffusion import checkpoints

from .features import Extractor, Features, Report, ignore
from .inception_weights import cache_folder

NONE = "none"  # for --cache_dir
HEX = "[0-9a-f]"
# Names that no one else would choose; the last * is for what a kill left under another name.
FILES = f"*-{64 * HEX}/{40 * HEX}.npz*"


class FeatureCache:
    """Features by the content of images, in a folder.

    Args:
        folder: None for the usual one, "none" to keep nothing.
        extractor: the network that sees the images.
        batch_size: images that it sees at once; None means what suits its device.
    """

    def __init__(self, folder: str | None, extractor: Extractor, batch_size: int | None = None):
        folder = os.path.expanduser(folder or "") or os.path.join(cache_folder(), "features")
        self._folder = None if folder == NONE else os.path.join(folder, extractor.identity)
        self._extractor, self._batch_size = extractor, batch_size

    def features(self, images: np.ndarray, report: Report = ignore) -> Features:
        """Return what the network sees in images, now, or saw in them at an earlier time.

        Args:
            images: uint8 [n, H, W, 3].
            report: told every now and then how many more are done.
        """
        path = self._folder and os.path.join(self._folder, f"{_hash(images)}.npz")
        found = path and _read(path, len(images))
        if found:
            with suppress(OSError):  # a folder of someone else's
                os.utime(path)
            report(len(images))
            return found
        features = self._extractor(images, self._batch_size, report)
        if path and all(np.isfinite(array).all() for array in features if array is not None):
            self._write(path, features)
        return features

    def trim(self, num_bytes: float) -> None:
        """Remove files that nobody asked for for the longest time, until the others fit."""
        if self._folder is None:
            return
        files = []
        for path in Path(self._folder).parent.glob(FILES):
            with suppress(OSError):  # another process may have removed it
                files.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        for _, size, path in sorted(files, reverse=True):
            num_bytes -= size
            if num_bytes < 0:
                with suppress(OSError):
                    path.unlink()

    def _write(self, path: str, features: Features) -> None:
        """Keep features; a disk that takes none is told of once, and is no reason to end."""
        present = {key: array for key, array in features._asdict().items() if array is not None}
        try:
            os.makedirs(self._folder, exist_ok=True)
            checkpoints.write_file(path, lambda file: np.savez(file, **present), durable=False)
        except OSError as error:
            reason = checkpoints.reason_of(error)
            print(f"features are not kept in {self._folder} ({reason})", file=sys.stderr)
            self._folder = None


def _hash(images: np.ndarray) -> str:
    """Return a hash of pixels and their arrangement."""
    digest = hashlib.blake2b(str(images.shape).encode(), digest_size=20)
    digest.update(np.ascontiguousarray(images))
    return digest.hexdigest()


def _read(path: str, num_images: int) -> Features | None:
    """Return the features of a file; None if there is none, or if it is damaged."""
    # A disk and numpy have a dozen ways to say that; the file will be written anew.
    with suppress(Exception), np.load(path, allow_pickle=False) as npz:
        features = Features(**npz)
        arrays = [array for array in features if array is not None]
        if all(a.shape[:-1] == (num_images,) and a.dtype == np.float32 for a in arrays):
            return features
    return None
