"""Classifier guidance: the gradient itself, and what it must leave alone."""

import pytest
import torch
from stand_ins import gradient, make, network

from guided_diffusion import guidance
from guided_diffusion.guidance import (
    GuidedNetwork,
    classifier_guidance,
    dynamic_threshold,
    estimate_guidance,
    fold,
    limited,
    together,
)
from guided_diffusion.noise_levels import NoiseLevels
from guided_diffusion.respace import SpacedDiffusion
from guided_diffusion.script_util import create_classifier
from guided_diffusion.solver_sampling import solver_sample_loop


class Linear(torch.nn.Module):
    """log p(y | x) whose gradient is known: logits = W x."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 4, generator=torch.manual_seed(0)))

    def forward(self, x, t):
        return x.flatten(1) @ self.weight.T


def test_the_gradient_is_that_of_the_log_probability_of_the_label():
    """For a linear classifier it is scale * (w_y - the mean of w under the prediction)."""
    classifier = Linear()
    x, y = torch.randn(5, 1, 2, 2), torch.tensor([0, 1, 2, 1, 0])
    weight = classifier.weight.detach()
    found = classifier_guidance(classifier, 2.5)(x, torch.zeros(5), y=y)
    expected = 2.5 * (weight[y] - (x.flatten(1) @ weight.T).softmax(1) @ weight)
    torch.testing.assert_close(found.flatten(1), expected)


def test_guidance_never_computes_gradients_of_the_weights():
    """The classifier is frozen: no operation on its weights alone is recorded."""
    classifier = create_classifier(
        32, False, 32, 1, "16", True, True, "attention", 10, 1, "1,2", 32
    )
    cond_fn = classifier_guidance(classifier, 1.0)
    assert not any(p.requires_grad for p in classifier.parameters()) and not classifier.training
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():  # as in the sampling loops
        gradient = cond_fn(x, torch.tensor([3, 900]), y=torch.tensor([1, 7]))
    assert gradient.shape == x.shape and not gradient.requires_grad and gradient.abs().sum() > 0
    assert all(p.grad is None for p in classifier.parameters())


def test_guidance_without_labels_says_so():
    """There is no gradient towards nothing."""
    with pytest.raises(ValueError, match="labels y"):
        classifier_guidance(Linear(), 1.0)(torch.zeros(1, 1, 2, 2), torch.zeros(1))


# --------------------------------------------------------------------------------------------
# Networks that steer


class Counted:
    """A linear network of x, t and the label, which keeps what it was called with."""

    def __init__(self, weight=0.5, out_channels=1):
        self.weight, self.out_channels, self.calls = weight, out_channels, []

    def __call__(self, x, t, y=None, low_res=None):
        self.calls.append((x, t, y))
        shift = 0 if y is None else y.view(-1, 1, 1, 1) / 8
        mean = self.weight * x + shift + (0 if low_res is None else low_res)
        rest = torch.full_like(mean, 7.0 + self.weight).repeat(1, self.out_channels - 1, 1, 1)
        return torch.cat([mean, rest], dim=1)


X = torch.randn(5, 1, 2, 2, generator=torch.manual_seed(0))
T = torch.full((5,), 500)
Y = torch.tensor([0, 1, 2, 1, 0])


def test_classifier_free_guidance_extrapolates_from_the_null_class():
    """Null + scale * (label - null), and of the variance channels those with the label."""
    model = Counted(out_channels=2)
    out = GuidedNetwork(model, cfg_scale=3.0, null_class=10)(X, T, y=Y)
    with_label, null = (Counted(out_channels=2)(X, T, y=y) for y in (Y, torch.full_like(Y, 10)))
    torch.testing.assert_close(out[:, :1], null[:, :1] + 3 * (with_label - null)[:, :1])
    assert torch.equal(out[:, 1:], with_label[:, 1:])


def test_autoguidance_pushes_away_from_the_weaker_network():
    """Weak + scale * (strong - weak); its variance channels do not count, if it has any."""
    for channels in (1, 2):
        weak = Counted(0.3, channels)
        out = GuidedNetwork(Counted(), guide=weak, guide_scale=2.0)(X, T, y=Y)
        strong, pushed = Counted()(X, T, y=Y), Counted(0.3)(X, T, y=Y)
        torch.testing.assert_close(out, pushed + 2 * (strong - pushed))
        assert torch.equal(weak.calls[0][2], Y)


def test_the_two_kinds_add_up():
    """Both pushes, from the same prediction."""
    options = dict(cfg_scale=1.5, null_class=10), dict(guide=Counted(0.3), guide_scale=2.0)
    plain = Counted()(X, T, y=Y)
    one, other = (GuidedNetwork(Counted(), **o)(X, T, y=Y) - plain for o in options)
    both = GuidedNetwork(Counted(), **options[0], **options[1])(X, T, y=Y) - plain
    torch.testing.assert_close(both, one + other)


def test_two_passes_may_be_one_call(monkeypatch):
    """Where that is faster: once with twice the batch, all inputs repeated, the same numbers."""
    low_res, outs = torch.randn(5, 1, 2, 2), []
    for small in (0, 5):
        monkeypatch.setattr(guidance, "SMALL_BATCH", small)
        model = Counted(out_channels=2)
        guided = GuidedNetwork(model, cfg_scale=2.0, null_class=10)
        outs.append(guided(X, T, y=Y, low_res=low_res))
        assert [len(x) for x, _, _ in model.calls] == ([5, 5] if small == 0 else [10])
    torch.testing.assert_close(*outs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["classifier", "cfg", "auto"])
def test_outside_the_interval_nothing_else_is_called(kind):
    """The network alone, once, and its output as it is; inside, all."""
    t_in, t_out, model, other = (
        torch.full((5,), 300),
        torch.full((5,), 700),
        Counted(),
        Counted(0.3),
    )
    active = lambda t: (t > 200) & (t <= 400)  # noqa: E731
    if kind == "classifier":
        guided = limited(other, active)
        assert not guided(X, t_out, y=Y).any() and not other.calls
        assert torch.equal(guided(X, t_in, y=Y), other(X, t_in, y=Y)) and len(other.calls) == 2
        return
    options = dict(guide=other, guide_scale=2.0) if kind == "auto" else {}
    options |= dict(cfg_scale=2.0, null_class=10) if kind == "cfg" else {}
    guided = GuidedNetwork(model, active=active, **options)
    assert torch.equal(guided(X, t_out, y=Y), model(X, t_out, y=Y))
    assert len(model.calls) == 2 and not other.calls
    guided(X, t_in, y=Y)
    assert (len(model.calls), len(other.calls)) == {"auto": (3, 1), "cfg": (4, 0)}[kind]


def test_a_batch_across_the_border_is_guided_where_it_is_inside():
    """Images at several timesteps: each by its own."""
    t = torch.tensor([100, 300, 300, 700, 300])
    active = lambda t: (t > 200) & (t <= 400)  # noqa: E731
    options = dict(guide=Counted(0.3), guide_scale=2.0)
    mixed = GuidedNetwork(Counted(), active=active, **options)(X, t, y=Y)
    everywhere, nowhere = GuidedNetwork(Counted(), **options)(X, t, y=Y), Counted()(X, t, y=Y)
    inside = active(t).view(-1, 1, 1, 1)
    torch.testing.assert_close(mixed, torch.where(inside, everywhere, nowhere))
    gradient = limited(Counted(0.3), active)(X, t, y=Y)
    torch.testing.assert_close(gradient, Counted(0.3)(X, t, y=Y) * inside)


def test_a_guided_network_has_the_parameters_of_the_network():
    """So that the loops find its device; a function has none."""
    layer = torch.nn.Conv2d(1, 1, 1)
    found = list(GuidedNetwork(layer, guide=layer, guide_scale=2.0).parameters())
    assert found == list(layer.parameters())
    assert list(GuidedNetwork(Counted()).parameters()) == []


def test_gradients_add_up():
    """The sum of a classifier's and a measurement's."""
    total = together(Counted(1.0), Counted(0.25))(X, T, y=Y)
    torch.testing.assert_close(total, Counted(1.0)(X, T, y=Y) + Counted(0.25)(X, T, y=Y))


# --------------------------------------------------------------------------------------------
# What edits the estimate


def test_dynamic_thresholds_scale_an_image_by_its_own_extent():
    """Into [-1, 1]; what is within already stays as it is; each image by itself."""
    x = torch.linspace(-1, 1, 100).view(1, 1, 10, 10) * torch.tensor([0.5, 1, 4]).view(3, 1, 1, 1)
    out = dynamic_threshold(0.9)(x)
    assert torch.equal(out[:2], x[:2])
    limit = x[2].abs().flatten().sort().values[89]
    torch.testing.assert_close(out[2], (x[2].clamp(-limit, limit) / limit))
    assert out.abs().max() == 1
    torch.testing.assert_close(dynamic_threshold(1.0)(x)[2], x[2] / 4)


@pytest.mark.parametrize("mean", ["EPSILON", "START_X"])
def test_folded_guidance_is_that_of_ddim(mean):
    """The gradient in the network's output, or in the score afterwards: the same x_start."""
    process = make(mean=mean, var="LEARNED_RANGE")
    model, x, t = network("LEARNED_RANGE"), torch.randn(2, 3, 4, 4), torch.tensor([3, 11])
    out = process.p_mean_variance(model, x, t, clip_denoised=False)
    expected = process.condition_score(gradient, out, x, t)["pred_xstart"]
    folded = fold(process, model, gradient)
    found = process.p_mean_variance(folded, x, t, clip_denoised=False)
    torch.testing.assert_close(found["pred_xstart"], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found["variance"], out["variance"])


