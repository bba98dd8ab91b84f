"""Log lines and key-value pairs to the terminal, log.txt, progress.csv, JSON and TensorBoard.

A training loop calls `logkv` or `logkv_mean` at each step and `dumpkvs` now and then: one dump is a
table on the terminal and a row of progress.csv. Before `configure()` there is the terminal alone.
Files that exist are appended to, so that a resumed run goes on in the files of the first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from . import dist_util
from .log_outputs import FORMATS, Output, TextOutput

DEBUG, INFO, WARN, ERROR, DISABLED = 10, 20, 30, 40, 50


class Logger:
    """Some outputs, and the pairs that wait for the next dump."""

    def __init__(self, dir: str | None, outputs: Iterable[Output], comm: Any = None):
        self.dir = dir
        self.outputs = list(outputs)
        self.comm = comm
        self.level = INFO
        self.found: set[Path] = set()  # what was in the folder before
        self.made: list[Path] = []  # the files of the outputs, and folders, that were not there
        self.num_dumps = 0
        self._last_step: int | None = None
        self.values: dict[str, Any] = {}
        self.counts: dict[str, int] = {}  # of the keys whose value is a sum, to be averaged

    def logkv(self, key: str, val: Any) -> None:
        """Keep the last value of a key."""
        self.values[key] = _hold(val)
        self.counts.pop(key, None)

    def logkv_mean(self, key: str, val: Any) -> None:
        """Average the values of a key until the next dump."""
        val = _hold(val)
        val = val.float() if hasattr(val, "float") else val  # half precision would not add up
        count = self.counts.get(key, 0)
        self.values[key] = self.values[key] + val if count else val
        self.counts[key] = count + 1

    def getkvs(self) -> dict[str, Any]:
        """Return the pairs so far, as plain numbers and strings."""
        plain = {key: _to_plain(value) for key, value in self.values.items()}
        return plain | {key: plain[key] / count for key, count in self.counts.items()}

    def window(self) -> dict[str, Any]:
        """Return the pairs that wait for the next dump, so that they can be saved."""
        values = {key: _to_saved(value) for key, value in self.values.items()}
        return {"values": values, "counts": dict(self.counts)}

    def restore_window(self, window: Mapping[str, Any]) -> None:
        """Go on with the pairs that `window` returned."""
        self.values, self.counts = dict(window["values"]), dict(window["counts"])

    def last_step(self, default: int) -> int:
        """Return the key "step" of the last dump, `default` before the first."""
        return default if self._last_step is None else int(self._last_step)

    def drop_rows_after(self, step: int) -> None:
        """Forget the dumps whose key "step" is larger, in every file."""
        for output in self.outputs:
            output.drop_rows_after(step)

    def dumpkvs(self) -> dict[str, Any]:
        """Write the pairs to every output, forget them, and return them."""
        kvs = self.getkvs() if self.comm is None else self._average_over_ranks()
        self.values, self.counts = {}, {}
        self.num_dumps += 1
        self._last_step = kvs.get("step", self._last_step)
        if kvs and self.level < DISABLED:
            for output in self.outputs:
                self._write(output.write_kvs, kvs)
        return kvs

    def _write(self, write: Callable[[Any], None], what: Any) -> None:
        """Let an output write; if it cannot, say which folder is full or gone."""
        try:
            write(what)
        except OSError as error:
            raise OSError(
                f"the log in {self.dir} cannot be written ({error.strerror or error}): make room "
                "there, or choose another --log_dir"
            ) from error

    def _average_over_ranks(self) -> dict[str, Any]:
        """Weigh the means of all ranks of an mpi4py communicator; only rank 0 gets a result."""
        kvs: dict[str, Any] = {}
        totals = dict.fromkeys(self.counts, 0.0)
        for values, counts in self.comm.gather((self.getkvs(), self.counts), root=0) or []:
            for key, value in values.items():
                if key in counts:
                    mean, count = kvs.get(key, 0.0), totals.get(key, 0) + counts[key]
                    kvs[key] = mean + (value - mean) * counts[key] / count
                    totals[key] = count
                else:
                    kvs.setdefault(key, value)
        return kvs

    def log(self, *args: Any, level: int = INFO) -> None:
        """Write a line, as print would, if its level is high enough."""
        if self.level <= level and self.level < DISABLED:
            for output in self.outputs:
                self._write(output.write_text, " ".join(map(str, args)))

    def close(self) -> None:
        """Close every output."""
        for output in self.outputs:
            output.close()

    def forget(self) -> None:
        """Close, and take away what was made, unless something was dumped or saved meanwhile."""
        self.close()
        with suppress(OSError):  # several ranks do this at once
            if self.num_dumps or set(Path(self.dir).iterdir()) - self.found - set(self.made):
                return
        for path in self.made:
            with suppress(OSError):  # a folder that others write into stays
                path.rmdir() if path.is_dir() else path.unlink()


def _hold(value: Any) -> Any:
    """Keep a tensor's value without waiting for its device, and out of reach of later changes."""
    return value.detach().clone() if hasattr(value, "detach") else value


