"""OpenVINO's CPU device: every x86-64 processor, with its bfloat16 units (avx512_bf16, amx_bf16) where there are any.

It is used without ONNX Runtime around it: `onnxruntime-ep-openvino` offers Intel's processors only, and does not let a
graph be changed before it is compiled (`_drop_unit_factors`). Tensors are host memory, shared, not copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import openvino

from ..errors import EngineError, plain, shortened
from ..manifest import EngineRecord
from ..stages import DType, Precision
from .base import DeviceTensor, EngineOptions, Host, Value, check_feeds, check_outputs
from .failures import reason_of
from .providers import OPENVINO_INT8_GROUP
from .rows import joined_shape, rows_shape

# OpenVINO computes in bfloat16 on CPUs that can, unless told otherwise: the precision is always named
_PRECISION_HINT: dict[DType, str] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_CAPABILITY: dict[DType, str] = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}
_ONE_IN_BF16 = 0x3F80
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i64": "int64", "u8": "uint8"}


def processor_computes() -> tuple[DType, ...]:
    """Compute dtypes that OpenVINO has on this processor."""
    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return tuple(dtype for dtype, word in _CAPABILITY.items() if word in capabilities)


@dataclass(frozen=True)
class OpenVinoTensor:
    """A `DeviceTensor` of OpenVINO."""

    value: Any

    @cached_property  # asked for in every call
    def shape(self) -> tuple[int, ...]:
        """Its size."""
        return tuple(self.value.shape)

    @cached_property
    def dtype(self) -> str:
        """Its element type; in OpenVINO's words where no engine of ours has it."""
        word = str(self.value.element_type.get_type_name())
        return _DTYPES.get(word, word)


class OpenVinoEngine:
    """An ONNX graph compiled by OpenVINO for the CPU."""

    def __init__(self, record: EngineRecord, path: Path, options: EngineOptions) -> None:
        """Compile a graph.

        Args:
            record: its manifest record.
            path: the graph; its weights lie beside it.
            options: as `EngineOptions`.

        Raises:
            EngineError: OpenVINO cannot compile it, has no such option, or the processor has no such precision.
        """
        self.spec = record.spec
        core = openvino.Core()
        computed = processor_computes()
        if record.precision.compute not in computed:
            raise EngineError(
                f"{record.name} is {record.precision.name}, which this processor does not compute under OpenVINO "
                f"({', '.join(computed)}); use --provider cpu, or export with --precision fp32"
            )
        told = {
            **_arithmetic(record.precision, computed),
            "NUM_STREAMS": "1",
            "PERFORMANCE_HINT": "LATENCY",
            **({} if options.threads is None else {"INFERENCE_NUM_THREADS": str(options.threads)}),
            **options.provider_options,
        }
        known = [name for name, how in core.get_property("CPU", "SUPPORTED_PROPERTIES").items() if how == "RW"]
        if unknown := [name for name in options.provider_options if name not in known]:
            raise EngineError(
                f"provider openvino has no option {shortened(plain(unknown[0]))}; accepted: {', '.join(known)}"
            )
        try:
            model = core.read_model(path)
            _drop_unit_factors(model)
            self._compiled: Any = core.compile_model(model, "CPU", told)
        except (RuntimeError, MemoryError, TypeError, ValueError) as error:
            reason = reason_of(error, last_line=True)
            raise EngineError(f"{path.name} cannot be compiled by OpenVINO: {reason}") from error

    @property
    def compiled(self) -> Any:
        """The compiled model.

        Raises:
            EngineError: the engine was closed.
        """
        if self._compiled is None:
            raise EngineError(f"{self.spec.name} was closed")
        return self._compiled

    def bind(self, constants: Mapping[str, DeviceTensor]) -> OpenVinoBound:
        """Fix the inputs that do not change between calls."""
        return OpenVinoBound(self, {name: self._own(name, tensor) for name, tensor in constants.items()})

    def join(self, tensors: Sequence[DeviceTensor]) -> OpenVinoTensor:
        """Tensors one after the other along the first axis; see `Engine.join`."""
        shape = joined_shape(tensors)
        own = [self._own("a tensor to join", tensor).value for tensor in tensors]
        made = openvino.Tensor(own[0].element_type, list(shape))
        np.concatenate([_bits(value) for value in own], out=_bits(made))
        return OpenVinoTensor(made)

    def rows(self, tensor: DeviceTensor, start: int, stop: int) -> OpenVinoTensor:
        """Some of a tensor's rows; see `Engine.rows`."""
        shape = rows_shape(tensor, start, stop)
        value = self._own("a tensor", tensor).value
        made = openvino.Tensor(value.element_type, list(shape))
        _bits(made)[:] = _bits(value)[start:stop]
        return OpenVinoTensor(made)

    def _own(self, what: str, tensor: DeviceTensor) -> OpenVinoTensor:
        if not isinstance(tensor, OpenVinoTensor):
            raise EngineError(f"{self.spec.name}: {what} comes from another runtime than OpenVINO")
        return tensor

    def close(self) -> None:
        """Give back its memory; twice is fine."""
        self._compiled = None

    def __enter__(self) -> OpenVinoEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class OpenVinoBound:
    """Constants in place."""

    def __init__(self, engine: OpenVinoEngine, constants: Mapping[str, OpenVinoTensor]) -> None:
        self._engine = engine
        self._constants = constants
        self._request: Any = None

    def __call__(self, feeds: Mapping[str, Host]) -> dict[str, Value]:
        """Run with the remaining inputs; see `BoundEngine`."""
        spec = self._engine.spec
        compiled = self._engine.compiled  # also refuses a closed engine
        sizes = check_feeds(spec, {**self._constants, **feeds})
        try:
            if self._request is None:
                self._request = compiled.create_infer_request()
                for name, constant in self._constants.items():
                    self._request.set_tensor(name, constant.value)
            for name, array in feeds.items():
                self._request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
            self._request.infer()
        except (RuntimeError, MemoryError) as error:
            self._request = None
            raise EngineError(f"{spec.name} failed in OpenVINO: {reason_of(error, last_line=True)}") from error
        outputs: dict[str, Value] = {}
        for tensor in spec.outputs:
            value = self._request.get_tensor(tensor.name)
            outputs[tensor.name] = np.array(value.data) if tensor.on_host else OpenVinoTensor(value)
        if any(not tensor.on_host for tensor in spec.outputs):
            self._request = None  # its memory is the caller's now; another call gets its own
        check_outputs(spec, sizes, outputs)
        return outputs


