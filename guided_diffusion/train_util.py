"""The training loop, for the diffusion model, the upsampler and the noisy classifier."""

import argparse
import os
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from tqdm import tqdm

from . import checkpoints, dist_util, logger
from .fp16_util import INITIAL_LOG_LOSS_SCALE, MixedPrecisionTrainer
from .gaussian_diffusion import GaussianDiffusion
from .nn import update_ema
from .resample import (
    LossAwareSampler,
    ScheduleSampler,
    UniformSampler,
    create_named_schedule_sampler,
)
from .script_util import choose_seed

__all__ = [
    "INITIAL_LOG_LOSS_SCALE", "TrainLoop", "find_ema_checkpoint",
    "find_resume_checkpoint", "get_blob_logdir", "log_loss_dict", "parse_resume_step_from_filename",
    "seed_ranks", "train",
]  # fmt: skip

Cond = dict[str, Tensor]
# (model, x_start [N, C, H, W], t [N], cond) -> per-image terms [N], "loss" among them
LossFn = Callable[[nn.Module, Tensor, Tensor, Cond], dict[str, Tensor]]


class TrainLoop:
    """Train a network: batches, micro-batches, optimizer, EMAs, log and checkpoints.

    Args:
        model: the network, on its device.
        diffusion: the process that draws losses; it also numbers the timesteps for the log.
        data: an endless iterator of (images [N, C, H, W], conditions {name: [N, ...]}).
        batch_size: images per step and rank.
        microbatch: images per forward pass; -1 for the whole batch.
        lr: learning rate of AdamW.
        ema_rate: rates of the weight averages, a number or numbers with commas; "" for none.
        log_interval: steps between two lines of the log.
        save_interval: steps between two checkpoints.
        resume_checkpoint: a `modelNNNNNN.pt` with its EMA and optimizer files beside it, or "".
        use_fp16: the network computes in float16, with loss scaling.
        fp16_scale_growth: growth of log2 of the loss scale per step.
        schedule_sampler: draws t; uniform by default.
        weight_decay: weight decay of AdamW.
        lr_anneal_steps: steps in which the learning rate falls to 0, and after which to stop; or 0.
        max_steps: steps after which to stop; 0 for never.
        use_bf16: run the network under bfloat16 autocast.
        flags: what to write beside every checkpoint of weights.
        loss_fn: the objective; the process's training losses by default.
        val_data: batches to log the same losses for, every `eval_interval` steps; or None.
        eval_interval: steps between two validation batches.
        log_prefix: put before the names of training losses.
        initial_lg_loss_scale: log2 of the fp16 loss scale at the start.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        diffusion: GaussianDiffusion,
        data: Iterator[tuple[Tensor, Cond]],
        batch_size: int,
        microbatch: int,
        lr: float,
        ema_rate: float | str,
        log_interval: int,
        save_interval: int,
        resume_checkpoint: str,
        use_fp16: bool = False,
        fp16_scale_growth: float = 1e-3,
        schedule_sampler: ScheduleSampler | None = None,
        weight_decay: float = 0.0,
        lr_anneal_steps: int = 0,
        max_steps: int = 0,
        use_bf16: bool = False,
        flags: dict[str, Any] | None = None,
        loss_fn: LossFn | None = None,
        val_data: Iterator[tuple[Tensor, Cond]] | None = None,
        eval_interval: int = 0,
        log_prefix: str = "",
        initial_lg_loss_scale: float = INITIAL_LOG_LOSS_SCALE,
    ):
        self.model = model
        self.diffusion = diffusion
        self.data, self.val_data = data, val_data
        self.batch_size = batch_size
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.global_batch = batch_size * dist_util.get_world_size()
        self.lr, self.weight_decay = lr, weight_decay
        self.ema_rate = [float(rate) for rate in str(ema_rate).split(",") if rate]
        self.log_interval, self.save_interval = log_interval, save_interval
        self.eval_interval, self.log_prefix = eval_interval, log_prefix
        self.resume_checkpoint = resume_checkpoint or find_resume_checkpoint()
        self.use_fp16, self.use_bf16 = use_fp16, use_bf16
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.lr_anneal_steps, self.max_steps = lr_anneal_steps, max_steps
        self.flags = flags or {}
        self.loss_fn = loss_fn or partial(_diffusion_losses, diffusion)

        self.step = 0  # updates taken by this process
        self.resume_step = 0  # updates taken before
        self._start(use_fp16, fp16_scale_growth, initial_lg_loss_scale)

    # ---------------------------------------------------------------------------------------
    # Starting, or going on

    def _start(self, use_fp16: bool, scale_growth: float, lg_loss_scale: float) -> None:
        """Load or begin weights, optimizer and averages, and join the ranks."""
        self._load_model()
        self.mp_trainer = MixedPrecisionTrainer(
            model=self.model,
            use_fp16=use_fp16,
            fp16_scale_growth=scale_growth,
            initial_lg_loss_scale=lg_loss_scale,
        )
        self.opt = AdamW(self.mp_trainer.master_params, lr=self.lr, weight_decay=self.weight_decay)
        self._load_optimizer()
        self.ema_params = [self._load_ema(rate) for rate in self.ema_rate]
        self.use_ddp = dist_util.get_world_size() > 1
        self.ddp_model = self._distribute(self.model) if self.use_ddp else self.model

    def _load_model(self) -> None:
        """Load the weights to go on from, if any, and make all ranks agree on them."""
        if self.resume_checkpoint:
            self.resume_step = parse_resume_step_from_filename(self.resume_checkpoint)
            logger.log(f"model: from {self.resume_checkpoint}, step {self.resume_step}")
            checkpoints.load_weights(self.model, self.resume_checkpoint)
        dist_util.sync_params(self.model.parameters())

    def _load_optimizer(self) -> None:
        """Load the optimizer's state that belongs to the resumed weights, if it is there."""
        if not self.resume_checkpoint:
            return
        path = self._beside(checkpoints.opt_name(self.resume_step))
        if not dist_util.broadcast_object(checkpoints.exists(path)):  # all ranks do the same
            logger.log(f"optimizer: starts cold, there is no {path}")
            return
        state = dist_util.load_state_dict(path, map_location="cpu")
        try:
            self.opt.load_state_dict(state)
            fits = all(v["exp_avg"].shape == p.shape for p, v in self.opt.state.items())
        except (AttributeError, KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(
                f"{path} is no optimizer state of this network: give the --use_fp16 and the model "
                "flags it was written with, or move it away to start the optimizer cold"
            )
        group = self.opt.param_groups[0]
        kept = f"learning rate {group['lr']:g} and weight decay {group['weight_decay']:g}"
        logger.log(f"optimizer: from {path}, with its {kept}")

    def _load_ema(self, rate: float) -> list[Tensor]:
        """Return the weight average to go on with: the saved one, else the present weights."""
        path = find_ema_checkpoint(self.resume_checkpoint, self.resume_step, rate)
        path = dist_util.broadcast_object(path)  # all ranks do the same
        if path is None:
            if self.resume_checkpoint:
                logger.log(f"EMA {rate}: starts from the weights, its file is not there")
            return deepcopy(self.mp_trainer.master_params)
        logger.log(f"EMA {rate}: from {path}")
        weights = checkpoints.read_weights(self.model, path)
        weights = {name: value.to(dist_util.dev()) for name, value in weights.items()}
        return self.mp_trainer.state_dict_to_master_params(weights)

    def _beside(self, name: str) -> str:
        return checkpoints.join(os.path.dirname(self.resume_checkpoint), name)

    def _distribute(self, model: nn.Module) -> DistributedDataParallel:
        """Wrap the network so that backward averages gradients over all ranks."""
        device = dist_util.dev()
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            bucket_cap_mb=128,
        )

    # ---------------------------------------------------------------------------------------
    # The loop

    @property
    def total_steps(self) -> int:
        """The number of updates at which to stop; 0 for never."""
        limits = [n for n in (self.max_steps, self.lr_anneal_steps) if n]
        return min(limits, default=0)

    def run_loop(self) -> None:
        """Train until the last step, then save."""
        if not self.total_steps:
            logger.log("no --max_steps and no --lr_anneal_steps: training goes on until stopped")
        saved = None
        with self._progress() as bar:
            while not self.total_steps or self._updates() < self.total_steps:
                self.run_step(*next(self.data))
                if self.val_data and self.step % self.eval_interval == 0:
                    self._validate()
                if self.step % self.log_interval == 0:
                    logger.dumpkvs()
                self.step += 1
                bar.update(self.global_batch)
                if self._updates() % self.save_interval == 0:
                    saved = self._save_all()
        if self.step and saved != self._updates():
            self._save_all()

    def run_step(self, batch: Tensor, cond: Cond) -> None:
        """Take one optimizer step on a batch [N, C, H, W]; skip it if fp16 overflowed."""
        self._anneal_lr()
        self.forward_backward(batch, cond)
        took_step = self.mp_trainer.optimize(self.opt)
        if took_step:
            self._update_ema()
        self.log_step()

    def forward_backward(self, batch: Tensor, cond: Cond) -> None:
        """Leave the gradient of the batch's mean loss in the parameters."""
        self.mp_trainer.zero_grad()
        batch, cond = self._to_device(batch, cond)
        for start in range(0, len(batch), self.microbatch):
            piece = slice(start, start + self.microbatch)
            micro, micro_cond = batch[piece], {k: v[piece] for k, v in cond.items()}
            t, weights = self.schedule_sampler.sample(len(micro), dist_util.dev())
            last = start + self.microbatch >= len(batch)
            # Gradients are exchanged between ranks once, in the last backward.
            with nullcontext() if last or not self.use_ddp else self.ddp_model.no_sync():
                losses = self._losses(micro, t, micro_cond)
                if isinstance(self.schedule_sampler, LossAwareSampler):
                    self.schedule_sampler.update_with_local_losses(t, losses["loss"].detach())
                share = len(micro) / len(batch)
                self.mp_trainer.backward((losses["loss"] * weights).mean() * share)
            weighted = {self.log_prefix + k: v.detach() * weights for k, v in losses.items()}
            log_loss_dict(self.diffusion, t, weighted)

    def _to_device(self, batch: Tensor, cond: Cond) -> tuple[Tensor, Cond]:
        device = dist_util.dev()
        batch = batch.to(device)
        return batch, {name: value.to(device) for name, value in cond.items()}

    def _losses(self, x_start: Tensor, t: Tensor, cond: Cond) -> dict[str, Tensor]:
        with dist_util.precision(self.use_bf16):
            return self.loss_fn(self.ddp_model, x_start, t, cond)

    @torch.no_grad()
    def _validate(self) -> None:
        """Log the losses of one validation batch, micro-batch by micro-batch."""
        batch, cond = self._to_device(*next(self.val_data))
        self.model.eval()
        for start in range(0, len(batch), self.microbatch):
            piece = slice(start, start + self.microbatch)
            t, _ = self.schedule_sampler.sample(len(batch[piece]), dist_util.dev())
            with dist_util.precision(self.use_bf16):
                cond_piece = {k: v[piece] for k, v in cond.items()}
                losses = self.loss_fn(self.model, batch[piece], t, cond_piece)
            log_loss_dict(self.diffusion, t, {"val_" + k: v for k, v in losses.items()})
        self.model.train()

    def _update_ema(self) -> None:
        for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
            update_ema(params, self.mp_trainer.master_params, rate=rate)

    def _anneal_lr(self) -> None:
        """Let the learning rate fall linearly to 0 over `lr_anneal_steps`."""
        if not self.lr_anneal_steps:
            return
        done = self._updates() / self.lr_anneal_steps
        for group in self.opt.param_groups:
            group["lr"] = self.lr * (1 - done)

    def _updates(self) -> int:
        return self.resume_step + self.step

    # ---------------------------------------------------------------------------------------
    # Reporting and saving

    def log_step(self) -> None:
        """Log where the run is, and what the optimizer step measured."""
        logger.logkv("step", self._updates())
        logger.logkv("samples", (self._updates() + 1) * self.global_batch)
        for name, value in self.mp_trainer.metrics.items():
            logger.logkv_mean(name, value)

    def _progress(self) -> tqdm:
        return tqdm(
            total=self.total_steps * self.global_batch or None,
            initial=self.resume_step * self.global_batch,
            unit="img",
            unit_scale=True,
            desc="training",
            disable=not dist_util.is_main(),
        )

    def save(self) -> None:
        """Write weights, EMAs and optimizer state; all ranks call this, rank 0 writes."""
        step, folder = self._updates(), get_blob_logdir()
        if dist_util.is_main():
            self._save_weights(
                checkpoints.join(folder, checkpoints.model_name(step)),
                self.mp_trainer.master_params,
            )
            for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
                path = checkpoints.join(folder, checkpoints.ema_name(rate, step))
                self._save_weights(path, params)
            path = checkpoints.join(folder, checkpoints.opt_name(step))
            checkpoints.save(path, self.opt.state_dict())
        dist_util.barrier()

    def _save_weights(self, path: str, params: list[Tensor]) -> None:
        logger.log(f"saving {path}")
        if self.flags:
            checkpoints.save_flags(path, self.flags)
        weights = self.mp_trainer.master_params_to_state_dict(params)
        checkpoints.save(path, {name: value.contiguous() for name, value in weights.items()})

    def _save_all(self) -> int:
        """Save, and return the number of updates that were saved."""
        self.save()
        return self._updates()


