"""guided_diffusion.image_decoding: every kind of image becomes the right 8-bit array."""

import io
import random
import struct
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_images import one_line_error

from guided_diffusion.image_decoding import (
    BadImage,
    center_crop_arr,
    guard,
    random_crop_arr,
    read_image,
    to_array,
)

REFERENCE = Path(__file__).parent / "reference" / "images.npz"


def saved(image, path, **options):
    """Write an image, and return its path."""
    image.save(path, **options)
    return str(path)


# Crops


@pytest.mark.parametrize("size", [64, 200])
def test_center_crop_equals_the_published_one(size):
    """Within 1 of 255, since Pillow's resampling may differ between releases."""
    ref = np.load(REFERENCE)
    found = center_crop_arr(Image.fromarray(ref["source"]), size)
    np.testing.assert_allclose(found.astype(int), ref[f"center_crop_{size}"].astype(int), atol=1)


def test_random_crop_draws_as_the_published_one():
    """The same draws from Python's generator in the same order: 64, then 200, after seed 0."""
    ref = np.load(REFERENCE)
    random.seed(0)
    for size in (64, 200):
        found = random_crop_arr(Image.fromarray(ref["source"]), size)
        wanted = ref[f"random_crop_{size}"]
        np.testing.assert_allclose(found.astype(int), wanted.astype(int), atol=1)


def test_halving_averages_two_by_two_pixels():
    """An image of exactly twice the size, or four times, is reduced by averages alone."""
    arr = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    for factor in (2, 4):
        size = 32 // factor
        wanted = arr.reshape(size, factor, size, factor).mean(axis=(1, 3))
        found = center_crop_arr(Image.fromarray(arr), size)
        np.testing.assert_allclose(found, wanted, atol=2)  # rounds up to four times


@pytest.mark.parametrize("crop", [center_crop_arr, random_crop_arr])
@pytest.mark.parametrize("side", [(5, 9), (30, 7), (64, 64)])
def test_crops_have_the_asked_size(crop, side):
    """Small images are enlarged, in grey as in colour."""
    for mode, shape in (("L", (16, 16)), ("RGB", (16, 16, 3))):
        arr = crop(Image.new(mode, side), 16)
        assert arr.shape == shape and arr.dtype == np.uint8


def test_an_own_generator_gives_the_draws_of_the_global_one():
    """random_crop_arr and to_array draw from `rng` what they would draw from `random`, alone."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30), dtype=np.uint8))
    random.seed(5)
    wanted = random_crop_arr(image, 16), to_array(image, 16, True, True)
    state, rng = random.getstate(), random.Random(5)
    np.testing.assert_array_equal(random_crop_arr(image, 16, rng=rng), wanted[0])
    np.testing.assert_array_equal(to_array(image, 16, True, True, rng), wanted[1])
    assert random.getstate() == state


def test_half_of_the_images_are_mirrored():
    """Flipping mirrors left and right, never top and bottom, about every other time."""
    arr = np.zeros((8, 8), np.uint8)
    arr[0, 0] = 255
    image, rng = Image.fromarray(arr), random.Random(0)
    places = (to_array(image, 8, random_flip=True, rng=rng).argmax() for _ in range(400))
    bright = Counter(divmod(int(place), 8) for place in places)
    assert set(bright) == {(0, 0), (0, 7)} and 150 < bright[0, 7] < 250


# Decoding


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("wanted", ["L", "RGB"])
def test_every_kind_of_image_is_converted(tmp_path, mode, wanted):
    """Bilevel, palette, alpha, CMYK and 16-bit files all become grey or colour."""
    path = saved(Image.new(mode, (8, 8)), tmp_path / ("x.jpg" if mode == "CMYK" else "x.png"))
    image = read_image(path, wanted)
    assert (image.mode, image.size) == (wanted, (8, 8))


def test_grey_weighs_colours_like_pillow(tmp_path):
    """Decoding to grey is Pillow's "L" conversion."""
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    path = saved(Image.fromarray(colours), tmp_path / "x.png")
    np.testing.assert_array_equal(read_image(path), colours)
    weighed = (colours @ [0.299, 0.587, 0.114]).round()
    np.testing.assert_allclose(np.array(read_image(path, "L")), weighed, atol=1)


def all_16_bit_values():
    """Return each number of 16 bits once, [256, 256], and the nearest 8-bit grey."""
    values = np.arange(65536).reshape(256, 256)
    return values, np.floor(values / 257 + 0.5).astype(np.uint8)


@pytest.mark.parametrize("kind", ["png", "big-endian tif", "pgm", "32-bit tif", "float tif"])
def test_16_bit_greys_are_scaled_exactly(tmp_path, kind):
    """65535 is white, and each value becomes the nearest of 256 greys, in grey as in colour."""
    values, wanted = all_16_bit_values()
    path = tmp_path / f"x.{kind[-3:]}"
    if kind == "pgm":
        path.write_bytes(b"P5 256 256 65535 " + values.astype(">u2").tobytes())
    else:
        dtypes = {"png": "<u2", "big-endian tif": ">u2", "32-bit tif": "<i4", "float tif": "<f4"}
        saved(Image.fromarray(values.astype(dtypes[kind])), path)
    np.testing.assert_array_equal(read_image(path, "L"), wanted)
    np.testing.assert_array_equal(read_image(path, "RGB"), np.stack([wanted] * 3, axis=2))


