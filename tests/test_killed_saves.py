"""A run that is killed while it saves, by real signals to a real process."""

import subprocess
import sys

from scripting import ROOT, environment


def kill_saves(folder, kills, seed):
    """Run tests/workers/saving.py; return what it printed."""
    command = [sys.executable, str(ROOT / "tests" / "workers" / "saving.py")]
    done = subprocess.run(
        [*command, str(folder), str(kills), str(seed)],
        capture_output=True, text=True, env=environment(), timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_eight_kills_leave_a_set_to_go_on_from(tmp_path):
    """SIGKILL at random moments: the newest complete set is that of a run which nobody killed."""
    out = kill_saves(tmp_path, kills=8, seed=3)
    assert out.count("the newest complete set") == 8