def _diffusion_losses(
    diffusion: GaussianDiffusion, model: nn.Module, x_start: Tensor, t: Tensor, cond: Cond
) -> dict[str, Tensor]:
    return diffusion.training_losses(model, x_start, t, model_kwargs=cond)


def parse_resume_step_from_filename(filename: str) -> int:
    """Return NNNNNN of `path/to/modelNNNNNN.pt`, and 0 for any other name."""
    return checkpoints.step_of(filename)


def get_blob_logdir() -> str:
    """Return the folder for checkpoints: $DIFFUSION_BLOB_LOGDIR, else that of the log."""
    return os.environ.get("DIFFUSION_BLOB_LOGDIR") or logger.get_dir()


def find_resume_checkpoint() -> str | None:
    """Return a checkpoint to go on from without being asked: none, unless this is replaced."""
    return None


def find_ema_checkpoint(main_checkpoint: str | None, step: int, rate: float | str) -> str | None:
    """Return the EMA file that belongs to a model file, or None if there is none."""
    if not main_checkpoint:
        return None
    folder = os.path.dirname(main_checkpoint)
    path = checkpoints.join(folder, checkpoints.ema_name(rate, step))
    return path if checkpoints.exists(path) else None


def log_loss_dict(diffusion: GaussianDiffusion, ts: Tensor, losses: dict[str, Tensor]) -> None:
    """Log the mean of each loss [N], over all timesteps and over each quarter of the chain."""
    quarters = (4 * ts.cpu() // diffusion.num_timesteps).tolist()
    for name, values in losses.items():
        logger.logkv_mean(name, values.mean().item())
        for quarter, value in zip(quarters, values.tolist(), strict=True):
            logger.logkv_mean(f"{name}_q{quarter}", value)


def seed_ranks(seed: int) -> None:
    """Seed the global random generators, rank r with `seed` + r; -1 draws a seed."""
    mine = (choose_seed(seed) + dist_util.get_rank()) % 2**32
    random.seed(mine)
    np.random.seed(mine)
    torch.manual_seed(mine)


def train(
    args: argparse.Namespace,
    model: nn.Module,
    diffusion: GaussianDiffusion,
    data: Iterator[tuple[Tensor, Cond]],
    flags: dict[str, Any],
    **more: Any,
) -> None:
    """Run the loop that a script's flags describe.

    Args:
        args: the command line of one of the training scripts.
        model: the network; it is moved to its device.
        diffusion: the process.
        data: the batches.
        flags: what to write beside every checkpoint of weights.
        more: further arguments of `TrainLoop`.
    """
    classifier = "iterations" in args
    steps = args.iterations if classifier else args.max_steps
    own = dict(
        ema_rate="",
        use_fp16=args.classifier_use_fp16,
        lr_anneal_steps=args.iterations if args.anneal_lr else 0,
        eval_interval=args.eval_interval,
        log_prefix="train_",
        initial_lg_loss_scale=16.0,  # as published
    ) if classifier else dict(
        ema_rate=args.ema_rate,
        use_fp16=args.use_fp16,
        fp16_scale_growth=args.fp16_scale_growth,
        lr_anneal_steps=args.lr_anneal_steps,
    )  # fmt: skip
    same = (
        "batch_size microbatch lr weight_decay log_interval save_interval resume_checkpoint "
        "use_bf16"
    )
    logger.log("training...")
    TrainLoop(
        model=model.to(dist_util.dev()),
        diffusion=diffusion,
        data=data,
        schedule_sampler=create_named_schedule_sampler(args.schedule_sampler, diffusion),
        max_steps=steps,
        flags=flags,
        **{name: getattr(args, name) for name in same.split()},
        **own,
        **more,
    ).run_loop()
