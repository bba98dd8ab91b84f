import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from guided_diffusion import nn as gd_nn


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_group_norm_keeps_the_dtype_and_widens_inside(dtype):
    """A narrow input must be normalized as precisely as its exact copy, then rounded once."""
    norm = gd_nn.normalization(64)
    nn.init.normal_(norm.weight)
    x = (100 + torch.randn(2, 64, 5, 5)).to(dtype)
    exact = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double())
    assert norm(x).dtype == dtype
    # Rounded once: half a unit in the last place, next to what float32 loses with a mean of 100.
    inner = 1e-9 if dtype == torch.float64 else 2e-4
    half_a_unit = 0.51 * torch.finfo(dtype).eps
    torch.testing.assert_close(norm(x).double(), exact, rtol=half_a_unit, atol=inner)


@pytest.mark.parametrize("shape", [(2, 32, 6, 5), (2, 64, 7), (2, 32, 2, 3, 4)])
def test_group_norm_does_not_depend_on_the_memory_layout(shape):
    """Channels last is a layout, not another function: output and gradients must agree."""
    norm = gd_nn.normalization(shape[1])
    x, probe = torch.randn(shape), torch.randn(shape)
    results = []
    for layout in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
        leaf = layout.clone().requires_grad_()
        out = norm(leaf)
        results.append((out.detach(), *torch.autograd.grad((out * probe).sum(), leaf)))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("shape", [(3, 64, 5), (2, 96, 4, 6), (1, 32, 2, 3, 4)])
def test_modulation_is_a_scale_and_a_shift_after_the_norm(shape):
    """Values and gradients are those of the plain formula; each image has its own modulation."""
    torch.manual_seed(0)
    norm = gd_nn.normalization(shape[1])
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (3 + torch.randn(shape)).requires_grad_()
    scale, shift = torch.randn(2, *shape[:2]).requires_grad_()
    as_images = (*shape[:2], *[1] * (len(shape) - 2))
    plain = norm(x) * (1 + scale.view(as_images)) + shift.view(as_images)
    fused = norm(x, scale, shift)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    probe = torch.randn(shape)
    wanted = x, scale, shift, norm.weight, norm.bias
    ours, theirs = (torch.autograd.grad((out * probe).sum(), wanted) for out in (fused, plain))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_conv_and_pool_serve_every_number_of_dimensions(dims):
    """A convolution with padding keeps the shape, and pooling halves it."""
    x = torch.randn(2, 3, *[8] * dims)
    assert gd_nn.conv_nd(dims, 3, 5, 3, padding=1)(x).shape == (2, 5, *[8] * dims)
    pooled = gd_nn.avg_pool_nd(dims, kernel_size=2, stride=2)(x)
    assert pooled.shape == (2, 3, *[4] * dims)
    torch.testing.assert_close(pooled.mean(), x.mean())


@pytest.mark.parametrize("build", [gd_nn.conv_nd, gd_nn.avg_pool_nd])
def test_an_unknown_number_of_dimensions_is_named(build):
    """The error must say which numbers there are."""
    with pytest.raises(ValueError, match=r"\[1, 2, 3\], got 4"):
        build(4, 3, 3, 1)


def test_silu_is_x_times_its_sigmoid():
    """The definition."""
    x = torch.linspace(-5, 5, 11)
    torch.testing.assert_close(gd_nn.SiLU()(x), x * torch.sigmoid(x))


def test_zero_and_scale_act_on_every_parameter():
    """Weights and biases alike are scaled, in place, and the module is handed back."""
    layer = gd_nn.linear(3, 4)
    before = [p.clone() for p in layer.parameters()]
    assert gd_nn.scale_module(layer, 0.5) is layer
    torch.testing.assert_close(list(layer.parameters()), [0.5 * p for p in before])
    assert gd_nn.zero_module(layer) is layer
    assert not any(p.any() for p in layer.parameters())


def test_mean_flat_leaves_the_batch():
    """Every dimension but the first is averaged."""
    x = torch.randn(3, 4, 5, 6)
    torch.testing.assert_close(gd_nn.mean_flat(x), x.reshape(3, -1).mean(1))


@pytest.mark.parametrize("source_dtype", [torch.float32, torch.float16])
def test_ema_moves_towards_the_source_and_keeps_its_dtype(source_dtype):
    """Target <- rate * target + (1 - rate) * source, in the precision of the target."""
    targets = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2, 2))]
    sources = [nn.Parameter(torch.randn_like(t).to(source_dtype)) for t in targets]
    expected = [
        0.9 * t.detach() + 0.1 * s.detach().float() for t, s in zip(targets, sources, strict=True)
    ]
    gd_nn.update_ema(iter(targets), iter(sources), rate=0.9)
    torch.testing.assert_close([t.detach() for t in targets], expected)
    assert all(t.requires_grad and t.grad_fn is None for t in targets)


def test_ema_forgets_geometrically():
    """After n updates towards a constant, rate ** n of the start is left."""
    target = [torch.ones(1)]
    for _ in range(10):
        gd_nn.update_ema(target, [torch.zeros(1)], rate=0.5)
    torch.testing.assert_close(target[0], torch.full((1,), 0.5**10))


@pytest.mark.parametrize("dim", [64, 33])
def test_timestep_embedding_is_cosines_then_sines(dim):
    """Frequency k is max_period ** (-k / half); fractions count; odd widths end in zeros."""
    timesteps, half = torch.tensor([0.0, 1.0, 37.5, 999.0]), dim // 2
    emb = gd_nn.timestep_embedding(timesteps, dim)
    phases = timesteps.double()[:, None] * 10000.0 ** (-torch.arange(half) / half).double()
    assert emb.shape == (4, dim) and emb.dtype == torch.float32
    torch.testing.assert_close(emb[:, :half].double(), phases.cos(), rtol=0, atol=1e-4)
    torch.testing.assert_close(emb[:, half : 2 * half].double(), phases.sin(), rtol=0, atol=1e-4)
    assert not emb[:, 2 * half :].any()


def test_timestep_embedding_takes_integers():
    """The integer 37 and the fraction 37.0 are the same time."""
    whole = gd_nn.timestep_embedding(torch.tensor([37]), 32, max_period=100)
    torch.testing.assert_close(whole, gd_nn.timestep_embedding(torch.tensor([37.0]), 32, 100))
    lowest = math.cos(37 * 100 ** (-15 / 16))
    torch.testing.assert_close(whole[0, 15], torch.tensor(lowest))


@pytest.mark.parametrize("flag", [False, True])
def test_checkpoint_repeats_the_random_numbers(flag):
    """Dropout must fall on the same elements when the function is computed again."""
    x = torch.ones(1000, requires_grad=True)
    calls = []

    def drop(value):
        calls.append(1)
        return F.dropout(value.sin(), 0.5)

    out = gd_nn.checkpoint(drop, (x,), [], flag)
    out.sum().backward()
    assert torch.equal(out == 0, x.grad == 0)
    assert len(calls) == 1 + flag


def test_checkpoint_reaches_parameters_that_are_not_listed():
    """Gradients flow to weights inside the function, whatever `params` says."""
    layer = gd_nn.linear(3, 1)
    gd_nn.checkpoint(layer, (torch.ones(2, 3),), (), True).sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.full((1, 3), 2.0))
