"""Laws of the roofline model of benchmarks/gpu_estimates.py: operations, their time, the tables."""

import importlib
import json
import math
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from launching import ROOT
from torch import nn

from guided_diffusion import logger
from guided_diffusion.metering import count_flops, peak_memory
from guided_diffusion.presets import Preset

PROGRAMS = (
    "fashion_classifier", "garment_scores", "sweeping", "speed_tasks", "speed_processes",
    "speed_tables", "speed_measuring", "speed", "gpu_roofline", "gpu_estimates",
)  # fmt: skip
MODEL = {
    "num_channels": 32, "channel_mult": "1,2", "num_res_blocks": 1, "num_heads": 1,
    "attention_resolutions": "8", "class_cond": True, "learn_sigma": True,
    "resblock_updown": True,
}  # fmt: skip
CLASSIFIER = {
    "image_size": 16, "classifier_width": 32, "classifier_channel_mult": "1,2",
    "classifier_depth": 1, "classifier_attention_resolutions": "8",
    "classifier_num_head_channels": 32,
}  # fmt: skip
TINY = {
    "tiny": Preset(
        {}, {"diffusion model": MODEL | {"image_size": 16}, "classifier": CLASSIFIER},
        {"use_fp16": True},
    ),
    "tiny_uncond": Preset(
        {}, {"diffusion model": MODEL | {"image_size": 16, "class_cond": False},
             "classifier": CLASSIFIER},
    ),
    "tiny_upsampler": Preset({}, {"upsampler": MODEL | {"large_size": 16, "small_size": 8}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def programs():
    """The parts of the program, as modules, which know small networks, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        for name in PROGRAMS:
            patch.delitem(sys.modules, name, raising=False)
        modules = SimpleNamespace(**{name: importlib.import_module(name) for name in PROGRAMS})
        for name, preset in TINY.items():
            patch.setitem(modules.gpu_roofline.PRESETS, name, preset)
        patch.setitem(modules.gpu_estimates.TRAINED, "tiny", (1000, 64))
        patch.setitem(modules.gpu_estimates.MEASURED, "tiny", (4, 200.0, 50.0))
        yield modules
    for name in PROGRAMS:
        sys.modules.pop(name, None)
    logger.reset()


@pytest.fixture
def run(programs, capsys, tmp_path):
    """Run the program on a small network; return what it printed, and its JSON."""

    def run_program(*flags):
        path = tmp_path / "figures.json"
        argv = ["--cases", "tiny", "--preset", "tiny", "--batch_size", "2", "--json", str(path)]
        assert programs.gpu_estimates.main([*argv, *flags]) == 0
        return capsys.readouterr().out, json.loads(path.read_text())

    return run_program


def watch(programs, call, device="meta"):
    """Return the operations of a call."""
    with programs.gpu_roofline.Recorder(device) as recorder:
        call()
    return recorder.ops


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


# -- operations ------------------------------------------------------------------------------------


def test_a_matrix_product_reads_its_factors_writes_itself_and_has_two_flops_a_term(programs):
    """2 m n k FLOPs, and m k + k n + m n numbers of two or four bytes."""
    for dtype, size, unit in ((torch.float32, 4, "single"), (torch.float16, 2, "half")):
        a, b = meta(3, 5, dtype=dtype), meta(5, 7, dtype=dtype)
        (op,) = watch(programs, lambda: a @ b)  # noqa: B023
        assert op == ("mm", unit, 2 * 3 * 5 * 7, size * (3 * 5 + 5 * 7 + 3 * 7))


def test_a_convolution_moves_images_weights_and_bias(programs):
    """It goes by its own rate in float32, where GPUs have one."""
    conv, x = nn.Conv2d(3, 8, 3, padding=1, device="meta"), meta(2, 3, 16, 16)
    with torch.no_grad():
        (op,) = watch(programs, lambda: conv(x))
    numbers = x.numel() + 8 * 3 * 9 + 8 + 2 * 8 * 16 * 16
    assert op == ("convolution", "convolution", 2 * 9 * 3 * 2 * 8 * 16 * 16, 4 * numbers)


def test_attention_is_one_operation_that_keeps_no_matrix(programs):
    """It moves q, k, v, the result and a norm of each row; backward has twice the products."""
    roofline, shape = programs.gpu_roofline, (2, 3, 64, 8)
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    q, k, v = (torch.zeros(shape, requires_grad=True) for _ in range(3))
    rows = 2 * 3 * 64
    with roofline.Recorder("cpu") as recorder:
        F.scaled_dot_product_attention(q, k, v).sum().backward()
    found = {op.name: op for op in recorder.ops}
    forward = found[attend.__name__]
    assert forward.flops == 2 * (2 * 2 * 3 * 64 * 64 * 8)
    assert forward.nbytes == 4 * (4 * rows * 8 + rows)
    assert found[f"{attend.__name__}_backward"].flops == 2 * forward.flops


def test_views_move_nothing_and_are_not_launched(programs):
    """Nor is memory that is only reserved; a copy is read and written."""
    x = meta(4, 6)
    views = lambda: (  # noqa: E731
        x.view(24).reshape(2, 12).t(), x[:2].detach(), x.chunk(2, dim=1), x.expand(3, 4, 6),
        x.flatten().unsqueeze(0), torch.empty_like(x), x.to(torch.float32), x.contiguous(),
    )  # fmt: skip
    assert watch(programs, views) == []
    (copy,) = watch(programs, lambda: x.t().contiguous())
    assert copy.nbytes == 2 * x.nbytes


def test_what_is_changed_in_place_is_read_and_written(programs):
    """But not read where it is only filled; what is broadcast is read once."""
    x, y = meta(10, 6), meta(10, 6)
    moved = lambda call: sum(op.nbytes for op in watch(programs, call))  # noqa: E731
    assert moved(lambda: x.add_(y)) == 3 * x.nbytes
    assert moved(lambda: x.add_(x)) == 2 * x.nbytes
    assert moved(lambda: x.copy_(y)) == 2 * x.nbytes
    assert moved(lambda: x.zero_()) == x.nbytes
    assert moved(lambda: torch._foreach_add_([x], [y])) == 3 * x.nbytes
    assert moved(lambda: x + y[:1].expand(10, 6)) == 3 * x.nbytes  # y's memory is all there
    assert moved(lambda: x + meta(1, 6).expand(10, 6)) == 2 * x.nbytes + 6 * 4


def test_what_stays_on_the_cpu_costs_a_gpu_nothing(programs):
    """Such as the counts of steps that AdamW keeps there; on the CPU itself they count."""
    x = torch.ones(3)
    assert watch(programs, lambda: x + x) == []
    assert [op.name for op in watch(programs, lambda: x + x, "cpu")] == ["add"]


# -- steps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_flops_of_a_step_are_those_of_the_meter(programs, name, precision):
    """Of a guided step and an unguided one; they do not depend on how attention is computed."""
    roofline = programs.gpu_roofline
    case = roofline.for_sampling(name, precision)
    for guided in (True, False):
        step = partial(roofline.take_step, case, 3, guided)
        assert roofline.sampling(case, 3, guided).flops == count_flops(step, *case.networks())
    more = roofline.sampling(case, 3).flops > roofline.sampling(case, 3, False).flops
    assert more == (name != "tiny_upsampler")


@pytest.mark.parametrize("name", ["tiny_uncond", "tiny_upsampler"])
def test_the_flops_of_training_are_those_of_the_meter(programs, name):
    """A way there and back, to which the optimizer adds no products."""
    roofline = programs.gpu_roofline
    case = roofline.create(name, "float32", guided=False)
    loss = lambda: case.process.training_losses(case.model, *case.inputs(2))["loss"].mean()  # noqa: E731
    seen = roofline.training(name, "float32", 2)
    assert seen.flops == count_flops(lambda: loss().backward(), case.model)
    names = [op.name for op in seen.ops]
    assert names.count("_fused_adamw_") == names.count("_foreach_norm") / 2 == 1
    weights = sum(param.nbytes for param in case.model.parameters())
    assert 5 * weights < seen.memory < 5 * weights + 16e6  # gradients, moments, the average


def test_half_precision_halves_what_products_move_but_not_their_flops(programs):
    """They go by another rate; the preset's float16 leaves the classifier as it is."""
    roofline = programs.gpu_roofline
    steps = {p: roofline.sampling(roofline.for_sampling("tiny", p), 8) for p in
             ("float32", "preset", "float16")}  # fmt: skip
    flops = {
        precision: {u: sum(op.flops for op in seen.ops if op.unit == u) for u in ("half", "single")}
        for precision, seen in steps.items()
    }
    assert len({seen.flops for seen in steps.values()}) == 1
    assert flops["float32"]["half"] == 0 < flops["preset"]["half"] < flops["float16"]["half"]
    full, half = (
        [op for op in steps[p].ops if op.name == "convolution"] for p in ("float32", "float16")
    )
    narrow = [(one, other) for one, other in zip(full, half, strict=True) if other.unit == "half"]
    assert len(narrow) > 0.8 * len(full)  # the others: of the attention that pools
    assert all(one.nbytes == 2 * other.nbytes for one, other in narrow)


def test_a_batch_is_halved_until_it_fits(programs):
    """A larger memory never takes a smaller batch, and 1 is the least."""
    roofline = programs.gpu_roofline
    case, gpu = roofline.for_sampling("tiny", "preset"), roofline.GPUS["H100"]
    sizes = [
        roofline.largest_batch(case, replace(gpu, memory=size), 64)
        for size in (0, 1.2e7, 1.6e7, 3.2e7, 80e9)
    ]
    assert sizes == sorted(sizes) and (sizes[0], sizes[-1]) == (1, 64) and len(set(sizes)) > 3
    for size, batch in zip((1.2e7, 1.6e7, 3.2e7), sizes[1:4], strict=True):
        assert 64 % batch == 0 and roofline.sampling(case, batch).memory <= 0.9 * size


def test_memory_is_that_of_weights_and_a_step(programs):
    """It grows with the batch, in equal parts."""
    roofline = programs.gpu_roofline
    case = roofline.for_sampling("tiny", "preset")
    weights = sum(param.nbytes for network in case.networks() for param in network.parameters())
    one, two, four = (roofline.sampling(case, batch).memory - weights for batch in (1, 2, 4))
    assert one == peak_memory(partial(roofline.take_step, case, 1), *case.networks()) > 0
    assert four - two == pytest.approx(2 * (two - one), rel=0.01)


# -- time ------------------------------------------------------------------------------------------


def test_a_wider_memory_is_never_slower_and_halves_what_it_bounds(programs):
    """Where nothing else bounds, twice the bandwidth is half the time; so it is with FLOPs."""
    roofline = programs.gpu_roofline
    ops = roofline.sampling(roofline.for_sampling("tiny", "preset"), 2).ops
    copies = [op for op in ops if not op.flops]
    products = [op._replace(nbytes=0) for op in ops if op.flops]
    for gpu in roofline.GPUS.values():
        wide = replace(gpu, bandwidth=2 * gpu.bandwidth)
        quick = replace(gpu, half=2 * gpu.half, convolution=2 * gpu.convolution,
                        single=2 * gpu.single)  # fmt: skip
        total = lambda ops, device, overhead=0.0: roofline.time_of(ops, device, overhead).total  # noqa: E731
        assert total(ops, wide) < total(ops, gpu) <= 2 * total(ops, wide)
        assert total(copies, wide) == pytest.approx(total(copies, gpu) / 2)
        assert total(products, wide) == total(products, gpu)
        assert total(products, quick) == pytest.approx(total(products, gpu) / 2)
        assert total(ops, gpu, 1e-6) == pytest.approx(total(ops, gpu) + len(ops) * 1e-6)


def test_an_operation_takes_the_longer_of_its_two_times(programs):
    """By the rate of its kind; the FLOPs alone are told apart."""
    roofline = programs.gpu_roofline
    device = roofline.Hardware("slow", half=8, convolution=4, single=2, bandwidth=10)
    ops = [roofline.Op("", unit, 16, 30) for unit in ("half", "convolution", "single")]
    time = roofline.time_of(ops, device, 0.5)
    assert time == (4 + 8, 3, 1.5, 2 + 4 + 8) and time.total == 16.5


# -- the command -----------------------------------------------------------------------------------


def test_time_grows_with_steps_samples_and_price_and_falls_with_gpus(run):
    """All of it linearly; guiding everywhere costs more than within an interval, or nowhere."""
    _, once = run("--steps", "100", "--calls", "10", "--num_samples", "1000", "--price", "1")
    _, more = run("--steps", "200", "--calls", "30", "--num_samples", "5000", "--price", "3")
    keyed = lambda rows: {(r["gpu"], r["sampler"], r["guided_calls"] / r["calls"]): r for r in rows}  # noqa: E731
    first, second = keyed(once["samples"]), keyed(more["samples"])
    ends = [key for key in first if key[2] in (0, 1)]
    assert len(ends) == 3 * 2 * 2
    for key in ends:
        longer = second[key]["calls"] / first[key]["calls"]
        for row, hours in ((first[key], 1), (second[key], 5 * longer)):
            assert row["gpu_hours"] == pytest.approx(hours * first[key]["gpu_hours"])
            assert row["images_per_s"]["64"] == pytest.approx(8 * row["images_per_s"]["8"])
            assert row["hours"]["8"] == pytest.approx(row["gpu_hours"] / 8)
        assert second[key]["dollars"] == pytest.approx(15 * longer * first[key]["dollars"])
    hours = [r["gpu_hours"] for r in once["samples"][:3]]
    assert hours == sorted(hours) and len(set(hours)) == 3
    steps = once["steps"][0]
    sampled = once["samples"][2]
    assert sampled["images_per_s"]["8"] == pytest.approx(8 * steps["images_per_s"] / 100)


def test_the_tables_say_that_nothing_was_measured_and_what_was_assumed(run):
    """A bound and, in brackets, what efficiency makes of it; every assumption by its flag."""
    out, found = run("--efficiency", "0.25", "--overhead_us", "7", "--price", "2")
    assert out.count("(computed, not measured)\n") == 4
    for gpu in ("V100", "A100", "H100"):
        assert f"\n| {gpu} | tiny | 2 | " in out
    for told in ("--efficiency 0.25", "7 us (--overhead_us)", "$2 (--price)", "0.3,5"):
        assert told in out
    row = found["steps"][0]
    ms = [1e3 * row["seconds"], 1e3 * row["seconds"] / 0.25]
    shown = [f"{value:.3g}" if value < 99.95 else f"{value:,.0f}" for value in ms]
    assert f"| {shown[0]} ({shown[1]}) |" in out
    assert math.isclose(sum(row["bound_by"].values()), 1)
    whole = found["training"][0]
    assert whole["whole"]["gpu_hours"] * 3600 == pytest.approx(64000 / whole["images_per_s"])
    (against,) = found["measured"]
    at_peak = 125e12 / (1e9 * against["gflops_per_image"])  # all is in half precision, but little
    shown = [cell.strip() for cell in out.split("\n| tiny | 4 |")[1].split("|")[:5]]
    assert float(shown[0].replace(",", "")) == pytest.approx(at_peak, rel=0.1)
    assert shown[4] == f"{50 / against['images_per_s']:.2f}" and against["gpu"] == "V100"


def test_a_network_without_classifier_or_published_training_has_fewer_cells(run):
    """Nothing to guide, no days of training, nothing to compare with."""
    out, found = run("--preset", "tiny_upsampler", "--cases", "tiny_upsampler", "--gpus", "A100")
    assert [row["guided_calls"] for row in found["samples"]] == [0, 0]
    assert "whole" not in found["training"][0] and "| - | - | - | - |" in out
    assert found["measured"] == [] and out.count("(computed, not measured)\n") == 3


def test_check_compares_with_what_is_measured(programs, run, monkeypatch):
    """Each configuration, forward and training, computed and measured, and their ratio."""
    monkeypatch.setattr(programs.speed_tasks, "SIDE", 64)
    monkeypatch.setattr(programs.speed_measuring, "ENOUGH", 0.0)
    monkeypatch.setattr(programs.speed, "CONFIGS", {"16": MODEL | {"image_size": 16,
                                                                   "batch_size": 2}})  # fmt: skip
    out, found = run("--check", "--rounds", "1")
    assert [row["case"] for row in found["check"]] == ["16, forward", "16, train"]
    forward, train = found["check"]
    assert 2.5 < train["gflops"] / forward["gflops"] < 3.1
    for row in found["check"]:
        assert row["ratio"] == pytest.approx(row["seconds"] / row["measured"])
        assert row["gigabytes"] > 0 < row["operations"] and f"| {row['case']} | " in out
    assert "GFLOP/s of a product" in out and found["cpu"]["bandwidth"] > 0 < found["overhead"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--gpus", "T4"], "--gpus 'T4'"),
        (["--cases", "imagenet256,imagenet256"], "--cases"),
        (["--cases", "fashion"], "--cases 'fashion'"),
        (["--preset", "fashion"], "--preset"),
        (["--counts", "8,many"], "--counts '8,many'"),
        (["--counts", "0"], "--counts"),
        (["--steps", "1001"], "--steps 1001: the chains have 1000 steps"),
        (["--calls", "0"], "--calls"),
        (["--batch_size", "two"], "--batch_size"),
        (["--efficiency", "1.5"], "1.5 is not from 0.01 to 1"),
        (["--efficiency", "nan"], "--efficiency"),
        (["--overhead_us", "-1"], "--overhead_us"),
        (["--price", "inf"], "--price"),
        (["--guidance_interval", "5,0.3"], "--guidance_interval '5,0.3' must be two sigmas"),
        (["--guidance_interval", ""], "--guidance_interval"),
        (["--precision", "int8"], "--precision"),
        (["--json", "nowhere/figures.json"], "figures.json: there is no such folder"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(programs, capsys, flags, told):
    """Before anything is computed."""
    with pytest.raises(SystemExit) as ended:
        programs.gpu_estimates.main(flags)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("gpu_estimates.py: error: ") and told in err
