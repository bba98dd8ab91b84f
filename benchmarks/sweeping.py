"""What the sweeps share: sets of samples, drawn by the scripts side by side, scored and kept.

Every set has a folder, whose name says what it holds. What is there is not drawn again, a set that
was interrupted goes on where it was, and scores are kept beside the images; so a sweep that was
killed goes on by the same command.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fashion_classifier as fc
import torch
from garment_scores import Scorer, Scores
from tqdm import tqdm

from guided_diffusion.noise_levels import GRIDS

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
POLL = 1.0  # seconds between two looks at the folders
REAL_COUNTS = (1000, 5000)  # real training images that are scored as if they were samples


@dataclass(frozen=True)
class Drawing:
    """A set of samples.

    Args:
        name: of its folder; it tells apart all drawings of a sweep.
        num_samples: how many images.
        calls: of the network for each image, for the progress bar.
        flags: those of the script that make the set what it is, ("--name", "value", ...).
        script: which program draws it.
    """

    name: str
    num_samples: int
    calls: int
    flags: tuple[str, ...]
    script: str = "image_sample.py"


class DrawingError(ValueError):
    """A script did not draw what it was asked for."""


def add_flags(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the flags of every sweep; `out` is the default output folder."""
    add = parser.add_argument
    add("--num_samples", type=positive, default=1000, help="images of each set")
    add("--batch_size", type=positive, default=50, help="images at once")
    add("--seed", type=int, default=0, help="seed of labels and noise")
    add("--bf16", action="store_true", help="compute in bfloat16")
    add("--steps_by", default="logsnr", choices=GRIDS, help="how solvers spread their steps")
    add("--workers", type=positive, default=1, help="sets to draw at once, on a thread each")
    add("--judge", type=Path, default=fc.JUDGE, help="file of the judge")
    add("--test_dir", type=Path, default=Path("data/fashion_mnist/test"), help="real test images")
    add("--train_dir", type=Path, help="real training images [train/ beside --test_dir]")
    add("--out", type=Path, default=Path(out), help="output folder")


def positive(text: str) -> int:
    """Read a whole number above 0, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def names_of(text: str, known: Iterable[str], flag: str) -> list[str]:
    """Read names with commas between.

    Raises:
        ValueError: one is not known, stands there twice, or there is none.
    """
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in set(known)]
    if unknown or len(set(names)) < len(names):
        raise ValueError(f"{flag} {text!r}: each at most once, of {', '.join(known)}")
    return names


def numbers_of(text: str, kind: Callable[[str], Any], flag: str, least: float = 0) -> list[Any]:
    """Read numbers with commas between, sorted, each once.

    Raises:
        ValueError: one is no number of that kind, or below `least`.
    """
    try:
        numbers = sorted({kind(word) for word in text.split(",")})
    except ValueError:
        numbers = []
    if not numbers or not least <= numbers[0] <= numbers[-1] < float("inf"):
        raise ValueError(f"{flag} {text!r}: give numbers from {least} on, with commas between")
    return numbers


class Sweep:
    """Sets of samples in the folders of --out, and their scores.

    Args:
        args: has the flags of `add_flags`.

    Raises:
        ValueError: the judge or the real images are not there.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.scorer = Scorer(args.judge, args.test_dir, args.out)
        self.failures: list[str] = []
        self._children: set[subprocess.Popen] = set()
        self._stopped = False

    def path(self, drawing: Drawing) -> Path:
        """Return the file of a set."""
        return self.args.out / drawing.name / f"samples_{drawing.num_samples}x28x28x1.npz"

    def run(self, drawings: Sequence[Drawing]) -> dict[Drawing, Scores]:
        """Draw and score what is not there yet; return the scores of all that succeeded.

        Raises:
            ValueError: a folder holds samples of another seed or precision.
        """
        assert len({(d.name, d.num_samples) for d in drawings}) == len(drawings), drawings
        if not drawings:
            return {}
        for drawing in drawings:
            self._refuse_others(drawing)
        scores = {}
        torch.set_num_threads(1)
        with ThreadPoolExecutor(self.args.workers) as pool, self._bar(drawings) as bar:
            pending = {pool.submit(self._draw_and_score, d): d for d in drawings}
            try:
                while pending:
                    done, _ = wait(pending, timeout=POLL)
                    bar.update(self._look(drawings) - bar.n)
                    for future in done:
                        self._collect(pending.pop(future), future, scores)
            except BaseException:
                self._stop(pending)
                raise
        return {drawing: scores[drawing] for drawing in drawings if drawing in scores}

    def real(self) -> dict[int, Scores]:
        """Score some real training images as if they were samples, for comparison."""
        folder = self.args.train_dir or self.args.test_dir.parent / "train"
        kept = {n: self.args.out / f"real_train_{n}.scores.json" for n in REAL_COUNTS}
        return {n: self.scorer.score_real(folder, n, path) for n, path in kept.items()}

    def _bar(self, drawings: Sequence[Drawing]) -> tqdm:
        total = sum(d.num_samples * d.calls for d in drawings)
        return tqdm(
            desc=f"{len(drawings)} sets", total=total, initial=self._look(drawings), unit="call",
            unit_scale=True, smoothing=0,
        )  # fmt: skip

    def _look(self, drawings: Sequence[Drawing]) -> int:
        """Return how many calls of the network are done."""
        return sum(images_there(self.path(d), d.num_samples) * d.calls for d in drawings)

    def _refuse_others(self, drawing: Drawing) -> None:
        """Raise unless a finished set has the seed and the precision that are wanted."""
        manifest = self.path(drawing).with_suffix(".json")
        if not (self.path(drawing).exists() and manifest.exists()):
            return  # what is unfinished is checked by the script
        found = json.loads(manifest.read_text())
        there = found.get("seed"), bool(found.get("flags", {}).get("use_bf16"))
        if there != (self.args.seed, self.args.bf16):
            raise ValueError(
                f"--out {self.args.out}: {drawing.name} was drawn with seed {there[0]} and "
                f"{'' if there[1] else 'no '}bf16: choose another --out, or the same flags"
            )

    def _draw_and_score(self, drawing: Drawing) -> Scores:
        npz = self.path(drawing)
        if not npz.exists():
            self._draw(drawing)
        return self.scorer.score_file(npz)

    def _draw(self, drawing: Drawing) -> None:
        """Run the script that draws a set; what it prints goes to output.txt in the folder."""
        folder = self.path(drawing).parent
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "output.txt", "w+", errors="replace") as output:
            code = self._wait_for(command(drawing, self.args, folder), output)
            output.seek(0)
            lines = [line for line in re.split(r"[\r\n]+", output.read()) if line.strip()]
        if code or not self.path(drawing).exists():
            reason = lines[-1].strip() if lines else "without a word"
            raise DrawingError(f"{drawing.name}: exit code {code}: {reason} ({folder}/output.txt)")

    def _wait_for(self, words: list[str], output: Any) -> int:
        if self._stopped:
            raise DrawingError("stopped")
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env=one_thread(),
        )  # fmt: skip
        self._children.add(child)
        try:
            return child.wait()
        finally:
            self._children.discard(child)

    def _collect(
        self, drawing: Drawing, future: Future[Scores], scores: dict[Drawing, Scores]
    ) -> None:
        """Keep the scores of a set, or tell at once what went wrong with it."""
        try:
            scores[drawing] = future.result()
        except (ValueError, OSError) as error:
            self.failures.append(str(error))
            tqdm.write(f"not drawn: {error}", file=sys.stderr)

    def _stop(self, pending: Iterable[Future[Scores]]) -> None:
        self._stopped = True
        for future in pending:
            future.cancel()
        for child in list(self._children):
            child.terminate()


