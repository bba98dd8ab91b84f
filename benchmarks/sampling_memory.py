"""Does memory grow with the number of images that are drawn? The peak of image_sample.py for a few.

    python benchmarks/sampling_memory.py --num_samples 500,50000

Draws images with a tiny network of random weights, made on the spot, in one step each, and prints a
Markdown table of the peak of resident memory and, to compare, of what all images take. The folder
of the samples, about twice that size on the way, is a temporary one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NETWORK = {
    "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,1,1,1",
    "attention_resolutions": "8", "noise_schedule": "cosine",
}  # fmt: skip


def make_model(path: Path, image_size: int) -> None:
    """Write a checkpoint of random weights, and its flags beside it."""
    import torch

    from guided_diffusion import checkpoints, config, script_util

    flags = config.defaults(*config.DIFFUSION_GROUPS) | NETWORK | {"image_size": image_size}
    torch.manual_seed(0)
    model, _ = script_util.create_model_and_diffusion(**flags)
    torch.save(model.state_dict(), path)
    Path(checkpoints.flags_path(str(path))).write_text(json.dumps(flags))


def peak_of(command: list[str]) -> int:
    """Run a command; return its peak of resident memory in bytes.

    Raises:
        ValueError: if it fails.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise ValueError(f"image_sample.py ended with exit code {process.returncode}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def table(args: argparse.Namespace, folder: Path) -> str:
    """Draw each number of images; return the Markdown table."""
    model = folder / "model000000.pt"
    # Elsewhere, since a child's peak begins with the memory of whoever started it.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
        other.submit(make_model, model, args.image_size).result()
    rows = [
        "| images | minutes | peak of resident memory | all images |",
        "| --- | --- | --- | --- |",
    ]
    peaks = []
    for number in map(int, args.num_samples.split(",")):
        flags = {
            "model_path": model, "num_samples": number, "batch_size": args.batch_size, "seed": 0,
            "timestep_respacing": "1", "device": args.device, "log_dir": folder / str(number),
        }  # fmt: skip
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        begun = time.monotonic()
        peaks.append(peak_of([sys.executable, str(ROOT / "scripts" / "image_sample.py"), *words]))
        minutes, whole = (time.monotonic() - begun) / 60, number * args.image_size**2 * 3
        rows.append(f"| {number:,} | {minutes:.1f} | {_mb(peaks[-1])} | {_mb(whole)} |")
    return "\n".join([*rows, "", f"The last peak is {_mb(peaks[-1] - peaks[0])} above the first."])


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_samples", default="500,50000", help="numbers of images, by commas")
    parser.add_argument("--image_size", type=int, default=64, help="height and width of an image")
    parser.add_argument("--batch_size", type=int, default=16, help="images at once")
    parser.add_argument("--device", default="cpu", help="where to compute")
    parser.add_argument("--out", help="folder in which to make the temporary one")
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(dir=args.out) as folder:
            print(table(args, Path(folder)))
    except (ValueError, OSError) as error:
        print(f"sampling_memory.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
