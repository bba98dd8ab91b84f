"""Sets of samples on the disk: shards, the manifest, and what becomes of them."""

import json

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.sample_files import SampleFiles

SHAPE = (10, 4, 4, 1)
IMAGES = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
FLAGS = {"num_channels": 32, "classes": "0,1", "model_path": "a" * 64}


def labels_of(indices):
    return np.array(indices) % 3


def write(files, *ranges):
    for start, stop in ranges:
        files.write(range(start, stop), IMAGES[start:stop])


def finish(files, **show):
    files.finish(labels_of, **show)


def draw(folder, flags=FLAGS, seed=5, **show):
    """Write a whole set."""
    files = SampleFiles(str(folder), SHAPE, flags)
    with files.claimed(seed, int):
        files.missing(5)
        write(files, (0, 5), (5, 10))
        finish(files, **show)
    return files


def test_shards_become_one_npz_in_the_order_of_index(tmp_path):
    """Exactly N images, with labels; a grid beside them; the shards are gone."""
    files = SampleFiles(str(tmp_path), SHAPE, FLAGS)
    with files.claimed(5, int):
        assert files.missing(4) == [range(0, 4), range(4, 8), range(8, 10)]
        write(files, (8, 10), (0, 4), (4, 8))
        finish(files)
    with np.load(tmp_path / "samples_10x4x4x1.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], IMAGES)
        np.testing.assert_array_equal(arrays["arr_1"], np.arange(10) % 3)
    grid = np.array(Image.open(tmp_path / "samples_10x4x4x1.png"))
    assert (grid[16 : 16 + 64 : 16, 2 : 2 + 64 : 16, 0] == IMAGES[0, ..., 0]).all()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"samples_10x4x4x1.{suffix}" for suffix in ("npz", "png", "json")}


def test_what_is_there_is_not_drawn_again(tmp_path):
    """Only the gaps of each batch are left, also if batches were of another size before."""
    with SampleFiles(str(tmp_path), SHAPE, FLAGS).claimed(5, int) as first:
        first.missing(4)
        write(first, (0, 4), (8, 10))
    with SampleFiles(str(tmp_path), SHAPE, FLAGS).claimed(-1, int) as second:
        assert second.seed == 5
        assert second.missing(4) == [range(4, 8)]
        assert second.missing(3) == [range(4, 6), range(6, 8)]
        assert second.missing(100) == [range(4, 8)]
        write(second, (4, 6), (6, 8))
        finish(second)
    with np.load(second.npz) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], IMAGES)


def test_a_broken_shard_is_drawn_again(tmp_path):
    """A file that a disk has lost the end of counts as not drawn."""
    files = SampleFiles(str(tmp_path), SHAPE, FLAGS)
    with files.claimed(5, int):
        files.missing(5)
        write(files, (0, 5), (5, 10))
        path = tmp_path / "samples_10x4x4x1.shards" / "images_000000000_000000005.npy"
        path.write_bytes(path.read_bytes()[:-1])
        assert files.missing(5) == [range(0, 5)]
        write(files, (0, 5))
        finish(files)
    with np.load(files.npz) as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], IMAGES)


def test_a_set_that_another_disk_has_a_part_of_is_no_set(tmp_path):
    """If rank 0 lacks shards at the end, it says so and writes no npz."""
    files = SampleFiles(str(tmp_path), SHAPE, FLAGS)
    with files.claimed(5, int):
        files.missing(5)
        write(files, (0, 5))
        with pytest.raises(ValueError, match="lacks the samples from 5 on.*share its disk"):
            finish(files)
    assert not list(tmp_path.glob("*.npz"))


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("change, seed, told", [
    ({"classes": "0,2"}, 5, "classes: 0,1 there, 0,2 here"),
    ({"model_path": "b" * 64}, 5, "model_path: aaaaaaaaaaaa... there, bbbbbbbbbbbb... here"),
    ({"use_ddim": True}, -1, "use_ddim: none there, True here"),
    ({}, 6, "seed: 5 there, 6 here"),
    ({"classes": ""}, 6, 'classes: 0,1 there, "" here; seed: 5 there, 6 here'),
])  # fmt: skip
def test_other_samples_are_not_mixed_in(change, seed, told, complete, tmp_path):
    """Other flags, weights or seeds are refused, named, and change nothing."""
    if complete:
        draw(tmp_path)
    else:
        with SampleFiles(str(tmp_path), SHAPE, FLAGS).claimed(5, int) as files:
            files.missing(5)
            write(files, (0, 5))
    before = sorted(map(str, tmp_path.rglob("*")))
    other = SampleFiles(str(tmp_path), SHAPE, FLAGS | change)
    with pytest.raises(ValueError, match="holds other samples") as error, other.claimed(seed, int):
        pass
    assert f"({told})" in str(error.value)
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_a_flag_that_one_side_lacks_has_its_default(tmp_path):
    """So that a set goes on with a later version, which has more flags."""
    draw(tmp_path)
    with SampleFiles(str(tmp_path), SHAPE, FLAGS | {"use_ddim": False}).claimed(-1, int) as files:
        assert files.is_complete()


