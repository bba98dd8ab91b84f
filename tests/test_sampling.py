"""The samplers against chains of the published code, and the laws of the loop."""

import itertools

import numpy as np
import pytest
import torch
from stand_ins import (
    MEANS,
    VARS,
    assert_close,
    gradient,
    make,
    network,
    tensor,
)

from guided_diffusion import sampling
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, get_named_beta_schedule
from guided_diffusion.respace import SpacedDiffusion, space_timesteps

SHAPE = (4, 3, 8, 8)


def spaced(mean="EPSILON", var="LEARNED_RANGE", **kw):
    return make(mean, var, cls=SpacedDiffusion, **kw)


@pytest.mark.parametrize("guided", ["plain", "guided"])
@pytest.mark.parametrize(("mean", "var"), [*itertools.product(MEANS, VARS)])
def test_chains_agree_with_the_reference(mean, var, guided):
    process, model = spaced(mean, var), network(var)
    cond_fn = gradient if guided == "guided" else None
    torch.manual_seed(3)
    sample = process.p_sample_loop(model, SHAPE, cond_fn=cond_fn)
    assert_close(sample, f"loop/ancestral/{mean}/{var}/{guided}", 1e-4)
    for eta in (0.0, 0.7):
        torch.manual_seed(3)
        sample = process.ddim_sample_loop(model, SHAPE, cond_fn=cond_fn, eta=eta)
        assert_close(sample, f"loop/ddim/{mean}/{var}/{guided}/{eta}", 1e-4)


def check_both_samplers(process, prefix):
    for name, loop in (("ancestral", process.p_sample_loop), ("ddim", process.ddim_sample_loop)):
        torch.manual_seed(9)
        sample = loop(network("LEARNED_RANGE"), SHAPE, cond_fn=gradient)
        assert_close(sample, f"{prefix}/{name}", 1e-4)


@pytest.mark.parametrize("rescale", [0, 1])
def test_rescaled_chains_agree_with_the_reference(rescale):
    check_both_samplers(spaced(rescale=bool(rescale)), f"rescaled/{rescale}")


@pytest.mark.parametrize("rescale", [0, 1])
@pytest.mark.parametrize("respacing", ["10", "ddim10"])
def test_respaced_chains_agree_with_the_reference(respacing, rescale):
    process = spaced(
        loss="RESCALED_MSE",
        rescale=bool(rescale),
        betas=get_named_beta_schedule("linear", 1000),
        use_timesteps=space_timesteps(1000, respacing),
    )
    check_both_samplers(process, f"respaced/{respacing}/{rescale}")


@pytest.mark.parametrize("var", VARS)
def test_the_reverse_chain_agrees_with_the_reference(var):
    process, x = spaced(var=var), tensor("in/x_start")
    for i in range(20):
        t = torch.full((4,), i)
        x = process.ddim_reverse_sample(network(var), x, t)["sample"]
    assert_close(x, f"ddim_reverse/{var}", 1e-4)


def test_the_reverse_step_undoes_the_step():
    """With a prediction of x_0 that does not change, DDIM there and back is the identity."""
    process, x_0 = make("START_X"), 0.5 * torch.ones(SHAPE)
    x, t = torch.randn(SHAPE), torch.full((4,), 9)
    up = process.ddim_reverse_sample(lambda x, t: x_0, x, t)["sample"]
    down = process.ddim_sample(lambda x, t: x_0, up, t + 1)["sample"]
    torch.testing.assert_close(down, x, rtol=1e-4, atol=1e-4)


def test_the_reverse_step_refuses_noise():
    with pytest.raises(AssertionError, match="eta=0.5"):
        make().ddim_reverse_sample(network(), torch.zeros(SHAPE), torch.zeros(4).long(), eta=0.5)


