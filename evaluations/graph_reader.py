"""Read the constants of a TensorFlow graph without TensorFlow.

A graph file is a protocol buffer: messages of fields, each a key (number and wire type) and a
value; a nested message is a value of bytes. Of the whole language five messages are needed here:

    GraphDef -> NodeDef (name, op, attr) -> AttrValue -> TensorProto -> TensorShapeProto

The file is mapped into memory and nothing in it is ever run. A size that it states is believed
only as far as there are bytes.
"""

import math
import mmap
import os
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types; 3 and 4 are long out of use
FLOAT = 1  # TensorFlow's number for float32
MAX_BYTES = 2**31 - 1  # protocol buffers end there
MAX_NODES = 100_000  # the graph of Inception-v3 has about a thousand
MAX_DIMS = 32  # of a numpy array in all its releases


class Field(NamedTuple):
    """A field of a message: its number, wire type and value, an integer or bytes."""

    number: int
    wire_type: int
    value: int | memoryview


def read_constants(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Return the float32 constants of a graph file by name; those of other types are left out.

    Args:
        path: of a binary GraphDef such as classify_image_graph_def.pb.

    Raises:
        ValueError: there is no such file, it is damaged or holds no such constant; one line.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not 0 < size <= MAX_BYTES:
                raise ValueError(f"it has {size:,} bytes")
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _constants(memoryview(content))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise ValueError(f"{path} is no whole TensorFlow graph: {error}") from error


def _constants(graph: memoryview) -> dict[str, np.ndarray]:
    """Return the constants of a GraphDef."""
    constants: dict[str, np.ndarray] = {}
    names: set[str] = set()
    for node in _values(graph, 1, BYTES):
        name = _text(node, 1)
        if name in names:
            raise ValueError(f"two nodes have the name {name[:80]!r}")
        names.add(name)
        if len(names) > MAX_NODES:
            raise ValueError(f"it has more than {MAX_NODES:,} nodes")
        tensor = _tensor_of(node) if _text(node, 2) == "Const" else None
        if tensor is not None and _last(tensor, 1, VARINT) == FLOAT:
            try:
                constants[name] = _array(tensor)
            except ValueError as error:
                raise ValueError(f"constant {name[:80]!r}: {error}") from error
    if not constants:
        raise ValueError("it holds no constant of type float32")
    return constants


def _tensor_of(node: memoryview) -> memoryview | None:
    """Return the TensorProto that a NodeDef has as its attribute "value", if it does."""
    for entry in _values(node, 5, BYTES):
        if _text(entry, 1) == "value":
            return _last(_last(entry, 2, BYTES) or memoryview(b""), 8, BYTES)
    return None


def _array(tensor: memoryview) -> np.ndarray:
    """Return the numbers of a float TensorProto: bytes, a list, or one number for all places."""
    shape = _shape(_last(tensor, 2, BYTES) or memoryview(b""))
    size = math.prod(shape)
    content = _last(tensor, 4, BYTES)
    if content:
        if len(content) != 4 * size:
            raise ValueError(f"{len(content):,} bytes do not fill float32 {list(shape)}")
        return np.frombuffer(content, "<f4").astype(np.float32).reshape(shape)
    values = _floats(tensor)
    if len(values) == size:
        return values.reshape(shape)
    if len(values) != 1:
        raise ValueError(f"{len(values):,} numbers do not fill float32 {list(shape)}")
    return np.broadcast_to(values[0], shape)  # takes no memory, however large the shape


def _floats(tensor: memoryview) -> np.ndarray:
    """Return what a TensorProto lists one by one, as packed bytes or as fields of their own."""
    content = bytearray()
    for field in _fields(tensor):
        if field.number == 5:
            if field.wire_type not in (BYTES, FIXED32) or len(field.value) % 4:
                raise ValueError("float_val is no list of float32")
            content += field.value
    return np.frombuffer(content, "<f4").astype(np.float32)


def _shape(message: memoryview) -> tuple[int, ...]:
    """Return the sizes in a TensorShapeProto."""
    dims = islice(_values(message, 2, BYTES), MAX_DIMS + 1)
    shape = tuple(_last(dim, 1, VARINT) or 0 for dim in dims)
    # A negative size is a varint of 2^64 less something.
    if len(shape) > MAX_DIMS or math.prod(size or 1 for size in shape) > MAX_BYTES:
        raise ValueError(f"no tensor has the shape {str(list(shape))[:60]}")
    return shape


# The language


def _fields(message: memoryview) -> Iterator[Field]:
    """Yield the fields of a message in the order in which they lie there."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire_type = key >> 3, key & 7
        if not 0 < number < 2**29:
            raise ValueError(f"a field has the number {number}")
        if wire_type == VARINT:
            value, at = _varint(message, at)
            yield Field(number, wire_type, value)
            continue
        if wire_type == BYTES:
            size, at = _varint(message, at)
        elif wire_type in (FIXED32, FIXED64):
            size = 4 if wire_type == FIXED32 else 8
        else:
            raise ValueError(f"field {number} has the wire type {wire_type}")
        if size > len(message) - at:
            raise ValueError(f"field {number} of {size:,} bytes is cut to {len(message) - at:,}")
        yield Field(number, wire_type, message[at : at + size])
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return the integer that begins at a place, seven bits a byte, and the place behind it."""
    value = 0
    for i, byte in enumerate(message[at : at + 10]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, at + i + 1
    raise ValueError("an integer is cut short or longer than 64 bits")


def _values(message: memoryview, number: int, wire_type: int) -> Iterator[int | memoryview]:
    """Yield the values of all fields of a number, which must be of a wire type."""
    for field in _fields(message):
        if field.number == number:
            if field.wire_type != wire_type:
                raise ValueError(f"field {number} has the wire type {field.wire_type}")
            yield field.value


def _last(message: memoryview, number: int, wire_type: int) -> int | memoryview | None:
    """Return the value of a field that occurs once: the last, if it does more often."""
    value = None
    for found in _values(message, number, wire_type):
        value = found
    return value


def _text(message: memoryview, number: int) -> str:
    """Return a field that is text."""
    return bytes(_last(message, number, BYTES) or b"").decode()  # bad UTF-8 is a ValueError
