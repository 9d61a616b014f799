"""An inference session of ONNX Runtime as a value, its tensors, and calls with tensors in host memory."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import onnxruntime as ort

from ..errors import EngineError
from ..stages import EngineSpec
from .base import Host, Value, check_feeds, check_outputs
from .cuda import copy_within_gpu
from .failures import reason_of
from .rows import joined_shape, rows_shape

_DTYPES = {"float": "float32", "float16": "float16", "bfloat16": "bfloat16", "int64": "int64", "uint8": "uint8"}
_ONNX_TYPE = {"float32": 1, "uint8": 2, "int64": 7, "float16": 10, "bfloat16": 16}


@dataclass(frozen=True)
class OrtTensor:
    """A `DeviceTensor` of ONNX Runtime."""

    value: ort.OrtValue

    @cached_property  # asked for in every call
    def shape(self) -> tuple[int, ...]:
        """Its size."""
        return tuple(self.value.shape())

    @cached_property
    def dtype(self) -> str:
        """Its element type; in ONNX Runtime's words where no engine of ours has it."""
        word = str(self.value.data_type()).removeprefix("tensor(").removesuffix(")")
        return _DTYPES.get(word, word)


@dataclass(frozen=True, kw_only=True)
class Session:
    """An open session of one engine.

    Attributes:
        spec: of the engine.
        runtime: ONNX Runtime's session.
        device: where its tensors lie: ``cpu`` or ``cuda``.
        device_id: which GPU.
    """

    spec: EngineSpec
    runtime: ort.InferenceSession
    device: str
    device_id: int = 0

    def empty(self, name: str, shape: Sequence[int]) -> ort.OrtValue:
        """Memory for an input or output, where the session runs.

        Raises:
            EngineError: there is not enough.
        """
        dtype = self.spec.tensor(name).dtype
        return empty(f"{self.spec.name}: {name}", dtype, shape, self.device, self.device_id)

    def run(self, binding: ort.IOBinding, options: ort.RunOptions | None = None) -> None:
        """Run with bound inputs and outputs, and wait.

        Raises:
            EngineError: it failed.
        """
        try:
            self.runtime.run_with_iobinding(binding, options)
        except Exception as error:  # the runtime raises its own unexported exception types
            raise EngineError(f"{self.spec.name} failed in ONNX Runtime: {reason_of(error)}") from error

    def results(self, values: Sequence[ort.OrtValue], sizes: Mapping[str, int]) -> dict[str, Value]:
        """Outputs in call order -> what a caller gets: arrays of its own, or tensors that stay where they are.

        Args:
            values: of every output of the engine.
            sizes: of the inputs; see `check_outputs`.

        Raises:
            EngineError: an output is not what the engine's formulas give.
        """
        outputs: dict[str, Value] = {}
        for tensor, value in zip(self.spec.outputs, values, strict=True):
            outputs[tensor.name] = value.numpy() if tensor.on_host else OrtTensor(value)
        check_outputs(self.spec, sizes, outputs)
        return outputs


class HostCalls:
    """A session whose tensors are host memory: `ort.OrtValue` wraps them without copies."""

    def __init__(self, session: Session) -> None:
        self._session: Session | None = session
        self._name = session.spec.name

    @property
    def session(self) -> Session:
        """The session.

        Raises:
            EngineError: the engine was closed.
        """
        if self._session is None:
            raise EngineError(f"{self._name} was closed")
        return self._session

    def bind(self, constants: Mapping[str, OrtTensor]) -> HostBound:
        """Fix the inputs that do not change between calls."""
        return HostBound(self, constants)

    def close(self) -> None:
        """Give back the session's memory; twice is fine."""
        self._session = None


class HostBound:
    """Constants in place, in host memory."""

    def __init__(self, calls: HostCalls, constants: Mapping[str, OrtTensor]) -> None:
        self._calls = calls
        self._constants = constants
        self._values = {name: tensor.value for name, tensor in constants.items()}

    def __call__(self, feeds: Mapping[str, Host]) -> dict[str, Value]:
        """Run with the remaining inputs; see `BoundEngine`."""
        session = self._calls.session
        spec = session.spec
        sizes = check_feeds(spec, {**self._constants, **feeds})
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        names = [tensor.name for tensor in spec.outputs]
        try:
            made = session.runtime.run_with_ort_values(names, {**self._values, **values})
        except Exception as error:  # the runtime raises its own unexported exception types
            raise EngineError(f"{spec.name} failed in ONNX Runtime: {reason_of(error)}") from error
        return session.results(list(made), sizes)


def empty(what: str, dtype: str, shape: Sequence[int], device: str, device_id: int) -> ort.OrtValue:
    """Memory for a tensor.

    Args:
        what: it is for, for the message.
        dtype: in `stages.DType` words.
        shape: its size.
        device: ``cpu`` or ``cuda``.
        device_id: which GPU.

    Raises:
        EngineError: there is not enough.
    """
    try:
        return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), _ONNX_TYPE[dtype], device, device_id)
    except Exception as error:  # the runtime raises its own unexported exception types
        raise EngineError(f"{what} {list(shape)} has no memory: {reason_of(error)}") from error


def join(tensors: Sequence[OrtTensor], device: str, device_id: int) -> OrtTensor:
    """Tensors one after the other along the first axis; see `Engine.join`."""
    made = empty("a joined tensor", tensors[0].dtype if tensors else "", joined_shape(tensors), device, device_id)
    address = made.data_ptr()
    for tensor in tensors:
        size = tensor.value.tensor_size_in_bytes()
        _copy_bytes(address, tensor.value.data_ptr(), size, device, device_id)
        address += size
    return OrtTensor(made)


def rows(tensor: OrtTensor, start: int, stop: int, device: str, device_id: int) -> OrtTensor:
    """Some of a tensor's rows; see `Engine.rows`."""
    made = empty("some rows of a tensor", tensor.dtype, rows_shape(tensor, start, stop), device, device_id)
    size = tensor.value.tensor_size_in_bytes() // tensor.shape[0]
    source = tensor.value.data_ptr() + start * size
    _copy_bytes(made.data_ptr(), source, (stop - start) * size, device, device_id)
    return OrtTensor(made)


def _copy_bytes(target: int, source: int, size: int, device: str, device_id: int) -> None:
    """Copy between addresses of one device: `ort.OrtValue` copies whole tensors only, and NumPy has no bfloat16."""
    if device == "cpu":
        ctypes.memmove(target, source, size)
    else:
        copy_within_gpu(target, source, size, device_id)
