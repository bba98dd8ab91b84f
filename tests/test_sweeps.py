"""The sweeps over samplers and guidance: plans, resuming, scores; scripts only pretend to draw."""

import importlib
import json
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import ROOT
from PIL import Image

from guided_diffusion.noise_levels import NoiseLevels

SCRIPT = """
import json, os, sys, time
import numpy as np
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder, count = flags["--log_dir"], int(flags["--num_samples"])
with open(os.path.join(os.path.dirname(__file__), "calls"), "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
steps = int(flags.get("--num_steps") or flags["--timestep_respacing"])
if steps == 13:
    sys.exit("error: --num_steps 13 brings bad luck")
if steps == 99:
    time.sleep(60)
stem = os.path.join(folder, f"samples_{count}x28x28x1")
kept = {"seed": int(flags["--seed"]), "flags": {"use_bf16": flags["--use_bf16"] == "True"}}
json.dump(kept, open(stem + ".json", "w"))
images = np.random.default_rng(steps).integers(0, 256, (count, 28, 28, 1), dtype=np.uint8)
np.savez(stem + ".npz", images, np.arange(count) % 10)
"""


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """The programs, as modules, running scripts that write noise and keep a list of calls."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = (
        "fashion_classifier", "garment_scores", "sweeping", "sweep_timing", "solver_sweep",
        "guidance_sweep",
    )  # fmt: skip
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules = SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    for name in ("image_sample.py", "classifier_sample.py"):
        (scripts / name).write_text(SCRIPT)
    monkeypatch.setattr(modules.sweeping, "SCRIPTS", scripts)
    monkeypatch.setattr(modules.sweeping, "POLL", 0.02)
    monkeypatch.setattr(modules.sweeping, "REAL_COUNTS", (20,))
    yield modules
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def flags(programs, tmp_path):
    """Flags for a judge made on the spot, and 40 real images of either kind."""
    torch.manual_seed(0)
    programs.fashion_classifier.save(programs.fashion_classifier.Judge(), tmp_path / "judge.pt")
    rng = np.random.default_rng(0)
    for folder in ("test", "train"):
        (tmp_path / folder).mkdir()
        for i in range(40):
            pixels = rng.integers(0, 256, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{i % 10}_{i}.png")
    return [
        "--judge", str(tmp_path / "judge.pt"), "--test_dir", str(tmp_path / "test"),
        "--out", str(tmp_path / "out"), "--num_samples", "10", "--workers", "2",
    ]  # fmt: skip


def drawn(programs):
    """Return the command lines of all scripts that were run, and forget them."""
    path = programs.sweeping.SCRIPTS / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def make_sweep(programs, flags, *more):
    return programs.sweeping.Sweep(programs.solver_sweep.parse([*flags, *more]))


# -- plans -----------------------------------------------------------------------------------------


def test_a_budget_of_calls_is_used_but_never_exceeded(programs):
    """One call a step, but for Heun's method (two, at last one) and PLMS (one more)."""
    solvers = programs.solver_sweep
    for name in solvers.SAMPLERS:
        for calls in (5, 8, 10, 15, 20, 30, 50):
            used = solvers.num_calls(name, solvers.num_steps(name, calls))
            assert used == calls - (name == "heun" and calls % 2 == 0)
            assert len(programs.guidance_sweep.levels_of(name, calls, "published")) == used
            assert solvers.plan(name, calls, 10, "published").calls == used
    assert (solvers.num_steps("heun", 20), solvers.num_steps("plms", 20)) == (10, 19)


def test_the_name_of_a_folder_tells_its_configuration(programs):
    """Different flags, different names; the two orders of UniPC are two samplers."""
    solvers = programs.solver_sweep
    plans = [
        solvers.plan(name, calls, 10, by)
        for name in solvers.SAMPLERS for calls in (5, 20) for by in ("published", "karras")
        if by == "published" or name not in ("ancestral", "ddim")  # which keep their own steps
    ] + [solvers.plan_ancestral(250, 10)]  # fmt: skip
    assert len({p.name for p in plans}) == len({(p.script, p.flags) for p in plans}) == len(plans)
    unipc3 = solvers.plan("unipc3", 20, 10, "published")
    assert unipc3.name == "unipc3_20_published"
    assert unipc3.flags[:2] == ("--sampler", "unipc") and unipc3.flags[-2:] == (
        "--solver_order", "3",
    )  # fmt: skip
    ancestral = solvers.plan_ancestral(250, 10)
    assert (ancestral.name, ancestral.flags) == ("ancestral_250", ("--timestep_respacing", "250"))


