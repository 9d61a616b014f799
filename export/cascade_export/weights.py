"""Tensors of a checkpoint, read one at a time: nothing here holds more than one in memory."""

from __future__ import annotations

import math
import stat
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cascade_rt.errors import CheckpointError, plain, shortened
from cascade_rt.files import MIB, name_of, said_by
from cascade_rt.stored import divided_in, quantised_in, restored, scales_of

PLAIN_DTYPES = ("F32", "F16", "BF16", "F64")
SCALED_DTYPES = ("F8_E4M3", "F8_E5M2")
"""Read where the file holds a scale for the tensor, too."""

COUNTERS = ("num_batches_tracked", "position_ids")
"""Endings of names that are integers and are never read: bookkeeping of BatchNorm and of older transformers."""

IDLE = (*COUNTERS, "logit_scale", "vquantizer.embedding.weight")
"""Endings of names that no engine uses: CLIP's training has a scale, Stage A a codebook."""

MOST_HEADER_BYTES = 32 * MIB
MOST_AXES = 8
Shape = tuple[int, ...]


class TensorSource(Protocol):
    """Named tensors that are read when asked for."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Name and shape of every tensor."""
        ...

    def check_dtype(self, name: str) -> None:
        """Refuse a tensor that is no weight by its dtype.

        Raises:
            CheckpointError: its dtype is not one of `PLAIN_DTYPES`, and not fp8 with a scale.
        """
        ...

    def read(self, name: str) -> Tensor:
        """One tensor, in the floating dtype in which it is stored; fp8 is multiplied with its scale, in float32.

        Raises:
            CheckpointError: as `check_dtype`, or the file cannot be read any more.
        """
        ...


