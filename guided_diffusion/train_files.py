"""The files of a training run: loading weights, averages, optimizer and state, and saving them.

Each part that is loaded gets a line in the log: from where, or that it starts cold.
"""

from __future__ import annotations

import csv
import io
from copy import deepcopy
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from . import checkpoint_sets, checkpoints, dist_util, logger, sharding
from .checkpoint_sets import has_set
from .fp16_util import MixedPrecisionTrainer
from .resample import ScheduleSampler
from .train_state import TrainState

MOST_SHOWN = 4  # tensors that --init_from left out, or images that could not be read
SETTLED = 0.05  # the share of its beginning that an average may still hold to be sampled from


def load_model(model: nn.Module, resume: str, init_from: str) -> None:
    """Load the weights with which to begin or go on, and make all ranks agree on them.

    Args:
        model: the network, not yet sharded.
        resume: the weights file to go on from, or "".
        init_from: weights to begin with, of which those are taken that fit; or "".
    """
    if resume:
        checkpoints.load_weights(model, resume)
        logger.log(f"model: from {resume}, step {checkpoints.step_of(resume)}")
    elif init_from:
        taken, left = checkpoints.load_what_fits(model, init_from)
        shown = "; ".join(left[:MOST_SHOWN]) + ("; ..." if len(left) > MOST_SHOWN else "")
        logger.log(
            f"model: {taken} tensors from {init_from}, a new run from step 0; "
            + (f"not taken over: {shown}" if left else "all of them taken over")
        )
    dist_util.sync_params(model.parameters())


def load_optimizer(opt: Optimizer, resume: str) -> None:
    """Load the optimizer's state that belongs to the resumed weights, if it is there.

    Raises:
        ValueError: if it belongs to another network.
    """
    if not resume:
        return
    path = checkpoint_sets.beside(resume, checkpoints.opt_name(checkpoints.step_of(resume)))
    if not has_set(resume):
        logger.log(f"optimizer: cold, {resume} is no modelNNNNNN.pt that others belong to")
        return
    if not _all_have(path):
        logger.log(f"optimizer: cold, there is no {path}")
        return
    state = dist_util.load_state_dict(path)
    try:
        sharding.load_optimizer_state(opt, state)
        moments = {"step", "exp_avg", "exp_avg_sq"}
        fits = all(
            moments <= v.keys() and v["exp_avg"].shape == v["exp_avg_sq"].shape == p.shape
            for p, v in opt.state.items()
        )
        lr, decay = (float(opt.param_groups[0][name]) for name in ("lr", "weight_decay"))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            f"{path} is no optimizer state of this network: give the --use_fp16 and the model "
            "flags it was written with, or move it away to start the optimizer cold"
        )
    logger.log(
        f"optimizer: from {path}, with its learning rate {lr:g} (unless it is annealed) and weight "
        f"decay {decay:g}"
    )


def load_averages(
    trainer: MixedPrecisionTrainer, rates: list[float], resume: str, state: TrainState
) -> list[list[Tensor]]:
    """Return the weight average of each rate: the saved one, else the present weights.

    Args:
        trainer: holds the network and the masters, like which the averages are.
        rates: of the averages.
        resume: the weights file to go on from, or "".
        state: is told at which step each average began.
    """
    averages = []
    for rate in rates:
        path = find_ema_checkpoint(resume, state.step, rate) if has_set(resume) else None
        path = dist_util.broadcast_object(path)  # all ranks do the same
        if path is not None:
            logger.log(f"EMA {rate}: from {path}")
            state.ema_began.setdefault(str(rate), 0)
            averages.append(_read_average(trainer, path))
            continue
        if resume:
            logger.log(f"EMA {rate}: cold, starts from the weights, as its file is not there")
        state.ema_began[str(rate)] = state.step
        averages.append(deepcopy(trainer.master_params))
    return averages


def _read_average(trainer: MixedPrecisionTrainer, path: str) -> list[Tensor]:
    """Read a file of weights as tensors like the masters."""
    weights = checkpoints.read_weights(trainer.model, path)
    pairs = zip(trainer.state_dict_to_master_params(weights), trainer.master_params, strict=True)
    return [sharding.like(mine.detach().to(p.device, p.dtype), p) for mine, p in pairs]


