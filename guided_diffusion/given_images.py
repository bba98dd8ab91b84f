"""What a diffusion model makes of given images: bits per dimension, or latents and back."""

import argparse
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoints, dist_util, logger
from .class_labels import classes_in
from .data_sources import open_source
from .gaussian_diffusion import GaussianDiffusion
from .image_datasets import ImageStream
from .pictures import class_names, save_film, to_uint8
from .progress import Progress
from .sample_labels import numbers_of
from .sample_util import take
from .sampling import Step
from .streams import ChainNoise
from .training import training_data

Batches = Iterable[tuple[Tensor, dict[str, Tensor]]]
Arrays = dict[str, np.ndarray]  # name -> [N, ...], in the order of the images
IN_PICTURE = 20  # images whose way there and back is shown


def load_images(args: argparse.Namespace) -> ImageStream:
    """Return each image of --data_dir once, cropped at the centre, in the order of the folder.

    Classes have the numbers that the model knows them by, if a classes.txt beside it tells.
    """
    plain = argparse.Namespace(**vars(args), random_flip=False, random_crop=False)
    names = class_names(args.model_path) if args.class_cond else None
    classes = names and _spelled(args, names)
    options = dict(once=True, label_dropout=0.0, seed=0, classes=classes)
    return training_data(plain, args.image_size, **options)


def _spelled(args: argparse.Namespace, names: list[str]) -> list[str]:
    """Return the model's classes by number, spelled as the images have them: names, or numbers."""
    found = sorted(set(classes_in(open_source(args.data_dir), args.labels)))
    if set(found) <= set(names):
        return names
    numbers = numbers_of(found, names, len(names), f"--data_dir {args.data_dir}")
    spelled = dict(zip(numbers.tolist(), found, strict=True))
    return [spelled.get(number, name) for number, name in enumerate(names)]


def over_images(
    args: argparse.Namespace,
    data: Batches,
    what: str,
    work: Callable[[range, Tensor, dict[str, Tensor], Progress], Arrays],
) -> Arrays | None:
    """Do something with each of the first --num_samples images, shared among all ranks.

    Args:
        args: gives num_samples and use_bf16.
        data: the batches of this rank: image i of the folder is on rank i mod the number of ranks.
        what: one word for the progress bar.
        work: (indices, images [n, C, H, W], cond, progress) -> arrays [n, ...] by name.

    Returns:
        the arrays of all images on rank 0, None elsewhere.
    """
    world, device = dist_util.get_world_size(), dist_util.dev()
    index, mine = dist_util.get_rank(), []
    total = min(args.num_samples, getattr(data, "num_entries", args.num_samples))
    with (
        dist_util.stage(what),
        dist_util.precision(args.use_bf16),
        Progress(total, what) as bar,
    ):
        for batch, cond in data:
            wanted = len(range(index, args.num_samples, world)[: len(batch)])
            if wanted == 0:
                break
            indices = range(index, index + wanted * world, world)
            cond = {name: value[:wanted].to(device) for name, value in cond.items()}
            mine.append((indices, work(indices, batch[:wanted].to(device), cond, bar)))
            index += wanted * world
    return _in_order(mine)


def _in_order(mine: list[tuple[range, Arrays]]) -> Arrays | None:
    """Gather (indices, arrays) of all ranks on rank 0 and sort the rows by index."""
    dist_util.wait_patiently("waiting for the images of all ranks")
    parts = [part for of_rank in dist_util.gather_objects(mine) for part in of_rank]
    if not dist_util.is_main():
        return None
    order = np.argsort(np.concatenate([np.array(indices) for indices, _ in parts]))
    names = parts[0][1]
    return {name: np.concatenate([arrays[name] for _, arrays in parts])[order] for name in names}


def write_arrays(path: str, *arrays: np.ndarray) -> None:
    """Write arr_0, arr_1, ... to an npz file, atomically."""
    checkpoints.write_file(path, lambda file: np.savez(file, *arrays))
    logger.log(f"saved {os.path.abspath(path)}")


# --------------------------------------------------------------------------------------------
# Bits per dimension


def score_images(
    args: argparse.Namespace,
    model: nn.Module,
    diffusion: GaussianDiffusion,
    data: Batches,
    seed: int,
) -> Arrays | None:
    """Compute the bound on the bits per dimension of images, shared among all ranks.

    Args:
        args: gives clip_denoised, use_bf16 and num_samples, the most images to score.
        model: the network, on its device.
        diffusion: the process.
        data: as for `over_images`.
        seed: of the noise, which is that of each image, whatever batch it is in.

    Returns:
        on rank 0, in the order of the folder: total_bpd [N], and vb, mse and xstart_mse [N, T],
        the terms from t = T-1 to t = 0; None elsewhere.
    """

    def score(indices: range, images: Tensor, cond: dict[str, Tensor], bar: Progress) -> Arrays:
        """Score a batch."""
        noise = ChainNoise(thread, seed, indices, tuple(images.shape[1:]))
        metrics = diffusion.calc_bpd_loop(
            model,
            images,
            clip_denoised=args.clip_denoised,
            model_kwargs=cond,
            noise_fn=partial(take, noise),
        )
        bar.move(len(images))
        return {name: values.cpu().numpy() for name, values in metrics.items()}

    with ThreadPoolExecutor(1, "noise") as thread:
        return over_images(args, data, "scoring", score)


