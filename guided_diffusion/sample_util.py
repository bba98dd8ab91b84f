"""From trained checkpoints to images: loading models, drawing, scoring.

Every image has an index. Its noise and its label are functions of the seed and that index alone,
so neither batches nor ranks nor interruptions change it; ranks take the batches in turn.
"""

import argparse
import hashlib
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import checkpoints, config, dist_util, logger, script_util, trained_flags
from .base_samples import Given
from .compiling import as_written, compile_blocks
from .gaussian_diffusion import GaussianDiffusion
from .guidance import CondFn, classifier_guidance
from .pictures import to_uint8
from .progress import Progress
from .sample_files import IN_FILM, INDIFFERENT, SampleFiles
from .sample_labels import Labels, choose_classes, known_names
from .samplers import Sampler, make_sampler
from .sampling import Step
from .sampling_flags import PUBLISHED_SAMPLERS, has_guide, sampler_of
from .script_util import CREATE, choose_seed
from .streams import CHAIN, NOISE, ChainNoise, chain_noises

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
    for note in [*getattr(args, "notes", []), *_settle_precision(args)]:
        logger.log(note)
    flags = script_util.args_to_dict(args, config.defaults(*trained_flags.KINDS[kind]))
    model, diffusion = CREATE[kind](**flags)
    return _ready(args, model, args.model_path, args.use_fp16), diffusion


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
    classifier = _ready(args, classifier, args.classifier_path, args.classifier_use_fp16)
    return classifier_guidance(classifier, args.classifier_scale)


def _settle_precision(args: argparse.Namespace) -> list[str]:
    return trained_flags.settle_precision(args, dist_util.dev().type)


def _ready(args: argparse.Namespace, model: nn.Module, path: str, use_fp16: bool) -> nn.Module:
    """Load the weights of `path`, and bring the network to its device, dtype and eval mode."""
    beside = checkpoints.flags_path(path)
    has_flags = checkpoints.exists(beside)
    hint = "" if has_flags else f" (no {beside}: give the flags it was trained with)"
    checkpoints.load_weights(model, path, hint)
    model.to(dist_util.dev())
    if use_fp16:
        model.convert_to_fp16()
    if getattr(args, "compile", False):
        compile_blocks(model)
    return model.eval()


# --------------------------------------------------------------------------------------------
# Drawing


@contextmanager
def sampling(
    args: argparse.Namespace, size: int, base: Given | None = None
) -> Iterator[tuple[SampleFiles, Labels | None]]:
    """Join the ranks, open the log, and find out which samples there are already.

    Args:
        args: the command line of a script that draws samples, completed.
        size: height and width of the samples.
        base: the images that samples are made from, as by an upsampler; or None.

    Yields:
        the files of the samples, and their labels, None if they have none.

    Raises:
        ValueError: if the folder holds samples of other flags.
    """
    chosen = base.labels if base else choose_classes(args) if hasattr(args, "classes") else None
    takes_labels = args.class_cond or (base is None and hasattr(args, "classifier_scale"))
    shape = (args.num_samples, size, size, args.in_channels)
    with (
        dist_util.process_group(args.device, args.dist_timeout),
        logger.session(
            args.log_dir, greeting=None if args.log_dir else partial(_how_to_go_on, args)
        ),
    ):
        for note in _settle_precision(args):
            logger.log(note)
        with dist_util.stage("reading the checkpoints"):
            flags = _flags_that_count(args, chosen, base) if dist_util.is_main() else None
            flags = dist_util.broadcast_object(flags)
        files = SampleFiles(logger.get_dir(), shape, flags)
        with files.claimed(args.seed, choose_seed):
            labels = Labels(chosen, args.num_classes, files.seed)
            try:
                yield files, labels if takes_labels or chosen is not None else None
            except KeyboardInterrupt:
                logger.log(f"stopped: the same command with --log_dir {logger.get_dir()} goes on")
                raise


def _how_to_go_on(args: argparse.Namespace, log_dir: str) -> str:
    """Return the line that tells how to continue a run whose folder nobody has named."""
    given = [(f"--{name}", str(getattr(args, name))) for name in sorted(args.given)]
    words = ["python", sys.argv[0], *(word for pair in given for word in pair)]
    under = " under the same launcher" if dist_util.get_world_size() > 1 else ""
    return f"to go on after an interruption{under}: {shlex.join([*words, '--log_dir', log_dir])}"


def _flags_that_count(
    args: argparse.Namespace, chosen: np.ndarray | None, base: Given | None
) -> dict[str, Any]:
    """Return what the images depend on: flags, and hashes of the files that are read."""
    names = {f.name for f in config.all_fields()} - INDIFFERENT
    flags = {name: value for name, value in vars(args).items() if name in names}
    if chosen is not None:
        flags["labels_in_turn"] = _summary(chosen)
    if base is not None:
        flags |= base.digests()
    flags["model_path"] = checkpoints.digest(args.model_path)
    if getattr(args, "classifier_scale", 0):
        flags["classifier_path"] = checkpoints.digest(args.classifier_path)
    if has_guide(vars(args)):
        flags["guide_model_path"] = checkpoints.digest(args.guide_model_path)
    sampler = sampler_of(flags)  # two ways to say the same are one
    if sampler in PUBLISHED_SAMPLERS:
        flags |= {"sampler": "", "use_ddim": sampler == "ddim"}
    return flags


def _summary(labels: np.ndarray) -> str:
    """Return a list of labels as text; of a long one the beginning, and a hash."""
    shown = ",".join(map(str, labels[:20].tolist()))
    if len(labels) <= 20:
        return shown
    digest = hashlib.sha256(labels.tobytes()).hexdigest()[:16]
    return f"{shown},... ({len(labels)}, {digest})"


