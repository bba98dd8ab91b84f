"""Compiled networks compute what the plain ones do, and stay the same networks to files."""

import copy
import functools
import shutil

import numpy as np
import pytest
import torch
from reference.fill import fill_
from scripting import CLASSIFIER, SMALL, make_images, succeed

from guided_diffusion import compiling, config, sample_util, training, unet
from guided_diffusion.script_util import CREATE
from guided_diffusion.trained_flags import KINDS as FLAGS

SIZES = dict(
    image_size=8, in_channels=3, model_channels=32, num_res_blocks=1, attention_resolutions=(2,),
    channel_mult=(1, 2), num_heads=2, use_scale_shift_norm=True, resblock_updown=True,
)  # fmt: skip
KINDS = {
    "denoiser": lambda **more: unet.UNetModel(out_channels=6, num_classes=4, **SIZES | more),
    "classifier": lambda **more: unet.EncoderUNetModel(
        out_channels=4, pool="attention", **SIZES | more
    ),
}
ONE_LEVEL = dict(channel_mult=(1,), attention_resolutions=())


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Forget what was compiled, and the limits that a test has raised."""
    dynamo = torch._dynamo.config
    names = [*compiling.LIMITS, "optimize_ddp"]
    kept = {name: getattr(dynamo, name) for name in names if hasattr(dynamo, name)}
    yield
    torch._dynamo.reset()
    for name, value in kept.items():
        setattr(dynamo, name, value)


def pair(kind, backend="aot_eager", **more):
    """Return a network, and a compiled one of the same weights."""
    plain = fill_(KINDS[kind](**more), 42)
    compiled = copy.deepcopy(plain)
    compiling.compile_blocks(compiled, backend=backend)
    return plain, compiled


def inputs(kind, num=2):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num, 3, 8, 8, generator=generator)
    t = torch.linspace(0, 900, num)
    return (x, t, torch.arange(num) % 4) if kind == "denoiser" else (x, t)


def everything(network, kind):
    """Return output and gradients, of inputs and weights."""
    x, *rest = inputs(kind)
    x.requires_grad_(True)
    out = network(x, *rest)
    out.square().mean().backward()
    return [out.detach(), x.grad, *(param.grad for param in network.parameters())]


def assert_equal(actual, expected):
    """Compare by the largest number of each tensor; some gradients are 0 but for rounding."""
    rounding = 1e-7 * max(b.abs().max().item() for b in expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * b.abs().max().item() + rounding)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_compiling_changes_nothing(kind, use_checkpoint):
    """Output and gradients agree to 1e-5, also where blocks are recomputed."""
    plain, compiled = pair(kind, use_checkpoint=use_checkpoint)
    assert_equal(everything(compiled, kind), everything(plain, kind))


@pytest.mark.skipif(not shutil.which(compiling.COMPILER), reason="needs a C++ compiler")
def test_real_kernels_compute_the_same():
    """Those that torch makes by default, with a C++ compiler: output and gradients to 1e-5."""
    plain, compiled = pair("denoiser", "inductor", **ONE_LEVEL)
    assert_equal(everything(compiled, "denoiser"), everything(plain, "denoiser"))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_compiles_too(kind):
    """Whether the network is converted after it was compiled, or runs under autocast."""
    plain, compiled = pair(kind)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(*inputs(kind)), plain(*inputs(kind)))
    for network in (plain, compiled):
        network.convert_to_fp16()
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs(kind)), plain(*inputs(kind)))


def test_weights_keep_their_names():
    """So checkpoints of a compiled network are those of a plain one, and load into it."""
    plain, compiled = pair("denoiser")
    assert list(plain.state_dict()) == list(compiled.state_dict())
    with torch.no_grad():
        before = compiled(*inputs("denoiser"))
        compiled.load_state_dict({name: 2 * v for name, v in plain.state_dict().items()})
        assert not torch.allclose(compiled(*inputs("denoiser")), before)


def test_each_shape_is_compiled_once_and_others_run_as_written():
    """More shapes than torch would bear by itself; and none where it is not wanted."""
    seen = []

    def backend(graph, example_inputs):
        seen.append(graph)
        return graph.forward

    _, compiled = pair("denoiser", backend, **ONE_LEVEL)
    with torch.no_grad():
        compiled(*inputs("denoiser"))
        num = len(seen)
        assert num >= len(compiled.input_blocks) + len(compiled.output_blocks)
        compiled(*inputs("denoiser"))
        assert len(seen) == num
        with compiling.as_written():
            compiled(*inputs("denoiser", num=3))
        assert len(seen) == num
        for more in range(3, 13):
            compiled(*inputs("denoiser", num=more))
        assert len(seen) == 11 * num


# -- as the programs use it ------------------------------------------------------------------------


@pytest.fixture
def shapes(monkeypatch):
    """Let --compile make no kernels; return the batch of each block that it would make them for."""
    seen = []

    def backend(graph, example_inputs):
        seen.append({x.shape[0] for x in example_inputs if x.dim() == 4 and x.shape[-1] <= 8})
        return graph.forward

    plainly = functools.partial(compiling.compile_blocks, backend=backend)
    for module in (sample_util, training):
        monkeypatch.setattr(module, "compile_blocks", plainly)
    return seen


def write(kind, flags, path):
    """Write a checkpoint of a network."""
    known = config.defaults(*FLAGS[kind])
    network = CREATE[kind](**known | {name: v for name, v in flags.items() if name in known})[0]
    torch.save(fill_(network, 1).state_dict(), path)


def test_samples_are_the_same_and_a_last_short_batch_runs_as_written(shapes, tmp_path):
    """Of both networks; it is not worth kernels of its own."""
    flags = SMALL | {"timestep_respacing": "ddim2", "use_ddim": True}
    model, classifier = (tmp_path / name for name in ("model.pt", "classifier.pt"))
    write("diffusion model", flags, model)
    write("classifier", CLASSIFIER, classifier)
    arrays = {}
    for flag in (False, True):
        succeed(
            "classifier_sample", flags | CLASSIFIER, model_path=model, classifier_path=classifier,
            num_samples=5, batch_size=3, seed=0, compile=flag, log_dir=tmp_path / str(flag),
        )  # fmt: skip
        assert bool(shapes) == flag
        arrays[flag] = np.load(tmp_path / str(flag) / "samples_5x8x8x1.npz")["arr_0"]
    assert np.abs(arrays[True].astype(int) - arrays[False]).max() <= 1
    assert 3 in set().union(*shapes) and 2 not in set().union(*shapes)


def test_training_is_the_same(shapes, tmp_path):
    """Losses to rounding, with micro-batches; and pictures on the way run as written."""
    make_images(tmp_path / "images")
    losses = {}
    for flag in (False, True):
        succeed(
            "image_train", SMALL, data_dir=tmp_path / "images", batch_size=4, microbatch=2,
            max_steps=2, save_interval=9, sample_interval=2, seed=0, num_workers=0, compile=flag,
            log_dir=tmp_path / str(flag),
        )  # fmt: skip
        assert bool(shapes) == flag
        rows = (tmp_path / str(flag) / "progress.csv").read_text().splitlines()
        names, last = rows[0].split(","), rows[-1].split(",")
        losses[flag] = float(last[names.index("loss")])
    assert losses[True] == pytest.approx(losses[False], rel=1e-5)
    assert training.PREVIEW_IMAGES not in set().union(*shapes)


def test_without_a_compiler_one_line_says_so(monkeypatch):
    """Before anything is compiled."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="^--compile True needs a C\\+\\+ compiler") as error:
        pair("classifier", "inductor")
    assert "\n" not in str(error.value)
