"""Which image is drawn from which seed, and what is written where."""

from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from reference.fill import fill_
from scripting import SMALL

from guided_diffusion import config, dist_util, streams
from guided_diffusion import sample_util as su
from guided_diffusion.pictures import to_uint8
from guided_diffusion.sample_files import SampleFiles
from guided_diffusion.sample_labels import Labels
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.trained_flags import KINDS


def sampling_flags(**flags):
    same = dict(
        num_samples=7, batch_size=3, use_ddim=True, clip_denoised=True, class_cond=True,
        in_channels=1, num_classes=4, use_bf16=False, save_images=False, save_every_t=0,
        model_path="", guide_model_path="",
    )  # fmt: skip
    return Namespace(**same | flags)


class Echo(torch.nn.Module):
    """A network without weights: it predicts the noise to be a multiple of x and of the label."""

    def forward(self, x, t, y=None, low_res=None):
        shift = 0 if y is None else y.view(-1, 1, 1, 1) / 8
        return 0.5 * x + shift + (0 if low_res is None else low_res)


def draw(folder, labels=None, **flags):
    """Draw 7 images of 4 x 4 with seed 11; return the arrays of the npz."""
    args = sampling_flags(**flags)
    diffusion = create_gaussian_diffusion(noise_schedule="cosine", timestep_respacing="ddim5")
    files = SampleFiles(str(folder), (args.num_samples, 4, 4, 1), {})
    folder.mkdir(exist_ok=True)
    with files.claimed(11, int):
        su.draw_samples(args, su.choose_sampler(args, Echo(), diffusion), files, labels)
    with np.load(files.npz) as arrays:
        return dict(arrays)


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
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 9])
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


RANDOM = Labels(None, 4, 11)


