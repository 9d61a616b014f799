"""Safetensors files in NumPy: what is in one, its tensors in float32, and tensors put back in place.

Engines read weights themselves; this is for what changes weights without torch (LoRA).
"""

from __future__ import annotations

import math
import mmap
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from .errors import CheckpointError, shown
from .files import name_of, said_by
from .schema import parse_json, validated

Array = NDArray[np.float32]
MOST_HEADER_BYTES = 100 << 20
_ITEM_SIZE = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1},
}
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_INTEGERS = {"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8}
_EIGHT_BITS = {"I8": np.int8, "F8_E4M3": np.uint8}
_Size = Annotated[int, Meta(ge=0, le=1 << 46)]


class _Row(Struct, frozen=True, kw_only=True):
    """A tensor in the file's header."""

    dtype: str
    shape: Annotated[tuple[_Size, ...], Meta(max_length=8)]
    data_offsets: tuple[_Size, _Size]


HEADER = dict[str, _Row]
METADATA = dict[str, str]
"""What a header holds: a row for every tensor's name, and texts under ``__metadata__``."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor lies in a file.

    Attributes:
        dtype: in safetensors' words: ``F32``, ``BF16`` ...
        shape: its size.
        start: first byte, from the beginning of the file.
        stop: behind the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """A safetensors file, open for reading."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            CheckpointError: the file is missing, no regular file, cut, or no safetensors file.
        """
        self.path = path
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise CheckpointError(f"{name_of(path)} is no regular file; name a .safetensors file")
            size = found.st_size
            with path.open("rb") as file:
                first = file.read(8)
                length = struct.unpack("<Q", first)[0] if len(first) == 8 else -1
                if not 2 <= length <= min(MOST_HEADER_BYTES, size - 8):
                    raise CheckpointError(f"{name_of(path)} is cut, or no safetensors file; download it again")
                head = parse_json(file.read(length), name_of(path), CheckpointError)
        except (FileNotFoundError, NotADirectoryError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"there is no file {name_of(path)}; name a .safetensors file") from None
        except (OSError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{name_of(path)} cannot be read: {said_by(error)}") from None
        if not isinstance(head, dict):
            raise CheckpointError(f"{name_of(path)} is no safetensors file: its header is {shown(head)}")
        self.metadata: Mapping[str, str] = validated(
            head.pop("__metadata__", {}), METADATA, f"{name_of(path)}, metadata", CheckpointError
        )
        rows = validated(head, HEADER, name_of(path), CheckpointError)
        self.places = {name: self._place(name, row, 8 + length, size) for name, row in rows.items()}

    def _place(self, name: str, row: _Row, base: int, size: int) -> Place:
        item = _ITEM_SIZE.get(row.dtype)
        start, stop = (base + offset for offset in row.data_offsets)
        if item is None or stop - start != item * math.prod(row.shape) or stop > size:
            raise CheckpointError(
                f"{name_of(self.path)} is cut, or its header is wrong: tensor {shown(name)} is said to be "
                f"{shown(row.dtype)} {row.shape} in {stop - start} bytes"
            )
        return Place(dtype=row.dtype, shape=row.shape, start=start, stop=stop)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        return {name: place.shape for name, place in self.places.items()}

    def check_dtype(self, name: str) -> None:
        """Refuse a tensor that is no weight.

        Raises:
            CheckpointError: it holds integers, booleans or a kind of float that is not read.
        """
        dtype = self.places[name].dtype
        if dtype not in _FLOATS:
            raise CheckpointError(
                f"{name_of(self.path)} has {shown(name)} in {dtype}, which is no weight; read are {', '.join(_FLOATS)}"
            )

    def read(self, name: str) -> Array:
        """One tensor, as float32.

        Raises:
            CheckpointError: it is no weight, or cannot be read.
        """
        self.check_dtype(name)
        return self._values(name, _FLOATS)

    def read_8_bits(self, name: str) -> NDArray[Any]:
        """A tensor of 8-bit integers, or the bits of one in E4M3 as uint8, of the shape in which it lies there.

        Raises:
            CheckpointError: it holds others, or cannot be read.
        """
        place = self.places[name]
        if (kind := _EIGHT_BITS.get(place.dtype)) is None:
            accepted = " or ".join(_EIGHT_BITS)
            raise CheckpointError(
                f"{name_of(self.path)} has {shown(name)} in {place.dtype}; it is said to be {accepted}"
            )
        return np.frombuffer(self._bytes(place), dtype=kind).reshape(place.shape)

    def read_number(self, name: str) -> float:
        """A tensor of one number, which may be an integer.

        Raises:
            CheckpointError: it holds another count of numbers, or no numbers.
        """
        place = self.places[name]
        if math.prod(place.shape) != 1 or place.dtype not in {**_FLOATS, **_INTEGERS}:
            raise CheckpointError(
                f"{name_of(self.path)} has {shown(name)} of shape {place.shape} in {place.dtype}; it is one number"
            )
        return float(self._values(name, {**_FLOATS, **_INTEGERS}).reshape(()))

    def _values(self, name: str, dtypes: Mapping[str, Any]) -> Array:
        place = self.places[name]
        return widened(np.frombuffer(self._bytes(place), dtype=dtypes[place.dtype]), place.dtype).reshape(place.shape)

    def _bytes(self, place: Place) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(place.start)
                return file.read(place.stop - place.start)
        except OSError as error:
            raise CheckpointError(f"{name_of(self.path)} cannot be read: {said_by(error)}") from None


def widened(values: NDArray[Any], dtype: str) -> Array:
    """Stored values as float32; bfloat16 comes as its bits, uint16."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32)


def narrowed(values: Array, dtype: str) -> NDArray[Any]:
    """Float32 values as they are stored, rounded to the nearest, ties to even."""
    if dtype != "BF16":
        return values.astype(_FLOATS[dtype])
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype(np.uint16)


def put(path: Path, place: Place, values: Array) -> None:
    """Write a tensor over the one that lies at a place of a file.

    Args:
        path: a copy of the file.
        place: of the tensor.
        values: float32, of the tensor's shape.

    Raises:
        CheckpointError: the values do not fit the dtype.
    """
    put_bytes(path, place, stored_bytes(path, place.dtype, values))


def stored_bytes(path: Path, dtype: str, values: Array) -> bytes:
    """Float32 values as a file holds them.

    Args:
        path: of the file, for messages.
        dtype: in which it holds them.
        values: any shape.

    Raises:
        CheckpointError: the values do not fit the dtype.
    """
    with np.errstate(over="ignore"):
        stored = narrowed(values, dtype)
    if dtype == "F16" and not np.isfinite(stored).all():
        raise CheckpointError(f"a changed weight is beyond fp16, in which {name_of(path)} holds it")
    return np.ascontiguousarray(stored).tobytes()


def put_bytes(path: Path, place: Place, stored: bytes) -> None:
    """Write a tensor, as it is stored, over the one that lies at a place of a file."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
        content[place.start : place.stop] = stored
