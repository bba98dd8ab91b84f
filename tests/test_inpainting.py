"""Drawing parts of images anew: the walk, its steps, the script, and what it refuses."""

import numpy as np
import pytest
import torch
from PIL import Image
from reference.fill import fill_
from scripting import CLASSIFIER, SMALL, files_below, run_script, succeed

from guided_diffusion import config, script_util
from guided_diffusion.checkpoints import flags_path, save_flags
from guided_diffusion.flag_checks import MASKS
from guided_diffusion.inpainting import (
    inpaint_loop_progressive,
    inpaint_step,
    noise_up,
    read_mask,
    repaint_timesteps,
)
from guided_diffusion.noise_levels import NoiseLevels
from guided_diffusion.sampling import last_sample
from guided_diffusion.script_util import create_gaussian_diffusion

# --------------------------------------------------------------------------------------------
# The walk


@pytest.mark.parametrize("num_steps", [1, 7, 20, 50])
@pytest.mark.parametrize("jump_length", [1, 3, 10, 100])
@pytest.mark.parametrize("resamplings", [1, 2, 5])
def test_each_stretch_is_walked_so_often(num_steps, jump_length, resamplings):
    """Each timestep comes `resamplings` times; steps go down by one, or back up by a stretch."""
    timesteps = repaint_timesteps(num_steps, jump_length, resamplings)
    assert sorted(timesteps) == sorted(list(range(num_steps)) * resamplings)
    assert (timesteps[0], timesteps[-1]) == (num_steps - 1, 0)
    jumps = [(t, after) for t, after in zip(timesteps, timesteps[1:]) if after != t - 1]  # noqa: B905
    stretches = -(-num_steps // jump_length)
    assert len(jumps) == stretches * (resamplings - 1)
    for t, after in jumps:
        assert t % jump_length == 0 and after == min(t + jump_length, num_steps) - 1


def test_a_walk_by_hand():
    """Five steps in stretches of two, each walked twice; the noisiest is shorter."""
    assert repaint_timesteps(5, 2, 2) == [4, 4, 3, 2, 3, 2, 1, 0, 1, 0]
    assert repaint_timesteps(4, 1, 1) == repaint_timesteps(4, 3, 1) == [3, 2, 1, 0]


def spaced(respacing, **flags):
    """Return a process whose network predicts x_start."""
    return create_gaussian_diffusion(
        noise_schedule="linear", predict_xstart=True, timestep_respacing=respacing, **flags
    )


@pytest.mark.parametrize("t, following", [(0, 0), (0, 4), (3, 3), (3, 8)])
def test_noising_up_keeps_the_marginal(t, following):
    """Signal and variance of x_following are those that q(x_following | x_0) has, in one draw."""
    process, draws = spaced("10"), []

    def ones(x):
        draws.append(x.shape)
        return torch.ones_like(x)

    a_prev, a_to = process.alphas_cumprod_prev[t], process.alphas_cumprod[following]
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    added = noise_up(process, zero, t, following, ones)
    kept = noise_up(process, zero + 1, t, following, ones) - added
    assert len(draws) == 2
    np.testing.assert_allclose(float(kept) * a_prev**0.5, a_to**0.5)
    variance = float(kept) ** 2 * (1 - a_prev) + float(added) ** 2
    np.testing.assert_allclose(variance, 1 - a_to)


class Counted:
    """A network of x and the label that keeps the timesteps it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, y=None):
        self.calls.append(int(t[0]))
        return 0.5 * x + (0 if y is None else y.view(-1, 1, 1, 1) / 8)


def stream(seed):
    """Return a source of noise."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator)


IMAGE = torch.rand(3, 1, 4, 4, generator=torch.manual_seed(0)) * 2 - 1
HALF = torch.arange(4).view(1, 1, 1, 4) < 2
Y = {"y": torch.tensor([0, 3, 2])}


def test_the_network_is_called_at_these_timesteps():
    """At those of the unspaced process that the walk visits."""
    process, model = spaced("6"), Counted()
    for _ in inpaint_loop_progressive(process, model, IMAGE, HALF, jump_length=2, resamplings=3):
        pass
    walk = repaint_timesteps(6, 2, 3)
    assert model.calls == [process.timestep_map[t] for t in walk]


def push(x, t, y=None):
    """Stand in for the gradient of a classifier."""
    return 0.3 * torch.sin(x + t.view(-1, 1, 1, 1) + y.view(-1, 1, 1, 1))


@pytest.mark.parametrize("cond_fn", [None, push])
@pytest.mark.parametrize("jump_length", [1, 4, 10])
def test_a_mask_of_everything_is_ancestral_sampling(jump_length, cond_fn):
    """Walked once, from the same noise, exactly; guided, too."""
    process, options = spaced("8"), {"model_kwargs": Y, "cond_fn": cond_fn}
    everything = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    walk = {"jump_length": jump_length, "resamplings": 1}
    found = list(
        inpaint_loop_progressive(
            process, Counted(), IMAGE, everything, noise_fn=stream(1), **walk, **options
        )
    )
    plain = list(
        process.p_sample_loop_progressive(
            Counted(), tuple(IMAGE.shape), noise_fn=stream(1), **options
        )
    )
    for ours, theirs in zip(found, plain, strict=True):
        assert torch.equal(ours["sample"], theirs["sample"])
        assert torch.equal(ours["pred_xstart"], theirs["pred_xstart"])


def test_the_known_part_is_noised_afresh():
    """From the image, to the level of the step; in the end it is the image, bit by bit."""
    process = spaced("5")
    for source, scale in [(torch.zeros_like, 0.0), (torch.ones_like, 1.0)]:
        chain = inpaint_loop_progressive(
            process, Counted(), IMAGE, HALF, resamplings=1, noise_fn=source
        )
        for t, out in zip(range(4, -1, -1), chain, strict=True):
            a_prev = process.alphas_cumprod_prev[t]
            expected = a_prev**0.5 * IMAGE + scale * (1 - a_prev) ** 0.5
            torch.testing.assert_close(out["sample"][..., 2:], expected[..., 2:].float())
    again = inpaint_loop_progressive(process, Counted(), IMAGE, HALF, jump_length=2, resamplings=3)
    final = last_sample(again)
    assert torch.equal(final[..., 2:], IMAGE[..., 2:])
    assert (final[..., :2] != IMAGE[..., :2]).all()


def test_both_parts_are_noised_up_together():
    """Where a stretch is walked again, all of the sample is; else nothing is added."""
    process, t = spaced("5"), torch.full((3,), 2)
    x = torch.randn(IMAGE.shape, generator=torch.manual_seed(2))
    given = (process, Counted(), x, t, IMAGE, HALF)
    plain, last, again = (
        inpaint_step(*given, following, noise_fn=stream(3))["sample"] for following in (1, -1, 4)
    )
    assert torch.equal(plain, last)
    source = stream(3)
    source(x)  # that of the step
    assert torch.equal(again, noise_up(process, plain, 2, 4, source))


CORRELATION = 0.9


def exact_network(process):
    """Return what predicts x_start of two correlated standard normal pixels, exactly."""
    levels = NoiseLevels(process)
    covariance = torch.tensor([[1.0, CORRELATION], [CORRELATION, 1.0]])

    def network(x, t):
        a_t = float(1 / (1 + levels.sigma_of(t[:1]) ** 2))
        gain = a_t**0.5 * covariance @ torch.linalg.inv(a_t * covariance + (1 - a_t) * torch.eye(2))
        return (x.flatten(1) @ gain.T).view_as(x)

    return network


def test_resampling_brings_the_unknown_half_to_its_conditional():
    """Of two correlated pixels, one known to be 1: mean 0.9 and variance 0.19 for the other.

    Walked once, the network only sees the known part after having decided: the mean is too small.
    """
    process = spaced("100", sigma_small=True)
    image, hole = torch.ones(4000, 1, 1, 2), torch.tensor([False, True]).view(1, 1, 1, 2)
    found = {}
    for resamplings in (1, 3, 10):
        torch.manual_seed(0)
        chain = inpaint_loop_progressive(
            process, exact_network(process), image, hole, jump_length=4, resamplings=resamplings,
            clip_denoised=False,
        )  # fmt: skip
        other = last_sample(chain)[..., 1]
        found[resamplings] = abs(float(other.mean()) - CORRELATION), float(other.var())
    assert found[1][0] > 0.2 > 0.12 > found[3][0] > found[10][0] and found[10][0] < 0.05
    variance = 1 - CORRELATION**2
    assert abs(found[10][1] - variance) < 0.04 < abs(found[1][1] - variance)


# --------------------------------------------------------------------------------------------
# Masks


@pytest.mark.parametrize("size", [(4, 4), (7, 7), (28, 28), (5, 8)])
def test_masks_by_name(size):
    """Halves are each other's rest, also of odd sizes; the centre is half as high and wide."""
    masks = {name: read_mask(name, size) for name in MASKS}
    assert all(mask.shape == size and mask.dtype == bool for mask in masks.values())
    for one, other in [("left", "right"), ("top", "bottom")]:
        assert (masks[one] ^ masks[other]).all()
    assert masks["left"][:, 0].all() and masks["top"][0].all()
    if size[0] % 4 == size[1] % 4 == 0:
        inner = [slice(n // 4, n - n // 4) for n in size]
        assert masks["centre"][inner[0], inner[1]].all()
        assert masks["centre"].sum() == size[0] * size[1] / 4


def test_white_is_what_is_drawn_anew(tmp_path):
    """Above 127, grey or in colour."""
    Image.fromarray(np.array([[0, 127], [128, 255]], np.uint8)).save(tmp_path / "m.png")
    with Image.open(tmp_path / "m.png") as picture:
        picture.convert("RGB").save(tmp_path / "c.png")
    for name in ("m.png", "c.png"):
        mask = read_mask(str(tmp_path / name), (2, 2))
        assert mask.tolist() == [[False, False], [True, True]]


# --------------------------------------------------------------------------------------------
# The script


CLASSES = [0, 1, 1, 2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with untrained networks, images of all grey levels, and masks."""
    place = tmp_path_factory.mktemp("inpaint")
    plain = SMALL | {"class_cond": False}
    for name, flags in [("d", SMALL | {"label_dropout": 0.1}), ("u", plain)]:
        flags = config.defaults(*config.DIFFUSION_GROUPS) | flags
        network = script_util.create_model_and_diffusion(**flags)[0]
        keep(network, place / f"{name}.pt", flags)
    flags = config.defaults(*config.CLASSIFIER_GROUPS) | CLASSIFIER
    names = script_util.classifier_defaults()
    keep(script_util.create_classifier(**{n: flags[n] for n in names}), place / "c.pt", flags)
    images = np.random.default_rng(0).permutation(256).astype(np.uint8).reshape(4, 8, 8, 1)
    np.savez(place / "images.npz", images, np.array(CLASSES))
    np.savez(place / "unlabelled.npz", images)
    (place / "folder").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(place / "folder" / f"{CLASSES[i]}_{i}.png")
    left = np.zeros((8, 8), np.uint8)
    left[:, :4] = 255
    Image.fromarray(left).save(place / "left.png")
    Image.fromarray(0 * left).save(place / "black.png")
    Image.fromarray(left[:4]).save(place / "small.png")
    (place / "colour").mkdir()
    Image.fromarray(np.stack([left, left, 0 * left], axis=2)).save(place / "colour" / "0_a.png")
    (place / "large").mkdir()
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(place / "large" / "0_a.png")
    return place


def keep(network, path, flags):
    """Write weights without zero layers, and the flags beside them."""
    torch.save(fill_(network, 0).state_dict(), path)
    save_flags(flags_path(str(path)), flags)


def flags_for(place, **more):
    same = {
        "model_path": place / "d.pt", "images": place / "images.npz", "mask": "left",
        "num_samples": 6, "batch_size": 4, "seed": 5, "timestep_respacing": "4",
        "jump_length": 2, "resamplings": 2,
    }  # fmt: skip
    return same | more


def inpaint(place, folder, **more):
    """Run the script into a folder; return its arrays."""
    succeed("image_inpaint", flags_for(place, log_dir=folder, **more))
    [path] = folder.glob("*.npz")
    with np.load(path) as arrays:
        return dict(arrays)


def given(place, count=6):
    with np.load(place / "images.npz") as arrays:
        return arrays["arr_0"][np.arange(count) % 4]


def test_what_is_known_comes_back_bit_by_bit(place, tmp_path):
    """All 256 grey levels; what is covered is drawn anew, each variant of an image otherwise."""
    arrays = inpaint(place, tmp_path)
    images, original = arrays["arr_0"], given(place)
    assert images.shape == (6, 8, 8, 1) and images.dtype == np.uint8
    np.testing.assert_array_equal(images[:, :, 4:], original[:, :, 4:])
    assert len(np.unique(original[:4])) == 256
    assert (images[:, :, :4] != original[:, :, :4]).mean() > 0.9
    assert (images[0] != images[4]).any() and (images[1] != images[5]).any()
    assert arrays["arr_1"].tolist() == [0, 1, 1, 2, 0, 1]
    with Image.open(tmp_path / "samples_6x8x8x1_inpainted.png") as picture:
        rows = np.array(picture.convert("L"))
    rows = rows[4:].reshape(3, 66, 6, 66)[:, :64:8, :, :64:8].transpose(0, 2, 1, 3)  # 8 x enlarged
    np.testing.assert_array_equal(rows[0], original[..., 0])
    assert (rows[1][..., :4] == 127).all() and (rows[1][..., 4:] == original[:, :, 4:, 0]).all()
    np.testing.assert_array_equal(rows[2], images[..., 0])


@pytest.mark.parametrize("more", [
    {"batch_size": 1}, {"batch_size": 6}, {"images": "folder"}, {"mask": "left.png"},
])  # fmt: skip
def test_an_image_does_not_depend_on_how_it_is_asked_for(more, place, tmp_path):
    """Neither on batches nor on the form of images and mask."""
    more = {n: place / v if isinstance(v, str) else v for n, v in more.items()}
    one, other = inpaint(place, tmp_path / "a"), inpaint(place, tmp_path / "b", **more)
    difference = one["arr_0"].astype(int) - other["arr_0"]
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 0.01  # of rounding
    np.testing.assert_array_equal(one["arr_1"], other["arr_1"])


def test_its_noise_is_not_that_of_a_sample(place, tmp_path):
    """Of the same seed and index: the image may be one."""
    flags = flags_for(place, mask=place / "white.png", resamplings=1)
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(place / "white.png")
    common = {name: flags[name] for name in ("model_path", "num_samples", "batch_size", "seed")}
    common |= {"timestep_respacing": "4", "classes": "0,1,1,2"}
    succeed("image_sample", common, log_dir=tmp_path / "s")
    with np.load(tmp_path / "s" / "samples_6x8x8x1.npz") as arrays:
        sampled = arrays["arr_0"]
    drawn = inpaint(place, tmp_path / "i", mask=place / "white.png", resamplings=1)["arr_0"]
    assert all((one != other).any() for one, other in zip(sampled, drawn, strict=True))


@pytest.mark.parametrize("more", [
    {"cfg_scale": 3}, {"classifier_path": "PLACE/c.pt", "classifier_scale": 30},
    {"guide_model_path": "PLACE/d.pt", "cfg_scale": 2}, {"dynamic_threshold": 0.5},
])  # fmt: skip
def test_what_steers_samplers_steers_it(more, place, tmp_path):
    """And leaves alone what is known."""
    more = {n: str(v).replace("PLACE", str(place)) for n, v in more.items()}
    plain, steered = inpaint(place, tmp_path / "a"), inpaint(place, tmp_path / "b", **more)
    assert (plain["arr_0"] != steered["arr_0"]).any()
    np.testing.assert_array_equal(steered["arr_0"][:, :, 4:], given(place)[:, :, 4:])


def test_steps_may_be_chosen_by_their_number(place, tmp_path):
    """--num_steps 4 takes the steps that --timestep_respacing 4 keeps."""
    one = inpaint(place, tmp_path / "a")
    other = inpaint(place, tmp_path / "b", num_steps=4, timestep_respacing="")
    np.testing.assert_array_equal(one["arr_0"], other["arr_0"])


def test_labels_are_those_asked_for_or_none(place, tmp_path):
    """--classes wins over the labels of the images; without labels an unconditional model works."""
    for name in ("images", "unlabelled"):
        arrays = inpaint(place, tmp_path / name, classes="1,2", images=place / f"{name}.npz")
        assert arrays["arr_1"].tolist() == [1, 2] * 3
    arrays = inpaint(
        place, tmp_path / "b", model_path=place / "u.pt", images=place / "unlabelled.npz"
    )
    assert "arr_1" not in arrays


def test_a_set_goes_on_with_the_same_mask_only(place, tmp_path):
    """However the mask is named; another mask, walk or image is refused and named."""
    first = inpaint(place, tmp_path)
    done = succeed("image_inpaint", flags_for(place, log_dir=tmp_path, mask=place / "left.png"))
    assert "6 of 6 samples are there" in done.out
    for more, word in [
        ({"mask": "right"}, "mask: "), ({"resamplings": 3}, "resamplings: 2 there, 3 here"),
        ({"images": place / "folder"}, "images: "),
    ]:  # fmt: skip
        done = run_script("image_inpaint", flags_for(place, log_dir=tmp_path, **more))
        assert done.code == 1 and word in done.err and len(done.err.strip().splitlines()) == 1
    with np.load(tmp_path / "samples_6x8x8x1.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], first["arr_0"])


@pytest.mark.parametrize("more, words", [
    ({"mask": "PLACE/small.png"}, "--mask small.png is 4 x 8, the images are 8 x 8"),
    ({"mask": "PLACE/black.png"}, "--mask black.png covers nothing white"),
    ({"mask": "PLACE/nowhere.png"}, "--mask nowhere.png does not exist centre, left"),
    ({"mask": "middle"}, "--mask middle does not exist centre, left"),
    ({"mask": "PLACE/d.json"}, "--mask d.json cannot be read"),
    ({"images": "PLACE/nowhere.npz"}, "--images nowhere.npz does not exist"),
    ({"images": "PLACE/colour"}, "--images 0_a.png is in colour (RGB) grey convert"),
    ({"images": "PLACE/large"}, "--images 0_a.png is 16 x 16 the model takes 8 x 8 resize"),
    ({"images": "PLACE/unlabelled.npz"}, "--images no labels --class_cond arr_1 --classes"),
    ({"sampler": "dpmpp_2m"}, "--sampler dpmpp_2m cannot inpaint ancestral leave it out"),
    ({"use_ddim": True}, "--use_ddim True cannot inpaint ancestral"),
    ({"resamplings": 0}, "--resamplings 0 at least 1"),
    ({"jump_length": 0}, "--jump_length 0 at least 1"),
    ({"classifier_scale": 1}, "--classifier_path is missing --classifier_scale 0"),
    (
        {"model_path": "PLACE/u.pt", "images": "PLACE/unlabelled.npz", "classifier_scale": 1,
         "classifier_path": "PLACE/c.pt"},
        "--images no labels --classifier_scale needs",
    ),
])  # fmt: skip
def test_a_mistake_ends_in_one_line(more, words, place, tmp_path):
    """With the flag, the value and the remedy; nothing is written."""
    more = {n: v.replace("PLACE", str(place)) if isinstance(v, str) else v for n, v in more.items()}
    before = files_below(place)
    done = run_script("image_inpaint", flags_for(place, log_dir=tmp_path / "new") | more)
    assert done.code in (1, 2) and len(done.err.strip().splitlines()) == 1, done.err
    assert all(word in done.err for word in words.split()), done.err
    assert not files_below(tmp_path) and files_below(place) == before


def test_a_dry_run_counts_the_walks(place, tmp_path):
    """Calls are steps times resamplings; a preset's classifier does not come unasked."""
    images = tmp_path / "images.npz"
    np.savez(images, np.zeros((2, 28, 28, 1), np.uint8), np.array([0, 1]))
    flags = {"preset": "fashion", "images": images, "mask": "centre", "dry_run": True}
    done = succeed("image_inpaint", flags, log_dir=tmp_path / "new")
    assert "an image, 500 x 0.516" in done.out and "--classifier_scale 0.0" in done.out
    assert "(0.516 + 0.383)" in succeed("image_inpaint", flags, classifier_scale=2).out
    assert not (tmp_path / "new").exists()
