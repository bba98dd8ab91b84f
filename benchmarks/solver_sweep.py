"""Which sampler draws the best garments with how many calls of the network.

    python datasets/fashion_mnist.py data/fashion_mnist
    python benchmarks/fashion_classifier.py --out runs/judge.pt
    python benchmarks/solver_sweep.py --time --bf16
    python benchmarks/solver_sweep.py --bf16

Draws unguided garments of all classes in turn with every sampler at every number of calls, from
the same noise, and scores them against the real test images (garment_scores.py). Of the best three
at --final_calls, and of ancestral sampling in --ancestral_calls, it draws a larger set. Prints
Markdown tables, and writes them and a plot into --out. An interrupted sweep goes on by the same
command. --time measures seconds per image instead, which the plot then shows, too: run it on a
machine without other work.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import sweep_timing
from garment_scores import Scores
from sweeping import (
    SHOWN,
    Drawing,
    Sweep,
    add_flags,
    markdown,
    names_of,
    numbers_of,
    positive,
    run_program,
    shown,
)

from guided_diffusion import checkpoints
from guided_diffusion.sampling_flags import PUBLISHED_SAMPLERS

ORDERS = {"unipc2": ("unipc", 2), "unipc3": ("unipc", 3)}  # one sampler at two orders
SAMPLERS = [
    "ancestral", "ddim", "plms", "ipndm", "heun", "dpmpp_2m", "dpmpp_3m", "dpmpp_3m_classic",
    "dpmpp_2m_sde", *ORDERS,
]  # fmt: skip
NUM_BEST = 3  # samplers that get a larger set
COLOURS = [
    "#000000", "#1f77b4", "#7f7f7f", "#17becf", "#9467bd", "#d62728", "#ff7f0e", "#bcbd22",
    "#e377c2", "#2ca02c", "#8c564b",
]  # fmt: skip
MARKERS = "osDv^<>PX*p"
Results = dict[str, dict[int, Scores]]  # sampler -> calls -> scores
Large = dict[str, tuple[int, Scores]]  # name of a set -> calls, scores


def num_steps(sampler: str, calls: int) -> int:
    """Return how many steps a sampler takes with so many calls of the network, or one less.

    Heun's method calls it twice a step and once in the last; PLMS once a step and once more.
    """
    return {"heun": (calls + 1) // 2, "plms": calls - 1}.get(sampler, calls)


def num_calls(sampler: str, steps: int) -> int:
    """Return how often a sampler calls the network in so many steps."""
    return {"heun": 2 * steps - 1, "plms": steps + 1}.get(sampler, steps)


def plan(sampler: str, calls: int, num_samples: int, steps_by: str) -> Drawing:
    """Return the set of a sampler at a number of calls; the published two keep their own steps."""
    name, order = ORDERS.get(sampler, (sampler, None))
    steps_by = "published" if name in PUBLISHED_SAMPLERS else steps_by
    steps = num_steps(sampler, calls)
    return Drawing(
        f"{sampler}_{calls}_{steps_by}",
        num_samples,
        num_calls(sampler, steps),
        (
            *("--sampler", name, "--num_steps", str(steps), "--steps_by", steps_by),
            *(("--solver_order", str(order)) if order else ()),
        ),
    )


def plan_ancestral(calls: int, num_samples: int) -> Drawing:
    """Return the set that the others are measured by, drawn as the published code does."""
    return Drawing(f"ancestral_{calls}", num_samples, calls, ("--timestep_respacing", str(calls)))


def best_of(results: Results, calls: int) -> list[str]:
    """Return the samplers with the least distances at a number of calls."""
    there = [name for name, scores in results.items() if calls in scores]
    return sorted(there, key=lambda name: results[name][calls].fd)[:NUM_BEST]


# --------------------------------------------------------------------------------------------
# Sweeping


def sweep_solvers(args: argparse.Namespace) -> Sweep:
    """Draw, score, print tables and plot."""
    samplers = names_of(args.samplers, SAMPLERS, "--samplers")
    calls = numbers_of(args.calls, int, "--calls", least=2)
    pyplot = import_pyplot()
    sweep = Sweep(args)
    results = draw_all(args, sweep, samplers, calls)
    print("\n".join(tables(results, calls)), flush=True)
    large, lines = draw_large(args, sweep, results), []
    if large:
        lines = large_table(large, sweep.real())
        print("\n".join(lines))
    path = args.out / f"solvers_{args.steps_by}.md"
    checkpoints.write_bytes(str(path), "\n".join([*tables(results, calls), *lines]).encode())
    print(f"tables: {path.resolve()}")
    picture = path.with_suffix(".png")
    plot(pyplot, picture, results, read_timing(args), references_of(large, args))
    print(f"plot: {picture.resolve()}")
    return sweep


def draw_all(
    args: argparse.Namespace, sweep: Sweep, samplers: list[str], calls: list[int]
) -> Results:
    """Draw and score the set of each sampler at each number of calls."""
    places = {
        plan(name, n, args.num_samples, args.steps_by): (name, n)
        for n in calls
        for name in samplers
    }
    results: Results = {name: {} for name in samplers}
    for drawing, scores in sweep.run(list(places)).items():
        name, n = places[drawing]
        results[name][n] = scores
    return results


def draw_large(args: argparse.Namespace, sweep: Sweep, results: Results) -> Large:
    """Draw and score the larger sets of the best samplers, and that of ancestral sampling.

    The distance falls with the number of images. So the first images of the ancestral set, which
    are what a set of their number would be, are scored, too: the smaller sets compare with them.
    """
    if args.num_final == 0:
        return {}
    best = best_of(results, args.final_calls)
    plans = [plan(name, args.final_calls, args.num_final, args.steps_by) for name in best]
    ancestral = plan_ancestral(args.ancestral_calls, args.num_final)
    found = sweep.run([*plans, ancestral])
    large = {drawing.name: (drawing.calls, scores) for drawing, scores in found.items()}
    if ancestral in found and args.num_samples < args.num_final:
        scores = sweep.scorer.score_file(sweep.path(ancestral), first=args.num_samples)
        large[f"{ancestral.name}, the first {args.num_samples:,}"] = ancestral.calls, scores
    return large


def references_of(large: Large, args: argparse.Namespace) -> dict[str, float]:
    """Return the distances that the plot shows as lines: of as many images as its points have."""
    return {
        name: scores.fd
        for name, (calls, scores) in large.items()
        if calls == args.ancestral_calls and scores.num_samples == args.num_samples
    }


def tables(results: Results, calls: list[int]) -> list[str]:
    """Return the lines of a table for each score: rows are samplers, columns numbers of calls."""
    counts = sorted({s.num_samples for row in results.values() for s in row.values()})
    lines = []
    for title, show in SHOWN.items():
        head = f"{title} of {', '.join(f'{n:,}' for n in counts)} images; calls:"
        rows = [
            [name, *(show(row[n]) if n in row else "-" for n in calls)]
            for name, row in results.items()
        ]
        lines += [markdown([head, *map(str, calls)], rows), ""]
    if "heun" in results:
        true = ", ".join(str(num_calls("heun", num_steps("heun", n))) for n in calls)
        lines += [f"heun calls the network an odd number of times: {true}.", ""]
    return lines


def large_table(large: Large, real: dict[int, Scores]) -> list[str]:
    """Return the lines of the table of the larger sets, with real images as a yardstick."""
    ours = [[name, str(n), f"{s.num_samples:,}", *shown(s)] for name, (n, s) in large.items()]
    train = [["real training images", "", f"{s.num_samples:,}", *shown(s)] for s in real.values()]
    note = "The judge knows the training images, so it labels them better than it would others."
    return [markdown(["set", "calls", "images", *SHOWN], [*ours, *train]), "", note, ""]


# --------------------------------------------------------------------------------------------
# Timing


def timing_path(args: argparse.Namespace) -> Path:
    """Return the file that --time writes and the plot reads."""
    kind = f"{args.steps_by}{'_bf16' if args.bf16 else ''}"
    return args.out / f"timing_{args.final_calls}_{kind}.json"


def read_timing(args: argparse.Namespace) -> dict[str, float]:
    """Return the seconds per image and call of each sampler; empty if --time has not run."""
    seconds = sweep_timing.read(timing_path(args))
    return {
        name: seconds[name] / plan(name, args.final_calls, 1, args.steps_by).calls
        for name in seconds
    }


def time_samplers(args: argparse.Namespace) -> None:
    """Measure the seconds per image of each sampler, print a table and keep the figures."""
    plans = {
        name: plan(name, args.final_calls, args.num_samples, args.steps_by)
        for name in names_of(args.samplers, SAMPLERS, "--samplers")
    }
    seconds = sweep_timing.measure(plans, args)
    base = seconds.get("ancestral")
    rows = [
        [name, str(plans[name].calls), f"{x:.4f}", f"{x / base:.2f}" if base else "-"]
        for name, x in seconds.items()
    ]
    print(markdown(["sampler", "calls", "seconds per image", "ratio to ancestral"], rows))
    sweep_timing.keep(timing_path(args), seconds, args)


# --------------------------------------------------------------------------------------------
# The plot


def import_pyplot() -> Any:
    """Return matplotlib's pyplot, drawing to files.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("the plot needs matplotlib: pip install 'matplotlib>=3.8'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot(
    plt: Any, path: Path, results: Results, timing: dict[str, float], references: dict[str, float]
) -> None:
    """Plot distances against calls and, where there is a timing, against seconds per image."""
    panels = 2 if timing else 1
    figure, axes = plt.subplots(
        1, panels, figsize=(7 * panels, 5.5), dpi=120, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    draw_panel(axes[0][0], results, dict.fromkeys(results, 1.0), references)
    axes[0][0].set(xlabel="calls of the network", ylabel="FD (judge)")
    if timing:
        draw_panel(axes[0][1], results, timing, references)
        axes[0][1].set(xlabel="seconds per image")
    lines, names = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=3 * panels, fontsize=8)
    checkpoints.write_file(str(path), lambda file: figure.savefig(file, format="png"))
    plt.close(figure)


