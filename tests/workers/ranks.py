"""Run as several ranks: do what dist_util and logger promise, and write down what came of it.

Usage: ranks.py FOLDER, with weights.pt in the folder; rank N writes FOLDER/rankN.json.
"""

import json
import os
import sys
from pathlib import Path

from guided_diffusion import dist_util, logger


def make_params(rank):
    """Tensors of several kinds, filled with the rank."""
    import torch

    shapes = [
        ((3, 2), torch.float32),
        ((2,), torch.int16),
        ((4,), torch.bfloat16),
        ((), torch.bool),
    ]
    params = [torch.full(shape, rank, dtype=dtype) for shape, dtype in shapes]
    strided = torch.full((2, 2, 3, 3), float(rank)).to(memory_format=torch.channels_last)
    return params + [params[0].t(), torch.nn.Parameter(strided), torch.empty(0)]


def main(folder):
    """Try everything that needs other ranks."""
    facts = {"torch_at_import": "torch" in sys.modules, "early_rank": dist_util.get_rank()}
    with dist_util.process_group("cpu"):
        import torch.distributed as dist

        dist_util.setup_dist()
        rank = dist_util.get_rank()
        params = make_params(rank)
        dist_util.sync_params(iter(params))
        if rank == 1:  # one rank alone
            facts["weights"] = dist_util.load_state_dict(folder / "weights.pt")["a"].tolist()
        dist_util.barrier()
        facts |= {
            "rank": dist.get_rank(),
            "world_size": dist.get_world_size(),
            "backend": dist.get_backend(),
            "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
            "device": str(dist_util.dev()),
            "params": [param.float().flatten().tolist() for param in params],
            "broadcast": dist_util.broadcast_object({"rank": rank}),
            "shared": [dist_util.share("name", lambda i=i: f"{i}{rank}") for i in range(2)],
            "all_gathered": dist_util.all_gather_objects([rank]),
            "any_rank": [dist_util.any_rank(fact) for fact in (rank == 0, rank == 1, rank < 0)],
            "table": dist_util.describe_ranks(),
            "gathered": dist_util.gather_objects({"rank": rank}),
            "mpi4py": "mpi4py" in sys.modules,
            "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        }
        with logger.session():
            facts["log_dir"] = logger.get_dir()
            logger.log(f"hello from {rank}")
            logger.logkv("rank", rank)
            logger.dumpkvs()
    facts["group_after"] = dist.is_initialized()
    (folder / f"rank{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
