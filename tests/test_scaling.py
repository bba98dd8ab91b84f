"""The benchmark of growth: what it counts, keeps, goes on with and prints; no time is judged."""

import csv
import json
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarking import speed_programs
from PIL import Image

PROGRAMS = (
    "fashion_classifier", "garment_scores", "sweeping", "sweep_timing", "solver_sweep",
    "speed_tasks", "speed_processes", "speed_tables", "speed_measuring", "speed",
    "scaling_parts", "scaling_tables", "scaling",
)  # fmt: skip
TINY = {
    "batches": "1,2", "sizes": "8,16", "widths": "32,64", "ranks": "1,2", "rank_batch": "4",
    "steps": "10", "shares": "0,50,100", "sampling_steps": "2", "rounds": "1",
}  # fmt: skip
ROWS = {
    "batch": [1, 2], "resolution": [8, 16], "width": [32, 64],
    "ranks": [("strong", 1, 4), ("strong", 2, 2), ("weak", 1, 4), ("weak", 2, 4)],
    "interval": [(0, 0), (50, 1), (100, 2)],
}  # fmt: skip
KEYS = {"ranks": ("scaling", "ranks", "batch_size"), "interval": ("share", "guided_steps")}


@pytest.fixture
def programs(monkeypatch):
    """The parts of the program, as modules, which only pretend to start other processes."""
    with speed_programs(monkeypatch, PROGRAMS) as modules:
        modules.real = modules.speed_processes.peak, modules.scaling_parts.images_per_second
        monkeypatch.setattr(modules.speed_processes, "peak", lambda *_: 12_345_678)
        monkeypatch.setattr(
            modules.scaling_parts, "images_per_second", lambda row, *_: 100.0 + row["batch_size"]
        )
        yield modules


def run(programs, capsys, **flags):
    """Run the program with tiny sizes; return exit code, output and errors."""
    flags = TINY | {"threads": torch.get_num_threads()} | flags
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    try:
        code = programs.scaling.main(argv)
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def spy_on(programs, monkeypatch, **instead):
    """Note which parts are measured; `instead` gives other functions for some. Return the notes."""
    measured, parts = [], programs.scaling.PARTS
    for name, part in parts.items():
        work = instead.get(name, part.measure)

        def measure(*args, name=name, work=work):
            measured.append(name)
            return work(*args)

        monkeypatch.setitem(parts, name, replace(part, measure=measure))
    return measured


# -- the whole program -----------------------------------------------------------------------------


def test_each_part_has_a_row_for_each_size_and_the_json_has_what_is_printed(
    programs, capsys, tmp_path, monkeypatch
):
    """Tables and picture follow from the file, without measuring; the bar comes to its end."""
    path, pictures = tmp_path / "scaling.json", [tmp_path / "1.png", tmp_path / "2.png"]
    code, out, err = run(programs, capsys, json=path, plot=pictures[0])
    assert code == 0 and "100%" in err, err
    found = json.loads(path.read_text())["parts"]
    assert list(found) == list(ROWS)
    for name, part in found.items():
        keys = KEYS.get(name, ("value",))
        values = [tuple(row[key] for key in keys) for row in part["rows"]]
        assert values == [row if isinstance(row, tuple) else (row,) for row in ROWS[name]]
        table = out.split(f"**{name}**")[1].split("**")[0]
        assert sum(line.startswith("| ") for line in table.splitlines()) == 2 + len(values), name

    assert "Runs of each: 1. " in out

    measured = spy_on(programs, monkeypatch)
    assert run(programs, capsys, from_json=path, plot=pictures[1]) == (0, out, "")
    assert measured == [] and pictures[0].read_bytes() == pictures[1].read_bytes()
    _, some, _ = run(programs, capsys, from_json=path, parts="width", plot=pictures[1])
    assert "**width**" in some and "**batch**" not in some and len(some) < len(out)
    sizes = [Image.open(picture).size for picture in pictures]
    assert sizes[0][0] > 2 * sizes[1][0] and sizes[0][1] > 1.5 * sizes[1][1]


