"""From trained checkpoints to files: loading models, drawing or scoring images, writing them.

Every image has an index. Its starting noise and its label are functions of the seed and that
index alone; ranks take the batches in turn, and rank 0 writes everything in the order of index.
"""

import argparse
import io
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoints, config, dist_util, logger, script_util, trained_flags
from .gaussian_diffusion import GaussianDiffusion
from .guidance import CondFn, classifier_guidance
from .pictures import class_names as class_names  # what the scripts call through this module
from .pictures import save_grid, to_uint8
from .streams import CHAIN, LABEL, NOISE, derived_seed, normal, stream

CREATE = {  # what a checkpoint may be (see trained_flags.KINDS) -> what builds it
    "diffusion model": script_util.create_model_and_diffusion,
    "upsampler": script_util.sr_create_model_and_diffusion,
}


# --------------------------------------------------------------------------------------------
# Loading


def load_model_and_diffusion(
    args: argparse.Namespace, kind: str = "diffusion model"
) -> tuple[nn.Module, GaussianDiffusion]:
    """Load --model_path.

    Args:
        args: the command line, completed by `trained_flags.complete(args, kind)`.
        kind: a key of CREATE.

    Returns:
        the network in eval mode on its device, and the process.

    Raises:
        ValueError: if flags do not go together, or the file does not fit them.
    """
    flags = script_util.args_to_dict(args, config.defaults(*trained_flags.KINDS[kind]))
    model, diffusion = CREATE[kind](**flags)
    return _ready(model, args.model_path, args.use_fp16), diffusion


def load_guidance(args: argparse.Namespace) -> CondFn | None:
    """Load --classifier_path as a guidance function; None if --classifier_scale is 0.

    Args:
        args: the command line, completed by `trained_flags.complete`.

    Raises:
        ValueError: if flags do not go together, or the file does not fit them.
    """
    if args.classifier_scale == 0:
        return None
    flags = script_util.args_to_dict(args, script_util.classifier_defaults())
    classifier = script_util.create_classifier(**flags)
    classifier = _ready(classifier, args.classifier_path, args.classifier_use_fp16)
    return classifier_guidance(classifier, args.classifier_scale)


def _ready(model: nn.Module, path: str, use_fp16: bool) -> nn.Module:
    """Load the weights of `path`, and bring the network to its device, dtype and eval mode."""
    beside = checkpoints.flags_path(path)
    has_flags = checkpoints.exists(beside)
    hint = "" if has_flags else f" (no {beside}: give the flags it was trained with)"
    checkpoints.load_weights(model, path, hint)
    model.to(dist_util.dev())
    if use_fp16:
        model.convert_to_fp16()
    return model.eval()


class BaseSamples:
    """The small images of --base_samples; sample i upsamples image i mod their number.

    Args:
        args: gives base_samples, small_size, in_channels, class_cond, num_classes, num_samples.

    Attributes:
        images: uint8 [M, small_size, small_size, C].
        labels: the label of each sample, int64 [num_samples], or None if the file has none.

    Raises:
        ValueError: if the file is no npz with arr_0 and, under class_cond, arr_1 of this kind.
    """

    def __init__(self, args: argparse.Namespace):
        path = args.base_samples
        self.images, labels = _read_samples(path)
        size, count = (args.small_size, args.small_size, args.in_channels), len(self.images)
        if self.images.dtype != np.uint8 or self.images.shape[1:] != size or count == 0:
            raise ValueError(
                f"--base_samples {path} holds {self.images.dtype} {list(self.images.shape)}; "
                f"the upsampler takes uint8 [N, {size[0]}, {size[1]}, {size[2]}]"
            )
        if labels is None and args.class_cond:
            raise ValueError(f"--base_samples {path} has no labels (arr_1), as --class_cond needs")
        if labels is not None:
            if labels.shape != (count,) or labels.dtype.kind not in "iu":
                raise ValueError(f"--base_samples {path}: arr_1 must hold {count} whole numbers")
            if labels.min() < 0 or labels.max() >= args.num_classes:
                raise ValueError(
                    f"--base_samples {path} has labels from {labels.min()} to {labels.max()}; "
                    f"--num_classes {args.num_classes} allows 0 to {args.num_classes - 1}"
                )
            labels = np.resize(labels.astype(np.int64), args.num_samples)
        self.labels = labels

    def low_res(self, indices: range) -> dict[str, Tensor]:
        """Return the input of some samples as {"low_res": [N, C, H, W] in [-1, 1]}."""
        chosen = self.images[np.array(indices) % len(self.images)]
        x = torch.from_numpy(chosen).permute(0, 3, 1, 2).float()
        return {"low_res": x / 127.5 - 1}