def test_guidances_have_names_of_their_own_and_no_guidance_has_one(programs):
    """All scales that guide nothing share a set; intervals and scales show in the name."""
    guiding = programs.guidance_sweep
    args, levels = guiding.parse(["--calls", "20"]), [0.1, 1.0, 10.0]
    many = [
        guiding.Guidance(kind, scale, *ends)
        for kind in guiding.KINDS for scale in (1.5, 2.0) for ends in ((), (0.2,), (0.0, 5.0))
    ]  # fmt: skip
    plans = [guiding.plan_guided(g, args, levels) for g in many]
    assert len({p.name for p in plans}) == len({(p.script, p.flags) for p in plans}) == len(plans)
    assert plans[1].flags[-2:] == ("--guidance_interval", "0.2,inf")
    off = {
        guiding.plan_guided(guiding.Guidance(k, v.off), args, levels)
        for k, v in guiding.KINDS.items()
    }
    assert len(off) == 1
    assert [p.calls for p in plans[:3]] == [20 + 3, 20 + 2, 20 + 2]


# -- drawing, scoring, going on --------------------------------------------------------------------

SMALL = ["--samplers", "ddim,unipc3", "--calls", "4,8", "--num_final", "20", "--final_calls", "8"]


def test_a_sweep_draws_scores_and_plots_and_does_nothing_twice(programs, flags, tmp_path, capsys):
    """Every set once; again, nothing; without one of the files, that set alone."""
    main, out = programs.solver_sweep.main, tmp_path / "out"
    assert main([*flags, *SMALL]) == 0
    commands = drawn(programs)
    assert len(commands) == 4 + 3 and len(set(commands)) == 7
    assert all("--preset fashion" in c and "--class_balanced True" in c for c in commands)
    printed = capsys.readouterr().out
    assert str((out / "solvers_logsnr.png").resolve()) in printed
    table = (out / "solvers_logsnr.md").read_text()
    assert table.strip() in printed
    assert "| FD (judge) of 10 images; calls: | 4 | 8 |" in table
    assert all(f"\n| {name} | " in table for name in ("unipc3", "ancestral_250"))
    assert "| ancestral_250, the first 10 | 250 | 10 |" in table
    assert main([*flags, *SMALL]) == 0
    assert drawn(programs) == [] and (out / "solvers_logsnr.md").read_text() == table
    (out / "ddim_4_published" / "samples_10x28x28x1.npz").unlink()
    assert main([*flags, *SMALL]) == 0
    (command,) = drawn(programs)
    assert "--sampler ddim --num_steps 4" in command


def test_a_set_that_fails_costs_no_other(programs, flags, capsys):
    """The sweep goes on, shows a dash, and ends with the reason in one line and exit code 1."""
    options = ["--samplers", "ddim", "--calls", "13,14", "--num_final", "0"]
    assert programs.solver_sweep.main([*flags, *options]) == 1
    shown = capsys.readouterr()
    assert "| ddim | - | " in shown.out
    last = shown.err.strip().splitlines()[-1]
    assert "1 sets are missing: ddim_13" in last and "bad luck" in last and "output.txt" in last
    assert len(drawn(programs)) == 2
    assert programs.solver_sweep.main([*flags, *options]) == 1
    assert len(drawn(programs)) == 1  # what failed is tried again


def test_an_interrupted_sweep_leaves_no_script_behind(programs, flags, monkeypatch):
    """Ctrl-C, or SIGTERM, ends the scripts that are running, and starts no further ones."""
    sweep = make_sweep(programs, flags)
    looks = iter(range(10**6))

    def look(drawings):
        if next(looks) > 3 and len(sweep._children) == 2:
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(sweep, "_look", look)
    plans = [programs.solver_sweep.plan("ddim", 99, n, "published") for n in (1, 2, 3, 4)]
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sweep.run(plans)
    assert time.monotonic() - start < 30 and not sweep._children
    assert len(drawn(programs)) <= 2


