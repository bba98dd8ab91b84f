"""The benchmark of speed: what it counts, compares and prints; no time is judged."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from benchmarking import speed_programs
from launching import ROOT
from torch import nn

from guided_diffusion.blocks import QKVAttention

PROGRAMS = (
    "fashion_classifier", "garment_scores", "sweeping",
    "speed_tasks", "speed_processes", "speed_tables", "speed_measuring", "speed", "operations",
)  # fmt: skip
TINY = (
    "--image_size 8 --num_channels 32 --channel_mult 1,2 --num_res_blocks 1 --num_heads 1 "
    "--attention_resolutions 4 --class_cond True --learn_sigma True --noise_schedule cosine "
    "--classifier_width 32 --classifier_channel_mult 1,2 --classifier_depth 1 "
    "--classifier_attention_resolutions 4 --classifier_num_head_channels 32 --batch_size 2"
)
COPY = "copy/guided_diffusion"


@pytest.fixture
def programs(monkeypatch):
    """The parts of the program, as modules."""
    with speed_programs(monkeypatch, PROGRAMS) as modules:
        yield modules


@pytest.fixture
def copy(tmp_path):
    """The folder of a copy of the package, called the same."""
    folder = tmp_path / "copy" / "guided_diffusion"
    shutil.copytree(ROOT / "guided_diffusion", folder, ignore=shutil.ignore_patterns("__pyc*"))
    return folder


def run(programs, capsys, *flags):
    """Run the program with one round; return exit code, output and errors."""
    argv = ["--flags", TINY, "--rounds", "1", "--threads", str(torch.get_num_threads()), *flags]
    code = programs.speed.main(argv)
    return code, *capsys.readouterr()


def setting_of(programs, **changes):
    """Return the tiny configuration."""
    flags = programs.speed.read_flags(TINY)
    setting = programs.speed_tasks.Setting(flags, flags.pop("batch_size"))
    return replace(setting, **changes)


def flops_of(programs, task, **changes):
    """Return the FLOPs of a call with this project's package."""
    tasks = programs.speed_tasks
    call = tasks.TASKS[task](tasks.Package(tasks.OURS), setting_of(programs, **changes))
    return tasks.count_flops(call)


# -- operations ------------------------------------------------------------------------------------


