"""How much the pixels of a seed depend on batch size and ranks, that is, on rounding.

    python benchmarks/rounding.py

Noise and labels of image i follow from the seed and i alone. What the network makes of them may
still differ in the last bits with the size of a batch and the threads of a rank, since sums are
taken in another order; now and then that moves a pixel to the next grey level. In bfloat16 a last
bit is 1/256 of a value, so pixels move further; --threads 1 gives all ranks one thread each.

Draws the same guided images with the bundled models in several ways and prints a Markdown table of
how many pixels differ, and by how much. What was drawn before is not drawn again.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models" / "fashion"
METHODS = {  # name -> what sets it apart
    "ancestral, 50 steps": {"timestep_respacing": "50"},
    "DDIM, 25 steps": {"timestep_respacing": "ddim25", "use_ddim": True},
    "ancestral, 50 steps, bf16": {"timestep_respacing": "50", "use_bf16": True},
    "DDIM, 25 steps, bf16": {"timestep_respacing": "ddim25", "use_ddim": True, "use_bf16": True},
}
PAIRS = [  # (batch size, ranks) and what it is compared with
    ((1, 1), (64, 1)),
    ((8, 1), (64, 1)),
    ((8, 2), (8, 1)),
]


def draw(method: str, batch_size: int, ranks: int, args: argparse.Namespace) -> Path:
    """Draw the samples of a method, unless they are there; return their npz file."""
    name = method.replace(", ", "_").replace(" ", "")
    threads = f"_threads{args.threads}" if args.threads else ""
    folder = args.out / f"{name}_batch{batch_size}_ranks{ranks}{threads}_seed{args.seed}"
    flags = METHODS[method] | {
        "model_path": MODELS / "diffusion.pt", "classifier_path": MODELS / "classifier.pt",
        "classifier_scale": args.scale, "num_samples": args.num_samples,
        "batch_size": batch_size, "seed": args.seed, "device": args.device, "log_dir": folder,
    }  # fmt: skip
    words = [word for name, value in flags.items() if value != "" for word in (f"--{name}", value)]
    launcher = ["mpiexec", "-n", ranks] if ranks > 1 else []
    command = [*launcher, sys.executable, ROOT / "scripts" / "classifier_sample.py", *words]
    bin_dir = Path(sys.executable).parent
    env = os.environ | {"PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}"}
    if args.threads:
        env["OMP_NUM_THREADS"] = str(args.threads)
    subprocess.run(list(map(str, command)), check=True, env=env, stdout=subprocess.DEVNULL)
    return folder / f"samples_{args.num_samples}x28x28x1.npz"


def compare(one: Path, other: Path) -> str:
    """Return the cells of a row: labels, pixels that differ, those by more than 1, the most."""
    with np.load(one) as a, np.load(other) as b:
        labels = "equal" if np.array_equal(a["arr_1"], b["arr_1"]) else "DIFFERENT"
        apart = np.abs(a["arr_0"].astype(int) - b["arr_0"])
    cells = [labels, f"{(apart > 0).mean():.3%}", f"{(apart > 1).mean():.3%}", str(apart.max())]
    return " | ".join(cells)


def told(batch_size: int, ranks: int) -> str:
    """Name a way to draw."""
    return f"{batch_size}" if ranks == 1 else f"{batch_size} on {ranks} ranks"


def table(args: argparse.Namespace) -> str:
    """Draw the samples and return the Markdown table."""
    rows = [
        "| method | batch size | compared with | labels | pixels that differ | by more than 1 "
        "| by at most |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in (name for name in METHODS if args.methods in name):
        for one, other in PAIRS:
            found = compare(draw(method, *one, args), draw(method, *other, args))
            rows.append(f"| {method} | {told(*one)} | {told(*other)} | {found} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num_samples", type=int, default=128, help="samples of each way")
    parser.add_argument("--scale", default="1.0", help="guidance scale")
    parser.add_argument("--seed", type=int, default=0, help="seed of labels and noise")
    parser.add_argument(
        "--threads", type=int, default=0, help="threads of each rank (0: cores, shared by ranks)"
    )
    parser.add_argument(
        "--methods", default="", help="only those with this in their name (default: all)"
    )
    parser.add_argument("--device", default="", help="cpu, cuda, ... (default: the best there is)")
    parser.add_argument("--out", type=Path, default=Path("runs/rounding"), help="output folder")
    args = parser.parse_args(argv)
    try:
        text = table(args)
    except OSError as error:
        return fail(str(error))
    except subprocess.CalledProcessError as error:
        return fail(f"classifier_sample.py ended with exit code {error.returncode}, as told above")
    print(f"`{' '.join(['python benchmarks/rounding.py', *(argv or sys.argv[1:])])}`:\n\n{text}")
    return 0


def fail(message: str) -> int:
    """Print one line on stderr; return the exit code of a mistake."""
    print(f"rounding.py: error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
