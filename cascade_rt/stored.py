"""A bundle's weights file: tensors as the checkpoint had them, however the file holds them.

A precision may store a tensor divided by a power of two (fp16), or in 8 bits (int8, fp8). The file's metadata says
which. A tensor in 8 bits lies there as the product of an engine takes it, ``[in, out]``, and its scales beside it:
``weight[o, i] = values[i, o] * scales[o]``. Its values are int8, or E4M3: floating numbers with 4 bits of exponent, 3
of mantissa, no infinity and one NaN (OCP 8-bit Floating Point Specification, revision 1.0).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from .errors import CheckpointError
from .files import name_of
from .graph import Moved
from .schema import parse_json, validated
from .tensor_file import Array, TensorFile, narrowed, put, put_bytes, stored_bytes, widened

DIVIDED = "divided"
"""Key of the metadata: JSON, tensor name -> the power of two that it is stored divided by."""
QUANTISED = "quantised"
"""Key of the metadata: JSON, name of a tensor in 8 bits -> its shape in the checkpoint."""
Kind = Literal["I8", "F8_E4M3"]
"""What a tensor in 8 bits holds, in safetensors' words."""
LARGEST: Mapping[Kind, float] = {"I8": 127.0, "F8_E4M3": 448.0}
"""The largest value of each."""
_LEAST_EXPONENT, _MANTISSA = -6, 3
"""Of E4M3: numbers below two to that power have no implicit bit."""
_ALIGNMENT = 4096  # providers map files page by page
_Factor = Annotated[float, Meta(gt=0, le=2.0**60)]
_Shape = Annotated[tuple[Annotated[int, Meta(ge=1, le=1 << 31)], ...], Meta(min_length=2, max_length=8)]


def scales_of(name: str) -> str:
    """Name of the tensor that holds the scales of a tensor in 8 bits."""
    return f"{name}_scale"


def quantised(weight: Array, kind: Kind = "I8", scales_in: str = "F32") -> tuple[NDArray[Any], Array]:
    """A weight in 8 bits: symmetric, with a scale for every output row.

    Args:
        weight: ``[out, in, ...]`` float32; axes behind the second have one entry.
        kind: of the values.
        scales_in: safetensors' word for the dtype in which the scales will be stored; they are rounded to it.

    Returns:
        ``[in, out]``: int8 in -127..127, or the bits of E4M3 as uint8; and ``[out]`` float32, above 0.
    """
    rows = weight.reshape(len(weight), -1)
    largest = np.abs(rows).max(axis=1)
    scales = np.where(largest > 0, largest, np.float32(1)).astype(np.float32) / np.float32(LARGEST[kind])
    scales = widened(narrowed(scales, scales_in), scales_in)
    scales = np.maximum(scales, np.finfo(np.float32).tiny)
    return np.ascontiguousarray(in_8_bits(rows / scales[:, None], kind).T), scales


def restored(values: NDArray[Any], scales: Array, shape: tuple[int, ...]) -> Array:
    """The weight that `quantised` made 8 bits of, of the shape that it had."""
    wide: Array = (from_8_bits(values).T * scales[:, None]).reshape(shape)
    return wide


def in_8_bits(values: Array, kind: Kind) -> NDArray[Any]:
    """Numbers rounded to the nearest of a kind, ties to even; what is beyond its largest becomes that.

    Args:
        values: finite, float32.
        kind: what they become.

    Returns:
        int8, or the bits of E4M3 as uint8.
    """
    most = LARGEST[kind]
    if kind == "I8":
        return np.clip(np.rint(values), -most, most).astype(np.int8)
    size = np.minimum(np.abs(values), np.float32(most))
    exponent = np.frexp(np.maximum(size, np.float32(2.0**_LEAST_EXPONENT)))[1] - 1
    # a mantissa that is rounded up to the next power of two carries into the exponent by itself
    bits = ((exponent - _LEAST_EXPONENT) << _MANTISSA) + np.rint(np.ldexp(size, _MANTISSA - exponent)).astype(np.int32)
    signed: NDArray[np.uint8] = (bits | (np.signbit(values).astype(np.int32) << 7)).astype(np.uint8)
    return signed


def from_8_bits(values: NDArray[Any]) -> Array:
    """What `in_8_bits` stands for, float32."""
    wide: Array = values.astype(np.float32) if values.dtype == np.int8 else _E4M3[values]
    return wide


