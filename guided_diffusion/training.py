"""From the flags of a training script to a running loop: seed, data, pictures, options."""

import argparse
import os
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint_sets, checkpoints, dist_util, logger, streams, train_files, train_state
from .compiling import as_written, compile_blocks
from .gaussian_diffusion import GaussianDiffusion
from .image_datasets import ImageStream, load_data
from .pictures import class_names, save_grid, to_uint8
from .resample import create_named_schedule_sampler
from .script_util import choose_seed, create_gaussian_diffusion
from .train_state import TrainState
from .train_util import TrainLoop, get_blob_logdir

PREVIEW_IMAGES, PREVIEW_STEPS = 20, 25
PROCESS_FLAGS = ("learn_sigma", "noise_schedule", "predict_xstart", "rescale_timesteps")


@contextmanager
def training_session(args: argparse.Namespace):
    """Join the ranks, open the log, and settle what the run begins from and its seed.

    Within the block `args.seed` is a seed and `args.resume_checkpoint` a file or "", the same on
    all ranks, and no other run writes into the folders of this one.
    """
    with (
        dist_util.process_group(args.device, args.dist_timeout),
        logger.session(args.log_dir, tensorboard=args.tensorboard, comm=logger.Ranks()),
        checkpoint_sets.reserved(get_blob_logdir()),
    ):
        for note in args.notes:
            logger.log(note)
        _agree_on_resume(args)
        args.seed = _choose_seed(args)
        train_state.seed_globally(args.seed)
        yield


def _agree_on_resume(args: argparse.Namespace) -> None:
    """Settle on one checkpoint for all ranks, and tell what of the folder does not go with it."""
    dist_util.barrier()  # until rank 0 has the folder: a run that is ending may yet save
    folder, asked = get_blob_logdir(), args.resume_asked
    newest = checkpoint_sets.find_newest(folder) or ""
    if asked == "auto":
        args.resume_checkpoint = newest
    if len(set(dist_util.all_gather_objects(args.resume_checkpoint))) > 1:
        raise ValueError(
            f"--resume_checkpoint {asked} is not the same for all ranks: they must share the disk"
        )
    if asked == "auto" and not args.resume_checkpoint:
        logger.log("--resume_checkpoint auto: no complete set yet, a new run begins")
        logger.get_current().drop_rows_after(-1)  # of a run that was killed before it could save
    if newest and checkpoints.step_of(newest) > checkpoints.step_of(args.resume_checkpoint):
        logger.warn(
            f"{newest} is of a later step, of another run; auto would go on from there: move its "
            "set away"
        )


def _choose_seed(args: argparse.Namespace) -> int:
    """Return --seed, else the seed of the resumed run, else one drawn now; log it."""
    path, saved = args.resume_checkpoint, None
    state = checkpoint_sets.read_state(path) if path else None
    if state is not None:
        name = checkpoints.state_name(checkpoints.step_of(path))
        saved = TrainState.from_dict(state, checkpoint_sets.beside(path, name)).seed
    saved = dist_util.broadcast_object(saved)
    if saved is not None and args.seed not in (-1, saved):
        logger.warn(f"--seed {args.seed} replaces the run's {saved}: other images, other noise")
    return choose_seed(saved if args.seed == -1 and saved is not None else args.seed)


def training_data(args: argparse.Namespace, image_size: int, **more: Any) -> ImageStream:
    """Return the batches that a script's flags describe; `more` are arguments of `load_data`."""
    options = dict(
        data_dir=args.data_dir,
        batch_size=args.batch_size,
        image_size=image_size,
        class_cond=getattr(args, "class_cond", True),
        in_channels=args.in_channels,
        num_classes=args.num_classes,
        random_flip=args.random_flip,
        random_crop=args.random_crop,
        labels=args.labels,
        num_workers=None if args.num_workers == -1 else args.num_workers,
        skip_bad_images=args.skip_bad_images,
        fast_decode=args.fast_decode,
        label_dropout=getattr(args, "label_dropout", 0.0),
        seed=args.seed,
        report=logger.log,
    )
    return load_data(**options | more)


def validation_data(args: argparse.Namespace, data: ImageStream) -> dict[str, ImageStream]:
    """Return the validation batches, and the whole set, as arguments of `TrainLoop`."""
    load = partial(
        training_data, args, args.image_size, data_dir=args.val_data_dir, flag="--val_data_dir",
        classes=data.classes, random_crop=False,
    )  # fmt: skip
    whole = load(once=True, report=lambda line: logger.log(f"validation: {line}"))
    return {"val_data": load(report=None), "val_set": whole}


