"""From flags to chains: every sampler on a mixture whose answer is known, and what it calls.

`make_sampler` is what the scripts use; here it gets exact networks of a mixture of Gaussians.
"""

from argparse import Namespace
from collections import Counter
from contextlib import suppress

import mixtures
import pytest
import torch

from guided_diffusion import config, samplers, sampling_flags
from guided_diffusion.noise_levels import NoiseLevels
from guided_diffusion.samplers import call_levels, is_guided, make_sampler
from guided_diffusion.sampling_flags import SAMPLERS, find_conflict
from guided_diffusion.script_util import create_gaussian_diffusion

SOLVING = [name for name in SAMPLERS if name not in sampling_flags.PUBLISHED_SAMPLERS]
OTHERS = [("heun", {"s_churn": 20.0}), ("unipc", {"solver_order": 3}), ("ddim", {"eta": 0.7})]
ALL = [(name, {}) for name in SAMPLERS] + OTHERS


def flags(**given):
    """Return the flags of a sampling script, with a few that the command line gave."""
    groups = (config.SampleConfig, config.StepsConfig, config.SteeringConfig)
    same = {"clip_denoised": False, "class_cond": True, "num_classes": 4}
    return Namespace(**config.defaults(*groups) | same | given)


def process(schedule="linear", **options):
    return create_gaussian_diffusion(noise_schedule=schedule, sigma_small=True, **options)


def run(args, diffusion, y, model=None, cond_fn=None, **more):
    """Sample a point for each label; return the points, and the network."""
    model = model or mixtures.ExactNetwork(diffusion)
    sampler = make_sampler(args, model, diffusion, cond_fn=cond_fn, **more)
    generator = torch.Generator().manual_seed(5)

    def draw(x):
        return torch.randn(x.shape, generator=generator)

    steps = list(sampler.chain((len(y), 2), draw, {"y": y}))
    assert len(steps) == sampler.num_steps
    return steps[-1]["sample"], model


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("name", "options"), ALL)
def test_guided_samples_have_the_moments_of_the_class(name, options, schedule):
    """With the mixture's own class gradient at scale 1: mean and covariance of p(x | y)."""
    diffusion = process(schedule)
    num_steps = 600 if name == "ancestral" else 150  # its guidance is of first order in the step
    args = flags(sampler=name, num_steps=num_steps, steps_by="logsnr", **options)
    gradient = mixtures.ExactGradient(diffusion)
    for label in (0, 2):
        y = torch.full((2000,), label)
        x, _ = run(args, diffusion, y, cond_fn=gradient)
        torch.testing.assert_close(
            x.mean(dim=0).double(), mixtures.MEANS[label], atol=0.025, rtol=0
        )
        expected = mixtures.VARIANCES[label] * torch.eye(2)
        tolerance = 0.15 * mixtures.VARIANCES[label]
        torch.testing.assert_close(x.T.cov(), expected.float(), atol=float(tolerance), rtol=0)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", [name for name in SOLVING if name != "dpmpp_2m_sde"])
def test_fractional_timesteps_lead_to_the_same_points(name, schedule):
    """Between trained levels the exact network is as exact: many steps end in the same place."""
    diffusion, y = process(schedule), torch.zeros(64, dtype=torch.int64)
    same = dict(sampler=name, num_steps=120)
    ends = [
        run(flags(**same, steps_by=by, fractional_t=by != "time"), diffusion, y)
        for by in ("logsnr", "karras", "time")
    ]
    told = [set(model.calls) for _, model in ends]
    assert any(t % 1 for t in told[0]) and any(t % 1 for t in told[1])
    assert not any(t % 1 for t in told[2])
    for x, _ in ends[:2]:
        assert (x - ends[2][0]).pow(2).mean().sqrt() < 0.05


# --------------------------------------------------------------------------------------------
# The published samplers under their new names


def test_num_steps_is_timestep_respacing():
    """--num_steps N takes the timesteps of --timestep_respacing N, to the last bit."""
    y = torch.arange(4).repeat(8)
    for name in ("ancestral", "ddim"):
        ours, model = run(flags(sampler=name, num_steps=25), process("cosine"), y)
        respaced = process("cosine", timestep_respacing="25")
        theirs, other = run(flags(use_ddim=name == "ddim"), respaced, y)
        assert torch.equal(ours, theirs) and model.calls == other.calls and len(model.calls) == 25


def test_solvers_take_the_steps_of_timestep_respacing():
    """Without --num_steps, those that the process has kept."""
    diffusion = process(timestep_respacing="ddim20")
    _, model = run(flags(sampler="unipc"), diffusion, torch.zeros(2, dtype=torch.int64))
    assert model.calls == diffusion.timestep_map[::-1]