def test_another_number_of_images_is_another_set(tmp_path):
    """Sets of other shapes have other names, such as those of a cascade, and share a folder."""
    draw(tmp_path)
    larger = SampleFiles(str(tmp_path), (10, 8, 8, 1), {"num_channels": 64})
    with larger.claimed(6, int):
        assert larger.missing(10) == [range(0, 10)]


def test_a_mistake_at_the_end_costs_no_manifest(tmp_path, monkeypatch):
    """Once something is drawn, its seed is kept, whatever goes wrong with a picture."""

    def save_grid(*_):
        raise ValueError("no such letter")

    with monkeypatch.context() as patched:
        patched.setattr("guided_diffusion.sample_files.save_grid", save_grid)
        with pytest.raises(ValueError, match="no such letter"):
            draw(tmp_path)
    again = SampleFiles(str(tmp_path), SHAPE, FLAGS)
    with again.claimed(-1, int):
        assert again.seed == 5 and again.is_complete()


def test_a_mistake_before_anything_is_drawn_leaves_nothing(tmp_path):
    """The manifest goes, too."""
    files = SampleFiles(str(tmp_path), SHAPE, FLAGS)
    with pytest.raises(ValueError, match="broken"), files.claimed(5, int):
        files.missing(5)
        raise ValueError("a broken base image")
    assert not list(tmp_path.iterdir())


def test_an_npz_that_no_manifest_tells_of_is_left_alone(tmp_path):
    """It may be of the published code: nothing is drawn over it."""
    path = tmp_path / "samples_10x4x4x1.npz"
    path.write_bytes(b"fifty thousand images")
    files = SampleFiles(str(tmp_path), SHAPE, FLAGS)
    with pytest.raises(ValueError, match="no manifest tells.*move it away"), files.claimed(5, int):
        pass
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == b"fifty thousand images"


def test_a_whole_set_is_left_alone(tmp_path):
    """The same command again draws nothing and writes nothing."""
    files = draw(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = SampleFiles(str(tmp_path), SHAPE, FLAGS)
    with again.claimed(-1, int):
        assert again.is_complete() and again.missing(3) == []
        finish(again)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps
    assert files.npz == again.npz


def test_a_set_whose_npz_is_gone_is_drawn_again(tmp_path):
    """With the seed of the manifest."""
    draw(tmp_path)
    (tmp_path / "samples_10x4x4x1.npz").unlink()
    again = SampleFiles(str(tmp_path), SHAPE, FLAGS)
    with again.claimed(-1, int):
        assert again.seed == 5 and again.missing(10) == [range(0, 10)]


def test_images_are_written_when_they_are_asked_for(tmp_path):
    """Also of a set that is whole; those that are there stay; the table has their classes."""
    draw(tmp_path)
    draw(tmp_path, save_images=True)
    folder = tmp_path / "samples_10x4x4x1"
    (folder / "000003.png").unlink()
    stamp = (folder / "000002.png").stat().st_mtime_ns
    draw(tmp_path, save_images=True)
    for i in range(10):
        found = np.array(Image.open(folder / f"{i:06d}.png"))
        np.testing.assert_array_equal(found, IMAGES[i, ..., 0])
    assert (folder / "000002.png").stat().st_mtime_ns == stamp
    rows = (folder / "labels.csv").read_text().splitlines()
    assert rows[:3] == ["name,class", "000000.png,0", "000001.png,1"] and len(rows) == 11


@pytest.mark.parametrize("text", [
    "", "[1]", "{}", '{"format": 2}', "{" * 10000,
    '{"format": 1, "seed": "x", "flags": {}, "complete": true}',
    '{"format": 1, "seed": 5, "flags": 5, "complete": true}',
])  # fmt: skip
def test_a_manifest_that_is_none_is_told(text, tmp_path):
    """One line that says what to remove."""
    (tmp_path / "samples_10x4x4x1.json").write_text(text)
    files = SampleFiles(str(tmp_path), SHAPE, FLAGS)
    with (
        pytest.raises(ValueError, match="samples_10x4x4x1.json.*: remove .*, or"),
        files.claimed(5, int),
    ):
        pass


def test_the_manifest_can_be_read_by_people(tmp_path):
    """Flags by name, the seed, and whether the npz is whole."""
    draw(tmp_path)
    found = json.loads((tmp_path / "samples_10x4x4x1.json").read_text())
    assert found == {"format": 1, "seed": 5, "flags": FLAGS, "complete": True}
