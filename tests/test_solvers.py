"""The solvers: orders and errors where the answer is known, agreement with others, what they call.

The errors are those of a published table for this mixture: RMS per coordinate after 10, 20, 40, 80
and 160 calls of the network, and the order that they tend to.
"""

import math

import mixtures
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from stand_ins import make, network

from guided_diffusion import sampling_flags, solvers
from guided_diffusion.noise_levels import NoiseLevels
from guided_diffusion.respace import SpacedDiffusion
from guided_diffusion.schedules import get_named_beta_schedule
from guided_diffusion.solver_sampling import NetworkDenoiser, solver_sample_loop
from guided_diffusion.solvers import SOLVERS

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # of diffusers

CALLS = (10, 20, 40, 80, 160)
TABLE = {  # (solver, order of UniPC) -> errors, order
    ("ddim", None): ((1.2e-1, 6.5e-2, 3.3e-2, 1.7e-2, 8.3e-3), 1.0),
    ("heun", None): ((0.45, 7.4e-2, 1.6e-2, 3.7e-3, 9.1e-4), 2.01),
    ("dpmpp_2m", None): ((3.6e-2, 1.0e-2, 2.5e-3, 6.2e-4, 1.5e-4), 2.0),
    ("dpmpp_3m_classic", None): ((2.7e-2, 4.6e-3, 8.2e-4, 1.7e-4, 3.9e-5), 2.01),
    ("dpmpp_3m", None): ((2.4e-2, 4.7e-3, 6.1e-4, 7.2e-5, 8.7e-6), 3.0),
    ("unipc", 2): ((2.9e-2, 5.1e-3, 8.0e-4, 1.0e-4, 1.3e-5), 3.0),
    ("unipc", 3): ((4e-2, 3.3e-3, 2.5e-4, 1.9e-5, 1.5e-6), 3.92),  # at 10 calls: less than that
}


def solve_mixture(name, calls, order=None):
    """Solve the mixture's ODE with so many calls of the network."""
    options = {} if order is None else {"order": order}
    steps = calls // 2 if name == "heun" else calls
    return SOLVERS[name](mixtures.denoise, mixtures.start(), mixtures.log_grid(steps), **options)


def rms(difference):
    return float(difference.pow(2).mean().sqrt())


@pytest.fixture(scope="module")
def solution():
    """Return where the exact ODE leads; two solvers of different kind agree on it."""
    found = solve_mixture("unipc", 6000, 3)
    assert rms(found - solve_mixture("heun", 12000)) < 1e-6
    return found


@pytest.mark.parametrize(("name", "order"), TABLE)
def test_errors_on_the_mixture_are_those_of_the_table(name, order, solution):
    """Within a fifth of the published errors, and of their order."""
    expected, rate = TABLE[name, order]
    errors = [rms(solve_mixture(name, calls, order) - solution) for calls in CALLS]
    assert errors[0] < 1.2 * expected[0]
    np.testing.assert_allclose(errors[1:], expected[1:], rtol=0.2)
    finer = [rms(solve_mixture(name, calls, order) - solution) for calls in (160, 320)]
    assert abs(math.log2(finer[0] / finer[1]) - rate) < 0.12


@pytest.mark.parametrize("name", ["plms", "ipndm"])
def test_multistep_along_the_noise_is_of_second_order(name, solution):
    """Adams-Bashforth with weights for equal steps, on steps that are not."""
    errors = [rms(solve_mixture(name, calls) - solution) for calls in (80, 160)]
    assert abs(math.log2(errors[0] / errors[1]) - 2) < 0.1


def test_the_two_forms_of_3m_differ_in_order_only_where_it_counts(solution):
    """The usual form loses an order for many steps; with few the two are about equal."""
    few = [rms(solve_mixture(n, 20) - solution) for n in ("dpmpp_3m", "dpmpp_3m_classic")]
    many = [rms(solve_mixture(n, 640) - solution) for n in ("dpmpp_3m", "dpmpp_3m_classic")]
    assert 0.8 < few[0] / few[1] < 1.25
    assert many[0] < many[1] / 10


