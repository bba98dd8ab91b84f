"""Where the time of a network goes: the share of each kind of operation, as torch's profiler sees.

    python benchmarks/operations.py
    python benchmarks/operations.py --config 64 --tasks train --threads 1

Prints a Markdown table for the configurations and tasks of speed.py. Beside the shares is the speed
of the convolutions alone as a share of that of a 2048 x 2048 float32 matrix product: where that is
near 1 and nearly all time is theirs, there is little to gain. Run it while nothing else runs.
"""

import argparse
import sys
from collections import Counter

import numpy as np
import speed_measuring
import speed_tasks
import torch
from speed import CONFIGS
from speed_tasks import OURS, TASKS, Package, Setting
from sweeping import markdown, names_of, positive, run_program
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

KINDS = {  # kind -> what the names of its operations contain
    "convolutions": ("convolution",),
    "attention": ("scaled_dot_product", "attention"),
    "normalization": ("group_norm",),
    "activation": ("silu",),
    "linear layers": ("addmm", "aten::mm", "aten::bmm"),
    "copies": ("copy_", "aten::cat"),
    "optimizer": ("Optimizer", "adamw", "foreach_norm", "linalg_vector_norm"),
}
REST = "the rest"
TASK_NAMES = ("forward", "train", "gradient")


def kind_of(name: str) -> str:
    """Return the kind of an operation."""
    return next((k for k, words in KINDS.items() if any(w in name for w in words)), REST)


def measure(task: str, setting: Setting, calls: int) -> tuple[dict[str, float], float]:
    """Return the share of each kind, and the speed of convolutions beside the product's."""
    call = TASKS[task](Package(OURS), setting)
    for i in range(2):
        call(i)
    product = speed_tasks.product(setting.device)
    clock = speed_measuring.clock(product, setting.device)
    rate = 2 * speed_tasks.SIDE**3 / np.median([clock(i) for i in range(3)])
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for i in range(calls):
            call(i)
    seconds: Counter[str] = Counter()
    for event in seen.key_averages():
        seconds[kind_of(event.key)] += event.self_cpu_time_total / 1e6
    with FlopCounterMode(display=False) as counter:
        call(0)
    counts = counter.get_flop_counts()["Global"].items()
    flops = calls * sum(num for operation, num in counts if "convolution" in str(operation))
    shares = {kind: seconds[kind] / seconds.total() for kind in (*KINDS, REST)}
    return shares, flops / seconds["convolutions"] / rate


def show(args: argparse.Namespace) -> None:
    """Measure what is asked for, and print the table.

    Raises:
        ValueError: a name is not known.
    """
    names = names_of(args.config, CONFIGS, "--config")
    tasks = names_of(args.tasks, TASK_NAMES, "--tasks")
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = []
    for name, task in tqdm([(name, task) for name in names for task in tasks]):
        flags = dict(CONFIGS[name])
        setting = Setting(flags, flags.pop("batch_size"), extras=True)
        shares, speed = measure(task, setting, args.calls)
        rows.append([name, task, *(f"{share:.1%}" for share in shares.values()), f"{speed:.2f}"])
    print(markdown(["config", "task", *KINDS, REST, "convolutions, of the product"], rows))
    device, threads = speed_measuring.processor(), torch.get_num_threads()
    print(f"\n{device}, threads: {threads}, torch {torch.__version__}, float32.")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser("operations.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--config", default=",".join(CONFIGS), help="out of %(default)s")
    add("--tasks", default="forward,train", help=f"out of {','.join(TASK_NAMES)} [%(default)s]")
    add("--calls", type=positive, default=4, help="calls to look at [%(default)s]")
    add("--threads", type=positive, help="threads of torch [its default]")
    return run_program("operations.py", show, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
