"""The protocol that every engine runtime implements, and the checks that are the same for all of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError
from ..stages import EngineSpec, TensorSpec, axis_of


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


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine is opened.

    Attributes:
        threads: within an operator, providers of the CPU; None leaves it to the provider.
        device_id: which GPU.
        provider_options: settings of the provider in its own words, which override ours.
        digest: of the engine's files: names what a provider keeps on disk between runs.
    """

    threads: int | None = None
    device_id: int = 0
    provider_options: Mapping[str, str] = field(default_factory=dict)
    digest: str = ""


class StaleEngineError(EngineError):
    """A TensorRT engine file was built by another version, or for other GPUs; it must be built again."""


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

    def join(self, tensors: Sequence[DeviceTensor]) -> DeviceTensor:
        """Tensors one after the other along the first axis: the rows of several requests, or of several schedules.

        Raises:
            EngineError: their other sizes or dtypes differ, or the provider cannot do this.
        """
        ...

    def rows(self, tensor: DeviceTensor, start: int, stop: int) -> DeviceTensor:
        """Some of a tensor's rows.

        Raises:
            EngineError: the provider cannot do this.
        """
        ...

    def close(self) -> None:
        """Give back its memory."""
        ...

    def __enter__(self) -> Engine: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def check_feeds(spec: EngineSpec, feeds: Mapping[str, Value]) -> dict[str, int]:
    """Refuse a call unless names, dtypes, ranks and sizes are exactly what the engine declares.

    Returns:
        The size of every named axis, from which the shapes of the outputs follow.

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
        _check_input(spec, tensor, feeds[name], sizes)
    for name, tensor in expected.items():
        if _has_sums(tensor.axes):  # the other inputs have told their names by now
            _check_shape(spec, tensor, tuple(feeds[name].shape), sizes)
    return sizes


@functools.lru_cache(maxsize=4096)
def _has_sums(axes: tuple[int | str, ...]) -> bool:
    """Whether an axis is a formula of several names, which its size alone does not give."""
    return any(len(axis_of(axis).terms) != 1 for axis in axes if isinstance(axis, str))


def check_outputs(spec: EngineSpec, sizes: Mapping[str, int], outputs: Mapping[str, Value]) -> None:
    """Refuse what an engine returned unless dtypes and shapes are what its formulas give for the inputs.

    Args:
        spec: of the engine.
        sizes: from `check_feeds`.
        outputs: by name.

    Raises:
        EngineError: with the tensor, what it is and what it must be.
    """
    for tensor in spec.outputs:
        value = outputs[tensor.name]
        if str(value.dtype) != tensor.dtype:
            raise EngineError(f"{spec.name} returned {tensor.name} as {value.dtype}; it must be {tensor.dtype}")
        _check_shape(spec, tensor, tuple(value.shape), sizes)


def output_shapes(spec: EngineSpec, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shape of every output, from the sizes that `check_feeds` found in the inputs.

    Raises:
        EngineError: an axis would not be a whole number.
    """
    return {tensor.name: _shape_of(spec, tensor, sizes) for tensor in spec.outputs}


def _shape_of(spec: EngineSpec, tensor: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    try:
        return tensor.shape(sizes)
    except ValueError as error:
        raise EngineError(
            f"{spec.name}: {tensor.name} has no shape for these inputs; its axes are {list(tensor.axes)}: {error}"
        ) from None


def _check_input(spec: EngineSpec, tensor: TensorSpec, value: Value, sizes: dict[str, int]) -> None:
    where = f"{spec.name}: {tensor.name}"
    if (dtype := str(value.dtype)) != tensor.dtype:
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
        formula = axis_of(axis)
        if len(formula.terms) != 1:
            continue
        (name,) = formula.names
        found = formula.solve(size)
        if found is None or not spec.ranges[name].accepts(found):
            of = "" if axis == name else f", where {axis} is {size}"
            raise EngineError(f"{where} has {name} {found}{of}; this engine takes {spec.ranges[name]}")
        if sizes.setdefault(name, found) != found:
            raise EngineError(f"{where} has {name} {found}, another input has {sizes[name]}")


def _check_shape(spec: EngineSpec, tensor: TensorSpec, shape: tuple[int, ...], sizes: Mapping[str, int]) -> None:
    wanted = _shape_of(spec, tensor, sizes)
    if shape != wanted:
        raise EngineError(
            f"{spec.name}: {tensor.name} has shape {shape}; its axes are {list(tensor.axes)}, which is {wanted} here"
        )
