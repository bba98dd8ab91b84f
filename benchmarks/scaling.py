"""What the work costs as it grows: with batch, resolution, width, ranks and guided steps.

    python benchmarks/scaling.py --json runs/scaling.json --plot runs/scaling.png
    python benchmarks/scaling.py --parts ranks --ranks 1,2,4,8 --threads 8
    python benchmarks/scaling.py --from_json runs/scaling.json --plot runs/scaling.png

Prints a Markdown table for each of --parts
  batch        network forward and training step at several sizes of a batch: images/s, and the peak
               of memory of the training step, in a process of its own
  resolution   the same at several image sizes, with attention at a quarter of the size
  width        the same with several numbers of channels
  ranks        the training script on several ranks, which share out one batch, or have one each
  interval     guided sampling, of whose steps only a share is guided: as timed, and as the calls of
               the two networks make one expect
and with --plot draws them all in one picture.

After each part, --json is written. The same command goes on with the parts that are missing there,
and measures none again; a file of other flags or of another machine is refused. --from_json makes
tables and picture again and measures nothing.

What is compared is timed in turn, round by round, as speed.py does it, and figures are medians.
Run it on a machine without other work.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import speed_tasks
import torch
from scaling_parts import GROWING, PARTS, ROW, SKIPPED, Record, ours, settings_of
from scaling_tables import plot, tables
from solver_sweep import import_pyplot
from speed import OneLine
from speed_measuring import describe_machine
from speed_processes import last_line
from speed_tasks import PRECISIONS
from sweeping import fail, names_of, numbers_of, positive, run_program
from tqdm import tqdm

from guided_diffusion import checkpoints, script_util

NAME = "scaling.py"
LISTS = {  # flag -> its default, the least number, and what it holds
    "batches": ("1,2,4,8,16,32,64", 1, "batches, of part batch"),
    "sizes": ("16,32,64,128", 1, "image sizes, of part resolution"),
    "widths": ("32,64,96,128", 1, "--num_channels, of part width"),
    "ranks": ("1,2,4", 1, "numbers of ranks"),
    "shares": ("0,25,50,75,100", 0, "guided steps in percent, of part interval"),
}
NUMBERS = {  # flag -> its default, and what it is
    "rank_batch": (16, "images of one rank, which more ranks share out, or have each"),
    "steps": (20, "training steps of each run on ranks, after the first"),
    "sampling_steps": (20, "steps of each sampling run of part interval"),
}


def measure(args: argparse.Namespace, results: Record) -> None:
    """Measure the parts that are missing, with a bar and the time left; after each, write --json.

    Raises:
        ValueError: a part could not be measured; those before it are kept.
    """
    missing = [name for name in args.parts if name not in results["parts"]]
    total = sum(PARTS[name].units(args) for name in missing)
    with tqdm(total=total, smoothing=0, disable=not missing) as bar:
        for name in missing:
            bar.set_description(name)
            try:
                results["parts"][name] = PARTS[name].measure(args, bar.update)
            except RuntimeError as error:  # no memory, most likely
                raise ValueError(f"{name}: {last_line(str(error))}") from error
            if args.json:
                content = f"{json.dumps(results, indent=1)}\n"
                checkpoints.write_bytes(str(args.json), content.encode())


def begin(args: argparse.Namespace) -> Record:
    """Return what --json or --from_json holds, or results without parts.

    Raises:
        ValueError: the file is none of this program, or of other flags or another machine.
    """
    if args.from_json:
        return read("--from_json", args.from_json)
    flags = {name: getattr(args, name) for name in (*LISTS, *NUMBERS)}
    head = {"machine": describe_machine(args), "flags": flags}
    if not (args.json and args.json.exists()):
        return head | {"parts": {}}
    found = read("--json", args.json)
    for kind, values in head.items():
        for name, value in values.items():
            there = found[kind].get(name)
            if there != value:
                raise ValueError(
                    f"--json {args.json} is of {name} {there}, not {value}: choose another file"
                )
    return found


def read(flag: str, path: Path) -> Record:
    """Read a file that --json wrote.

    Raises:
        ValueError: it is none.
    """
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {path}: {error}") from None
    if not (isinstance(results, dict) and {"machine", "flags", "parts"} <= results.keys()):
        raise ValueError(f"{flag} {path} is no file that {NAME} wrote")
    return results


# --------------------------------------------------------------------------------------------
# The command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLine(
        NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, device = parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    add("--parts", default=",".join(PARTS), help="what to measure and show [%(default)s]")
    for name, (default, _, what) in LISTS.items():
        add(f"--{name}", default=default, help=f"{what} [%(default)s]")
    for name, (default, what) in NUMBERS.items():
        add(f"--{name}", type=positive, default=default, help=f"{what} [%(default)s]")
    add("--precision", default="float32", choices=PRECISIONS, help="[%(default)s]")
    add("--device", default=device, choices=("cpu", "cuda"), help="[%(default)s]")
    add("--threads", type=positive, help="threads of torch, which ranks share [its default]")
    add("--rounds", type=positive, default=5, help="how often to time each [%(default)s]")
    add("--plot", type=Path, help="picture to draw, a PNG")
    add("--json", type=Path, help="file for all figures, round by round")
    add("--from_json", type=Path, help="file of --json to show, instead of measuring")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Read the lists among the flags; raise a ValueError if flags make no sense."""
    args.parts = names_of(args.parts, PARTS, "--parts")
    for name, (_, least, _) in LISTS.items():
        setattr(args, name, numbers_of(getattr(args, name), int, f"--{name}", least))
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU that this torch can use")
    if args.from_json and args.json:
        raise ValueError("--from_json measures nothing that --json could keep: leave out one")
    for name in ("json", "plot"):
        path = getattr(args, name)
        if path and not path.resolve().parent.is_dir():
            raise ValueError(f"--{name} {path}: there is no such folder")
    for part, (flag, _) in GROWING.items():
        for n, setting in settings_of(part, args).items():
            try:
                with torch.device("meta"):
                    script_util.create_model_and_diffusion(
                        **speed_tasks.model_flags(ours(), setting)
                    )
            except ValueError as error:
                raise ValueError(f"--{flag} {n}: {error}") from None
    for n in args.ranks:
        if args.rank_batch % n:
            raise ValueError(f"--rank_batch {args.rank_batch} is no multiple of --ranks {n}")
        if args.device == "cuda" and n > torch.cuda.device_count():
            raise ValueError(f"--ranks {n}: there are {torch.cuda.device_count()} GPUs")
    if args.shares[-1] > 100:
        raise ValueError(f"--shares {args.shares[-1]} is more than 100 percent")
    if args.steps < SKIPPED * ROW:
        raise ValueError(f"--steps {args.steps}: give {SKIPPED * ROW} or more")


def run(args: argparse.Namespace, results: Record, pyplot: Any) -> None:
    """Measure what is wanted and not there yet; print the tables and draw the picture."""
    if not args.from_json:
        measure(args, results)
    parts = {name: results["parts"][name] for name in args.parts if name in results["parts"]}
    if not parts:
        raise ValueError(f"--from_json {args.from_json} has none of --parts {','.join(args.parts)}")
    print(tables(results | {"parts": parts}))
    if args.plot:
        plot(pyplot, args.plot, results | {"parts": parts})


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = parse(argv)
    try:
        check(args)
        if args.threads:
            torch.set_num_threads(args.threads)
        results = begin(args)
        pyplot = import_pyplot() if args.plot else None
    except ValueError as error:
        return fail(NAME, str(error), 2)
    return run_program(NAME, lambda args: run(args, results, pyplot), args)


if __name__ == "__main__":
    sys.exit(main())
