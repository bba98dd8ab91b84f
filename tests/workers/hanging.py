"""Run as several ranks, one of which stops working while the others wait for it.

Usage: hanging.py SECONDS ENDING [bare], with the timeout and one of ENDINGS. The last rank is the
one, or for "first" rank 0. With "bare" it calls setup_dist() alone, as the published scripts do.
"""

import os
import signal
import subprocess
import sys
import time

from guided_diffusion import dist_util


def loop():
    """Work on something else for ever."""
    while True:
        pass


def kill():
    """Die without a word."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop():
    """Stand still, as long as a launcher may at least need to notice."""
    # torchrun waits 30 s for a stopped process to end; a test need not.
    alarm = ["sh", "-c", f"sleep 14; kill -CONT {os.getpid()}"]
    subprocess.Popen(
        alarm, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    os.kill(os.getpid(), signal.SIGSTOP)
    loop()


ENDINGS = {"killed": kill, "stopped": stop, "looping": loop, "stuck": loop, "startup": stop}
ENDINGS["first"] = stop


def work(ending):
    """Agree once; then one rank reads on and on, and the others wait for it."""
    dist_util.barrier()
    loser = 0 if ending == "first" else dist_util.get_world_size() - 1
    if dist_util.get_rank() == loser:
        with dist_util.stage("reading a batch"):
            time.sleep(1.5)  # for the others to hear of it
            ENDINGS[ending]()
    with dist_util.stage("averaging gradients", waits=True):
        if ending == "stuck":  # a wait that no timeout of torch's ends
            time.sleep(1000)
        dist_util.any_rank(True)


def main():
    """Work within a process group, or as the published scripts do."""
    timeout, ending = float(sys.argv[1]), sys.argv[2]
    if ending == "startup" and dist_util.get_rank() == dist_util.get_world_size() - 1:
        stop()
    if sys.argv[3:] == ["bare"]:
        dist_util.setup_dist("cpu", timeout)
        work(ending)
    else:
        with dist_util.process_group("cpu", timeout):
            work(ending)


if __name__ == "__main__":
    main()
