"""How exactly the solvers follow the ODE, where its solution is known: a mixture of Gaussians.

    python benchmarks/solver_orders.py

Prints the root mean square error per coordinate of 512 points after 10 to 160 calls of the exact
denoiser (tests/mixtures.py), from sigma 157 to 0.01 in steps that are even in log sigma, and the
order of convergence between 160 and 320 calls. This says how well a solver solves, not how good
the images of a network are that is itself wrong.
"""

import math
import sys
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import mixtures
from sweeping import markdown

from guided_diffusion.solvers import SOLVERS

CALLS = (10, 20, 40, 80, 160)
FINEST = 320
DETERMINISTIC = [
    ("ddim", {}), ("heun", {}), ("plms", {}), ("ipndm", {}), ("dpmpp_2m", {}),
    ("dpmpp_3m_classic", {}), ("dpmpp_3m", {}), ("unipc", {"order": 2}), ("unipc", {"order": 3}),
]  # fmt: skip


def solve(name: str, calls: int, **options: int) -> Tensor:
    """Solve the ODE of the mixture in so many calls (PLMS takes one more)."""
    num_steps = calls // 2 if name == "heun" else calls
    return SOLVERS[name](
        mixtures.denoise, mixtures.start(), mixtures.log_grid(num_steps), **options
    )


def main() -> None:
    """Print the table."""
    exact = solve("unipc", 6000, order=3)
    rows = []
    for name, options in tqdm(DETERMINISTIC, desc="solving"):
        errors = [
            float((solve(name, calls, **options) - exact).pow(2).mean().sqrt())
            for calls in (*CALLS, FINEST)
        ]
        order = math.log2(errors[-2] / errors[-1])
        label = " ".join([name, *(f"--solver_order {value}" for value in options.values())])
        rows.append([label, *(f"{error:.1e}" for error in errors[:-1]), f"{order:.2f}"])
    print(markdown(["error after so many calls", *map(str, CALLS), "order"], rows))


if __name__ == "__main__":
    main()