@pytest.mark.parametrize("mean", ["EPSILON", "START_X"])
def test_solvers_take_a_gradient_as_ddim_does(mean):
    """Eps - sqrt(1 - alphas_cumprod) * gradient, after clipping: as in the published loop."""
    process = make(mean=mean, cls=SpacedDiffusion, use_timesteps=range(0, 20, 3))
    noise = torch.randn(2, 3, 4, 4)
    published = process.ddim_sample_loop(network(), noise.shape, noise, cond_fn=gradient)
    grid = NoiseLevels(process).grid(7)
    ours = solver_sample_loop(
        process, network(), noise.shape, "ddim", grid, noise, cond_fn=gradient
    )
    torch.testing.assert_close(ours, published, atol=1e-4, rtol=1e-4)


def test_the_gradient_of_an_estimate_passes_through_the_network():
    """For x_start = a x_t and a gradient g of it, a g is the gradient of x_t, as for DPS."""
    process = make(mean="START_X")
    model = Counted(0.7)
    seen = []

    def gradient_fn(x_start, sigma):
        seen.extend([x_start, sigma])
        return 2 * x_start

    found = estimate_guidance(process, model, gradient_fn, clip_denoised=False)(X, T, y=Y)
    torch.testing.assert_close(seen[0], Counted(0.7)(X, T, y=Y))
    levels = NoiseLevels(process).sigma_of(T).float()
    torch.testing.assert_close(seen[1], levels.view(-1, *[1] * (X.ndim - 1)))
    assert not seen[0].requires_grad and not found.requires_grad
    torch.testing.assert_close(found, 0.7 * 2 * seen[0])


