"""Noise levels: sigma and timestep, one from the other, and the grids of short chains."""

import math

import numpy as np
import pytest
import torch
from stand_ins import make

from guided_diffusion import sampling_flags
from guided_diffusion.noise_levels import GRIDS, LARGEST_USEFUL_SIGMA, NoiseLevels, respaced
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from guided_diffusion.schedules import get_named_beta_schedule
from guided_diffusion.script_util import create_gaussian_diffusion


def process(schedule="linear", steps=1000, **options):
    return create_gaussian_diffusion(steps=steps, noise_schedule=schedule, **options)


def test_levels_are_those_of_the_schedules():
    """The ends of both schedules, as they are known (EDM's table of the same checkpoint)."""
    linear, cosine = (NoiseLevels(process(name)).sigmas for name in ("linear", "cosine"))
    np.testing.assert_allclose(linear[[0, -1]], [0.0100005, 157.40728], rtol=1e-6)
    np.testing.assert_allclose(cosine[0], 0.006425, rtol=1e-4)
    np.testing.assert_allclose(cosine[:-6:-1].round(), [20291, 642, 321, 214, 160])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("respacing", ["", "ddim25", "10,20,30"])
def test_a_trained_level_has_its_own_timestep(schedule, respacing):
    """The index itself, whole, at both ends too, of the process before it was respaced."""
    spaced = process(schedule, timestep_respacing=respacing)
    levels = NoiseLevels(spaced)
    found = [levels.timestep_of(sigma) for sigma in levels.sigmas]
    assert found == spaced.timestep_map and {type(t) for t in found} == {int}
    told = torch.tensor(found)
    np.testing.assert_allclose(levels.sigma_of(told), levels.sigmas, rtol=1e-12)
    full = NoiseLevels(process(schedule)).sigmas
    np.testing.assert_array_equal(levels.sigmas, full[spaced.timestep_map])
    a_t = spaced.alphas_cumprod
    np.testing.assert_allclose(levels.sigmas, np.sqrt(1 / a_t - 1), rtol=1e-10)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_between_levels_the_timestep_is_linear_in_log_sigma(schedule):
    """Half way in log sigma is half a timestep, and sigma_of is the inverse."""
    levels = NoiseLevels(process(schedule, timestep_respacing="10"))  # respaced or not
    trained = NoiseLevels(process(schedule)).sigmas
    for i in (0, 17, 500, 998):
        middle = math.sqrt(trained[i] * trained[i + 1])
        assert levels.timestep_of(middle) == pytest.approx(i + 0.5, abs=1e-9)
        t = levels.network_timesteps(middle, 3, torch.device("cpu"))
        assert t.dtype == torch.float32 and t.shape == (3,)
        np.testing.assert_allclose(levels.sigma_of(t), middle, rtol=1e-6)
    assert levels.timestep_of(1e9) == 999 and levels.timestep_of(1e-9) == 0


@pytest.mark.parametrize("steps", [1000, 400])
def test_the_network_is_told_what_it_was_trained_with(steps):
    """As the process itself tells it: whole timesteps, or rescaled ones, to the last bit."""
    told = []

    def model(x, t):
        told.append(t)
        return torch.zeros_like(x)

    for rescale in (False, True):
        told.clear()
        spaced = process("cosine", steps, rescale_timesteps=rescale, timestep_respacing="7")
        spaced.ddim_sample_loop(model, (2, 1, 2, 2))
        levels = NoiseLevels(spaced)
        for t, sigma in zip(told, levels.sigmas[::-1], strict=True):
            ours = levels.network_timesteps(sigma, 2, t.device)
            assert ours.dtype == t.dtype and torch.equal(ours, t)
            np.testing.assert_allclose(levels.sigma_of(ours), sigma, rtol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 2, 5, 10, 50, 250, 1000])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("by", GRIDS)