def test_operations_of_a_forward_pass_are_those_of_its_layers(programs):
    """Two for each weight and output position, and the two products of attention."""
    tasks, counted = programs.speed_tasks, []

    def count(layer, args, out):
        if isinstance(layer, QKVAttention):
            n, width, length = args[0].shape
            counted.append(2 * 2 * n * (width // 3) * length**2)
        else:
            counted.append(2 * layer.weight[0].numel() * out.numel())

    model, _ = tasks.create_model(tasks.Package(tasks.OURS), setting_of(programs))
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear | QKVAttention):
            module.register_forward_hook(count)
    x, _, y = tasks.inputs(setting_of(programs))
    with torch.no_grad():
        model(x, torch.zeros(2), y)
    assert flops_of(programs, "forward") == sum(counted)


def test_operations_grow_with_the_batch_and_with_what_is_recomputed(programs):
    """Twice the images, twice the work; recomputing attention costs less than recomputing all."""
    for task in programs.speed_tasks.TASKS:
        assert flops_of(programs, task, batch=6) == 3 * flops_of(programs, task), task
    modes = programs.speed_processes.training_modes(setting_of(programs)).values()
    more, least = (flops_of(programs, "train", **vars(mode)) for mode in modes)
    assert flops_of(programs, "train") < least < more
    assert flops_of(programs, "guided") == sum(
        flops_of(programs, task) for task in ("forward", "gradient")
    )


# -- several packages ------------------------------------------------------------------------------


def test_a_copy_computes_the_same_and_the_json_has_what_is_printed(
    programs, copy, tmp_path, capsys
):
    """Every task is measured for both, with equal outputs; the tables follow from the JSON."""
    tasks, path = programs.speed_tasks.TASKS, tmp_path / "speed.json"
    code, out, err = run(
        programs, capsys, "--package", str(copy), "--json", str(path), "--photo", "40x30",
        "--crop", "16", "--tasks", ",".join([*tasks, "data"]),
    )  # fmt: skip
    results = json.loads(path.read_text())
    assert code == 0 and results["failed"] == [], err
    assert out == programs.speed_tables.tables(results) + "\n"
    measured = results["configs"]["flags"]["tasks"] | {"data": results["data"]["packages"]}
    assert list(measured) == [*tasks, "data"]
    for what, packages in measured.items():
        ours, theirs = packages["guided_diffusion"], packages[COPY]
        assert theirs["difference"] == 0 and "difference" not in ours, what
        assert theirs["ratio"] == [theirs["seconds"] / ours["seconds"]] * 3, what
        for label in packages:
            assert f"| {programs.speed_tables.TITLES.get(what, what)} | {label} | " in out
    assert "| peak MB |" not in out and "100%" in err


def test_what_another_package_does_otherwise_shows_and_costs_no_other(programs, copy, capsys):
    """Another activation is a difference; a trainer that fails is a line, and not our failure."""
    nn_file, trainer = copy / "nn.py", copy / "fp16_util.py"
    nn_file.write_text(nn_file.read_text().replace("F.silu(x)", "F.gelu(x)"))
    trainer.write_text(trainer.read_text() + "\nMixedPrecisionTrainer = None\n")
    flags = ["--package", str(copy), "--tasks", "forward,train"]
    code, out, _ = run(programs, capsys, *flags)
    (cells,) = (row.split(" | ") for row in out.splitlines() if f"network forward | {COPY}" in row)
    assert code == 0 and float(cells[-1].rstrip(" |")) > 1e-3
    assert "| training step | guided_diffusion |" in out and f"step | {COPY} |" not in out
    assert f"\n\nNot measured: {COPY}: flags: train: TypeError: 'NoneType'" in out


def test_what_ours_cannot_do_is_an_error(programs, capsys, monkeypatch):
    """The other tasks are printed, and the exit code is 1."""
    monkeypatch.setitem(programs.speed_tasks.TASKS, "gradient", lambda *_: 1 / 0)
    code, out, err = run(programs, capsys, "--tasks", "forward,gradient")
    last = err.strip().splitlines()[-1]
    assert code == 1 and "| network forward |" in out and "| classifier gradient |" not in out
    assert last.startswith("speed.py: error: not measured: guided_diffusion: flags: gradient: Zero")


def test_a_classifier_of_the_published_function_is_the_same(programs, copy):
    """Where `create_classifier` takes no widths of levels, the class is asked, to equal effect."""
    tasks, setting = programs.speed_tasks, setting_of(programs)
    ours, theirs = tasks.Package(tasks.OURS), tasks.Package(str(copy))

    def published(
        image_size, classifier_use_fp16, classifier_width, classifier_depth,
        classifier_attention_resolutions, classifier_use_scale_shift_norm,
        classifier_resblock_updown, classifier_pool,
    ):  # fmt: skip
        pytest.fail("this network cannot be asked for")

    theirs.script_util.create_classifier = published
    for extras in (False, True):
        calls = [tasks.gradient(p, replace(setting, extras=extras)) for p in (ours, theirs)]
        (expected, found) = (call(3) for call in calls)
        assert expected.abs().max() > 0 and torch.equal(expected, found)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_tasks_in_half_precision(programs, precision):
    """Outputs are near those of float32, but not the same, in training after a step, too."""
    tasks, full = programs.speed_tasks, setting_of(programs)
    package = tasks.Package(tasks.OURS)
    for name, task in tasks.TASKS.items():
        half = replace(full, precision=precision)
        results = []
        for setting in (full, half):
            with tasks.session(name, setting):
                call = task(package, setting)
                torch.manual_seed(0)
                results.append([call(i).float() for i in range(2)])
        for expected, found in zip(*results, strict=True):
            error = (found - expected).abs().max() / expected.abs().max()
            assert 0 < error < 0.1, (name, error)


# -- times and memory ------------------------------------------------------------------------------


def test_rounds_alternate_and_ratios_are_of_one_round(programs):
    """Every other round goes backwards; a slow round of both leaves their ratio alone."""
    measuring, order = programs.speed_measuring, []
    slow = [1.0, 5.0, 2.0]

    def clock(name, factor):
        def seconds(i):
            order.append(name)
            return factor * slow[i]

        return seconds

    clocks = {"ours": clock("ours", 1), "theirs": clock("theirs", 1.5)}
    seconds = measuring.interleave(clocks, 3, lambda: order.append("-"))
    assert "".join(name[0] for name in order) == "o-t-t-o-o-t-"
    records = measuring.compare(seconds, "ours")
    assert records["theirs"]["ratio"] == [1.5, 1.5, 1.5] and "ratio" not in records["ours"]
    assert (records["ours"]["seconds"], records["theirs"]["rounds"]) == (2, [1.5, 7.5, 3])


def test_other_processes(programs, tmp_path):
    """A step holds weights, gradients, moments and averages; the script's first step ends."""
    tasks, processes = programs.speed_tasks, programs.speed_processes
    package, setting = tasks.Package(tasks.OURS), setting_of(programs)
    model, _ = tasks.create_model(package, setting)
    weights = sum(param.nbytes for param in model.parameters())
    assert 5 * weights < processes.peak(package, "train", setting, 1) < 5 * weights + 100e6
    env = processes.environment(package, "cpu", 1)
    flags = {n: v for n, v in setting.flags.items() if not n.startswith("classifier_")}
    processes.write_photographs(tmp_path / "images", 4, (8, 8))
    (tmp_path / "log").mkdir()
    flags |= {"data_dir": tmp_path / "images", "batch_size": 2}
    assert processes.first_step_seconds(package, env, flags, tmp_path / "log") > 0
    header, row = (tmp_path / "log" / "progress.csv").read_text().splitlines()
    assert dict(zip(header.split(","), row.split(","), strict=True))["samples"] == "2"
    with pytest.raises(ValueError, match="no first training step: .*--data_dir"):
        processes.first_step_seconds(package, env, {"batch_size": 0}, tmp_path)


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--config 29", "--config '29'"),
        ("--tasks forward,x", "--tasks 'forward,x'"),
        ("--tasks memory", "memory of which"),
        ("--package nowhere.else", "--package nowhere.else"),
        ("--package ./nowhere", "no such folder"),
        ("--package json", "no script_util"),
        ("--rounds 0", "0 is not above 0"),
        ("--photo 5", "invalid size value"),
        ("--json nowhere/speed.json", "no such folder"),
        (["--flags", "--image_sise 8"], "--image_sise"),
        (["--flags", "--image_size -3"], "--image_size -3"),
        (["--flags", "--image_size 28"], "give --channel_mult"),
        (["--flags", "--classifier_width 33"], "--classifier_width 33"),
        (["--flags", "--use_fp16 True"], "--use_fp16"),
        (["--flags", "'"], "quotation"),
    ],
)
def test_bad_flags_are_one_line(programs, capsys, flags, words):
    """They are found before anything is measured."""
    try:
        code = programs.speed.main(flags.split() if isinstance(flags, str) else flags)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert code in (1, 2) and out == ""
    assert len(err.splitlines()) == 1 and words in err and err.startswith("speed.py: ")


