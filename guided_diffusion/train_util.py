"""The training loop, for the diffusion model, the upsampler and the noisy classifier.

Images are numbered through the whole run, over all ranks: step s of a run with B images in a batch
has the numbers s * B to (s + 1) * B - 1. What is random about an image (t, noise, crop) follows
from the seed and its number, and everything else that a step depends on is saved, so that a run
which is stopped and goes on is the run that was never stopped.
"""

import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import checkpoint_sets, checkpoints, dist_util, logger, streams, train_files, train_state
from .fp16_util import INITIAL_LOG_LOSS_SCALE, MixedPrecisionTrainer
from .gaussian_diffusion import GaussianDiffusion
from .nn import update_ema
from .parallel import Parallel, shard_or_move
from .reporting import Pace, log_losses, progress_bar
from .resample import LossAwareSampler, ScheduleSampler, UniformSampler, sample_timesteps
from .sharding import make_optimizer
from .signals import StopSignals
from .train_files import find_ema_checkpoint
from .train_state import TrainState
from .validation import Validator, evaluating

__all__ = [
    "INITIAL_LOG_LOSS_SCALE", "TrainLoop", "find_ema_checkpoint", "find_resume_checkpoint",
    "get_blob_logdir", "log_loss_dict", "parse_resume_step_from_filename",
]  # fmt: skip

Cond = dict[str, Tensor]
# (model, x_start [N, C, H, W], t [N], cond, noise like x_start) -> terms [N], "loss" among them
LossFn = Callable[[nn.Module, Tensor, Tensor, Cond, Tensor], dict[str, Tensor]]


