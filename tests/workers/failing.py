"""Run as several ranks, one of which fails while the others wait for it.

Usage: failing.py block | bare | device: inside process_group(), as the published scripts do
without it, or with a device that is not there.
"""

import sys

from guided_diffusion import dist_util


def fail_on_rank_1():
    """Let rank 1 raise; the others wait at the barrier."""
    if dist_util.get_rank() == 1:
        raise ValueError("rank one gives up")
    dist_util.barrier()


if sys.argv[1] == "bare":
    dist_util.setup_dist()
    fail_on_rank_1()
else:
    with dist_util.process_group("cuda:99" if sys.argv[1] == "device" else "cpu"):
        fail_on_rank_1()