def find_ema_checkpoint(main_checkpoint: str | None, step: int, rate: float | str) -> str | None:
    """Return the EMA file that belongs to a model file, or None if there is none."""
    if not main_checkpoint:
        return None
    path = checkpoint_sets.beside(main_checkpoint, checkpoints.ema_name(rate, step))
    return path if checkpoints.exists(path) else None


def load_state(
    resume: str, sampler: ScheduleSampler, fallback: TrainState
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Return where the run is, and what each of its ranks kept; `fallback` where nothing is known.

    Args:
        resume: the weights file to go on from, or "".
        sampler: is taught what its predecessor had learnt.
        fallback: counters that follow from the file's name and the flags.
    """
    saved = checkpoint_sets.read_state(resume) if resume else None
    path = checkpoint_sets.beside(resume, checkpoints.state_name(fallback.step))
    if not dist_util.broadcast_object(saved is not None):
        if resume:
            logger.log(
                f"state: cold, there is no {path}: seed, loss scale and timestep sampler begin "
                f"anew; the run goes on with image {fallback.images:,}, by steps and batch size"
            )
        return fallback, []
    if saved is None:
        raise ValueError(f"{path} is there for rank 0 only: put --log_dir on a disk that all share")
    state = TrainState.from_dict(saved, path)
    if state.step != fallback.step:
        raise ValueError(f"{path} is of step {state.step}: give the files their old names back")
    logger.log(f"state: from {path}, seed {state.seed}, {state.images:,} images seen")
    if not _teach(sampler, state.sampler):
        logger.log("timestep sampler: cold, the saved one is of another kind or length")
    return state, saved["ranks"]


def go_on_with(data: Any, number: int) -> None:
    """Send a stream of images to its image `number`, if it can be sent anywhere."""
    if hasattr(data, "seek"):
        data.seek(number)


def describe_parts(state: TrainState, data: Any, sampler: Any) -> None:
    """Write into the state what there is to know of the data and the timestep sampler."""
    state.num_entries = getattr(data, "num_entries", None)
    state.data_seed = getattr(data, "seed", None)
    state.sampler = getattr(sampler, "state_dict", dict)()


def compare_data(state: TrainState, data: Any) -> None:
    """Warn if the data of a resumed run is not what it began with: its order is another then."""
    pairs = {
        "number of images": (state.num_entries, getattr(data, "num_entries", None)),
        "seed of the order": (state.data_seed, getattr(data, "seed", None)),
    }
    for what, (before, now) in pairs.items():
        if None not in (before, now) and before != now:
            logger.warn(f"{what}: {before} when the run began, {now} now; another order of images")


def count_bad_images(state: TrainState, data: Any) -> None:
    """Bring the list of skipped images up to date, over all ranks; log their number if any."""
    if hasattr(data, "bad_images"):
        everyone = dist_util.all_gather_objects(sorted(data.bad_images))
        state.bad_images = sorted(set(state.bad_images).union(*everyone))
        if state.bad_images:
            logger.logkv("bad_images", len(state.bad_images))


def tell_bad_images(state: TrainState) -> None:
    """Log which images were skipped."""
    if state.bad_images:
        shown = ", ".join(state.bad_images[:MOST_SHOWN])
        more = ", ..." if len(state.bad_images) > MOST_SHOWN else ""
        logger.log(f"{len(state.bad_images)} skipped, could not be read: {shown}{more}")


def _teach(sampler: Any, learnt: dict[str, Any]) -> bool:
    load = getattr(sampler, "load_state_dict", None)
    return load(learnt) if load else not learnt


def _all_have(path: str) -> bool:
    """Tell whether rank 0 has a file; all ranks get the same answer."""
    return dist_util.broadcast_object(checkpoints.exists(path))


# --------------------------------------------------------------------------------------------
# Saving


def save_set(
    folder: str,
    state: TrainState,
    trainer: MixedPrecisionTrainer,
    opt: Optimizer,
    averages: dict[float, list[Tensor]],
    flags: dict[str, Any],
    classes: dict[str, int] | None = None,
    keep: int = 0,
) -> checkpoint_sets.SetWriter:
    """Write a set of checkpoint files, the state last. All ranks call this, rank 0 writes.

    Args:
        folder: where to.
        state: the counters of the run; its step is the number in the file names.
        trainer: holds the network and the masters.
        opt: the optimizer.
        averages: rate -> the EMA's masters.
        flags: what to write beside each file of weights.
        classes: class name -> number of its images, in the order of the class numbers, to write
            beside the set; or None.
        keep: how many sets to keep, this one included; 0 for all.

    Returns:
        what can write the state anew.

    Raises:
        ValueError: if a weight is not finite; nothing is written then.
        OSError: if a file cannot be written; what was complete before stays complete.
    """
    _check_finite(state.step, trainer.master_params, *averages.values())
    state.lg_loss_scale = trainer.lg_loss_scale if trainer.use_fp16 else None
    named = {checkpoints.model_name(state.step): trainer.master_params}
    named |= {checkpoints.ema_name(rate, state.step): ema for rate, ema in averages.items()}
    with checkpoint_sets.SetWriter(folder, state.step, flags) as writer:
        for name, masters in named.items():
            weights = trainer.master_params_to_state_dict(masters)
            writer.weights(name, sharding.gather(weights))
        writer.save(checkpoints.opt_name(state.step), sharding.optimizer_state(opt))
        if classes and dist_util.is_main():
            _save_classes(folder, classes)
        writer.complete(state.to_dict())
    if dist_util.is_main() and keep:
        gone = checkpoint_sets.prune(folder, keep, newest=state.step)
        if gone:
            logger.log(f"deleted the sets of step {', '.join(map(str, gone))}")
    dist_util.barrier()
    return writer


def _save_classes(folder: str, classes: dict[str, int]) -> None:
    """Write classes.txt, a name a line, and classes.csv, with number and count of each class."""
    table = io.StringIO()
    rows = [(number, *item) for number, item in enumerate(classes.items())]
    csv.writer(table, lineterminator="\n").writerows([("class", "name", "images"), *rows])
    texts = {checkpoints.CLASSES: "".join(f"{name}\n" for name in classes)}
    texts[checkpoints.CLASS_COUNTS] = table.getvalue()
    for name, text in texts.items():
        content = text.encode(errors="surrogateescape")
        checkpoints.write_bytes(checkpoints.join(folder, name), content)


def check_classes(resume: str, names: list[str] | None) -> None:
    """Raise a ValueError if the classes of the data are not those that the run began with."""
    path = checkpoint_sets.beside(resume, checkpoints.CLASSES)
    if not resume or not names or not checkpoints.exists(path):
        return
    before = checkpoints.read_class_names(path)
    if before != names:
        new = sorted(set(names) - set(before)) or sorted(set(before) - set(names)) or names
        raise ValueError(
            f"--data_dir has other classes than the run began with ({path} differs, in {new[0]!r} "
            "for one): their numbers would shift; bring back the old images, or begin a new run "
            "with --init_from"
        )


def _check_finite(step: int, *groups: list[Tensor]) -> None:
    """Raise a ValueError on all ranks if a weight of any of them is not finite."""
    local = [t.to_local() if sharding.is_sharded(t) else t for group in groups for t in group]
    broken = not all(bool(tensor.isfinite().all()) for tensor in local)
    if dist_util.any_rank(broken):
        raise ValueError(
            f"after step {step} some weights are not finite: they are not saved; go on from an "
            "earlier checkpoint with a lower --lr, or with --grad_clip 1"
        )


def advise(folder: str, state: TrainState, rates: list[float]) -> str:
    """Say which file of the newest set to sample from, and how much of its EMA is initial weights.

    An average of rate r still holds the share r**n of what it began with after n steps.
    """
    model = checkpoints.join(folder, checkpoints.model_name(state.step))
    if not rates:
        return f"step {state.step} is saved: use {model}"
    shares = {rate: rate ** (state.step - state.ema_began[str(rate)]) for rate in rates}
    settled = [rate for rate in rates if shares[rate] < SETTLED]
    best = max(settled) if settled else min(rates)
    path = checkpoints.join(folder, checkpoints.ema_name(best, state.step))
    if settled:
        return f"step {state.step} is saved: sample from {path}"
    return (
        f"step {state.step} is saved: sample from {model} for now; {shares[best]:.0%} of {path} "
        "is still the weights it began with"
    )