class SafetensorsSource:
    """One or more safetensors files (the shards of one model).

    Integers, booleans and complex numbers are no weights: such a tensor may lie in a file, and is refused where it is
    read. fp8 is read with a scale, as ComfyUI stores it: the weight is ``X.weight * X.scale_weight``, or
    ``X.weight * X.weight_scale``, where the scale is one number or one for every row. Without a scale fp8 is refused:
    a file that was cast without one cannot be told from a file that has lost its scales.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        """Open the files.

        Raises:
            CheckpointError: a file is missing, truncated or no safetensors, or two hold the same tensor.
        """
        self._where: dict[str, Path] = {}
        self._files: dict[Path, Any] = {}
        self._dtypes: dict[str, str] = {}
        stored: dict[str, Shape] = {}
        for path in paths:
            self._files[path] = file = _opened(path)
            for name in file.keys():  # noqa: SIM118 - a handle, not a dict
                if name in self._where:
                    other = name_of(self._where[name].name)
                    raise CheckpointError(f"{name_of(path)} and {other} both hold {quoted(name)}; they are no shards")
                tensor = file.get_slice(name)
                self._where[name], self._dtypes[name] = path, str(tensor.get_dtype())
                stored[name] = tuple(tensor.get_shape())
                if len(stored[name]) > MOST_AXES:
                    axes = len(stored[name])
                    raise CheckpointError(f"{name_of(path)}: {quoted(name)} has {axes} axes; weights have up to 4")
        self._stored = stored
        self._scales = {n: s for n, d in self._dtypes.items() if d in SCALED_DTYPES and (s := self._scale_of(n))}
        helpers = {helper for name in self._scales for helper in _helpers(name)}
        self._shapes = {n: s for n, s in stored.items() if n not in helpers and not _is_marker(n)}

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Name and shape of every tensor; scales of others are left out."""
        return self._shapes

    def check_dtype(self, name: str) -> None:
        """Refuse a tensor that is no weight by its dtype."""
        dtype = self._dtypes[name]
        if dtype in PLAIN_DTYPES or name in self._scales:
            return
        where = f"{name_of(self._where[name])}: {quoted(name)} is {dtype}"
        if dtype in SCALED_DTYPES:
            wanted = " or ".join(_scale_names(name))
            raise CheckpointError(f"{where} without a scale ({quoted(wanted)}); use the file in bf16, fp16 or fp32")
        raise CheckpointError(f"{where}; weights are {', '.join(PLAIN_DTYPES)}, or fp8 with a scale")

    def read(self, name: str) -> Tensor:
        """One tensor."""
        self.check_dtype(name)
        tensor = self.stored(name)
        return tensor if name not in self._scales else tensor.float() * self._scale(name, tensor)

    @property
    def names(self) -> set[str]:
        """Every tensor that lies there, scales of others too."""
        return set(self._stored)

    def metadata(self) -> dict[str, str]:
        """What the files say of themselves."""
        return {key: value for file in self._files.values() for key, value in (file.metadata() or {}).items()}

    def stored(self, name: str) -> Tensor:
        """One tensor as it lies there, whatever its dtype.

        Raises:
            CheckpointError: the file cannot be read any more.
        """
        path = self._where[name]
        try:
            tensor: Tensor = self._files[path].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{name_of(path)}: {quoted(name)} cannot be read: {plain(str(error))}") from error
        return tensor

    def _scale_of(self, name: str) -> str | None:
        return next((scale for scale in _scale_names(name) if scale in self._where), None)

    def _scale(self, name: str, tensor: Tensor) -> Tensor:
        """The scale of an fp8 tensor, in a shape that can be multiplied with it."""
        name_of_scale = self._scales[name]
        shape, rows = self._stored[name_of_scale], (tensor.shape[:1] if tensor.ndim else torch.Size([1]))
        if self._dtypes[name_of_scale] not in PLAIN_DTYPES or math.prod(shape) not in (1, rows[0]):
            raise CheckpointError(
                f"{name_of(self._where[name])}: {quoted(name_of_scale)} is {self._dtypes[name_of_scale]} of shape "
                f"{shape}; the scale of {quoted(name)} is one floating number, or one for each of its {rows[0]} rows"
            )
        scale = self.stored(name_of_scale).float().reshape(-1)
        if not (torch.isfinite(scale) & (scale > 0)).all():
            raise CheckpointError(
                f"{name_of(self._where[name])}: {quoted(name_of_scale)} holds a number that is not above 0"
            )
        return scale.reshape(-1, *(1,) * (tensor.ndim - 1)) if tensor.ndim else scale.reshape(())