@pytest.mark.parametrize("degree", [0, 1, 2])
def test_polynomials_of_lambda_are_integrated_exactly(degree):
    """A step with degree + 1 points is exact where x_start is a polynomial in lambda."""
    sigmas = [3.0, 1.7, 1.1, 0.4]

    def x_start(sigma):
        return torch.tensor([(-math.log(sigma)) ** degree], dtype=torch.float64)

    x = torch.tensor([0.7], dtype=torch.float64)
    points = [solvers.Point(s, x, x_start(s)) for s in sigmas[:3]]
    here, past = points[2], points[1::-1][:degree]
    if degree == 1:
        past = [points[1], points[0]]  # one other point is weighted by the midpoint rule
    lambdas = np.linspace(-math.log(1.1), -math.log(0.4), 20001)
    values = np.exp(lambdas - lambdas[-1]) * lambdas**degree
    exact = 0.4 / 1.1 * 0.7 + np.trapezoid(values, lambdas)
    assert solvers._integrate(here, 0.4, past).item() == pytest.approx(exact, rel=1e-7)


# --------------------------------------------------------------------------------------------
# Others


def scheduler_sample(cls, order, schedule, num_steps):
    """Sample the mixture by a scheduler of diffusers, on timesteps that are evenly spaced.

    Returns what it started from, as the solvers have it, the levels that it visited, and the end.
    """
    betas = get_named_beta_schedule(schedule, 1000)
    scheduler = cls(
        trained_betas=betas.tolist(), solver_order=order, final_sigmas_type="zero",
        timestep_spacing="linspace",
    )  # fmt: skip
    process = make(betas=betas)
    # Its own are products of float32 numbers: 1 - 0.999, at the end of the cosine, to 5 digits.
    scheduler.alphas_cumprod = torch.from_numpy(process.alphas_cumprod)
    scheduler.set_timesteps(num_steps)
    levels = NoiseLevels(process)
    sigmas = torch.from_numpy(np.append(levels.sigmas[scheduler.timesteps.numpy()], 0.0))
    model = mixtures.ExactNetwork(process)
    x = noise = mixtures.start(64, 1.0)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(len(x))), t, x).prev_sample
    return noise * (1 + sigmas[0] ** 2).sqrt(), sigmas, x


