"""Where a log goes: the terminal, log.txt, progress.csv, JSON, TensorBoard.

Files that exist are appended to. A run that resumes drops the rows that lie past its step.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from . import dist_util


class Output:
    """A place to write to; each kind overrides what it can show."""

    def write_text(self, text: str) -> None:
        """Write a line."""

    def write_kvs(self, kvs: Mapping[str, Any]) -> None:
        """Write one dump of key-value pairs."""

    def drop_rows_after(self, step: int) -> None:
        """Forget the dumps whose key "step" is larger."""

    def close(self) -> None:
        """Release the file."""


class TextOutput(Output):
    """Lines and tables for people: log.txt or, on rank 0 alone, the terminal."""

    def __init__(self, path: Path | None = None):
        self.file = path and path.open("a", encoding="utf-8", errors="surrogateescape")

    def write_text(self, text: str) -> None:
        """Write a line, at once."""
        if self.file:
            print(text, file=self.file, flush=True)
        elif dist_util.is_main():
            with _bars_aside():
                print(text, flush=True)

    def write_kvs(self, kvs: Mapping[str, Any]) -> None:
        """Write a table."""
        self.write_text(format_table(kvs))

    def drop_rows_after(self, step: int) -> None:
        """Take the later tables out of the file; the lines of text stay."""
        if self.file:
            path = Path(self.file.name)
            text = path.read_text(encoding="utf-8", errors="surrogateescape")
            _replace(path, TABLE.sub(lambda table: _unless_later(table, step), text))
            self.file.close()
            self.file = path.open("a", encoding="utf-8", errors="surrogateescape")

    def close(self) -> None:
        """Close the file, if it is not the terminal."""
        if self.file:
            self.file.close()


class CSVOutput(Output):
    """A table with a column for every key; a key that comes later adds a column to all rows."""

    def __init__(self, path: Path):
        self.path = path
        with self._open("a+") as file:
            file.seek(0)
            text = file.read()
            whole_rows = text[: text.rfind("\n") + 1]  # a killed run may leave half a row
            if len(whole_rows) < len(text):
                file.truncate(len(whole_rows.encode(errors="surrogateescape")))
        self.columns = next(csv.reader(io.StringIO(whole_rows.replace("\0", ""))), [])

    def write_kvs(self, kvs: Mapping[str, Any]) -> None:
        """Append a row."""
        new = sorted(kvs.keys() - set(self.columns))
        if new:
            self._add_columns(new)
        with self._open("a") as file:
            csv.writer(file, lineterminator="\n").writerow([kvs.get(key) for key in self.columns])

    def _add_columns(self, new: list[str]) -> None:
        """Rewrite the file with empty fields under the new columns."""
        rows = self._rows()
        self.columns += new
        self._rewrite(row + [""] * (len(self.columns) - len(row)) for row in rows)

    def drop_rows_after(self, step: int) -> None:
        """Take the later rows out of the file."""
        if "step" in self.columns:
            place = self.columns.index("step")
            rows = (row for row in self._rows() if len(row) > place)
            self._rewrite(row for row in rows if not _is_later(row[place], step))

    def _rows(self) -> list[list[str]]:
        with self._open("r") as file:  # a power failure may leave zeros
            return [row for row in csv.reader(line.replace("\0", "") for line in file) if row][1:]

    def _rewrite(self, rows: Iterable[list[str]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *rows])
        _replace(self.path, text.getvalue())

    def _open(self, mode: str) -> Any:
        return self.path.open(mode, newline="", encoding="utf-8", errors="surrogateescape")


class JSONOutput(Output):
    """A JSON object for each dump, each on a line."""

    def __init__(self, path: Path):
        self.file = path.open("a", encoding="utf-8", errors="surrogateescape")

    def write_kvs(self, kvs: Mapping[str, Any]) -> None:
        """Append a line."""
        print(json.dumps(kvs), file=self.file, flush=True)

    def drop_rows_after(self, step: int) -> None:
        """Take the later lines out of the file."""
        path = Path(self.file.name)
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines(keepends=True)
        steps = [re.search(r'"step": (\d+)', line) for line in lines]
        kept = [
            line for line, found in zip(lines, steps, strict=True)
            if not found or not _is_later(found.group(1), step)
        ]  # fmt: skip
        _replace(path, "".join(kept))
        self.file.close()
        self.file = path.open("a", encoding="utf-8", errors="surrogateescape")

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class TensorBoardOutput(Output):
    """A curve for each number, over the key "step" if there is one, else over the dumps."""

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "the log format tensorboard needs a package: pip install tensorboard"
            ) from error
        self.open = partial(SummaryWriter, str(folder))
        self.writer = self.open()
        self.num_dumps = 0

    def write_kvs(self, kvs: Mapping[str, Any]) -> None:
        """Add a point to each curve."""
        self.num_dumps += 1
        for key, value in kvs.items():
            add = self.writer.add_scalar
            if not isinstance(value, int | float):
                add, value = self.writer.add_text, str(value)
            add(key, value, int(kvs.get("step", self.num_dumps)))
        self.writer.flush()

    def drop_rows_after(self, step: int) -> None:
        """Let TensorBoard pass over the later points of earlier event files."""
        self.writer.close()
        self.writer = self.open(purge_step=step + 1)

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()


# name -> output, given the folder and the suffix of this rank's files
FORMATS = {
    "stdout": lambda folder, suffix: TextOutput(),
    "log": lambda folder, suffix: TextOutput(folder / f"log{suffix}.txt"),
    "csv": lambda folder, suffix: CSVOutput(folder / f"progress{suffix}.csv"),
    "json": lambda folder, suffix: JSONOutput(folder / f"progress{suffix}.json"),
    "tensorboard": lambda folder, suffix: TensorBoardOutput(folder / f"tb{suffix}"),
}


def format_table(kvs: Mapping[str, Any]) -> str:
    """Return key-value pairs as an aligned table, sorted by key."""
    shown = {key: f"{v:.4g}" if isinstance(v, float) else str(v) for key, v in kvs.items()}
    rows = [(_shorten(key), _shorten(shown[key])) for key in sorted(shown, key=str.lower)]
    width, value_width = (max(map(len, column)) for column in zip(*rows, strict=True))
    rule = "-" * (width + value_width + 7)
    lines = [f"| {key:<{width}} | {value:<{value_width}} |" for key, value in rows]
    return "\n".join([rule, *lines, rule])


def _shorten(text: str, limit: int = 40) -> str:
    """Cut a long text, and show that it is cut."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _bars_aside() -> AbstractContextManager:
    """Take tqdm's progress bars, if there are any, off the terminal while a line is printed."""
    tqdm = sys.modules.get("tqdm")
    return tqdm.tqdm.external_write_mode() if tqdm else nullcontext()


# A table as `format_table` makes it, with the line ends around it.
TABLE = re.compile(r"^-+\n(?:\|.*\|\n)+-+\n", re.MULTILINE)


def _unless_later(table: re.Match, step: int) -> str:
    """Return a table, or nothing if it is of a later step."""
    found = re.search(r"^\| step +\| (\d+) +\|$", table.group(), re.MULTILINE)
    return "" if found and _is_later(found.group(1), step) else table.group()


def _is_later(text: str, step: int) -> bool:
    return text.isdigit() and int(text) > step


def _replace(path: Path, text: str) -> None:
    """Rewrite a file so that it never holds half of it."""
    draft = path.with_name(path.name + ".tmp")
    with draft.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)
    os.replace(draft, path)