def test_an_interrupted_run_goes_on_with_what_is_missing(programs, capsys, tmp_path, monkeypatch):
    """What is there is neither measured again nor changed."""
    path, wanted = tmp_path / "scaling.json", {"parts": "ranks,interval"}

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        measured = spy_on(programs, patch, interval=stop)
        code, out, err = run(programs, capsys, json=path, **wanted)
        assert (code, out, measured) == (130, "", ["ranks", "interval"])
        assert err.endswith("scaling.py: error: stopped: the same command goes on\n")
    kept = json.loads(path.read_text())["parts"]
    assert list(kept) == ["ranks"]

    measured = spy_on(programs, monkeypatch)
    code, out, _ = run(programs, capsys, json=path, **wanted)
    content = path.read_bytes()
    assert code == 0 and measured == ["interval"]
    assert json.loads(content)["parts"]["ranks"] == kept["ranks"]
    assert run(programs, capsys, json=path, **wanted) == (0, out, "")
    assert measured == ["interval"] and path.read_bytes() == content
    code, out, err = run(programs, capsys, json=path, batches="1", **wanted)
    assert (code, out) == (2, "") and "is of batches [1, 2], not [1]: choose another" in err


def test_a_part_that_fails_is_an_error_and_those_before_it_are_kept(
    programs, capsys, tmp_path, monkeypatch
):
    """As where there is no memory for the largest network."""
    path = tmp_path / "scaling.json"

    def fail(*_):
        raise RuntimeError("first line\nnot enough memory")

    spy_on(programs, monkeypatch, interval=fail)
    code, out, err = run(programs, capsys, json=path, parts="ranks,interval")
    assert (code, out) == (1, "") and list(json.loads(path.read_text())["parts"]) == ["ranks"]
    assert err.endswith("scaling.py: error: interval: not enough memory\n")


# -- operations ------------------------------------------------------------------------------------


def flops_of(programs, part, task, **sizes):
    """Return the FLOPs an image of each size of a part."""
    parts, tasks = programs.scaling_parts, programs.speed_tasks
    args = Namespace(device="cpu", precision="float32", **sizes)
    settings = parts.settings_of(part, args)
    calls = {n: tasks.TASKS[task](parts.ours(), s) for n, s in settings.items()}
    return [tasks.count_flops(call) / settings[n].batch for n, call in calls.items()]


@pytest.mark.parametrize(
    "part, flag, sizes, powers",
    [
        ("resolution", "sizes", [4, 8, 16, 32], (0, 2, 4)),  # embeddings, layers, attention
        ("width", "widths", [32, 64, 96, 128], (0, 1, 2)),  # attention and ends, other layers
    ],
)
def test_operations_grow_as_they_should(programs, part, flag, sizes, powers):
    """Three sizes tell the three coefficients of a polynomial, on which the fourth must lie."""
    flops = flops_of(programs, part, "forward", **{flag: sizes})
    terms = np.array(sizes, dtype=float)[:, None] ** powers
    coefficients = np.linalg.solve(terms[:3], flops[:3])
    assert coefficients[1] > 0 and coefficients[2] > 0
    assert terms[3] @ coefficients == pytest.approx(flops[3], rel=1e-9)
    assert terms[3, 1:] @ coefficients[1:] == pytest.approx(flops[3], rel=0.1)  # what counts


def test_operations_of_an_image_do_not_depend_on_the_batch(programs):
    """A training step has a forward pass, and about twice as much for gradients."""
    forward, train = (
        flops_of(programs, "batch", task, batches=[1, 3]) for task in ("forward", "train")
    )
    assert forward[0] == forward[1] > 0 and train[0] == train[1]
    assert 2.5 < train[0] / forward[0] <= 3


def test_speed_is_a_share_of_the_product_of_the_same_round(programs):
    """A round in which both are slow counts like the others; images/s are those of the median."""
    programs.speed_tasks.SIDE = 100  # a product of 2e6 FLOPs
    record = programs.scaling_parts.speed_record(
        flops=6_000_000, batch=3, seconds=[2.0, 40.0, 3.0], product=[1.0, 10.0, 3.0]
    )
    assert record["product_share"] == pytest.approx(1.5)  # of 1.5, 0.75 and 3
    assert (record["images_per_s"], record["gflops_per_image"]) == (1.0, 0.002)