def _to_saved(value: Any) -> Any:
    """Return what can be saved and added to as before: tensors stay tensors, subclasses do not."""
    if type(value) in (int, float, str, bool):
        return value
    is_tensor = hasattr(value, "detach")
    return value.detach().cpu() if is_tensor and value.dim() == 0 else _to_plain(value)


def _to_plain(value: Any) -> Any:
    """Turn a tensor or numpy number into a Python one; what is no number becomes text."""
    if hasattr(value, "tolist"):
        flat = value.reshape(-1).tolist()
        value = flat[0] if len(flat) == 1 else value.tolist()
    return value if isinstance(value, int | float) else str(value)


_terminal = Logger(None, [TextOutput()])
_current = _terminal


def configure(
    dir: str | os.PathLike | None = None,
    format_strs: Iterable[str] | None = None,
    comm: Any = None,
    log_suffix: str = "",
) -> None:
    """Log into a folder from now on, and say into which.

    Args:
        dir: the folder; by default that of OPENAI_LOGDIR, else a new one under ./logs, named by
            the time, the same on all ranks.
        format_strs: names out of FORMATS; by default those of OPENAI_LOG_FORMAT on rank 0 and of
            OPENAI_LOG_FORMAT_MPI elsewhere.
        comm: an mpi4py communicator, to average over its ranks what logkv_mean averages.
        log_suffix: goes into the file names.
    """
    new = _make_logger(dir, format_strs, comm, log_suffix)
    reset()
    _begin(new)


def _begin(new: Logger, greeting: Callable[[str], str] | None = None) -> None:
    """Make this the current logger, which begins with what `greeting` says of its folder."""
    global _current
    _current = new
    if greeting is not None:
        new.log(greeting(new.dir))
    if new.dir:
        new.log(f"Logging to {new.dir}")


def _make_logger(
    dir: str | os.PathLike | None,
    format_strs: Iterable[str] | None = None,
    comm: Any = None,
    log_suffix: str = "",
) -> Logger:
    """Make the folder, and open in it the files of this rank."""
    rank = dist_util.get_rank() if comm is None else comm.Get_rank()
    names = _default_formats(rank) if format_strs is None else format_strs
    names = [name.strip() for name in names if name.strip()]
    unknown = sorted(set(names) - set(FORMATS))
    if unknown:
        raise ValueError(f"log formats {unknown} must be among {sorted(FORMATS)}")
    dir = dir or os.environ.get("OPENAI_LOGDIR")
    dated = not dir
    dir = dir or dist_util.share("log_dir", _make_dated_folder)
    folder = Path(os.path.abspath(os.path.expanduser(dir)))
    folders = [path for path in (folder, *folder.parents) if dated or not path.exists()]
    suffix = log_suffix + (f"-rank{rank:03d}" if rank > 0 else "")
    try:
        if "://" in str(dir):
            raise OSError("not a local path")
        folder.mkdir(parents=True, exist_ok=True)
        found = set(folder.iterdir())
        outputs = [FORMATS[name](folder, suffix) for name in names]
    except OSError as error:
        raise ValueError(
            f"--log_dir {str(dir)!r} is not a folder to write into ({error.strerror or error})"
        ) from error
    new = Logger(str(folder), outputs, comm)
    new.found = found
    new.made = [*(set(folder.iterdir()) - found), *folders[: 2 if dated else None]]
    return new


def _default_formats(rank: int) -> list[str]:
    """Return the names of the formats that the environment asks for."""
    if rank == 0:
        return os.environ.get("OPENAI_LOG_FORMAT", "stdout,log,csv").split(",")
    return os.environ.get("OPENAI_LOG_FORMAT_MPI", "log").split(",")


