"""A rank comes late, or stops for good, and the other waits for it with patience.

    patient.py late|stopped RANK

Run as two ranks; the timeout of the job is 3 seconds.
"""

import os
import signal
import sys
import time

from guided_diffusion import dist_util

if __name__ == "__main__":
    with dist_util.process_group("cpu", timeout=3):
        for _ in range(2):
            if dist_util.get_rank() == int(sys.argv[2]):
                time.sleep(5)
                if sys.argv[1] == "stopped":
                    os.kill(os.getpid(), signal.SIGSTOP)
            dist_util.wait_patiently("waiting for a slow rank")
        print("all are here", flush=True)
