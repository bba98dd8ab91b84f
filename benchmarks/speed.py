"""How fast the networks are, how near to the hardware, and in how much memory.

    python benchmarks/speed.py
    python benchmarks/speed.py --package published_guided_diffusion --json runs/speed.json
    python benchmarks/speed.py --flags "--image_size 64 --num_channels 192" --tasks forward,train

Prints Markdown tables of
  forward      the diffusion model alone, without gradients
  train        loss, backward pass, optimizer step and average of the weights
  gradient     the classifier's gradient, as guidance takes it
  guided       a step of guided sampling (guided_ddim: of guided DDIM)
  memory       peaks of these, each in a process of its own, less what that had after its imports;
               of a training step also with --use_checkpoint, and as the published code works, with
               all attention and nothing else recomputed, by matrix products, and with gradients
               that last from step to step
  data         images/s of load_data on made-up photographs (noise of their spectrum)
  startup      the training script beside the package, until the end of --help, and of its first
               step

--package compares packages with the published interface: by name, or by the path of a folder, which
may itself be called guided_diffusion. All are timed in one process, in turn, with the same weights
and inputs, so that what they compute is compared, too; ratios are those of the same round. Only the
published interface is used, unless --extras is given.

Speed is also a share of that of a 2048 x 2048 float32 matrix product, timed in turn with the rest;
the FLOPs for that are the fewest that any package needs. Weights are random. First calls, with
their preparations, do not count.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import speed_tasks
import torch
from speed_measuring import OTHERS, Benchmark
from speed_tables import tables
from speed_tasks import OURS, PRECISIONS, TASKS, Package, Setting
from sweeping import fail, names_of, positive, run_program

from guided_diffusion import config, script_util

COMMON = {
    "class_cond": True, "learn_sigma": True, "noise_schedule": "cosine",
    "use_scale_shift_norm": True,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "28": COMMON | {  # like models/fashion, in colour and with all classes
        "batch_size": 64, "image_size": 28, "num_channels": 32, "channel_mult": "1,2,3",
        "num_res_blocks": 1, "attention_resolutions": "14,7", "num_head_channels": 32,
        "classifier_width": 32, "classifier_channel_mult": "1,2,4", "classifier_depth": 1,
        "classifier_attention_resolutions": "14,7", "classifier_num_head_channels": 32,
    },
    "32": COMMON | {
        "batch_size": 8, "image_size": 32, "num_channels": 64, "channel_mult": "1,2,2,2",
        "num_res_blocks": 2, "attention_resolutions": "16,8", "num_head_channels": 64,
        "resblock_updown": True,
        "classifier_width": 64, "classifier_channel_mult": "1,2,2,2", "classifier_depth": 2,
        "classifier_attention_resolutions": "16,8",
    },
    "64": COMMON | {
        "batch_size": 2, "image_size": 64, "num_channels": 96, "num_res_blocks": 2,
        "attention_resolutions": "16,8", "num_head_channels": 48, "resblock_updown": True,
        "classifier_width": 64, "classifier_depth": 2, "classifier_attention_resolutions": "16,8",
    },
}  # fmt: skip
SMALLEST = {"batch_size": 8, "image_size": 64}  # where neither --config nor --flags says
DEFAULT_TASKS = ("forward", "train", "gradient", "guided", *OTHERS)


class OneLine(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str):
        """End the process."""
        sys.exit(fail(self.prog, message, 2))


def size(text: str) -> tuple[int, int]:
    """Read 500x375 as (500, 375), for argparse."""
    width, height = map(positive, text.split("x"))
    return width, height


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLine(
        "speed.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, device = parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    add("--config", default="", help=f"out of {','.join(CONFIGS)} [all, or --flags alone]")
    add("--flags", default="", help="flags of network, process and classifier, and --batch_size")
    add("--tasks", default=",".join(DEFAULT_TASKS), help="what to measure [%(default)s]")
    add("--package", action="append", default=[], help="another package, by name or path")
    add("--extras", action="store_true", help="use more than the published interface, where it is")
    add("--precision", default="float32", choices=PRECISIONS, help="[%(default)s]")
    add("--device", default=device, choices=("cpu", "cuda"), help="[%(default)s]")
    add("--threads", type=positive, help="threads of torch [its default]")
    add("--rounds", type=positive, default=10, help="how often to time each [%(default)s]")
    add("--photo", type=size, default=(500, 375), help="size of photographs [500x375]")
    add("--crop", type=positive, default=256, help="what loading makes of them [%(default)s]")
    add("--json", type=Path, help="file for all figures, round by round")
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------
# Packages and configurations


def load_packages(specs: list[str]) -> list[Package]:
    """Import this project's package and those of --package, each once.

    Raises:
        ValueError: one is not there, or two would be called the same.
    """
    wanted = dict.fromkeys([OURS, *(spec for text in specs for spec in text.split(","))])
    packages = [Package(spec) for spec in wanted]
    labels = [package.label for package in packages]
    if len(set(labels)) < len(labels):
        raise ValueError(f"--package: two would be called the same: {', '.join(labels)}")
    return packages


def read_settings(args: argparse.Namespace, packages: list[Package]) -> dict[str, Setting]:
    """Return configurations by name: those of --config, each changed by --flags.

    Raises:
        ValueError: a name or a flag is not known, or flags do not go together.
    """
    given = read_flags(args.flags)
    configs = {"flags": SMALLEST | given}
    if args.config or not args.flags:
        names = names_of(args.config or ",".join(CONFIGS), CONFIGS, "--config")
        configs = {name: CONFIGS[name] | given for name in names}
    settings = {}
    for name, flags in configs.items():
        batch = flags.pop("batch_size")
        settings[name] = Setting(flags, batch, args.device, args.precision, args.extras)
        check(settings[name], packages)
    return settings


def read_flags(text: str) -> dict[str, Any]:
    """Read flags of network, process, classifier and batch."""
    parser = OneLine(prog="speed.py: --flags", add_help=False, allow_abbrev=False)
    known = script_util.model_and_diffusion_defaults() | script_util.classifier_defaults()
    for name, default in (SMALLEST | known).items():
        if not name.endswith("use_fp16"):  # --precision decides
            kind = config.str2bool if isinstance(default, bool) else type(default)
            parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS)
    return vars(parser.parse_args(shlex.split(text)))


def check(setting: Setting, packages: list[Package]) -> None:
    """Raise a ValueError if flags make no sense, before anything takes time."""
    given = setting.flags | {"batch_size": setting.batch}
    for field in config.all_fields():
        mistake = field.name in given and config.find_mistake(field, given[field.name])
        if mistake:
            raise ValueError(f"--flags: {mistake}")
    flags = [speed_tasks.model_flags(package, setting) for package in packages]
    with torch.device("meta"):
        script_util.create_model_and_diffusion(**flags[0])
        script_util.create_classifier(**speed_tasks.classifier_flags(packages[0], setting))


# --------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> None:
    """Measure what a command line asks for, and print the tables.

    Raises:
        ValueError: flags make no sense, or this project's package could not do a task.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU that this torch can use")
    if args.json and not args.json.resolve().parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no such folder")
    if args.threads:
        torch.set_num_threads(args.threads)
    tasks = names_of(args.tasks, (*TASKS, *OTHERS), "--tasks")
    if "memory" in tasks and not set(tasks) & set(TASKS):
        raise ValueError(f"--tasks {args.tasks}: memory of which, out of {', '.join(TASKS)}?")
    packages = load_packages(args.package)
    benchmark = Benchmark(args, tasks, packages, read_settings(args, packages))
    benchmark.run()
    print(tables(benchmark.results))
    ours = [f for f in benchmark.results["failed"] if f.startswith(f"{packages[0].label}: ")]
    if ours:
        raise ValueError(f"not measured: {ours[0]}")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_program("speed.py", measure, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