@pytest.mark.parametrize("dtype", ["<i4", "<f4"])
def test_wide_types_of_8_bit_values_stay_as_they_are(tmp_path, dtype):
    """A TIFF of 32 bits whose values fit into 8 is not darkened."""
    values = np.arange(256).reshape(16, 16)
    path = saved(Image.fromarray(values.astype(dtype)), tmp_path / "x.tif")
    np.testing.assert_array_equal(read_image(path, "L"), values)


def test_16_bit_colours_are_scaled(tmp_path):
    """Of a colour PNG with 16 bits a channel Pillow takes the upper eight: within 1 of 255."""
    values, wanted = all_16_bit_values()
    colours = np.stack([values, values[::-1], values.T], axis=2)

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)
    header = struct.pack(">IIBBBBB", 256, 256, 16, 2, 0, 0, 0)
    png = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    found = np.array(read_image(io.BytesIO(b"\x89PNG\r\n\x1a\n" + png))).astype(int)
    nearest = np.stack([wanted, wanted[::-1], wanted.T], axis=2)
    np.testing.assert_allclose(found, nearest, atol=1)


def test_transparency_is_dropped(tmp_path):
    """The colour under a transparent pixel counts, also in a palette, and nothing is warned of."""
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:4], rgba[4:] = (250, 20, 30, 0), (10, 20, 200, 128)
    palette = Image.fromarray(rgba[..., :3]).convert("P", palette=Image.Palette.ADAPTIVE)
    paths = [
        saved(Image.fromarray(rgba), tmp_path / "rgba.png"),
        saved(palette, tmp_path / "bytes.png", transparency=bytes([0, 128])),
        saved(palette, tmp_path / "index.png", transparency=0),
        saved(palette, tmp_path / "index.gif", transparency=0),
        saved(Image.fromarray(rgba[..., :3]), tmp_path / "key.png", transparency=(250, 20, 30)),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in paths:
            np.testing.assert_array_equal(read_image(path), rgba[..., :3])
    grey = saved(Image.fromarray(rgba[..., 2:]), tmp_path / "la.png")  # two channels: LA
    np.testing.assert_array_equal(read_image(grey, "L"), rgba[..., 2])


def test_bilevel_and_cmyk_keep_their_colours(tmp_path):
    """1 is white; no ink is white, and yellow with magenta is red, also in an Adobe JPEG."""
    bits = np.indices((8, 8)).sum(axis=0) % 2 == 1
    path = saved(Image.fromarray(bits), tmp_path / "bits.png")
    np.testing.assert_array_equal(read_image(path, "L"), bits * 255)
    for ink, colour in (((0, 0, 0, 0), (255, 255, 255)), ((0, 255, 255, 0), (255, 0, 0))):
        for name in ("x.jpg", "x.tif"):
            path = saved(Image.new("CMYK", (8, 8), ink), tmp_path / name)
            np.testing.assert_allclose(np.array(read_image(path))[4, 4], colour, atol=3)


def test_the_first_frame_of_an_animation_counts(tmp_path):
    """A GIF of several frames is its first."""
    frames = [Image.new("L", (8, 8), grey) for grey in (50, 100, 150)]
    path = saved(frames[0], tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert np.unique(read_image(path, "L")).tolist() == [50]


@pytest.mark.parametrize("damage", ["empty", "text", "cut.png", "cut.jpg", "cut.gif", "gone"])
def test_broken_files_are_told_in_one_line(tmp_path, damage):
    """Whatever Pillow raises becomes a line with the file and the remedy."""
    path = tmp_path / f"x.{damage[-3:] if '.' in damage else 'png'}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"not an image"}.get(damage, whole[: len(whole) // 2]))
    if damage == "gone":
        path.unlink()
    message = one_line_error(lambda: read_image(path))
    assert repr(str(path)) in message and "repair or remove" in message and "0x" not in message
    with pytest.raises(BadImage) as caught:
        read_image(path, flag="--val_data_dir")
    assert caught.value.path == str(path) and "--val_data_dir" in str(caught.value)


def test_failing_storage_is_not_a_broken_image():
    """Too many open files, or a full memory, say nothing about the image, which is not skipped."""

    def fail(error):
        raise error

    with pytest.raises(ValueError) as caught:
        guard(lambda: fail(OSError(24, "Too many open files")), "--data_dir", "x.png")
    assert not isinstance(caught.value, BadImage) and "x.png" in str(caught.value)
    with pytest.raises(MemoryError):
        guard(lambda: fail(MemoryError()), "--data_dir", "x.png")