def test_eta_of_ddim_is_that_of_the_process():
    """On the command line ddim is the published step, with --eta, too."""
    y, diffusion = torch.arange(4), process("cosine", timestep_respacing="15")
    model = mixtures.ExactNetwork(diffusion)
    generator = torch.Generator().manual_seed(5)
    theirs = diffusion.ddim_sample_loop(
        model, (4, 2), clip_denoised=False, eta=0.6, model_kwargs={"y": y},
        noise_fn=lambda x: torch.randn(x.shape, generator=generator),
    )  # fmt: skip
    assert torch.equal(run(flags(sampler="ddim", eta=0.6), diffusion, y)[0], theirs)


def test_learned_variances_are_used_by_ancestral_sampling():
    """With the same predictions, other variance channels make other samples."""
    diffusion = create_gaussian_diffusion(learn_sigma=True, timestep_respacing="15")
    ends = []
    for value in (0.0, 1.0):
        exact = mixtures.ExactNetwork(diffusion, num_out=4)

        def model(x, t, y=None, exact=exact, value=value):
            return exact(x, t) + torch.tensor([0, 0, value, value])

        ends.append(run(flags(), diffusion, torch.zeros(8, dtype=torch.int64), model)[0])
    assert (ends[0] - ends[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("dpmpp_2m_sde", {"eta": 0.5, "s_noise": 1.1}, {"eta": 0.5, "s_noise": 1.1}),
        ("dpmpp_2m_sde", {}, {"s_noise": 1.0}),
        ("unipc", {"solver_order": 3}, {"order": 3}),
        (
            "heun", {"s_churn": 2.0, "s_tmin": 0.1, "s_tmax": 9.0, "s_noise": 1.1},
            {"s_churn": 2.0, "s_tmin": 0.1, "s_tmax": 9.0, "s_noise": 1.1},
        ),
        ("dpmpp_3m", {}, {}),
    ],
)  # fmt: skip
def test_flags_reach_their_solver(name, given, expected, monkeypatch):
    """Each under the name that the solver has for it; an eta that is not given, not at all."""
    seen = {}
    monkeypatch.setattr(
        samplers, "solver_sample_loop_progressive", lambda *_, **options: seen.update(options) or []
    )
    sampler = make_sampler(flags(sampler=name, num_steps=5, **given), len, process("cosine"))
    sampler.chain((1, 2), torch.randn_like, {})
    options = set(seen) - {"solver", "sigmas", "round_sigma", "clip_denoised", "device"}
    options -= {"cond_fn", "noise_fn", "model_kwargs"}
    assert {option: seen[option] for option in options} == expected


def test_churn_is_rounded_to_what_the_network_knows():
    """To levels of the training, kept or not; fractional ones only back into their range."""
    options = dict(sampler="heun", s_churn=8.0, steps_by="karras")
    full, spaced = process("cosine"), process("cosine", timestep_respacing="10")
    trained = set(NoiseLevels(full).sigmas)
    few = call_levels(flags(sampler="heun", s_churn=8.0), spaced)
    assert few == call_levels(flags(**options | {"steps_by": "published"}, num_steps=10), full)
    assert set(few) <= trained and not set(few) <= set(NoiseLevels(spaced).sigmas)
    exact = call_levels(flags(**options, num_steps=10, fractional_t=True), process("linear"))
    assert max(exact) == NoiseLevels(process("linear")).sigmas[-1]
    assert len(set(exact) - set(NoiseLevels(process("linear")).sigmas)) > 5


@pytest.mark.parametrize(("name", "by"), [("ancestral", "published"), ("unipc", "logsnr")])
def test_steps_are_spread_as_suits_the_sampler(name, by):
    """Without --steps_by: the published ones for the published samplers, else even log sigma."""
    plain, named, other = (
        call_levels(flags(sampler=name, num_steps=9, **given), process("cosine"))
        for given in ({}, {"steps_by": by}, {"steps_by": "karras"})
    )
    assert plain == named != other


def test_missing_flags_have_their_defaults():
    """A program may give a few flags alone."""
    args = Namespace(sampler="dpmpp_2m", num_steps=4, clip_denoised=False, class_cond=True)
    diffusion = process("cosine")
    _, model = run(args, diffusion, torch.zeros(2, dtype=torch.int64))
    assert len(model.calls) == 4


def test_a_respaced_process_is_not_respaced_again():
    """For programs; the command line refuses it earlier."""
    with pytest.raises(ValueError, match="the process keeps 10 of 1000 steps already"):
        make_sampler(flags(num_steps=5), len, process(timestep_respacing="10"))


