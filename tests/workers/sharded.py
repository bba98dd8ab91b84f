"""Run as several ranks: train as TrainLoop does, with whole and with sharded parameters.

Usage: sharded.py --case laws | whole | sharded --out FILE. The laws leave what came of each run in
FILE; a kind of run leaves there how much memory each rank needed to train a larger network.
"""

import argparse
import faulthandler
import importlib
import re
import sys
from contextlib import nullcontext
from copy import deepcopy
from itertools import product
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from reference.fill import draw, fill_  # noqa: E402

from guided_diffusion import dist_util, sharding  # noqa: E402
from guided_diffusion.fp16_util import MixedPrecisionTrainer  # noqa: E402
from guided_diffusion.nn import update_ema  # noqa: E402
from guided_diffusion.script_util import (  # noqa: E402
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)

TINY = dict(
    num_channels=32, num_res_blocks=1, image_size=8, channel_mult="1,2",
    attention_resolutions="4", in_channels=1, num_classes=3, class_cond=True, diffusion_steps=20,
    noise_schedule="cosine",
)  # fmt: skip
LARGE = TINY | dict(num_channels=96, channel_mult="2,3", num_res_blocks=2)
GLOBAL_BATCH = 4
SHAPES = [(4, 3), (1,), (1, 3), (5,), (3, 2, 2), ()]


class Run:
    """What the training loop holds, and one step of it.

    Args:
        kind: "sharded", or "whole": plain with one rank and in a DistributedDataParallel else.
        state: what `Run.state` returned, to go on from there.
        use_bf16: run the network under bfloat16 autocast.
        exchange_each: exchange gradients after every micro-batch, not once per step.
        options: flags of the network.
    """

    def __init__(self, kind, state=None, use_bf16=False, exchange_each=False, **options):
        flags = model_and_diffusion_defaults() | TINY | options
        self.model, self.diffusion = create_model_and_diffusion(**flags)
        self.model.load_state_dict(state["model"]) if state else fill_(self.model, 0)
        self.kind, self.use_bf16, self.exchange_each = kind, use_bf16, exchange_each
        self.net = self.model
        if kind == "sharded":
            sharding.shard(self.model)
        elif dist_util.get_world_size() > 1:
            self.net = DistributedDataParallel(self.model)
        self.trainer = MixedPrecisionTrainer(model=self.model)
        params = self.trainer.master_params
        self.opt = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.05)
        self.ema = deepcopy(params)
        if state:
            sharding.load_optimizer_state(self.opt, state["opt"])
            averages = self.trainer.state_dict_to_master_params(state["ema"])
            self.ema = [sharding.like(*pair) for pair in zip(averages, params, strict=True)]

    def step(self, x_start, noise, t, y):
        """Update on this rank's images [N, C, H, W], one per micro-batch; return losses [N]."""
        self.trainer.zero_grad()
        losses = []
        for i in range(len(x_start)):
            one = slice(i, i + 1)
            with self._exchange(self.exchange_each or i + 1 == len(x_start)):
                with dist_util.precision(self.use_bf16):
                    terms = self.diffusion.training_losses(
                        self.net, x_start[one], t[one], dict(y=y[one]), noise[one]
                    )
                losses.append(terms["loss"].item())
                self.trainer.backward(terms["loss"].mean() / len(x_start))
        self.trainer.optimize(self.opt)
        update_ema(self.ema, self.trainer.master_params, rate=0.9)
        return losses

    def _exchange(self, on):
        """Exchange gradients in the block, or not."""
        if isinstance(self.net, DistributedDataParallel) and not on:
            return self.net.no_sync()
        return nullcontext()

    def state(self):
        """Return what the files hold on rank 0, and empty dictionaries elsewhere."""
        to_dict = self.trainer.master_params_to_state_dict
        return {
            "model": sharding.gather(to_dict(self.trainer.master_params)),
            "ema": sharding.gather(to_dict(self.ema)),
            "opt": sharding.optimizer_state(self.opt),
        }


def batch_of(step):
    """Return this rank's part of a step's images, noise, timesteps and labels."""
    numbers = [GLOBAL_BATCH * step + i for i in range(GLOBAL_BATCH)]
    share = GLOBAL_BATCH // dist_util.get_world_size()
    mine = slice(dist_util.get_rank() * share, (dist_util.get_rank() + 1) * share)
    images, noise = (
        torch.stack([draw(f"{name}{i}", (1, 8, 8), 42) for i in numbers[mine]])
        for name in ("x", "noise")
    )
    t = torch.tensor([7 * i % 20 for i in numbers[mine]])
    return (0.5 * images).clamp(-1, 1), noise, t, torch.tensor([i % 3 for i in numbers[mine]])


