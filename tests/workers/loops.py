"""Take training steps on any number of ranks, and write down their gradients.

Usage: loops.py FOLDER: trains on FOLDER/data; rank 0 writes FOLDER/gradients_WORLD.pt.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reference.fill import fill_  # noqa: E402
from test_train_util import TINY, build  # noqa: E402

from guided_diffusion import dist_util, logger  # noqa: E402
from guided_diffusion.image_datasets import load_data  # noqa: E402
from guided_diffusion.resample import create_named_schedule_sampler  # noqa: E402
from guided_diffusion.train_util import TrainLoop  # noqa: E402

BATCH = 4  # images in a step, over all ranks
MICROBATCHES = (-1, 1)
SAMPLERS = ("uniform", "loss-second-moment")


class Cast:
    """The batches of a stream in another precision."""

    def __init__(self, data, dtype):
        self.data, self.dtype, self.seek = data, dtype, data.seek

    def __next__(self):
        images, cond = next(self.data)
        return images.to(self.dtype), cond


def gradients(folder, dtype, microbatch, sampler_name, seed=3, start=6, num_steps=2):
    """Return the gradient of some steps [num_steps, parameters], float64, from image `start` on."""
    world = dist_util.get_world_size()
    model, diffusion = build(**TINY, learn_sigma=True)
    fill_(model, 1).to(dtype).dtype = dtype  # to which the network casts its input
    data = load_data(
        data_dir=str(folder / "data"), batch_size=BATCH // world, image_size=8, class_cond=True,
        in_channels=1, random_crop=True, seed=seed, num_workers=0,
    )  # fmt: skip
    sampler = create_named_schedule_sampler(sampler_name, diffusion)
    for t in range(diffusion.num_timesteps if sampler_name != "uniform" else 0):
        sampler.update_with_all_losses([t] * 10, [float(t)] * 10)  # past its warm-up
    loop = TrainLoop(
        model=model, diffusion=diffusion, data=Cast(data, dtype), batch_size=BATCH // world,
        microbatch=microbatch, lr=1e-3, ema_rate="", log_interval=1, save_interval=100,
        resume_checkpoint="", seed=seed, schedule_sampler=sampler,
    )  # fmt: skip
    loop.state.images = start
    loop.data.seek(start)
    rows = []
    for _ in range(num_steps):  # of one set of weights: Adam would amplify rounding
        loop.forward_backward(*next(loop.data))
        grads = [param.grad.double().flatten() for param in model.parameters()]
        rows.append(torch.cat(grads))
    return torch.stack(rows)


def main(folder):
    """Try every precision, micro-batch and sampler."""
    with dist_util.process_group("cpu"), logger.session(str(folder / "log")):
        world = dist_util.get_world_size()
        found = {}
        for dtype in (torch.float32, torch.float64):
            for microbatch in MICROBATCHES:
                for name in SAMPLERS:
                    key = f"{dtype} {microbatch} {name}"
                    found[key] = gradients(folder, dtype, microbatch, name)
        if dist_util.is_main():
            torch.save(found, folder / f"gradients_{world}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
