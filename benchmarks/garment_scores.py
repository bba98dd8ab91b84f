"""Scores of generated garments against real ones, by the features of the judge.

A library of solver_sweep.py and guidance_sweep.py. Four numbers, on the 128 features that the last
layer of the judge (fashion_classifier.py) sees:

* fd, "FD (judge)": the Frechet distance to all real test images. It is no FID, which is defined by
  another network, and cannot be compared with one; nor can distances of other numbers of samples.
* accuracy: how often the judge sees the requested label.
* precision and recall: with k = 3, between 2,000 real test images, evenly spaced, and up to 2,000
  samples, the first. That takes a second or two.
"""

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from fashion_classifier import NUM_CLASSES, Judge, features, load_judge, read_samples
from tqdm import tqdm

from guided_diffusion import checkpoints
from guided_diffusion.image_datasets import class_numbers, find_images, read_image

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for an environment without it
from evaluations import metrics  # noqa: E402

NUM_BALLS = 2000  # images of either kind that precision and recall compare


@dataclass(frozen=True)
class Scores:
    """How good a set of garments is."""

    num_samples: int
    fd: float
    accuracy: float
    precision: float
    recall: float


def spread(count: int, total: int) -> np.ndarray:
    """Return `count` different indices, evenly spaced, below `total`; all if there are fewer."""
    count = min(count, total)
    return np.arange(count) * total // count


def read_some(paths: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Read grey images uint8 [N, 28, 28, 1] and their labels int64 [N]."""
    bar = tqdm(paths, desc="reading real images", unit="img", unit_scale=True, leave=False)
    images = np.stack([np.array(read_image(path, "L")) for path in bar])
    return images[..., None], np.array(class_numbers(paths, NUM_CLASSES))


class Scorer:
    """The judge, and what it sees in the real test images.

    Args:
        judge: its file.
        test_dir: folder of the real test images.
        cache: folder that keeps their features, for the next time.

    Raises:
        ValueError: there is no such judge, or there are no such images.
    """

    def __init__(self, judge: str | os.PathLike, test_dir: str | os.PathLike, cache: Path):
        self.judge: Judge = load_judge(judge)
        paths = find_images(str(test_dir), "--test_dir")
        names = "\n".join(os.path.relpath(path, test_dir) for path in paths)
        key = checkpoints.digest(str(judge)) + names
        # Which judge and which images: where it differs, nothing that was kept counts.
        self.key = hashlib.sha256(key.encode()).hexdigest()[:16]
        real = self._features_of(paths, cache / f"real_{self.key}.npz")
        self.statistics = metrics.mean_and_covariance(real)
        self.balls = real[spread(NUM_BALLS, len(real))]

    def _features_of(self, paths: list[str], kept: Path) -> np.ndarray:
        """Return the features [N, 128] of image files, from the file `kept` if it is there."""
        if not kept.exists():
            found = features(self.judge, read_some(paths)[0]).astype(np.float32)
            kept.parent.mkdir(parents=True, exist_ok=True)
            checkpoints.write_file(str(kept), lambda file: np.savez(file, features=found))
        with np.load(kept, allow_pickle=False) as npz:
            return npz["features"]

    def score(self, images: np.ndarray, labels: np.ndarray) -> Scores:
        """Score images uint8 [N, 28, 28, 1] with their requested labels [N]."""
        found = features(self.judge, images)
        with torch.no_grad():
            seen = self.judge.out(torch.from_numpy(found).float()).argmax(dim=1).numpy()
        ours = metrics.mean_and_covariance(found)
        precision, recall = metrics.precision_recall(self.balls, found[:NUM_BALLS])
        return Scores(
            num_samples=len(images),
            fd=metrics.frechet_distance(*ours, *self.statistics),
            accuracy=float((seen == labels).mean()),
            precision=precision,
            recall=recall,
        )

    def score_file(self, npz: Path, first: int | None = None) -> Scores:
        """Score a file of samples, or its first ones, or return what was kept; keep the scores.

        Raises:
            ValueError: it is no file of labelled samples.
        """
        kept = npz.with_suffix(f".first{first}.scores.json" if first else ".scores.json")
        scores = self._read(kept, newer_than=npz.stat().st_mtime)
        if scores is None:
            images, labels = read_samples(str(npz))
            scores = self.score(images[:first], labels[:first])
            self._write(kept, scores)
        return scores

    def score_real(self, folder: str | os.PathLike, count: int, kept: Path) -> Scores:
        """Score real images, evenly spaced among those of a folder, as if they were samples.

        Raises:
            ValueError: the folder holds no images.
        """
        scores = self._read(kept)
        if scores is None:
            paths = find_images(str(folder), "--train_dir")
            images, labels = read_some([paths[i] for i in spread(count, len(paths))])
            mixed = np.random.default_rng(0).permutation(len(images))  # they come sorted by class
            scores = self.score(images[mixed], labels[mixed])
            self._write(kept, scores)
        return scores

    def _read(self, kept: Path, newer_than: float = 0) -> Scores | None:
        """Return kept scores, None if there are none of this judge and these real images."""
        try:
            if kept.stat().st_mtime < newer_than:
                return None
            found = json.loads(kept.read_text())
            known = {field.name: found["scores"][field.name] for field in fields(Scores)}
            return Scores(**known) if found["scorer"] == self.key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # missing, broken or of another version: scored anew

    def _write(self, kept: Path, scores: Scores) -> None:
        text = json.dumps({"scorer": self.key, "scores": asdict(scores)}, indent=1)
        checkpoints.write_bytes(str(kept), f"{text}\n".encode())
