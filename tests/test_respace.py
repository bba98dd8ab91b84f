"""Respacing against the published numbers, and that it leaves the process what it was."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from guided_diffusion.respace import SpacedDiffusion, _WrappedModel, space_timesteps

FOLDER = Path(__file__).parent / "reference"
REFERENCE = np.load(FOLDER / "diffusion.npz")
RESPACINGS = json.loads((FOLDER / "respacing.json").read_text())
KINDS = {
    "model_mean_type": ModelMeanType.EPSILON,
    "model_var_type": ModelVarType.FIXED_SMALL,
    "loss_type": LossType.RESCALED_MSE,
}


def full(schedule="linear", steps=1000, **kw):
    return GaussianDiffusion(betas=get_named_beta_schedule(schedule, steps), **KINDS, **kw)


def spaced(respacing, schedule="linear", steps=1000, **kw):
    betas = get_named_beta_schedule(schedule, steps)
    return SpacedDiffusion(space_timesteps(steps, respacing), betas=betas, **KINDS, **kw)


@pytest.mark.parametrize("case", RESPACINGS, ids=lambda case: str(case["section_counts"]))
def test_space_timesteps_agrees_with_the_reference(case):
    chosen = space_timesteps(case["num_timesteps"], case["section_counts"])
    assert isinstance(chosen, set)
    assert sorted(chosen) == case["timesteps"]


@pytest.mark.parametrize("respacing", ["1", "7", "ddim10", "3,4", "0,5", [2, 0, 3], " 3, 4"])
def test_as_many_steps_are_kept_as_were_asked_for(respacing):
    text = respacing if isinstance(respacing, str) else ",".join(map(str, respacing))
    expected = sum(int(part) for part in text.removeprefix("ddim").split(","))
    chosen = space_timesteps(20, respacing)
    assert len(chosen) == expected
    assert chosen <= set(range(20))


@pytest.mark.parametrize(
    "respacing",
    ["ddim300", "ddim0", "ddim", "ddimx", "ddim-5", "ddim2000", "1001", "501,10", "-3", "0", ""]
    + ["ten", "10,,5", "10;5", "2.5", [], [-1, 5]],
)
def test_an_impossible_respacing_names_flag_value_and_remedy(respacing):
    with pytest.raises(ValueError) as caught:
        space_timesteps(1000, respacing)
    message = str(caught.value)
    assert f"--timestep_respacing {respacing!r}" in message
    assert any(remedy in message for remedy in ("use ", "ask for", "nearest"))
    assert "\n" not in message


@pytest.mark.parametrize("key", [k for k in REFERENCE.files if k.startswith("spaced_betas/")])
def test_the_betas_of_a_short_process_agree_with_the_reference(key):
    _, schedule, respacing = key.split("/")
    np.testing.assert_allclose(spaced(respacing, schedule).betas, REFERENCE[key], rtol=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("respacing", ["ddim25", "10,15,20", "250", "1000"])
def test_respacing_keeps_the_marginals(schedule, respacing):
    """Skipping steps must leave q(x_t | x_0) untouched at the steps that remain."""
    long, short = full(schedule), spaced(respacing, schedule)
    np.testing.assert_allclose(
        short.alphas_cumprod, long.alphas_cumprod[short.timestep_map], rtol=1e-10
    )


def test_keeping_every_step_changes_nothing():
    long, short = full(), spaced("1000")
    np.testing.assert_allclose(short.betas, long.betas, rtol=1e-10)
    np.testing.assert_allclose(short.posterior_variance, long.posterior_variance, rtol=1e-8)


def test_the_published_attributes():
    short = spaced("ddim25")
    assert short.timestep_map == list(range(0, 1000, 40))
    assert isinstance(short.timestep_map, list)
    assert short.use_timesteps == set(short.timestep_map)
    assert short.original_num_steps == 1000
    assert short.num_timesteps == 25


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("wrap", [False, True], ids=["bare", "wrapped by the caller"])
@pytest.mark.parametrize("steps", [1000, 100])
def test_every_function_sees_the_timesteps_of_the_original_process(rescale, wrap, steps):
    """The network and the gradient, in every method, bare or wrapped by public code."""
    short = spaced("ddim10", steps=steps, rescale_timesteps=rescale)
    seen = []

    def function(x, t, **kwargs):
        seen.append(t)
        assert t.dtype == (torch.float32 if rescale else torch.int64)
        return 0.1 * x

    scale = 1000 / steps if rescale else 1
    expected = torch.tensor([short.timestep_map[3], short.timestep_map[9]]) * scale
    given = short._wrap_model(function) if wrap else function
    x, t = torch.randn(2, 1, 2, 2), torch.tensor([3, 9])
    out = short.p_mean_variance(given, x, t)
    short.condition_mean(given, out, x, t)
    short.condition_score(given, out, x, t)
    short.p_sample(given, x, t, cond_fn=given)
    short.ddim_sample(given, x, t, cond_fn=given)
    short.ddim_reverse_sample(given, x, t)
    short.training_losses(given, x, t)
    short._vb_terms_bpd(given, x, x, t)
    assert len(seen) == 10
    for timesteps in seen:
        torch.testing.assert_close(timesteps.float(), expected.float())
    seen.clear()
    short.p_sample_loop(given, x.shape, cond_fn=given)
    short.calc_bpd_loop(given, x)
    assert len(seen) == 30
    assert float(seen[0][0]) == pytest.approx(short.timestep_map[-1] * scale)


def test_wrapping_twice_is_wrapping_once():
    short = spaced("ddim10")
    wrapped = short._wrap_model(lambda x, t: x)
    assert isinstance(wrapped, _WrappedModel)
    assert short._wrap_model(wrapped) is wrapped


def test_a_wrapped_model_stands_alone():
    """Public code builds `_WrappedModel` itself, with four arguments."""
    wrapped = _WrappedModel(lambda x, t, y: (t, y), [0, 40, 80], True, 100)
    t, y = wrapped(torch.zeros(2), torch.tensor([2, 1]), y=3)
    torch.testing.assert_close(t, torch.tensor([800.0, 400.0]))
    assert y == 3


def test_a_wrapped_model_knows_where_its_parameters_are():
    module = torch.nn.Linear(1, 1)
    wrapped = spaced("ddim10")._wrap_model(module)
    assert list(wrapped.parameters()) == list(module.parameters())


@pytest.mark.parametrize("steps", [[], [3, 1000], [-1]])
def test_steps_that_the_process_lacks_are_refused(steps):
    with pytest.raises(ValueError, match=r"0\.\.999"):
        SpacedDiffusion(steps, betas=get_named_beta_schedule("linear", 1000), **KINDS)


def test_a_process_of_one_step_samples():
    short = spaced("1")
    sample = short.p_sample_loop(lambda x, t: 0 * x, (2, 3, 4, 4))
    assert sample.shape == (2, 3, 4, 4)
    assert sample.isfinite().all()
