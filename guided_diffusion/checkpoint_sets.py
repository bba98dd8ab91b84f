"""Sets of checkpoint files: which one to go on from, how one is written, which ones to delete.

A set is what one save leaves. Its state file is written last and lists the others with their
sizes, so a set that a kill or a full disk has cut short has no state file and is passed over.
Importing this module imports no torch.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from . import checkpoints, dist_util

STATE_FORMAT = 1  # of the state file; a newer one is refused
PATIENCE = 15.0  # seconds to wait for a folder that another run, perhaps a dying one, has locked
TEMPORARY = re.compile(r"((model|ema_.+_|opt|state)\d+\.(pt|json)|classes\.(txt|csv))\.tmp\d+")


# --------------------------------------------------------------------------------------------
# Which set to go on from


def resolve_resume(asked: str, log_dir: str) -> str:
    """Return the weights file that --resume_checkpoint stands for, "" for a new run.

    Args:
        asked: a file, a folder (its newest complete set), "auto" (the same for `log_dir`, and a
            new run where there is no set yet) or "".
        log_dir: the folder of this run, "" if it is not known.

    Raises:
        ValueError: if there is no such file, or no complete set in the folder.
    """
    asked = os.path.expanduser(asked)
    if asked == "auto":
        folder = os.environ.get("DIFFUSION_BLOB_LOGDIR") or log_dir
        if not folder:
            raise ValueError("--resume_checkpoint auto needs --log_dir, the folder of the run")
        return find_newest(os.path.expanduser(folder)) or ""
    if not asked or checkpoints.exists(asked):
        return _check_is_weights(asked)
    newest = find_newest(asked)
    if newest is None:
        raise ValueError(
            f"--resume_checkpoint {asked} is neither a file nor a folder with a complete set of "
            "model, optimizer and state: give a modelNNNNNN.pt"
        )
    return newest


def _check_is_weights(path: str) -> str:
    name = os.path.basename(path)
    other = re.fullmatch(r"(opt|state)(\d+)\.pt", name)
    if other:
        raise ValueError(
            f"--resume_checkpoint {path} holds no weights: give model{other.group(2)}.pt beside it"
        )
    return path


def find_newest(folder: str) -> str | None:
    """Return the weights file of the newest complete set in a folder, or None.

    A set without a state file, of the published code or of an early version of this one, counts
    if it has an optimizer's file, and no save of ours was cut short in it.
    """
    names = set(checkpoints.names_in(folder))
    for step in steps_among(names):
        if checkpoints.state_name(step) in names:
            found = is_complete(folder, step)
        else:
            found = checkpoints.opt_name(step) in names and not _is_cut_short(folder, step, names)
        if found:
            return checkpoints.join(folder, checkpoints.model_name(step))
    return None


def _is_cut_short(folder: str, step: int, names: Iterable[str]) -> bool:
    """Tell whether a save of this project began a set without a state and did not end it."""
    if checkpoints.is_remote(folder):  # no temporary files there
        return checkpoints.flags_path(checkpoints.model_name(step)) in names
    return any(name.startswith(f"{checkpoints.state_name(step)}.tmp") for name in names)


def steps_among(names: Iterable[str]) -> list[int]:
    """Return the steps of the weights files among some names, the newest first."""
    found = (re.fullmatch(r"model(\d+)\.pt", name) for name in names)
    return sorted((int(match.group(1)) for match in found if match), reverse=True)


def is_complete(folder: str, step: int) -> bool:
    """Tell whether the state file of a set can be read, and all that it lists has its size."""
    try:
        state = read_state(checkpoints.join(folder, checkpoints.model_name(step)))
    except ValueError:
        return False
    return state is not None and all(
        checkpoints.size_of(checkpoints.join(folder, name)) == size
        for name, size in state["files"].items()
    )


def read_state(model_path: str) -> dict[str, Any] | None:
    """Read the state file that belongs to a weights file, None if there is none.

    Raises:
        ValueError: if the file is damaged, or of a later version of this project.
    """
    path = beside(model_path, checkpoints.state_name(checkpoints.step_of(model_path)))
    if not has_set(model_path) or not checkpoints.exists(path):
        return None
    state = dist_util.load_state_dict(path)
    if not isinstance(state, dict) or not isinstance(state.get("files"), dict):
        raise ValueError(f"{path} is no training state: restore it, or remove it to start it cold")
    if state.get("format") != STATE_FORMAT:
        raise ValueError(
            f"{path} has format {state.get('format')!r}, this version reads {STATE_FORMAT}: use "
            "the version that wrote it, or remove it to start it cold"
        )
    return state


def has_set(path: str) -> bool:
    """Tell whether other files can belong to a file of weights: not to an average or a renamed one.

    Their names would say step 0, and what the published code saved there is not theirs.
    """
    return os.path.basename(path) == checkpoints.model_name(checkpoints.step_of(path))


def beside(path: str, name: str) -> str:
    """Return the path of another file in the folder of `path`."""
    return checkpoints.join(os.path.dirname(path), name)


# --------------------------------------------------------------------------------------------
# Writing one


class SetWriter:
    """Writes the files of one set from rank 0; the other ranks call along and write nothing.

    From its first file to its last the set has a temporary state file, by which a later reader
    knows a save that was cut short. After an error, its files are taken back.

    Args:
        folder: where to.
        step: the number of steps done.
        flags: what to write beside each file of weights; {} for no such files.
    """

    def __init__(self, folder: str, step: int, flags: dict[str, Any]):
        self.folder, self.step, self.flags = folder, step, flags
        self.sizes: dict[str, int] = {}
        if dist_util.is_main():
            checkpoints.make_folder(folder)
            remove_leftovers(folder)  # before anything is written: the disk may be tight
            state = self.path(checkpoints.state_name(step))
            if not checkpoints.is_remote(folder):
                checkpoints.touch(checkpoints.temporary_name(state))
            # An older set of the same number ends here, before its first file is replaced.
            checkpoints.remove(state)

    def __enter__(self) -> SetWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if error is not None and dist_util.is_main():
            with suppress(OSError):
                remove_set(self.folder, self.step)
                remove_leftovers(self.folder)

    def path(self, name: str) -> str:
        """Return the path of one of the set's files."""
        return checkpoints.join(self.folder, name)

    def weights(self, name: str, state: dict[str, Any]) -> None:
        """Write a file of weights, and its flags before it."""
        if self.flags and dist_util.is_main():
            checkpoints.save_flags(self.path(name), self.flags)
        self.save(name, {key: value.contiguous() for key, value in state.items()})

    def save(self, name: str, state: Any) -> None:
        """Write tensors and plain containers."""
        if dist_util.is_main():
            checkpoints.save(self.path(name), state)
            self.sizes[name] = checkpoints.size_of(self.path(name))

    def complete(self, state: dict[str, Any]) -> None:
        """Write the state file, which makes the set complete; again to replace it."""
        whole = state | {"format": STATE_FORMAT, "files": self.sizes}
        if dist_util.is_main():
            checkpoints.save(self.path(checkpoints.state_name(self.step)), whole)


