"""guided_diffusion.class_labels: which class an image has, and which number the class."""

import json
import os

import numpy as np
import pytest
from toy_images import one_line_error, write_csv

from guided_diffusion.class_labels import class_numbers, describe_classes, label_entries
from guided_diffusion.data_sources import Source


def source(*names, labels=None):
    """A source of entries that have names alone."""
    made = Source("data")
    made.names = list(names)
    made.labels = None if labels is None else np.array(labels)
    return made


def numbered(*args, **kwargs):
    numbers, names = label_entries(*args, **kwargs)
    assert numbers.dtype == np.int64
    return numbers.tolist(), names


PHOTOS = source("cat/1_x.png", "ant/2_x.png", "cat/deep/1_y.png")


def test_file_names_give_sorted_classes():
    """The part before the first "_", sorted as text, whatever folder the file is in."""
    names = ["0/zebra_1.png", "ant_1.png", "10_x_y.png", "9_x.png", "ant_2.png"]
    assert numbered(source(*names)) == ([3, 2, 0, 1, 2], ["10", "9", "ant", "zebra"])
    assert class_numbers([f"/some/{name}" for name in names]) == [3, 2, 0, 1, 2]
    assert numbered(PHOTOS) == ([0, 1, 0], ["1", "2"])


def test_folders_give_sorted_classes():
    """The first folder on the way counts."""
    assert numbered(PHOTOS, "folder") == ([1, 0, 1], ["ant", "cat"])


def test_carried_labels_are_the_numbers():
    """An npz counts its classes up to the highest label, and is no matter of names."""
    assert numbered(source("00", "01", labels=[3, 0])) == ([3, 0], ["0", "1", "2", "3"])


FORMS = {
    "object.json": dict,
    "list.json": lambda rows: [list(row) for row in rows],
    "edm.json": lambda rows: {"labels": [list(row) for row in rows]},
    "edm_object.json": lambda rows: {"version": 1, "labels": dict(rows)},
    "plain.csv": None,
    "header.csv": None,
    "UPPER.CSV": None,
}


def write_labels(folder, form, rows):
    """Write labels in one of the forms; return the path."""
    path = folder / form
    if form.lower().endswith(".csv"):
        return write_csv(path, ([["name", "class"]] if form == "header.csv" else []) + list(rows))
    path.write_text(json.dumps(FORMS[form](rows)))
    return str(path)


@pytest.mark.parametrize("form", FORMS)
def test_files_give_names_or_numbers(tmp_path, form):
    """All forms say the same; whole numbers are the class numbers, all else is sorted as text."""
    rows = [("ant/2_x.png", "b"), ("cat/1_x.png", "c c"), ("cat/deep/1_y.png", "b"), ("no", "a")]
    path = write_labels(tmp_path, form, rows)
    assert numbered(PHOTOS, path) == ([2, 1, 1], ["a", "b", "c c"])
    rows = [("ant/2_x.png", 3), ("cat/1_x.png", 0), ("cat/deep/1_y.png", 3)]
    path = write_labels(tmp_path, form, rows)
    assert numbered(PHOTOS, path) == ([0, 3, 3], ["0", "1", "2", "3"])


def test_details_of_files_of_labels(tmp_path):
    """Bare file names, "./", backslashes, a byte order mark, blank rows, numbers with zeros."""
    text = "\ufeff1_x.png, 07\n\n./ant/2_x.png,7\r\ncat\\deep\\1_y.png,1\n"
    (tmp_path / "x.csv").write_text(text, newline="")
    assert numbered(PHOTOS, str(tmp_path / "x.csv"))[0] == [7, 7, 1]


def test_a_first_row_that_names_an_entry_is_no_header(tmp_path):
    """The entries of an npz have no dot in their names."""
    path = write_csv(tmp_path / "x.csv", [["00000000", "b"], ["00000001", "a"]])
    assert numbered(source("00000000", "00000001"), path) == ([1, 0], ["a", "b"])


def test_given_classes_number_other_data():
    """Validation data is numbered as the training data, and may lack classes but not add any."""
    few = source("b_1.png", "b_2.png")
    assert numbered(few, classes=["a", "b", "c"]) == ([1, 1], ["a", "b", "c"])
    few.flag = "--val_data_dir"
    message = one_line_error(lambda: label_entries(few, classes=["a", "c"]))
    assert "--val_data_dir" in message and "'b'" in message


def test_describe_counts_classes_in_one_line():
    """The line shows number, name and count, and cuts a long list short."""
    assert describe_classes(["ant", "cat"], [1, 2000]) == "2 classes: 0 = ant (1), 1 = cat (2,000)"
    assert describe_classes(["0", "1"], [1, 0]) == "2 classes: 0 (1), 1 (0)"
    assert describe_classes(["a\nb"], [1]) == r"1 class: 0 = 'a\nb' (1)"
    many = describe_classes([f"n{k:04d}" for k in range(1000)], [1] * 1000)
    assert many.endswith("11 = n0011 (1), ...")


