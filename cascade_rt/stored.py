"""A bundle's weights file: tensors as the checkpoint had them, however the file holds them.

A precision may store a tensor divided by a power of two (fp16), or in 8 bits (int8). The file's metadata says which.
A tensor in 8 bits lies there as the product of an engine takes it, ``[in, out]`` int8, and its scales beside it:
``weight[o, i] = values[i, o] * scales[o]``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from .errors import CheckpointError
from .files import name_of
from .graph import Moved
from .schema import parse_json, validated
from .tensor_file import Array, TensorFile, put, put_bytes, stored_bytes

DIVIDED = "divided"
"""Key of the metadata: JSON, tensor name -> the power of two that it is stored divided by."""
QUANTISED = "quantised"
"""Key of the metadata: JSON, name of a tensor in 8 bits -> its shape in the checkpoint."""
_LARGEST = 127
_ALIGNMENT = 4096  # providers map files page by page
_Factor = Annotated[float, Meta(gt=0, le=2.0**60)]
_Shape = Annotated[tuple[Annotated[int, Meta(ge=1, le=1 << 31)], ...], Meta(min_length=2, max_length=8)]


def scales_of(name: str) -> str:
    """Name of the tensor that holds the scales of a tensor in 8 bits."""
    return f"{name}_scale"


def quantised(weight: Array) -> tuple[NDArray[np.int8], Array]:
    """A weight in 8 bits: symmetric, with a scale for every output row.

    Args:
        weight: ``[out, in, ...]`` float32; axes behind the second have one entry.

    Returns:
        ``[in, out]`` int8 in -127..127, and ``[out]`` float32, above 0.
    """
    rows = weight.reshape(len(weight), -1)
    largest = np.abs(rows).max(axis=1)
    scales = np.where(largest > 0, largest, np.float32(1)).astype(np.float32) / np.float32(_LARGEST)
    scales = np.maximum(scales, np.finfo(np.float32).tiny)
    values = np.clip(np.rint(rows / scales[:, None]), -_LARGEST, _LARGEST).astype(np.int8)
    return np.ascontiguousarray(values.T), scales


def restored(values: NDArray[np.int8], scales: Array, shape: tuple[int, ...]) -> Array:
    """The weight that `quantised` made 8 bits of, of the shape that it had."""
    wide: Array = (values.T * scales[:, None]).reshape(shape)
    return wide


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
            return restored(self._file.read_int8(name), scales, self._quantised[name])
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
        made, scales = quantised(values)
        put_bytes(copy, places[name], made.tobytes())
        put(copy, places[scales_of(name)], scales)

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