# -- operations ------------------------------------------------------------------------------------


def test_operations_fall_into_kinds(programs):
    """By what their names contain, whether they lead there or back."""
    kind_of = programs.operations.kind_of
    assert kind_of("aten::mkldnn_convolution") == "convolutions"
    assert kind_of("aten::convolution_backward") == "convolutions"
    assert kind_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert kind_of("aten::native_group_norm_backward") == "normalization"
    assert kind_of("aten::_fused_adamw_") == "optimizer"
    assert kind_of("aten::sin") == programs.operations.REST


def test_a_row_for_each_task_tells_shares_of_its_time(programs, monkeypatch, capsys):
    """They add up to all of it; only training has an optimizer."""
    tiny = programs.speed.read_flags(TINY)
    monkeypatch.setattr(programs.operations, "CONFIGS", {"tiny": tiny})
    argv = ["--config", "tiny", "--calls", "1", "--tasks", "forward,train"]
    assert programs.operations.main(argv) == 0
    head, _, *rows = [line for line in capsys.readouterr().out.splitlines() if "|" in line]
    names = [cell.strip() for cell in head.strip("|").split("|")]
    for row, task in zip(rows, ("forward", "train"), strict=True):
        cells = dict(zip(names, (cell.strip() for cell in row.strip("|").split("|")), strict=True))
        assert cells["task"] == task
        shares = [float(cell.rstrip("%")) for cell in cells.values() if cell.endswith("%")]
        assert sum(shares) == pytest.approx(100, abs=0.5)
        assert (cells["optimizer"] != "0.0%") == (task == "train")
        assert float(cells["convolutions, of the product"]) > 0
