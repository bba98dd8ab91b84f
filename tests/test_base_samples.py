"""What an upsampler enlarges."""

import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion.base_samples import BaseSamples

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 2, 2, 1), dtype=np.uint8)


def flags(path, **more):
    same = dict(
        base_samples=str(path), low_res_noise=0.0, small_size=2, in_channels=1, class_cond=False,
        num_classes=10, model_path="",
    )  # fmt: skip
    return Namespace(**same | more)


@pytest.fixture
def npz(tmp_path):
    path = tmp_path / "base.npz"
    np.savez(path, IMAGES, np.array([7, 8, 9]))
    return path


def folder_of(path, names=("000000.png", "000001.png", "000002.png"), images=IMAGES):
    path.mkdir()
    for name, image in zip(names, images, strict=True):
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(path / name)
    return path


def test_base_images_are_taken_in_turn(npz):
    """Sample i upsamples image i mod M, in [-1, 1]."""
    base = BaseSamples(flags(npz))
    low_res = base.cond(range(2, 5), 0)["low_res"]
    assert base.labels.tolist() == [7, 8, 9] and low_res.shape == (3, 1, 2, 2)
    expected = torch.from_numpy(IMAGES[[2, 0, 1]]).permute(0, 3, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(low_res, expected)


def test_a_folder_or_a_zip_counts_as_the_npz_of_its_images(npz, tmp_path):
    """In the order of their names, compressed npz files too."""
    folder = folder_of(tmp_path / "folder")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    np.savez_compressed(tmp_path / "small.npz", IMAGES)
    expected = BaseSamples(flags(npz)).cond(range(7), 0)["low_res"]
    for path in (folder, tmp_path / "a.zip", tmp_path / "small.npz"):
        base = BaseSamples(flags(path))
        assert len(base) == 3 and base.labels is None
        torch.testing.assert_close(base.cond(range(7), 0)["low_res"], expected, rtol=0, atol=0)


def test_labels_of_a_folder_are_in_its_table_or_its_names(tmp_path):
    """--save_images leaves labels.csv; other folders have the class before the first _."""
    table = folder_of(tmp_path / "table")
    (table / "labels.csv").write_text("name,class\n000000.png,7\n000001.png,8\n000002.png,9\n")
    named = folder_of(tmp_path / "named", ("7_a.png", "8_b.png", "9_c.png"))
    for folder in (table, named):
        assert BaseSamples(flags(folder, class_cond=True)).labels.tolist() == [7, 8, 9]
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    words = folder_of(tmp_path / "words")
    rows = ["name,class", "000000.png,dog", "000001.png,cat", "000002.png,dog"]
    (words / "labels.csv").write_text("\n".join(rows))
    animals = folder_of(tmp_path / "animals", ("cat_1.png", "dog_1.png", "dog_2.png"))
    model = {"model_path": str(tmp_path / "model.pt"), "class_cond": True, "num_classes": 2}
    assert BaseSamples(flags(animals, **model)).labels.tolist() == [0, 1, 1]
    assert BaseSamples(flags(words, **model)).labels.tolist() == [1, 0, 1]
    (words / "labels.csv").write_text("\n".join(rows[:1] + [row[:11] + "dog" for row in rows[1:]]))
    assert BaseSamples(flags(words, **model)).labels.tolist() == [1, 1, 1]  # not numbered anew


def test_noise_is_that_of_each_image(npz):
    """--low_res_noise adds the same to sample i in any batch, of the deviation asked for."""
    plain, noisy = (BaseSamples(flags(npz, low_res_noise=s)) for s in (0.0, 0.25))
    added = noisy.cond(range(400), 5)["low_res"] - plain.cond(range(400), 5)["low_res"]
    alone = noisy.cond(range(7, 8), 5)["low_res"] - plain.cond(range(7, 8), 5)["low_res"]
    torch.testing.assert_close(added[7:8], alone, rtol=0, atol=0)
    assert abs(added.std() - 0.25) < 0.02 and len(added.unique()) > 1500
    other = noisy.cond(range(7, 8), 6)["low_res"]
    assert not torch.equal(other, noisy.cond(range(7, 8), 5)["low_res"])


def test_a_digest_follows_the_contents(npz, tmp_path):
    """Another pixel or another name gives another hash; a copy the same."""
    first = BaseSamples(flags(folder_of(tmp_path / "a"))).digests()
    assert BaseSamples(flags(folder_of(tmp_path / "b"))).digests() == first
    changed = IMAGES.copy()
    changed[1, 0, 0] ^= 1
    assert BaseSamples(flags(folder_of(tmp_path / "c", images=changed))).digests() != first
    names = ("0.png", "1.png", "2.png")
    assert BaseSamples(flags(folder_of(tmp_path / "d", names))).digests() != first
    assert len(BaseSamples(flags(npz)).digests()["base_samples"]) == 64


@pytest.mark.parametrize("more, told", [
    ({"small_size": 4}, "000000.png is 2 x 2; the upsampler takes 4 x 4"),
    ({"class_cond": True}, "has no labels, as --class_cond needs"),
])  # fmt: skip
def test_folders_that_do_not_fit_are_told(more, told, tmp_path):
    """Before anything is drawn."""
    with pytest.raises(ValueError, match="--base_samples") as error:
        BaseSamples(flags(folder_of(tmp_path / "a"), **more))
    assert told in str(error.value)


def test_a_broken_image_is_told_at_the_start(tmp_path):
    """By its path."""
    folder = folder_of(tmp_path / "a")
    (folder / "000001.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(ValueError, match="--base_samples.*000001.png.*repair or remove"):
        BaseSamples(flags(folder))
