"""One rank of image_train, which also leaves its own copy of the last weights: rankN.pt."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripting import load_script  # noqa: E402

from guided_diffusion import config, dist_util, train_util  # noqa: E402

save = train_util.TrainLoop.save


def save_on_each_rank(loop):
    """Save as ever, and each rank's parameters besides."""
    save(loop)
    params = [param.detach() for param in loop.model.parameters()]
    torch.save(params, f"rank{dist_util.get_rank()}.pt")


if __name__ == "__main__":
    train_util.TrainLoop.save = save_on_each_rank
    config.run(load_script("image_train").main)