def train(
    args: argparse.Namespace,
    model: nn.Module,
    diffusion: GaussianDiffusion,
    data: ImageStream,
    flags: dict[str, Any],
    **options: Any,
) -> None:
    """Run the loop that a script's flags describe.

    Args:
        args: the command line of one of the training scripts, within `training_session`.
        model: the network; it is moved to its device.
        diffusion: the process.
        data: the batches.
        flags: what to write beside every checkpoint of weights.
        options: the other arguments of `TrainLoop`.
    """
    same = (
        "batch_size microbatch lr weight_decay ema_rate log_interval save_interval "
        "resume_checkpoint init_from use_bf16 seed grad_clip max_bad_steps keep_checkpoints "
        "shard_params"
    )
    train_files.check_classes(args.resume_checkpoint, data.classes)
    if args.shard_params and dist_util.get_world_size() == 1:
        logger.warn("--shard_params True: there is one process, which keeps everything")
    if not args.shard_params:
        model.to(dist_util.dev())
    if args.compile:
        compile_blocks(model)
    logger.log("training...")
    TrainLoop(
        model=model,
        diffusion=diffusion,
        data=data,
        schedule_sampler=create_named_schedule_sampler(args.schedule_sampler, diffusion),
        flags=flags,
        classes=data.classes and dict(zip(data.classes, data.class_counts, strict=True)),
        **{name: getattr(args, name) for name in same.split()},
        **options,
    ).run_loop()


def train_diffusion(
    args: argparse.Namespace,
    model: nn.Module,
    diffusion: GaussianDiffusion,
    flags: dict[str, Any],
    image_size: int,
    prepare: Callable[..., Any] | None = None,
) -> None:
    """Train a diffusion model or an upsampler: data, pictures and loop.

    Args:
        args: as for `train`, like the next three.
        model: the network.
        diffusion: the process.
        flags: what to write beside every checkpoint of weights.
        image_size: height and width of the images.
        prepare: shrinks the images for an upsampler, as in `load_data`.
    """
    names = "use_fp16 fp16_scale_growth max_steps lr_anneal_steps sample_interval"
    data = training_data(args, image_size, prepare=prepare)
    train(
        args, model, diffusion, data, flags,
        preview=make_preview(args, flags, image_size, prepare),
        **{name: getattr(args, name) for name in names.split()},
    )  # fmt: skip


def classifier_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `TrainLoop` that only a classifier has."""
    return dict(
        use_fp16=args.classifier_use_fp16,
        max_steps=args.iterations,
        lr_anneal_steps=args.iterations if args.anneal_lr else 0,
        eval_interval=args.eval_interval,
        log_prefix="train_",
        initial_lg_loss_scale=16.0,  # as published
    )


# --------------------------------------------------------------------------------------------
# Pictures while training


def make_preview(
    args: argparse.Namespace,
    flags: dict[str, Any],
    image_size: int,
    prepare: Callable[..., Any] | None = None,
) -> Callable[[nn.Module, int], None] | None:
    """Return a function (network, step) that draws a grid of samples; None if none are wanted.

    The same noise and labels each time, so that pictures of different steps compare. An upsampler
    enlarges the first images of the data.

    Args:
        args: the command line of a diffusion trainer.
        flags: of the process.
        image_size: height and width of the samples.
        prepare: shrinks the images for an upsampler, as in `load_data`.
    """
    if not args.sample_interval:
        return None
    process = create_gaussian_diffusion(
        steps=flags["diffusion_steps"],
        timestep_respacing=_few_steps(flags["diffusion_steps"]),
        **{name: flags[name] for name in PROCESS_FLAGS},
    )
    cond = {}
    if prepare is not None:  # the same images on all ranks, which all draw the same
        first = training_data(
            args, image_size, batch_size=PREVIEW_IMAGES, once=True, ranks=(0, 1), num_workers=0,
            class_cond=False, label_dropout=0.0, report=None, prepare=prepare,
        )  # fmt: skip
        cond = next(first)[1]
    count = len(next(iter(cond.values()))) if cond else PREVIEW_IMAGES
    if args.class_cond:
        cond["y"] = torch.arange(count) % args.num_classes
    shape = (count, args.in_channels, image_size, image_size)
    return partial(_draw_preview, args, process, shape, cond)


def _few_steps(num_timesteps: int) -> str:
    """Return a respacing of about PREVIEW_STEPS even DDIM steps, without the last timestep."""
    stride = -(-num_timesteps // PREVIEW_STEPS)
    return f"ddim{len(range(0, num_timesteps, stride))}"


def _draw_preview(
    args: argparse.Namespace,
    process: GaussianDiffusion,
    shape: tuple[int, ...],
    cond: dict[str, Tensor],
    model: nn.Module,
    step: int,
) -> None:
    """Draw the grid of one step. All ranks draw the same, rank 0 writes it."""
    device = dist_util.dev()
    noise = torch.from_numpy(streams.normal(args.seed, range(shape[0]), streams.SAMPLE, shape[1:]))
    plain = as_written() if args.compile else nullcontext()
    with dist_util.stage("drawing samples"), plain:
        images = process.ddim_sample_loop(
            model, shape, noise=noise.to(device),
            model_kwargs={name: value.to(device) for name, value in cond.items()},
        )  # fmt: skip
    if dist_util.is_main():
        path = os.path.join(logger.get_dir(), f"samples_{step:06d}.png")
        names = class_names(os.path.join(get_blob_logdir(), "model.pt"))
        labels = cond["y"].numpy() if "y" in cond else None
        save_grid(to_uint8(images), labels, path, names)
