"""Tensors of a checkpoint, streamed into a bundle's safetensors file and hashed on the way.

Not more than one tensor is in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade_rt.errors import CheckpointError, OutputError
from cascade_rt.files import name_of
from cascade_rt.manifest import FileRecord
from cascade_rt.stored import DIVIDED, QUANTISED, Kind, scales_of
from cascade_rt.stored import quantised as with_scales
from cascade_rt.tensor_file import narrowed

from .weights import TensorSource

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Written:
    """A safetensors file.

    Attributes:
        places: byte offset and length of every tensor in it.
        record: its size and hash.
    """

    places: Mapping[str, tuple[int, int]]
    record: FileRecord


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A tensor of the file: as the checkpoint has it, its values in 8 bits, or the scales of those."""

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes: int


def write_weights(
    path: Path,
    names: Iterable[str],
    source: TensorSource,
    dtype: torch.dtype,
    divided: Mapping[str, float] | None = None,
    progress: Callable[[int], Any] = lambda size: None,
    quantised: Collection[str] = (),
    kind: Kind = "I8",
) -> Written:
    """Stream tensors into a safetensors file.

    Tensors stand largest first: all sizes but the last few are then multiples of 64 bytes, and engines can map them
    where they lie.

    Args:
        path: file to write.
        names: tensors to take.
        source: where they come from.
        dtype: of the tensors in the file that are not in 8 bits.
        divided: powers of two that tensors are divided by before they are converted, which loses nothing.
        progress: told of the bytes of each tensor that has been written.
        quantised: tensors that are stored in 8 bits (`cascade_rt.stored`), their scales in ``dtype``.
        kind: what those hold.

    Raises:
        CheckpointError: a tensor holds NaN or infinity, also after conversion.
        OutputError: there is not enough room.
    """
    divided, names = divided or {}, list(names)
    plain = [_plain_row(name, source, dtype) for name in names if name not in quantised]
    rows = [*plain, *(row for name in names if name in quantised for row in _quantised_rows(name, source, dtype, kind))]
    rows.sort(key=lambda row: (-row.bytes, row.name))
    said = {DIVIDED: dict(divided), QUANTISED: {name: source.shapes[name] for name in names if name in quantised}}
    header, places = _header(rows, {key: json.dumps(value, sort_keys=True) for key, value in said.items() if value})
    needed = len(header) + sum(row.bytes for row in rows)
    if (free := free_bytes(path.parent)) < needed:
        raise OutputError(
            f"{name_of(path.parent)} has {free >> 20} MiB free; {path.name} needs {needed >> 20} MiB: make room there, "
            "or choose another --out"
        )
    digest = hashlib.sha256(header)
    scales: dict[str, Any] = {}  # smaller than the values that they belong to, so that their turn comes later
    with path.open("wb") as file:
        file.write(header)
        for row in rows:
            if row.name in quantised:
                weight = _finite(row.name, source.read(row.name)).float().numpy()
                values, found = with_scales(weight, kind, _NAMES[dtype])
                scales[scales_of(row.name)] = found
                content = memoryview(values.tobytes())
            elif row.name in scales:
                content = memoryview(narrowed(scales.pop(row.name), row.kind).tobytes())
            else:
                stored = _bytes_of(row.name, source.read(row.name), dtype, divided.get(row.name, 1.0))
                content = memoryview(stored)
            digest.update(content)
            file.write(content)
            progress(len(content))
    return Written(places, FileRecord(sha256=digest.hexdigest(), bytes=needed))


def _plain_row(name: str, source: TensorSource, dtype: torch.dtype) -> _Row:
    shape = tuple(source.shapes[name])
    return _Row(name=name, kind=_NAMES[dtype], shape=shape, bytes=math.prod(shape) * dtype.itemsize)


def _quantised_rows(name: str, source: TensorSource, dtype: torch.dtype, kind: Kind) -> tuple[_Row, _Row]:
    rows, columns = source.shapes[name][:2]
    values = _Row(name=name, kind=kind, shape=(columns, rows), bytes=rows * columns)
    return values, _Row(name=scales_of(name), kind=_NAMES[dtype], shape=(rows,), bytes=rows * dtype.itemsize)


def _header(rows: Iterable[_Row], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The beginning of the file, and where every tensor will be in it."""
    said: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets, end = {}, 0
    for row in rows:
        start, end = end, end + row.bytes
        offsets[row.name] = (start, row.bytes)
        said[row.name] = {"dtype": row.kind, "shape": list(row.shape), "data_offsets": [start, end]}
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    base = 8 + len(text)
    places = {name: (base + start, length) for name, (start, length) in offsets.items()}
    return len(text).to_bytes(8, "little") + text, places


def _finite(name: str, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"tensor {name} of the checkpoint holds NaN or infinity; it is damaged")
    return tensor


def _bytes_of(name: str, tensor: Tensor, dtype: torch.dtype, divide: float) -> Any:
    tensor = _finite(name, tensor)
    converted = (tensor if divide == 1 else tensor.double() / divide).to(dtype).contiguous()
    if not torch.isfinite(converted).all():
        raise CheckpointError(f"tensor {name} holds values beyond {dtype}; use --precision bf16 or fp32")
    return converted.reshape(-1).view(torch.uint8).numpy()


def free_bytes(folder: Path) -> int:
    """Bytes that can still be written to a folder's file system."""
    return shutil.disk_usage(folder).free