def train(kind, steps=range(4), **options):
    """Train a few steps; return losses [steps, batch], norms and, on rank 0, what files hold."""
    run = Run(kind, **options)
    losses, norms = [], []
    for step in steps:
        parts = dist_util.gather_objects(run.step(*batch_of(step)))
        losses.append([loss for part in parts for loss in part])
        norms.append([run.trainer.metrics[name] for name in ("grad_norm", "param_norm")])
    return deepcopy({"losses": losses, "norms": norms, **run.state()})


def train_in_two_parts():
    """Train two steps, and two more in a new run that starts from what the first one saved."""
    first = train("sharded", range(2))
    state = dist_util.broadcast_object({name: first[name] for name in ("model", "ema", "opt")})
    return train("sharded", range(2, 4), state=state)


class Odd(nn.Module):
    """A network with parameters that two ranks cannot divide evenly."""

    def __init__(self):
        super().__init__()
        self.params = nn.ParameterList(nn.Parameter(draw("", s, 3)) for s in SHAPES if s)


@torch.no_grad()
def look(factors):
    """Multiply the weights by each factor in turn and take a forward pass; return the last losses.

    And whether the parameters are sharded after it.
    """
    run = Run("sharded")
    x_start, noise, t, y = batch_of(0)
    for factor in factors:
        for param in run.trainer.master_params:
            param.mul_(factor)
        terms = run.diffusion.training_losses(run.net, x_start, t, dict(y=y), noise)
    return terms["loss"].tolist(), all(map(sharding.is_sharded, run.model.parameters()))


def step_odd(sharded, foreach):
    """Return the parameters of `Odd` after two steps with AdamW, one by one or all at once."""
    odd = Odd()
    if sharded:
        sharding.shard(odd)
    opt = torch.optim.AdamW(odd.parameters(), lr=0.1, foreach=foreach)
    for step in range(2):
        for param in odd.parameters():
            param.grad = sharding.like(draw("grad", param.shape, step), param)
        opt.step()
    return deepcopy(sharding.gather(odd.state_dict()))


def take_apart():
    """Return for each shape the whole, what came back, and this rank's part of it, twice.

    Both `like` and `shard` made parts; and two norms of all, of the parts and of the wholes.
    """
    from torch.distributed.tensor import Replicate, distribute_tensor

    odd = Odd()
    sharding.shard(odd)
    wholes, sharded = [draw("", shape, 3) for shape in SHAPES], list(odd.params)
    norms = [sharding.global_norm(tensors) for tensors in (sharded, wholes[:-1])]
    sharded.append(distribute_tensor(wholes[-1], sharded[0].device_mesh, [Replicate()]))
    if dist_util.is_main():  # rank 0 alone
        sharding.like(wholes[0], sharded[0])
    parts = [sharding.like(*pair) for pair in zip(wholes, sharded, strict=True)]
    rows = [
        (whole, sharding.full(part), part.to_local(), tensor.detach().to_local())
        for whole, part, tensor in zip(wholes, parts, sharded, strict=True)
    ]
    return {"rows": deepcopy(rows), "norms": norms, "shares_memory": shares_memory(rows)}


def shares_memory(rows):
    """Tell whether a part keeps the whole that it was cut from in memory."""
    starts = [[t.untyped_storage().data_ptr() for t in (row[0], row[2])] for row in rows]
    return any(whole == part for whole, part in starts)


def laws():
    """Return what came of training in every way, by name, and of taking tensors apart."""
    short = {"steps": range(2)}
    bf16 = {"use_bf16": True, "use_checkpoint": True}
    return {
        "whole": train("whole"),
        "sharded": train("sharded"),
        "resumed": train_in_two_parts(),
        "exchange_each": train("sharded", exchange_each=True, **short),
        "whole_bf16": train("whole", **bf16, **short),
        "sharded_bf16": train("sharded", **bf16, **short),
        "looks": [look([1.0, 1.5]), look([1.5])],
        "adamw": {how: step_odd(*how) for how in product((False, True), (False, True))},
        "parts": dist_util.gather_objects(take_apart()),
    }


def peak():
    """Return the most memory that this process ever had, in MiB."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def measure(kind):
    """Return by how many MiB two steps with a larger network raise the peak, and its size."""
    importlib.import_module("torch.distributed.fsdp")  # no part of the difference
    before = peak()
    run = Run(kind, **LARGE)
    for step in range(2):
        run.step(*(tensor[:1] for tensor in batch_of(step)))
    num_params = sum(param.numel() for param in run.model.parameters())
    return {"peaks": dist_util.gather_objects(peak() - before), "num_params": num_params}


if __name__ == "__main__":
    faulthandler.enable()  # a rank once died of SIGSEGV, and nobody knows where
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=["laws", "whole", "sharded"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with dist_util.process_group("cpu"):
        found = laws() if args.case == "laws" else measure(args.case)
        if dist_util.is_main():
            torch.save(found, args.out)
