"""What the networks of this project would cost on GPUs: computed, not measured.

    python benchmarks/gpu_estimates.py
    python benchmarks/gpu_estimates.py --gpus H100 --cases imagenet256 --batch_size 64
    python benchmarks/gpu_estimates.py --check

Prints Markdown tables of guided steps of the released models, of a large set of samples with its
price, and of training, there also against speeds that the paper measured. All times are those of a
roofline model (gpu_roofline.py): what the operations take at the published peaks of a GPU. Real
kernels reach neither peak, so this is a bound; in brackets stands what --efficiency makes of it.

--check computes the same for the CPU at hand, from the measured speeds of a matrix product, a copy
and a tiny operation, and divides by what the networks of speed.py really take.
"""

import argparse
import json
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import speed
import speed_measuring
import speed_tasks
import torch
from gpu_roofline import (
    BOUNDS,
    FILL,
    GPUS,
    PRESETS,
    Hardware,
    Recorder,
    Seen,
    for_sampling,
    largest_batch,
    sampling,
    time_of,
    training,
)
from sweeping import markdown, names_of, numbers_of, positive, run_program

from guided_diffusion.config import DiffusionConfig
from guided_diffusion.flag_checks import interval
from guided_diffusion.samplers import call_levels, is_guided

CASES = (
    "imagenet64", "imagenet128", "imagenet256", "imagenet256_uncond", "imagenet512",
    "upsample_64_256", "upsample_128_512",
)  # fmt: skip
FAST = "dpmpp_2m"  # a call of the network in each step, as most fast solvers have
# arXiv:2105.05233v4, tables 11 and 13: training steps, and images in a step of all GPUs.
TRAINED = {
    "imagenet64": (540_000, 2048), "imagenet128": (4_360_000, 256), "imagenet256": (1_980_000, 256),
    "imagenet512": (1_940_000, 256), "upsample_64_256": (500_000, 256),
    "upsample_128_512": (1_050_000, 256),
}  # fmt: skip
# Table 7 there: images in a batch of a V100, and images/s of training: at its peak, and measured
# with the implementation that is called naive there: no kernels written for it, as here.
MEASURED = {
    "imagenet64": (32, 182.3, 37.0), "imagenet128": (4, 65.2, 11.5), "imagenet256": (4, 17.9, 4.4),
    "upsample_64_256": (4, 31.7, 6.3), "upsample_128_512": (2, 8.0, 1.9),
}  # fmt: skip
MEASURED_ON = "V100"

Row = dict[str, Any]  # what was found of one case, ready for JSON
Cell = Callable[[Row], str]


# --------------------------------------------------------------------------------------------
# Rows


def row_of(case: str, gpu: str, batch: int, seen: Seen, args: Namespace) -> Row:
    """Return what is known of a step of `batch` images on a GPU."""
    time = time_of(seen.ops, GPUS[gpu], args.overhead_us * 1e-6)
    return {
        "gpu": gpu, "case": case, "batch": batch, "operations": len(seen.ops),
        "gflops_per_image": seen.flops / batch / 1e9, "seconds": time.total,
        "images_per_s": batch / time.total, "peak_share": time.products / time.total,
        "bound_by": {name: getattr(time, name) / time.total for name in BOUNDS},
        "memory_gb": seen.memory / 1e9, "fits": seen.memory <= FILL * GPUS[gpu].memory,
    }  # fmt: skip


def step_rows(args: Namespace) -> list[Row]:
    """Return the rows of sampling steps: each case on each GPU."""
    rows = []
    for gpu in args.gpus:
        for name in args.cases:
            case = for_sampling(name, args.precision)
            batch = largest_batch(case, GPUS[gpu], args.batch_size)
            rows.append(row_of(name, gpu, batch, sampling(case, batch), args))
    return rows


def samples_rows(args: Namespace) -> list[Row]:
    """Return the rows of --num_samples images of --preset, guided nowhere, partly, everywhere."""
    case, rows = for_sampling(args.preset, args.precision), []
    for gpu in args.gpus:
        batch = largest_batch(case, GPUS[gpu], args.batch_size)
        alone, guided = (
            row_of("", gpu, batch, sampling(case, batch, way), args)["seconds"]
            for way in (False, True)
        )
        for sampler, calls in (("ancestral", args.steps), (FAST, args.calls)):
            chain = Namespace(sampler=sampler, num_steps=calls, guidance_interval=args.interval)
            inside = sum(is_guided(chain, sigma) for sigma in call_levels(chain, case.process))
            for num in [0] if case.classifier is None else sorted({0, inside, calls}):
                rate = batch / (num * guided + (calls - num) * alone)
                row = {"gpu": gpu, "sampler": sampler, "calls": calls, "guided_calls": num}
                rows.append(row | fleet(args.num_samples, rate, args))
    return rows


def fleet(images: int, rate: float, args: Namespace) -> Row:
    """Return what so many images cost where a GPU does `rate` of them in a second."""
    hours = images / rate / 3600
    return {
        "gpu_hours": hours, "dollars": hours * args.price,
        "images_per_s": {num: num * rate for num in args.counts},
        "hours": {num: hours / num for num in args.counts},
    }  # fmt: skip


def training_rows(args: Namespace) -> list[Row]:
    """Return the rows of training the diffusion model of --preset."""
    rows, batch = [], args.train_batch_size
    for gpu in args.gpus:
        row = row_of(args.preset, gpu, batch, training(args.preset, args.precision, batch), args)
        if args.preset in TRAINED:
            steps, images = TRAINED[args.preset]
            row["whole"] = fleet(steps * images, row["images_per_s"], args)
        rows.append(row)
    return rows


def measured_rows(args: Namespace) -> list[Row]:
    """Return the rows of training steps that were measured elsewhere, on the GPU of that."""
    rows = []
    for name in args.cases if MEASURED_ON in args.gpus else ():
        if name in MEASURED:
            batch, at_peak, measured = MEASURED[name]
            row = row_of(name, MEASURED_ON, batch, training(name, "float16", batch), args)
            rows.append(row | {"published_at_peak": at_peak, "published": measured})
    return rows


# --------------------------------------------------------------------------------------------
# Tables


