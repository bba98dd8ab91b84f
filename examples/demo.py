"""Draw 100 guided garments with the bundled models, shrink them, and upsample them again.

Three steps, each through the command-line scripts: `classifier_sample` draws ten images of every
class at 28 x 28; they are shrunk to 14 x 14 by area, as in training; `super_res_sample` brings
them back to 28 x 28. Takes no arguments; writes to demo_output/ in the current folder, which it
empties first.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("demo_output").resolve()

sys.path.insert(0, str(ROOT / "scripts"))


def draw_guided(folder: Path) -> Path:
    """Draw 100 images, ten of each class, and return the npz file."""
    import classifier_sample

    classifier_sample.main([
        "--preset", "fashion",
        "--class_balanced", "True",
        "--batch_size", "50",
        "--save_every_t", "5",
        "--seed", "1",
        "--log_dir", str(folder),
    ])  # fmt: skip
    return folder / "samples_100x28x28x1.npz"


def shrink(large: Path, path: Path) -> None:
    """Shrink the images of an npz file to half their size by area, and keep their labels."""
    with np.load(large, allow_pickle=False) as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()  # [N, C, H, W]
    small = F.interpolate(x, scale_factor=0.5, mode="area").round().to(torch.uint8)
    np.savez(path, small.permute(0, 2, 3, 1).numpy(), labels)
    print(f"saved {path}")


def upsample(small: Path, folder: Path) -> None:
    """Upsample the images of an npz file."""
    import super_res_sample

    super_res_sample.main([
        "--preset", "fashion",
        "--base_samples", str(small),
        "--batch_size", "50",
        "--use_ddim", "True",
        "--timestep_respacing", "ddim10",
        "--seed", "1",
        "--log_dir", str(folder),
    ])  # fmt: skip


def main() -> None:
    """Run the three steps."""
    shutil.rmtree(OUT, ignore_errors=True)  # or the samples there would count as done
    samples = draw_guided(OUT / "guided")
    shrink(samples, OUT / "small_100x14x14x1.npz")
    upsample(OUT / "small_100x14x14x1.npz", OUT / "upsampled")


if __name__ == "__main__":
    main()
