"""What resampling buys when parts of images are drawn anew: the bundled model, left halves.

    python benchmarks/inpainting_table.py

Draws garments, covers their left halves and draws these anew with more or fewer walks of each
stretch of the chain (scripts/image_inpaint.py). Prints a Markdown table: the seam, the mean
difference in grey levels of the two columns where old and new meet, in the images themselves too;
and the mean difference from the covered half, which nobody can know, but which falls as the halves
agree better. What was drawn before is not drawn again.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from sweeping import markdown, one_thread

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
SETTINGS = [(1, 2), (2, 2), (5, 2), (10, 2), (10, 10)]  # resamplings, jump length
NUM_STEPS = 50
HALF = 14  # columns that are drawn anew


def draw(script: str, num_samples: int, folder: Path, *flags: str | int | Path) -> np.ndarray:
    """Draw by a script, unless it is done; return the images as integers [N, 28, 28, 1]."""
    path = folder / f"samples_{num_samples}x28x28x1.npz"
    if not path.exists():
        words = [
            sys.executable, SCRIPTS / script, "--preset", "fashion", "--num_samples", num_samples,
            "--seed", 0, "--log_dir", folder, *flags,
        ]  # fmt: skip
        subprocess.run([str(word) for word in words], check=True, env=one_thread())
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["arr_0"].astype(int)


def seam(images: np.ndarray) -> float:
    """Return the mean difference between the columns on either side of the mask's edge."""
    return float(np.abs(images[:, :, HALF - 1] - images[:, :, HALF]).mean())


def main() -> None:
    """Draw what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_samples", type=int, default=40, help="garments")
    parser.add_argument("--out", type=Path, default=Path("runs/inpainting"), help="output folder")
    args = parser.parse_args()
    count, folder = args.num_samples, args.out / "garments"
    images = draw("classifier_sample.py", count, folder, "--class_balanced", True)
    rows = [["", "", "", f"{seam(images):.1f}", "0.0"]]
    for resamplings, jump in SETTINGS:
        drawn = draw(
            "image_inpaint.py", count, args.out / f"walks{resamplings}_jump{jump}",
            "--images", folder / f"samples_{count}x28x28x1.npz", "--mask", "left",
            "--batch_size", count, "--resamplings", resamplings, "--jump_length", jump,
        )  # fmt: skip
        error = np.abs(drawn - images)[:, :, :HALF].mean()
        calls = NUM_STEPS * resamplings
        rows.append([*map(str, (resamplings, jump, calls)), f"{seam(drawn):.1f}", f"{error:.1f}"])
    print(markdown(["resamplings", "jump length", "calls", "seam", "error"], rows))


if __name__ == "__main__":
    main()
