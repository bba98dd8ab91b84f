"""The diffusion process against numbers of the published code, and against its own algebra."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from stand_ins import (
    LOSSES,
    MEANS,
    REFERENCE,
    VARS,
    assert_close,
    gradient,
    inputs,
    make,
    network,
    tensor,
)

from guided_diffusion import gaussian_diffusion as gd
from guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    get_named_beta_schedule,
)
from guided_diffusion.respace import SpacedDiffusion
from guided_diffusion.tables import DeviceTables

# -- q --------------------------------------------------------------------------------------------


def test_q_agrees_with_the_reference():
    process = make()
    x_start, t, noise = inputs()
    x_t = process.q_sample(x_start, t, noise)
    assert_close(x_t, "q_sample")
    q = process.q_mean_variance(x_start, t)
    posterior = process.q_posterior_mean_variance(x_start, x_t, t)
    for name, actual, bayes in zip(("mean", "var", "logvar"), q, posterior, strict=True):
        assert_close(actual.expand_as(x_start), f"q_mean_variance/{name}")
        assert_close(bayes.expand_as(x_start), f"q_posterior/{name}")
    assert_close(process._prior_bpd(x_start), "prior_bpd")


def test_the_posterior_is_what_bayes_says():
    """q(x_{t-1} | x_t, x_0) q(x_t | x_0) = q(x_t | x_{t-1}) q(x_{t-1} | x_0), all normal."""
    process = make(betas=get_named_beta_schedule("linear", 100))
    a_prev, beta = process.alphas_cumprod_prev[1:], process.betas[1:]
    precision = 1 / (1 - a_prev) + (1 - beta) / beta
    np.testing.assert_allclose(process.posterior_variance[1:], 1 / precision, rtol=1e-10)
    x_0, x_t = 0.3, -0.8
    mean = (np.sqrt(a_prev) * x_0 / (1 - a_prev) + np.sqrt(1 - beta) * x_t / beta) / precision
    actual = process.posterior_mean_coef1 * x_0 + process.posterior_mean_coef2 * x_t
    np.testing.assert_allclose(actual[1:], mean, rtol=1e-9)


def test_the_predictions_of_x_start_invert_the_noising():
    process = make()
    x_start, t, noise = inputs()
    x_t = process.q_sample(x_start, t, noise)
    torch.testing.assert_close(process._predict_eps_from_xstart(x_t, t, x_start), noise)
    x_prev, _, _ = process.q_posterior_mean_variance(x_start, x_t, t)
    for prediction in (
        process._predict_xstart_from_eps(x_t, t, noise),
        process._predict_xstart_from_xprev(x_t, t, x_prev),
    ):
        torch.testing.assert_close(prediction, x_start, rtol=1e-3, atol=1e-4)


def test_q_sample_draws_the_noise_it_is_not_given():
    process = make()
    x_start, t, _ = inputs()
    torch.manual_seed(1)
    drawn = process.q_sample(x_start, t)
    torch.manual_seed(1)
    torch.testing.assert_close(drawn, process.q_sample(x_start, t, torch.randn_like(x_start)))


# -- p --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mean", "var", "clip"), [*itertools.product(MEANS, VARS, (0, 1))])
def test_p_mean_variance_agrees_with_the_reference(mean, var, clip):
    process = make(mean, var)
    x_start, t, noise = inputs()
    x_t = process.q_sample(x_start, t, noise)
    out = process.p_mean_variance(network(var), x_t, t, clip_denoised=bool(clip))
    for name, actual in out.items():
        assert_close(actual, f"p_mean_variance/{mean}/{var}/{clip}/{name}")


def test_denoised_fn_edits_the_prediction_before_it_is_clipped():
    process = make()
    x_start, t, _ = inputs()
    out = process.p_mean_variance(network(), x_start, t, denoised_fn=lambda x: 0 * x + 100)
    assert (out["pred_xstart"] == 1).all()


@pytest.mark.parametrize("var", ["FIXED_SMALL", "LEARNED"])
def test_a_network_with_the_wrong_number_of_channels_is_noticed(var):
    process = make(var=var)
    x_start, t, _ = inputs()
    wrong = network("LEARNED" if var == "FIXED_SMALL" else "FIXED_SMALL")
    with pytest.raises(AssertionError, match=r"4, 6, 8, 8|\(4, 3, 8, 8\)"):
        process.p_mean_variance(wrong, x_start, t)


def test_guidance_works_without_model_kwargs():
    process = make()
    x_start, t, _ = inputs()
    out = process.p_mean_variance(network(), x_start, t)
    mean = process.condition_mean(gradient, out, x_start, t)
    torch.testing.assert_close(mean, out["mean"] + out["variance"] * gradient(x_start, t))
    score = process.condition_score(gradient, out, x_start, t)
    assert score.keys() == out.keys()


def test_a_zero_gradient_changes_nothing():
    process = make()
    x_start, t, _ = inputs()
    out = process.p_mean_variance(network(), x_start, t)
    score = process.condition_score(lambda x, t: torch.zeros_like(x), out, x_start, t)
    for name in out:
        torch.testing.assert_close(score[name], out[name], rtol=1e-4, atol=1e-5)


def test_guidance_receives_the_model_kwargs():
    seen = []

    def cond_fn(x, t, y):
        seen.append(y)
        return torch.zeros_like(x)

    process = make()
    x_start, t, _ = inputs()
    model = network()
    process.p_sample(
        lambda x, t, y: model(x, t), x_start, t, cond_fn=cond_fn, model_kwargs={"y": 7}
    )
    assert seen == [7]


# -- objective ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "var", "loss", "rescale"), [*itertools.product(MEANS, VARS, LOSSES, (0, 1))]
)
def test_training_losses_agree_with_the_reference(mean, var, loss, rescale):
    x_start, t, noise = inputs()
    prefix = f"loss/{mean}/{var}/{loss}/{rescale}/"
    expected = [key.removeprefix(prefix) for key in REFERENCE.files if key.startswith(prefix)]
    for cls in (GaussianDiffusion, SpacedDiffusion):
        process = make(mean, var, loss, bool(rescale), cls=cls)
        terms = process.training_losses(network(var), x_start, t, noise=noise)
        assert list(terms) == expected
        for name, actual in terms.items():
            assert_close(actual, prefix + name)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_of_the_loss_agrees_with_the_reference(loss):
    x_start, t, noise = inputs()
    weight = tensor("in/W").requires_grad_()
    model = network("LEARNED_RANGE", weight)
    process = make(var="LEARNED_RANGE", loss=loss)
    process.training_losses(model, x_start, t, noise=noise)["loss"].sum().backward()
    assert_close(weight.grad, f"loss_grad/{loss}")


@pytest.mark.parametrize("loss", ["MSE", "RESCALED_MSE"])
def test_the_bound_trains_the_variance_and_not_the_mean(loss):
    """In the hybrid objective vb sees the mean detached (improved DDPM, section 3.1)."""
    x_start, t, noise = inputs()
    weight = tensor("in/W").requires_grad_()
    process = make(var="LEARNED_RANGE", loss=loss)
    terms = process.training_losses(network("LEARNED_RANGE", weight), x_start, t, noise=noise)
    terms["vb"].sum().backward()
    assert (weight.grad[:3] == 0).all()
    assert (weight.grad[3:] != 0).any()


def test_predicting_epsilon_computes_no_posterior(monkeypatch):
    process = make()
    monkeypatch.setattr(process, "q_posterior_mean_variance", lambda *_: pytest.fail("needless"))
    x_start, t, noise = inputs()
    process.training_losses(network(), x_start, t, noise=noise)


def test_a_perfect_network_has_no_loss():
    x_start, t, noise = inputs()
    terms = make().training_losses(lambda x, t: noise, x_start, t, noise=noise)
    assert (terms["loss"] == 0).all()


def test_only_the_kl_losses_are_the_bound():
    assert [loss.name for loss in LossType if loss.is_vb()] == ["KL", "RESCALED_KL"]


# -- bound ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("var", VARS)
def test_bits_per_dimension_agree_with_the_reference(var):
    torch.manual_seed(5)
    terms = make(var=var).calc_bpd_loop(network(var), tensor("in/x_start"))
    assert set(terms) == {"total_bpd", "prior_bpd", "vb", "xstart_mse", "mse"}
    for name, actual in terms.items():
        assert_close(actual, f"bpd/{var}/{name}", 1e-4)
        assert not actual.requires_grad


def test_the_parts_of_the_bound_add_up():
    terms = make().calc_bpd_loop(network(), tensor("in/x_start"))
    torch.testing.assert_close(terms["total_bpd"], terms["vb"].sum(1) + terms["prior_bpd"])


# -- tables ---------------------------------------------------------------------------------------

TABLES = [
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "alphas_cumprod_next",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
]


@pytest.mark.parametrize("name", TABLES)
def test_the_tables_are_float64_arrays(name):
    table = getattr(make(), name)
    assert isinstance(table, np.ndarray)
    assert (table.dtype, table.shape) == (np.float64, (20,))


def test_extract_into_tensor_broadcasts_along_the_batch():
    t = torch.tensor([2, 0])
    actual = gd._extract_into_tensor(np.array([1.0, 2.0, 3.0]), t, (2, 3, 4))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, torch.tensor([3.0, 1.0])[:, None, None].expand(2, 3, 4))


@pytest.fixture
def crossings(monkeypatch):
    """Count the tables that are handed to torch."""
    sent = []
    original = torch.from_numpy

    def counted(array):
        sent.append(array)
        return original(array)

    monkeypatch.setattr(torch, "from_numpy", counted)
    return sent


@pytest.mark.parametrize("cls", [GaussianDiffusion, SpacedDiffusion])
def test_each_table_crosses_to_the_device_once(crossings, cls):
    """A second pass over everything must send nothing."""
    process = make(var="LEARNED_RANGE", loss="RESCALED_MSE", cls=cls)
    x_start = tensor("in/x_start")

    def model(x, t):
        return torch.cat([x, 0 * x], dim=1)

    def cond_fn(x, t):
        return -x

    def everything():
        process.p_sample_loop(model, x_start.shape, cond_fn=cond_fn)
        process.ddim_sample_loop(model, x_start.shape, cond_fn=cond_fn)
        process.calc_bpd_loop(model, x_start)
        process.training_losses(model, x_start, torch.arange(4))

    crossings.clear()
    everything()
    assert 0 < len(crossings) <= 16
    crossings.clear()
    everything()
    assert not crossings


@pytest.mark.parametrize("edit", ["assigned", "in place"])
def test_a_changed_table_is_noticed(edit):
    process = make()
    x_start, t, noise = inputs()
    process.q_sample(x_start, t, noise)
    if edit == "assigned":
        process.sqrt_alphas_cumprod = np.zeros(20)
    else:
        process.sqrt_alphas_cumprod[:] = 0
    expected = gd._extract_into_tensor(process.sqrt_one_minus_alphas_cumprod, t, noise.shape)
    torch.testing.assert_close(process.q_sample(x_start, t, noise), expected * noise)


@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))]
)
@pytest.mark.parametrize("cls", [GaussianDiffusion, SpacedDiffusion])
def test_copies_work_and_take_no_cache_along(clone, cls):
    process = make(cls=cls)
    x_start, t, noise = inputs()
    expected = process.training_losses(network(), x_start, t, noise=noise)["loss"]
    twin = clone(process)
    torch.testing.assert_close(
        twin.training_losses(network(), x_start, t, noise=noise)["loss"], expected
    )
    if clone is not copy.copy:
        assert twin._tables is not process._tables


def test_a_table_first_used_in_inference_mode_serves_training():
    process = make()
    x_start, t, noise = inputs()
    with torch.inference_mode():
        process.q_sample(x_start, t, noise)
    x_start.requires_grad_()
    process.q_sample(x_start, t, noise).sum().backward()
    assert x_start.grad is not None


def test_tables_with_the_same_content_keep_their_dtypes_apart():
    tables = DeviceTables()
    cpu = torch.device("cpu")
    assert tables.get("t", [0, 1], cpu).dtype == torch.float32
    assert tables.get("t", [0, 1], cpu, torch.int64).dtype == torch.int64


@pytest.mark.parametrize("betas", [[], [0.0, 0.1], [0.5, 1.5]])
def test_impossible_betas_are_refused(betas):
    with pytest.raises(ValueError, match=r"\(0, 1\].*--diffusion_steps"):
        make(betas=betas)


def test_a_process_of_one_step_works():
    process = make(betas=[0.5], var="FIXED_LARGE")
    assert math.isfinite(process.posterior_log_variance_clipped[0])
    x = tensor("in/x_start")
    out = process.p_sample(network(), x, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(out["sample"], out["pred_xstart"])
