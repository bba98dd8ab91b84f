"""Laws of guided_diffusion/dist_util.py and launchers.py, some of them between real ranks."""

import gzip
import json
import os
import re
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from launching import WORKERS, clean_environment, is_launcher_variable, launch, launch_as_slurm

from guided_diffusion import dist_util
from guided_diffusion.launchers import (
    MPI_VARIABLES,
    Launch,
    first_host,
    interface_towards,
    read_launch,
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    """Let no launcher of the test run itself show through, and leave no group behind."""
    for name in filter(is_launcher_variable, list(os.environ)):
        monkeypatch.delenv(name)
    monkeypatch.setattr(dist_util, "_state", dist_util.State())
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=["mpiexec", "torchrun", "slurm"])
def ranks(request, tmp_path_factory):
    """What two ranks of tests/workers/ranks.py wrote down, under each launcher."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.save({"a": torch.arange(3)}, folder / "weights.pt")
    command = (WORKERS / "ranks.py", folder)
    if request.param == "slurm":
        for status, stderr in launch_as_slurm(*command, cwd=folder):
            assert status == 0, stderr
    else:
        status, stderr = launch(request.param, *command, cwd=folder)
        assert status == 0, stderr
    facts = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return facts, request.param, folder


def test_ranks_know_each_other(ranks):
    """Each launcher gives two ranks, which synchronise through gloo on the CPU."""
    facts, launcher, _ = ranks
    assert [rank["rank"] for rank in facts] == [rank["early_rank"] for rank in facts] == [0, 1]
    for rank in facts:
        assert (rank["world_size"], rank["backend"], rank["device"]) == (2, "gloo", "cpu")
        assert rank["mpi4py"] == (launcher == "mpiexec")
        assert not rank["torch_at_import"] and not rank["group_after"]


def test_sync_params_makes_ranks_equal(ranks):
    """After sync_params every rank holds rank 0's tensors, whatever their dtype and strides."""
    for rank in ranks[0]:
        assert len(rank["params"]) == 7
        assert all(set(values) <= {0.0} for values in rank["params"])


def test_collectives_of_values(ranks):
    """Objects come from rank 0, or from every rank to rank 0 in the order of ranks."""
    for rank in ranks[0]:
        assert rank["broadcast"] == {"rank": 0} and rank["shared"] == ["00", "10"]
        assert rank["gathered"] == ([] if rank["rank"] else [{"rank": 0}, {"rank": 1}])


def test_facts_and_values_of_all_ranks(ranks):
    """Every rank learns what is true on some rank, and what each rank said."""
    for rank in ranks[0]:
        assert rank["any_rank"] == [True, True, False]
        assert rank["all_gathered"] == [[0], [1]]


def test_ranks_are_described_in_a_table(ranks):
    """Rank 0 alone has the table: host, rank and device of each rank, below a line of titles."""
    facts = ranks[0]
    assert facts[1]["table"] == []
    title, *rows = facts[0]["table"]
    assert title.split() == ["host", "rank", "device"]
    for rank, row in enumerate(rows):
        assert re.fullmatch(rf"\S+ +{rank}  cpu, \d+ threads?", row)
        assert row.index("cpu") == title.index("device")
    assert len(rows) == 2


def test_one_rank_may_load_alone(ranks):
    """load_state_dict is no collective: rank 1 alone called it."""
    assert [rank.get("weights") for rank in ranks[0]] == [None, [0, 1, 2]]


def test_visible_gpus_are_the_users_choice(ranks):
    """No rank overwrites CUDA_VISIBLE_DEVICES."""
    assert [rank["cuda_visible_devices"] for rank in ranks[0]] == ["5,7", "5,7"]


def test_ranks_log_into_one_folder(ranks):
    """The dated folder is rank 0's choice; the other ranks write files of their own there."""
    facts, _, folder = ranks
    log_dir = Path(facts[0]["log_dir"])
    assert facts[1]["log_dir"] == facts[0]["log_dir"] and log_dir.parent == folder / "logs"
    assert [path.name for path in log_dir.parent.iterdir()] == [log_dir.name]
    assert sorted(path.name for path in log_dir.iterdir()) == [
        "log-rank001.txt",
        "log.txt",
        "progress.csv",
    ]
    assert "hello from 0" in (log_dir / "log.txt").read_text()
    assert "hello from 1" in (log_dir / "log-rank001.txt").read_text()


