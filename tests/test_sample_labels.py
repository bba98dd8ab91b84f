"""Which class each sample is of."""

from argparse import Namespace

import numpy as np
import pytest

from guided_diffusion.sample_labels import Labels, choose_classes, known_names

NAMES = "T-shirt\nTrouser\ncrane\ncrane\n"


@pytest.fixture
def model(tmp_path):
    """A checkpoint with class names beside it, which nobody reads here."""
    (tmp_path / "classes.txt").write_text(NAMES)
    return str(tmp_path / "model.pt")


def choose(model="", **flags):
    same = dict(classes="", class_balanced=False, labels_file="", num_classes=4, model_path=model)
    return choose_classes(Namespace(**same | flags))


def test_random_labels_are_uniform_and_fixed_by_seed_and_index():
    """Image i has its label in whatever part it is asked for."""
    labels = Labels(None, 4, 3)
    many = labels.of(range(4000))
    assert many.dtype == np.int64 and set(many) == {0, 1, 2, 3}
    assert np.bincount(many).min() > 900
    np.testing.assert_array_equal(labels.of(range(100, 110)), many[100:110])
    assert (Labels(None, 4, 4).of(range(100)) != many[:100]).any()


def test_a_list_is_taken_in_turn():
    """Label i is entry i mod its length, wherever a batch begins."""
    labels = Labels(np.array([3, 1, 2]), 4, 0)
    assert labels.of(range(2, 8)).tolist() == [2, 3, 1, 2, 3, 1]


def test_classes_are_numbers_or_names(model):
    """Names in any case, blanks around them, numbers among them."""
    assert choose(classes="3, 0").tolist() == [3, 0]
    assert choose(model, classes="t-SHIRT , 2,Trouser").tolist() == [0, 2, 1]
    assert choose(model) is None


def test_a_preset_knows_the_names_of_imagenet():
    """In the order of the labels that the released models learnt, each name once."""
    chosen = choose(preset="imagenet64", num_classes=1000, classes="tench,otter,golden retriever")
    assert chosen.tolist() == [0, 360, 207]
    names = known_names(Namespace(preset="upsample_64_256", model_path=""))
    assert len(names) == len({name.casefold() for name in names}) == 1000
    assert not any("," in name or name != name.strip() for name in names)


def test_names_with_commas_are_quoted(tmp_path):
    """As in a CSV file."""
    (tmp_path / "classes.txt").write_text("red, green\nblue\n")
    assert choose(str(tmp_path / "m.pt"), classes='blue,"Red, green",1').tolist() == [1, 0, 1]


def test_a_released_file_knows_its_names_without_a_preset():
    """By its own name."""
    assert choose("there/64x64_diffusion.pt", num_classes=1000, classes="otter").tolist() == [360]


def test_balanced_is_every_class_in_turn():
    """--class_balanced draws each as often as the others."""
    assert choose(class_balanced=True).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name, content", [
    ("a.txt", b"Trouser\n3\n\n0\n"),
    ("a.txt", b"\xef\xbb\xbfTrouser\r\n3\r\n0"),
    ("a.csv", b"one.png,Trouser\ntwo.png,3\nthree.png,0\n"),
    ("a.csv", b"Trouser\n3\n0\n"),
    ("a.json", b'["Trouser", 3, "0"]'),
    ("a.csv", b"name,class\n000000.png,1\n000001.png,3\n000002.png,0\n"),
])  # fmt: skip
def test_a_list_may_be_text(name, content, model, tmp_path):
    """A class on each line, or in the last column."""
    (tmp_path / name).write_bytes(content)
    assert choose(model, labels_file=str(tmp_path / name)).tolist() == [1, 3, 0]


def test_a_list_may_be_an_array(tmp_path):
    """An npy; the labels of an npz of samples; the only array of an npz of labels."""
    labels = np.array([1, 3, 0])
    np.save(tmp_path / "a.npy", labels)
    np.savez(tmp_path / "b.npz", np.zeros((3, 4, 4, 1), np.uint8), labels)
    np.savez(tmp_path / "c.npz", labels)
    for name in ("a.npy", "b.npz", "c.npz"):
        assert choose(labels_file=str(tmp_path / name)).tolist() == [1, 3, 0]


@pytest.mark.parametrize("classes, told", [
    ("4", "--classes: the class 4 is out of range: the model knows the classes 0 to 3"),
    ("99999999999999999999999", "out of range"),
    ("shoe", "'shoe' is no class: give a number, or one of T-shirt, Trouser, crane, crane"),
    ("crane", "2 classes are called 'crane': give 2 or 3"),
    ("\u0663", "is no class"),
])  # fmt: skip
def test_unknown_classes_are_told(classes, told, model):
    """The flag, the class and what can be given instead."""
    with pytest.raises(ValueError, match="--classes") as error:
        choose(model, classes=classes)
    assert told in str(error.value)


def test_names_need_a_list_of_names():
    """Without classes.txt only numbers are known."""
    with pytest.raises(ValueError, match="no classes.txt beside the model, so give numbers, 0 to"):
        choose(classes="shoe")


@pytest.mark.parametrize("name, content", [
    ("a.txt", b""), ("a.txt", b"\xff\xfe"), ("a.npy", b"hello"), ("a.npz", b""), ("a.csv", b"\n"),
    ("a.json", b"{"), ("a.json", b'{"a": 1}'), ("a.json", b"[1.5]"), ("a.json", b"[true]"),
    ("a.json", b"[[1]]"), ("a.json", b"[]"),
])  # fmt: skip
def test_lists_that_are_none_are_told(name, content, tmp_path):
    """One line that names the file."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"--labels_file .*{name}"):
        choose(labels_file=str(tmp_path / name))


@pytest.mark.parametrize("array", [
    np.array([0.5]), np.array([[1]]), np.array(["1"]), np.array([{}], dtype=object), np.array(1),
    np.array([-1]), np.array([4]),
])  # fmt: skip
def test_arrays_of_something_else_are_told(array, tmp_path):
    """Nothing is unpickled, rounded or wrapped."""
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match="--labels_file .*a.npy"):
        choose(labels_file=str(tmp_path / "a.npy"))