def test_the_estimate_of_a_network_that_predicts_noise():
    """Its x_start is the process's own, clipping aside."""
    process, t = make(), torch.tensor([2, 15])
    x, seen = torch.randn(2, 3, 4, 4), []

    def gradient_fn(x_start, sigma):
        seen.append(x_start)
        return torch.zeros_like(x_start)

    for clip in (False, True):
        assert not estimate_guidance(process, network(), gradient_fn, clip)(x, t).any()
        expected = process.p_mean_variance(network(), x, t, clip_denoised=clip)["pred_xstart"]
        torch.testing.assert_close(seen.pop(), expected, rtol=1e-4, atol=1e-4)


def test_a_pixel_of_an_estimate_beyond_the_range_passes_no_gradient():
    """It is limited to [-1, 1] before it is compared with a measurement."""
    x = torch.tensor([-3.0, -0.5, 0.5, 3.0]).view(1, 1, 2, 2)
    steer = estimate_guidance(
        make(mean="START_X"), Counted(0.7), lambda x_start, _: 1 + 0 * x_start
    )
    found = steer(x, torch.tensor([3]), y=torch.tensor([0]))
    assert found[0, 0, 0, 0] == found[0, 0, 1, 1] == 0
    assert (found[0, 0, 0, 1] != 0) and (found[0, 0, 1, 0] != 0)
