"""Tensors of a checkpoint, streamed into a bundle's safetensors file and hashed on the way.

Not more than one tensor is in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade_rt.errors import CheckpointError, OutputError
from cascade_rt.files import name_of
from cascade_rt.manifest import FileRecord

from .weights import TensorSource

DIVIDED = "divided"
"""Key of the file's metadata: JSON, tensor name -> the power of two that it is stored divided by."""
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


def write_weights(
    path: Path,
    names: Iterable[str],
    source: TensorSource,
    dtype: torch.dtype,
    divided: Mapping[str, float] | None = None,
    progress: Callable[[int], Any] = lambda size: None,
) -> Written:
    """Stream tensors into a safetensors file.

    Tensors stand largest first: all sizes but the last few are then multiples of 64 bytes, and engines can map them
    where they lie.

    Args:
        path: file to write.
        names: tensors to take.
        source: where they come from.
        dtype: of the tensors in the file.
        divided: powers of two that tensors are divided by before they are converted, which loses nothing.
        progress: told of the bytes of each tensor that has been written.

    Raises:
        CheckpointError: a tensor holds NaN or infinity, also after conversion.
        OutputError: there is not enough room.
    """
    divided = divided or {}
    order = sorted(names, key=lambda name: (-math.prod(source.shapes[name]), name))
    header, places = _header(order, source, dtype, divided)
    needed = len(header) + sum(length for _, length in places.values())
    if (free := free_bytes(path.parent)) < needed:
        raise OutputError(
            f"{name_of(path.parent)} has {free >> 20} MiB free; {path.name} needs {needed >> 20} MiB: make room there, "
            "or choose another --out"
        )
    digest = hashlib.sha256(header)
    with path.open("wb") as file:
        file.write(header)
        for name in order:
            content = memoryview(_bytes_of(name, source.read(name), dtype, divided.get(name, 1.0)))
            digest.update(content)
            file.write(content)
            progress(len(content))
    return Written(places, FileRecord(sha256=digest.hexdigest(), bytes=needed))


def _header(
    order: list[str], source: TensorSource, dtype: torch.dtype, divided: Mapping[str, float]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The beginning of the file, and where every tensor will be in it."""
    rows: dict[str, Any] = {"__metadata__": {DIVIDED: json.dumps(divided, sort_keys=True)}} if divided else {}
    offsets, end = {}, 0
    for name in order:
        start, end = end, end + math.prod(source.shapes[name]) * dtype.itemsize
        offsets[name] = (start, end - start)
        rows[name] = {"dtype": _NAMES[dtype], "shape": list(source.shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(rows, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    base = 8 + len(text)
    places = {name: (base + start, length) for name, (start, length) in offsets.items()}
    return len(text).to_bytes(8, "little") + text, places


def _bytes_of(name: str, tensor: Tensor, dtype: torch.dtype, divide: float) -> Any:
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"tensor {name} of the checkpoint holds NaN or infinity; it is damaged")
    converted = (tensor if divide == 1 else tensor.double() / divide).to(dtype).contiguous()
    if not torch.isfinite(converted).all():
        raise CheckpointError(f"tensor {name} holds values beyond {dtype}; use --precision bf16 or fp32")
    return converted.reshape(-1).view(torch.uint8).numpy()


def free_bytes(folder: Path) -> int:
    """Bytes that can still be written to a folder's file system."""
    return shutil.disk_usage(folder).free