# -- ranks -----------------------------------------------------------------------------------------


def test_the_script_runs_on_ranks(programs, monkeypatch, tmp_path):
    """Each rank has its own images in each step; the speed is that of the rows after the second."""
    parts, photos = programs.scaling_parts, tmp_path / "images"
    programs.speed_processes.write_photographs(photos, 8, (28, 28))
    rows, told, real = [], {}, parts.launch

    def launch(words, env, name):
        real(words, env, name)
        told.update(env, **dict(zip(words, words[1:], strict=False)))
        folder = Path(told["--log_dir"])
        with open(folder / "progress.csv", newline="") as file:
            rows.extend(csv.DictReader(file))

    monkeypatch.setattr(parts, "launch", launch)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    args = Namespace(device="cpu", precision="bfloat16", steps=10)
    speed = programs.real[1]({"ranks": 2, "threads": 1, "batch_size": 3}, args, photos)
    assert (told["OMP_NUM_THREADS"], told["--use_bf16"]) == ("1", "True")
    assert [row["samples"] for row in rows] == ["6", "36", "66"]
    assert speed == float(rows[-1]["images_per_second"])


def test_a_launcher_that_fails_is_told_in_a_line_and_one_that_hangs_is_ended(programs, monkeypatch):
    """The line is that of the script, not the last of the launcher's."""
    launch = programs.scaling_parts.launch
    words = [sys.executable, "-c", "print('x.py: error: bad luck\\nbye'); raise SystemExit(3)"]
    with pytest.raises(ValueError, match="^2 ranks: exit code 3: x.py: error: bad luck$"):
        launch(words, {}, "2 ranks")
    monkeypatch.setattr(programs.speed_processes, "TIMEOUT", 0.2)
    start = time.monotonic()
    with pytest.raises(ValueError, match="^2 ranks: no end after 0 s$"):
        launch([sys.executable, "-c", "import time; time.sleep(60)"], {}, "2 ranks")
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    "device, threads, ideal",
    [
        ("cpu", [2, 1, 1], [9, 9, 9]),
        ("cpu", [1, 1, 1], [9, 18, 18]),
        ("cuda", [2, 1, 1], [9, 18, 36]),
    ],
)
def test_the_ideal_grows_with_the_cores_that_are_used(programs, device, threads, ideal):
    """Ranks on all cores of a machine can have no more together; GPUs bring their own."""
    rows = [
        {"scaling": "strong", "ranks": n, "threads": count, "images_per_s": 9.0 / n}
        for n, count in zip((1, 2, 4), threads, strict=True)
    ]
    others = [row | {"scaling": "weak", "images_per_s": 1.0} for row in rows]
    part = {"flags": {"device": device}, "rows": others + rows}
    found = programs.scaling_tables.with_ideals(part, "strong", {"cores": 2})
    assert found == list(zip(rows, ideal, strict=True))


# -- guided steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("share, guided", [(0, []), (50, [333, 0]), (100, [999, 666, 333, 0])])
def test_only_the_last_steps_are_guided(programs, monkeypatch, share, guided):
    """A share of the calls of the classifier is left out, and nothing else of the run."""
    parts, tasks, seen = programs.scaling_parts, programs.speed_tasks, []
    args = Namespace(sampling_steps=4, shares=[share])
    flags = parts.SMALL | {"timestep_respacing": "4"}
    setting = tasks.Setting(flags, 2, extras=True)

    def cond_fn(x, t, y):
        seen.append(t.tolist())
        return torch.zeros_like(x)

    monkeypatch.setattr(tasks, "cond_fn_of", lambda *_: cond_fn)
    sample = parts.guided_run(setting, parts.guided_steps(args)[share])(0)
    assert seen == [[t, t] for t in guided] and sample.shape == (2, 3, 28, 28)