def _arithmetic(precision: Precision, computed: Sequence[DType]) -> dict[str, str]:
    """What OpenVINO is told of the arithmetic of a precision.

    Where a graph does not quantise inputs itself, int8 weights are multiplied as int8 only where inputs are quantised
    by groups: with its own group size of 32 half of the gain is lost, and without groups the weights are widened first,
    which is slower than bf16.
    """
    if precision.linear == "plain":
        return {"INFERENCE_PRECISION_HINT": _PRECISION_HINT[precision.compute]}
    if precision.linear == "w8":  # its own groups would quantise inputs
        return {"INFERENCE_PRECISION_HINT": _PRECISION_HINT[precision.compute], "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    rest: DType = "bfloat16" if "bfloat16" in computed else precision.compute
    groups = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": OPENVINO_INT8_GROUP} if precision.linear == "int8" else {}
    return {"INFERENCE_PRECISION_HINT": _PRECISION_HINT[rest], **groups}


def _bits(tensor: Any) -> Host:
    """A tensor's memory as integers: NumPy has no bfloat16, and a copy of integers changes no bit."""
    data: Host = tensor.data
    return data.view(f"uint{8 * data.itemsize}")


def _drop_unit_factors(model: Any) -> None:
    """Take products with the constant 1 out of a graph that was read.

    OpenVINO reads ``Gemm`` as ``alpha * (A @ B) + beta * C``, also where both are 1, and folds alpha into ``B`` when it
    compiles: every weight is then a product of its own in memory instead of a page of the file.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Multiply":
            continue
        for factor, other in ((1, 0), (0, 1)):
            constant = node.input_value(factor).get_node()
            if constant.get_type_name() == "Constant" and not constant.get_output_shape(0) and _is_one(constant):
                if node.input_value(other).get_node().get_type_name() != "Parameter":  # it has a name to keep
                    node.output(0).replace(node.input_value(other))
                break


def _is_one(constant: Any) -> bool:
    dtype = constant.get_element_type().get_type_name()
    if dtype == "bf16":  # NumPy has no such type; OpenVINO shows its bits
        return bool(constant.data.view(np.uint16) == _ONE_IN_BF16)
    return bool(constant.data == 1)