# Errors


def test_every_image_needs_a_class():
    """A name without "_", an image in no folder: how many, which, and what to do."""
    message = one_line_error(lambda: label_entries(source("a_1.png", "x/b.png")))
    assert "--class_cond" in message and "1 of 2" in message and "x/b.png" in message
    assert "--labels" in message
    message = one_line_error(lambda: label_entries(source("a/1.png", "b.png"), "folder"))
    assert "--labels folder" in message and "1 of 2" in message and "'b.png'" in message


@pytest.mark.parametrize("labels", ["filename", "folder"])
def test_classes_must_not_outnumber_num_classes(labels):
    """Otherwise a label would index beyond the embedding, deep inside the network."""
    photos = source("a/a_1.png", "b/b_1.png", "c/c_1.png")
    message = one_line_error(lambda: label_entries(photos, labels, num_classes=2))
    assert "--num_classes 2" in message and "--num_classes 3" in message and "'c'" in message
    assert numbered(photos, labels, num_classes=3)[0] == [0, 1, 2]


def test_numbers_must_fit_num_classes():
    """A label that an npz carries may be num_classes - 1 at most."""
    carried = source("0", "1", labels=[0, 4])
    assert "--num_classes 5" in one_line_error(lambda: label_entries(carried, num_classes=4))
    assert numbered(carried, num_classes=5)[0] == [0, 4]
    for label in (-1, 10**9):
        message = one_line_error(lambda label=label: label_entries(source("0", labels=[label])))
        assert str(label) in message and "--data_dir's arr_1" in message


HOSTILE = {
    "syntax.json": "{",
    "empty.json": "",
    "number.json": "3",
    "null.json": '{"labels": null}',
    "nothing.json": "[]",
    "nested.json": '{"1_x.png": {"class": 3}}',
    "deep.json": "[" * 100_000,
    "boolean.json": '{"1_x.png": true}',
    "missing_class.json": '{"1_x.png": null}',
    "fraction.json": '{"1_x.png": 1.5}',
    "nan.json": '{"1_x.png": NaN}',
    "triple.json": '[["1_x.png", 3, 4]]',
    "negative.json": '{"1_x.png": 0, "2_x.png": -1, "1_y.png": 0}',
    "huge.json": '{"1_x.png": 0, "2_x.png": 1e300, "1_y.png": 0}',
    "long.csv": f"1_x.png,{'9' * 5000}\n2_x.png,1\n1_y.png,1\n",
    "lacking.json": '{"1_x.png": 0}',
    "contrary.csv": "1_x.png,a\n2_x.png,a\n1_y.png,a\n1_x.png,b\n",
    "empty.csv": "",
    "header_alone.csv": "name,class\n",
    "semicolons.csv": "1_x.png;3\n",
    "no_class.csv": "1_x.png,\n",
    "quote.csv": '"1_x.png,3\n',
    "bytes.csv": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_bad_files_of_labels_are_told(tmp_path, name):
    """One line that names --labels and the file."""
    content = HOSTILE[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    path = str(tmp_path / name)
    message = one_line_error(lambda: label_entries(PHOTOS, path))
    assert f"--labels {path!r}" in message and len(message) < 400


def test_twofold_file_names_need_their_folders(tmp_path):
    """A bare file name that two images bear says nothing about either."""
    photos = source("a/x.png", "b/x.png", "c/y.png")
    (tmp_path / "x.json").write_text('{"x.png": 1, "y.png": 2}')
    message = one_line_error(lambda: label_entries(photos, str(tmp_path / "x.json")))
    assert "'x.png'" in message and "2 of that name" in message
    (tmp_path / "x.json").write_text('{"a/x.png": 1, "b/x.png": 0, "y.png": 2}')
    assert numbered(photos, str(tmp_path / "x.json"))[0] == [1, 0, 2]


def test_unknown_kinds_of_labels_are_told(tmp_path):
    """A typo, a file of another kind, a file that is not there, a folder."""
    for labels in ("folders", "", "labels.txt"):
        message = one_line_error(lambda labels=labels: label_entries(PHOTOS, labels))
        assert f"--labels {labels!r}" in message and "filename, folder" in message
    message = one_line_error(lambda: label_entries(PHOTOS, "/no/such.json"))
    assert "--labels '/no/such.json' does not exist" in message
    os.mkdir(tmp_path / "x.json")
    assert "--labels" in one_line_error(lambda: label_entries(PHOTOS, str(tmp_path / "x.json")))
