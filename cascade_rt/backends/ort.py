"""ONNX Runtime: CPU, CUDA and its own TensorRT provider. What it is told is in `ort_options`.

On the CPU tensors are host memory and `OrtValue`s wrap them without copies. How engines are called on a GPU is in
`ort_cuda`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import onnxruntime as ort

from ..bundle import EngineRecord
from ..errors import EngineError
from .base import DeviceTensor, Host, Value, check_feeds
from .cuda import gpu_sm
from .ort_cuda import CudaBound, Recorder, first_line
from .ort_options import TABLE, records_calls, session

TENSORRT_MAJOR = "10"
"""The TensorRT that ONNX Runtime 1.31 is linked to (libnvinfer.so.10)."""
_ORT_DTYPES = {"float": "float32", "float16": "float16", "bfloat16": "bfloat16", "int64": "int64", "uint8": "uint8"}
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

    def __init__(
        self, record: EngineRecord, path: Path, provider: str, threads: int | None = None, digest: str = ""
    ) -> None:
        """Load a graph.

        Args:
            record: its manifest record.
            path: the graph; its weights lie beside it.
            provider: a name of `ort_options.TABLE`.
            threads: threads within an operator; None leaves it to the runtime.
            digest: of the graph and its weights; see `ort_options.session`.

        Raises:
            EngineError: the runtime cannot load it, or would run it on another provider.
        """
        self.spec = record.spec
        self.device = TABLE[provider].device
        if record.precision not in TABLE[provider].precisions:
            raise EngineError(
                f"{record.spec.name} is {record.precision}, which ONNX Runtime's {provider} provider does not compute: "
                f"{TABLE[provider].bf16}"
            )
        self._record, self._path, self._provider = record, path, provider
        self._threads, self._digest = threads, digest
        self.recorder: Recorder | None = None
        self._session: ort.InferenceSession | None = None
        if self.device == "cuda":
            load_libraries(provider)
        if records_calls(provider, record.spec):
            reason = ""
            try:
                self._session = self._open(recording=True)
                self.recorder = Recorder(self, TABLE[provider].graphs)
            except EngineError as error:
                reason = str(error)
            if reason:  # out of the handler: the error's traceback keeps the session that failed
                self.stop_recording(reason)
        else:
            self._session = self._open(recording=False)

    def _open(self, recording: bool) -> ort.InferenceSession:
        row = TABLE[self._provider]
        options, providers = session(self._provider, self._record, self._digest, self._threads, recording)
        where = f"{self._path.name} cannot be loaded by provider {self._provider}"
        try:
            # fallback: a session that cannot be made is made on the CPU otherwise, and a line printed
            made = ort.InferenceSession(self._path, options, providers=providers, enable_fallback=0)
        except Exception as error:  # the runtime raises its own unexported exception types
            hint = f" ({row.bf16})" if row.bf16 and self._record.precision == "bf16" else ""
            raise EngineError(f"{where}: {first_line(error)}{hint}") from error
        if row.ep not in made.get_providers():
            raise EngineError(
                f"{where}: ONNX Runtime left {row.ep} out, because the libraries that it needs do not load, and would "
                f"run on {', '.join(made.get_providers())}. Install them with: {install_command(self._provider)}"
            )
        if self._provider == "cuda" and (strays := strays_of(made)):
            warnings.warn(
                f"{self.spec.name} is run in part by the CPU, which CUDA waits for: {', '.join(strays)}",
                RuntimeWarning,
                stacklevel=2,
            )
        return made

    def stop_recording(self, reason: str) -> None:
        """Open the session again, without CUDA graphs, and say so.

        Raises:
            EngineError: it cannot be loaded without them either: graphs were not the reason.
        """
        self.recorder = self._session = None  # a GPU may not hold the weights twice
        self._session = self._open(recording=False)
        warnings.warn(
            f"{self.spec.name} runs without a CUDA graph, kernel by kernel: {reason}", RuntimeWarning, stacklevel=2
        )

    def bind(self, constants: Mapping[str, DeviceTensor]) -> OrtBound | CudaBound:
        """Fix the inputs that do not change between calls."""
        values = {}
        for name, tensor in constants.items():
            if not isinstance(tensor, OrtTensor):
                raise EngineError(f"{self.spec.name}: {name} comes from another runtime than ONNX Runtime")
            values[name] = tensor
        return CudaBound(self, values) if TABLE[self._provider].graphs else OrtBound(self, values)

    def results(self, values: list[ort.OrtValue]) -> dict[str, Value]:
        """Outputs in call order -> what a caller gets: arrays of its own, or tensors that stay where they are."""
        outputs: dict[str, Value] = {}
        for spec, value in zip(self.spec.outputs, values, strict=True):
            outputs[spec.name] = value.numpy() if spec.on_host else OrtTensor(value)
        return outputs

    @property
    def session(self) -> ort.InferenceSession:
        """The session.

        Raises:
            EngineError: the engine was closed.
        """
        if self._session is None:
            raise EngineError(f"{self.spec.name} was closed")
        return self._session

    def check_open(self) -> None:
        """Refuse a closed engine; who asks for the session keeps it.

        Raises:
            EngineError: the engine was closed.
        """
        _ = self.session

    def close(self) -> None:
        """Give back the session's memory, and what was recorded in it."""
        self.recorder = self._session = None

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
        values = {name: tensor.value for name, tensor in self._constants.items()}
        values |= {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        return self._engine.results(list(self._engine.session.run_with_ort_values(self._outputs, values)))


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


def install_command(provider: str) -> str:
    """What installs a provider."""
    from . import PROVIDERS

    return f"pip install 'cascade-rt[{PROVIDERS[provider].extra}]'"


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
