"""The Markdown tables and the picture of scaling.py, out of what its JSON file holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from speed_tables import images_per_s, shown
from sweeping import markdown

from guided_diffusion import checkpoints

Record = dict[str, Any]

HEADS = {"batch": "images in a batch", "resolution": "pixels a side", "width": "channels"}
SCALINGS = {"strong": "one batch, shared out", "weak": "a batch on each rank"}
TASKS = {"forward": "network forward", "train": "training step"}
SPEEDS = {  # column -> how a record of a task is printed
    "images/s": images_per_s,
    "GFLOPs an image": shown("gflops_per_image", "{:,.3f}"),
    "of the product": shown("product_share", "{:.2f}"),
}
NETWORK_NOTE = (
    "GFLOPs are those of convolutions, linear layers and attention. Of the product: the speed as a "
    "share of that of a float32 matrix product, timed beside each. Memory is the peak of a process "
    "of its own, less what that had after its imports; weights, gradients, moments and averages "
    "are in it."
)
RANKS_NOTE = (
    "Strong: the ranks share out one batch. Weak: each has one of its own. Runs of each: {runs}. "
    "Of the ideal: the images/s, where those of the fewest ranks grow with the {workers} that the "
    "ranks use together, but not beyond those of the machine. So this shows what it costs to "
    "divide the work, with smaller batches and an exchange of gradients; above 1, processes use "
    "the cores better than threads of one process. It cannot show what more machines bring: ranks "
    "of one machine share its cores, memory bandwidth and caches; on a cluster each brings its "
    "own, and the network between them is not seen here."
)
INTERVAL_NOTE = (
    "A step of guided sampling, the mean over a run of {steps} of a batch of {batch}. Expected: "
    "calls times seconds a call, of {network:.1f} ms for the network and {gradient:.1f} ms for the "
    "classifier's gradient; the rest is the arithmetic of the sampler, and noise. The guided steps "
    "are the last ones, but which they are does not change the cost."
)


# --------------------------------------------------------------------------------------------
# Tables


def tables(results: Record) -> str:
    """Return all tables as one text."""
    machine = results["machine"]
    heading = (
        f"{machine['device']}, cores: {machine['cores']}, threads: {machine['threads']}, torch "
        f"{machine['torch']}, {machine['precision']}; medians of {machine['rounds']} rounds."
    )
    texts = [heading]
    for name, part in results["parts"].items():
        used = {
            n: v for n, v in part["flags"].items() if name not in HEADS or "classifier" not in n
        }
        flags = " ".join(f"--{flag} {value}" for flag, value in used.items())
        texts += [f"**{name}**: `{flags}`", *TABLES[name](name, part, results)]
    return "\n\n".join(texts)


def network_table(name: str, part: Record, results: Record) -> list[str]:
    """Return the table of a network that grows, and a note."""
    head = [HEADS[name], *(f"{title}, {what}" for what in SPEEDS for title in TASKS.values())]
    rows = [
        [
            f"{row['value']}",
            *(show(row[task]) for show in SPEEDS.values() for task in TASKS),
            f"{row['peak_bytes'] / 1e6:,.0f}",
        ]
        for row in part["rows"]
    ]
    batch = "" if name == "batch" else f"Images in a batch: {part['rows'][0]['batch_size']}. "
    return [markdown([*head, "training step, peak MB"], rows), batch + NETWORK_NOTE]


def ranks_table(name: str, part: Record, results: Record) -> list[str]:
    """Return the table of training on ranks, and a note."""
    rows = [
        [
            row["scaling"], f"{row['ranks']}", f"{row['threads']}", f"{row['batch_size']}",
            f"{row['ranks'] * row['batch_size']}", images_per_s(row),
            f"{row['images_per_s'] / ideal:.2f}",
        ]
        for scaling in SCALINGS
        for row, ideal in with_ideals(part, scaling, results["machine"])
    ]  # fmt: skip
    head = ["scaling", "ranks", "threads of each", "images of each", "of all", "images/s"]
    workers = "GPUs" if part["flags"]["device"] == "cuda" else "cores"
    note = RANKS_NOTE.format(workers=workers, runs=len(part["rows"][0]["rounds"]))
    return [markdown([*head, "of the ideal"], rows), note]


def with_ideals(part: Record, scaling: str, machine: Record) -> list[tuple[Record, float]]:
    """Return the rows of a kind of scaling with the images/s that nothing lost would give."""
    rows = [row for row in part["rows"] if row["scaling"] == scaling]

    def workers(row: Record) -> int:
        if part["flags"]["device"] == "cuda":
            return row["ranks"]
        return min(row["ranks"] * row["threads"], machine["cores"])

    each = rows[0]["images_per_s"] / workers(rows[0])
    return [(row, each * workers(row)) for row in rows]


def interval_table(name: str, part: Record, results: Record) -> list[str]:
    """Return the table of guided sampling, and a note."""
    rows = [
        [
            f"{row['share']} %", f"{row['guided_steps']}", f"{1e3 * row['seconds']:.1f}",
            f"{1e3 * row['expected']:.1f}", f"{row['seconds'] / row['expected']:.2f}",
        ]
        for row in part["rows"]
    ]  # fmt: skip
    note = INTERVAL_NOTE.format(
        steps=part["flags"]["timestep_respacing"],
        batch=part["batch_size"],
        network=1e3 * part["network_seconds"],
        gradient=1e3 * part["gradient_seconds"],
    )
    head = ["guided", "steps", "ms a step", "expected", "measured / expected"]
    return [markdown(head, rows), note]


TABLES: dict[str, Callable[[str, Record, Record], list[str]]] = {
    **dict.fromkeys(HEADS, network_table),
    "ranks": ranks_table,
    "interval": interval_table,
}


# --------------------------------------------------------------------------------------------
# The picture

BLUE, ORANGE, GREY = "#1f77b4", "#d95f02", "#666666"
STYLES = {
    "forward": {"color": BLUE, "marker": "o"},
    "train": {"color": ORANGE, "marker": "s"},
    "strong": {"color": BLUE, "marker": "o"},
    "weak": {"color": ORANGE, "marker": "s"},
}
GUIDE = {"color": GREY, "linestyle": ":", "linewidth": 1.2}
COLUMNS = 3


def plot(plt: Any, path: Path, results: Record) -> None:
    """Draw a panel for each part, and one for memory, as a PNG.

    Args:
        plt: matplotlib's pyplot.
        path: of the picture.
        results: as for `tables`.
    """
    panels = [panel for panel in PANELS if panel[0] in results["parts"]]
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.4 * columns, 3.7 * lines), dpi=140, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    machine = results["machine"]
    described = f"{machine['device']}, threads: {machine['threads']}, {machine['precision']}"
    figure.suptitle(described, fontsize=10, color=GREY)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    for place, (name, title, draw) in zip(axes.flat, panels, strict=False):
        draw(place, results["parts"][name], machine)
        place.set_title(title, fontsize=11, loc="left")
        place.grid(alpha=0.25)
        place.spines[["top", "right"]].set_visible(False)
        place.tick_params(labelsize=9)
        handles, labels = place.get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))
        place.legend(once.values(), once.keys(), fontsize=8.5, frameon=False)
    for place in axes.flat[len(panels) :]:
        place.set_visible(False)
    checkpoints.write_file(str(path), lambda file: figure.savefig(file, format="png"))
    plt.close(figure)


def ticks_at(axes: Any, values: list[int]) -> None:
    """Put a tick at each value that was measured, and no other, on a logarithmic axis."""
    axes.set_xscale("log")
    axes.set_xticks(values, [f"{value}" for value in values])
    axes.set_xticks([], minor=True)


def draw_speeds(axes: Any, part: Record, xlabel: str, falling: str = "") -> None:
    """Draw images/s on logarithmic axes, and lines that fall with the square of what is named."""
    values = [row["value"] for row in part["rows"]]
    speeds = {task: [row[task]["images_per_s"] for row in part["rows"]] for task in TASKS}
    for task, title in TASKS.items():
        axes.plot(values, speeds[task], label=title, **STYLES[task])
    for line in speeds.values() if falling else ():
        square = [line[-1] * (values[-1] / value) ** 2 for value in values]
        axes.plot(values, square, label=f"as 1 / {falling}$^2$", zorder=1, **GUIDE)
    ticks_at(axes, values)
    axes.set_yscale("log", subs=[2, 5])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set(xlabel=xlabel, ylabel="images/s")


def draw_batch(axes: Any, part: Record, machine: Record) -> None:
    """Draw images/s against the batch."""
    draw_speeds(axes, part, "images in a batch")


def draw_memory(axes: Any, part: Record, machine: Record) -> None:
    """Draw the peak memory of the training step against the batch, both from 0."""
    values = [row["value"] for row in part["rows"]]
    sizes = [row["peak_bytes"] / 1e6 for row in part["rows"]]
    axes.plot(values, sizes, label=TASKS["train"], **STYLES["train"])
    axes.set(xlim=(0, None), ylim=(0, None), xlabel="images in a batch", ylabel="peak MB")


def draw_resolution(axes: Any, part: Record, machine: Record) -> None:
    """Draw images/s against the resolution, and as they would fall with the number of pixels."""
    draw_speeds(axes, part, "size in pixels", "size")


def draw_width(axes: Any, part: Record, machine: Record) -> None:
    """Draw images/s against the width, and as they would fall with its square."""
    draw_speeds(axes, part, "width in channels", "width")


def draw_ranks(axes: Any, part: Record, machine: Record) -> None:
    """Draw images/s against the ranks, and the ideal of each kind of scaling."""
    kinds = {scaling: with_ideals(part, scaling, machine) for scaling in SCALINGS}
    ranks = [row["ranks"] for row, _ in kinds["strong"]]
    for scaling, title in SCALINGS.items():
        speeds = [row["images_per_s"] for row, _ in kinds[scaling]]
        axes.plot(ranks, speeds, label=title, **STYLES[scaling])
    for rows in kinds.values():
        axes.plot(ranks, [ideal for _, ideal in rows], label="ideal", zorder=1, **GUIDE)
    ticks_at(axes, ranks)
    axes.margins(y=0.1)
    axes.set(ylim=(0, None), xlabel="ranks", ylabel="images/s")


def draw_interval(axes: Any, part: Record, machine: Record) -> None:
    """Draw the cost of a step against the share of guided ones, beside what is expected."""
    shares = [row["share"] for row in part["rows"]]
    measured, expected = (
        [1e3 * row[key] for row in part["rows"]] for key in ("seconds", "expected")
    )
    axes.plot(shares, measured, label="measured", **STYLES["train"])
    axes.plot(shares, expected, label="calls times seconds a call", zorder=1, **GUIDE)
    axes.set(ylim=(0, None), xlabel="guided steps in percent", ylabel="ms a step", xticks=shares)


Draw = Callable[[Any, Record, Record], None]
PANELS: list[tuple[str, str, Draw]] = [  # part, title, and what draws it
    ("batch", "Speed by batch", draw_batch),
    ("resolution", "Speed by resolution", draw_resolution),
    ("width", "Speed by width", draw_width),
    ("batch", "Memory by batch", draw_memory),
    ("ranks", "Training on several ranks", draw_ranks),
    ("interval", "Guided sampling", draw_interval),
]
