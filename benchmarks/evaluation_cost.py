"""What the scores cost as the number of images grows: time and peak memory, two ways.

    pip install scipy
    python benchmarks/evaluation_cost.py

Random feature vectors stand for images: 10,000 real ones against 10,000 and 50,000 samples, of
2,048 features each. "here" is evaluations/: moments of a stream of parts, the Frechet distance by
singular values, neighbours by blocks. "plain" is the straightforward way: all vectors in memory,
numpy's covariance, a matrix square root, and whole matrices of distances, by rows that just fit.
"from statistics" is the Frechet distance of covariances that are there, as those of a reference.
Every figure is of a process of its own. Seconds are without those of drawing the numbers; memory is
what the process had at its peak, less what it had after its imports.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # evaluations

from sweeping import markdown
from tqdm import tqdm

DIM = 2048
PART = 256  # vectors that come at once
NUM_REAL = 10_000
ROWS = 1000  # of a matrix of distances that the plain way has in memory

drawing = 0.0  # seconds that drawing random numbers took


def parts(num: int, seed: int) -> Iterator[np.ndarray]:
    """Yield `num` random feature vectors, float32 [n, DIM], part by part; not quite independent."""
    global drawing
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((64, DIM), dtype=np.float32) / 8
    for at in range(0, num, PART):
        count, start = min(PART, num - at), time.perf_counter()
        low = rng.standard_normal((count, 64), dtype=np.float32)
        part = np.abs(low @ mixing + rng.standard_normal((count, DIM), dtype=np.float32) / 4)
        drawing += time.perf_counter() - start
        yield part


def frechet_here(num: int) -> float:
    """Return the Frechet distance of two streams of features."""
    from evaluations.metrics import frechet_distance
    from evaluations.moments import Moments

    found = []
    for count, seed in ((NUM_REAL, 0), (num, 1)):
        moments = Moments(DIM)
        for part in parts(count, seed):
            moments.add(part)
        found += [moments.mean, moments.covariance()]
    return frechet_distance(*found)


def frechet_plain(num: int) -> float:
    """Return the same from all vectors at once, by a matrix square root."""
    from scipy.linalg import sqrtm

    real, ours = (np.concatenate(list(parts(n, seed))) for n, seed in ((NUM_REAL, 0), (num, 1)))
    (mu1, sigma1), (mu2, sigma2) = (
        (x.astype(np.float64).mean(axis=0), np.cov(x.astype(np.float64), rowvar=False))
        for x in (real, ours)
    )
    root = sqrtm(sigma1 @ sigma2).real
    return float(np.square(mu1 - mu2).sum() + np.trace(sigma1 + sigma2 - 2 * root))


def covariances(num: int) -> list[np.ndarray]:
    """Return two covariances, each of `num` random vectors."""
    global drawing
    start = time.perf_counter()
    found = [np.cov(np.concatenate(list(parts(num, seed))), rowvar=False) for seed in (0, 1)]
    drawing = time.perf_counter() - start
    return found


def distance_here(num: int) -> float:
    """Return the Frechet distance of two covariances."""
    from evaluations.metrics import frechet_distance

    mean = np.zeros(DIM)
    sigma1, sigma2 = covariances(num)
    return frechet_distance(mean, sigma1, mean, sigma2)


def distance_plain(num: int) -> float:
    """Return the same by a matrix square root."""
    from scipy.linalg import sqrtm

    sigma1, sigma2 = covariances(num)
    return float(np.trace(sigma1 + sigma2 - 2 * sqrtm(sigma1 @ sigma2).real))


def neighbours_here(num: int) -> float:
    """Return precision plus recall."""
    from evaluations.metrics import precision_recall

    real, ours = (np.concatenate(list(parts(n, seed))) for n, seed in ((NUM_REAL, 0), (num, 1)))
    return sum(precision_recall(real, ours))


def neighbours_plain(num: int) -> float:
    """Return the same from rows of the matrices of distances, each computed where it is needed."""
    real, ours = (
        np.concatenate(list(parts(n, seed))).astype(np.float64)
        for n, seed in ((NUM_REAL, 0), (num, 1))
    )

    def squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1) - 2 * a @ b.T

    def radii(x: np.ndarray) -> np.ndarray:
        rows = (np.sort(squared(x[i : i + ROWS], x), axis=1)[:, 3] for i in range(0, len(x), ROWS))
        return np.concatenate(list(rows))

    def share(points: np.ndarray, centres: np.ndarray, reach: np.ndarray) -> float:
        inside = (
            (squared(points[i : i + ROWS], centres) <= reach).any(axis=1)
            for i in range(0, len(points), ROWS)
        )
        return float(np.concatenate(list(inside)).mean())

    return share(ours, real, radii(real)) + share(real, ours, radii(ours))


TASKS: dict[str, dict[str, Callable[[int], float]]] = {
    "from statistics": {"here": distance_here, "plain": distance_plain},
    "Frechet distance": {"here": frechet_here, "plain": frechet_plain},
    "precision and recall": {"here": neighbours_here, "plain": neighbours_plain},
}


def measure(task: str, way: str, num: int) -> None:
    """Do a task in this process, and print its result, seconds and megabytes as JSON."""
    before, start = peak_mb(), time.perf_counter()
    value = TASKS[task][way](num)
    print(json.dumps([value, time.perf_counter() - start - drawing, peak_mb() - before]))


def peak_mb() -> float:
    """Return the most memory that this process ever had, in MB (Linux counts in kB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> int:
    """Measure each task in each way, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", default="10000,50000", help="numbers of samples")
    parser.add_argument("--tasks", default=",".join(TASKS), help="out of %(default)s")
    parser.add_argument("--one", nargs=3, metavar=("TASK", "WAY", "NUM"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        task, way, num = args.one
        measure(task, way, int(num))
        return 0
    counts = [int(count) for count in args.counts.split(",")]
    runs = [
        (task, way, num)
        for task, ways in TASKS.items()
        if task in args.tasks.split(",")
        for num in (counts[:1] if task == "from statistics" else counts)
        for way in ways
    ]
    found = {}
    for task, way, num in tqdm(runs, desc="measuring"):
        words = [sys.executable, __file__, "--one", task, way, str(num)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            print(f"evaluation_cost.py: error: {done.stderr.splitlines()[-1]}", file=sys.stderr)
            return 1
        found[task, num, way] = json.loads(done.stdout)
    rows = []
    for task, num in dict.fromkeys((t, n) for t, n, _ in found):
        here, plain = (found[task, num, way] for way in ("here", "plain"))
        rows.append([
            task, f"{num:,}", *(f"{x[1]:.1f}" for x in (here, plain)),
            f"{plain[1] / here[1]:.1f}", *(f"{x[2]:,.0f}" for x in (here, plain)),
            f"{abs(here[0] - plain[0]) / max(abs(plain[0]), 1e-12):.0e}",
        ])  # fmt: skip
    columns = ["seconds here", "plain", "times faster", "MB here", "plain", "difference"]
    print(markdown(["", "samples", *columns], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