@pytest.mark.parametrize(
    "way, message",
    [
        ("block", "rank 1: error: rank one gives up"),
        ("bare", "ValueError: rank one gives up"),
        ("device", "error: --device cuda:99 is not available here"),
    ],
)
def test_a_failing_rank_ends_the_job(tmp_path, way, message):
    """One rank's error is printed and ends all ranks, although the others wait for it."""
    status, stderr = launch("mpiexec", WORKERS / "failing.py", way, cwd=tmp_path)
    assert status != 0
    assert message in stderr


ONE_PROCESS = """
import os, sys
before = dict(os.environ)
from guided_diffusion import dist_util, logger
assert "torch" not in sys.modules, "imported by dist_util or logger"
assert dist_util.get_rank() == 0 and dist_util.get_world_size() == 1 and dist_util.is_main()
assert dist_util.broadcast_object(3) == 3 and "torch" in sys.modules
dist_util.setup_dist()
dist_util.setup_dist()
import torch.distributed as dist
assert (dist.get_rank(), dist.get_world_size(), dist.get_backend()) == (0, 1, "gloo")
dist.barrier()
assert not [name for name in sys.modules if name.startswith("mpi4py")]
assert not {"MASTER_ADDR", "MASTER_PORT", "RANK"} & set(os.environ)
assert os.environ.get("CUDA_VISIBLE_DEVICES") == before.get("CUDA_VISIBLE_DEVICES")
"""


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_a_busy_rank_is_waited_for(launcher, tmp_path):
    """Longer than the timeout of the job, twice, as long as it shows signs of life."""
    status, printed = launch(launcher, WORKERS / "patient.py", "late", "1", cwd=tmp_path)
    assert status == 0, printed
    assert printed.count("all are here") == 2


@pytest.mark.parametrize("rank, told", [
    ("1", r"error: rank 1 on .* has been silent"),
    ("0", r"rank 1: error: rank 0, which serves the store, cannot be reached"),
])  # fmt: skip
def test_a_silent_rank_is_not_waited_for(rank, told, tmp_path):
    """Once its heart has stopped for longer than the timeout, it is named and the job ends."""
    status, printed = launch("mpiexec", WORKERS / "patient.py", "stopped", rank, cwd=tmp_path)
    assert status != 0 and "all are here" not in printed
    assert re.search(told, printed), printed


def test_one_process_needs_nothing():
    """A group exists without launcher, network variables or mpi4py; importing loads no torch."""
    run = subprocess.run(
        [sys.executable, "-c", ONE_PROCESS],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr


def test_process_group_cleans_up_what_it_made():
    """The block destroys the group that it made, also on an error, and no other."""
    with pytest.raises(KeyError), dist_util.process_group("cpu"):
        assert dist.is_initialized()
        raise KeyError
    assert not dist.is_initialized()
    dist_util.setup_dist("cpu")
    with dist_util.process_group():
        assert dist_util.dev() == torch.device("cpu")
    assert dist.is_initialized()


def test_sync_params_in_one_process_keeps_the_values():
    """With nobody to agree with, sync_params leaves the tensors alone, group or not."""
    param = torch.nn.Parameter(torch.arange(3.0))
    dist_util.sync_params([param])
    with dist_util.process_group("cpu"):
        dist_util.sync_params(iter([param, torch.tensor(True)]))
    assert param.tolist() == [0, 1, 2]


def test_one_process_has_only_its_own_facts():
    """Alone, the collectives of facts and values return what they were given, group or not."""
    for group in (nullcontext(), dist_util.process_group("cpu")):
        with group, dist_util.stage("testing"):
            assert [dist_util.any_rank(fact) for fact in (True, False)] == [True, False]
            assert dist_util.all_gather_objects("a") == ["a"]
    assert len(dist_util.describe_ranks()) == 2


def test_interfaces_are_found():
    """Within a host gloo talks over the loopback; a loopback leads to no other host."""
    away = SimpleNamespace(host="127.0.0.1", port=1)
    assert interface_towards(None) in ("lo", "lo0")
    assert interface_towards(away) is None
    assert interface_towards(SimpleNamespace(host="no-such-host.invalid", port=1)) is None


MPICH = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0"}
OPEN_MPI = {name: str(value) for name, value in zip(MPI_VARIABLES[0], (3, 4, 1), strict=True)}
TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "a"}
TORCHRUN |= {"MASTER_PORT": "1", "LOCAL_WORLD_SIZE": "2"}
SBATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
SRUN = SBATCH | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    "environ, expected",
    [
        ({}, Launch()),
        (MPICH, Launch("mpi", 1, 4, 0)),
        (MPICH | {"PMI_SIZE": "1", "PMI_RANK": "0"}, Launch()),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, Launch("mpi", 1, 2, None)),
        (OPEN_MPI, Launch("mpi", 3, 4, 1)),
        (TORCHRUN, Launch("env", 2, 4, 0, one_host=False)),
        (TORCHRUN | MPICH, Launch("env", 2, 4, 0, one_host=False)),
        (TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}, Launch()),
        ({"RANK": "1", "WORLD_SIZE": "2"} | MPICH, Launch("mpi", 1, 4, 0)),
        (SBATCH, Launch()),
        (SRUN, Launch("slurm", 3, 4, 1, one_host=False)),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, Launch()),
        (SRUN | MPICH, Launch("mpi", 1, 4, 0)),
        (SRUN | {"PMI_RANK": "3", "PMI_SIZE": "4"}, Launch("slurm", 3, 4, 1, one_host=False)),
    ],
)
def test_launchers_are_told_apart(environ, expected):
    """Rank and world size follow from the launcher's variables; an sbatch script is no rank."""
    assert read_launch(environ) == expected


