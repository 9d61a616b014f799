"""How ONNX Runtime's engines are called on a GPU: I/O binding, and CUDA graphs. Not yet executed on a GPU.

What is known: the same code runs, over ONNX Runtime's CPU provider, in the tests; CUDA's and TensorRT's providers take
the options.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping

import onnxruntime as ort

from ..errors import EngineError
from ..stages import EngineSpec
from .base import Host, Value, check_feeds, check_outputs, output_shapes
from .failures import reason_of
from .ort_session import OrtTensor, Session

GRAPH_ID = "gpu_graph_id"
Shapes = tuple[tuple[str, tuple[int, ...]], ...]
"""Name and shape of every input, constants included: what a recorded call holds for."""


class CudaCalls:
    """A session on a GPU, and the calls of it that are recorded as CUDA graphs."""

    def __init__(self, spec: EngineSpec, open_session: Callable[[bool], Session], graphs: int) -> None:
        """Open the session.

        Args:
            spec: of the engine.
            open_session: opens one, with or without recording.
            graphs: how many CUDA graphs the session can hold; 0: calls are not recorded.

        Raises:
            EngineError: it cannot be opened.
        """
        self._name = spec.name
        self._open = open_session
        self._session: Session | None = None
        self.recorder: Recorder | None = None
        if not graphs:
            self._session = open_session(False)
            return
        reason = ""
        try:
            self._session = open_session(True)
            self.recorder = Recorder(graphs)
        except EngineError as error:
            reason = str(error)
        if reason:  # after the handler: the error's traceback keeps the session that failed
            self.stop_recording(reason)

    @property
    def session(self) -> Session:
        """The session.

        Raises:
            EngineError: the engine was closed.
        """
        if self._session is None:
            raise EngineError(f"{self._name} was closed")
        return self._session

    def bind(self, constants: Mapping[str, OrtTensor]) -> CudaBound:
        """Fix the inputs that do not change between calls."""
        return CudaBound(self, constants)

    def stop_recording(self, reason: str) -> None:
        """Open the session again, without CUDA graphs, and say so.

        Raises:
            EngineError: it cannot be opened without them either: graphs were not the reason.
        """
        self.recorder = self._session = None  # a GPU may not hold the weights twice
        self._session = self._open(False)
        warnings.warn(
            f"{self._name} runs without a CUDA graph, kernel by kernel: {reason}", RuntimeWarning, stacklevel=2
        )

    def close(self) -> None:
        """Give back the session's memory and what was recorded in it; twice is fine."""
        self.recorder = self._session = None


class CudaBound:
    """Constants in place on the GPU."""

    def __init__(self, calls: CudaCalls, constants: Mapping[str, OrtTensor]) -> None:
        self._calls = calls
        self.constants = constants
        self._inputs: dict[str, ort.OrtValue] = {}

    def __call__(self, feeds: Mapping[str, Host]) -> dict[str, Value]:
        """Run with the remaining inputs; see `BoundEngine`."""
        calls = self._calls
        spec = calls.session.spec  # a closed engine refuses before anything is allocated
        sizes = check_feeds(spec, {**self.constants, **feeds})
        if calls.recorder is not None:
            try:
                return calls.recorder.run(calls.session, self, feeds, sizes)
            except RecordingError as error:
                reason = str(error)
            calls.stop_recording(reason)  # after the handler: the error's traceback keeps the session
        return self._plainly(calls.session, feeds, sizes)

    def _plainly(self, session: Session, feeds: Mapping[str, Host], sizes: Mapping[str, int]) -> dict[str, Value]:
        """Kernel by kernel. Constants are read where they lie; outputs are new in every call."""
        if {n: tuple(v.shape()) for n, v in self._inputs.items()} != {n: a.shape for n, a in feeds.items()}:
            self._inputs = {n: session.empty(n, a.shape) for n, a in feeds.items()}
        for name, array in feeds.items():
            copy(session, self._inputs[name], array)
        outputs = {name: session.empty(name, shape) for name, shape in output_shapes(session.spec, sizes).items()}
        binding = session.runtime.io_binding()
        for name, value in {**{n: t.value for n, t in self.constants.items()}, **self._inputs}.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        session.run(binding)
        return session.results(list(outputs.values()), sizes)