def _make_dated_folder() -> str:
    """Make a folder under ./logs that no other run has, and return its path."""
    name = os.path.abspath(datetime.now().strftime("logs/%Y-%m-%d-%H-%M-%S"))
    for number in range(1000):
        path = f"{name}-{number}" if number else name
        try:
            os.makedirs(path)
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(
                f"cannot make {path} ({error.strerror}): choose a folder with --log_dir"
            ) from error
        return path
    raise ValueError(f"cannot make {name}: choose a folder with --log_dir")


def reset() -> None:
    """Close the current logger's files and go back to the terminal alone."""
    global _current
    if _current is not _terminal:
        _current.close()
    _current = _terminal


@contextmanager
def scoped_configure(
    dir: str | os.PathLike | None = None,
    format_strs: Iterable[str] | None = None,
    comm: Any = None,
    greeting: Callable[[str], str] | None = None,
) -> Iterator[None]:
    """Log into a folder within a block, close its files after it, then go on as before.

    Args:
        dir: as for `configure`, like the next two.
        format_strs: names of formats.
        comm: averages.
        greeting: the folder -> the first line of the log; None for no such line.
    """
    global _current
    before = _current
    _begin(_make_logger(dir, format_strs, comm), greeting)
    try:
        yield
    finally:
        reset()
        _current = before


class Ranks:
    """All ranks of the job as a communicator: `comm=` for means over all of them.

    Every rank must then call `dumpkvs` as often as the others.
    """

    Get_rank = staticmethod(dist_util.get_rank)

    def gather(self, value: Any, root: int = 0) -> list[Any]:
        """Return every rank's value on rank 0, an empty list elsewhere."""
        return dist_util.gather_objects(value)


@contextmanager
def session(
    dir: str | os.PathLike | None = None,
    tensorboard: bool = False,
    comm: Any = None,
    greeting: Callable[[str], str] | None = None,
) -> Iterator[None]:
    """Log into a folder within the block that a script runs in, first who takes part in the job.

    All ranks call this. A ValueError, the mistake of a user, that comes before anything but lines
    of text was written leaves no new log files and no new folder behind.

    Args:
        dir: as for `configure`.
        tensorboard: write TensorBoard's files on rank 0, too.
        comm: as for `configure`.
        greeting: as for `scoped_configure`.
    """
    names = _default_formats(dist_util.get_rank())
    if tensorboard and dist_util.is_main() and "tensorboard" not in names:
        names = [*names, "tensorboard"]
    with scoped_configure(dir, names, comm, greeting):
        logger = _current
        for line in dist_util.describe_ranks():
            logger.log(line)
        try:
            yield
        except ValueError:
            logger.forget()
            raise


def get_current() -> Logger:
    """Return the logger that the functions below speak to."""
    return _current


def get_dir() -> str:
    """Return the folder that is logged into; configure() first if nobody did."""
    if _current.dir is None:
        configure()
    return _current.dir


def logkv(key: str, val: Any) -> None:
    """Keep the last value of a key for the next dump; a tensor is read only then."""
    _current.logkv(key, val)


def logkv_mean(key: str, val: Any) -> None:
    """Average the values of a key until the next dump; tensors are read only then."""
    _current.logkv_mean(key, val)


def logkvs(d: Mapping[str, Any]) -> None:
    """Keep several pairs for the next dump."""
    for key, val in d.items():
        _current.logkv(key, val)


def dumpkvs() -> dict[str, Any]:
    """Write the pairs to every output, forget them, and return them."""
    return _current.dumpkvs()


def getkvs() -> dict[str, Any]:
    """Return the pairs that wait for the next dump."""
    return _current.getkvs()


def log(*args: Any, level: int = INFO) -> None:
    """Write a line to the terminal and log.txt."""
    _current.log(*args, level=level)


def debug(*args: Any) -> None:
    """Write a line that shows only after set_level(DEBUG)."""
    log(*args, level=DEBUG)


def info(*args: Any) -> None:
    """Write a line of the usual level."""
    log(*args, level=INFO)


def warn(*args: Any) -> None:
    """Write a line about something to look at."""
    log(*args, level=WARN)


def error(*args: Any) -> None:
    """Write a line about something that failed."""
    log(*args, level=ERROR)


def set_level(level: int) -> None:
    """Show only lines of this level or above (DEBUG, INFO, WARN, ERROR, DISABLED)."""
    _current.level = level
