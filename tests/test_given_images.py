"""What a model makes of given images: scores, latents and reconstructions."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion import given_images
from guided_diffusion.script_util import create_gaussian_diffusion

STEPS = 20


def flags(**more):
    same = dict(num_samples=100, clip_denoised=True, use_bf16=False)
    return Namespace(**same | more)


def model(x, t, y=None):
    """Predict noise that depends on the image, the timestep and the label."""
    shift = 0 if y is None else y.view(-1, 1, 1, 1) / 8
    return 0.5 * x + shift + 1e-4 * t.view(-1, 1, 1, 1).float()


def process(respacing=""):
    return create_gaussian_diffusion(
        steps=STEPS, noise_schedule="cosine", timestep_respacing=respacing
    )


def images(count=7):
    values = np.random.default_rng(0).integers(0, 256, (count, 1, 4, 4))
    return torch.from_numpy(values / 127.5 - 1).float()


def batches(x, size, labels=False):
    """Split images as a loader of one rank does."""
    cond = [{"y": torch.arange(len(x))[i : i + size]} if labels else {} for i in range(len(x))]
    return iter([(x[i : i + size], cond[i]) for i in range(0, len(x), size)])


def test_scores_are_those_of_each_image_once(log_dir):
    """num_samples limits what is scored, from the front; the mean terms add up to the bits."""
    x, diffusion = images(), process("5")
    scores = given_images.score_images(flags(num_samples=5), model, diffusion, batches(x, 3), 7)
    assert scores["total_bpd"].shape == (5,) and scores["vb"].shape == (5, 5)
    prior = diffusion._prior_bpd(x[:5]).numpy()
    np.testing.assert_allclose(scores["total_bpd"], scores["vb"].sum(1) + prior, rtol=1e-5)
    given_images.write_scores(scores)
    with np.load(log_dir / "vb_terms.npz") as terms, np.load(log_dir / "bpd.npz") as bpd:
        np.testing.assert_allclose(terms["arr_0"], scores["vb"].mean(0), rtol=1e-6)
        np.testing.assert_array_equal(bpd["arr_0"], scores["total_bpd"])


@pytest.mark.parametrize("size", [1, 4, 7])
def test_a_score_does_not_depend_on_the_batch(size):
    """The noise of an image is that of its number."""
    x, diffusion = images(), process("5")
    found = given_images.score_images(flags(), model, diffusion, batches(x, size), 7)
    whole = given_images.score_images(flags(), model, diffusion, batches(x, 7), 7)
    np.testing.assert_allclose(found["vb"], whole["vb"], rtol=1e-5)
    other = given_images.score_images(flags(), model, diffusion, batches(x, 7), 8)
    assert (other["vb"] != whole["vb"]).any()


@pytest.mark.parametrize("size", [2, 7])
def test_latents_are_those_of_the_reverse_loop(size):
    """With the labels of each image, and decoded by the loop that they are the noise of."""
    x, labels, diffusion = images(), torch.arange(7), process()
    args = flags(clip_denoised=False)
    found = given_images.invert_images(args, model, diffusion, batches(x, size, labels=True))
    options = dict(clip_denoised=False, model_kwargs={"y": labels})
    latents = diffusion.ddim_reverse_sample_loop(model, x, **options)
    back = diffusion.ddim_sample_loop(model, tuple(x.shape), noise=latents, **options)
    np.testing.assert_allclose(found["latents"][..., 0], latents[:, 0], rtol=1e-5, atol=1e-5)
    error = (back.clamp(-1, 1) - x).abs().mean(dim=(1, 2, 3)) * 127.5
    np.testing.assert_allclose(found["errors"], error, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(found["labels"], labels)
    np.testing.assert_allclose(found["images"][..., 0], (x[:, 0] + 1) * 127.5, atol=1e-3)


def test_inversions_are_written_with_their_picture(log_dir):
    """Latents and reconstructions with labels, the error of each image, and three strips."""
    args = flags(clip_denoised=False)
    found = given_images.invert_images(args, model, process(), batches(images(), 7, labels=True))
    given_images.write_inversions(found, STEPS)
    for kind, dtype in [("latents", np.float32), ("reconstructions", np.uint8)]:
        with np.load(log_dir / f"{kind}_7x4x4x1.npz") as arrays:
            assert arrays["arr_0"].dtype == dtype
            np.testing.assert_array_equal(arrays["arr_0"], found[kind])
            np.testing.assert_array_equal(arrays["arr_1"], np.arange(7))
    with np.load(log_dir / "errors.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], found["errors"])
    with Image.open(log_dir / "round_trip.png") as picture:
        assert picture.size == (7 * 66, 3 * 66 + 4)