def number(value: float) -> str:
    """Print three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def table(columns: dict[str, Cell], rows: list[Row]) -> str:
    """Return a Markdown table."""
    return markdown(list(columns), [[cell(row) for cell in columns.values()] for row in rows])


def shares(bound_by: dict[str, float]) -> str:
    """Print the parts of the time that are bound by this and that."""
    return " / ".join(f"{share:.0%}" for share in bound_by.values())


def columns_of_steps(by: float) -> dict[str, Cell]:
    """Return the columns of all steps; `by` is the efficiency."""
    return {
        "GPU": lambda r: r["gpu"],
        "preset": lambda r: r["case"],
        "batch": lambda r: str(r["batch"]),
        "GFLOPs an image": lambda r: number(r["gflops_per_image"]),
        "ms a step": lambda r: with_brackets(1e3 * r["seconds"], 1 / by),
        "of the FLOP peak": lambda r: f"{r['peak_share']:.0%}",
        "time by " + " / ".join(BOUNDS): lambda r: shares(r["bound_by"]),
        "memory, GB": lambda r: f"{r['memory_gb']:.1f}" + ("" if r["fits"] else ", too much"),
    }


def with_brackets(value: float, factor: float) -> str:
    """Print a bound and, in brackets, what efficiency makes of it."""
    return f"{number(value)} ({number(value * factor)})"


def columns_of_fleet(
    args: Namespace, unit: str, hours: float, find: Callable[[Row], Row]
) -> dict[str, Cell]:
    """Return the columns of what `find` gets out of a row: costs, and wall clock in a unit."""

    def cell(key: str, scale: float = 1.0, num: int | None = None) -> Cell:
        def show(row: Row) -> str:
            found = find(row)
            value = found and (found[key] if num is None else found[key][num])
            return with_brackets(value / scale, 1 / args.efficiency) if found else "-"

        return show

    clock = {f"{unit} on {num} GPUs": cell("hours", hours, num) for num in args.counts}
    return {f"GPU-{unit}": cell("gpu_hours", hours), "dollars": cell("dollars")} | clock


def tables(results: dict[str, list[Row]], args: Namespace) -> str:
    """Return all tables, a heading above each, and what they assume."""
    by, step = args.efficiency, columns_of_steps(args.efficiency)

    def speed_in(calls: int) -> Cell:
        return lambda r: with_brackets(r["images_per_s"] / calls, by)

    sampled = {f"images/s, {num} calls": speed_in(num) for num in (args.steps, args.calls)}
    costs = {
        "GPU": lambda r: r["gpu"],
        "sampler": lambda r: r["sampler"],
        "calls": lambda r: str(r["calls"]),
        "of them guided": lambda r: str(r["guided_calls"]),
    } | columns_of_fleet(args, "hours", 1, lambda r: r)
    whole = columns_of_fleet(args, "days", 24, lambda r: r.get("whole", {}))
    beside = {name: step[name] for name in ("preset", "batch")} | {
        "images/s at the FLOP peak": lambda r: number(r["images_per_s"] / r["peak_share"]),
        "that in the paper": lambda r: number(r["published_at_peak"]),
        "images/s, bound": lambda r: number(r["images_per_s"]),
        "images/s, measured in the paper": lambda r: number(r["published"]),
        "measured / bound": lambda r: f"{r['published'] / r['images_per_s']:.2f}",
    }
    parts = [
        ("steps", "Sampling steps, guided where there is a classifier", step | sampled),
        ("samples", f"{args.num_samples:,} samples of {args.preset}", costs),
        ("training", "Training", step | {"images/s": speed_in(1)} | whole),
        ("measured", f"Training on a {MEASURED_ON} in float16, beside the paper's table 7", beside),
    ]
    shown = [
        f"**{head}** (computed, not measured)\n\n{table(columns, results[key])}"
        for key, head, columns in parts
        if results[key]
    ]
    return "\n\n".join([*shown, *assumptions(args)])


def assumptions(args: Namespace) -> list[str]:
    """Return what the tables take for granted, in one list of Markdown."""
    devices = "; ".join(
        f"{gpu.name} {gpu.half / 1e12:g} TFLOP/s in half precision, {gpu.convolution / 1e12:g} of "
        f"float32 convolutions, {gpu.single / 1e12:g} of float32 products, "
        f"{gpu.bandwidth / 1e9:g} GB/s"
        for gpu in (GPUS[name] for name in args.gpus)
    )
    lines = [
        f"In brackets: at --efficiency {args.efficiency:g} of the bound, an assumption. What "
        f"the paper's code reached of it on {MEASURED_ON}s stands in the last table, if printed.",
        f"Data sheets, without sparsity: {devices}. Float32 convolutions are in TF32 where a GPU "
        "has it, torch's default.",
        "Operations go one by one and unfused, and each reads and writes memory; caches and fused "
        "kernels can save ways.",
        f"Each launch takes {args.overhead_us:g} us (--overhead_us), an assumption, without CUDA "
        "graphs; long kernels hide launches.",
        f"Precision (--precision): {args.precision}. The presets have diffusion models in float16, "
        "but that of 512 pixels, and classifiers in float32.",
        f"Batch: {args.batch_size} (--batch_size), halved until tensors fill at most {FILL:.0%} of "
        "the memory, an assumption.",
        f"A call of {FAST}, or a solver like it, costs what an ancestral step does. Partly guided: "
        f"where sigma is within {args.interval} (--guidance_interval).",
        "N GPUs do N times what one does. Transfers between CPU, disk and GPUs, gradients among "
        "them, are not counted. The optimizer steps after each batch of a GPU.",
        f"A GPU-hour costs ${args.price:g} (--price), an assumption: put your own.",
        "Training is as long as in the paper (arXiv:2105.05233, tables 11 and 13), which reports "
        "916 V100-days for imagenet256 with some kernels fused by hand (table 10).",
    ]
    return ["\n".join(f"- {line}" for line in lines)]


# --------------------------------------------------------------------------------------------
# Against this CPU


def check_rows(rounds: int) -> tuple[Hardware, float, list[Row]]:
    """Return this CPU, as measured, its overhead in s, and what was computed and measured on it."""
    big, one = torch.zeros(2, 2**26), torch.zeros(1)
    calls = {
        "product": speed_tasks.product("cpu"), "copy": lambda i: big[1].copy_(big[0]),
        "tiny": lambda i: one.add_(1),
    }  # fmt: skip
    ops, package = {}, speed_tasks.Package(speed_tasks.OURS)
    for config, flags in speed.CONFIGS.items():
        flags = dict(flags)
        setting = speed_tasks.Setting(flags, flags.pop("batch_size"))
        for task in ("forward", "train"):
            name = f"{config}, {speed_tasks.TASKS[task].__name__}"
            calls[name], ops[name] = speed_tasks.TASKS[task](package, setting), []
    clocks = {name: speed_measuring.clock(call, "cpu") for name, call in calls.items()}
    for name in ops:  # after a first call, which prepares
        with Recorder("cpu") as recorder:
            calls[name](1)
        ops[name] = recorder.ops
    found = speed_measuring.interleave(clocks, rounds, lambda: None)
    seconds = {name: median(values) for name, values in found.items()}
    peak = 2 * speed_tasks.SIDE**3 / seconds["product"]
    cpu = Hardware(speed_measuring.processor(), peak, peak, peak, big.nbytes / seconds["copy"])
    rows = []
    for name, seen in ops.items():
        time = time_of(seen, cpu, seconds["tiny"])
        row = {"case": name, "operations": len(seen), "gflops": sum(op.flops for op in seen) / 1e9}
        row |= {"gigabytes": sum(op.nbytes for op in seen) / 1e9, "seconds": time.total}
        row |= {"bound_by": {bound: getattr(time, bound) / time.total for bound in BOUNDS}}
        rows.append(row | {"measured": seconds[name], "ratio": time.total / seconds[name]})
    return cpu, seconds["tiny"], rows


def check_table(cpu: Hardware, overhead: float, rows: list[Row]) -> str:
    """Return the table of --check."""
    columns: dict[str, Cell] = {
        "config of speed.py, task": lambda r: r["case"],
        "operations": lambda r: f"{r['operations']:,}",
        "GFLOPs": lambda r: number(r["gflops"]),
        "GB moved": lambda r: number(r["gigabytes"]),
        "computed, ms": lambda r: number(1e3 * r["seconds"]),
        "of that by " + " / ".join(BOUNDS): lambda r: shares(r["bound_by"]),
        "measured, ms": lambda r: number(1e3 * r["measured"]),
        "computed / measured": lambda r: f"{r['ratio']:.2f}",
    }
    return (
        f"{table(columns, rows)}\n\n{cpu.name}, {torch.get_num_threads()} threads of torch, "
        f"float32. Measured: {cpu.single / 1e9:.0f} GFLOP/s of a product, {speed_tasks.SIDE} x "
        f"{speed_tasks.SIDE}; {cpu.bandwidth / 1e9:.1f} GB/s of a copy of 268 MB, there and back; "
        f"{1e6 * overhead:.1f} us of an operation on one number. Above 1: convolutions can be "
        "faster than a product of as many FLOPs, and small tensors stay in a cache."
    )


# --------------------------------------------------------------------------------------------


def between(least: float, most: float) -> Callable[[str], float]:
    """Return what reads a number within limits, for argparse."""

    def number_within(text: str) -> float:
        """Read a number."""
        if not least <= float(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not from {least:g} to {most:g}")
        return float(text)

    return number_within


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = speed.OneLine(
        "gpu_estimates.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add, known = parser.add_argument, [name for name, p in PRESETS.items() if not p.bundled]
    add("--gpus", default=",".join(GPUS), help="[%(default)s]")
    add("--cases", default=",".join(CASES), help=f"out of {','.join(known)} [%(default)s]")
    add("--preset", default="imagenet256", choices=known, help="to draw many samples of, to train")
    add("--precision", default="preset", choices=("preset", "float32", "float16"), help="of all")
    add("--batch_size", type=positive, default=32, help="images of a step at most [%(default)s]")
    add("--train_batch_size", type=positive, default=4, help="of a training step [%(default)s]")
    add("--steps", type=positive, default=250, help="ancestral steps [%(default)s]")
    add("--calls", type=positive, default=25, help="network calls of a solver [%(default)s]")
    add("--num_samples", type=positive, default=50_000, help="images in all [%(default)s]")
    add("--guidance_interval", dest="interval", default="0.3,5", help="LO,HI [%(default)s]")
    add("--counts", default="8,64", help="numbers of GPUs [%(default)s]")
    add("--price", type=between(0, 1e6), default=2.5, help="dollars a GPU-hour [%(default)s]")
    add("--efficiency", type=between(0.01, 1), default=0.5, help="of the bound [%(default)s]")
    add("--overhead_us", type=between(0, 1e6), default=5.0, help="of a launch [%(default)s]")
    add("--check", action="store_true", help="compare with measured times of this CPU instead")
    add("--rounds", type=positive, default=3, help="how often --check times each [%(default)s]")
    add("--json", type=Path, help="file for all figures")
    return parser


def parse(argv: list[str] | None) -> Namespace:
    """Read the command line; a mistake ends the process with one line and exit code 2."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        args.gpus = names_of(args.gpus, GPUS, "--gpus")
        known = [name for name, preset in PRESETS.items() if not preset.bundled]
        args.cases = names_of(args.cases, known, "--cases")
        args.counts = numbers_of(args.counts, int, "--counts", least=1)
    except ValueError as error:
        parser.error(str(error))
    longest = DiffusionConfig.diffusion_steps
    for flag in ("steps", "calls"):
        if getattr(args, flag) > longest:
            parser.error(f"--{flag} {getattr(args, flag)}: the chains have {longest} steps")
    problem = interval(args.interval) if args.interval else "must be two sigmas, such as 0.3,5"
    if problem:
        parser.error(f"--guidance_interval {args.interval!r} {problem}")
    if args.json and not args.json.resolve().parent.is_dir():
        parser.error(f"--json {args.json}: there is no such folder")
    return args


def report(args: Namespace) -> None:
    """Print what a command line asks for."""
    if args.check:
        cpu, overhead, rows = check_rows(args.rounds)
        results = {"cpu": asdict(cpu), "overhead": overhead, "check": rows}
        text = check_table(cpu, overhead, rows)
    else:
        results = {
            "steps": step_rows(args), "samples": samples_rows(args),
            "training": training_rows(args), "measured": measured_rows(args),
        }  # fmt: skip
        text = tables(results, args)
        flags = {name: v for name, v in vars(args).items() if name != "json"}
        results = {"assumed": flags, "gpus": {n: asdict(GPUS[n]) for n in args.gpus}} | results
    print(text)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_program("gpu_estimates.py", report, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
