"""ONNX Runtime: CPU, OpenVINO (plugin) and CUDA.

On the CPU and in OpenVINO tensors are host memory and `OrtValue`s wrap them without copies. On CUDA every tensor has
a fixed device address for as long as shapes stay the same, so that a step can be replayed as a CUDA graph.
CUDA has not been measured by this project yet.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnxruntime as ort

from ..bundle import EngineRecord
from ..errors import EngineError
from ..stages import TensorSpec
from .base import DeviceTensor, Host, Value, check_feeds
from .openvino import PRECISION_HINT

OPENVINO_LIBRARY = "onnxruntime_ep_openvino"
OPENVINO_EP = "OpenVINOExecutionProvider"
CUDA_EP = "CUDAExecutionProvider"
_ORT_DTYPES = {"float": "float32", "float16": "float16", "bfloat16": "bfloat16", "int64": "int64", "uint8": "uint8"}
_ONNX_TYPE = {"float32": 1, "uint8": 2, "int64": 7, "float16": 10, "bfloat16": 16}


def available_providers() -> list[str]:
    """Names of the providers that this installation of ONNX Runtime can use."""
    found = ["cpu"]
    if _openvino_devices():
        found.append("openvino")
    if CUDA_EP in ort.get_available_providers():
        found.append("cuda")
    return found


@functools.cache
def _openvino_devices() -> tuple[Any, ...]:
    """The plugin's CPU devices; empty where it is not installed, or knows no device (it lists Intel's only)."""
    try:
        import onnxruntime_ep_openvino as plugin
    except ImportError:
        return ()
    ort.register_execution_provider_library(OPENVINO_LIBRARY, plugin.get_library_path())
    cpu = ort.OrtHardwareDeviceType.CPU
    return tuple(d for d in ort.get_ep_devices() if d.ep_name == OPENVINO_EP and d.device.type == cpu)


@dataclass(frozen=True)
class OrtTensor:
    """A `DeviceTensor` of ONNX Runtime."""

    value: ort.OrtValue

    @property
    def shape(self) -> tuple[int, ...]:
        """Its size."""
        return tuple(self.value.shape())

    @property
    def dtype(self) -> str:
        """Its element type."""
        return _ORT_DTYPES[self.value.data_type().removeprefix("tensor(").removesuffix(")")]


class OrtEngine:
    """An ONNX graph in an inference session."""

    def __init__(self, record: EngineRecord, path: Path, provider: str, threads: int | None = None) -> None:
        """Load a graph.

        Args:
            record: its manifest record.
            path: the graph; its weights lie beside it.
            provider: ``cpu``, ``openvino`` or ``cuda``.
            threads: threads within an operator; None leaves it to the runtime.

        Raises:
            EngineError: the runtime cannot load it.
        """
        self.spec = record.spec
        self._on_cuda = provider == "cuda"
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        providers: list[Any] = ["CPUExecutionProvider"]
        if provider == "openvino":
            hint = {"CPU": {"INFERENCE_PRECISION_HINT": PRECISION_HINT[record.precision]}}
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            options.add_provider_for_devices(list(_openvino_devices()), {"load_config": json.dumps(hint)})
            providers = []
        elif provider == "cuda":
            providers = [(CUDA_EP, {"enable_cuda_graph": "0", "use_tf32": "0"}), "CPUExecutionProvider"]
        elif record.precision == "bf16":
            raise EngineError(
                f"{record.spec.name} is bf16, and ONNX Runtime's CPU provider has no bf16 convolution; "
                "use --provider openvino or cuda, or export with --precision fp32"
            )
        try:
            self._session: ort.InferenceSession | None = (
                ort.InferenceSession(path, options, providers=providers)
                if providers
                else ort.InferenceSession(path, options)
            )
        except Exception as error:  # the runtime raises its own unexported exception types
            reason = str(error).strip().splitlines()[0]
            raise EngineError(f"{path.name} cannot be loaded by provider {provider}: {reason}") from error
        self._session.disable_fallback()

    def bind(self, constants: Mapping[str, DeviceTensor]) -> OrtBound:
        """Fix the inputs that do not change between calls."""
        values = {}
        for name, tensor in constants.items():
            if not isinstance(tensor, OrtTensor):
                raise EngineError(f"{self.spec.name}: {name} comes from another runtime than ONNX Runtime")
            values[name] = tensor
        return CudaBound(self, values) if self._on_cuda else OrtBound(self, values)

    @property
    def session(self) -> ort.InferenceSession:
        """The session.

        Raises:
            EngineError: the engine was closed.
        """
        if self._session is None:
            raise EngineError(f"{self.spec.name} was closed")
        return self._session

    def close(self) -> None:
        """Give back the session's memory."""
        self._session = None

    def __enter__(self) -> OrtEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class OrtBound:
    """Constants in place, in host memory."""

    def __init__(self, engine: OrtEngine, constants: Mapping[str, OrtTensor]) -> None:
        self._engine = engine
        self._constants = constants
        self._outputs = [tensor.name for tensor in engine.spec.outputs]

    def __call__(self, feeds: Mapping[str, Host]) -> dict[str, Value]:
        """Run with the remaining inputs; see `BoundEngine`."""
        check_feeds(self._engine.spec, {**self._constants, **feeds})
        return self._outputs_of(self._run(feeds))

    def _run(self, feeds: Mapping[str, Host]) -> list[ort.OrtValue]:
        values = {name: tensor.value for name, tensor in self._constants.items()}
        values |= {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        results = self._engine.session.run_with_ort_values(self._outputs, values)
        return list(results)

    def _outputs_of(self, values: list[ort.OrtValue]) -> dict[str, Value]:
        outputs: dict[str, Value] = {}
        for spec, value in zip(self._engine.spec.outputs, values, strict=True):
            outputs[spec.name] = value.numpy() if spec.on_host else OrtTensor(value)
        return outputs


class CudaBound(OrtBound):
    """Constants in place on the GPU; hot inputs and outputs keep their device addresses between calls."""

    def __init__(self, engine: OrtEngine, constants: Mapping[str, OrtTensor]) -> None:
        super().__init__(engine, constants)
        self._binding: ort.IOBinding | None = None
        self._inputs: dict[str, ort.OrtValue] = {}

    def _run(self, feeds: Mapping[str, Host]) -> list[ort.OrtValue]:
        shapes = {name: tuple(value.shape()) for name, value in self._inputs.items()}
        if self._binding is None or shapes != {name: array.shape for name, array in feeds.items()}:
            self._bind(feeds)
        binding = self._binding
        if binding is None:
            raise EngineError(f"{self._engine.spec.name} could not be bound")
        for name, array in feeds.items():
            self._inputs[name].update_inplace(array)
        self._engine.session.run_with_iobinding(binding)
        return list(binding.get_outputs())

    def _bind(self, feeds: Mapping[str, Host]) -> None:
        binding = self._engine.session.io_binding()
        for name, tensor in self._constants.items():
            binding.bind_ortvalue_input(name, tensor.value)
        self._inputs = {n: ort.OrtValue.ortvalue_from_numpy(a, "cuda", 0) for n, a in feeds.items()}
        for name, value in self._inputs.items():
            binding.bind_ortvalue_input(name, value)
        sizes = _axis_sizes(self._engine.spec.inputs, {**self._constants, **feeds})
        for spec in self._engine.spec.outputs:
            shape = [sizes.get(axis, -1) if isinstance(axis, str) else axis for axis in spec.axes]
            if -1 in shape:  # an axis that no input has (pixels of a decoder): the session allocates
                binding.bind_output(spec.name, "cuda", 0)
            else:
                value = ort.OrtValue.ortvalue_from_shape_and_type(shape, _ONNX_TYPE[spec.dtype], "cuda", 0)
                binding.bind_ortvalue_output(spec.name, value)
        self._binding = binding


def _axis_sizes(specs: tuple[TensorSpec, ...], values: Mapping[str, Value]) -> dict[str, int]:
    return {
        axis: size
        for spec in specs
        for axis, size in zip(spec.axes, np.shape(values[spec.name]), strict=True)
        if isinstance(axis, str)
    }
