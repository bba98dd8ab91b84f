"""What scaling.py measures: the parts, each of them a function of the command line."""

import argparse
import csv
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import speed_processes as processes
import speed_tasks
import torch
from speed import COMMON, CONFIGS
from speed_measuring import PRODUCT, clock, interleave, prepare
from speed_tasks import OURS, Call, Package, Setting

from guided_diffusion import guidance
from guided_diffusion.noise_levels import NoiseLevels

SMALL = {name: value for name, value in CONFIGS["28"].items() if name != "batch_size"}
NETWORK = COMMON | {  # of which resolution and width are changed
    "image_size": 32, "num_channels": 64, "channel_mult": "1,2,2", "num_res_blocks": 1,
    "attention_resolutions": "8", "num_head_channels": 32,
}  # fmt: skip
BATCH = 4  # where it is not what grows
NUM_PHOTOS = 256
MOST_LAUNCHES = 2  # of the same run: its log has several rows
ROW = 5  # steps between two rows of the log of a training run
SKIPPED = 2  # rows: of the first step, and of the next ones, in which much happens once
PEAK, LAUNCH, SAMPLING = 12, 60, 4  # steps on the bar, where a call has 1

Record = dict[str, Any]
Advance = Callable[[int], Any]  # moves the bar by so many steps


@cache
def ours() -> Package:
    """Return this project's package."""
    return Package(OURS)


# --------------------------------------------------------------------------------------------
# Networks that grow


