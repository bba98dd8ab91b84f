"""Score a set of images against real ones: evaluator.py REFERENCE SAMPLE [--json FILE].

Prints Inception Score, FID, sFID, Precision and Recall under the names of the published evaluator.
REFERENCE and SAMPLE are npz files (arr_0, uint8 [N, H, W, 3]), folders or zips of images. If they
hold statistics, as the published reference batches do, FID and sFID come from these, and Precision
and Recall from the images.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to be run from anywhere

from evaluations import command_line
from guided_diffusion.flag_parsing import run


def main(argv=None):
    """Read the flags and score the images."""
    args = command_line.parse(
        __doc__,
        command_line.SetsConfig,
        command_line.NetworkConfig,
        command_line.CacheConfig,
        argv=argv,
        positional=("reference", "sample"),
    )

    from evaluations import scoring
    from guided_diffusion import dist_util

    with dist_util.process_group(args.device, args.dist_timeout):
        scoring.evaluate(args)


if __name__ == "__main__":
    run(main)
