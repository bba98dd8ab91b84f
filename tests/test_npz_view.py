"""A look into an npz: the images that were asked for, as they are, in a grid."""

import contextlib
import io

import numpy as np
import pytest
from PIL import Image
from scripting import Done, files_below, load_script

from guided_diffusion import config, pictures


@pytest.fixture
def view():
    """Run the script with a command line."""

    def run(*words):
        out, err, code = io.StringIO(), io.StringIO(), 0
        argv = [str(word) for word in words]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                config.run(lambda: load_script("npz_view").main(argv))
            except SystemExit as end:
                code = end.code
        return Done(code, out.getvalue(), err.getvalue())

    return run


def random_images(count=12, channels=3, size=64):
    shape = (count, size, size, channels)[: 4 if channels else 3]
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def cell(path, row, column, size=64, text=0):
    """Return the image at a place of a grid."""
    sheet = np.asarray(Image.open(path))
    y, x = row * (size + 4 + text) + text + 2, column * (size + 4) + 2
    return sheet[y : y + size, x : x + size]


@pytest.mark.parametrize("channels", [3, 1, 0])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_asked_images_stand_in_order(channels, save, view, tmp_path):
    """From --start on, row by row, each pixel as in the file."""
    images = random_images(channels=channels)
    save(tmp_path / "x.npz", images)
    done = view(tmp_path / "x.npz", "--start", 3, "--num_images", 5, "--columns", 2)
    assert done.code == 0, done.err
    assert f"{tmp_path}/x_from3.png" in done.out and "images 3 to 7 of 12" in done.out
    for i in range(5):
        found = cell(tmp_path / "x_from3.png", i // 2, i % 2)
        expected = images[3 + i]
        expected = expected if expected.ndim == 3 else expected[..., None]
        np.testing.assert_array_equal(found, np.broadcast_to(expected, (64, 64, 3)))
    assert Image.open(tmp_path / "x_from3.png").size == (2 * 68, 3 * 68)


@pytest.mark.parametrize("count, columns", [(1, 1), (2, 2), (4, 2), (5, 3), (100, 10), (101, 11)])
def test_a_grid_is_nearly_square(count, columns):
    """Without --columns there are as many in a row as rows, or one more."""
    assert pictures.columns_of_square(count) == columns


def test_small_images_are_enlarged(view, tmp_path):
    """A pixel of an 8 x 8 image is 8 x 8 in the picture."""
    images = random_images(size=8)
    np.savez(tmp_path / "x.npz", images)
    assert view(tmp_path / "x.npz", "--out", tmp_path / "y.png").code == 0
    found = cell(tmp_path / "y.png", 0, 1)
    np.testing.assert_array_equal(found, images[1].repeat(8, axis=0).repeat(8, axis=1))


def test_labels_are_named(view, tmp_path, monkeypatch):
    """Over each image stands the name in classes.txt, the number where there is none."""
    seen, caption = [], pictures.caption
    monkeypatch.setattr(pictures, "caption", lambda *a: seen.append(caption(*a)) or seen[-1])
    np.savez(tmp_path / "x.npz", random_images(4), np.array([1, 0, 2, -1]))
    view(tmp_path / "x.npz")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    view(tmp_path / "x.npz", "--start", 1)
    assert seen == ["1", "0", "2", "-1", "cat", "2", "-1"]
    path = tmp_path / "x_from1.png"
    np.testing.assert_array_equal(cell(path, 0, 0, text=14), random_images(4)[1])
    assert (np.asarray(Image.open(path))[:14, :68] < 128).any()  # black letters


def test_a_long_name_stays_above_its_image(tmp_path):
    """The first name ends before the second begins."""
    names = ["W" * 50, "."]
    pictures.save_grid(random_images(2), np.array([0, 1]), str(tmp_path / "x.png"), names)
    assert (np.asarray(Image.open(tmp_path / "x.png"))[:14, 66:70] == 255).all()


@pytest.mark.parametrize("labels", [np.zeros(3), np.zeros((3, 2), int), np.zeros(2, int)])
def test_what_are_no_labels_is_left_out(labels, view, tmp_path):
    """Other arrays of the file do not matter."""
    np.savez(tmp_path / "x.npz", random_images(3), labels)
    assert view(tmp_path / "x.npz").code == 0
    np.testing.assert_array_equal(cell(tmp_path / "x_from0.png", 0, 0), random_images(3)[0])


def test_floats_are_images_if_they_lie_in_the_networks_range(view, tmp_path):
    """-1 is black and 1 is white; what leaves that range is scaled, which is said."""
    images = random_images(3)
    np.savez(tmp_path / "x.npz", (images / 127.5 - 1).astype(np.float32))
    assert "from -1, black, to 1, white" in view(tmp_path / "x.npz").out
    difference = cell(tmp_path / "x_from0.png", 0, 1).astype(int) - images[1]
    assert np.abs(difference).max() <= 1
    latents = np.linspace(-3, 5, 3 * 64 * 64).reshape(3, 64, 64, 1)
    latents[1, 0, 0] = np.nan
    np.savez(tmp_path / "y.npz", latents)
    assert "scaled: from -3, black, to 5, white" in view(tmp_path / "y.npz").out
    assert cell(tmp_path / "y_from0.png", 0, 0)[0, 0].tolist() == [0, 0, 0]
    assert cell(tmp_path / "y_from0.png", 0, 1)[0, 0].tolist() == [0, 0, 0]
    assert cell(tmp_path / "y_from0.png", 1, 0)[-1, -1].tolist() == [255, 255, 255]


@pytest.mark.parametrize("value", [0.0, 7.0, np.nan, np.inf])
def test_floats_without_contrast_are_shown(value, view, tmp_path):
    """A constant image, and one without any number, divide by nothing."""
    np.savez(tmp_path / "x.npz", np.full((2, 8, 8), value))
    assert view(tmp_path / "x.npz").code == 0


def test_a_dry_run_writes_nothing(view, tmp_path):
    """--dry_run prints the flags and the path."""
    np.savez(tmp_path / "x.npz", random_images(3))
    done = view(tmp_path / "x.npz", "--dry_run", "True")
    assert "--num_images 100\n" in done.out and f"{tmp_path}/x_from0.png\n" in done.out
    assert files_below(tmp_path) == {"x.npz"}


@pytest.mark.parametrize(
    "array, words",
    [
        (np.zeros((2, 4, 4, 2), np.uint8), "arr_0 uint8 [2, 4, 4, 2] 3]"),
        (np.zeros((2, 4), np.uint8), "arr_0 [2, 4]"),
        (np.zeros((2, 4, 4), np.int64), "arr_0 int64"),
        (np.zeros((2, 0, 4), np.uint8), "arr_0 [2, 0, 4]"),
        (np.zeros((0, 4, 4), np.uint8), "--start 0 holds 0 images"),
        (np.array([{}]), "arr_0 object not of numbers"),
    ],
)
def test_what_cannot_be_shown_is_one_line(array, words, view, tmp_path):
    """The error names the file, what is in it, and what is wanted; nothing is written."""
    np.savez(tmp_path / "x.npz", array)
    done = view(tmp_path / "x.npz")
    assert done.code == 1 and done.err.count("\n") == 1 and f"--npz {tmp_path}/x.npz" in done.err
    assert all(word in done.err for word in words.split()), done.err
    assert files_below(tmp_path) == {"x.npz"}


@pytest.mark.parametrize(
    "words, code",
    [(["--start", "3"], 1), (["--start", "-1"], 2), (["--columns", "-1"], 2), (["--out", "y"], 2)],
)
def test_mistakes_in_flags(words, code, view, tmp_path):
    """They are named."""
    np.savez(tmp_path / "x.npz", random_images(3))
    done = view(tmp_path / "x.npz", *words)
    assert done.code == code and words[0] in done.err and done.err.count("\n") == 1
