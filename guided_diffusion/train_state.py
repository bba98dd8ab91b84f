"""Where a training run is, beyond its weights, averages and optimizer: the state file.

With it a run goes on as if it had never stopped: the next image, the loss scale, what the timestep
sampler has learnt, the random generators and the open window of the log.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch

from . import dist_util, logger, streams
from .launchers import first_line


@dataclass
class TrainState:
    """The counters of a run. All ranks hold the same, but for last_row, which rank 0 knows.

    Attributes:
        step: steps done, those that were skipped included.
        images: images seen by all ranks, which is the number of the next one.
        val_images: validation images seen, batch by batch.
        seed: of the run.
        lg_loss_scale: log2 of the fp16 loss scale; None without fp16.
        skipped: steps that were not taken, since a loss or gradient was not finite.
        skipped_in_row: how many of them came last, one after the other.
        last_row: step of the last row of the log; -1 before the first.
        ema_began: rate -> the step at which the average began.
        sampler: what a loss-aware timestep sampler has learnt.
        num_entries: how many images the data has; None if that is not known.
        data_seed: of the order of the images; None likewise.
        bad_images: images that could not be read and were skipped.
    """

    step: int = 0
    images: int = 0
    val_images: int = 0
    seed: int = 0
    lg_loss_scale: float | None = None
    skipped: int = 0
    skipped_in_row: int = 0
    last_row: int = -1
    ema_began: dict[str, int] = field(default_factory=dict)
    sampler: dict[str, Any] = field(default_factory=dict)
    num_entries: int | None = None
    data_seed: int | None = None
    bad_images: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return what goes into the state file, together with what each rank keeps for itself.

        All ranks call this.
        """
        return asdict(self) | {"ranks": dist_util.gather_objects(capture_rank())}

    def count(self, took_step: bool, max_bad_steps: int) -> None:
        """Count a step that was taken or skipped.

        Raises:
            ValueError: if `max_bad_steps` were skipped one after the other.
        """
        self.skipped += not took_step
        self.skipped_in_row = 0 if took_step else self.skipped_in_row + 1
        if self.skipped_in_row >= max_bad_steps:
            raise ValueError(
                f"{self.skipped_in_row} steps in a row, up to step {self.step}, had no finite loss "
                "and gradient (--max_bad_steps): nothing more is saved; go on from an earlier "
                "checkpoint with a lower --lr, with --grad_clip 1 or in --use_bf16 True"
            )

    @classmethod
    def from_dict(cls, saved: dict[str, Any], path: str) -> TrainState:
        """Return the counters of a state file.

        Raises:
            ValueError: if one is missing, of the wrong type or out of range.
        """
        try:
            values = {f.name: saved[f.name] for f in fields(cls)}
            state = cls(**values)
            is_sound = all(
                (value is None and "None" in str(f.type)) or _is_sound(value, f.type)
                for f, value in zip(fields(cls), values.values(), strict=True)
            )
            for rank in saved["ranks"]:
                is_sound &= {"values", "counts"} <= rank["log"].keys() and "torch" in rank["random"]
        except (AttributeError, KeyError, TypeError):
            is_sound = False
        if not is_sound:
            raise ValueError(f"{path} is damaged: restore it, or remove it to start it cold")
        return state


def _is_sound(value: Any, kind: Any) -> bool:
    """Tell whether a value from a file is of an annotated kind, and numbers are in range."""
    for container in (dict, list):
        if str(kind).startswith(container.__name__):
            return isinstance(value, container)
    if "float" in str(kind):
        return isinstance(value, int | float) and abs(value) < 1000
    return isinstance(value, int) and -1 <= value < 2**63


# --------------------------------------------------------------------------------------------
# What each rank keeps for itself


def capture_rank() -> dict[str, Any]:
    """Return the random generators of this process and its open window of the log."""
    return {"random": capture_random(), "log": logger.get_current().window()}


def restore_rank(saved: list[dict[str, Any]], seed: int, images: int) -> None:
    """Give this rank back what it kept.

    With another number of ranks there is no such thing: then dropout is seeded anew from the
    place in the run, and rank 0 takes over all windows of the log.

    Raises:
        ValueError: if the saved generators are damaged.
    """
    rank = dist_util.get_rank()
    if len(saved) == dist_util.get_world_size():
        try:
            restore_random(saved[rank]["random"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"the state file of --resume_checkpoint is damaged ({first_line(error)}): restore "
                "it, or remove it to start it cold"
            ) from error
        logger.get_current().restore_window(saved[rank]["log"])
        return
    seed_rank(seed, images)
    if rank == 0:
        logger.get_current().restore_window(_join_windows([each["log"] for each in saved]))


def seed_rank(seed: int, images: int = 0) -> None:
    """Seed the global generators, which dropout draws from, for this rank and place in the run."""
    index = (images << 20) + dist_util.get_rank() + 1
    seed_globally(streams.derived_seed(seed, index, streams.START))


def seed_globally(seed: int) -> None:
    """Seed the generators of random, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture_random() -> dict[str, Any]:
    """Return the state of the global generators as tensors and plain values."""
    kind, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    captured = {
        "python": [kind, torch.tensor(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if dist_util.dev().type == "cuda":
        captured["cuda"] = torch.cuda.get_rng_state(dist_util.dev())
    return captured


def restore_random(captured: dict[str, Any]) -> None:
    """Undo what was drawn since `capture_random`."""
    kind, words, gauss = captured["python"]
    random.setstate((kind, tuple(words.tolist()), gauss))
    name, keys, *rest = captured["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(captured["torch"])
    if "cuda" in captured and dist_util.dev().type == "cuda":
        torch.cuda.set_rng_state(captured["cuda"], dist_util.dev())


@contextmanager
def random_kept() -> Iterator[None]:
    """Let a block draw random numbers as if it had drawn none."""
    before = capture_random()
    try:
        yield
    finally:
        restore_random(before)


def _join_windows(windows: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up the sums and counts of several ranks' windows; of other values the first counts."""
    values: dict[str, Any] = {}
    counts: Counter = Counter()
    for window in windows:
        counts.update(window["counts"])
        for key, value in window["values"].items():
            if key in values and key in window["counts"]:
                values[key] = values[key] + value
            else:
                values.setdefault(key, value)
    return {"values": values, "counts": dict(counts)}
