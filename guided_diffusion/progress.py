"""A bar with the time left over images that all ranks share."""

from typing import Any

from tqdm import tqdm

from . import dist_util


class Progress:
    """A bar over images, on rank 0, that moves by whole images or by shares of them.

    Args:
        total: number of images.
        what: one word on what is done to them, or on what they are.
        done: images that were done before.
        ranks: how many ranks are at work on them, each as far as this one; all by default.
    """

    def __init__(self, total: int, what: str, done: int = 0, ranks: int | None = None):
        main = dist_util.is_main()
        self._bar = tqdm(total=total, initial=done, unit="img", desc=what, disable=not main)
        self._ranks = dist_util.get_world_size() if ranks is None else ranks
        self._moved = float(done)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def move(self, images: float) -> None:
        """Count so many images of this rank, or a share of them; the others are as far."""
        self._moved += images * self._ranks
        there = min(int(self._moved + 1e-6), self._bar.total)
        self._bar.update(there - self._bar.n)
