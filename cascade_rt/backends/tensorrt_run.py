"""How plans are called: scratch memory, staging, addresses, CUDA graphs. Not yet executed on a GPU.

All engines of a process run on one stream, one call at a time, so that one scratch buffer serves them all. A step whose
shapes and addresses stay the same is recorded as a CUDA graph in its second call.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EngineError
from ..stages import TensorSpec
from .base import Host, Value, check_feeds
from .cuda import CudaTensor, DeviceBuffer, Graph, PinnedArray, Stream

if TYPE_CHECKING:
    from .tensorrt import TensorRTEngine

DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "UINT8": "uint8"}
ITEM_SIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "uint8": 1}


class Device:
    """What all engines of a runtime share: the library, its logger, a stream, scratch memory.

    The logger is never given up: TensorRT keeps referring to the first that it was given.
    """

    def __init__(self, trt: Any) -> None:
        self.trt = trt
        self.lock = threading.RLock()
        self.log = _logger(trt)
        self.runtime = trt.Runtime(self.log)
        self._stream: Stream | None = None
        self._scratch: DeviceBuffer | None = None
        self._users = 0

    @property
    def stream(self) -> Stream:
        """The stream.

        Raises:
            EngineError: no engine is open.
        """
        if self._stream is None:
            raise EngineError("no engine is open on this GPU")
        return self._stream

    def open(self) -> None:
        """Count an engine in."""
        with self.lock:
            if self._stream is None:
                self._stream = Stream()
            self._users += 1

    def release(self) -> None:
        """Count an engine out; the last one gives everything back."""
        with self.lock:
            self._users -= 1
            if self._users == 0 and self._stream is not None:
                self._stream.wait()
                if self._scratch is not None:
                    self._scratch.close()
                self._stream.close()
                self._scratch = self._stream = None

    def scratch(self, size: int) -> int:
        """The address of at least ``size`` bytes that hold nothing between calls."""
        if self._scratch is None or self._scratch.size < size:
            self.stream.wait()
            if self._scratch is not None:
                self._scratch.close()
            self._scratch = DeviceBuffer(self.stream.rt, size)
        return int(self._scratch.handle)

    def demand(self, done: Any, what: str) -> Any:
        """What a call of TensorRT gave, unless that is False or None.

        Raises:
            EngineError: with what TensorRT logged.
        """
        if done is None or done is False:
            reason = "; ".join(dict.fromkeys(self.log.errors[-2:])) or "TensorRT gave no reason"
            raise EngineError(f"{what} failed: {reason}")
        self.log.errors.clear()
        return done


def _logger(trt: Any) -> Any:
    class Kept(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

    return Kept()


class TensorRTBound:
    """Constants in place on the GPU."""

    def __init__(self, engine: TensorRTEngine, constants: Mapping[str, CudaTensor]) -> None:
        self._engine = engine
        self._constants = constants
        self._call: Call | None = None

    def __call__(self, feeds: Mapping[str, Host]) -> dict[str, Value]:
        """Run with the remaining inputs; see `BoundEngine`."""
        engine = self._engine
        with engine.device.lock:
            _ = engine.context  # refuse before anything is allocated
            check_feeds(engine.spec, {**self._constants, **feeds})
            shapes = {name: array.shape for name, array in feeds.items()}
            if self._call is None or self._call.shapes != shapes:
                self._call = Call(engine, self._constants, shapes)
            return self._call.run(feeds)


class Call:
    """One set of shapes and addresses: what a CUDA graph is recorded for."""

    def __init__(
        self, engine: TensorRTEngine, constants: Mapping[str, CudaTensor], shapes: dict[str, tuple[int, ...]]
    ) -> None:
        self.shapes = shapes
        self._engine = engine
        self._constants = constants
        self._tensors = {t.name: t for t in (*engine.spec.inputs, *engine.spec.outputs)}
        rt = engine.device.stream.rt
        self._staging = {n: PinnedArray(rt, shape, np.dtype(self._tensors[n].dtype)) for n, shape in shapes.items()}
        self._inputs = {n: self._allocate(n, shape) for n, shape in shapes.items()}
        self._outputs: dict[str, CudaTensor] = {}
        self._size = self._scratch = 0
        self._graph: Graph | None = None
        self._warm = False
        # outputs that stay on the GPU get new memory in every call, for the caller to own: their addresses change
        self._recordable = all(t.on_host for t in engine.spec.outputs)

    def _allocate(self, name: str, shape: tuple[int, ...]) -> CudaTensor:
        dtype = self._tensors[name].dtype
        size = int(np.prod(shape, dtype=np.int64)) * ITEM_SIZE[dtype]
        return CudaTensor(DeviceBuffer(self._engine.device.stream.rt, size), shape, dtype)

    def run(self, feeds: Mapping[str, Host]) -> dict[str, Value]:
        """Copy in, compute, copy out, wait."""
        stream = self._engine.device.stream
        self._prepare()
        for name, array in feeds.items():
            staging, tensor = self._staging[name], self._inputs[name]
            np.copyto(staging.array, array, casting="no")
            stream.copy(tensor.address, staging.handle, array.nbytes, "HostToDevice")
        self._launch(stream)
        results: dict[str, Value] = {}
        for spec in self._engine.spec.outputs:
            tensor = self._outputs[spec.name]
            if spec.on_host:
                staging = self._staging[spec.name]
                stream.copy(staging.handle, tensor.address, staging.array.nbytes, "DeviceToHost")
            else:
                results[spec.name] = tensor
        stream.wait()
        for spec in self._engine.spec.outputs:
            if spec.on_host:
                results[spec.name] = self._staging[spec.name].array.copy()
        self._outputs = {n: t for n, t in self._outputs.items() if self._tensors[n].on_host}
        return results

    def _prepare(self) -> None:
        """Tell the context shapes and addresses, unless it has them."""
        engine, device = self._engine, self._engine.device
        context = engine.context
        name = engine.spec.name
        if engine.active is None or engine.active() is not self:
            for key, shape in {**self.shapes, **{n: t.shape for n, t in self._constants.items()}}.items():
                device.demand(context.set_input_shape(key, shape), f"{name}: shape {shape} of {key}")
            if missing := context.infer_shapes():
                raise EngineError(f"{name}: TensorRT cannot tell shapes without {', '.join(missing)}")
            self._size = context.update_device_memory_size_for_shapes()
            engine.active, self._warm = weakref.ref(self), False
        address = device.scratch(self._size)
        if self._warm and address == self._scratch and len(self._outputs) == len(engine.spec.outputs):
            return
        self._drop_graph()
        for spec in engine.spec.outputs:
            if spec.name not in self._outputs:
                self._outputs[spec.name] = self._make_output(context, spec)
        for key, tensor in {**self._inputs, **self._constants, **self._outputs}.items():
            device.demand(context.set_tensor_address(key, tensor.address), f"{name}: address of {key}")
        context.set_device_memory(address, self._size)
        self._scratch, self._warm = address, False

    def _make_output(self, context: Any, spec: TensorSpec) -> CudaTensor:
        shape = tuple(int(size) for size in context.get_tensor_shape(spec.name))
        if any(size < 0 for size in shape):
            raise EngineError(f"{self._engine.spec.name}: TensorRT does not know the shape of {spec.name}: {shape}")
        if spec.on_host:
            rt = self._engine.device.stream.rt
            self._staging[spec.name] = PinnedArray(rt, shape, np.dtype(spec.dtype))
        return self._allocate(spec.name, shape)

    def _launch(self, stream: Stream) -> None:
        """Queue the computation: plainly the first time, which a graph needs, and as a graph from the second on."""
        if self._warm and self._recordable and self._graph is None:
            self._record(stream)
        if self._graph is not None:
            stream.launch(self._graph)
            return
        self._execute(stream)
        self._warm = True

    def _execute(self, stream: Stream) -> None:
        engine = self._engine
        done = engine.context.execute_async_v3(stream.handle)
        engine.device.demand(done, f"running {engine.spec.name}")

    def _record(self, stream: Stream) -> None:
        context = self._engine.context
        try:
            if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(stream.handle):
                raise EngineError("the runtime says that this plan cannot be recorded")
            stream.begin_capture()
            try:
                self._execute(stream)
            finally:
                recorded = stream.end_capture()
            self._graph = Graph(stream.rt, recorded)
        except EngineError as error:
            self._recordable = False
            name = self._engine.spec.name
            warnings.warn(f"{name} runs without a CUDA graph, kernel by kernel: {error}", RuntimeWarning, stacklevel=2)

    def _drop_graph(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            graph.close()
