"""How guidance trades diversity for accuracy: the bundled model at several scales.

    python datasets/fashion_mnist.py data/fashion_mnist
    python benchmarks/fashion_classifier.py --out runs/judge.pt
    python benchmarks/guidance_table.py --judge runs/judge.pt --ranks 2

Draws the same images (same seed: same labels and starting noise) at each scale and prints a
Markdown table: how often a judge trained on real images sees the requested label, and how far
apart samples of one label lie, where real test images are 1. Scales that were drawn before are
not drawn again, so an interrupted run goes on.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import fashion_classifier as fc

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models" / "fashion"


def draw(scale: str, args: argparse.Namespace) -> Path:
    """Draw the samples of one guidance scale, unless they are there; return their npz file."""
    kind = "ddim" if args.ddim else "ancestral"
    precision = "_bf16" if args.bf16 else ""
    folder = args.out / f"{kind}{args.steps}{precision}_scale{scale}_seed{args.seed}"
    path = folder / f"samples_{args.num_samples}x28x28x1.npz"
    if not path.exists():
        launcher = ["mpiexec", "-n", str(args.ranks)] if args.ranks > 1 else []
        bin_dir = Path(sys.executable).parent
        command = [
            *launcher, sys.executable, ROOT / "scripts" / "classifier_sample.py",
            "--model_path", MODELS / "diffusion.pt",
            "--classifier_path", MODELS / "classifier.pt",
            "--classifier_scale", scale,
            "--num_samples", args.num_samples,
            "--batch_size", args.batch_size,
            "--timestep_respacing", f"ddim{args.steps}" if args.ddim else args.steps,
            "--use_ddim", args.ddim,
            "--use_bf16", args.bf16,
            "--seed", args.seed,
            "--log_dir", folder,
        ]  # fmt: skip
        env = os.environ | {"PATH": f"{bin_dir}{os.pathsep}{os.environ['PATH']}"}
        subprocess.run([str(word) for word in command], check=True, env=env)
    return path


def table(args: argparse.Namespace) -> str:
    """Draw and judge the samples of each scale; return the Markdown table."""
    judge, real = fc.load_judge(args.judge), fc.read_folder(args.test_dir)
    rows = [
        "| guidance scale | requested label seen | diversity (real = 1) |",
        "| --- | --- | --- |",
    ]
    for scale in args.scales.split(","):
        samples = fc.read_samples(str(draw(scale, args)))
        seen = fc.accuracy(judge, *samples)
        rows.append(f"| {scale} | {seen:.1%} | {fc.diversity(judge, *samples, *real):.3f} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scales", default="0,0.5,1,2,4", help="guidance scales")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps")
    parser.add_argument("--ddim", action="store_true", help="DDIM instead of ancestral sampling")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--num_samples", type=int, default=500, help="samples per scale")
    parser.add_argument("--batch_size", type=int, default=50, help="samples at once")
    parser.add_argument("--seed", type=int, default=0, help="seed of labels and noise")
    parser.add_argument("--ranks", type=int, default=1, help="processes, started by mpiexec")
    parser.add_argument("--judge", type=Path, default=fc.JUDGE, help="file of the judge")
    parser.add_argument("--test_dir", default="data/fashion_mnist/test", help="real test images")
    parser.add_argument("--out", type=Path, default=Path("runs/guidance"), help="output folder")
    args = parser.parse_args(argv)
    try:
        print(table(args))
    except (ValueError, OSError) as error:
        return fail(str(error))
    except subprocess.CalledProcessError as error:
        return fail(f"classifier_sample.py ended with exit code {error.returncode}, as told above")
    return 0


def fail(message: str) -> int:
    """Print one line on stderr; return the exit code of a mistake."""
    print(f"guidance_table.py: error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
