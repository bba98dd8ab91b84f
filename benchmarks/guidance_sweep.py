"""Which guidance draws the best garments: of which kind, how strong, and at which noise levels.

    python datasets/fashion_mnist.py data/fashion_mnist
    python benchmarks/fashion_classifier.py --out runs/judge.pt
    python benchmarks/guidance_sweep.py --bf16

Guides by a classifier (ADM), without one (classifier-free guidance, Ho and Salimans 2022) and by a
weaker network (autoguidance, Karras et al. 2024), at several scales, from the same noise. Then, for
the best scale of each kind and the next larger one, limits guidance to an interval of noise levels,
LO < sigma <= HI (Kynkaanniemi et al. 2024): first HI is searched with LO = 0, then, for the best of
these, LO. "Best" is the least distance to the real test images (garment_scores.py). Prints Markdown
tables and writes them into --out. An interrupted sweep goes on by the same command. --time then
measures the seconds per image of the best of each kind, everywhere and in an interval: run it on a
machine without other work.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import sweep_timing
from garment_scores import Scores
from solver_sweep import SAMPLERS, plan
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

from guided_diffusion import checkpoints, config
from guided_diffusion.samplers import call_levels
from guided_diffusion.script_util import create_gaussian_diffusion

MODELS = Path(__file__).resolve().parent.parent / "models" / "fashion"
WEAK = MODELS / "diffusion_weak.pt"  # pushes away from itself in autoguidance
NUM_REFINED = 2  # scales of each kind that get intervals


@dataclass(frozen=True)
class Kind:
    """A kind of guidance: its script, the flags that set its scale, and the scale that is none."""

    script: str
    flags: Callable[[str], tuple[str, ...]]
    off: float


KINDS = {
    "classifier": Kind("classifier_sample.py", lambda s: ("--classifier_scale", s), 0.0),
    "cfg": Kind("image_sample.py", lambda s: ("--cfg_scale", s), 1.0),
    "autoguidance": Kind(
        "image_sample.py", lambda s: ("--guide_model_path", str(WEAK), "--guide_scale", s), 1.0
    ),
}


@dataclass(frozen=True)
class Guidance:
    """A kind of guidance at a scale, where low < sigma <= high."""

    kind: str
    scale: float
    low: float = 0.0
    high: float = math.inf

    @property
    def is_off(self) -> bool:
        """Tell whether it guides nothing."""
        return self.scale == KINDS[self.kind].off

    @property
    def interval(self) -> str:
        """Return LO,HI, empty for everywhere."""
        return "" if (self.low, self.high) == (0, math.inf) else f"{self.low:g},{self.high:g}"

    def where(self, levels: Iterable[float]) -> tuple[bool, ...]:
        """Tell of each of some noise levels whether it guides there."""
        return tuple(not self.is_off and self.low < sigma <= self.high for sigma in levels)


Results = dict[Guidance, Scores]


def levels_of(sampler: str, calls: int, steps_by: str) -> list[float]:
    """Return the noise level of each call of the network in a chain of the bundled model."""
    flags = json.loads((MODELS / "diffusion.json").read_text())
    process = create_gaussian_diffusion(
        steps=flags["diffusion_steps"], noise_schedule=flags["noise_schedule"]
    )
    steps = plan(sampler, calls, 1, steps_by).flags
    return call_levels(
        config.parse_flags(None, config.SampleConfig, config.StepsConfig, argv=steps), process
    )


def plan_guided(guidance: Guidance, args: argparse.Namespace, levels: list[float]) -> Drawing:
    """Return the set of a guidance; all that guide nothing share one."""
    base = plan(args.sampler, args.calls, args.num_samples, args.steps_by)
    if guidance.is_off:
        return replace(base, name=f"unguided_{base.name}")
    kind, scale = KINDS[guidance.kind], f"{guidance.scale:g}"
    limits = ("--guidance_interval", guidance.interval) if guidance.interval else ()
    where = f"_sigma{guidance.interval.replace(',', '-')}" if guidance.interval else ""
    return replace(
        base,
        name=f"{guidance.kind}_{scale}{where}_{base.name}",
        script=kind.script,
        flags=(*base.flags, *kind.flags(scale), *limits),
        calls=base.calls + sum(guidance.where(levels)),
    )


# --------------------------------------------------------------------------------------------
# Searching


def score_all(
    wanted: list[Guidance], args: argparse.Namespace, sweep: Sweep, levels: list[float]
) -> Results:
    """Draw and score guidances; return the scores of those that succeeded."""
    plans = {guidance: plan_guided(guidance, args, levels) for guidance in wanted}
    found = sweep.run(list(dict.fromkeys(plans.values())))
    return {guidance: found[drawing] for guidance, drawing in plans.items() if drawing in found}


def to_refine(results: Results, kind: str) -> list[Guidance]:
    """Return the best of the scales that guide, and the next larger ones."""
    guided = sorted((g for g in results if g.kind == kind and not g.is_off), key=lambda g: g.scale)
    if not guided:
        return []
    best = min(range(len(guided)), key=lambda i: results[guided[i]].fd)
    return guided[best : best + NUM_REFINED]


def new_intervals(
    candidates: Iterable[Guidance], levels: list[float], known: Iterable[Guidance]
) -> list[Guidance]:
    """Return those that guide somewhere, each at other levels than the others and than `known`."""
    seen = {(g.kind, g.scale, g.where(levels)) for g in known}
    chosen = []
    for candidate in candidates:
        key = candidate.kind, candidate.scale, candidate.where(levels)
        if any(candidate.where(levels)) and key not in seen:
            seen.add(key)
            chosen.append(candidate)
    return chosen


def best_ends(results: Results, refined: list[Guidance]) -> list[Guidance]:
    """Return, of each kind, the best of what was tried at the refined scales."""
    best = {}
    for kind in dict.fromkeys(g.kind for g in refined):
        scales = {g.scale for g in refined if g.kind == kind}
        tried = (g for g in results if g.kind == kind and g.scale in scales)
        best[kind] = min(tried, key=lambda g: results[g].fd)
    return list(best.values())


def search(
    wanted: list[Guidance],
    sigmas: list[float],
    args: argparse.Namespace,
    sweep: Sweep,
    levels: list[float],
) -> Results:
    """Score the scales everywhere, then the best of them up to HI, then one of each kind from LO.

    Args:
        wanted: the scales.
        sigmas: candidates for both ends of the interval; none for no intervals.
        args: the command line.
        sweep: draws and scores.
        levels: the noise level of each call without guidance.
    """
    results = score_all(wanted, args, sweep, levels)
    refined = [g for kind in KINDS for g in to_refine(results, kind)]
    highs = (replace(g, high=sigma) for g in refined for sigma in sigmas)
    results |= score_all(new_intervals(highs, levels, results), args, sweep, levels)
    ends = best_ends(results, refined)
    lows = (replace(g, low=sigma) for g in ends for sigma in sigmas if sigma < g.high)
    return results | score_all(new_intervals(lows, levels, results), args, sweep, levels)


# --------------------------------------------------------------------------------------------
# Reporting


def best_of(results: Results, kind: str) -> list[Guidance]:
    """Return the best of a kind that guides everywhere, and the best of all, which may be it."""
    guided = [g for g in results if g.kind == kind and not g.is_off]
    everywhere = [g for g in guided if not g.interval]
    best = (min(found, key=lambda g: results[g].fd) for found in (everywhere, guided) if found)
    return list(dict.fromkeys(best))


def time_best(results: Results, args: argparse.Namespace, levels: list[float]) -> None:
    """Measure and keep the seconds per image without guidance and of the best of each kind."""
    chosen = [g for g in results if g.is_off][:1] + [g for k in KINDS for g in best_of(results, k)]
    plans = [plan_guided(guidance, args, levels) for guidance in chosen]
    seconds = sweep_timing.measure({drawing.name: drawing for drawing in plans}, args)
    sweep_timing.keep(timing_path(args), seconds, args)


def timing_path(args: argparse.Namespace) -> Path:
    """Return the file of what --time measures."""
    return args.out / f"timing_{stem(args)}{'_bf16' if args.bf16 else ''}.json"


def stem(args: argparse.Namespace) -> str:
    """Return what the chains without guidance are called in names of files."""
    return f"{args.sampler}_{args.calls}_{args.steps_by}"


def table(kind: str, results: Results, args: argparse.Namespace, levels: list[float]) -> str:
    """Return the table of a kind of guidance, its least distance in bold."""
    seconds = sweep_timing.read(timing_path(args))
    mine = sorted((g for g in results if g.kind == kind), key=lambda g: (g.scale, g.low, g.high))
    best = min(mine, key=lambda g: results[g].fd, default=None)
    rows = []
    for guidance in mine:
        distance, *others = shown(results[guidance])
        more = sum(guidance.where(levels))
        calls = [len(levels), more] if kind == "classifier" else [len(levels) + more, 0]
        time = seconds.get(plan_guided(guidance, args, levels).name)
        rows.append([
            f"{guidance.scale:g}",
            "" if guidance.is_off else guidance.interval or "everywhere",
            f"**{distance}**" if guidance == best else distance,
            *others,
            *map(str, calls),
            f"{time:.4f}" if time else "-",
        ])  # fmt: skip
    head = [f"{kind} scale", "sigma", *SHOWN, "network calls", "classifier calls", "seconds"]
    return markdown(head, rows)


def report(results: Results, args: argparse.Namespace, sweep: Sweep, levels: list[float]) -> None:
    """Print the tables, and write them into --out."""
    kinds = [kind for kind in KINDS if any(g.kind == kind for g in results)]
    real = [[f"{s.num_samples:,}", *shown(s)] for s in sweep.real().values()]
    how = f"{args.num_samples:,} images each, {args.sampler}, {args.calls} calls without guidance."
    note = "Calls and seconds are per image; seconds are those of --time, on one thread."
    tables = [f"{table(kind, results, args, levels)}\n" for kind in kinds]
    yardstick = markdown(["real training images", *SHOWN], real)
    text = "\n".join([f"{how} {note}\n", *tables, yardstick, ""])
    path = args.out / f"guidance_{stem(args)}.md"
    checkpoints.write_bytes(str(path), text.encode())
    print(text)
    print(f"tables: {path.resolve()}")


def sweep_guidance(args: argparse.Namespace) -> Sweep:
    """Draw, score, search for intervals and print tables."""
    names_of(args.sampler, SAMPLERS, "--sampler")
    scales = {kind: numbers_of(getattr(args, kind), float, f"--{kind}") for kind in KINDS}
    kinds = names_of(args.kinds, KINDS, "--kinds")
    sigmas = numbers_of(args.sigmas, float, "--sigmas") if args.sigmas else []
    sweep = Sweep(args)
    wanted = [Guidance(kind, scale) for kind in kinds for scale in scales[kind]]
    levels = levels_of(args.sampler, args.calls, args.steps_by)
    results = search(wanted, sigmas, args, sweep, levels)
    if args.time:
        time_best(results, args, levels)
    report(results, args, sweep, levels)
    return sweep


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--kinds", default=",".join(KINDS), help="of guidance, commas between")
    add("--classifier", default="0,0.5,1,2,4", help="scales of classifier guidance; 0 is none")
    add("--cfg", default="1,1.5,2,3", help="scales without a classifier; 1 is none")
    add("--autoguidance", default="1,1.5,2,3", help="scales of autoguidance; 1 is none")
    add("--sigmas", default="0.3,1,3", help="ends of intervals to try; '' for none")
    add("--sampler", default="dpmpp_2m_sde", help=f"one of {', '.join(SAMPLERS)}")
    add("--calls", type=positive, default=10, help="of the network, without guidance")
    add("--time", action="store_true", help="also measure seconds per image of the best")
    add_flags(parser, "runs/guidance_sweep")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_program("guidance_sweep.py", sweep_guidance, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
