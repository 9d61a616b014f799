"""OpenVINO's CPU device: every x86-64 processor, with its bfloat16 units (avx512_bf16, amx_bf16) where there are any.

It is used without ONNX Runtime around it: `onnxruntime-ep-openvino` offers Intel's processors only, and does not let a
graph be changed before it is compiled (`_drop_unit_factors`). Tensors are host memory, shared, not copied.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..bundle import EngineRecord
from ..errors import EngineError
from ..stages import Precision
from .base import DeviceTensor, Host, Value, check_feeds

# OpenVINO computes in bfloat16 on CPUs that can, unless told otherwise: the precision is always named
_PRECISION_HINT: dict[Precision, str] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
_CAPABILITY: dict[Precision, str] = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16"}
_ONE_IN_BF16 = 0x3F80
_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "i64": "int64", "u8": "uint8"}


def installed() -> bool:
    """Whether the package is there; it is not imported."""
    return importlib.util.find_spec("openvino") is not None


@dataclass(frozen=True)
class OpenVinoTensor:
    """A `DeviceTensor` of OpenVINO."""

    value: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Its size."""
        return tuple(self.value.shape)

    @property
    def dtype(self) -> str:
        """Its element type."""
        return _DTYPES[self.value.element_type.get_type_name()]


class OpenVinoEngine:
    """An ONNX graph compiled by OpenVINO for the CPU."""

    def __init__(self, record: EngineRecord, path: Path, threads: int | None = None) -> None:
        """Compile a graph.

        Args:
            record: its manifest record.
            path: the graph; its weights lie beside it.
            threads: None leaves them to the runtime.

        Raises:
            EngineError: OpenVINO cannot compile it, or the processor has no such precision.
        """
        import openvino

        self.spec = record.spec
        core = openvino.Core()
        capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if _CAPABILITY[record.precision] not in capabilities:
            raise EngineError(
                f"{record.spec.name} is {record.precision}, which this processor does not compute under OpenVINO "
                f"({', '.join(capabilities)}); use --provider cpu, or export with --precision fp32"
            )
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _PRECISION_HINT[record.precision],
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        try:
            model = core.read_model(path)
            _drop_unit_factors(model)
            self._compiled: Any = core.compile_model(model, "CPU", options)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
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
        for name, tensor in constants.items():
            if not isinstance(tensor, OpenVinoTensor):
                raise EngineError(f"{self.spec.name}: {name} comes from another runtime than OpenVINO")
        return OpenVinoBound(self, constants)

    def close(self) -> None:
        """Give back its memory."""
        self._compiled = None

    def __enter__(self) -> OpenVinoEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class OpenVinoBound:
    """Constants in place."""

    def __init__(self, engine: OpenVinoEngine, constants: Mapping[str, DeviceTensor]) -> None:
        self._engine = engine
        self._constants = constants
        self._request: Any = None

    def __call__(self, feeds: Mapping[str, Host]) -> dict[str, Value]:
        """Run with the remaining inputs; see `BoundEngine`."""
        import openvino

        check_feeds(self._engine.spec, {**self._constants, **feeds})
        compiled = self._engine.compiled  # also refuses a closed engine
        if self._request is None:
            self._request = compiled.create_infer_request()
            for name, tensor in self._constants.items():
                self._request.set_tensor(name, tensor.value)  # type: ignore[attr-defined]
        for name, array in feeds.items():
            self._request.set_tensor(name, openvino.Tensor(array, shared_memory=True))
        try:
            self._request.infer()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise EngineError(f"{self._engine.spec.name} failed in OpenVINO: {reason}") from error
        outputs: dict[str, Value] = {}
        for spec in self._engine.spec.outputs:
            value = self._request.get_tensor(spec.name)
            outputs[spec.name] = np.array(value.data) if spec.on_host else OpenVinoTensor(value)
        if any(not spec.on_host for spec in self._engine.spec.outputs):
            self._request = None  # its memory is the caller's now; another call gets its own
        return outputs


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