@pytest.mark.parametrize(
    "nodelist, host",
    [
        ("login1", "login1"),
        ("gpu[007-009,12],login1", "gpu007"),
        ("a,b[1-2]", "a"),
        ("rack[3,5]-node[08-10].site", "rack3-node08.site"),
    ],
)
def test_first_host_of_a_slurm_list(nodelist, host):
    """The ranks of a Slurm job meet on the first host of the compressed list."""
    assert first_host(nodelist) == host


def test_missing_mpi4py_has_a_remedy(monkeypatch):
    """Under an MPI launcher, a missing mpi4py or one of another MPI is one line with a remedy."""
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ValueError, match="pip install mpi4py mpich, or use torchrun") as caught:
        dist_util.setup_dist()
    assert "\n" not in str(caught.value)


@pytest.fixture
def two_gpus(monkeypatch):
    """Two GPUs, as far as torch can tell."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_device_choice(two_gpus):
    """A rank takes the GPU of its local rank, or the device that was named."""
    assert dist_util.choose_device(None, local_rank=1) == torch.device("cuda:1")
    assert dist_util.choose_device("cuda", local_rank=0) == torch.device("cuda:0")
    assert dist_util.choose_device("cuda:1", local_rank=0) == torch.device("cuda:1")
    assert dist_util.choose_device("cpu", local_rank=1) == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:2", "gpu", "cuda:x", "xpu"])
def test_absent_device_is_named(two_gpus, name):
    """The error shows the flag, the value and the devices that there are."""
    with pytest.raises(ValueError, match=rf"--device {name} .*'cpu', 'cuda:0', 'cuda:1'"):
        dist_util.choose_device(name)


def make_ranks(*gpus, num_gpus=2):
    return [{"host": "node1", "gpu": gpu, "num_gpus": num_gpus} for gpu in gpus]


def test_backend_follows_the_gpus(monkeypatch):
    """Only ranks that each have a GPU of their own use nccl; only a named GPU may be shared."""
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    choose = dist_util._choose_backend
    assert choose(make_ranks("a", "b"), may_share=False) == "nccl"
    assert choose(make_ranks("a", "a"), may_share=True) == "gloo"
    assert choose(make_ranks(None, None), may_share=False) == "gloo"
    assert choose(make_ranks("a", None), may_share=False) == "gloo"
    with pytest.raises(ValueError, match="3 ranks on node1 .* 2 visible: .*--device cpu"):
        choose(make_ranks("a", "b", "a"), may_share=False)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    assert choose(make_ranks("a", "b"), may_share=False) == "gloo"


class Touch:
    """A pickle that makes a file when it is loaded carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_load_state_dict_reads_what_was_saved(tmp_path):
    """Tensors come back on the CPU, in the new and the old file format."""
    path = tmp_path / "model.pt"
    for is_zip in (True, False):
        torch.save({"a": torch.arange(4)}, path, _use_new_zipfile_serialization=is_zip)
        assert dist_util.load_state_dict(str(path))["a"].tolist() == [0, 1, 2, 3]
        assert dist_util.load_state_dict(path, mmap=True)["a"].tolist() == [0, 1, 2, 3]
    assert dist_util.load_state_dict(path, map_location="meta")["a"].device.type == "meta"


