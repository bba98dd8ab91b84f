"""Which image is drawn from which seed, and what is written where."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image
from reference.fill import fill_
from scripting import SMALL

from guided_diffusion import config, dist_util
from guided_diffusion import sample_util as su
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.trained_flags import KINDS


def sampling_flags(**flags):
    same = dict(
        num_samples=7, batch_size=3, use_ddim=True, clip_denoised=True, class_cond=True,
        in_channels=1, num_classes=4, classes="", use_bf16=False,
    )  # fmt: skip
    return Namespace(**same | flags)


class Echo(torch.nn.Module):
    """A network without weights: it predicts the noise to be a multiple of x and of the label."""

    def forward(self, x, t, y=None, low_res=None):
        shift = 0 if y is None else y.view(-1, 1, 1, 1) / 8
        return 0.5 * x + shift + (0 if low_res is None else low_res)


def draw(log_dir, labels=None, **flags):
    args = sampling_flags(**flags)
    diffusion = create_gaussian_diffusion(noise_schedule="cosine", timestep_respacing="ddim5")
    return su.draw_samples(args, Echo(), diffusion, size=4, seed=11, labels=labels)


def loaded(tmp_path, **flags):
    """Write a small checkpoint without zero layers, and load it as a script does."""
    path = str(tmp_path / "model.pt")
    flags = config.defaults(*KINDS["diffusion model"]) | SMALL | flags
    model, _ = su.CREATE["diffusion model"](**flags)
    torch.save(fill_(model, 0).state_dict(), path)
    return su.load_model_and_diffusion(Namespace(model_path=path, **flags))[0]


def test_a_loaded_network_is_in_eval_mode(tmp_path):
    """Dropout is for training: of a loaded network, two passes over one input agree."""
    model = loaded(tmp_path, dropout=0.9)
    x, t = su.start_noise(0, range(2), (1, 8, 8)), torch.tensor([3, 9])
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(x, t, y=t % 3), model(x, t, y=t % 3))
        model.train()  # the input and weights are such that dropout would show
        assert not torch.equal(model(x, t, y=t % 3), model(x, t, y=t % 3))


@pytest.mark.parametrize("use_fp16, dtype", [(True, torch.float16), (False, torch.float32)])
def test_a_network_is_loaded_in_the_precision_asked_for(tmp_path, use_fp16, dtype):
    """--use_fp16 converts the convolutions between input and output, and what enters them."""
    model = loaded(tmp_path, use_fp16=use_fp16)
    blocks = (model.input_blocks, model.middle_block, model.output_blocks)
    modules = [module for block in blocks for module in block.modules()]
    convolutions = [module for module in modules if isinstance(module, torch.nn.Conv2d)]
    assert model.dtype == dtype and convolutions
    assert {conv.weight.dtype for conv in convolutions} == {dtype}


def test_noise_is_a_function_of_seed_and_index():
    """Image i starts from the same noise in whatever batch it is, and from another than i + 1."""
    together = su.start_noise(5, range(0, 6), (1, 4, 4))
    alone = torch.cat([su.start_noise(5, range(i, i + 1), (1, 4, 4)) for i in range(6)])
    assert torch.equal(together, alone)
    assert len(np.unique(together.numpy())) == together.numel()
    assert not torch.equal(together, su.start_noise(6, range(0, 6), (1, 4, 4)))


def test_noise_is_standard_normal():
    """The start of the chain has mean 0 and variance 1."""
    noise = su.start_noise(0, range(200), (3, 8, 8))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_batches_do_not_change_the_images(log_dir, batch_size):
    """Exactly num_samples images, the same for any batch size."""
    labels = su.choose_labels(sampling_flags(), 11)
    images = draw(log_dir, labels, batch_size=batch_size)
    assert images.shape == (7, 4, 4, 1) and images.dtype == np.uint8
    np.testing.assert_array_equal(images, draw(log_dir, labels))


def test_labels_reach_the_network_only_if_it_takes_them(log_dir):
    """A class-conditional network sees the label of each index, another one none."""
    zeros, threes = (np.full(7, label) for label in (0, 3))
    assert (draw(log_dir, zeros) != draw(log_dir, threes)).any()
    unconditional = draw(log_dir, threes, class_cond=False)
    np.testing.assert_array_equal(unconditional, draw(log_dir, zeros))


def test_labels_are_random_or_taken_in_turn():
    """Without --classes labels are uniform and fixed by the seed; with it they follow the list."""
    many = su.choose_labels(sampling_flags(num_samples=4000), 3)
    assert many.dtype == np.int64 and set(many) == {0, 1, 2, 3}
    assert np.bincount(many).min() > 900
    np.testing.assert_array_equal(many[:10], su.choose_labels(sampling_flags(num_samples=10), 3))
    assert su.choose_labels(sampling_flags(classes="3,1"), 0).tolist() == [3, 1, 3, 1, 3, 1, 3]
    with pytest.raises(ValueError, match="--classes 4.*0 to 3"):
        su.choose_labels(sampling_flags(classes="4"), 0)


def test_pixels_are_cut_off_and_put_last():
    """[-1, 1] becomes 0..255, beyond is clipped, and channels come last."""
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 0.5]).view(1, 6, 1, 1)
    assert su.to_uint8(x)[0, 0, 0].tolist() == [0, 0, 127, 255, 255, 191]


def test_upsampling_takes_base_images_in_turn(tmp_path):
    """Sample i upsamples image i mod M and keeps its label."""
    path = tmp_path / "base.npz"
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    np.savez(path, images, np.array([7, 8, 9]))
    args = sampling_flags(base_samples=str(path), small_size=2, num_classes=10)
    base = su.BaseSamples(args)
    low_res = base.low_res(range(2, 5))["low_res"]
    assert base.labels.tolist() == [7, 8, 9, 7, 8, 9, 7]
    torch.testing.assert_close(low_res[:, 0, 0, 0], torch.tensor([2.0, 0.0, 1.0]) / 127.5 - 1)


def test_scores_are_those_of_each_image_once(log_dir):
    """num_samples limits what is scored, from the front; the mean terms add up to the bits."""
    args = sampling_flags(num_samples=5, class_cond=False)
    diffusion = create_gaussian_diffusion(steps=20, noise_schedule="cosine", timestep_respacing="5")
    images = torch.linspace(-1, 1, 7).view(7, 1, 1, 1).expand(7, 1, 4, 4)
    data = [(images[:3], {}), (images[3:6], {}), (images[6:], {})]
    scores = su.score_images(args, Echo(), diffusion, iter(data), 7)
    assert scores["total_bpd"].shape == (5,) and scores["vb"].shape == (5, 5)
    prior = diffusion._prior_bpd(images[:5]).numpy()
    np.testing.assert_allclose(scores["total_bpd"], scores["vb"].sum(1) + prior, rtol=1e-5)
    su.write_scores(scores)
    with np.load(log_dir / "vb_terms.npz") as terms, np.load(log_dir / "bpd.npz") as bpd:
        np.testing.assert_allclose(terms["arr_0"], scores["vb"].mean(0), rtol=1e-6)
        np.testing.assert_array_equal(bpd["arr_0"], scores["total_bpd"])


def test_samples_are_written_with_labels_and_a_picture(log_dir):
    """The npz has the published name and arrays; the grid beside it shows every image."""
    images = np.random.default_rng(0).integers(0, 255, (12, 8, 8, 3), dtype=np.uint8)
    su.write_samples(images, np.arange(12))
    with np.load(log_dir / "samples_12x8x8x3.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], images)
        np.testing.assert_array_equal(arrays["arr_1"], np.arange(12))
    grid = np.array(Image.open(log_dir / "samples_12x8x8x3.png"))
    zoom = 64 // 8
    assert (grid[16 : 16 + 64 : zoom, 2 : 2 + 64 : zoom] == images[0]).all()


def test_every_rank_takes_its_batches_in_turn(monkeypatch):
    """Over the ranks every index is drawn once."""
    seen = []
    for rank in range(3):
        monkeypatch.setattr(dist_util, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(dist_util, "get_world_size", lambda: 3)
        seen += [i for batch in su._my_batches(20, 4) for i in batch]
    assert sorted(seen) == list(range(20))
