"""The files of a set of samples, so written that a kill at any moment loses one batch at most.

    samples_NxHxWxC.json     the manifest: flags, seed, hashes of what was read
    samples_NxHxWxC.shards/  a file for each batch, while they are drawn
    samples_NxHxWxC.npz      arr_0 and maybe arr_1, streamed together from the shards
    samples_NxHxWxC.png      a grid of the first images
    samples_NxHxWxC/         every image as a PNG file, if asked for
    samples_NxHxWxC_film.png the way of the first images, if asked for

All ranks call the methods of `SampleFiles` together, but for `write`.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from tqdm import tqdm

from . import checkpoint_sets, checkpoints, config, dist_util, logger
from .npz_rows import open_rows, stream_npz
from .pictures import save_film, save_grid, to_picture

FORMAT = 1  # of the manifest
IN_GRID = 100  # images in the grid
IN_FILM = 8  # images whose chains are shown
PATIENCE = 2.0  # seconds before a progress bar appears
BLOCK = 1024  # rows that are in memory at once when a whole set is read

# Flags that do not change what image i is, up to rounding, or do so through what else the manifest
# lists: hashes of files, and the list of labels.
INDIFFERENT = {
    "log_dir", "device", "seed", "dist_timeout", "dry_run", "preset", "num_samples", "batch_size",
    "save_images", "model_path", "classifier_path", "base_samples", "labels_file", "dropout",
    "label_dropout", "use_checkpoint", "use_kl", "rescale_learned_sigmas", "save_every_t",
    "classes", "class_balanced", "guide_model_path", "images", "mask",
}  # fmt: skip


class SampleFiles:
    """One set of samples in a folder: what is drawn already, and how the rest gets there.

    Args:
        folder: where to.
        shape: (N, H, W, C) of all images.
        flags: what the images depend on, for the manifest: name -> value, as JSON keeps it, and
            for a file the hash of what is in it.
    """

    def __init__(self, folder: str, shape: tuple[int, int, int, int], flags: dict[str, Any]):
        self.shape, self.flags = shape, flags
        self.stem = os.path.join(folder, f"samples_{'x'.join(map(str, shape))}")
        self.npz, self.manifest = f"{self.stem}.npz", f"{self.stem}.json"
        self.shards = f"{self.stem}.shards"
        self.seed = -1
        self._found: dict[str, Any] | None = None  # the manifest

    # -- beginning, or going on ----------------------------------------------------------------

    @contextmanager
    def claimed(self, seed: int, choose_seed: Callable[[int], int]) -> Iterator["SampleFiles"]:
        """Keep other runs out within the block, and settle the seed; `seed` holds it then.

        Args:
            seed: -1 to take the manifest's or, without one, to draw it.
            choose_seed: turns that into a seed, the same on all ranks.

        Raises:
            ValueError: if the folder holds samples of other flags, naming what differs.
        """
        found = None
        with checkpoint_sets.reserved(self.shards):
            try:
                dist_util.barrier()  # rank 0 has the folder now
                found = dist_util.broadcast_object(self._read() if dist_util.is_main() else None)
                if found:
                    self._refuse_a_mix(found, seed)
                    seed = found["seed"]
                if dist_util.is_main():
                    self._remove_leftovers(all_shards=not found)
                self.seed, self._found = choose_seed(seed), found
                yield self
            except ValueError:
                if not found:
                    self._forget_if_nothing_is_drawn()
                raise
            finally:
                if dist_util.is_main():
                    with suppress(OSError):
                        os.rmdir(self.shards)  # stays if there is something in it

    def _forget_if_nothing_is_drawn(self) -> None:
        """Delete the manifest after a mistake that came before anything else was written."""
        alone = dist_util.get_world_size() == 1  # other ranks may be writing their first shards
        is_new = self._found is not None and not self._found["complete"]
        if alone and is_new and not self._ranges() and not os.path.exists(self.npz):
            checkpoints.remove(self.manifest)

    def _remove_leftovers(self, all_shards: bool) -> None:
        """Delete the temporary files of killed runs; and shards of which no manifest tells."""
        folder, stem = os.path.split(self.stem)
        beside = rf"{re.escape(stem)}(_film|_inpainted)?\.(json|npz|png)"
        of_shards = r".*\.npy(\.tmp\d+)?" if all_shards else r".*\.npy\.tmp\d+"
        for where, pattern in [
            (folder, rf"{beside}\.tmp\d+"),
            (self.shards, of_shards),
            (self.stem, r"(\d+\.png|labels\.csv)\.tmp\d+"),
        ]:
            for name in filter(re.compile(pattern).fullmatch, checkpoints.names_in(where)):
                os.remove(os.path.join(where, name))

    def _remove_pictures(self) -> None:
        """Delete the pictures of another set under the name of this one."""
        for path in (f"{self.stem}.png", f"{self.stem}_film.png"):
            checkpoints.remove(path)
        written = re.compile(r"\d+\.png|labels\.csv")
        for name in filter(written.fullmatch, checkpoints.names_in(self.stem)):
            os.remove(os.path.join(self.stem, name))

    def _read(self) -> dict[str, Any] | None:
        """Return the manifest, None if there is none."""
        if not os.path.exists(self.manifest):
            if os.path.exists(self.npz):
                raise ValueError(
                    f"{self.npz} is there, and no manifest tells how it was drawn: move it away, "
                    "or choose another --log_dir"
                )
            return None
        problem = "is no manifest of samples"
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            found = json.loads(checkpoints.read_file(self.manifest))
            if found["format"] != FORMAT:
                problem = f"has format {found['format']!r}, this version reads {FORMAT}"
            elif isinstance(found["flags"], dict) and isinstance(found["seed"], int):
                return {key: found[key] for key in ("seed", "flags", "complete")}
        raise ValueError(
            f"{self.manifest} {problem}: remove {self.stem}.*, or choose another --log_dir"
        )

    def _refuse_a_mix(self, found: dict[str, Any], seed: int) -> None:
        mine, theirs = dict(self.flags), dict(found["flags"])
        if seed != -1:
            mine["seed"], theirs["seed"] = seed, found["seed"]
        defaults = {f.name: f.default for f in config.all_fields()}  # of what one side lacks
        differing = [
            f"{name}: {_shown(theirs.get(name))} there, {_shown(mine.get(name))} here"
            for name in sorted(mine.keys() | theirs.keys())
            if (defaults | mine).get(name) != (defaults | theirs).get(name)
        ]
        if differing:
            raise ValueError(
                f"--log_dir {os.path.dirname(self.stem)} holds other samples of this shape "
                f"({'; '.join(differing)}): choose another --log_dir, or remove {self.stem}.*"
            )

    def _write_manifest(self, complete: bool) -> None:
        self._found = {"seed": self.seed, "flags": self.flags, "complete": complete}
        if dist_util.is_main():
            text = json.dumps(self._found | {"format": FORMAT}, indent=1, sort_keys=True) + "\n"
            checkpoints.write_bytes(self.manifest, text.encode())

    def is_complete(self) -> bool:
        """Tell whether the npz holds this set."""
        complete = self._found is not None and self._found["complete"]
        return dist_util.broadcast_object(complete and os.path.exists(self.npz))

    # -- shards ----------------------------------------------------------------------------------

    def _shard(self, kind: str, indices: range) -> str:
        return os.path.join(self.shards, f"{kind}_{indices.start:09d}_{indices.stop:09d}.npy")

    def _ranges(self, kind: str = "images") -> list[range]:
        """Return which images the shards of a kind hold, in rising order."""
        names = checkpoints.names_in(self.shards)
        matches = (re.fullmatch(rf"{kind}_(\d+)_(\d+)\.npy", name) for name in names)
        found = (range(int(match[1]), int(match[2])) for match in matches if match)
        return sorted(found, key=lambda indices: indices.start)

    def _load(self, kind: str, indices: range) -> np.ndarray | None:
        """Map the rows of a shard, None if it is not whole."""
        try:
            rows = np.load(self._shard(kind, indices), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        return rows if len(rows) == len(indices) and rows.shape[-3:] == self.shape[1:] else None

    def missing(self, batch_size: int) -> list[range]:
        """Return the images to draw: of each batch those that no shard holds. All ranks call."""
        if self.is_complete():
            return []
        self._write_manifest(complete=False)
        return dist_util.broadcast_object(
            self._missing(batch_size) if dist_util.is_main() else None
        )

    def _missing(self, batch_size: int) -> list[range]:
        drawn = np.zeros(self.shape[0], bool)
        for indices in self._ranges():
            if self._load("images", indices) is not None:
                drawn[indices.start : indices.stop] = True
        gaps = []
        for start in range(0, len(drawn), batch_size):
            edges = np.flatnonzero(np.diff(drawn[start : start + batch_size], prepend=1, append=1))
            gaps += [range(start + a, start + b) for a, b in edges.reshape(-1, 2).tolist()]
        return gaps

    def write(self, indices: range, images: np.ndarray, film: np.ndarray | None = None) -> None:
        """Keep a batch: uint8 [n, H, W, C]; and before it the film of its first images, if any."""
        if film is not None:
            first = range(indices.start, indices.start + len(film))
            path = self._shard(f"film{film.shape[2]}", first)
            checkpoints.write_file(path, lambda file: np.save(file, film))
        checkpoints.write_file(self._shard("images", indices), lambda file: np.save(file, images))

    def _in_order(self, kind: str = "images") -> Iterator[np.ndarray]:
        """Yield the rows of a kind of shard in rising order, each once."""
        done = 0
        for indices in self._ranges(kind):
            rows = self._load(kind, indices)
            if rows is not None and indices.start <= done < indices.stop:
                yield rows[done - indices.start :]
                done = indices.stop
        if kind == "images" and done < self.shape[0]:
            raise ValueError(
                f"--log_dir {os.path.dirname(self.stem)} lacks the samples from {done} on, which "
                "another rank has drawn: all ranks must share its disk"
            )

    # -- ending ----------------------------------------------------------------------------------

    def finish(
        self,
        labels_of: Callable[[range], np.ndarray] | None,
        *,
        names: list[str] | None = None,
        save_images: bool = False,
        frames: int = 0,
    ) -> None:
        """Put the shards together, delete them, and draw the pictures. All ranks call this.

        Args:
            labels_of: gives the labels of some samples, for arr_1; None for no such array.
            names: of the classes, by number.
            save_images: write every image, too.
            frames: how many pictures a film has; 0 for no film.
        """
        with dist_util.stage("putting the samples together"):
            if not self.is_complete():
                if dist_util.is_main():
                    self._remove_pictures()
                    self._write_film(labels_of, names, frames)
                    self._write_npz(labels_of)
                self._write_manifest(complete=True)
            if dist_util.is_main():
                shutil.rmtree(self.shards, ignore_errors=True)
                if not os.path.exists(f"{self.stem}.png"):
                    self._write_grid(labels_of, names)
                if frames and not os.path.exists(f"{self.stem}_film.png"):
                    logger.log(
                        "no film: the first images were drawn without --save_every_t, or another"
                    )
            dist_util.wait_patiently("putting the samples together")
            if save_images:
                self._write_images(labels_of)

    def _write_npz(self, labels_of: Callable[[range], np.ndarray] | None) -> None:
        count = self.shape[0]
        bar = tqdm(desc="writing", total=count, unit="img", delay=PATIENCE)
        images = _counted(self._in_order(), bar)
        arrays = {"arr_0": (self.shape, np.dtype(np.uint8), images)}
        if labels_of is not None:
            blocks = (labels_of(indices) for indices in _blocks(count))
            arrays["arr_1"] = (self.shape[:1], np.dtype(np.int64), blocks)
        checkpoints.write_file(self.npz, lambda file: stream_npz(file, arrays))
        logger.log(f"saved {os.path.abspath(self.npz)}")

    def _write_grid(self, labels_of: Any, names: list[str] | None) -> None:
        images = open_rows(self.npz)[:IN_GRID]
        labels = None if labels_of is None else labels_of(range(len(images)))
        save_grid(images, labels, f"{self.stem}.png", names)

    def _write_film(self, labels_of: Any, names: list[str] | None, frames: int) -> None:
        films = list(self._in_order(f"film{frames}"))
        if films:
            film = np.concatenate(films)[:IN_FILM]
            labels = None if labels_of is None else labels_of(range(len(film)))
            save_film(film, labels, f"{self.stem}_film.png", names)

    def _write_images(self, labels_of: Any) -> None:
        """Write each image as NNNNNN.png, those that are not there; ranks share the work."""
        rank, world = dist_util.get_rank(), dist_util.get_world_size()
        os.makedirs(self.stem, exist_ok=True)
        digits = max(6, len(str(self.shape[0] - 1)))
        mine = _blocks(self.shape[0])[rank::world]
        bar = tqdm(
            desc="writing PNG files", total=sum(map(len, mine)), unit="img", delay=PATIENCE,
            disable=not dist_util.is_main(),
        )  # fmt: skip
        for indices in _counted(mine, bar):
            rows = open_rows(self.npz)  # mapped anew: what was read before leaves the memory
            for i in indices:
                path = os.path.join(self.stem, f"{i:0{digits}d}.png")
                if not checkpoints.size_of(path):  # missing, or emptied by a loss of power
                    image = to_picture(rows[i])
                    checkpoints.write_file(
                        path, lambda file, image=image: image.save(file, "PNG"), durable=False
                    )
        dist_util.wait_patiently("writing PNG files")
        if labels_of is not None and dist_util.is_main():
            labels = labels_of(range(self.shape[0]))
            lines = [f"{i:0{digits}d}.png,{label}\n" for i, label in enumerate(labels.tolist())]
            text = "".join(["name,class\n", *lines])
            checkpoints.write_bytes(os.path.join(self.stem, "labels.csv"), text.encode())
        logger.log(f"saved {self.shape[0]:,} images in {os.path.abspath(self.stem)}")


def _shown(value: Any) -> str:
    """Return a value for a message; of a hash, the start."""
    text = "none" if value is None else str(value) or '""'
    return f"{text[:12]}..." if re.fullmatch(r"[0-9a-f]{64}", text) else text


def _counted(parts: Iterable[Any], bar: tqdm) -> Iterator[Any]:
    """Yield parts, and count the images in each once it is done with."""
    with bar:
        for part in parts:
            yield part
            bar.update(len(part))


def _blocks(count: int) -> list[range]:
    return [range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