@pytest.mark.parametrize("use_ddim", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_batches_do_not_change_the_images(batch_size, use_ddim, tmp_path):
    """Exactly num_samples images, the same for any batch size, noise within the chain included."""
    one = draw(tmp_path / "a", RANDOM, batch_size=batch_size, use_ddim=use_ddim)
    other = draw(tmp_path / "b", RANDOM, use_ddim=use_ddim)
    assert one["arr_0"].shape == (7, 4, 4, 1) and one["arr_0"].dtype == np.uint8
    for name in ("arr_0", "arr_1"):
        np.testing.assert_array_equal(one[name], other[name])


def test_ranks_do_not_change_the_images(tmp_path, monkeypatch):
    """Each rank draws its share; together they have drawn what one rank draws."""
    alone = draw(tmp_path / "a", RANDOM, use_ddim=False)
    monkeypatch.setattr(SampleFiles, "finish", lambda *args, **show: None)
    monkeypatch.setattr(dist_util, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist_util, "gather_objects", lambda value: [value])
    monkeypatch.setattr(dist_util, "broadcast_object", lambda value: value)
    monkeypatch.setattr(dist_util, "wait_patiently", lambda name: None)
    monkeypatch.setattr(dist_util, "barrier", lambda: None)
    args = sampling_flags(batch_size=2, use_ddim=False)
    diffusion = create_gaussian_diffusion(noise_schedule="cosine", timestep_respacing="ddim5")
    files = SampleFiles(str(tmp_path), (7, 4, 4, 1), {})
    sampler = su.choose_sampler(args, Echo(), diffusion)
    with files.claimed(11, int):
        plan = files.missing(2)
        monkeypatch.setattr(SampleFiles, "missing", lambda *_: plan)  # as rank 0 told them at first
        for rank in range(3):
            monkeypatch.setattr(dist_util, "get_rank", lambda rank=rank: rank)
            su.draw_samples(args, sampler, files, RANDOM)
            assert len(files._ranges()) == (2, 3, 4)[rank]
        drawn = np.concatenate(list(files._in_order()))
    np.testing.assert_array_equal(drawn, alone["arr_0"])


def test_ancestral_noise_differs_between_images_and_seeds(tmp_path):
    """With the same start, label and network, chains of two indices part by their noise alone."""
    blocks = []
    with ThreadPoolExecutor(1) as thread:
        for seed, index in [(11, 0), (11, 1), (12, 0)]:
            noise = streams.ChainNoise(thread, seed, [index], (8,))
            noise.take()
            blocks.append(np.concatenate([noise.take(), noise.take()]).ravel())
    assert len(np.unique(blocks)) == 3 * 16


def test_labels_reach_the_network_only_if_it_takes_them(tmp_path):
    """A class-conditional network sees the label of each index, another one none."""
    zeros, threes = (Labels(np.array([label]), 4, 0) for label in (0, 3))
    drawn = {
        (name, class_cond): draw(tmp_path / f"{name}{class_cond}", labels, class_cond=class_cond)
        for name, labels in [("zeros", zeros), ("threes", threes)]
        for class_cond in (True, False)
    }
    assert (drawn["zeros", True]["arr_0"] != drawn["threes", True]["arr_0"]).any()
    plain, other = drawn["zeros", False], drawn["threes", False]
    np.testing.assert_array_equal(plain["arr_0"], other["arr_0"])
    assert other["arr_1"].tolist() == [3] * 7


def test_images_that_are_no_numbers_are_told(tmp_path, capsys):
    """They end as black pixels, which nobody would notice among many; how many are, is said."""

    class Broken(Echo):
        def forward(self, x, t, y=None):
            return super().forward(x, t) / (y != 2).view(-1, 1, 1, 1)

    with mock.patch(f"{__name__}.Echo", Broken):
        draw(tmp_path, Labels(np.array([2, 0, 2]), 4, 0), clip_denoised=False)
    assert "5 of the images drawn now have pixels that are not finite" in capsys.readouterr().out


def test_an_upsampled_image_has_noise_of_its_own(tmp_path):
    """Under one seed its start differs from that of the image that it is made from."""

    class Base:
        purposes = streams.UP_NOISE, streams.UP_CHAIN

        def cond(self, indices, seed):
            return {"low_res": torch.zeros(len(indices), 1, 4, 4)}

    args = sampling_flags()
    diffusion = create_gaussian_diffusion(noise_schedule="cosine", timestep_respacing="ddim5")
    sampler = su.choose_sampler(args, Echo(), diffusion)
    for name, base in [("plain", None), ("upsampled", Base())]:
        files = SampleFiles(str(tmp_path / name), (7, 4, 4, 1), {})
        (tmp_path / name).mkdir()
        with files.claimed(11, int):
            su.draw_samples(args, sampler, files, RANDOM, base=base)
    plain, upsampled = (
        np.load(tmp_path / name / "samples_7x4x4x1.npz")["arr_0"] for name in ("plain", "upsampled")
    )
    assert all((one != other).any() for one, other in zip(plain, upsampled, strict=True))


def test_films_show_the_chains_of_the_first_images(tmp_path):
    """Every second step and the last; x_t above, the predicted x_start below it."""
    kept = {}
    original = SampleFiles.write

    def write(self, indices, images, film=None):
        kept[indices] = (images, film)
        original(self, indices, images, film)

    with mock.patch.object(SampleFiles, "write", write):
        draw(tmp_path / "a", num_samples=12, batch_size=5, save_every_t=2, use_ddim=False)
    films = {indices.start: film for indices, (_, film) in kept.items()}
    assert films[0].shape == (5, 2, 3, 4, 4, 1) and films[5].shape == (3, 2, 3, 4, 4, 1)
    assert films[10] is None
    np.testing.assert_array_equal(films[0][:, 0, -1], kept[range(0, 5)][0])
    with Image.open(tmp_path / "a" / "samples_12x4x4x1_film.png") as picture:
        assert picture.width == 3 * 66 and picture.height == 8 * (2 * 66 + 4)


def test_pixels_are_cut_off_and_put_last():
    """[-1, 1] becomes 0..255, beyond is clipped, and channels come last."""
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 0.5]).view(1, 6, 1, 1)
    assert to_uint8(x)[0, 0, 0].tolist() == [0, 0, 127, 255, 255, 191]