def _e4m3() -> Array:
    """The number of every pattern of bits."""
    bits = np.arange(256)
    exponent, mantissa = (bits >> _MANTISSA) & 15, bits & 7
    wide = np.ldexp(
        np.where(exponent > 0, 8 + mantissa, mantissa), np.maximum(exponent, 1) - 1 + _LEAST_EXPONENT - _MANTISSA
    )
    wide[(bits & 127) == 127] = np.nan
    signed: Array = np.where(bits > 127, -wide, wide).astype(np.float32)
    return signed


_E4M3 = _e4m3()


def divided_in(metadata: Mapping[str, str], where: str) -> dict[str, float]:
    """Which tensors of a file are stored divided, and by what.

    Args:
        metadata: of the file.
        where: the file, for messages.

    Raises:
        CheckpointError: the metadata is damaged.
    """
    return _said(metadata, DIVIDED, dict[str, _Factor], where)


def quantised_in(metadata: Mapping[str, str], where: str) -> dict[str, tuple[int, ...]]:
    """Which tensors of a file are stored in 8 bits, and their shapes in the checkpoint; see `divided_in`."""
    return _said(metadata, QUANTISED, dict[str, _Shape], where)


def _said(metadata: Mapping[str, str], key: str, kind: type, where: str) -> dict:  # type: ignore[type-arg]
    if (text := metadata.get(key)) is None:
        return {}
    place = f"{where}, metadata {key}"
    made: dict = validated(parse_json(text, place, CheckpointError), kind, place, CheckpointError)  # type: ignore[type-arg]
    return made


class StoredWeights:
    """A bundle's weights file in NumPy."""

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            CheckpointError: as `TensorFile`, or the metadata is damaged.
        """
        self._file = TensorFile(path)
        self._divided = divided_in(self._file.metadata, name_of(path))
        self._quantised = quantised_in(self._file.metadata, name_of(path))
        scales = {scales_of(name) for name in self._quantised}
        if missing := (self._quantised.keys() | scales) - self._file.shapes.keys():
            raise CheckpointError(f"{name_of(path)} says that it holds {min(missing)}, and does not; it is damaged")
        whole = {name: shape for name, shape in self._file.shapes.items() if name not in scales}
        self.shapes: Mapping[str, tuple[int, ...]] = whole | self._quantised
        """Name and shape of every tensor, as in the checkpoint."""

    def read(self, name: str) -> Array:
        """One tensor as the checkpoint had it, float32.

        Raises:
            CheckpointError: it is no weight, or cannot be read.
        """
        if name in self._quantised:
            scales = self._file.read(scales_of(name))
            return restored(self._file.read_8_bits(name), scales, self._quantised[name])
        return self._file.read(name) * np.float32(self._divided.get(name, 1.0))

    def put(self, copy: Path, name: str, values: Array) -> None:
        """Write a tensor into a copy of the file, stored as it was.

        Args:
            copy: of the file.
            name: of the tensor.
            values: float32, of the shape that it has in the checkpoint.

        Raises:
            CheckpointError: the values do not fit the dtype.
        """
        places = self._file.places
        if name not in self._quantised:
            put(copy, places[name], values / np.float32(self._divided.get(name, 1.0)))
            return
        there = places[scales_of(name)]
        made, scales = quantised(values, places[name].dtype, there.dtype)  # type: ignore[arg-type]
        put_bytes(copy, places[name], made.tobytes())
        put(copy, there, scales)

    def enlarge(self, copy: Path, name: str, rows: Array) -> Moved:
        """Write a table with further rows at the end of a copy of the file; the table before stays where it is.

        Args:
            copy: of the file.
            name: of the table, ``[rows, ...]``.
            rows: float32, behind its own, as the checkpoint would have them.

        Raises:
            CheckpointError: the rows do not fit the dtype.
        """
        place = self._file.places[name]
        if name in self._quantised:
            raise CheckpointError(f"{name_of(copy)} holds {name} in 8 bits, and rows cannot be added to those")
        stored = stored_bytes(copy, place.dtype, rows / np.float32(self._divided.get(name, 1.0)))
        with copy.open("r+b") as file:
            file.seek(place.start)
            table = file.read(place.stop - place.start)
            offset = -(-file.seek(0, os.SEEK_END) // _ALIGNMENT) * _ALIGNMENT
            file.seek(offset)
            file.write(table)
            file.write(stored)
        return Moved(start=place.start, rows=place.shape[0] + len(rows), offset=offset, length=len(table) + len(stored))
