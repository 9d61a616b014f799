"""One change to an ONNX graph, without ONNX: a table of weights gets further rows, and lies elsewhere in its file.

A graph is a protobuf message, and all that is needed of protobuf is its fields: what is not changed is copied as it is.
Field numbers are those of ``onnx.proto``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .errors import BundleError

_GRAPH = 7  # of ModelProto
_INITIALIZER, _VALUE_INFO = 5, 13  # of GraphProto
_DIMS, _TENSOR_NAME, _EXTERNAL = 1, 8, 13  # of TensorProto
_KEY, _VALUE = 1, 2  # of StringStringEntryProto
_VALUE_NAME = 1  # of ValueInfoProto
_VARINT, _LONG, _BYTES, _INT = 0, 1, 2, 5
_SIZES = {_LONG: 8, _INT: 4}


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A table that was enlarged.

    Attributes:
        start: first byte of the table before, from the beginning of the file.
        rows: how many it has now.
        offset: its first byte now.
        length: its bytes now.
    """

    start: int
    rows: int
    offset: int
    length: int


@dataclass(frozen=True)
class _Field:
    """A field of a message: its number, its value, and its bytes with the tag."""

    number: int
    value: int | bytes
    whole: bytes

    @property
    def content(self) -> bytes:
        """The bytes of a text or a message.

        Raises:
            BundleError: it is a number.
        """
        if not isinstance(self.value, bytes):
            raise _damaged()
        return self.value


def with_moved(model: bytes, table: Moved) -> bytes:
    """A model whose table of weights is elsewhere, and has more rows.

    Args:
        model: an ``.onnx`` file whose weights lie in another file.
        table: where it was, and where it is.

    Raises:
        BundleError: the graph is damaged, or has no such table.
    """
    return b"".join(
        _message(_GRAPH, _graph(field.content, table)) if field.number == _GRAPH else field.whole
        for field in _fields(model)
    )


def _graph(graph: bytes, table: Moved) -> bytes:
    fields = list(_fields(graph))
    wanted = [f for f in fields if f.number == _INITIALIZER and _place(f.content).get(b"offset") == _text(table.start)]
    if len(wanted) != 1:
        raise BundleError("the graph of the text encoder has no table of tokens; build it again with cascade-export")
    name = _first(wanted[0].content, _TENSOR_NAME)
    made = []
    for field in fields:
        if field is wanted[0]:
            made.append(_message(_INITIALIZER, _tensor(field.content, table)))
        elif field.number != _VALUE_INFO or _first(field.content, _VALUE_NAME) != name:  # it says the size of before
            made.append(field.whole)
    return b"".join(made)


def _tensor(tensor: bytes, table: Moved) -> bytes:
    sizes: list[int] = []
    rest = []
    new = {b"offset": _text(table.offset), b"length": _text(table.length)}
    for field in _fields(tensor):
        if field.number == _DIMS:
            sizes += _numbers(field)
        elif field.number == _EXTERNAL and (key := _first(field.content, _KEY)) in new:
            rest.append(_message(_EXTERNAL, _message(_KEY, key) + _message(_VALUE, new[key])))
        else:
            rest.append(field.whole)
    sizes[0] = table.rows
    return b"".join([_varint(_DIMS << 3 | _VARINT) + _varint(size) for size in sizes] + rest)


def _place(tensor: bytes) -> dict[bytes, bytes]:
    """Where a tensor lies: ``location``, ``offset``, ``length``."""
    entries = (field.content for field in _fields(tensor) if field.number == _EXTERNAL)
    return {_first(entry, _KEY): _first(entry, _VALUE) for entry in entries}


def _numbers(field: _Field) -> list[int]:
    """Integers, one a field or packed into one."""
    if isinstance(field.value, int):
        return [field.value]
    made, at = [], 0
    while at < len(field.value):
        number, at = _read_varint(field.value, at)
        made.append(number)
    return made


def _first(message: bytes, number: int) -> bytes:
    """The content of a message's first field of a number; empty where there is none."""
    return next((field.content for field in _fields(message) if field.number == number), b"")


def _fields(message: bytes) -> Iterator[_Field]:
    at = 0
    while at < len(message):
        begin = at
        tag, at = _read_varint(message, at)
        kind = tag & 7
        value: int | bytes
        if kind == _VARINT:
            value, at = _read_varint(message, at)
        elif kind == _BYTES or kind in _SIZES:
            length = _SIZES.get(kind)
            if length is None:
                length, at = _read_varint(message, at)
            value, at = message[at : at + length], at + length
        else:
            raise _damaged()
        if at > len(message):
            raise _damaged()
        yield _Field(tag >> 3, value, message[begin:at])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    number, shift = 0, 0
    while True:
        if at >= len(data) or shift > 63:
            raise _damaged()
        byte = data[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at


def _varint(number: int) -> bytes:
    made = bytearray()
    while number > 0x7F:
        made.append(number & 0x7F | 0x80)
        number >>= 7
    made.append(number)
    return bytes(made)


def _message(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content


def _text(number: int) -> bytes:
    return str(number).encode()


def _damaged() -> BundleError:
    return BundleError("the graph of the text encoder is damaged; build it again with cascade-export")
