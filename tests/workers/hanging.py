"""Run as several ranks, of which the last stops working while the others wait for it.

Usage: hanging.py SECONDS killed | stopped | looping | stuck | startup | first [bare]: what becomes
of it. "stuck" is a wait that no timeout of torch ends; "startup" stops before the ranks met;
"first" stops rank 0. The published scripts call setup_dist() alone, as "bare" does.
"""

import os
import signal
import sys
import time

from guided_diffusion import dist_util


def die(ending):
    """Stop working, in one of several ways."""
    if ending == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif ending in ("stopped", "first", "startup"):
        os.kill(os.getpid(), signal.SIGSTOP)
    while True:
        pass


def work(ending):
    """Agree once; then one rank reads on and on, and the others wait for it."""
    dist_util.barrier()
    loser = 0 if ending == "first" else dist_util.get_world_size() - 1
    if dist_util.get_rank() == loser:
        with dist_util.stage("reading a batch"):
            die(ending)
    with dist_util.stage("averaging gradients", waits=True):
        if ending == "stuck":
            time.sleep(1000)
        dist_util.any_rank(True)


def main():
    """Work within a process group, or as the published scripts do."""
    timeout, ending = float(sys.argv[1]), sys.argv[2]
    if ending == "startup" and dist_util.get_rank() == dist_util.get_world_size() - 1:
        die(ending)
    if sys.argv[3:] == ["bare"]:
        dist_util.setup_dist("cpu", timeout)
        work(ending)
    else:
        with dist_util.process_group("cpu", timeout):
            work(ending)


if __name__ == "__main__":
    main()