def _opened(path: Path) -> Any:
    """A handle of the safetensors library.

    Raises:
        CheckpointError: it is no regular file, which could make the reader wait for ever, or no safetensors file.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{name_of(path)} is no regular file; put the .safetensors file itself there")
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MOST_HEADER_BYTES and header < path.stat().st_size:
            raise CheckpointError(
                f"{name_of(path)} has a header of {header} bytes; a safetensors file's has at most {MOST_HEADER_BYTES}"
            )
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:  # ValueError: a name with a zero byte
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{name_of(path)} is missing, truncated or no safetensors file ({said_by(error)}); download it again"
        ) from error


def _scale_names(name: str) -> tuple[str, ...]:
    """Names under which the scale of a tensor may lie beside it."""
    stem = name.removesuffix("weight")
    return (f"{stem}scale_weight", f"{name}_scale")


def _helpers(name: str) -> tuple[str, ...]:
    """Tensors beside an fp8 tensor that belong to it; scales of its input are for arithmetic in fp8."""
    stem = name.removesuffix("weight")
    return (*_scale_names(name), f"{stem}scale_input", f"{stem}input_scale", f"{stem}comfy_quant")


def _is_marker(name: str) -> bool:
    """Whether a tensor only says that the file holds fp8 with scales."""
    return name == "scaled_fp8" or name.endswith(".scaled_fp8")


def quoted(name: str) -> str:
    """The name of a tensor as a message may quote it."""
    return shortened(plain(name), 120)


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
        """Rename.

        Raises:
            CheckpointError: a tensor cannot be cut into equal parts.
        """
        self._base = base
        self._origins = origins
        self._shapes = {name: self._shape(origin) for name, origin in origins.items()}

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Name and shape of every tensor."""
        return self._shapes

    def _shape(self, origin: Origin) -> Shape:
        shape = self._base.shapes[origin.key]
        if origin.part is not None:
            count = origin.part[1]
            if not shape or shape[0] % count:
                raise CheckpointError(f"{quoted(origin.key)} of shape {shape} does not have {count} equal parts")
            shape = (shape[0] // count, *shape[1:])
        return shape[::-1] if origin.transpose else shape

    def check_dtype(self, name: str) -> None:
        """Refuse a tensor that is no weight by its dtype."""
        self._base.check_dtype(self._origins[name].key)

    def read(self, name: str) -> Tensor:
        """One tensor."""
        origin = self._origins[name]
        tensor = self._base.read(origin.key)
        if origin.part is not None:
            index, count = origin.part
            tensor = tensor.chunk(count)[index]
        return tensor.T if origin.transpose else tensor


class StoredSource:
    """Tensors of a bundle's weights file, as the checkpoint had them: see `cascade_rt.stored`."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            CheckpointError: it is damaged.
        """
        self._base = SafetensorsSource([path])
        metadata, where = self._base.metadata(), name_of(path)
        self._divided, self.quantised = divided_in(metadata, where), quantised_in(metadata, where)
        scales = {scales_of(name) for name in self.quantised}
        if missing := (self.quantised.keys() | scales) - self._base.names:
            raise CheckpointError(f"{where} says that it holds {quoted(min(missing))}, and does not; it is damaged")
        whole = {name: shape for name, shape in self._base.shapes.items() if name not in scales}
        self._shapes = whole | self.quantised

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Name and shape of every tensor."""
        return self._shapes

    def check_dtype(self, name: str) -> None:
        """Refuse a tensor that is no weight by its dtype."""
        if name not in self.quantised:
            self._base.check_dtype(name)

    def read(self, name: str) -> Tensor:
        """One tensor; float32 where it was divided or is in 8 bits."""
        if name in self.quantised:
            values, scales = self._base.stored(name), self._base.read(scales_of(name))
            if values.dtype not in (torch.int8, torch.float8_e4m3fn) or values.shape[1:] != scales.shape:
                raise CheckpointError(f"{quoted(name)} is not stored in 8 bits with a scale for each row; make it anew")
            bits = values if values.dtype == torch.int8 else values.view(torch.uint8)
            return torch.from_numpy(restored(bits.numpy(), scales.float().numpy(), self.quantised[name]))
        tensor = self._base.read(name)
        return tensor.float() * self._divided[name] if name in self._divided else tensor


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

    def check_dtype(self, name: str) -> None:
        """Accept every tensor: they are made as float32."""

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

    Args:
        component: its name, for messages.
        wanted: name and shape of every tensor of the architecture.
        source: the checkpoint's tensors under our names.

    Raises:
        CheckpointError: the first tensors that are missing, unknown, of another shape, or of a dtype that is no
            weight's.
    """
    found = source.shapes

    def names(keys: set[str]) -> str:
        some = sorted(k for k in keys if not k.endswith(IDLE))
        return ", ".join(map(quoted, some[:3])) + (f" and {len(some) - 3} more" if len(some) > 3 else "")

    if missing := names(wanted.keys() - found.keys()):
        raise CheckpointError(f"the checkpoint's {component} lacks {missing}; it is of another architecture or cut")
    if unknown := names(found.keys() - wanted.keys()):
        raise CheckpointError(f"the checkpoint's {component} has unknown tensors {unknown}; is it another model?")
    for name, shape in wanted.items():
        if name not in found:
            continue
        if tuple(found[name]) != tuple(shape):
            raise CheckpointError(
                f"the checkpoint's {component} has {name} of shape {tuple(found[name])}; its config says {tuple(shape)}"
            )
        if not name.endswith(COUNTERS):
            source.check_dtype(name)