GROWING: dict[str, tuple[str, Callable[[int], tuple[Record, int]]]] = {
    "batch": ("batches", lambda n: (SMALL, n)),
    "resolution": (
        "sizes",
        lambda n: (NETWORK | {"image_size": n, "attention_resolutions": str(n // 4)}, BATCH),
    ),
    "width": ("widths", lambda n: (NETWORK | {"num_channels": n}, BATCH)),
}  # part -> name of its flag, and what makes flags and a batch of a number


def settings_of(part: str, args: argparse.Namespace) -> dict[int, Setting]:
    """Return the settings of a part by the number that grows."""
    flag, make = GROWING[part]
    return {n: Setting(*make(n), args.device, args.precision) for n in getattr(args, flag)}


def measure_networks(part: str, args: argparse.Namespace, advance: Advance) -> Record:
    """Time the network and its training step at each size, and weigh the latter."""
    settings = settings_of(part, args)
    rows = {n: {"value": n, "batch_size": setting.batch} for n, setting in settings.items()}
    for task in ("forward", "train"):
        for n, record in time_task(task, settings, args, advance).items():
            rows[n][task] = record
    for n, setting in settings.items():
        rows[n]["peak_bytes"] = processes.peak(ours(), "train", setting, torch.get_num_threads())
        advance(PEAK)
    first, *others = (setting.flags for setting in settings.values())
    same = {n: v for n, v in first.items() if all(flags[n] == v for flags in others)}
    return {"flags": same, "rows": list(rows.values())}


def network_units(part: str, args: argparse.Namespace) -> int:
    """Return how many steps of the bar `measure_networks` makes."""
    return len(settings_of(part, args)) * (2 * 2 * args.rounds + PEAK)


def time_task(
    task: str, settings: dict[int, Setting], args: argparse.Namespace, advance: Advance
) -> dict[int, Record]:
    """Time a task at each size, with a matrix product beside each, in turn."""
    clocks, flops = {}, {}
    product = clock(speed_tasks.product(args.device), args.device)
    with speed_tasks.session(task, next(iter(settings.values()))):
        for n, setting in settings.items():
            call, _, flops[n] = prepare(task, ours(), setting)
            clocks |= {f"{n}": clock(call, args.device), f"{PRODUCT} {n}": product}
        seconds = interleave(clocks, args.rounds, partial(advance, 1))
    return {
        n: speed_record(flops[n], setting.batch, seconds[f"{n}"], seconds[f"{PRODUCT} {n}"])
        for n, setting in settings.items()
    }


def speed_record(flops: int, batch: int, seconds: list[float], product: list[float]) -> Record:
    """Return what is known of calls that took `seconds`, and the products beside them."""
    rate = 2 * speed_tasks.SIDE**3 / np.array(product)  # FLOP/s, by rounds
    return {
        "images_per_s": batch / median(seconds),
        "gflops_per_image": flops / 1e9 / batch,
        "product_share": float(np.median(flops / np.array(seconds) / rate)),
        "product_gflops_per_s": float(np.median(rate)) / 1e9,
        "rounds": seconds,
    }


# --------------------------------------------------------------------------------------------
# Ranks


def rank_rows(args: argparse.Namespace) -> list[Record]:
    """Return what is run on ranks: the images of one rank shared out, and as many on each."""
    return [
        {
            "scaling": scaling,
            "ranks": n,
            "threads": max(1, torch.get_num_threads() // n),
            "batch_size": args.rank_batch // n if scaling == "strong" else args.rank_batch,
        }
        for scaling in ("strong", "weak")
        for n in args.ranks
    ]


def run_of(row: Record) -> str:
    """Name the run of a row; of one rank, both ways of scaling have the same."""
    return f"{row['ranks']} ranks of {row['batch_size']}"


def measure_ranks(args: argparse.Namespace, advance: Advance) -> Record:
    """Run the training script on each number of ranks, in turn, in a few rounds."""
    rows = rank_rows(args)
    with tempfile.TemporaryDirectory() as folder:
        photos, size = Path(folder) / "images", SMALL["image_size"]
        processes.write_photographs(photos, NUM_PHOTOS, (size, size))
        clocks = {
            run_of(row): lambda _, row=row: 1 / images_per_second(row, args, photos) for row in rows
        }
        seconds = interleave(clocks, min(args.rounds, MOST_LAUNCHES), partial(advance, LAUNCH))
    for row in rows:
        row["rounds"] = seconds[run_of(row)]  # of an image
        row["images_per_s"] = 1 / median(row["rounds"])
    return {"flags": rank_flags(args), "rows": rows}


def rank_units(args: argparse.Namespace) -> int:
    """Return how many steps of the bar `measure_ranks` makes."""
    return len({run_of(row) for row in rank_rows(args)}) * min(args.rounds, MOST_LAUNCHES) * LAUNCH


def rank_flags(args: argparse.Namespace) -> Record:
    """Return the flags of the training script that are the same on any number of ranks."""
    network = {n: v for n, v in SMALL.items() if not n.startswith("classifier_")}
    return network | {
        "use_fp16": args.precision == "float16",
        "use_bf16": args.precision == "bfloat16",
        "max_steps": args.steps + 1,
        "log_interval": ROW,
        "device": args.device,
    }


def images_per_second(row: Record, args: argparse.Namespace, photos: Path) -> float:
    """Run the training script; return the speed that its log tells, the median of later rows.

    Raises:
        ValueError: the run failed.
    """
    log = Path(tempfile.mkdtemp(dir=photos.parent))
    flags = rank_flags(args) | {"data_dir": photos, "batch_size": row["batch_size"], "log_dir": log}
    env = processes.environment(ours(), args.device, row["threads"])
    words = [
        *(sys.executable, "-m", "torch.distributed.run"),  # it comes with torch
        *("--standalone", "--nproc_per_node", row["ranks"], processes.script_of(ours())),
        *(word for name, value in flags.items() for word in (f"--{name}", value)),
    ]
    launch([str(word) for word in words], env | {"OPENAI_LOG_FORMAT": "csv"}, run_of(row))
    with open(log / "progress.csv", newline="") as file:
        speeds = [row["images_per_second"] for row in csv.DictReader(file)]
    return median(float(speed) for speed in speeds[SKIPPED:] if speed)


def launch(words: list[str], env: dict[str, str], name: str) -> None:
    """Run a launcher to its end.

    Raises:
        ValueError: it failed, or took too long.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        child = subprocess.Popen(
            words, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = child.wait(processes.TIMEOUT)
        except subprocess.TimeoutExpired:
            raise ValueError(f"{name}: no end after {processes.TIMEOUT:.0f} s") from None
        finally:
            if child.poll() is None:
                child.terminate()  # the launcher ends its ranks
                child.wait()
        if code:
            output.seek(0)
            lines = output.read().splitlines()
            told = [line for line in lines if "error: " in line] or lines
            raise ValueError(f"{name}: exit code {code}: {processes.last_line(told[0])}")


# --------------------------------------------------------------------------------------------
# Guided steps


def measure_interval(args: argparse.Namespace, advance: Advance) -> Record:
    """Time whole runs of guided sampling, and the networks' calls that they are made of."""
    respaced = SMALL | {"timestep_respacing": str(args.sampling_steps)}
    setting = Setting(respaced, BATCH, args.device, args.precision, extras=True)
    counts = guided_steps(args)
    with speed_tasks.session("guided", setting):
        calls = {task: speed_tasks.TASKS[task](ours(), setting) for task in ("forward", "gradient")}
        calls |= {f"{count}": guided_run(setting, count) for count in counts.values()}
        clocks = {name: clock(call, args.device) for name, call in calls.items()}
        seconds = interleave(clocks, args.rounds, partial(advance, SAMPLING))
    network, gradient = (median(seconds[task]) for task in ("forward", "gradient"))
    rows = [
        {
            "share": share,
            "guided_steps": count,
            "seconds": median(seconds[f"{count}"]) / args.sampling_steps,  # of a step
            "expected": network + gradient * count / args.sampling_steps,
            "rounds": seconds[f"{count}"],
        }
        for share, count in counts.items()
    ]
    units = {"network_seconds": network, "gradient_seconds": gradient}
    return {"flags": respaced, "batch_size": BATCH, **units, "rows": rows}


def interval_units(args: argparse.Namespace) -> int:
    """Return how many steps of the bar `measure_interval` makes."""
    return (2 + len(set(guided_steps(args).values()))) * args.rounds * SAMPLING


def guided_steps(args: argparse.Namespace) -> dict[int, int]:
    """Return how many steps are guided, by the share in percent that is asked for."""
    return {share: round(args.sampling_steps * share / 100) for share in args.shares}


def guided_run(setting: Setting, count: int) -> Call:
    """Draw a batch by ancestral sampling, of whose steps the last `count` are guided."""
    package = ours()
    model, process = speed_tasks.create_model(package, setting)
    model.eval()
    if setting.precision == "float16":
        model.convert_to_fp16()
    bound = [*NoiseLevels(process).timesteps.tolist(), math.inf][count]  # as networks are told
    cond_fn = guidance.limited(speed_tasks.cond_fn_of(package, setting), lambda t: t < bound)
    _, noise, y = speed_tasks.inputs(setting)

    def call(i: int) -> torch.Tensor:
        return process.p_sample_loop(
            model, tuple(noise.shape), noise, cond_fn=cond_fn, model_kwargs={"y": y}
        )

    return call


# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What can be measured on its own.

    Attributes:
        units: tells its steps on the bar.
        measure: does it, while it moves the bar.
    """

    units: Callable[[argparse.Namespace], int]
    measure: Callable[[argparse.Namespace, Advance], Record]


PARTS = {
    **{
        name: Part(partial(network_units, name), partial(measure_networks, name))
        for name in GROWING
    },
    "ranks": Part(rank_units, measure_ranks),
    "interval": Part(interval_units, measure_interval),
}