@pytest.mark.parametrize("given", [{"class_cond": False}, {"dynamic_threshold": 0.9}])
def test_samples_are_drawn_where_the_network_is(given):
    """Also where a function stands around it: its parameters tell, if no device is given."""
    seen = []

    class Network(torch.nn.Linear):
        def forward(self, x, t, y=None):
            seen.append(x.device.type)
            return super().forward(x)

    args, network = flags(use_ddim=True, **given), Network(2, 2, device="meta")
    diffusion = process(timestep_respacing="3")
    sampler = make_sampler(args, network, diffusion, cond_fn=lambda x, t, y: x)
    with suppress(NotImplementedError, RuntimeError):  # what has no content cannot be read
        list(sampler.chain((1, 2), torch.randn_like, {"y": torch.zeros(1)}))
    assert set(seen) == {"meta"}


# --------------------------------------------------------------------------------------------
# What is called, and where

INTERVAL = "0.2,3"


def count_inside(args, diffusion):
    return sum(0.2 < sigma <= 3 for sigma in call_levels(args, diffusion))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_outside_the_interval_only_the_network_is_called(name, schedule):
    """Classifier, second pass and weaker network: called where lo < sigma <= hi, nowhere else."""
    diffusion, y = process(schedule), torch.zeros(3, dtype=torch.int64)
    args = flags(sampler=name, num_steps=12, steps_by="logsnr", guidance_interval=INTERVAL)
    inside, calls = count_inside(args, diffusion), len(call_levels(args, diffusion))
    assert 0 < inside < calls == {"heun": 23, "plms": 13}.get(name, 12)
    gradient, weak = (kind(diffusion) for kind in (mixtures.ExactGradient, mixtures.ExactNetwork))
    _, model = run(args, diffusion, y, cond_fn=gradient, guide=weak)
    levels = NoiseLevels(diffusion)
    told = [float(levels.network_timesteps(s, 1, "cpu")) for s in call_levels(args, diffusion)]
    assert model.calls == told
    within = [t for t, s in zip(told, call_levels(args, diffusion), strict=True) if 0.2 < s <= 3]
    assert gradient.calls == weak.calls == within
    both = flags(**vars(args) | {"cfg_scale": 2.0})
    _, model = run(both, diffusion, y)
    assert len(model.calls) == calls + inside


@pytest.mark.parametrize("name", ["ancestral", "ddim", "dpmpp_2m"])
def test_an_interval_that_holds_everything_changes_nothing(name):
    """And one that holds nothing is no guidance at all; to the last bit."""
    diffusion, y = process("cosine"), torch.arange(4)
    gradient = mixtures.ExactGradient(diffusion)
    same = dict(sampler=name, num_steps=12)

    def end(cond_fn, interval):
        return run(flags(**same, guidance_interval=interval), diffusion, y, cond_fn=cond_fn)[0]

    assert torch.equal(end(gradient, "0,inf"), end(gradient, ""))
    assert torch.equal(end(gradient, "30000,inf"), end(None, ""))
    assert not torch.equal(end(gradient, "0.2,3"), end(gradient, ""))


def test_levels_of_heun_with_churn_are_raised():
    """What is counted is what is called."""
    diffusion = process("cosine")
    args = flags(sampler="heun", num_steps=6, steps_by="karras", s_churn=2.0)
    plain = call_levels(flags(**vars(args) | {"s_churn": 0.0}), diffusion)
    churned = call_levels(args, diffusion)
    assert len(churned) == len(plain) and set(churned) <= set(NoiseLevels(diffusion).sigmas)
    assert all(a >= b for a, b in zip(churned, plain, strict=True)) and churned != plain
    assert [is_guided(flags(guidance_interval="1,2"), s) for s in (1, 1.5, 2, 3)] == [0, 1, 1, 0]


# --------------------------------------------------------------------------------------------
# The estimate


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_dynamic_threshold_sees_the_guided_estimate(name):
    """Where a huge gradient would leave [-1, 1] far behind, every estimate lies within."""
    diffusion, y = process("cosine"), torch.arange(4).repeat(4)
    gradient = mixtures.ExactGradient(diffusion)

    def strong(x, t, y):
        return 300 * gradient(x, t, y)

    def largest_estimate(threshold):
        args = flags(sampler=name, num_steps=10, clip_denoised=True, dynamic_threshold=threshold)
        sampler = make_sampler(args, mixtures.ExactNetwork(diffusion), diffusion, cond_fn=strong)
        steps = sampler.chain((16, 2), torch.randn_like, {"y": y})
        return max(float(step["pred_xstart"].abs().max()) for step in steps)

    assert largest_estimate(0.9) <= 1 + 1e-6
    if name != "ancestral":  # where the gradient shifts the mean, after the estimate
        assert largest_estimate(0.0) > 2