def test_what_is_expected_is_the_calls(programs, capsys, tmp_path, monkeypatch):
    """A step has a call of the network and, where it is guided, one of the gradient."""
    monkeypatch.setattr(
        programs.scaling_parts, "interleave",
        lambda clocks, *_: {n: [{"forward": 3.0, "gradient": 8.0}.get(n, 42.0)] for n in clocks},
    )  # fmt: skip
    code, out, _ = run(programs, capsys, parts="interval", json=tmp_path / "scaling.json")
    assert code == 0
    assert "| 50 % | 1 | 21000.0 | 7000.0 | 3.00 |" in out  # of two steps, of 42 s together
    assert "3000.0 ms for the network and 8000.0 ms" in out


# -- memory ----------------------------------------------------------------------------------------


def test_memory_is_that_of_a_training_step(programs, monkeypatch, capsys, tmp_path):
    """Weights, gradients, two moments and an average are in it."""
    parts, path, seen = programs.scaling_parts, tmp_path / "scaling.json", []

    def peak(package, task, *rest):
        seen.append((task, *rest))
        return programs.real[0](package, task, *rest)

    monkeypatch.setattr(programs.speed_processes, "peak", peak)
    code, _, err = run(programs, capsys, parts="width", widths="32", json=path)
    assert code == 0, err
    args = Namespace(device="cpu", precision="float32", widths=[32])
    setting = parts.settings_of("width", args)[32]
    assert seen == [("train", setting, torch.get_num_threads())]
    model, _ = programs.speed_tasks.create_model(parts.ours(), setting)
    weights = sum(param.nbytes for param in model.parameters())
    (row,) = json.loads(path.read_text())["parts"]["width"]["rows"]
    assert 5 * weights < row["peak_bytes"] < 5 * weights + 150e6


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"parts": "batch,x"}, "--parts 'batch,x'"),
        ({"batches": "0,1"}, "--batches '0,1'"),
        ({"sizes": "30"}, "--sizes 30: --image_size 30 is not divisible by 4"),
        ({"widths": "48"}, "--widths 48: --num_channels 48"),
        ({"ranks": "1,3"}, "--rank_batch 4 is no multiple of --ranks 3"),
        ({"ranks": "two"}, "--ranks 'two'"),
        ({"shares": "50,101"}, "--shares 101 is more than 100"),
        ({"steps": "9"}, "--steps 9: give 10 or more"),
        ({"rounds": "0"}, "0 is not above 0"),
        ({"json": "nowhere/scaling.json"}, "--json nowhere/scaling.json: there is no such folder"),
        ({"plot": "nowhere/scaling.png"}, "--plot nowhere/scaling.png: there is no such folder"),
        ({"from_json": "nowhere.json"}, "--from_json nowhere.json: "),
        ({"from_json": __file__}, f"--from_json {__file__}: "),
        ({"from_json": "a.json", "json": "b.json"}, "leave out one"),
    ],
)
def test_bad_flags_are_one_line(programs, capsys, monkeypatch, flags, words):
    """They are found before anything is measured."""
    measured = spy_on(programs, monkeypatch)
    code, out, err = run(programs, capsys, **flags)
    assert (code, out, measured) == (2, "", [])
    assert len(err.splitlines()) == 1 and words in err and err.startswith("scaling.py: error: ")


def test_files_of_others_are_refused(programs, capsys, tmp_path):
    """They stay as they are."""
    path = tmp_path / "speed.json"
    path.write_text('{"machine": {}, "configs": {}}')
    for flag in ("json", "from_json"):
        code, out, err = run(programs, capsys, **{flag: path})
        assert (code, out) == (2, "")
        assert err == f"scaling.py: error: --{flag} {path} is no file that scaling.py wrote\n"
    assert path.read_text() == '{"machine": {}, "configs": {}}'


def test_a_picture_needs_matplotlib_and_tables_do_not(programs, capsys, tmp_path, monkeypatch):
    """That is told before anything is measured."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    measured = spy_on(programs, monkeypatch)
    code, out, err = run(programs, capsys, plot=tmp_path / "scaling.png")
    assert (code, out, measured) == (2, "", []) and "the plot needs matplotlib" in err
    code, out, _ = run(programs, capsys, parts="ranks")
    assert code == 0 and "**ranks**" in out