def choose_sampler(
    args: argparse.Namespace,
    model: nn.Module,
    diffusion: GaussianDiffusion,
    cond_fn: CondFn | None = None,
    make: Callable[..., Sampler] = make_sampler,
) -> Sampler:
    """Make the sampler that the flags ask for, with the weaker network of --guide_model_path.

    Args:
        args: the command line, completed by `trained_flags.complete`.
        model: the network, on its device.
        diffusion: the process, respaced by --timestep_respacing.
        cond_fn: a guidance gradient, or None.
        make: makes it of this, the weaker network and the device, as `make_sampler` does.

    Raises:
        ValueError: if the process has not as many steps as are wanted, or a file does not fit.
    """
    guide = None
    if has_guide(vars(args)):
        create, flags = CREATE[args.guide_kind], args.guide_flags | {"use_fp16": args.use_fp16}
        guide = _ready(args, create(**flags)[0], args.guide_model_path, args.use_fp16)
    return make(args, model, diffusion, cond_fn=cond_fn, guide=guide, device=dist_util.dev())


def draw_samples(
    args: argparse.Namespace,
    sampler: Sampler,
    files: SampleFiles,
    labels: Labels | None = None,
    *,
    base: Given | None = None,
) -> None:
    """Draw the samples that are missing, shared among all ranks, and put their files together.

    Args:
        args: gives batch_size, use_bf16, save_images, save_every_t and model_path.
        sampler: turns noise into images.
        files: which samples, and where to.
        labels: the label of each, for the model or the guidance; or None.
        base: the images that samples are made from, as by an upsampler; or None.
    """
    missing = files.missing(args.batch_size)
    count, left = files.shape[0], sum(map(len, missing))
    if left < count:
        logger.log(f"{files.stem}: {count - left:,} of {count:,} samples are there")
    mine = missing[dist_util.get_rank() :: dist_util.get_world_size()]
    image_shape = (files.shape[3], *files.shape[1:3])
    prepare = partial(_condition, seed=files.seed, labels=labels, base=base)
    purposes = base.purposes if base else (NOISE, CHAIN)
    work = chain_noises(files.seed, mine, image_shape, purposes, prepare)
    num_steps, not_finite = sampler.num_steps, 0
    compiled, most = getattr(args, "compile", False), max(map(len, mine), default=0)
    with (
        dist_util.stage("drawing samples"),
        dist_util.precision(args.use_bf16),
        Progress(count, "sampling", count - left) as bar,
    ):
        for indices, noise, cond in work:
            film = Film(indices, args.save_every_t, num_steps)
            cond = {name: value.to(dist_util.dev()) for name, value in cond.items()}
            chain = sampler.chain((len(indices), *image_shape), partial(take, noise), cond)
            with as_written() if compiled and len(indices) < most else nullcontext():
                for step, out in enumerate(chain, 1):
                    film.see(step, out)
                    bar.move(len(indices) / num_steps)
            not_finite += int((~out["sample"].isfinite()).flatten(1).any(dim=1).sum())
            files.write(indices, to_uint8(out["sample"]), film.frames())
    dist_util.wait_patiently("waiting for the samples of all ranks")
    _warn_of_broken_images(not_finite)
    names, frames = known_names(args), Film.length(args.save_every_t, num_steps)
    files.finish(labels and labels.of, names=names, save_images=args.save_images, frames=frames)


def _warn_of_broken_images(count: int) -> None:
    """Warn if images of any rank have pixels that are no numbers."""
    total = sum(dist_util.gather_objects(count))
    if total:
        logger.warn(
            f"{total:,} of the images drawn now have pixels that are not finite: look at them, and "
            "at the weights; --use_fp16 False or --use_bf16 True may help"
        )


def _condition(
    indices: range, seed: int, labels: Labels | None, base: Given | None
) -> dict[str, Tensor]:
    """Return the further inputs of the network, and of the guidance, for some samples."""
    cond = base.cond(indices, seed) if base else {}
    if labels is not None:
        cond["y"] = torch.from_numpy(labels.of(indices))
    return cond


def take(noise: ChainNoise, x: Tensor) -> Tensor:
    """Return the next block of noise where x is."""
    return torch.from_numpy(noise.take()).to(x.device, non_blocking=True)


class Film:
    """What the chains of the first images look like on their way, for --save_every_t.

    Args:
        indices: of the images of a batch.
        every: steps between two pictures; 0 for no film.
        num_steps: of the chain.
    """

    def __init__(self, indices: range, every: int, num_steps: int):
        self.count = min(len(indices), IN_FILM - indices.start) if every else 0
        self.wanted = {num_steps - step for step in range(0, num_steps, every)} if every else set()
        self._frames: list[np.ndarray] = []

    @staticmethod
    def length(every: int, num_steps: int) -> int:
        """Return how many pictures a film has, 0 if none is wanted."""
        return len(range(0, num_steps, every)) if every else 0

    def see(self, step: int, out: Step) -> None:
        """Look at a step, counted from 1; the last one is always kept."""
        if self.count > 0 and step in self.wanted:
            both = (to_uint8(out[name][: self.count]) for name in ("sample", "pred_xstart"))
            self._frames.append(np.stack(list(both), axis=1))

    def frames(self) -> np.ndarray | None:
        """Return uint8 [n, 2, F, H, W, C], x_t and below it the predicted x_start; or None."""
        return np.stack(self._frames, axis=2) if self._frames else None