@pytest.mark.parametrize("name", SAMPLERS)
def test_clipping_bounds_the_estimate(name):
    """--clip_denoised holds in every sampler, as published."""
    diffusion = process("cosine")
    model = lambda x, t, y=None: torch.zeros_like(x)  # noqa: E731 - x_start = x, far outside
    sampler = make_sampler(flags(sampler=name, num_steps=5, clip_denoised=True), model, diffusion)
    steps = list(sampler.chain((9, 2), torch.randn_like, {"y": torch.zeros(9)}))
    assert max(step["pred_xstart"].abs().max() for step in steps) == 1


# --------------------------------------------------------------------------------------------
# Flags that do not go together


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"use_ddim": True, "sampler": "unipc"}, "--use_ddim True and --sampler unipc"),
        ({"num_steps": 5, "timestep_respacing": "10"}, "both choose the steps"),
        ({"num_steps": 1001, "diffusion_steps": 1000}, "give at most that"),
        ({"steps_by": "karras"}, "--steps_by karras spreads --num_steps"),
        ({"sampler": "heun", "s_tmin": 1.0}, "--s_tmin 1.0 is of the noise of --s_churn"),
        (
            {"sampler": "heun", "s_churn": 1.0, "s_tmin": 3.0, "s_tmax": 1.0},
            "--s_tmin 3.0 is above",
        ),
        ({"guide_scale": 3.0}, "--guide_scale 3.0 scales --guide_model_path: give that, too"),
        (
            {"guide_scale": 1.0, "guide_model_path": "x.pt", "guidance_interval": "1,2"},
            "--guidance_interval 1,2 limits guidance, but there is",
        ),
        ({"fractional_t": True, "num_steps": 5}, "--fractional_t True needs --num_steps and"),
        ({"fractional_t": True, "sampler": "unipc"}, "--fractional_t True needs --num_steps and"),
        ({"eta": 0.5}, "--eta 0.5 is for --sampler ddim or dpmpp_2m_sde"),
        ({"eta": 0.5, "sampler": "unipc"}, "--eta 0.5 is for"),
        ({"solver_order": 3, "sampler": "heun"}, "--solver_order 3 is for --sampler unipc"),
        ({"s_churn": 1.0}, "--s_churn 1.0 is for --sampler heun"),
        ({"cfg_scale": 2.0, "class_cond": True}, "--cfg_scale 2.0 needs a network with a null"),
        ({"cfg_scale": 2.0, "label_dropout": 0.1}, "--cfg_scale 2.0 needs a network with a null"),
        ({"guidance_interval": "1,2"}, "--guidance_interval 1,2 limits guidance, but there is"),
    ],
)
def test_flags_that_do_not_go_together_are_named(given, told):
    """One line with the flag, its value and the remedy."""
    assert told in find_conflict(given)
    assert "\n" not in find_conflict(given)


@pytest.mark.parametrize(
    "given",
    [
        {}, {"use_ddim": True, "sampler": "ddim", "eta": 0.5},
        {"sampler": "heun", "s_churn": 3.0, "s_noise": 1.003, "num_steps": 9, "steps_by": "karras"},
        {"sampler": "dpmpp_2m_sde", "s_noise": 1.003}, {"guide_model_path": "x", "guide_scale": 3},
        {"sampler": "unipc", "num_steps": 9, "fractional_t": True, "solver_order": 3},
        {"cfg_scale": 2.0, "class_cond": True, "label_dropout": 0.1, "guidance_interval": "1,2"},
        {"classifier_scale": 1.0, "guidance_interval": "0,inf"}, {"timestep_respacing": "250"},
    ],
)  # fmt: skip
def test_flags_that_go_together_are_taken(given):
    """What the help describes."""
    assert find_conflict(given) is None


@pytest.mark.parametrize("value", ["1", "2,1", "1,1", "-1,2", "a,b", "1,2,3", "nan,1", ","])
def test_intervals_that_are_none_are_refused(value):
    """Two numbers, 0 <= LO < HI."""
    assert "must be two sigmas" in config.find_mistake(_field("guidance_interval"), value)


def test_eta_is_a_share_or_unset():
    """0 to 1, or the -1 that stands for the sampler's own."""
    wrong = Counter(config.find_mistake(_field("eta"), v) is None for v in (-1, 0, 0.5, 1, -0.5, 2))
    assert wrong == {True: 4, False: 2}


def _field(name):
    return next(f for f in config.all_fields() if f.name == name)
