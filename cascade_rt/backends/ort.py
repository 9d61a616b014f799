"""ONNX Runtime: CPU, CUDA and its own TensorRT provider.

What it is told is in `ort_options`, how engines are called in `ort_session` (host memory) and `ort_cuda` (GPU).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import onnxruntime as ort

from ..errors import EngineError
from ..manifest import EngineRecord
from . import ort_session
from .base import BoundEngine, DeviceTensor, EngineOptions
from .cuda import gpu_sm
from .failures import reason_of
from .ort_cuda import CudaCalls
from .ort_options import TABLE, records_calls, session_options
from .ort_session import HostCalls, OrtTensor, Session
from .providers import PROVIDERS, install_command

TENSORRT_MAJOR = "10"
"""The TensorRT that ONNX Runtime 1.31 is linked to (libnvinfer.so.10)."""
# what computes shapes, which ONNX Runtime leaves to the CPU on purpose; ArgMax looks for a prompt's last token
_SHAPE_WORK = {
    *("Add", "ArgMax", "Cast", "Ceil", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Floor", "Gather"),
    *("Identity", "Mod", "Mul", "Range", "Reshape", "Shape", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where"),
}


def available(provider: str) -> bool:
    """Whether this installation of ONNX Runtime can use a provider of `TABLE` on this machine."""
    # what was compiled in, whether or not there is a GPU
    if TABLE[provider].ep not in ort.get_available_providers() or (TABLE[provider].device == "cuda" and not _has_gpu()):
        return False
    return provider != "ort-tensorrt" or importlib.util.find_spec("tensorrt") is not None


def _has_gpu() -> bool:
    try:
        gpu_sm()
    except EngineError:
        return False
    return True


class OrtEngine:
    """An ONNX graph in an inference session."""

    def __init__(self, record: EngineRecord, path: Path, provider: str, options: EngineOptions) -> None:
        """Load a graph.

        Args:
            record: its manifest record.
            path: the graph; its weights lie beside it.
            provider: a name of `ort_options.TABLE`.
            options: as `EngineOptions`.

        Raises:
            EngineError: the runtime cannot load it, or would run it on another provider.
        """
        self.spec = record.spec
        row = TABLE[provider]
        self._device, self._device_id = row.device, options.device_id
        if record.precision.compute not in PROVIDERS[provider].computes:
            raise EngineError(
                f"{record.name} is {record.precision.name}, which ONNX Runtime's {provider} provider does not compute: "
                f"{row.bf16}"
            )
        if row.device == "cuda":
            load_libraries(provider)
        opened = functools.partial(open_session, record, path, provider, options)
        graphs = row.graphs if records_calls(provider, self.spec) else 0
        self.calls = CudaCalls(self.spec, opened, graphs) if row.graphs else HostCalls(opened(False))

    def bind(self, constants: Mapping[str, DeviceTensor]) -> BoundEngine:
        """Fix the inputs that do not change between calls."""
        return self.calls.bind({name: self._own(name, tensor) for name, tensor in constants.items()})

    def join(self, tensors: Sequence[DeviceTensor]) -> OrtTensor:
        """Tensors one after the other along the first axis; see `Engine.join`."""
        own = [self._own("a tensor to join", tensor) for tensor in tensors]
        return ort_session.join(own, self._device, self._device_id)

    def rows(self, tensor: DeviceTensor, start: int, stop: int) -> OrtTensor:
        """Some of a tensor's rows; see `Engine.rows`."""
        return ort_session.rows(self._own("a tensor", tensor), start, stop, self._device, self._device_id)

    def _own(self, what: str, tensor: DeviceTensor) -> OrtTensor:
        if not isinstance(tensor, OrtTensor):
            raise EngineError(f"{self.spec.name}: {what} comes from another runtime than ONNX Runtime")
        return tensor

    def close(self) -> None:
        """Give back the session's memory; twice is fine."""
        self.calls.close()

    def __enter__(self) -> OrtEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_session(record: EngineRecord, path: Path, provider: str, options: EngineOptions, recording: bool) -> Session:
    """Open a session of a graph on one provider.

    Args:
        record: of the engine.
        path: the graph.
        provider: a name of `ort_options.TABLE`.
        options: as `EngineOptions`.
        recording: have calls recorded as CUDA graphs.

    Raises:
        EngineError: the runtime cannot load it, or would run it on another provider.
    """
    row = TABLE[provider]
    _keep_quiet()
    told, providers = session_options(provider, record, options, recording)
    where = f"{path.name} cannot be loaded by provider {provider}"
    try:
        # fallback: a session that cannot be made is made on the CPU otherwise, and a line printed
        made = ort.InferenceSession(path, told, providers=providers, enable_fallback=0)
    except Exception as error:  # the runtime raises its own unexported exception types
        hint = f" ({row.bf16})" if row.bf16 and record.precision.compute == "bfloat16" else ""
        raise EngineError(f"{where}: {reason_of(error)}{hint}") from error
    if row.ep not in made.get_providers():
        raise EngineError(
            f"{where}: ONNX Runtime left {row.ep} out, because the libraries that it needs do not load, and would "
            f"run on {', '.join(made.get_providers())}. Install them with: {install_command(provider)}"
        )
    if provider == "cuda" and (strays := strays_of(made)):
        warnings.warn(
            f"{record.name} is run in part by the CPU, which CUDA waits for: {', '.join(strays)}",
            RuntimeWarning,
            stacklevel=2,
        )
    return Session(spec=record.spec, runtime=made, device=row.device, device_id=options.device_id)


@functools.cache
def _keep_quiet() -> None:
    """Tell ONNX Runtime, once a process, to send no telemetry and not to log errors, which are raised."""
    ort.set_default_logger_severity(4)
    ort.disable_telemetry_events()


def strays_of(session: ort.InferenceSession) -> list[str]:
    """Types of the operators that a session runs on the CPU although they are more than work on shapes."""
    return sorted(
        {
            node.op_type
            for part in session.get_provider_graph_assignment_info()
            if part.ep_name == TABLE["cpu"].ep
            for node in part.get_nodes()
        }
        - _SHAPE_WORK
    )


@functools.cache
def load_libraries(provider: str) -> None:
    """Load CUDA's and TensorRT's libraries from where pip puts them; ONNX Runtime looks where the system has them.

    Raises:
        EngineError: TensorRT is missing, or is not the one that ONNX Runtime is linked to.
    """
    with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find; results go to standard output
        ort.preload_dlls()
    if provider != "ort-tensorrt":
        return
    try:
        version = str(importlib.import_module("tensorrt").__version__)
    except ImportError as error:
        raise EngineError(
            f"TensorRT cannot be loaded ({error}); install it with: {install_command(provider)}"
        ) from error
    if version.partition(".")[0] != TENSORRT_MAJOR:
        raise EngineError(
            f"provider {provider} needs TensorRT {TENSORRT_MAJOR}, which ONNX Runtime is linked to; {version} is "
            f"installed. Use --provider tensorrt, or in an environment of its own: {install_command(provider)}"
        )
