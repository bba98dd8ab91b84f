"""Constants of a TensorFlow graph: what a writer wrote comes back, and nothing else does harm."""

import json
import struct
import tracemalloc

import numpy as np
import pytest
from launching import ROOT

from evaluations.graph_reader import read_constants

SHAPES = json.loads((ROOT / "tests" / "reference" / "inception_graph.json").read_text())
FLOAT, INT = 1, 3  # types in TensorFlow


# -- a writer --------------------------------------------------------------------------------------


def varint(number):
    """Return an integer as seven bits a byte."""
    number %= 2**64
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number, value):
    """Return a field of a message: an integer, text or bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else bytes(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(shape, *numbers, dtype=FLOAT):
    """Return a TensorProto: its type, its shape, and fields of numbers."""
    dims = b"".join(field(2, field(1, size)) for size in shape)
    return field(1, dtype) + field(2, dims) + b"".join(numbers)


def content(array):
    """Return the field of a TensorProto that holds all numbers as bytes."""
    return field(4, np.asarray(array, "<f4").tobytes())


def listed(*numbers):
    """Return the field of a TensorProto that lists numbers."""
    return field(5, struct.pack(f"<{len(numbers)}f", *numbers))


def node(name, value, op="Const", attribute="value"):
    """Return the field of a GraphDef that holds a node with a tensor."""
    entry = field(1, attribute) + field(2, field(8, value))
    dtype = field(5, field(1, "dtype") + field(2, field(6, FLOAT)))
    return field(1, field(1, name) + field(2, op) + dtype + field(5, entry))


def graph_of(constants):
    """Return the bytes of a graph that holds arrays by name."""
    return b"".join(node(n, tensor(a.shape, content(a))) for n, a in constants.items())


@pytest.fixture
def read(tmp_path):
    """Read constants from the bytes of a file."""

    def read(data):
        (tmp_path / "graph.pb").write_bytes(data)
        return read_constants(tmp_path / "graph.pb")

    return read


# -- what is there comes back ----------------------------------------------------------------------


def test_constants_come_back_by_name_and_shape(read):
    """All names of the graph of Inception, with shapes of as many axes."""
    rng = np.random.default_rng(0)
    written = {
        name: rng.normal(size=[min(size, 3) for size in shape]).astype(np.float32)
        for name, shape in SHAPES.items()
    }
    found = read(graph_of(written))
    assert list(found) == list(written)
    for name, array in written.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], array, strict=True)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (tensor([2, 2], content([1, 2, 3, 4])), [[1, 2], [3, 4]]),
        (tensor([2, 2], listed(1, 2, 3, 4)), [[1, 2], [3, 4]]),
        (tensor([3], b"\x2d", struct.pack("<f", 5), listed(6, 7)), [5, 6, 7]),
        (tensor([2, 3], listed(7)), [[7, 7, 7]] * 2),
        (tensor([], listed(128)), 128),
        (tensor([0]), []),
        (field(4, struct.pack("<f", 2)) + field(1, FLOAT), 2),
    ],
)
def test_numbers_are_read_however_they_are_stored(read, message, expected):
    """As bytes, as a list in one or many fields, or as one number for all places."""
    found = read(node("x", message))["x"]
    np.testing.assert_array_equal(found, np.array(expected, np.float32), strict=True)


def test_what_is_no_float_constant_is_left_out(read):
    """Operations, other types, other attributes and unknown fields do not disturb."""
    one = tensor([1], listed(1))
    unknown = field(900, 2**63) + field(901, b"abc") + b"\x71" + bytes(8) + b"\x7d" + bytes(4)
    found = read(
        unknown
        + node("operation", one, op="Conv2D")
        + node("shape", tensor([1], field(7, 5), dtype=INT))
        + node("elsewhere", one, attribute="other")
        + field(4, field(1, 9))
        + node("kept", unknown + one + unknown)
    )
    assert list(found) == ["kept"]


def test_files_of_the_official_writer(read):
    """TensorBoard brings the messages, written by Google's library."""
    graph_pb2 = pytest.importorskip("tensorboard.compat.proto.graph_pb2")
    graph, array = graph_pb2.GraphDef(), np.arange(6, dtype=np.float32).reshape(2, 3)
    for name in ("bytes", "list"):
        made = graph.node.add(name=name, op="Const", input=["other"], device="/cpu:0")
        value = made.attr["value"].tensor
        value.dtype = made.attr["dtype"].type = FLOAT
        for size in array.shape:
            value.tensor_shape.dim.add(size=size)
    graph.node[0].attr["value"].tensor.tensor_content = array.tobytes()
    graph.node[1].attr["value"].tensor.float_val.extend(array.ravel())
    graph.node.add(name="operation", op="Mul").attr["T"].type = FLOAT
    graph.versions.producer = 9
    found = read(graph.SerializeToString())
    assert list(found) == ["bytes", "list"]
    for read_array in found.values():
        np.testing.assert_array_equal(read_array, array, strict=True)