def test_progress_counts_finished_batches(programs, tmp_path):
    """Images of shards count, those of half-written files do not."""
    sweeping, npz = programs.sweeping, tmp_path / "samples_100x28x28x1.npz"
    assert sweeping.images_there(npz, 100) == 0
    shards = tmp_path / "samples_100x28x28x1.shards"
    shards.mkdir()
    for start in (0, 10, 30):
        (shards / f"images_{start:09d}_{start + 10:09d}.npy").touch()
    (shards / "images_000000040_000000050.npy.tmp7").touch()
    assert sweeping.images_there(npz, 100) == 30
    npz.touch()
    assert sweeping.images_there(npz, 100) == 100


def test_sets_of_another_seed_or_precision_are_refused(programs, flags, capsys):
    """What is there counts only if it is what was asked for."""
    options = ["--samplers", "ddim", "--calls", "4", "--num_final", "0"]
    assert programs.solver_sweep.main([*flags, *options]) == 0
    for more, words in ((["--seed", "1"], "seed 0"), (["--bf16"], "no bf16")):
        assert programs.solver_sweep.main([*flags, *options, *more]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert words in error and "choose another --out" in error


# -- scores ----------------------------------------------------------------------------------------


def test_real_features_are_read_once_for_each_judge(programs, flags, tmp_path, monkeypatch):
    """The next sweep takes them from the output folder; another judge has its own."""
    first = make_sweep(programs, flags).scorer
    scores, judging = programs.garment_scores, programs.fashion_classifier
    with monkeypatch.context() as patch:
        patch.setattr(scores, "read_some", lambda paths: pytest.fail("read again"))
        second = make_sweep(programs, flags).scorer
        np.testing.assert_array_equal(first.balls, second.balls)
    torch.manual_seed(1)
    judging.save(judging.Judge(), tmp_path / "judge.pt")
    third = make_sweep(programs, flags).scorer
    assert third.key != first.key and not np.allclose(third.balls, first.balls)


def test_scores_of_real_images_as_samples(programs, flags, tmp_path):
    """The test images themselves have distance 0, and precision and recall 1."""
    scorer = make_sweep(programs, flags).scorer
    paths = programs.garment_scores.find_images(str(tmp_path / "test"))
    images, labels = programs.garment_scores.read_some(paths)
    scores = scorer.score(images, labels)
    assert scores.fd == pytest.approx(0, abs=1e-6)
    assert (scores.precision, scores.recall, scores.num_samples) == (1, 1, 40)
    assert scores.accuracy == programs.fashion_classifier.accuracy(scorer.judge, images, labels)


def test_scores_are_kept_while_file_and_judge_are_the_same(programs, flags, tmp_path):
    """A newer file is scored anew; the first images are a set of their own."""
    scorer, npz = make_sweep(programs, flags).scorer, tmp_path / "samples_20x28x28x1.npz"
    images = np.zeros((20, 28, 28, 1), np.uint8)
    images[10:] = 255
    np.savez(npz, images, np.arange(20) % 10)
    scores, kept = scorer.score_file(npz), npz.with_suffix(".scores.json")
    content = json.loads(kept.read_text())
    content["scores"]["fd"] = 7.0  # shows what was read and not computed
    kept.write_text(json.dumps(content))
    assert scorer.score_file(npz) == replace(scores, fd=7.0)
    assert scorer.score_file(npz, first=10) == scorer.score(images[:10], np.arange(10))
    scorer.key = "of another judge"
    assert scorer.score_file(npz) == scores
    later = npz.stat().st_mtime + 10
    np.savez(npz, images[:, ::-1] // 2, np.arange(20) % 10)
    programs.sweeping.os.utime(npz, (later, later))
    assert scorer.score_file(npz).fd != scores.fd


def test_spread_takes_different_indices_from_everywhere(programs):
    spread = programs.garment_scores.spread
    np.testing.assert_array_equal(spread(4, 8), [0, 2, 4, 6])
    np.testing.assert_array_equal(spread(9, 3), [0, 1, 2])
    assert len(set(spread(7, 10))) == 7


# -- guidance --------------------------------------------------------------------------------------


def test_guidance_is_searched_scale_first_then_high_then_low(programs, flags, monkeypatch):
    """The best scale and the next one get intervals, and only those that guide other steps."""
    guiding = programs.guidance_sweep
    rounds = []

    def score_all(wanted, args, sweep, levels):
        rounds.append(wanted)
        make = programs.garment_scores.Scores
        return {
            g: make(10, abs(g.scale - 2) + abs(min(g.high, 50) - 5) + abs(g.low - 1), 1, 1, 1)
            for g in wanted
        }

    monkeypatch.setattr(guiding, "score_all", score_all)
    args = guiding.parse(flags)
    scales = [guiding.Guidance("cfg", scale) for scale in (1, 1.5, 2, 3)]
    levels = guiding.levels_of(args.sampler, args.calls, args.steps_by)
    results = guiding.search(scales, [0.5, 1, 5, 5.0001], args, sweep=None, levels=levels)
    assert rounds[0] == scales
    assert {(g.scale, g.low, g.high) for g in rounds[1]} == {
        (scale, 0, high) for scale in (2, 3) for high in (0.5, 1, 5)
    }
    assert {(g.scale, g.low, g.high) for g in rounds[2]} == {(2, 0.5, 5), (2, 1, 5)}
    best = min(results, key=lambda g: results[g].fd)
    assert best == guiding.Guidance("cfg", 2, 1, 5) and len(results) == 4 + 6 + 2


def test_guidance_sweep_reports_calls(programs, flags, capsys, tmp_path):
    """Without guidance 20 calls; half of the steps guided 10 more, of the network or beside it."""
    options = ["--cfg", "1,2", "--classifier", "0,1", "--kinds", "cfg,classifier", "--sigmas", "1"]
    options += ["--calls", "20"]
    assert programs.guidance_sweep.main([*flags, *options]) == 0
    commands = drawn(programs)
    assert len(set(commands)) == len(commands) >= 1 + 2 + 2  # no guidance, all of it, some of it
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in printed.splitlines()]
    calls = {(row[0], row[1]): (row[6], row[7]) for row in rows if len(row) == 9}
    assert calls["0", ""] == calls["1", ""] == ("20", "0")
    assert calls["2", "everywhere"] == ("40", "0") and calls["1", "everywhere"] == ("20", "20")
    assert calls["2", "0,1"] == ("30", "0") and calls["1", "0,1"] == ("20", "10")
    assert programs.guidance_sweep.main([*flags, *options]) == 0 and drawn(programs) == []


@pytest.mark.parametrize("by", ["published", "logsnr", "karras", "time"])
def test_calls_are_counted_where_the_scripts_guide(programs, by):
    """What is counted as guided agrees with the test that limits guidance while sampling."""
    guiding = programs.guidance_sweep
    noise_levels = NoiseLevels(guiding.create_gaussian_diffusion(noise_schedule="cosine"))
    levels = guiding.levels_of("dpmpp_2m", 20, by)
    told = torch.cat([noise_levels.network_timesteps(s, 1, torch.device("cpu")) for s in levels])
    for low, high in ((0.0, 1.0), (0.2, 5.0), (levels[5], levels[2]), (5.0, 1e9), (0.0, 1e-9)):
        where = guiding.Guidance("cfg", 2.0, low, high).where(levels)
        assert list(where) == noise_levels.between(low, high)(told).tolist()


# -- timing and mistakes ---------------------------------------------------------------------------


def test_timing_excludes_the_start_and_goes_into_the_plot(programs, flags, monkeypatch, capsys):
    """The difference of 2n and n images, the median of the rounds, as a ratio to ancestral."""
    solvers = programs.solver_sweep
    speed = {"ancestral": 0.1, "heun": 0.2}
    monkeypatch.setattr(
        programs.sweep_timing, "seconds_of",
        lambda drawing, args: 7 + drawing.num_samples * speed[drawing.name.split("_")[0]],
    )  # fmt: skip
    options = [*flags, "--samplers", "ancestral,heun"]
    assert solvers.main([*options, "--time"]) == 0
    printed = capsys.readouterr().out
    assert "| ancestral | 20 | 0.1000 | 1.00 |" in printed
    assert "| heun | 19 | 0.2000 | 2.00 |" in printed
    timing = solvers.read_timing(solvers.parse(options))
    assert timing == pytest.approx({"ancestral": 0.1 / 20, "heun": 0.2 / 19})


def test_the_best_of_each_kind_of_guidance_are_timed(programs, flags, monkeypatch, capsys):
    """The best everywhere, the best interval and no guidance get seconds, others a dash."""
    guiding = programs.guidance_sweep
    monkeypatch.setattr(
        programs.sweep_timing, "seconds_of",
        lambda drawing, args: 7 + drawing.num_samples * drawing.calls / 100,
    )  # fmt: skip
    options = [*flags, "--kinds", "cfg", "--cfg", "1,2,3", "--sigmas", "1", "--calls", "4"]
    assert guiding.main([*options, "--time"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    seconds = {(row[0], row[1]): row[-1] for row in cells if row[0] in "123"}
    calls = {(row[0], row[1]): int(row[6]) for row in cells if row[0] in "123"}
    timed = {key for key, cell in seconds.items() if cell != "-"}
    assert ("1", "") in timed and len(timed) in (2, 3) and len(seconds) > len(timed)
    assert all(float(seconds[key]) == calls[key] / 100 for key in timed)


def test_a_script_that_is_timed_is_run_in_full(programs, flags):
    """Its folder is thrown away; its failure is an error."""
    solvers, timing = programs.solver_sweep, programs.sweep_timing
    args = solvers.parse(flags)
    assert timing.seconds_of(solvers.plan("ddim", 4, 10, "published"), args) > 0
    with pytest.raises(ValueError, match="bad luck"):
        timing.seconds_of(solvers.plan("ddim", 13, 10, "published"), args)


@pytest.mark.parametrize(
    ("program", "options", "words"),
    [
        ("solver_sweep", ["--samplers", "ddim,rk45"], "--samplers 'ddim,rk45'"),
        ("solver_sweep", ["--samplers", "ddim,ddim"], "at most once"),
        ("solver_sweep", ["--calls", "1,5"], "numbers from 2"),
        ("solver_sweep", ["--calls", "5,x"], "--calls '5,x'"),
        ("solver_sweep", ["--judge", "none.pt"], "train it"),
        ("solver_sweep", ["--test_dir", "none"], "--test_dir 'none' does not exist"),
        ("guidance_sweep", ["--sampler", "rk45"], "--sampler 'rk45'"),
        ("guidance_sweep", ["--cfg", "1,-2"], "--cfg '1,-2'"),
        ("guidance_sweep", ["--sigmas", "0.2,inf"], "--sigmas '0.2,inf'"),
        ("guidance_sweep", ["--kinds", "none"], "--kinds 'none'"),
    ],
)
def test_mistakes_are_one_line(programs, flags, capsys, program, options, words):
    assert getattr(programs, program).main([*flags, *options]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"{program}.py: error: ") and words in error


def test_without_matplotlib_nothing_is_drawn(programs, flags, monkeypatch, capsys):
    """The sweep ends before its first image, and says what to install."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert programs.solver_sweep.main([*flags, *SMALL]) == 1
    assert "pip install" in capsys.readouterr().err and drawn(programs) == []


def test_tables(programs):
    """A row for each sampler, a dash where a set is missing, the true calls of Heun's method."""
    solvers = programs.solver_sweep
    scores = programs.garment_scores.Scores(1000, 12.3, 0.5, 0.25, 1)
    results = {"ddim": {5: scores, 10: replace(scores, fd=3.0)}, "heun": {5: scores}}
    text = "\n".join(solvers.tables(results, [5, 10]))
    assert "| FD (judge) of 1,000 images; calls: | 5 | 10 |\n| --- | --- | --- |" in text
    assert "| ddim | 12.30 | 3.00 |\n| heun | 12.30 | - |" in text
    assert "| ddim | 50.0% | 50.0% |" in text and text.rstrip().endswith("times: 5, 9.")
    assert solvers.best_of(results, 5) == ["ddim", "heun"]
    assert solvers.best_of(results, 10) == ["ddim"]
