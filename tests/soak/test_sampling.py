"""Sampling that is killed at random moments, with the bundled models. `make soak` runs this.

What is killed goes on by the same command, and must end with the file of a run that nobody killed.
Each test prints what it did in one line, which docs/reliability.md quotes.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripting import (  # noqa: E402
    ROOT,
    SCRIPTS,
    environment,
    files_below,
    flags_of,
    launch_command,
)

MODELS = ROOT / "models" / "fashion"
COUNT = 20  # images: batches of 3 and of 8 leave some over
NAME = f"samples_{COUNT}x28x28x1"
COMMON = {"num_samples": COUNT, "seed": 7, "device": "cpu"}
GUIDED = COMMON | {
    "model_path": MODELS / "diffusion.pt", "classifier_path": MODELS / "classifier.pt",
    "classifier_scale": 2, "timestep_respacing": "6",
}  # fmt: skip
DDIM = GUIDED | {"use_ddim": True, "timestep_respacing": "ddim5"}
LONGEST = 0.1  # seconds from what is waited for to the kill


# --------------------------------------------------------------------------------------------
# Running and killing


def start(script, folder, flags, ranks=1, launcher="mpiexec"):
    """Start a script that draws samples into a folder."""
    words = [SCRIPTS[script], flags_of(flags | {"log_dir": folder})]
    command = [sys.executable, str(words[0]), *words[1]]
    if ranks > 1:
        command = launch_command(launcher, *words, ranks)
    return subprocess.Popen(
        command, cwd=folder.parent, env=environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def end(job):
    """Wait for the end of a job; return its exit status and what it wrote on stderr."""
    _, told = job.communicate(timeout=180)
    return job.returncode, told


def run_whole(script, folder, flags, **how):
    """Draw samples in one go; return the folder."""
    status, told = end(start(script, folder, flags, **how))
    assert status == 0, told
    return folder


def drawn(folder):
    """Return how many images the shards in a folder hold; all, once the npz is begun."""
    names = files_below(folder) if folder.exists() else ()
    if any(name.startswith(f"{NAME}.npz") for name in names):
        return COUNT
    found = (re.search(r"images_(\d+)_(\d+)\.npy$", name) for name in names)
    return sum(int(match[2]) - int(match[1]) for match in found if match)


def family_of(pid):
    """Return a process, its children, theirs and so on: torchrun's have own sessions."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rsplit(")", 1)[1].split()[1])
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def is_rank(pid):
    """Tell whether a process is a rank, not what has launched it."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        return "python" in words[0] and any(word.endswith("sample.py") for word in words[1:3])
    return False


def kill(job, whom, rng):
    """Kill a whole job, or one of its ranks, or the launcher alone."""
    family = sorted(family_of(job.pid))
    rng.shuffle(family)
    if whom == "rank":
        family = [pid for pid in family if is_rank(pid)][:1]
    if whom == "launcher":
        family = [job.pid]
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def run_with_kills(script, folder, flags, kills, rng, hows=({},)):
    """Run until it ends by itself, killing it before; return what was done, in words.

    Args:
        script: the script's name.
        folder: where to.
        flags: of each run.
        kills: of each what to wait for, "draw" or "end", when all is drawn; and whom to kill.
        rng: decides the rest.
        hows: ranks, launcher and flags of the first run, of the second and so on; of the last.
    """
    kills, killed = list(kills), 0
    for begun in count(1):
        how = dict(hows[min(begun, len(hows)) - 1])
        before, undisturbed = drawn(folder), not kills
        job = start(script, folder, flags | how.pop("flags", {}), **how)
        if kills:
            what, whom = kills.pop(0)
            most = max(before + 1, (before + COUNT) // 2)
            wanted = COUNT if what == "end" else rng.randint(before + 1, most)
            while job.poll() is None and drawn(folder) < wanted:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, LONGEST))
            kill(job, whom, rng)
        status, told = end(job)
        if undisturbed:
            assert status == 0, told
            return f"{killed} kills within {begun} starts"
        killed += status != 0  # else it came too late


# --------------------------------------------------------------------------------------------
# Comparing


def npz_of(folder):
    return (folder / f"{NAME}.npz").read_bytes()


def assert_clean(folder):
    """Nothing is left but what is for the user."""
    left = [name for name in files_below(folder) if ".shards" in name or ".tmp" in name]
    assert not left


def assert_lawful(one, other):
    """Labels are equal, pixels within one grey level in 0.1%; return what was measured."""
    (images, labels), (others, same) = map(arrays_of, (one, other))
    np.testing.assert_array_equal(labels, same)
    apart = np.abs(images.astype(int) - others)
    assert apart.max() <= 1 and (apart > 0).mean() <= 0.001
    return f"{(apart > 0).mean():.3%} of the pixels differ, by at most {apart.max()}"


def arrays_of(folder):
    with np.load(folder / f"{NAME}.npz", allow_pickle=False) as arrays:
        return arrays["arr_0"], arrays["arr_1"]


# --------------------------------------------------------------------------------------------
# Tests


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """Undisturbed runs of one rank, by batch size."""
    place = tmp_path_factory.mktemp("wholes")
    return {
        size: run_whole("classifier_sample", place / str(size), GUIDED | {"batch_size": size})
        for size in (1, 3, 8)
    }


@pytest.mark.parametrize("launcher, ranks", [("python", 1), ("mpiexec", 2), ("torchrun", 4)])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_killed_jobs_end_with_the_same_npz(batch_size, launcher, ranks, wholes, tmp_path):
    """Guided, ancestral: byte by byte that of one rank which nobody killed."""
    rng = random.Random(10 * batch_size + ranks)
    kills = [("draw", "job"), ("draw", "rank"), ("end", rng.choice(["job", "rank"]))]
    kills = kills if ranks < 4 else kills[1:]
    flags, how = GUIDED | {"batch_size": batch_size}, {"ranks": ranks, "launcher": launcher}
    folder = tmp_path / "out"
    done = run_with_kills("classifier_sample", folder, flags, kills, rng, [how])
    assert npz_of(folder) == npz_of(wholes[batch_size])
    assert_clean(folder)
    told = ", ".join(f"{whom} {what}" for what, whom in kills)
    job = launcher if ranks == 1 else f"{launcher} -n {ranks}"
    print(f"\n{job}, batches of {batch_size}: {done} ({told}), the same npz")


def test_batch_sizes_agree(wholes):
    """Labels to the bit, pixels to rounding."""
    for size in (1, 3):
        print(f"\nbatches of {size} and of 8: {assert_lawful(wholes[size], wholes[8])}")


def test_batches_and_ranks_may_change_on_the_way(tmp_path):
    """DDIM, guided, killed thrice: what is there stays, the rest is drawn in other batches."""
    rng, whole, folder = random.Random(1), tmp_path / "whole", tmp_path / "out"
    flags = DDIM | {"batch_size": 4}
    run_whole("classifier_sample", whole, flags)
    hows = [
        {},
        {"ranks": 2, "launcher": "torchrun", "flags": {"batch_size": 3}},
        {"ranks": 3, "flags": {"batch_size": 5}},
    ]
    kills = [("draw", "job"), ("draw", "launcher"), ("draw", "rank")]
    done = run_with_kills("classifier_sample", folder, flags, kills, rng, hows)
    assert_clean(folder)
    told = assert_lawful(folder, whole)
    print(f"\n1, 2, 3 ranks and batches of 4, 3, 5 in turn, {done}: {told}")


def test_pictures_are_whole(tmp_path):
    """PNG files and the film strip, too, are those of the run that nobody killed."""
    rng, whole, folder = random.Random(2), tmp_path / "whole", tmp_path / "out"
    flags = DDIM | {"batch_size": 3, "save_images": True, "save_every_t": 2}
    run_whole("classifier_sample", whole, flags, ranks=2)
    kills = [("draw", "rank"), ("end", "job"), ("end", "rank"), ("end", "job")]
    done = run_with_kills("classifier_sample", folder, flags, kills, rng, [{"ranks": 2}])
    assert_clean(folder)
    assert {name for name in files_below(folder) if NAME in name} == {
        name for name in files_below(whole) if NAME in name
    }
    for name in (f"{NAME}.npz", f"{NAME}.png", f"{NAME}_film.png", f"{NAME}/labels.csv"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    for i, row in enumerate(arrays_of(folder)[0]):
        with Image.open(folder / NAME / f"{i:06d}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), row.squeeze(-1))
    print(f"\nwith --save_images and --save_every_t: {done}, the same files")


@pytest.mark.parametrize("noise, ranks", [(0, 1), (0.1, 2)])
def test_a_killed_cascade_is_an_undisturbed_one(noise, ranks, wholes, tmp_path):
    """28 from 14: small images of a killed run, enlarged by a killed run."""
    rng, base = random.Random(3), tmp_path / "base.npz"
    images, labels = arrays_of(wholes[8])
    small = images.reshape(COUNT, 14, 2, 14, 2, 1).astype(float).mean((2, 4)).round()
    np.savez(base, small.astype(np.uint8), labels)
    flags = COMMON | {
        "model_path": MODELS / "upsampler.pt", "base_samples": base, "low_res_noise": noise,
        "batch_size": 3, "timestep_respacing": "10",
    }  # fmt: skip
    flags |= {"use_ddim": True, "timestep_respacing": "ddim5"} if noise else {}
    run_whole("super_res_sample", tmp_path / "whole", flags, ranks=ranks)
    folder, kills = tmp_path / "out", [("draw", "job"), ("draw", "rank"), ("end", "job")]
    done = run_with_kills("super_res_sample", folder, flags, kills, rng, [{"ranks": ranks}])
    assert npz_of(folder) == npz_of(tmp_path / "whole")
    np.testing.assert_array_equal(arrays_of(folder)[1], labels)
    assert_clean(folder)
    job = f"28 from 14 on {ranks} rank{'s' * (ranks > 1)}, --low_res_noise {noise}"
    print(f"\n{job}: {done}, the same npz")


def test_a_folder_is_for_one_job_at_a_time(wholes, tmp_path):
    """A second one waits for the first, finds all done and ends; if that takes too long, it fails.

    The first of the latter is killed, and another number of steps is refused by name.
    """
    flags, folder = GUIDED | {"batch_size": 8}, tmp_path / "both"
    both = [start("classifier_sample", folder, flags) for _ in range(2)]
    assert [end(job)[0] for job in both] == [0, 0]
    assert npz_of(folder) == npz_of(wholes[8])
    assert_clean(folder)

    folder, slow = tmp_path / "out", GUIDED | {"batch_size": 1, "timestep_respacing": "250"}
    first = start("classifier_sample", folder, slow)
    while first.poll() is None and not drawn(folder):
        time.sleep(0.01)
    status, told = end(start("classifier_sample", folder, slow))
    assert status == 1 and "in use by another run" in told
    assert first.poll() is None
    kill(first, "job", random.Random(0))
    end(first)
    status, told = end(start("classifier_sample", folder, flags))
    assert status == 1 and "timestep_respacing: 250 there, 6 here" in told
    print("\ntwo jobs at a time: the second waits, or is refused after 15 s")
