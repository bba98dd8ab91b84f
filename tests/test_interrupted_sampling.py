"""Sampling that is killed and goes on ends as if nobody had killed it; see tests/workers/dying.py.

`make soak` does the same with the bundled models, more ranks and kills at random times.
"""

import json
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from launching import WORKERS
from reference.fill import fill_
from scripting import SMALL, environment, files_below, flags_of, launch, succeed

from guided_diffusion import config, script_util

RUN = {"timestep_respacing": "2", "batch_size": 2}
FIVE = {"num_samples": 5, **RUN}
NAME = "samples_5x8x8x1"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model without zero layers."""
    path = tmp_path_factory.mktemp("model") / "model000001.pt"
    flags = config.defaults(*config.DIFFUSION_GROUPS) | SMALL
    network, _ = script_util.create_model_and_diffusion(**flags)
    torch.save(fill_(network, 0).state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps(flags))
    return path


@pytest.fixture(scope="module")
def left(model, tmp_path_factory):
    """What a run without --seed leaves that is killed while it writes its second shard."""
    folder = tmp_path_factory.mktemp("left") / "out"
    flags = flags_of(FIVE | {"model_path": model, "log_dir": folder})
    # two folders, two moments of the manifest, two of the first shard
    command = [sys.executable, WORKERS / "dying.py", "0", "7", "image_sample", *flags]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    [first, half] = sorted(path.name for path in (folder / f"{NAME}.shards").iterdir())
    assert first == "images_000000000_000000002.npy"
    assert re.fullmatch(r"images_000000002_000000004\.npy\.tmp\d+", half)
    return folder


def read(folder):
    with np.load(folder / f"{NAME}.npz", allow_pickle=False) as arrays:
        return arrays["arr_0"].astype(int), arrays["arr_1"]


def assert_alike(folder, whole):
    """Compare two sets that may have been drawn in other batches, or on other threads."""
    (images, labels), (others, same) = read(folder), read(whole)
    np.testing.assert_array_equal(labels, same)
    assert np.abs(images - others).max() <= 1
    logs = {"log-rank001.txt"}  # of a second rank
    assert files_below(folder) - logs == files_below(whole)


def seed_of(folder):
    return json.loads((folder / f"{NAME}.json").read_text())["seed"]


def test_a_kill_at_any_moment_costs_nothing(model, tmp_path):
    """Within or after a file, before a removal: the same command ends with the same files."""
    flags = RUN | {"model_path": model, "num_samples": 3, "seed": 3}
    flags |= {"save_images": True, "save_every_t": 1}
    command = [sys.executable, WORKERS / "dying.py", tmp_path, "image_sample", *flags_of(flags)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    moments = re.findall(r"^\d+: (.+)", done.stdout, re.MULTILINE)
    assert done.stdout.endswith(f"\n{len(moments)} moments\n")
    for name in ("3x8x8x1.json", "3x8x8x1.npz", "3x8x8x1.png", "film.png", "labels.csv"):
        assert any(re.fullmatch(f"within .*{name}", moment) for moment in moments), name
    assert moments.count("within samples_3x8x8x1.json") == 2  # at the beginning and at the end
    assert "before unlink images_000000002_000000003.npy" in moments


@pytest.mark.parametrize("batch_size", [2, 1, 3])
def test_a_run_without_a_seed_goes_on_with_the_first_one(batch_size, left, model, tmp_path):
    """The manifest has it. What is there is kept, also if the batches are others from then on."""
    folder, whole = shutil.copytree(left, tmp_path / "out"), tmp_path / "whole"
    flags = FIVE | {"model_path": model, "batch_size": batch_size}
    told = succeed("image_sample", flags, log_dir=folder).out
    assert f"{NAME}: 2 of 5 samples are there" in told.replace(str(folder) + "/", "")
    assert seed_of(folder) == seed_of(left)
    succeed("image_sample", flags, log_dir=whole, seed=seed_of(left))
    assert_alike(folder, whole)


def test_shards_without_a_manifest_are_not_used(left, model, tmp_path):
    """Whoever removes manifest and npz, but not what is in folders, gets images of the new set."""
    folder, whole = shutil.copytree(left, tmp_path / "out"), tmp_path / "whole"
    (folder / f"{NAME}.json").unlink()
    flags = FIVE | {"model_path": model, "seed": 12, "save_images": True}
    succeed("image_sample", flags, log_dir=folder)
    succeed("image_sample", flags, log_dir=whole)
    assert_alike(folder, whole)
    for suffix in ("json", "npz"):
        (folder / f"{NAME}.{suffix}").unlink()
    succeed("image_sample", flags | {"seed": 13}, log_dir=folder)
    for name in (f"{NAME}.png", f"{NAME}/000000.png"):  # nor are pictures of before
        assert (folder / name).read_bytes() != (whole / name).read_bytes()


def test_a_rank_that_is_killed_ends_the_job_which_goes_on(model, tmp_path):
    """Rank 1 of 2 dies before its only shard has its name; one rank draws what is missing."""
    folder, whole = tmp_path / "out", tmp_path / "whole"
    flags = FIVE | {"model_path": model, "seed": 4, "device": "cpu"}
    same = flags_of(flags | {"log_dir": folder})
    done = launch("mpiexec", WORKERS / "dying.py", ["1", "2", "image_sample", *same], tmp_path)
    assert done.returncode != 0
    assert not (folder / f"{NAME}.shards" / "images_000000002_000000004.npy").exists()
    for where in (folder, whole):
        succeed("image_sample", flags, log_dir=where)
    assert_alike(folder, whole)
