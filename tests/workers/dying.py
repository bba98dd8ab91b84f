"""Run a script that kills itself at a chosen moment: half-way through a file, or after it.

Usage: dying.py RANK MOMENT SCRIPT FLAGS...  runs the script, of which rank RANK dies at its
MOMENT-th moment, counted from 1, if it comes that far.

Usage: dying.py FOLDER SCRIPT FLAGS...  lets runs die at every moment there is, one after the other,
and each time lets the same command go on. It must end with the files of a run that nobody killed.
Prints a line for each moment.
"""

import os
import shutil
import signal
import sys
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripting import load_script  # noqa: E402

from guided_diffusion import checkpoints, config, dist_util, sample_util  # noqa: E402, F401

LOGS = {"log.txt", "progress.csv"}  # these tell of every run


class Death:
    """Counts the moments of this process, and ends it at one of them.

    Args:
        rank: the process to end.
        moment: which; 0 for none.
        report: file descriptor for the name of the moment, if any.
    """

    def __init__(self, rank, moment, report=None):
        self.rank, self.moment, self.report = rank, moment, report
        self.passed = 0

    def is_now(self):
        """Count a moment, and tell whether it is the last one."""
        self.passed += 1
        return self.passed == self.moment and dist_util.get_rank() == self.rank

    def come(self, name):
        """End this process as the kernel would for want of memory."""
        if self.report is not None:
            os.write(self.report, name.encode())
        os.kill(os.getpid(), signal.SIGKILL)

    def arm(self):
        """Let every change to the disk be a moment or several."""
        for name in ("mkdir", "rmdir", "unlink", "remove"):
            setattr(os, name, self.before(getattr(os, name)))
        os.replace = self.after(os.replace)
        checkpoints.write_file = self.within(checkpoints.write_file)

    def before(self, change):
        """Wrap a function of one path."""

        def wrapped(path, *args, **kwargs):
            if self.is_now():
                self.come(f"before {change.__name__} {os.path.basename(path)}")
            return change(path, *args, **kwargs)

        return wrapped

    def after(self, replace):
        """Wrap os.replace, by which a file gets its name."""

        def wrapped(source, target):
            replace(source, target)
            if self.is_now():
                self.come(f"after {os.path.basename(target)} has its name")

        return wrapped

    def within(self, write_file):
        """Wrap the writing of a file: half of it is there, under its temporary name."""

        def wrapped(path, write, **kwargs):
            def write_or_die(file):
                write(file)
                if self.is_now():
                    file.flush()
                    os.truncate(file.name, os.path.getsize(file.name) // 2)
                    self.come(f"within {os.path.basename(path)}")

            return write_file(path, write_or_die, **kwargs)

        return wrapped


def run(death, script, flags):
    """Run a script in this process."""
    death.arm()
    sys.argv = [script, *flags]
    config.run(load_script(script).main)


def fork(death, script, flags):
    """Run a script in a child, silently; return how it ended, as os.wait tells it."""
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        try:
            run(death, script, flags)
        except SystemExit as end:
            os._exit(end.code or 0)
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    return os.waitpid(child, 0)[1]


def files_of(folder):
    """Return name -> bytes of all files below a folder but the logs; None for a folder."""
    paths = [path for path in sorted(folder.rglob("*")) if path.name not in LOGS]
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in paths
    }


def die_everywhere(folder, script, flags):
    """Let a run die at each moment, and go on each time."""
    nobody = Death(0, 0)
    assert fork(nobody, script, [*flags, "--log_dir", str(folder / "whole")]) == 0
    whole, killed = files_of(folder / "whole"), folder / "killed"
    for moment in count(1):
        shutil.rmtree(killed, ignore_errors=True)
        told, report = os.pipe()
        same = [*flags, "--log_dir", str(killed)]
        status = fork(Death(0, moment, report), script, same)
        os.close(report)
        name = os.read(told, 1000).decode()
        os.close(told)
        if status == 0:
            return moment - 1
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (name, status)
        assert fork(nobody, script, same) == 0, f"{name}: the run does not go on"
        found = files_of(killed)
        assert found.keys() == whole.keys(), f"{name}: {found.keys() ^ whole.keys()}"
        differing = [each for each in whole if found[each] != whole[each]]
        assert not differing, f"{name}: {differing}"
        print(f"{moment}: {name}", flush=True)


if __name__ == "__main__":
    if sys.argv[1].isdecimal():
        run(Death(int(sys.argv[1]), int(sys.argv[2])), sys.argv[3], sys.argv[4:])
    else:
        moments = die_everywhere(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
        print(f"{moments} moments")