def test_a_grid_has_as_many_trained_levels_as_steps(by, schedule, num_steps):
    """Falling, no level twice, each one of the process; then 0."""
    levels = NoiseLevels(process(schedule))
    grid = levels.grid(num_steps, by)
    assert len(grid) == num_steps + 1 and grid[-1] == 0
    assert (np.diff(grid) < 0).all()
    assert set(grid[:-1]) <= set(levels.sigmas)
    if num_steps > 1 and num_steps < 1000:
        begins = levels.sigmas[-1] if by in ("published", "time") else LARGEST_USEFUL_SIGMA
        assert 0.75 * begins < grid[0] <= begins
        assert grid[-2] == levels.sigmas[0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_fractional_grids_are_even_in_what_they_say(schedule):
    """In log sigma, in the seventh root of sigma, or in the timestep."""
    levels = NoiseLevels(process(schedule))
    for by, scale in [
        ("logsnr", np.log),
        ("karras", lambda sigma: sigma ** (1 / 7)),
        ("time", lambda sigma: [levels.timestep_of(s) for s in sigma]),
    ]:
        grid = levels.grid(12, by, fractional=True)[:-1]
        np.testing.assert_allclose(np.diff(np.diff(scale(grid))), 0, atol=1e-7)
        rounded = levels.grid(12, by)[:-1]
        assert [levels.round(sigma) for sigma in grid] == rounded.tolist()


@pytest.mark.parametrize("count", [2, 3, 7, 100])
def test_the_published_grid_keeps_the_published_timesteps(count):
    """Those of --timestep_respacing N, whatever that rounds to."""
    levels = NoiseLevels(process("cosine"))
    kept = sorted(space_timesteps(1000, str(count)), reverse=True)
    assert levels.choose(count, "published").tolist() == kept


def test_the_cosine_grid_spends_no_step_where_nothing_is_seen():
    """Its last levels, up to 20,291, are left out by the grids that are even in sigma."""
    levels = NoiseLevels(process("cosine"))
    for by in ("logsnr", "karras"):
        assert levels.grid(10, by)[0] == levels.grid(10, by, fractional=True)[0] < 160
    assert levels.grid(10, "time")[0] > 20000


@pytest.mark.parametrize("steps", [21, 700])
def test_no_border_of_an_interval_is_lost_to_rounding(steps):
    """Each level as the lower and as the upper end, where t is scaled by an odd factor."""
    levels = NoiseLevels(process("cosine", rescale_timesteps=True, steps=steps))
    told = [levels.network_timesteps(s, 1, torch.device("cpu")) for s in levels.sigmas]
    for sigma, t in zip(levels.sigmas, told, strict=True):
        assert not levels.between(sigma, math.inf)(t).any()
        assert levels.between(0, sigma)(t).all()


def test_too_many_steps_and_unknown_grids_are_refused():
    """In one line that says what is possible."""
    levels = NoiseLevels(process(steps=30))
    with pytest.raises(ValueError, match="--num_steps 31 is impossible: .* give 1 to 30"):
        levels.grid(31, "time")
    with pytest.raises(ValueError, match="--steps_by must be one of published, logsnr"):
        levels.grid(3, "log")


def test_an_interval_is_open_below_and_closed_above():
    """Lo < sigma <= hi, at levels and between them; beyond the ends it holds for all, or none."""
    levels = NoiseLevels(process("cosine", rescale_timesteps=True, steps=700))
    low, high = levels.sigmas[[100, 200]]
    t = levels.network_timesteps
    told = torch.cat([t(s, 1, torch.device("cpu")) for s in levels.sigmas[[0, 100, 101, 200, 201]]])
    assert levels.between(low, high)(told).tolist() == [False, False, True, True, False]
    inside = levels.between(math.sqrt(low * levels.sigmas[101]), math.inf)(told)
    assert inside.tolist() == [False, False, True, True, True]
    assert levels.between(0, math.inf)(told).all()
    assert not levels.between(0, levels.sigmas[0] / 2)(told).any()
    assert not levels.between(levels.sigmas[-1] * 2, math.inf)(told).any()


def test_a_respaced_process_is_the_one_that_flags_make():
    """Whether steps are kept by their names or by --timestep_respacing."""
    ours = respaced(process("cosine", learn_sigma=True), sorted(space_timesteps(1000, "50")))
    theirs = process("cosine", learn_sigma=True, timestep_respacing="50")
    assert ours.timestep_map == theirs.timestep_map
    np.testing.assert_array_equal(ours.betas, theirs.betas)
    assert vars(ours).keys() == vars(theirs).keys()


def test_an_unspaced_process_has_levels_too():
    """GaussianDiffusion knows no timestep_map: its timesteps are its own."""
    betas = get_named_beta_schedule("cosine", 20)
    plain, spaced = (NoiseLevels(make(betas=betas, cls=c)) for c in (type(make()), SpacedDiffusion))
    np.testing.assert_array_equal(plain.timesteps, range(20))
    np.testing.assert_allclose(plain.sigmas, spaced.sigmas, rtol=1e-12)


def test_networks_that_predict_x_prev_are_refused():
    """Neither noise nor x_start can be read off them at a level."""
    levels = NoiseLevels(make(mean="PREVIOUS_X"))
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="predicts the noise or x_start, not PREVIOUS_X"):
        levels.x_start(x, x, torch.tensor(1.0))


def test_the_flags_name_the_grids():
    """The list for --help is the table's."""
    assert list(sampling_flags.GRIDS) == list(GRIDS)