def write_scores(scores: Arrays | None) -> None:
    """Log the mean of what `score_images` returned, and write it into the log's folder.

    `vb_terms.npz`, `mse_terms.npz` and `xstart_mse_terms.npz` hold the mean of each term over
    the images [T]; `bpd.npz` holds the bits per dimension of each image [N].
    """
    if scores is not None:
        bpd = scores["total_bpd"]
        logger.log(f"done {len(bpd)} samples: bpd={bpd.mean():.6f}")
        for name in ("vb", "mse", "xstart_mse"):
            path = os.path.join(logger.get_dir(), f"{name}_terms.npz")
            write_arrays(path, scores[name].mean(axis=0))
        write_arrays(os.path.join(logger.get_dir(), "bpd.npz"), bpd)
    dist_util.barrier()


# --------------------------------------------------------------------------------------------
# Latents and back


def invert_images(
    args: argparse.Namespace, model: nn.Module, diffusion: GaussianDiffusion, data: Batches
) -> Arrays | None:
    """Encode images by the DDIM ODE and decode them again, shared among all ranks.

    Args:
        args: gives clip_denoised, use_bf16 and num_samples, the most images to encode.
        model: the network, on its device.
        diffusion: the process.
        data: as for `over_images`.

    Returns:
        on rank 0, in the order of the folder: `images` and `reconstructions`, uint8 [N, H, W, C];
        `latents`, float32 [N, H, W, C], what `ddim_sample_loop` takes as noise; `errors` [N], the
        mean absolute difference of a reconstruction in grey levels; `labels` [N], if there are
        any. None elsewhere.
    """

    def invert(indices: range, images: Tensor, cond: dict[str, Tensor], bar: Progress) -> Arrays:
        """Send a batch there and back."""
        options = dict(clip_denoised=args.clip_denoised, model_kwargs=cond)
        share = len(images) / (2 * diffusion.num_timesteps - 1)
        there = diffusion.ddim_reverse_sample_loop_progressive(model, images, **options)
        latents = _run(there, bar, share)
        back = diffusion.ddim_sample_loop_progressive(
            model, tuple(images.shape), noise=latents, **options
        )
        decoded = _run(back, bar, share).clamp(-1, 1)
        arrays = {
            "images": to_uint8(images + 1 / 255),  # to_uint8 cuts off, as published: land within
            "latents": latents.float().permute(0, 2, 3, 1).cpu().numpy(),
            "reconstructions": to_uint8(decoded),
            "errors": (decoded - images).abs().flatten(1).mean(dim=1).cpu().numpy() * 127.5,
        }
        return arrays | ({"labels": cond["y"].cpu().numpy()} if "y" in cond else {})

    return over_images(args, data, "inverting", invert)


def _run(chain: Iterable[Step], bar: Progress, share: float) -> Tensor:
    """Run a chain to its end and return the last sample; each step moves the bar by `share`."""
    for out in chain:
        sample = out["sample"]
        bar.move(share)
    return sample


def write_inversions(found: Arrays | None, num_steps: int) -> None:
    """Log how far the reconstructions are from the images, and write all into the log's folder.

    Args:
        found: what `invert_images` returned.
        num_steps: the steps in one direction, for the log.
    """
    if found is not None:
        errors = found["errors"]
        logger.log(
            f"round trip of {len(errors)} images, {num_steps} steps each way: mean absolute error "
            f"{errors.mean():.3f} of 255 grey levels, of the worst image {errors.max():.3f}"
        )
        labels = [found["labels"]] if "labels" in found else []
        for kind in ("latents", "reconstructions"):
            shape = "x".join(map(str, found[kind].shape))
            write_arrays(
                os.path.join(logger.get_dir(), f"{kind}_{shape}.npz"), found[kind], *labels
            )
        write_arrays(os.path.join(logger.get_dir(), "errors.npz"), errors)
        _draw_round_trip(found)
    dist_util.barrier()


def _draw_round_trip(found: Arrays) -> None:
    """Save a PNG of three strips: images, latents, reconstructions."""
    latents = torch.from_numpy(found["latents"][:IN_PICTURE] / 3)  # three deviations fill the range
    shown = to_uint8(latents.permute(0, 3, 1, 2))
    first = [found["images"][:IN_PICTURE], shown, found["reconstructions"][:IN_PICTURE]]
    save_film(np.stack(first)[None], None, os.path.join(logger.get_dir(), "round_trip.png"))
