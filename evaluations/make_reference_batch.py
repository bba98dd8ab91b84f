"""Make a reference batch: make_reference_batch.py --data_dir DIR --image_size 64 OUT.npz.

The npz is laid out as the published ones: arr_0, 10,000 of the images, evenly spread, for Precision
and Recall; mu, sigma, mu_s and sigma_s, statistics of all images, for FID and sFID. Images are
cropped and scaled as for training. A run that was killed goes on when it is started again.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # to be run from anywhere

from evaluations import command_line
from guided_diffusion.flag_parsing import run


def main(argv=None):
    """Read the flags and write the file."""
    args = command_line.parse(
        __doc__,
        command_line.BatchConfig,
        command_line.NetworkConfig,
        argv=argv,
        positional=("out",),
    )

    from evaluations import reference_batch
    from guided_diffusion import dist_util

    with dist_util.process_group(args.device, args.dist_timeout):
        reference_batch.make(args)


if __name__ == "__main__":
    run(main)
