"""guided_diffusion.image_batches: the quick way to a batch gives the pixels of the plain way."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from scripting import CLASSIFIER, SMALL, SUPER_RES, flags_of, load_script, make_images
from toy_images import assert_same, be_rank, load, one_line_error, take

from guided_diffusion import streams, training
from guided_diffusion.image_batches import to_unit
from guided_diffusion.image_decoding import decode

SEED, SIZE = 3, 16
KINDS = {  # of images: ending, mode
    "colour": ("jpg", "RGB"),
    "grey": ("jpg", "L"),
    "ink": ("jpg", "CMYK"),
    "alpha": ("png", "RGBA"),
    "palette": ("png", "P"),
    "bilevel": ("png", "1"),
    "16 bits": ("png", "I;16"),
}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Be rank 0 of 1, whatever launcher started the tests."""
    be_rank(monkeypatch, 0, 1)


def smooth(width, height, seed=0):
    """Return an image of soft waves, as a photograph out of focus."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / min(width, height)
    waves = [
        sum(np.cos(2 * np.pi * (a * x + b * y + c)) for a, b, c in rng.uniform(-2, 2, (4, 3)))
        for _ in range(3)
    ]
    return Image.fromarray((np.stack(waves, axis=2) * 30 + 128).clip(0, 255).astype(np.uint8))


def in_mode(image, mode):
    """Convert an image to any of the modes of KINDS."""
    if mode != "I;16":
        return image.convert(mode)
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def write(folder, sides, kinds=KINDS):
    """Write a smooth image of each of the sides, of the kinds in turn; return the paths."""
    folder.mkdir()
    paths = []
    for k, side in enumerate(sides):
        ending, mode = KINDS[list(kinds)[k % len(kinds)]]
        paths.append(folder / f"{k:03d}.{ending}")
        in_mode(smooth(*side, seed=k), mode).save(paths[-1])
    return paths


def plain_batch(paths, mode, random_crop, random_flip):
    """Decode, resize, crop, mirror and scale one image after the other, as published."""
    arrays = []
    for number, path in enumerate(paths):
        rng = random.Random(streams.derived_seed(SEED, number, streams.AUGMENT))
        image = Image.open(path)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.array(image) / 257).astype(np.uint8))
        image = image.convert("RGB" if image.mode == "RGBA" else mode).convert(mode)
        shorter = rng.randrange(SIZE, int(np.ceil(SIZE / 0.8)) + 1) if random_crop else SIZE
        while min(image.size) >= 2 * shorter:
            image = image.resize((image.width // 2, image.height // 2), Image.BOX)
        scale = shorter / min(image.size)
        size = round(image.width * scale), round(image.height * scale)
        arr = np.array(image.resize(size, Image.BICUBIC)).reshape(size[1], size[0], -1)
        spare = arr.shape[0] - SIZE, arr.shape[1] - SIZE
        draw = rng.randrange if random_crop else lambda places: (places - 1) // 2
        top, left = draw(spare[0] + 1), draw(spare[1] + 1)
        arr = arr[top : top + SIZE, left : left + SIZE]
        if random_flip and rng.random() < 0.5:
            arr = arr[:, ::-1]
        arrays.append(arr.astype(np.float32) / 127.5 - 1)
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize("chance", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_equal_the_plain_way(tmp_path, channels, mode, chance, num_workers):
    """Bit for bit, whatever the size and kind of the image: smaller, odd, narrow, 16 times larger.

    In memory a batch lies as it always did, [N, H, W, C]: the last bits of a training run depend
    on that.
    """
    rng = np.random.default_rng(1)
    sides = [*rng.integers(5, 120, (60, 2)).tolist(), (1, 1), (300, 17), (16, 16), (32, 64)]
    paths = write(tmp_path / "x", sides)
    options = dict(random_crop=chance, random_flip=chance)
    data = load(
        str(tmp_path / "x"), batch_size=len(sides), image_size=SIZE, in_channels=channels,
        deterministic=True, seed=SEED, num_workers=num_workers, **options,
    )  # fmt: skip
    (found, _), wanted = next(data), plain_batch(paths, mode, **options)
    data.close()
    assert found.dtype == torch.float32 and torch.equal(found, wanted)
    assert channels == 1 or found.stride() == wanted.stride() == (3 * SIZE**2, 1, 3 * SIZE, 3)
    assert channels == 3 or found.stride() == (SIZE**2, SIZE**2, SIZE, 1)


def test_bytes_become_the_published_floats():
    """Each of the 256 is what numpy makes of it, also where memory does not lie as usual."""
    values = np.arange(256, dtype=np.uint8)
    wanted = torch.from_numpy(values.astype(np.float32) / 127.5 - 1)
    assert torch.equal(to_unit(torch.from_numpy(values)), wanted)
    lying = torch.from_numpy(values).reshape(2, 4, 8, 4).permute(0, 3, 1, 2)
    found = to_unit(lying)
    assert torch.equal(found, wanted.reshape(2, 4, 8, 4).permute(0, 3, 1, 2))
    assert found.stride() == lying.stride()


# --fast_decode


def both(folder, **options):
    """Return the batch of a folder without and with fast_decode."""
    options = dict(batch_size=len(list(folder.iterdir())), image_size=SIZE, in_channels=3) | options
    return [
        take(load(str(folder), deterministic=True, seed=SEED, fast_decode=fast, **options), 1)
        for fast in (False, True)
    ]


@pytest.mark.parametrize("random_crop", [False, True])
def test_fast_decode_leaves_images_below_twice_the_size(tmp_path, random_crop):
    """What the crop needs is 16 pixels, or 20 where a random crop may enlarge: 31 and 39 stay."""
    most = 2 * (20 if random_crop else 16) - 1
    rng = np.random.default_rng(2)
    sides = [(most, most), (most, 200), (200, most), *rng.integers(5, most + 1, (30, 2)).tolist()]
    write(tmp_path / "x", sides)
    assert_same(*both(tmp_path / "x", random_crop=random_crop))
    write(tmp_path / "y", [(most + 1, most + 1)], ["colour"])
    plain, fast = both(tmp_path / "y", random_crop=random_crop)
    assert not torch.equal(plain[0], fast[0])


def test_fast_decode_leaves_other_formats(tmp_path):
    """What cannot be decoded at a fraction of its size is decoded as ever, at any size."""
    write(tmp_path / "x", [(100, 90)] * 4, ["alpha", "palette", "bilevel", "16 bits"])
    assert_same(*both(tmp_path / "x"))


@pytest.mark.parametrize("kind", ["colour", "grey", "ink"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("random_crop", [False, True])
def test_fast_decode_is_close_on_large_images(tmp_path, kind, channels, random_crop):
    """Two of 255 on average and ten at most, of any size, with the same crops and flips."""
    sides = [(512, 512), (331, 331), (257, 400), (1000, 801), (1279, 642)]
    write(tmp_path / "x", sides, [kind])
    options = dict(random_crop=random_crop, random_flip=True, in_channels=channels, image_size=64)
    plain, fast = both(tmp_path / "x", **options)
    away = (plain[0] - fast[0]).abs() * 127.5
    assert plain[0].shape == fast[0].shape and 0 < away.mean() < 2 and away.max() < 10.5


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("shorter, wanted", [(31, 31), (32, 16), (63, 32), (64, 16), (300, 38)])
def test_jpegs_are_decoded_no_smaller_than_needed(tmp_path, mode, shorter, wanted):
    """At a half, a quarter or an eighth, in the mode of the file."""
    path = tmp_path / "x.jpg"
    in_mode(smooth(shorter, 2 * shorter), mode).save(path)
    with open(path, "rb") as file:
        image = decode(file, least=16)
    assert (image.mode, min(image.size)) == (mode, wanted)


def test_fast_decode_names_broken_images(tmp_path):
    """A JPEG that breaks off is no image, at whatever size it is decoded."""
    (path,) = write(tmp_path / "x", [(300, 300)], ["colour"])
    path.write_bytes(path.read_bytes()[:-500])
    data = load(str(tmp_path / "x"), image_size=SIZE, fast_decode=True)
    assert repr(str(path)) in one_line_error(lambda: next(data))


class Captured(Exception):
    """Carries the arguments of load_data."""


@pytest.mark.parametrize(
    "script, flags",
    [("image_train", SMALL), ("super_res_train", SUPER_RES), ("classifier_train", CLASSIFIER)],
)
@pytest.mark.parametrize("given", [{}, {"fast_decode": True}])
def test_training_scripts_hand_the_flag_on(tmp_path, monkeypatch, script, flags, given):
    """--fast_decode reaches the loader from each command line; without it all is as published."""

    def capture(**options):
        raise Captured(options)

    monkeypatch.setattr(training, "load_data", capture)
    flags = (
        flags | given | {"data_dir": make_images(tmp_path / "data"), "log_dir": tmp_path / "run"}
    )
    with pytest.raises(Captured) as caught:
        load_script(script).main(flags_of(flags | {"device": "cpu"}))
    assert caught.value.args[0]["fast_decode"] is bool(given)
