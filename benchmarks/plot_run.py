"""Plot columns of a training run's progress.csv against the step, as a PNG.

python benchmarks/plot_run.py runs/diffusion/progress.csv --columns loss,mse --out curve.png
"""

import argparse
import csv

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of the back end)


def read_column(rows: list[dict[str, str]], name: str) -> tuple[list[float], list[float]]:
    """Return the steps and the values of a column where it is filled."""
    points = [(float(row["step"]), float(row[name])) for row in rows if row.get(name)]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: list[float], window: int) -> list[float]:
    """Return the mean of the last `window` values at each place."""
    starts = [max(0, i + 1 - window) for i in range(len(values))]
    return [sum(values[s : i + 1]) / (i + 1 - s) for i, s in enumerate(starts)]


def main() -> None:
    """Read the file and draw one line for each column, raw and smoothed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", help="progress.csv of a run")
    parser.add_argument("--columns", default="loss", help="columns, commas between")
    parser.add_argument("--out", default="curve.png", help="the picture to write")
    parser.add_argument("--window", type=int, default=10, help="rows to average over")
    parser.add_argument("--log", action="store_true", help="logarithmic vertical axis")
    args = parser.parse_args()
    with open(args.csv, newline="") as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
    for name in args.columns.split(","):
        steps, values = read_column(rows, name)
        (line,) = axes.plot(steps, values, alpha=0.25)
        axes.plot(steps, smooth(values, args.window), color=line.get_color(), label=name)
    if args.log:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(args.out)
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
