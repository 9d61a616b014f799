"""The protocol that every engine runtime implements, and the checks that are the same for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError
from ..stages import EngineSpec, TensorSpec


class DeviceTensor(Protocol):
    """A tensor that lives where the engine runs, in the engine's dtype. It is passed on, never looked into."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its size."""
        ...

    @property
    def dtype(self) -> str:
        """Its element type, in `stages.DType` words."""
        ...


Host: TypeAlias = NDArray[Any]
Value: TypeAlias = "Host | DeviceTensor"


class BoundEngine(Protocol):
    """An engine whose constant inputs are in place: what is called in every step."""

    def __call__(self, feeds: Mapping[str, Host]) -> dict[str, Value]:
        """Run with the remaining inputs. Returned arrays are owned by the caller."""
        ...


class Engine(Protocol):
    """A loaded engine. Closing twice is fine; a closed engine refuses to run."""

    spec: EngineSpec

    def bind(self, constants: Mapping[str, DeviceTensor]) -> BoundEngine:
        """Fix the inputs that do not change between calls."""
        ...

    def close(self) -> None:
        """Give back its memory."""
        ...

    def __enter__(self) -> Engine: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def check_feeds(spec: EngineSpec, feeds: Mapping[str, Value]) -> None:
    """Refuse a call unless names, dtypes, ranks and sizes are exactly what the engine declares.

    Raises:
        EngineError: with the tensor, what it is and what it must be.
    """
    expected = {tensor.name: tensor for tensor in spec.inputs}
    if missing := sorted(expected.keys() - feeds.keys()):
        raise EngineError(f"{spec.name} was called without {', '.join(missing)}")
    if unknown := sorted(feeds.keys() - expected.keys()):
        raise EngineError(f"{spec.name} has no input {', '.join(unknown)}; it takes {', '.join(expected)}")
    sizes: dict[str, int] = {}
    for name, tensor in expected.items():
        _check_tensor(spec, tensor, feeds[name], sizes)


def _check_tensor(spec: EngineSpec, tensor: TensorSpec, value: Value, sizes: dict[str, int]) -> None:
    where = f"{spec.name}: {tensor.name}"
    dtype = str(value.dtype)
    if dtype != tensor.dtype:
        raise EngineError(f"{where} has dtype {dtype}; it must be {tensor.dtype}")
    if isinstance(value, np.ndarray) and not value.flags.c_contiguous:
        raise EngineError(f"{where} is not C-contiguous; pass numpy.ascontiguousarray of it")
    if len(value.shape) != len(tensor.axes):
        raise EngineError(f"{where} has shape {tuple(value.shape)}; its axes are {list(tensor.axes)}")
    for axis, size in zip(tensor.axes, value.shape, strict=True):
        if isinstance(axis, int):
            if size != axis:
                raise EngineError(f"{where} has shape {tuple(value.shape)}; its axes are {list(tensor.axes)}")
            continue
        if not spec.ranges[axis].accepts(size):
            raise EngineError(f"{where} has {axis} {size}; this engine takes {spec.ranges[axis]}")
        if sizes.setdefault(axis, size) != size:
            raise EngineError(f"{where} has {axis} {size}, another input has {sizes[axis]}")