def one_thread() -> dict[str, str]:
    """Return the environment of a script that shall keep to one core."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


def command(drawing: Drawing, args: argparse.Namespace, folder: Path) -> list[str]:
    """Return the command line that draws a set into a folder."""
    words = [
        sys.executable, SCRIPTS / drawing.script,
        "--preset", "fashion",
        "--num_samples", drawing.num_samples,
        "--class_balanced", True,
        "--batch_size", args.batch_size,
        *drawing.flags,
        "--use_bf16", args.bf16,
        "--seed", args.seed,
        "--log_dir", folder,
    ]  # fmt: skip
    return [str(word) for word in words]


def images_there(npz: Path, num_samples: int) -> int:
    """Return how many images of a set are drawn: all, or those of the finished batches."""
    if npz.exists():
        return num_samples
    names = (path.name for path in npz.with_suffix(".shards").glob("images_*.npy"))
    ends = filter(None, (re.fullmatch(r"images_(\d+)_(\d+)\.npy", name) for name in names))
    return min(num_samples, sum(int(end[2]) - int(end[1]) for end in ends))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


SHOWN = {
    "FD (judge)": lambda s: f"{s.fd:.2f}",
    "label accuracy": lambda s: f"{s.accuracy:.1%}",
    "precision": lambda s: f"{s.precision:.3f}",
    "recall": lambda s: f"{s.recall:.3f}",
}  # column -> how it is printed


def shown(scores: Scores | None) -> list[str]:
    """Return the cells of all four scores; dashes if there are none."""
    return [show(scores) if scores else "-" for show in SHOWN.values()]


def run_program(
    name: str, body: Callable[[argparse.Namespace], Sweep | None], args: argparse.Namespace
) -> int:
    """Run a sweep; return the exit code, after one line on stderr of what went wrong."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sweep = body(args)
    except (ValueError, OSError) as error:
        return fail(name, str(error))
    except KeyboardInterrupt:
        return fail(name, "stopped: the same command goes on", 130)
    finally:
        signal.signal(signal.SIGTERM, before)
    if sweep and sweep.failures:
        return fail(name, f"{len(sweep.failures)} sets are missing: {sweep.failures[0]}")
    return 0


def fail(name: str, message: str, code: int = 1) -> int:
    """Print one line on stderr; return the exit code of a mistake."""
    print(f"{name}: error: {message}", file=sys.stderr)
    return code
