"""How flags are declared, and how a command line becomes a namespace of their values.

This module imports nothing heavy, so that `--help` answers at once.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import field, fields
from typing import Any

from .flag_checks import PATHS, Check, str2bool
from .heartbeat import explain
from .launchers import read_launch
from .signals import INTERRUPTED, ended_by_ctrl_c


def flag(
    default: Any,
    help: str,
    *,
    check: Check | None = None,
    fixes: bool = False,
    required: bool = False,
) -> Any:
    """Declare a flag.

    Args:
        default: its value when nobody sets it; the annotation beside it is its type.
        help: one phrase for `--help`.
        check: names what is wrong with a value, or returns None.
        fixes: True if the value fixes the trained network or process, so that a checkpoint's
            flags file may not be contradicted.
        required: True if the empty default is an error.
    """
    metadata = {"help": help, "check": check, "fixes": fixes, "required": required}
    return field(default=default, metadata=metadata)


def same_as(group: type, name: str) -> Any:
    """Declare a flag that another program's group has: with its default, help and check."""
    origin = next(f for f in fields(group) if f.name == name)
    return field(default=origin.default, metadata=origin.metadata)


def defaults(*groups: type) -> dict[str, Any]:
    """Return flag name -> default for the groups, in order."""
    return {f.name: f.default for group in groups for f in fields(group)}


def fixed_names(*groups: type) -> set[str]:
    """Return the names of the flags that fix the trained network or process."""
    return {f.name for group in groups for f in fields(group) if f.metadata["fixes"]}


# --------------------------------------------------------------------------------------------
# From the command line


MISTAKE_IN_FLAGS = 2  # the exit code


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the list of all flags."""

    def error(self, message: str):
        _fail(f"{message} (--help lists all flags)", code=MISTAKE_IN_FLAGS)


def _fail(message: str, code: int) -> None:
    """Print one line on stderr and end the process.

    A mistake in the flags is made by all ranks alike, and rank 0 tells it. Of others it tells
    first, and when it ends, the launcher ends the others, who speak only if they are still there.
    """
    rank = read_launch(os.environ).rank
    if rank > 0:
        time.sleep(2)
        if code == MISTAKE_IN_FLAGS:  # all ranks have the same
            sys.exit(code)
    line = " ".join(message.split())
    who = f"{os.path.basename(sys.argv[0])}: " + (f"rank {rank}: " if rank else "")
    print(f"{who}error: {line}", file=sys.stderr, flush=True)
    sys.exit(code)


def _add_flag(group: Any, f: Any, default: Any) -> None:
    value = f" [{default}]" if default != "" else ""
    shown = f"{f.metadata['help']}{value}".replace("%", "%%")
    kind = str2bool if f.type is bool else f.type
    if f.metadata["check"] in PATHS:
        kind = os.path.expanduser  # in --flag=~/x the shell leaves it to us
    group.add_argument(
        f"--{f.name}", type=kind, default=argparse.SUPPRESS, metavar=f.type.__name__, help=shown
    )


def find_mistake(f: Any, value: Any) -> str | None:
    """Say what is wrong with the value of one flag, or return None.

    Args:
        f: the field that declares the flag.
        value: of the flag's type.
    """
    if f.metadata["required"] and value == "":
        return f"--{f.name} is missing: {f.metadata['help']}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"--{f.name} {value} must be a finite number"
    problem = f.metadata["check"] and f.metadata["check"](value)
    shown = repr(value) if value == "" or str(value) != str(value).strip() else value
    return f"--{f.name} {shown} {problem}" if problem else None


def read_flags(
    description: str | None,
    *groups: type,
    argv: Iterable[str] | None = None,
    overrides: dict[str, Any] | None = None,
    positional: Sequence[str] = (),
    expand: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]],
    find_conflict: Callable[[dict[str, Any]], str | None],
) -> argparse.Namespace:
    """Read a command line into a namespace of flag values; a mistake ends the process.

    Args:
        description: printed above the flags.
        groups: the dataclasses whose flags the program has.
        argv: the command line, sys.argv[1:] by default.
        overrides: defaults of this program where they differ.
        positional: flags whose values may stand anywhere without the flags' names; those that
            are not named, in this order.
        expand: (given, defaults of all flags) -> flags that others which were given stand for; it
            raises a ValueError if there is something wrong with those.
        find_conflict: says which flags do not go together.

    Returns:
        a namespace with every flag, and `given`, the set of names that the user set.
    """
    usage = "%(prog)s [-h] [--FLAG VALUE ...]"
    parser = _Parser(description=description, usage=usage, allow_abbrev=False)
    values = defaults(*groups) | (overrides or {})
    for group in groups:
        section = parser.add_argument_group(group.__doc__.rstrip("."))
        for f in fields(group):
            _add_flag(section, f, values[f.name])
    given = _parse(parser, None if argv is None else list(argv), positional)
    try:
        values |= expand(given, values) | given
    except ValueError as error:
        parser.error(str(error))
    mistakes = [find_mistake(f, values[f.name]) for group in groups for f in fields(group)]
    if "model_path" not in values:  # else a file will complete the flags
        mistakes.append(find_conflict(values))
    for mistake in filter(None, mistakes):
        parser.error(mistake)
    return argparse.Namespace(**values, given=set(given))


def _parse(
    parser: argparse.ArgumentParser, argv: list[str] | None, positional: Sequence[str]
) -> dict[str, Any]:
    """Return the flags that a command line gives; a value without a name is its flag's by place."""
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    found = parser.parse_intermixed_args(argv)
    words, names = found.words, [name for name in positional if not hasattr(found, name)]
    if words[len(names) :]:
        parser.error(f"unrecognized arguments: {' '.join(words[len(names) :])}")
    placed = [f"--{name}={word}" for name, word in zip(names, words, strict=False)]
    parser.parse_args(placed, found)
    del found.words
    return vars(found)


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; a user's mistake ends in one line on stderr and exit code 1.

    The whole traceback is shown when GUIDED_DIFFUSION_TRACEBACK is set. Ctrl-C ends the script
    without a word, and if it comes again, at once.
    """
    try:
        with ended_by_ctrl_c():
            main()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        line = explain(error)
        if line is None or os.environ.get("GUIDED_DIFFUSION_TRACEBACK"):
            raise
        _fail(line, code=1)
