"""Sharded training is training: the same losses, weights and files, with less memory per rank."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scripting import flags_of, launch
from workers import sharded

from guided_diffusion import dist_util, sharding

WORKER = Path(sharded.__file__)


def run_worker(launcher, case, folder):
    done = launch(launcher, WORKER, flags_of({"case": case, "out": folder / f"{case}.pt"}), folder)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / f"{case}.pt")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors are so small that threads would spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two ranks found."""
    return run_worker("torchrun", "laws", tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def alone():
    """What one rank finds, which takes the whole batch itself."""
    with dist_util.process_group("cpu"):
        return sharded.train("whole")


def assert_same_training(mine, theirs):
    """Compare weights, averages and moments of all parameters."""
    for name in ("model", "ema"):
        for key, value in mine[name].items():
            # Adam amplifies the rounding of gradients that are zero, as of biases before norms.
            if key.endswith("weight"):
                torch.testing.assert_close(value, theirs[name][key], rtol=1e-4, atol=1e-5, msg=key)
    for index, values in mine["opt"]["state"].items():
        for key, value in values.items():
            expected = theirs["opt"]["state"][index][key]
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6, msg=f"{index} {key}")


@pytest.mark.parametrize("name", ["whole", "sharded", "resumed"])
def test_two_ranks_train_like_one(name, two, alone):
    """Gradients are those of the mean over all ranks, sharded or in a DistributedDataParallel."""
    last = len(two[name]["losses"])
    np.testing.assert_allclose(two[name]["losses"], alone["losses"][-last:], rtol=1e-5)
    np.testing.assert_allclose(two[name]["norms"], alone["norms"][-last:], rtol=1e-5)
    assert_same_training(two[name], alone)


def test_sharded_ranks_train_like_whole_ones(two):
    """Shards change where numbers are, not what they are."""
    np.testing.assert_allclose(two["sharded"]["losses"], two["whole"]["losses"], rtol=1e-5)
    assert_same_training(two["sharded"], two["whole"])


def test_a_resumed_sharded_run_equals_an_uninterrupted_one(two):
    """Weights, average and moments survive the way to whole tensors and back bit for bit."""
    resumed, whole = two["resumed"], two["sharded"]
    assert resumed["losses"] == whole["losses"][2:]
    for name in ("model", "ema"):
        assert all(torch.equal(v, whole[name][k]) for k, v in resumed[name].items()), name
    for index, values in resumed["opt"]["state"].items():
        for key, value in values.items():
            assert torch.equal(value, whole["opt"]["state"][index][key]), (index, key)


def test_when_gradients_are_exchanged_does_not_matter(two):
    """Once per step, which saves time, or with every micro-batch, which saves memory."""
    losses = two["exchange_each"]["losses"]
    np.testing.assert_allclose(losses, two["whole"]["losses"][:2], rtol=1e-5)


def test_a_forward_pass_without_a_backward_one_leaves_shards(two):
    """Or the next pass would not see weights that were changed in between, say for an average's."""
    (losses, are_sharded), (expected, _) = two["looks"]
    assert are_sharded and losses == expected


def test_adamw_steps_shards_like_whole_tensors(two):
    """Parameter by parameter or all at once, also where a rank has nothing of a parameter."""
    expected, *others = two["adamw"].values()
    for params in others:
        torch.testing.assert_close(params, expected)


def test_shards_go_with_autocast_and_checkpointing(two):
    """The same first loss in bfloat16 with recomputed blocks; then sums round differently."""
    mine, theirs, exact = (two[k]["losses"] for k in ("sharded_bf16", "whole_bf16", "whole"))
    np.testing.assert_allclose(mine[0], theirs[0], rtol=1e-5)
    np.testing.assert_allclose(mine[1], theirs[1], rtol=2e-2)
    assert 1e-4 < np.abs(np.array(mine[0]) / exact[0] - 1).max() < 2e-2


def test_files_of_a_sharded_run_are_the_published_ones(two):
    """Names, shapes, dtypes and order are those of a run with whole parameters."""
    mine, theirs = two["sharded"], two["whole"]
    described = [
        [
            [(name, value.shape, value.dtype) for name, value in tensors.items()]
            for tensors in (run["model"], run["ema"], *run["opt"]["state"].values())
        ]
        for run in (mine, theirs)
    ]
    assert described[0] == described[1]
    assert not any(sharding.is_sharded(value) for value in mine["model"].values())
    assert list(mine["opt"]) == list(theirs["opt"])
    assert list(mine["opt"]["state"]) == list(theirs["opt"]["state"])
    assert mine["opt"]["param_groups"] == theirs["opt"]["param_groups"]


@pytest.mark.parametrize("number", range(len(sharded.SHAPES)))
def test_like_takes_apart_what_full_puts_together(number, two):
    """Also where two ranks cannot divide the first dimension, or there is none."""
    rows = [rank["rows"][number] for rank in two["parts"]]
    for whole, back, part, expected in rows:
        assert whole.shape == sharded.SHAPES[number]
        assert torch.equal(back, whole) and torch.equal(part, expected)
    if whole.ndim:
        assert torch.equal(torch.cat([row[2] for row in rows]), whole)


def test_a_part_does_not_keep_the_whole_in_memory(two):
    """Otherwise loading an average would undo its sharding."""
    assert not any(rank["shares_memory"] for rank in two["parts"])


def test_the_norm_of_shards_is_that_of_the_whole(two):
    """Each rank measures the norm over all ranks."""
    for rank in two["parts"]:
        assert rank["norms"][0] == pytest.approx(rank["norms"][1], rel=1e-6)


def test_plain_tensors_pass_through():
    """Without shards, full and like return what they were given, and nothing is exchanged."""
    tensor, other = torch.ones(3), torch.zeros(3)
    assert sharding.full(tensor) is tensor and sharding.like(tensor, other) is tensor
    assert not sharding.is_sharded(tensor)
    assert sharding.global_norm([tensor, torch.full((2, 2), 2.0)]) == pytest.approx(19**0.5)
    assert sharding.global_norm([]) == 0


def test_one_rank_may_shard_too(alone):
    """A single process trains the same, so that a job may shrink to it."""
    with dist_util.process_group("cpu"):
        run = sharded.train("sharded", range(2))
    np.testing.assert_allclose(run["losses"], alone["losses"][:2], rtol=1e-5)


def test_an_optimizer_of_another_network_is_refused():
    """As torch does without shards."""
    one, two = (torch.optim.AdamW([torch.zeros(2) for _ in range(n)]) for n in (1, 2))
    with pytest.raises(ValueError):
        sharding.load_optimizer_state(one, two.state_dict())


def test_each_rank_needs_less_memory(tmp_path, monkeypatch):
    """Parameters, gradients, moments and averages are halved; activations and blocks are not."""
    # Memory that is freed goes back to the system at once, or the peak would be the allocator's.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    found = {kind: run_worker("mpiexec", kind, tmp_path) for kind in ("whole", "sharded")}
    peaks = {kind: [round(peak) for peak in result["peaks"]] for kind, result in found.items()}
    print(f"{found['whole']['num_params']:,} parameters, peak in MiB by rank: {peaks}")
    assert len(peaks["whole"]) == len(peaks["sharded"]) == 2
    assert max(peaks["sharded"]) < 0.75 * min(peaks["whole"])