def test_one_number_for_all_places_takes_no_memory(read):
    """A shape costs nothing as long as the file does not fill it."""
    data = node("x", tensor([2**20, 1000], listed(3)))
    tracemalloc.start()
    found = read(data)["x"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.shape == (2**20, 1000) and found[-1, -1] == 3
    assert peak < 2**20


# -- what is no graph ------------------------------------------------------------------------------

GOOD = node("x", tensor([2], content([1, 2])))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 bytes"),
        (b"<html><body>404</body></html>", "wire type"),
        (b"version https://git-lfs.github.com/spec/v1\n", "wire type"),
        (b"\x80\x02}q\x00.", "is"),
        (field(4, field(1, 9)), "no constant"),
        (node("x", tensor([1], listed(1)), op="Placeholder"), "no constant"),
        (GOOD + GOOD, "two nodes have the name 'x'"),
        (GOOD + b"\x0b", "wire type 3"),
        (GOOD + b"\x00\x01", "number 0"),
        (GOOD + b"\xff" * 11, "64 bits"),
        (GOOD + varint(1 << 3 | 2) + varint(2**62) + b"abc", "cut to 3"),
        (GOOD + field(1, 5), "field 1 has the wire type 0"),
        (field(1, field(1, b"\xff\xfe") + field(2, "Const")), "utf-8"),
        (field(1, field(1, 7) + field(2, "Const")), "field 1 has the wire type 0"),
        (node("x", tensor([2, 2], content([1, 2, 3]))), "'x': 12 bytes do not fill"),
        (node("x", tensor([2], content([1, 2, 3]))), "'x': 12 bytes do not fill"),
        (node("x", tensor([2], field(4, b"12345"))), "5 bytes"),
        (node("x", tensor([3], listed(1, 2))), "2 numbers do not fill"),
        (node("x", tensor([3])), "0 numbers"),
        (node("x", tensor([1], field(5, b"123"))), "no list of float32"),
        (node("x", tensor([1], field(5, 1))), "no list of float32"),
        (node("x", tensor([-1], listed(1))), "no tensor has the shape"),
        (node("x", tensor([2**40, 0], listed(1))), "no tensor has the shape"),
        (node("x", tensor([2**20] * 32, listed(1))), "no tensor has the shape"),
        (node("x", tensor([1] * 33, listed(1))), "no tensor has the shape"),
        (node("x" * 10**6, tensor([3])), "0 numbers"),
        (node("x", field(1, b"1") + listed(1)), "field 1 has the wire type 2"),
        (b"".join(field(1, field(1, str(i))) for i in range(100_001)), "more than 100,000"),
    ],
)
def test_other_files_end_in_one_line(read, tmp_path, data, words):
    with pytest.raises(ValueError) as error:
        read(data)
    line = str(error.value)
    assert line.startswith(f"{tmp_path / 'graph.pb'} is no whole TensorFlow graph: ")
    assert words in line and "\n" not in line and len(line) < 500


def test_every_cut_is_noticed(read):
    """No beginning of a node is a graph."""
    for size in range(len(GOOD)):
        with pytest.raises(ValueError, match="no whole TensorFlow graph"):
            read(GOOD[:size])


def test_damage_ends_in_an_error_or_in_arrays(read):
    """Wrong bytes anywhere raise ValueError, or give numbers that the file does hold."""
    rng = np.random.default_rng(0)
    data = graph_of({name: np.ones(3, np.float32) for name in list(SHAPES)[:4]})
    refused = 0
    for _ in range(500):
        broken = bytearray(data)
        for at in rng.integers(len(data), size=rng.integers(1, 5)):
            broken[at] = rng.integers(256)
        try:
            found = read(bytes(broken))
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert all(array.dtype == np.float32 for array in found.values())
    assert 100 < refused < 500


@pytest.mark.parametrize("name", ["missing.pb", "."])
def test_a_path_without_a_file_is_named(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be read") as error:
        read_constants(tmp_path / name)
    assert str(tmp_path) in str(error.value)