class TrainLoop:
    """Train a network: batches, micro-batches, optimizer, EMAs, log and checkpoints.

    Args:
        model: the network, on its device (with `shard_params` it may still be on the CPU).
        diffusion: the process that draws losses; it also numbers the timesteps for the log.
        data: an endless iterator of (images [N, C, H, W], conditions {name: [N, ...]}). If it has
            a method `seek(number)`, as `load_data` gives it, a resumed run goes on in its order.
        batch_size: images per step and rank.
        microbatch: images per forward pass; -1 for the whole batch.
        lr: learning rate of AdamW.
        ema_rate: rates of the weight averages, a number or numbers with commas; "" for none.
        log_interval: steps between two rows of the log.
        save_interval: steps between two checkpoints.
        resume_checkpoint: a `modelNNNNNN.pt` with the rest of its set beside it, a folder with
            such sets, or "".
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
        eval_interval: steps between two validation batches; 0 for none.
        val_set: the whole validation set, once; its losses are logged with every checkpoint.
        log_prefix: put before the names of training losses.
        initial_lg_loss_scale: log2 of the fp16 loss scale at the start.
        seed: of t, noise and dropout; by default that of the resumed run, else drawn from torch's
            global generator.
        init_from: weights to begin a new run with, of which those are taken that fit; or "".
        grad_clip: the largest norm of the gradient; 0 for any.
        max_bad_steps: stop after so many steps in a row without a finite loss and gradient.
        keep_checkpoints: how many sets of files to keep; 0 for all.
        shard_params: share parameters, moments and averages among the ranks.
        classes: class name -> number of its images, in the order of the class numbers, written
            beside the checkpoints; or None.
        preview: (network with the weights of the EMA, step) draws a picture, on all ranks; or None.
        sample_interval: steps between two of them.

    Raises:
        ValueError: if a file does not fit the network, or later, if training diverges.
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
        val_set: Any = None,
        log_prefix: str = "",
        initial_lg_loss_scale: float = INITIAL_LOG_LOSS_SCALE,
        seed: int | None = None,
        init_from: str = "",
        grad_clip: float = 0.0,
        max_bad_steps: int = 100,
        keep_checkpoints: int = 0,
        shard_params: bool = False,
        classes: dict[str, int] | None = None,
        preview: Callable[[nn.Module, int], None] | None = None,
        sample_interval: int = 0,
    ):
        self.model = model
        self.diffusion = diffusion
        self.data = data
        self.batch_size = batch_size
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.global_batch = batch_size * dist_util.get_world_size()
        self.lr, self.weight_decay = lr, weight_decay
        self.ema_rate = [float(rate) for rate in str(ema_rate).split(",") if rate]
        self.log_interval, self.save_interval = log_interval, save_interval
        self.eval_interval, self.log_prefix = eval_interval, log_prefix
        self.resume_checkpoint = resume_checkpoint or find_resume_checkpoint() or ""
        self.use_fp16, self.use_bf16 = use_fp16, use_bf16
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.lr_anneal_steps, self.max_steps = lr_anneal_steps, max_steps
        self.flags = flags or {}
        self.loss_fn = loss_fn or partial(_diffusion_losses, diffusion)
        self.max_bad_steps, self.keep_checkpoints = max_bad_steps, keep_checkpoints
        self.classes = classes
        self.preview, self.sample_interval = preview, sample_interval

        self.step = 0  # steps done by this process, skipped ones included
        self.resume_step = 0  # steps done before
        self._is_finite, self._last_loss = True, math.nan  # of the last batch; finite on all ranks
        self._load_weights(init_from, shard_params)
        self.mp_trainer = MixedPrecisionTrainer(
            model=model,
            use_fp16=use_fp16,
            fp16_scale_growth=fp16_scale_growth,
            initial_lg_loss_scale=initial_lg_loss_scale,
            grad_clip=grad_clip,
        )
        self.opt = make_optimizer(self.mp_trainer.master_params, lr, weight_decay)
        self.ranks = Parallel(model)
        self.ddp_model, self.use_ddp = self.ranks.model, self.ranks.use_ddp
        self.validator = Validator(
            self.loss_fn,
            diffusion.num_timesteps,
            data=val_data,
            whole=val_set,
            microbatch=self.microbatch,
            precision=partial(self.ranks.precision, use_bf16),
        )
        self._go_on(seed)

    # ---------------------------------------------------------------------------------------
    # Starting, or going on

    def _load_weights(self, init_from: str, shard_params: bool) -> None:
        """Load the weights to begin or go on with."""
        log_dir = logger.get_current().dir or ""
        self.resume_checkpoint = checkpoint_sets.resolve_resume(self.resume_checkpoint, log_dir)
        if self.resume_checkpoint:
            self.resume_step = parse_resume_step_from_filename(self.resume_checkpoint)
        train_files.load_model(self.model, self.resume_checkpoint, init_from)
        if shard_params:
            shard_or_move(self.model)

    def _go_on(self, seed: int | None) -> None:
        """Load optimizer, averages and state, as far as there are any."""
        train_files.load_optimizer(self.opt, self.resume_checkpoint)
        fallback = TrainState(
            step=self.resume_step,
            images=self.resume_step * self.global_batch,
            last_row=self.resume_step - 1,
        )
        self.state, ranks = train_files.load_state(
            self.resume_checkpoint, self.schedule_sampler, fallback
        )
        if seed is not None:
            self.state.seed = seed
        elif self.state is fallback:
            self.state.seed = dist_util.broadcast_object(int(torch.randint(2**62, ())))
        self.ema_params = train_files.load_averages(
            self.mp_trainer, self.ema_rate, self.resume_checkpoint, self.state
        )
        if self.state.lg_loss_scale is not None and self.use_fp16:
            self.mp_trainer.lg_loss_scale = self.state.lg_loss_scale
        if self.resume_checkpoint and self._steps_done() < (self.total_steps or math.inf):
            logger.get_current().drop_rows_after(self.state.last_row)
        train_files.go_on_with(self.data, self.state.images)
        train_files.go_on_with(self.validator.data, self.state.val_images)
        train_files.compare_data(self.state, self.data)
        if ranks:
            train_state.restore_rank(ranks, self.state.seed, self.state.images)
        elif seed is not None:
            train_state.seed_rank(seed, self.state.images)
        self.noise = streams.NoiseAhead(self.state.seed, streams.TRAIN_NOISE)

    # ---------------------------------------------------------------------------------------
    # The loop

    @property
    def total_steps(self) -> int:
        """The step at which to stop; 0 for never."""
        limits = [n for n in (self.max_steps, self.lr_anneal_steps) if n]
        return min(limits, default=0)

    def run_loop(self) -> None:
        """Train until the last step or until a signal asks to stop, then save."""
        if not self.total_steps:
            logger.log("no --max_steps and no --lr_anneal_steps: training goes on until stopped")
        elif self._steps_done() >= self.total_steps:
            logger.log(
                f"step {self._steps_done()} of {self.total_steps}: there is nothing left to do"
            )
            return
        saved, asked = None, None
        place = (self.total_steps, self._steps_done(), self.state.images)
        pace = Pace(*place)
        with StopSignals() as signals, progress_bar(*place, self.global_batch) as bar:
            while not asked and (not self.total_steps or self._steps_done() < self.total_steps):
                with dist_util.stage("reading a batch"):
                    batch, cond = next(self.data)
                self.run_step(batch, cond)
                self._validate()  # the losses belong to the row of the step just taken
                self.step += 1
                self._report(pace)
                bar.update(self.state.images - bar.n)
                if self._steps_done() % self.save_interval == 0:
                    self._save_and_validate()
                    saved = self._steps_done()
                asked = self._asked_to_stop(signals)
            if saved != self._steps_done():
                self.save()
                logger.dumpkvs()  # the open row
                if not asked:  # after the save: a run that goes on from here has not seen it
                    self.validator.log_whole_set(self.model, self.state)
        logger.dumpkvs()  # what is left
        train_files.tell_bad_images(self.state)
        if asked:
            again = f"--log_dir {logger.get_dir()} --resume_checkpoint auto"
            logger.log(f"stopped by {asked} after step {self._steps_done()}; go on with {again}")

    def run_step(self, batch: Tensor, cond: Cond) -> None:
        """Take one optimizer step on a batch [N, C, H, W], unless a loss or gradient overflowed."""
        self._anneal_lr()
        self.forward_backward(batch, cond)
        with dist_util.stage("taking a step"):
            trainer = self.mp_trainer
            took_step = trainer.optimize(self.opt) if self._is_finite else trainer.skip()
        if took_step:
            self._update_ema()
        self.state.count(took_step, self.max_bad_steps)
        self.log_step()

    def forward_backward(self, batch: Tensor, cond: Cond) -> None:
        """Leave the gradient of the batch's mean loss in the parameters."""
        self.mp_trainer.zero_grad()
        batch, cond = self._to_device(batch, cond)
        t, weights, noise = self._draw(batch)
        first = slice(0, self.microbatch)
        self.ranks.settle(lambda: self._backward(first, batch, cond, t, weights, noise))
        parts = []
        for start in range(0, len(batch), self.microbatch):
            piece = slice(start, start + self.microbatch)
            is_last = start + self.microbatch >= len(batch)
            with dist_util.stage("averaging gradients"), self.ranks.exchanging(is_last):
                parts.append(self._backward(piece, batch, cond, t, weights, noise))
        losses = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self._learn(t, weights, losses)

    def _backward(self, piece, batch, cond, t, weights, noise) -> dict[str, Tensor]:
        """Add the gradient of one piece's share of the loss; return the piece's losses [M]."""
        micro_cond = {name: value[piece] for name, value in cond.items()}
        losses = self._losses(batch[piece], t[piece], micro_cond, noise[piece])
        share = len(t[piece]) / len(batch)
        self.mp_trainer.backward((losses["loss"] * weights[piece]).mean() * share)
        return {name: value.detach() for name, value in losses.items()}

    def _draw(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draw timesteps and their weights, [N], and noise like the batch, image by image."""
        first = self.state.images + dist_util.get_rank() * len(batch)
        in_step = dist_util.get_world_size() * len(batch)
        self.state.images += in_step
        numbers = range(first, first + len(batch))
        following = range(first + in_step, first + in_step + len(batch))
        uniforms = streams.uniform(self.state.seed, numbers, streams.TIMESTEP)
        t, weights = sample_timesteps(self.schedule_sampler, uniforms, dist_util.dev())
        noise = torch.from_numpy(self.noise.take(numbers, tuple(batch.shape[1:]), following))
        return t, weights, noise.to(batch)

    def _learn(self, t: Tensor, weights: Tensor, losses: dict[str, Tensor]) -> None:
        """Log the losses [N] of a batch and teach the timestep sampler, if all are finite."""
        # One copy for all questions: each that is asked of a GPU waits for what it is at.
        *rows, share = torch.stack([*losses.values(), weights]).cpu()
        seen = dict(zip(losses, rows, strict=True))
        finite = all(bool(values.isfinite().all()) for values in rows)
        self._last_loss = seen["loss"].mean()
        with dist_util.stage("comparing losses"):
            self._is_finite = not dist_util.any_rank(not finite)
            if not self._is_finite:
                return
            if isinstance(self.schedule_sampler, LossAwareSampler):
                self.schedule_sampler.update_with_local_losses(t, losses["loss"])
        weighted = {self.log_prefix + name: value * share for name, value in seen.items()}
        log_loss_dict(self.diffusion, t, weighted)

    def _to_device(self, batch: Tensor, cond: Cond) -> tuple[Tensor, Cond]:
        move = partial(Tensor.to, device=dist_util.dev(), non_blocking=True)
        return move(batch), {name: move(value) for name, value in cond.items()}

    def _losses(self, x_start: Tensor, t: Tensor, cond: Cond, noise: Tensor) -> dict[str, Tensor]:
        with self.ranks.precision(self.use_bf16):
            return self.loss_fn(self.ddp_model, x_start, t, cond, noise)

    def _update_ema(self) -> None:
        for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
            update_ema(params, self.mp_trainer.master_params, rate=rate)

    def _anneal_lr(self) -> None:
        """Let the learning rate fall linearly to 0 over `lr_anneal_steps`."""
        if not self.lr_anneal_steps:
            return
        done = self._steps_done() / self.lr_anneal_steps
        for group in self.opt.param_groups:
            group["lr"] = self.lr * (1 - done)

    def _steps_done(self) -> int:
        return self.resume_step + self.step

    def _asked_to_stop(self, signals: StopSignals) -> str | None:
        """Return the signal that some rank has received, on all ranks."""
        with dist_util.stage("agreeing to go on"):
            asked = dist_util.any_rank(signals.received is not None)
        return (signals.received or "a signal to another rank") if asked else None

    # ---------------------------------------------------------------------------------------
    # Reporting

    def log_step(self) -> None:
        """Log where the run is, and what the optimizer step measured."""
        logger.logkvs({"step": self._steps_done(), "samples": self.state.images})
        logger.logkvs({"skipped": self.state.skipped, "lr": self.opt.param_groups[0]["lr"]})
        for name, value in self.mp_trainer.metrics.items():
            logger.logkv_mean(name, value)

    def _validate(self) -> None:
        """Log the losses of a validation batch, if it is time."""
        if self.eval_interval and self._steps_done() % self.eval_interval == 0:
            self.validator.log_batch(self.model, self.state)

    def _report(self, pace: Pace) -> None:
        """Write a row of the log and draw a picture, if it is time."""
        done = self._steps_done()
        self.state.step = done
        if self.step == 1:  # at once, since the first row or checkpoint may be far away
            coming = (done // self.save_interval + 1) * self.save_interval
            coming = min(coming, self.total_steps or coming)
            loss = f"loss {self._last_loss:.4g}"
            logger.log(f"step {done - 1}: {loss}; the next checkpoint after {coming} steps")
        if (done - 1) % self.log_interval == 0:
            train_files.count_bad_images(self.state, self.data)
            logger.logkvs(pace.measure(done, self.state.images))
            logger.dumpkvs()
        if self.preview and self.sample_interval and done % self.sample_interval == 0:
            self._draw_preview()

    def _draw_preview(self) -> None:
        """Draw with the weights of the first EMA, and leave no trace in the run."""
        weights = self.ema_params[0] if self.ema_params else self.mp_trainer.master_params
        kept, precise = train_state.random_kept(), self.ranks.precision(self.use_bf16)
        with self.mp_trainer.showing(weights), kept, precise, evaluating(self.model):
            self.preview(self.model, self._steps_done())

    # ---------------------------------------------------------------------------------------
    # Saving

    def save(self) -> None:
        """Write weights, EMAs, optimizer and state; all ranks call this, rank 0 writes."""
        folder = get_blob_logdir()
        self.state.step = self._steps_done()
        self.state.last_row = logger.get_current().last_step(self.state.last_row)
        train_files.count_bad_images(self.state, self.data)
        train_files.describe_parts(self.state, self.data, self.schedule_sampler)
        averages = dict(zip(self.ema_rate, self.ema_params, strict=True))
        logger.log(f"saving step {self._steps_done()} to {folder}")
        with dist_util.stage("saving a checkpoint"):
            self._set = train_files.save_set(
                folder, self.state, self.mp_trainer, self.opt, averages, self.flags,
                classes=self.classes, keep=self.keep_checkpoints,
            )  # fmt: skip
        logger.log(train_files.advise(folder, self.state, self.ema_rate))

    def _save_and_validate(self) -> None:
        """Save, and then, as it may take long or fail, look at the whole validation set.

        What that logs belongs to the next row, and so into the state.
        """
        self.save()
        if self.validator.whole is not None:
            self.validator.log_whole_set(self.model, self.state)
            self._set.complete(self.state.to_dict())


def _diffusion_losses(
    diffusion: GaussianDiffusion,
    model: nn.Module,
    x_start: Tensor,
    t: Tensor,
    cond: Cond,
    noise: Tensor,
) -> dict[str, Tensor]:
    return diffusion.training_losses(model, x_start, t, model_kwargs=cond, noise=noise)


def parse_resume_step_from_filename(filename: str) -> int:
    """Return NNNNNN of `path/to/modelNNNNNN.pt`, and 0 where there is no such number."""
    return checkpoints.step_of(filename)


def get_blob_logdir() -> str:
    """Return the folder for checkpoints: $DIFFUSION_BLOB_LOGDIR, else that of the log."""
    return os.path.expanduser(os.environ.get("DIFFUSION_BLOB_LOGDIR") or logger.get_dir())


def find_resume_checkpoint() -> str | None:
    """Return a checkpoint to go on from without being asked: none, unless this is replaced."""
    return None


def log_loss_dict(diffusion: GaussianDiffusion, ts: Tensor, losses: dict[str, Tensor]) -> None:
    """Log the mean of each loss [N], over all timesteps and over each quarter of the chain."""
    log_losses(diffusion.num_timesteps, ts, losses)
