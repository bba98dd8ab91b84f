"""One rank of a training script in which one rank gets a signal: stopping.py SCRIPT SIGNAL [flags].

Rank 1 alone is signalled, while it reads its fourth batch. Each rank writes how it ended into
endRANK.txt, in the folder it was started from.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripting import load_script  # noqa: E402

from guided_diffusion import config, dist_util  # noqa: E402
from guided_diffusion.image_datasets import ImageStream  # noqa: E402

script, number = sys.argv[1], getattr(signal, sys.argv[2])
sys.argv = [script, *sys.argv[3:]]
read, count = ImageStream.__next__, [0]


def read_and_signal(stream):
    """Read a batch; with the fourth, rank 1 signals itself."""
    count[0] += 1
    if count[0] == 4 and dist_util.get_rank() == 1:
        os.kill(os.getpid(), number)
    return read(stream)


if __name__ == "__main__":
    ImageStream.__next__ = read_and_signal
    rank = dist_util.get_rank()
    config.run(load_script(script).main)
    Path(f"end{rank}.txt").write_text("ended by itself")