def draw_panel(
    axes: Any, results: Results, per_call: dict[str, float], references: dict[str, float]
) -> None:
    """Draw a line for each sampler; a call costs `per_call` on the horizontal axis."""
    for name in filter(per_call.get, results):
        style = SAMPLERS.index(name)
        counts = [num_calls(name, num_steps(name, n)) * per_call[name] for n in results[name]]
        distances = [scores.fd for scores in results[name].values()]
        axes.plot(
            counts, distances, label=name, color=COLOURS[style], marker=MARKERS[style], markersize=5
        )
    for name, distance in references.items():
        axes.axhline(distance, label=name, color="black", linestyle=":", linewidth=1)
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    axes.tick_params(which="both", labelsize=7)
    axes.grid(alpha=0.3, which="both")


# --------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--samplers", default=",".join(SAMPLERS), help="which, commas between")
    add("--calls", default="5,8,10,15,20,30,50", help="numbers of calls of the network")
    add("--num_final", type=int, default=5000, help="images of the larger sets; 0 for none")
    add("--final_calls", type=positive, default=20, help="calls of the larger sets, and of --time")
    add("--ancestral_calls", type=positive, default=250, help="calls of the set to compare with")
    add("--time", action="store_true", help="measure seconds per image, and stop")
    add_flags(parser, "runs/solvers")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = parse(argv)
    return run_program("solver_sweep.py", time_samplers if args.time else sweep_solvers, args)


if __name__ == "__main__":
    sys.exit(main())