def test_full_noise_ddim_draws_from_the_posterior():
    """With eta = 1, DDIM's step is q(x_{t-1} | x_t, x_0) (DDIM, section 4.1)."""
    process, x_0 = make("START_X"), 0.5 * torch.ones(SHAPE)
    x, t = torch.randn(SHAPE), torch.tensor([1, 5, 12, 19])
    torch.manual_seed(0)
    sample = process.ddim_sample(lambda x, t: x_0, x, t, eta=1.0)["sample"]
    torch.manual_seed(0)
    mean, variance, _ = process.q_posterior_mean_variance(x_0, x, t)
    expected = mean + variance.sqrt() * torch.randn(SHAPE)
    torch.testing.assert_close(sample, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", range(2, 11))
def test_full_noise_ddim_stays_finite(schedule, steps):
    """1 - a_prev - sigma^2 nears 0 on short chains, and rounding must not make it negative."""
    process = make(
        cls=SpacedDiffusion,
        betas=get_named_beta_schedule(schedule, 4000),
        use_timesteps=space_timesteps(4000, str(steps)),
    )
    assert process.ddim_sample_loop(network(), SHAPE, eta=1.0).isfinite().all()


@pytest.mark.parametrize("sampler", ["p", "ddim"])
def test_the_last_step_adds_no_noise(sampler):
    process, x, t = make(), torch.randn(SHAPE), torch.zeros(4, dtype=torch.int64)
    options = {"eta": 1.0} if sampler == "ddim" else {}
    out = getattr(process, f"{sampler}_sample")(network(), x, t, **options)
    torch.testing.assert_close(out["sample"], out["pred_xstart"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sampler", ["p", "ddim"])
def test_the_loop_and_the_progressive_form_agree(sampler):
    process = make()
    torch.manual_seed(0)
    whole = getattr(process, f"{sampler}_sample_loop")(network(), SHAPE)
    torch.manual_seed(0)
    steps = list(getattr(process, f"{sampler}_sample_loop_progressive")(network(), SHAPE))
    assert len(steps) == 20
    assert torch.equal(steps[-1]["sample"], whole)
    assert all(set(out) == {"sample", "pred_xstart"} for out in steps)


@pytest.mark.parametrize("sampler", ["p", "ddim"])
def test_random_draws_are_the_start_and_one_per_step(sampler, monkeypatch):
    drawn = []
    original = torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda x: drawn.append(x) or original(x))
    torch.manual_seed(0)
    chain = getattr(make(), f"{sampler}_sample_loop_progressive")(network(), SHAPE)
    list(chain)
    after = torch.get_rng_state()
    assert len(drawn) == 20
    torch.manual_seed(0)
    for _ in range(21):
        torch.randn(SHAPE)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("sampler", ["p", "ddim"])
def test_no_grad_mode_does_not_leak_into_the_consumer(sampler):
    modes = []

    def model(x, t):
        modes.append(torch.is_grad_enabled())
        return 0.1 * x

    chain = getattr(make(), f"{sampler}_sample_loop_progressive")(model, SHAPE)
    for out in itertools.islice(chain, 3):
        assert torch.is_grad_enabled()
        assert not out["sample"].requires_grad
    chain.close()
    assert torch.is_grad_enabled()
    assert modes == [False] * 3
    with torch.no_grad():
        next(getattr(make(), f"{sampler}_sample_loop_progressive")(model, SHAPE))
        assert not torch.is_grad_enabled()


def test_a_single_step_is_differentiable():
    x = torch.randn(SHAPE, requires_grad=True)
    t = torch.full((4,), 5)
    make().p_sample(network(), x, t)["sample"].sum().backward()
    assert (x.grad != 0).any()


def test_a_consumer_may_steer_the_chain():
    """What is put in the place of a sample is what the next step starts from."""
    seen = []

    def model(x, t):
        seen.append(x)
        return 0.1 * x

    for out in make().p_sample_loop_progressive(model, SHAPE):
        out["sample"] = torch.full(SHAPE, 0.25)
    assert all((x == 0.25).all() for x in seen[1:])


def test_given_noise_is_the_start():
    seen = []
    noise = torch.randn(SHAPE)
    next(make().p_sample_loop_progressive(lambda x, t: seen.append(x) or x, SHAPE, noise=noise))
    assert seen[0] is noise


def test_timesteps_descend_to_zero():
    seen = []
    make().ddim_sample_loop(lambda x, t: seen.append(t.tolist()) or 0.1 * x, SHAPE)
    assert seen == [[i] * 4 for i in range(19, -1, -1)]


def test_an_overridden_step_is_used_by_the_loop():
    """Public code subclasses the process and overrides p_sample or the progressive loop."""

    class Tagged(SpacedDiffusion):
        def p_sample(self, *args, **kwargs):
            return {**super().p_sample(*args, **kwargs), "sample": torch.full(SHAPE, 7.0)}

    process = make(cls=Tagged, use_timesteps=range(20))
    assert (process.p_sample_loop(network(), SHAPE) == 7).all()


def test_the_device_is_that_of_the_parameters():
    assert sampling.model_device(torch.nn.Linear(1, 1, device="meta")).type == "meta"
    assert sampling.model_device(network(), torch.zeros(1, device="meta")).type == "meta"
    assert sampling.model_device(network()).type == "cpu"


def test_shapes_must_be_sequences():
    with pytest.raises(AssertionError, match="shape"):
        make().p_sample_loop(network(), 4)


def test_progress_shows_a_bar(capsys):
    make().p_sample_loop(network(), SHAPE, progress=True)
    assert "20/20" in capsys.readouterr().err
    make().p_sample_loop(network(), SHAPE)
    assert not capsys.readouterr().err


def test_images_of_one_dimension_sample_too():
    sample = make().ddim_sample_loop(lambda x, t: 0.1 * x, (2, 3, 16))
    assert sample.shape == (2, 3, 16)
    assert np.isfinite(sample.numpy()).all()


@pytest.mark.parametrize("sampler", ["p", "ddim"])
def test_a_source_of_noise_replaces_the_global_generator(sampler):
    """It gives the start and what each step needs; torch's own generator is left alone."""
    torch.manual_seed(0)
    draws = [torch.randn(SHAPE) for _ in range(21)]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    expected = getattr(make(), f"{sampler}_sample_loop")(network(), SHAPE)
    torch.set_rng_state(before)
    blocks = iter(draws)
    loop = getattr(make(), f"{sampler}_sample_loop")
    found = loop(network(), SHAPE, noise_fn=lambda x: next(blocks))
    assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(list(blocks)) == (0 if sampler == "p" else 20)  # DDIM needs the start alone


def test_noisy_ddim_draws_from_the_source():
    """With eta above 0 each step needs noise."""
    blocks = iter([torch.randn(SHAPE) for _ in range(21)])
    make().ddim_sample_loop(network(), SHAPE, eta=0.5, noise_fn=lambda x: next(blocks))
    assert not list(blocks)


def test_published_signatures_may_be_overridden():
    """A subclass that knows of no source of noise works, as long as none is given."""

    class Mine(GaussianDiffusion):
        def p_sample(
            self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None
        ):
            return super().p_sample(
                model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs
            )  # fmt: skip

        def ddim_sample_loop_progressive(
            self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None,
            model_kwargs=None, device=None, progress=False, eta=0.0,
        ):  # fmt: skip
            return super().ddim_sample_loop_progressive(
                model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device,
                progress, eta,
            )  # fmt: skip

    for sampler in ("p", "ddim"):
        torch.manual_seed(0)
        mine = getattr(make(cls=Mine), f"{sampler}_sample_loop")(network(), SHAPE)
        torch.manual_seed(0)
        assert torch.equal(mine, getattr(make(), f"{sampler}_sample_loop")(network(), SHAPE))


def test_given_noise_comes_before_the_source():
    """The start is given: the source is asked for the steps alone."""
    asked = []
    chain = make().p_sample_loop_progressive(
        network(), SHAPE, torch.zeros(SHAPE), noise_fn=lambda x: asked.append(x) or x
    )
    assert len(list(chain)) == len(asked) == 20


def test_the_reverse_loop_is_the_published_steps_up_to_the_last_timestep():
    """It ends where sampling starts: one further step gives the published chain of 20."""
    process, model = spaced(), network("LEARNED_RANGE")
    x = process.ddim_reverse_sample_loop(model, tensor("in/x_start"))
    last = torch.full((4,), 19)
    x = process.ddim_reverse_sample(model, x, last)["sample"]
    assert_close(x, "ddim_reverse/LEARNED_RANGE", 1e-4)


def test_images_come_back_from_their_latents():
    """The error of the way up and down falls with the number of steps, in first order."""
    x_start = 0.5 * torch.randn(SHAPE, dtype=torch.float64)
    betas = get_named_beta_schedule("cosine", 2000)
    alphas = torch.from_numpy(np.cumprod(1 - betas))

    def exact(x, t):  # the noise in x_t, if x_0 has mean 0.1 and deviation 0.5
        a = alphas[t].view(-1, 1, 1, 1)
        return (x - 0.1 * a.sqrt()) * (1 - a).sqrt() / (0.25 * a + 1 - a)

    errors = []
    for steps in (50, 100, 200):
        process = make(
            cls=SpacedDiffusion, betas=betas, use_timesteps=space_timesteps(2000, f"ddim{steps}")
        )
        latents = process.ddim_reverse_sample_loop(exact, x_start, clip_denoised=False)
        assert abs(latents.std() - 1) < 0.1
        back = process.ddim_sample_loop(exact, SHAPE, noise=latents, clip_denoised=False)
        errors.append((back - x_start).abs().mean().item())
    assert errors[0] < 0.05
    assert errors[0] / errors[1] > 1.7 and errors[1] / errors[2] > 1.7
