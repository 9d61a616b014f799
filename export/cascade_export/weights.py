"""Tensors of a checkpoint, read one at a time, and their way into a bundle's safetensors.

Nothing here holds more than one tensor in memory, so a 14 GB checkpoint is exported on a laptop.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cascade_rt.errors import CheckpointError, OutputError

_SAFETENSORS_DTYPE = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
Shape = tuple[int, ...]


class TensorSource(Protocol):
    """Named tensors that are read when asked for."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Name and shape of every tensor."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, in the dtype in which it is stored."""
        ...


class SafetensorsSource:
    """One or more safetensors files (the shards of one model)."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """Open the files.

        Raises:
            CheckpointError: a file is missing, truncated or no safetensors.
        """
        self._where: dict[str, Path] = {}
        self._files: dict[Path, Any] = {}
        self._shapes: dict[str, Shape] = {}
        for path in paths:
            try:
                self._files[path] = file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} is missing, truncated or no safetensors file ({error}); download it again"
                ) from error
            for name in file.keys():  # noqa: SIM118 - a handle, not a dict
                self._where[name] = path
                self._shapes[name] = tuple(file.get_slice(name).get_shape())

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Name and shape of every tensor."""
        return self._shapes

    def read(self, name: str) -> Tensor:
        """One tensor."""
        tensor: Tensor = self._files[self._where[name]].get_tensor(name)
        return tensor


@dataclass(frozen=True)
class Origin:
    """Where a tensor of ours comes from in a checkpoint of other names.

    Attributes:
        key: name there.
        part: (index, count) of equal parts along axis 0, for the fused in_proj of the original attention.
        transpose: stored transposed.
    """

    key: str
    part: tuple[int, int] | None = None
    transpose: bool = False


class RenamedSource:
    """Another source under our names."""

    def __init__(self, base: TensorSource, origins: Mapping[str, Origin]) -> None:
        self._base = base
        self._origins = origins

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Name and shape of every tensor."""
        return {name: self._shape(origin) for name, origin in self._origins.items()}

    def _shape(self, origin: Origin) -> Shape:
        shape = self._base.shapes[origin.key]
        if origin.part is not None:
            shape = (shape[0] // origin.part[1], *shape[1:])
        return shape[::-1] if origin.transpose else shape

    def read(self, name: str) -> Tensor:
        """One tensor."""
        origin = self._origins[name]
        tensor = self._base.read(origin.key)
        if origin.part is not None:
            index, count = origin.part
            tensor = tensor.chunk(count)[index]
        return tensor.T if origin.transpose else tensor


class RandomSource:
    """Seeded weights of given shapes, with activations of about unit size, made when they are read.

    Each tensor has a generator of its own (seed and name), so the values do not depend on the order of reading.
    """

    def __init__(self, shapes: Mapping[str, Shape], seed: int) -> None:
        self._shapes = shapes
        self._seed = seed

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Name and shape of every tensor."""
        return self._shapes

    def read(self, name: str) -> Tensor:
        """One tensor, float32."""
        shape = self._shapes[name]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ self._seed)
        if name.endswith("num_batches_tracked"):
            return torch.zeros(shape, dtype=torch.int64)
        if name.endswith(("running_var", "norm.weight", "norm1.weight", "norm2.weight", "layrnorm.weight")):
            return torch.ones(shape)
        normal = torch.empty(shape).normal_(generator=generator)
        if name.endswith(("gamma", "gammas", "beta")):
            return normal.mul_(0.1)
        if len(shape) < 2 or "embed" in name:
            return normal.mul_(0.02)
        return normal.mul_(1 / math.sqrt(math.prod(shape[1:])))


def check_architecture(component: str, wanted: Mapping[str, Shape], source: TensorSource) -> None:
    """Refuse a checkpoint whose tensors are not those of the architecture.

    Raises:
        CheckpointError: the first tensors that are missing, unknown or of another shape.
    """
    found = source.shapes
    # bookkeeping of BatchNorm and of older transformers, and Stage A's codebook: no engine uses them
    idle = ("num_batches_tracked", "position_ids", "logit_scale", "vquantizer.embedding.weight")

    def names(keys: set[str]) -> str:
        some = sorted(k for k in keys if not k.endswith(idle))
        return ", ".join(some[:3]) + (f" and {len(some) - 3} more" if len(some) > 3 else "")

    if missing := names(wanted.keys() - found.keys()):
        raise CheckpointError(f"the checkpoint's {component} lacks {missing}; it is of another architecture or cut")
    if unknown := names(found.keys() - wanted.keys()):
        raise CheckpointError(f"the checkpoint's {component} has unknown tensors {unknown}; is it another model?")
    for name, shape in wanted.items():
        if name in found and tuple(found[name]) != tuple(shape):
            raise CheckpointError(
                f"the checkpoint's {component} has {name} of shape {tuple(found[name])}; its config says {tuple(shape)}"
            )


def write_safetensors(
    path: Path,
    names: Iterable[str],
    source: TensorSource,
    dtype: torch.dtype,
    on_tensor: Callable[[int], None] = lambda size: None,
) -> dict[str, tuple[int, int]]:
    """Stream tensors into a safetensors file, converting floating ones to ``dtype``.

    Tensors stand largest first: all sizes but the last few are then multiples of 64 bytes, and engines can map them
    where they lie.

    Args:
        path: file to write.
        names: tensors to take.
        source: where they come from.
        dtype: of floating tensors in the file.
        on_tensor: called with the bytes of each tensor that has been written.

    Returns:
        Byte offset and length of every tensor in the file.

    Raises:
        CheckpointError: a tensor holds NaN or infinity, also after conversion.
        OutputError: the file cannot be written, for example because the disk is full.
    """
    size = torch.empty(0, dtype=dtype).element_size()
    order = sorted(names, key=lambda n: (-math.prod(source.shapes[n]), n))
    header: dict[str, Any] = {}
    end = 0
    for name in order:
        start, end = end, end + math.prod(source.shapes[name]) * size
        header[name] = {
            "dtype": _SAFETENSORS_DTYPE[dtype],
            "shape": list(source.shapes[name]),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    base = 8 + len(text)
    places = {n: (base + r["data_offsets"][0], r["data_offsets"][1] - r["data_offsets"][0]) for n, r in header.items()}
    try:
        if (free := _free_bytes(path.parent)) < base + end:
            raise OutputError(f"{path.parent} has {free >> 20} MiB free; {path.name} needs {(base + end) >> 20} MiB")
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little"))
            file.write(text)
            for name in order:
                file.write(memoryview(_bytes_of(name, source.read(name), dtype)))
                on_tensor(places[name][1])
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    return places


def _bytes_of(name: str, tensor: Tensor, dtype: torch.dtype) -> Any:
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"tensor {name} of the checkpoint holds NaN or infinity; it is damaged")
    converted = tensor.to(dtype).contiguous()
    if not torch.isfinite(converted).all():
        raise CheckpointError(f"tensor {name} holds values beyond {dtype}; use --precision bf16 or fp32")
    return (
        converted.view(torch.uint8).numpy().reshape(-1)
        if converted.ndim
        else converted.reshape(1).view(torch.uint8).numpy()
    )


def _free_bytes(folder: Path) -> int:
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize
