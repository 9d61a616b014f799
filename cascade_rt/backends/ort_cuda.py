"""How ONNX Runtime's engines are called on a GPU: I/O binding, and CUDA graphs. Not yet executed on a GPU.

What is known: the same code runs, over ONNX Runtime's CPU provider, in the tests; CUDA's and TensorRT's providers take
the options.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

import onnxruntime as ort

from ..errors import EngineError
from ..stages import TensorSpec
from .base import Host, Value, check_feeds

if TYPE_CHECKING:
    from .ort import OrtEngine, OrtTensor

_ONNX_TYPE = {"float32": 1, "uint8": 2, "int64": 7, "float16": 10, "bfloat16": 16}
GRAPH_ID = "gpu_graph_id"
Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""Name and shape of every input, constants included: what a recorded call holds for."""


class CudaBound:
    """Constants in place on the GPU."""

    def __init__(self, engine: OrtEngine, constants: Mapping[str, OrtTensor]) -> None:
        self._engine = engine
        self.constants = constants
        self._inputs: dict[str, ort.OrtValue] = {}

    def __call__(self, feeds: Mapping[str, Host]) -> dict[str, Value]:
        """Run with the remaining inputs; see `BoundEngine`."""
        engine = self._engine
        check_feeds(engine.spec, {**self.constants, **feeds})
        engine.check_open()  # refuse before anything is allocated
        if engine.recorder is not None:
            try:
                return engine.recorder.run(self, feeds)
            except RecordingError as error:
                reason = str(error)
            engine.stop_recording(reason)  # out of the handler: the error's traceback keeps the session
        return self._plainly(feeds)

    def _plainly(self, feeds: Mapping[str, Host]) -> dict[str, Value]:
        """Kernel by kernel. Constants are read where they lie; outputs that stay on the GPU are new in every call."""
        engine = self._engine
        if {n: tuple(v.shape()) for n, v in self._inputs.items()} != {n: a.shape for n, a in feeds.items()}:
            self._inputs = {n: empty(engine, n, a.shape) for n, a in feeds.items()}
        for name, array in feeds.items():
            copy(engine, self._inputs[name], array)
        binding = engine.session.io_binding()
        for name, value in {**{n: t.value for n, t in self.constants.items()}, **self._inputs}.items():
            binding.bind_ortvalue_input(name, value)
        for spec in engine.spec.outputs:
            binding.bind_output(spec.name, engine.device, 0)  # the session allocates
        execute(engine, binding, None)
        return engine.results(list(binding.get_outputs()))


class RecordingError(EngineError):
    """A call that cannot be recorded as a CUDA graph, or replayed; it may still be possible without."""


class Recorder:
    """The calls of an engine that are recorded as CUDA graphs, one for every set of shapes."""

    def __init__(self, engine: OrtEngine, limit: int) -> None:
        """Record nothing yet.

        Args:
            engine: whose session has been opened for it.
            limit: how many graphs the session can hold; of one, ONNX Runtime does not look at its number.
        """
        self._engine = weakref.proxy(engine)
        self._limit = limit
        self._calls: dict[Shapes, RecordedCall] = {}
        self._last = 0

    def run(self, bound: CudaBound, feeds: Mapping[str, Host]) -> dict[str, Value]:
        """Replay what was recorded for these shapes; record it first if nothing was.

        Raises:
            RecordingError: it cannot be recorded.
        """
        inputs: dict[str, Value] = {**bound.constants, **feeds}
        shapes: Shapes = tuple((t.name, tuple(inputs[t.name].shape)) for t in self._engine.spec.inputs)
        call = self._calls.pop(shapes, None)
        if call is None:
            call = self._new(shapes)
        self._calls[shapes] = call  # the one used last is at the end
        return call.run(bound, feeds)

    def _new(self, shapes: Shapes) -> RecordedCall:
        if self._calls and self._limit == 1:
            raise RecordingError("this provider records one set of shapes, and now there is another")
        if len(self._calls) >= self._limit:
            oldest = next(iter(self._calls))
            self._engine.session.release_captured_graph(self._calls.pop(oldest).number)
        self._last += 1  # 0 is the runtime's own
        return RecordedCall(self._engine, shapes, 0 if self._limit == 1 else self._last)


class RecordedCall:
    """One set of shapes at addresses that stay, as a CUDA graph needs: inputs, constants and outputs.

    Constants are copied to where the graph reads them when another prompt brings others. Binding them where they lie
    would need a graph for every prompt, and recording one costs two runs of the network; the copy moves, within the
    GPU, one to two hundredths of the weights that every step reads.
    """

    def __init__(self, engine: OrtEngine, shapes: Shapes, number: int) -> None:
        self.number = number
        self._engine = engine
        self._holds: weakref.ref[CudaBound] | None = None  # whose constants are in place
        self._inputs = {name: empty(engine, name, shape) for name, shape in shapes}
        axes = {t.name: t.axes for t in engine.spec.inputs}
        sizes = {a: s for n, shape in shapes for a, s in zip(axes[n], shape, strict=True) if isinstance(a, str)}
        self._outputs = {
            spec.name: empty(engine, spec.name, [sizes[a] if isinstance(a, str) else a for a in spec.axes])
            for spec in engine.spec.outputs
        }
        self._binding = engine.session.io_binding()
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        self._options: ort.RunOptions | None = None
        if number:
            self._options = ort.RunOptions()
            self._options.add_run_config_entry(GRAPH_ID, str(number))

    def run(self, bound: CudaBound, feeds: Mapping[str, Host]) -> dict[str, Value]:
        """Copy in, replay, copy out. In the first call ONNX Runtime warms up, records and replays."""
        if self._holds is None or self._holds() is not bound:
            self._holds = None  # nobody's, if a copy fails on the way
            for name, tensor in bound.constants.items():
                copy(self._engine, self._inputs[name], tensor.value)
            self._holds = weakref.ref(bound)
        for name, array in feeds.items():
            copy(self._engine, self._inputs[name], array)
        try:
            execute(self._engine, self._binding, self._options)
        except EngineError as error:
            raise RecordingError(str(error)) from error
        # a copy: `numpy` may be a view of memory that the next call writes to
        return {name: value.numpy().copy() for name, value in self._outputs.items()}


def empty(engine: OrtEngine, name: str, shape: tuple[int, ...] | list[int]) -> ort.OrtValue:
    """Memory for a tensor of an engine, where it runs.

    Raises:
        EngineError: there is not enough.
    """
    specs: dict[str, TensorSpec] = {t.name: t for t in (*engine.spec.inputs, *engine.spec.outputs)}
    try:
        return ort.OrtValue.ortvalue_from_shape_and_type(list(shape), _ONNX_TYPE[specs[name].dtype], engine.device, 0)
    except Exception as error:  # the runtime raises its own unexported exception types
        raise EngineError(f"{engine.spec.name}: no memory for {name} {list(shape)}: {first_line(error)}") from error


def copy(engine: OrtEngine, target: ort.OrtValue, source: Host | ort.OrtValue) -> None:
    """Copy a tensor to where an engine reads it.

    Raises:
        EngineError: it failed.
    """
    try:
        target.update_inplace(source)
    except Exception as error:  # the runtime raises its own unexported exception types
        raise EngineError(f"{engine.spec.name}: an input cannot be copied: {first_line(error)}") from error


def execute(engine: OrtEngine, binding: ort.IOBinding, options: ort.RunOptions | None) -> None:
    """Run a session and wait for it.

    Raises:
        EngineError: it failed.
    """
    try:
        engine.session.run_with_iobinding(binding, options)
    except Exception as error:  # the runtime raises its own unexported exception types
        raise EngineError(f"{engine.spec.name} failed in ONNX Runtime: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What an error of the runtime says, less its many lines."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