def test_load_state_dict_never_runs_code(tmp_path):
    """A checkpoint that holds code is refused, named, and not run."""
    path = tmp_path / "evil.pt"
    torch.save({"a": Touch(tmp_path / "ran")}, path)
    with pytest.raises(ValueError, match=r"evil\.pt holds Python objects \(\w+\.mkdir\)"):
        dist_util.load_state_dict(path)
    assert not (tmp_path / "ran").exists()


def write_broken_files(folder):
    """Files that are no checkpoint."""
    torch.save({"a": torch.zeros(1000)}, folder / "model.pt")
    whole = (folder / "model.pt").read_bytes()
    broken = {
        "half": whole[: len(whole) // 2],
        "start": whole[:10],
        "empty": b"",
        "zeros": bytes(99),
    }
    broken |= {"text": b"hello world\n", "page": b"<html>not found</html>"}
    broken |= {
        "error": b'\n <?xml version="1.0"?><Error>',
        "image": b"\x89PNG\r\n\x1a\n" + bytes(50),
    }
    broken |= {"pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"}
    broken |= {"packed": gzip.compress(whole), "other": (8).to_bytes(8, "little") + b'{"a": 1}'}
    torch.save({"a": torch.zeros(1000)}, folder / "old.pt", _use_new_zipfile_serialization=False)
    broken["old"] = (folder / "old.pt").read_bytes()[:-100]
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    (folder / "folder").mkdir()
    entries = {"zip": ["notes.txt"], "program": ["x/data.pkl", "x/constants.pkl", "x/code/x.py"]}
    for name, files in entries.items():
        with zipfile.ZipFile(folder / name, "w") as archive:
            for file in files:
                archive.writestr(file, "no tensors")
    np.savez(folder / "arrays.npz", np.zeros(3))


@pytest.mark.parametrize(
    "name, reason",
    [
        ("half", "cut short"),
        ("start", "cut short"),
        ("empty", "empty"),
        ("zeros", "expected tensors"),
        ("text", "not written by torch.save"),
        ("page", "not written by torch.save"),
        ("error", "is a web page"),
        ("image", "is an image"),
        ("pointer", "is a pointer of git-lfs (git lfs pull"),
        ("packed", "is compressed (unpack it"),
        ("other", "is a file of safetensors (rename it"),
        ("old", "cut short"),
        ("program", "is a TorchScript program"),
        ("zip", "is a zip of arrays or other files"),
        ("arrays.npz", "is a zip of arrays or other files"),
        ("folder", "is a folder"),
        ("absent", "does not exist"),
    ],
)
def test_load_state_dict_explains_broken_files(tmp_path, name, reason):
    """A file that is no checkpoint is one line with its path and what was expected."""
    write_broken_files(tmp_path)
    with pytest.raises(ValueError) as caught:
        dist_util.load_state_dict(tmp_path / name)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / name)) and reason in message and "expected" in message
    assert "\n" not in message


def test_remote_paths_go_through_blobfile(monkeypatch, tmp_path):
    """Only a path with :// is asked of blobfile, and its failure is one line."""
    blobfile = pytest.importorskip("blobfile")
    torch.save({"a": torch.ones(2)}, tmp_path / "model.pt")
    monkeypatch.setattr(blobfile, "BlobFile", lambda path, mode: (tmp_path / path[7:]).open(mode))
    assert dist_util.load_state_dict("az://x/model.pt")["a"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="az://x/other.pt cannot be read .* local path"):
        dist_util.load_state_dict("az://x/other.pt")