class RecordingError(EngineError):
    """A call that cannot be recorded as a CUDA graph, or replayed; it may still be possible without."""


class Recorder:
    """The calls of an engine that are recorded as CUDA graphs, one for every set of shapes."""

    def __init__(self, limit: int) -> None:
        """Record nothing yet.

        Args:
            limit: how many graphs the session can hold; of one, ONNX Runtime does not look at its number.
        """
        self._limit = limit
        self._calls: dict[Shapes, RecordedCall] = {}
        self._last = 0

    def run(
        self, session: Session, bound: CudaBound, feeds: Mapping[str, Host], sizes: Mapping[str, int]
    ) -> dict[str, Value]:
        """Replay what was recorded for these shapes; record it first if nothing was.

        Raises:
            RecordingError: it cannot be recorded.
        """
        inputs: dict[str, Value] = {**bound.constants, **feeds}
        shapes: Shapes = tuple((t.name, tuple(inputs[t.name].shape)) for t in session.spec.inputs)
        call = self._calls.pop(shapes, None)
        if call is None:
            call = self._new(session, shapes, sizes)
        self._calls[shapes] = call  # the one used last is at the end
        outputs = call.run(session, bound, feeds)
        check_outputs(session.spec, sizes, outputs)
        return outputs

    def _new(self, session: Session, shapes: Shapes, sizes: Mapping[str, int]) -> RecordedCall:
        if self._calls and self._limit == 1:
            raise RecordingError("this provider records one set of shapes, and now there is another")
        if len(self._calls) >= self._limit:
            oldest = next(iter(self._calls))
            session.runtime.release_captured_graph(self._calls.pop(oldest).number)
        self._last += 1  # 0 is the runtime's own
        return RecordedCall(session, shapes, sizes, 0 if self._limit == 1 else self._last)


class RecordedCall:
    """One set of shapes at addresses that stay, as a CUDA graph needs: inputs, constants and outputs.

    Constants are copied to where the graph reads them when another prompt brings others. Binding them where they lie
    would need a graph for every prompt, and recording one costs two runs of the network; the copy moves, within the
    GPU, one to two hundredths of the weights that every step reads.
    """

    def __init__(self, session: Session, shapes: Shapes, sizes: Mapping[str, int], number: int) -> None:
        self.number = number
        self._holds: weakref.ref[CudaBound] | None = None  # whose constants are in place
        self._inputs = {name: session.empty(name, shape) for name, shape in shapes}
        self._outputs = {name: session.empty(name, shape) for name, shape in output_shapes(session.spec, sizes).items()}
        self._binding = session.runtime.io_binding()
        for name, value in self._inputs.items():
            self._binding.bind_ortvalue_input(name, value)
        for name, value in self._outputs.items():
            self._binding.bind_ortvalue_output(name, value)
        self._options: ort.RunOptions | None = None
        if number:
            self._options = ort.RunOptions()
            self._options.add_run_config_entry(GRAPH_ID, str(number))

    def run(self, session: Session, bound: CudaBound, feeds: Mapping[str, Host]) -> dict[str, Value]:
        """Copy in, replay, copy out. In the first call ONNX Runtime warms up, records and replays."""
        if self._holds is None or self._holds() is not bound:
            self._holds = None  # nobody's, if a copy fails on the way
            for name, tensor in bound.constants.items():
                copy(session, self._inputs[name], tensor.value)
            self._holds = weakref.ref(bound)
        for name, array in feeds.items():
            copy(session, self._inputs[name], array)
        try:
            session.run(self._binding, self._options)
        except EngineError as error:
            raise RecordingError(str(error)) from error
        # a copy: `numpy` may be a view of memory that the next call writes to
        return {name: value.numpy().copy() for name, value in self._outputs.items()}


def copy(session: Session, target: ort.OrtValue, source: Host | ort.OrtValue) -> None:
    """Copy a tensor to where an engine reads it.

    Raises:
        EngineError: it failed.
    """
    try:
        target.update_inplace(source)
    except Exception as error:  # the runtime raises its own unexported exception types
        raise EngineError(f"{session.spec.name}: an input cannot be copied: {reason_of(error)}") from error