@contextmanager
def reserved(folder: str) -> Iterator[None]:
    """Keep other runs out of a folder within the block; they would mix their files.

    Rank 0 locks the folder itself, as far as its disk knows locks; the lock ends with the process
    and, up to seconds later, with the processes that read images for it.

    Raises:
        ValueError: if another run has it.
    """
    handle = None
    if dist_util.is_main() and not checkpoints.is_remote(folder):
        handle = _lock(folder)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _lock(folder: str) -> int | None:
    """Make and lock a folder; return what to close to unlock it, None where there are no locks."""
    deadline = time.monotonic() + PATIENCE
    while True:
        checkpoints.make_folder(folder)
        try:
            return _lock_now(folder)
        except (BlockingIOError, FileNotFoundError) as error:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{folder} is in use by another run: wait for its end, or choose another "
                    "--log_dir"
                ) from error
            time.sleep(0.1)


def _lock_now(folder: str) -> int | None:
    """Lock a folder as `_lock` does, or raise the error of one that is locked or has gone."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        raise
    except (ImportError, OSError):  # Windows
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.stat(folder)):
            return handle
        raise FileNotFoundError(folder)  # whoever had it has removed it, and this is no other's
    except (BlockingIOError, FileNotFoundError):
        os.close(handle)
        raise
    except OSError:  # some network disks
        os.close(handle)
        return None


# --------------------------------------------------------------------------------------------
# Deleting


def prune(folder: str, keep: int, newest: int) -> list[int]:
    """Delete the sets before step `newest` but for the last `keep`, that one included.

    Sets without a state file, of the published code for example, and later ones, of another run,
    are not touched.

    Returns:
        the steps of the sets that were deleted.
    """
    names = checkpoints.names_in(folder)
    ours = [step for step in steps_among(names) if checkpoints.state_name(step) in names]
    old = [step for step in ours if step <= newest][keep:]
    for step in old:
        remove_set(folder, step)
    return old


def remove_set(folder: str, step: int) -> None:
    """Delete the files of a set, the state first."""
    checkpoints.remove(checkpoints.join(folder, checkpoints.state_name(step)))
    of_set = re.compile(rf"(model|opt|ema_.+_){step:06d}\.(pt|json)")
    for name in filter(of_set.fullmatch, checkpoints.names_in(folder)):
        checkpoints.remove(checkpoints.join(folder, name))


def remove_leftovers(folder: str) -> None:
    """Delete what a killed run has left in a local folder: its unfinished set, temporary files."""
    if checkpoints.is_remote(folder):
        return
    names = checkpoints.names_in(folder)
    for step in steps_among(names):
        has_state = checkpoints.state_name(step) in names
        if not has_state and _is_cut_short(folder, step, names):
            remove_set(folder, step)
    for name in filter(TEMPORARY.fullmatch, names):
        checkpoints.remove(checkpoints.join(folder, name))