def _read_samples(path: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Read arr_0 and, if it is there, arr_1 of an npz file; nothing in it is ever unpickled."""
    if not checkpoints.exists(path):
        raise ValueError(f"--base_samples {path}: there is no such file")
    try:
        with np.load(io.BytesIO(checkpoints.read_file(path)), allow_pickle=False) as arrays:
            return arrays["arr_0"], arrays["arr_1"] if "arr_1" in arrays.files else None
    except Exception as error:  # a broken file raises one of many kinds in numpy and zipfile
        raise ValueError(f"--base_samples {path} is no npz of images (arr_0): {error}") from error


# --------------------------------------------------------------------------------------------
# What is random


def start_noise(seed: int, indices: range, shape: tuple[int, ...]) -> Tensor:
    """Return x_T of some images, float32 [N, *shape]."""
    return torch.from_numpy(normal(seed, indices, NOISE, shape))


def seed_chain(seed: int, start: int) -> None:
    """Seed the noise within the chain of the batch that begins at index `start`."""
    torch.manual_seed(derived_seed(seed, start, CHAIN))


def choose_labels(args: argparse.Namespace, seed: int) -> np.ndarray:
    """Return the label of each of --num_samples images, int64 [N]: random, or --classes in turn.

    Raises:
        ValueError: if a class is out of range; the scripts find that earlier.
    """
    if not args.classes:
        indices = range(args.num_samples)
        draws = [stream(seed, i, LABEL).integers(args.num_classes) for i in indices]
        return np.array(draws, dtype=np.int64)
    chosen = np.array([int(item) for item in args.classes.split(",")], dtype=np.int64)
    if chosen.max() >= args.num_classes:
        raise ValueError(f"--classes {args.classes} must lie within 0 to {args.num_classes - 1}")
    return np.resize(chosen, args.num_samples)


# --------------------------------------------------------------------------------------------
# Drawing and scoring


def draw_samples(
    args: argparse.Namespace,
    model: nn.Module,
    diffusion: GaussianDiffusion,
    *,
    size: int,
    seed: int,
    labels: np.ndarray | None = None,
    cond_fn: CondFn | None = None,
    cond_of: Callable[[range], dict[str, Tensor]] | None = None,
) -> np.ndarray | None:
    """Draw --num_samples images, shared among all ranks.

    Args:
        args: gives num_samples, batch_size, use_ddim, clip_denoised, class_cond, in_channels,
            use_bf16.
        model: the network, on its device.
        diffusion: the process, respaced to the steps to take.
        size: height and width of the images.
        seed: of the noise.
        labels: the label of each image [N], for the model or the guidance; or None.
        cond_fn: guidance; or None.
        cond_of: gives the further inputs of the network for some indices; or None.

    Returns:
        uint8 [N, size, size, C] in the order of index on rank 0, None elsewhere.
    """

    def condition(indices: range) -> dict[str, Tensor]:
        cond = cond_of(indices) if cond_of else {}
        if labels is not None:
            cond["y"] = torch.from_numpy(labels[indices.start : indices.stop])
        return {name: value.to(dist_util.dev()) for name, value in cond.items()}

    loop = "ddim_sample_loop" if args.use_ddim else "p_sample_loop"
    shape = (args.in_channels, size, size)
    mine = []
    with _progress(args.num_samples, "sampling") as bar, dist_util.precision(args.use_bf16):
        for indices in _my_batches(args.num_samples, args.batch_size):
            seed_chain(seed, indices.start)
            chain = getattr(diffusion, f"{loop}_progressive")(
                model if args.class_cond else partial(_without_labels, model),
                (len(indices), *shape),
                noise=start_noise(seed, indices, shape).to(dist_util.dev()),
                clip_denoised=args.clip_denoised,
                cond_fn=cond_fn,
                model_kwargs=condition(indices),
            )
            mine.append((indices, to_uint8(_follow(chain, bar, len(indices), diffusion))))
    return _in_order(mine)


def _without_labels(model: nn.Module, x: Tensor, t: Tensor, y: Any = None, **cond) -> Tensor:
    """Call an unconditional network: the labels in `cond` are for the guidance alone."""
    return model(x, t, **cond)


def _follow(chain: Iterator, bar: tqdm, batch: int, diffusion: GaussianDiffusion) -> Tensor:
    """Run a chain to its end, moving the bar a share of the batch with each step."""
    start, out = bar.n, {}
    for step, out in enumerate(chain, 1):  # noqa: B007 - the last one is wanted
        share = step * batch * dist_util.get_world_size() // diffusion.num_timesteps
        bar.update(min(start + share, bar.total) - bar.n)
    return out["sample"]


def score_images(
    args: argparse.Namespace,
    model: nn.Module,
    diffusion: GaussianDiffusion,
    data: Iterator[tuple[Tensor, dict[str, Tensor]]],
    seed: int,
) -> dict[str, np.ndarray] | None:
    """Compute the bound on the bits per dimension of images, shared among all ranks.

    Args:
        args: gives clip_denoised, use_bf16 and num_samples, the most images to score.
        model: the network, on its device.
        diffusion: the process.
        data: the batches of this rank: image i of the folder is on rank i mod the number of ranks.
        seed: of the noise.

    Returns:
        on rank 0, in the order of the folder: total_bpd [N], and vb, mse and xstart_mse [N, T],
        the terms from t = T-1 to t = 0; None elsewhere.
    """
    world = dist_util.get_world_size()
    index, mine = dist_util.get_rank(), []
    with _progress(args.num_samples, "scoring") as bar, dist_util.precision(args.use_bf16):
        for batch, cond in data:
            wanted = len(range(index, args.num_samples, world)[: len(batch)])
            if wanted == 0:
                break
            seed_chain(seed, index)
            cond = {name: value[:wanted].to(dist_util.dev()) for name, value in cond.items()}
            metrics = diffusion.calc_bpd_loop(
                model,
                batch[:wanted].to(dist_util.dev()),
                clip_denoised=args.clip_denoised,
                model_kwargs=cond,
            )
            indices = range(index, index + wanted * world, world)
            mine.append((indices, {k: v.cpu().numpy() for k, v in metrics.items()}))
            index += wanted * world
            bar.update(min(wanted * world, bar.total - bar.n))
    names = ("total_bpd", "vb", "mse", "xstart_mse")
    parts = {name: _in_order([(i, metrics[name]) for i, metrics in mine]) for name in names}
    return parts if dist_util.is_main() else None


def write_scores(scores: dict[str, np.ndarray] | None) -> None:
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


def _my_batches(num_samples: int, batch_size: int) -> Iterator[range]:
    """Yield the indices of each batch of this rank; ranks take turns."""
    step = batch_size * dist_util.get_world_size()
    for start in range(dist_util.get_rank() * batch_size, num_samples, step):
        yield range(start, min(start + batch_size, num_samples))


def _in_order(mine: list[tuple[range, np.ndarray]]) -> np.ndarray | None:
    """Gather (indices, rows) of all ranks on rank 0 and sort the rows by index."""
    parts = [part for of_rank in dist_util.gather_objects(mine) for part in of_rank]
    if not dist_util.is_main():
        return None
    order = np.argsort(np.concatenate([np.array(indices) for indices, _ in parts]))
    return np.concatenate([rows for _, rows in parts])[order]


def _progress(total: int, what: str) -> tqdm:
    return tqdm(total=total, unit="img", desc=what, disable=not dist_util.is_main())


# --------------------------------------------------------------------------------------------
# Writing


def write_samples(
    images: np.ndarray | None, labels: np.ndarray | None, names: list[str] | None = None
) -> None:
    """Write samples_NxHxWxC.npz and a PNG grid of the first images into the log's folder.

    Args:
        images: uint8 [N, H, W, C] on rank 0, None elsewhere.
        labels: int64 [N], stored as arr_1; or None.
        names: what to print for each label in the grid.
    """
    if images is not None:
        shape = "x".join(map(str, images.shape))
        path = os.path.join(logger.get_dir(), f"samples_{shape}.npz")
        write_arrays(path, images, *([] if labels is None else [labels]))
        save_grid(images, labels, path.replace(".npz", ".png"), names)
    dist_util.barrier()


def write_arrays(path: str, *arrays: np.ndarray) -> None:
    """Write arr_0, arr_1, ... to an npz file, atomically."""
    checkpoints.write_file(path, lambda file: np.savez(file, *arrays))
    logger.log(f"saved {os.path.abspath(path)}")