@pytest.mark.parametrize("num_steps", [5, 15, 20])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("name", "cls", "order"),
    [
        ("ddim", DPMSolverMultistepScheduler, 1),
        ("dpmpp_2m", DPMSolverMultistepScheduler, 2),
        ("unipc", UniPCMultistepScheduler, 2),
        ("unipc", UniPCMultistepScheduler, 3),
    ],
)
def test_an_independent_implementation_agrees(name, cls, order, schedule, num_steps):
    """On the timesteps of the other, with one network, to 1e-4 (it keeps sigmas in float32)."""
    x, sigmas, theirs = scheduler_sample(cls, order, schedule, num_steps)
    options = {"order": order} if name == "unipc" else {}
    ours = SOLVERS[name](mixtures.denoise, x, sigmas, **options)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_3m_classic_agrees_with_an_independent_implementation():
    """The usual form of 3M, from 15 steps on, below which the other lowers its order earlier."""
    x, sigmas, theirs = scheduler_sample(DPMSolverMultistepScheduler, 3, "linear", 20)
    ours, third = (
        SOLVERS[name](mixtures.denoise, x, sigmas) for name in ("dpmpp_3m_classic", "dpmpp_3m")
    )
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert (third - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("mean", ["EPSILON", "START_X"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(("solver", "loop"), [("ddim", "ddim"), ("ancestral", "p")])
def test_first_order_solvers_are_the_published_steps(solver, loop, clip, mean):
    """On the levels of a process, from the same noise, with the posterior's variance."""
    process = make(mean=mean, cls=SpacedDiffusion, use_timesteps=range(0, 20, 3))
    noise = torch.randn(9, 2, 3, 4, 4, generator=torch.manual_seed(0))
    blocks = [iter(noise), iter(noise)]
    options = dict(clip_denoised=clip, model_kwargs={})
    published = getattr(process, f"{loop}_sample_loop")(
        network(), noise.shape[1:], noise_fn=lambda x: next(blocks[0]), **options
    )
    ours = solver_sample_loop(
        process, network(), noise.shape[1:], solver, NoiseLevels(process).grid(7),
        noise_fn=lambda x: next(blocks[1]), **options,
    )  # fmt: skip
    torch.testing.assert_close(ours, published, atol=2e-5, rtol=1e-4)


# --------------------------------------------------------------------------------------------
# What they call, and what they draw


@pytest.mark.parametrize("end", [0.0, 0.01])
@pytest.mark.parametrize("name", SOLVERS)
def test_how_often_the_network_is_called(name, end):
    """Once a step; Heun twice, but in a step to 0; PLMS twice in its first step."""
    calls = []

    def counted(x, sigma):
        calls.append(float(sigma))
        return mixtures.denoise(x, sigma)

    sigmas = torch.cat([mixtures.log_grid(6, 50, 0.5), torch.tensor([end]).double()])
    seen = []
    SOLVERS[name](counted, mixtures.start(8), sigmas, callback=seen.append)
    expected = {"heun": 13 + (end > 0), "plms": 8}.get(name, 7)
    assert len(calls) == expected
    assert [out["i"] for out in seen] == list(range(7))
    assert [out["sigma"] for out in seen] == sigmas[1:].tolist()
    assert min(calls) > 0, "the network knows no level 0"


NOISY = {"ancestral", "dpmpp_2m_sde"}


@pytest.mark.parametrize("name", SOLVERS)
def test_who_draws_noise(name):
    """Only the SDE solvers, and none in the step to 0; all of it from the given source."""
    draws = []

    def draw(x):
        draws.append(x.shape)
        return torch.ones_like(x)

    state = torch.get_rng_state()
    sigmas = torch.cat([mixtures.log_grid(4), torch.zeros(1)])
    SOLVERS[name](mixtures.denoise, mixtures.start(8), sigmas, noise=draw)
    assert len(draws) == (4 if name in NOISY else 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_eta_sets_the_noise():
    """DDIM with eta 1 is ancestral sampling; the SDE with eta 0 is the ODE; 0.5 is between."""
    x, sigmas = mixtures.start(64), mixtures.log_grid(12)

    def run(name, **options):
        torch.manual_seed(0)
        return SOLVERS[name](mixtures.denoise, x, sigmas, **options)

    assert torch.equal(run("ddim", eta=1.0), run("ancestral"))
    assert torch.equal(run("dpmpp_2m_sde", eta=0.0), run("dpmpp_2m"))
    apart = [rms(run("ddim", eta=eta) - run("ddim")) for eta in (0.3, 0.6, 1.0)]
    assert 0 < apart[0] < apart[1] < apart[2]


def test_the_sde_scales_its_noise():
    """s_noise multiplies what is added: with x_start = 0 nothing else is left of it."""
    sigmas = torch.tensor([2.0, 1.0], dtype=torch.float64)
    ends = [
        SOLVERS["dpmpp_2m_sde"](
            lambda x, sigma: torch.zeros_like(x), torch.zeros(1), sigmas, noise=torch.ones_like,
            s_noise=scale,
        ).item()
        for scale in (1.0, 1.5)
    ]  # fmt: skip
    assert ends == pytest.approx([math.sqrt(0.75), 1.5 * math.sqrt(0.75)])


def test_equal_steps_along_polynomials_of_the_noise_are_exact():
    """Adams-Bashforth with k points integrates slopes of degree k - 1 (in sigma) exactly."""
    sigmas = torch.linspace(6.0, 1.0, 6, dtype=torch.float64)
    for degree in range(4):

        def denoise(x, sigma, degree=degree):
            return x - sigma * sigma**degree  # so that dx / d sigma = sigma^degree

        samples = [torch.zeros(1, dtype=torch.float64)]
        steps = []
        SOLVERS["ipndm"](denoise, samples[0], sigmas, callback=steps.append)
        samples += [out["sample"] for out in steps]
        for i in range(degree, 5):  # where there are enough points
            a, b = (float(sigma) ** (degree + 1) / (degree + 1) for sigma in sigmas[i : i + 2])
            assert (samples[i + 1] - samples[i]).item() == pytest.approx(b - a)


def test_churn_raises_the_level_as_asked():
    """By s_churn / N, at most by sqrt(2) - 1, only between s_tmin and s_tmax, and rounded."""
    seen, deviations = [], []

    def watched(x, sigma):
        seen.append(float(sigma))
        return torch.zeros_like(x)

    def draw(x):
        deviations.append(x.clone())
        return torch.ones_like(x)

    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    options = dict(s_churn=1.0, s_tmin=1.5, s_tmax=5.0, s_noise=1.1)
    x = SOLVERS["heun"](watched, torch.zeros(1), sigmas, noise=draw, **options)
    assert seen == [8, 4, 5, 2, 2.5, 1, 1]
    assert len(deviations) == 2
    # With x_start = 0 the sample shrinks in proportion to the level.
    assert deviations[1].item() == pytest.approx(1.1 * 3.0 * 2 / 5)
    assert x.item() == 0
    seen.clear()
    SOLVERS["heun"](watched, torch.zeros(1), sigmas, s_churn=1e9, round_sigma=round)
    assert seen == [11, 4, 6, 2, 3, 1, 1], "at most sqrt(2) times the level, rounded"


def test_samples_are_in_float64_and_the_network_in_its_own_precision():
    """Float32 noise goes in, the state is float64, the network sees float32 and whole t."""
    process, seen = make(), []

    def model(x, t):
        seen.append((x.dtype, t.dtype))
        return network()(x, t)

    denoiser = NetworkDenoiser(process, model)
    grid = torch.from_numpy(NoiseLevels(process).grid(5))
    x = SOLVERS["dpmpp_2m"](denoiser, torch.randn(2, 3, 4, 4), grid)
    assert x.dtype == torch.float64
    assert set(seen) == {(torch.float32, torch.int64)}


@pytest.mark.parametrize(
    "sigmas", [[1.0], [1.0, 1.0], [0.5, 1.0], [1.0, -0.1], [math.inf, 1.0], [1.0, math.nan]]
)
def test_levels_that_do_not_fall_are_refused(sigmas):
    """Such a grid is a mistake, whoever made it."""
    with pytest.raises(ValueError, match="sigmas must fall"):
        SOLVERS["ddim"](mixtures.denoise, mixtures.start(2), torch.tensor(sigmas))


def test_unknown_solvers_and_orders_are_named():
    """For programs, as the flags' checks do it for the command line."""
    process = make()
    with pytest.raises(ValueError, match="the solver must be one of ancestral, ddim, .*'euler'"):
        solver_sample_loop(process, network(), (1, 3, 4, 4), "euler", [1.0, 0.0])
    for name, order in [("unipc", 1), ("unipc", 4), ("dpmpp_2m", 0), ("dpmpp_3m", 4)]:
        with pytest.raises(ValueError, match=f"order must be one of .*, got {order}"):
            SOLVERS[name](mixtures.denoise, mixtures.start(2), [1.0, 0.0], order=order)


def test_a_list_of_levels_keeps_all_digits():
    """Numbers of Python are float64, too."""
    level, seen = 70.35169347127567, []
    SOLVERS["ddim"](lambda x, s: seen.append(float(s)) or x, mixtures.start(2), [level, 0.0])
    assert seen == [level]


def test_the_flags_name_the_solvers():
    """The list for --help, which imports nothing heavy, is the table's."""
    assert list(sampling_flags.SAMPLERS) == list(SOLVERS)
