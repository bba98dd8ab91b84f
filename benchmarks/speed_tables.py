"""The Markdown tables of speed.py, out of what its JSON file holds."""

from collections.abc import Callable
from statistics import median
from typing import Any

from speed_processes import PUBLISHED
from sweeping import markdown

Record = dict[str, Any]  # what was measured of one package
Cell = Callable[[Record], str]

TITLES = {
    "forward": "network forward",
    "train": "training step",
    "gradient": "classifier gradient",
    "guided": "guided step",
    "guided_ddim": "guided DDIM step",
}


def shown(key: str, form: str, scale: float = 1.0) -> Cell:
    """Return what prints an entry of a record, or a dash."""
    return lambda record: form.format(record[key] * scale) if key in record else "-"


def ratio(record: Record) -> str:
    """Print a ratio of times with its quartiles."""
    if "ratio" not in record:
        return "-"
    low, middle, high = record["ratio"]
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def images_per_s(record: Record) -> str:
    """Print a speed to three digits at least."""
    speed = record.get("images_per_s")
    return "-" if speed is None else f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"


def seconds_alone(record: Record) -> str:
    """Print the seconds of what is no number of images."""
    return "-" if "images_per_s" in record else shown("seconds", "{:.2f}")(record)


def difference(record: Record) -> str:
    """Print a relative difference; "0" is none at all."""
    value = record.get("difference")
    return "-" if value is None else f"{value:.0e}" if value else "0"


COLUMNS: dict[str, Cell] = {  # those with anything in them are printed
    "images/s": images_per_s,
    "of the product": shown("product_share", "{:.2f}"),
    "GFLOPs an image": shown("gflops_per_image", "{:,.3f}"),
    "peak MB": shown("peak_bytes", "{:,.0f}", 1e-6),
    "seconds": seconds_alone,
    "ratio": ratio,
    "difference": difference,
}


def tables(results: Record) -> str:
    """Return all tables as one text."""
    parts = [_heading(results)]
    for name, config in results["configs"].items():
        if config["tasks"]:
            parts += [_config_line(name, config), _compared(config["tasks"], "task")]
        if config["training_memory"]:
            parts.append(_training_memory(config["training_memory"]))
    if results["data"]:
        data = results["data"]
        parts.append(
            f"Loading of {data['photo']} JPEG files of {data['bytes_per_photo'] / 1000:.0f} kB "
            f"each as {data['crop']} px crops, by the loader's default number of processes:"
        )
        parts.append(_compared({"data": data["packages"]}, "loading"))
    if results["start_up"]:
        parts.append("Start-up of scripts/image_train.py, in float32 unless in float16:")
        parts.append(_compared(results["start_up"], "until"))
    parts += [f"Not measured: {failure}" for failure in results["failed"]]
    return "\n\n".join(parts)


def _heading(results: Record) -> str:
    machine, (first, *others) = results["machine"], results["packages"]
    line = (
        f"{machine['device']}, threads: {machine['threads']}, torch {machine['torch']}, "
        f"{machine['precision']}; medians of {machine['rounds']} rounds"
    )
    if others:
        line += (
            f". Ratio: how many times as fast {first} is, round by round, with quartiles; "
            "difference: of outputs, as a share of the largest"
        )
    return f"{line}."


def _config_line(name: str, config: Record) -> str:
    flags = " ".join(f"--{flag} {value}" for flag, value in config["flags"].items())
    records = [r for packages in config["tasks"].values() for r in packages.values()]
    speeds = [r["product_gflops_per_s"] for r in records if "product_gflops_per_s" in r]
    product = f", the product at {median(speeds):,.0f} GFLOP/s" if speeds else ""
    return f"**{name}**{product}: `--batch_size {config['batch_size']} {flags}`"


def _compared(rows: dict[str, dict[str, Record]], what: str) -> str:
    """Return a table with a row for each thing that was measured and each package.

    Args:
        rows: thing -> label of a package -> record.
        what: head of the things.
    """
    pairs = [(thing, label, r) for thing, packages in rows.items() for label, r in packages.items()]
    columns = {head: [cell(record) for _, _, record in pairs] for head, cell in COLUMNS.items()}
    filled = {head: cells for head, cells in columns.items() if set(cells) - {"-"}}
    names = [[TITLES.get(thing, thing), label] for thing, label, _ in pairs]
    lines = [name + list(cells) for name, *cells in zip(names, *filled.values(), strict=True)]
    return markdown([what, "package", *filled], lines)


def _training_memory(modes: dict[str, dict[str, int | None]]) -> str:
    """Return a table of a training step's memory, beside that as published."""
    base = next(iter(modes[PUBLISHED].values()))
    rows = [
        [mode, label, f"{size / 1e6:,.0f}", f"{size / base:.2f}" if base else "-"]
        for mode, packages in modes.items()
        for label, size in packages.items()
        if size is not None
    ]
    return markdown(["training step", "package", "peak MB", f"of that {PUBLISHED}"], rows)
