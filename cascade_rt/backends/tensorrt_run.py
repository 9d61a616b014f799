"""How TensorRT engines are called: scratch memory, staging, addresses, CUDA graphs. Not yet executed on a GPU.

All engines of a process on one GPU run on one stream, one call at a time, so that one scratch buffer serves them all. A
step whose shapes and addresses stay the same is recorded as a CUDA graph in its second call.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..errors import EngineError
from ..stages import ITEM_SIZE, EngineSpec
from .base import Host, Value, check_feeds, check_outputs, output_shapes
from .cuda import CudaTensor, DeviceBuffer, Graph, PinnedArray, Stream, on_device
from .failures import MORE_MEMORY, ran_out_of_memory
from .rows import joined_shape, rows_shape

DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "UINT8": "uint8"}


class Device:
    """What all engines of a runtime on one GPU share: the library, its logger, a stream, scratch memory.

    The logger is never given up: TensorRT keeps referring to the first that it was given.
    """

    def __init__(self, trt: Any, rt: Any, device_id: int = 0) -> None:
        """Take a GPU.

        Args:
            trt: the module ``tensorrt`` or ``tensorrt_rtx``.
            rt: from `cuda.runtime`.
            device_id: which GPU.
        """
        self.trt, self.rt, self.device_id = trt, rt, device_id
        self._lock = threading.RLock()
        self.log = _logger(trt)
        with self.use():
            self.runtime = trt.Runtime(self.log)
        self._stream: Stream | None = None
        self._scratch: DeviceBuffer | None = None
        self._users = 0

    @contextmanager
    def use(self) -> Iterator[None]:
        """Within, this thread alone calls CUDA for this device, and its calls go to this GPU."""
        with self._lock, on_device(self.rt, self.device_id):
            yield

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
        with self.use():
            if self._stream is None:
                self._stream = Stream(self.rt)
            self._users += 1

    def release(self) -> None:
        """Count an engine out; the last one gives everything back."""
        with self.use():
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
            self._scratch = DeviceBuffer(self.rt, size)
        return int(self._scratch.handle)

    def allocate(self, dtype: str, shape: Sequence[int]) -> CudaTensor:
        """Memory for a tensor.

        Raises:
            EngineError: there is not enough.
        """
        size = int(np.prod(shape, dtype=np.int64)) * ITEM_SIZE[dtype]
        return CudaTensor(DeviceBuffer(self.rt, size), tuple(shape), dtype)

    def join(self, tensors: Sequence[CudaTensor]) -> CudaTensor:
        """Tensors one after the other along the first axis; see `Engine.join`."""
        shape = joined_shape(tensors)
        with self.use():
            made = self.allocate(tensors[0].dtype, shape)
            address = made.address
            for tensor in tensors:
                self.stream.copy(address, tensor.address, tensor.size, "DeviceToDevice")
                address += tensor.size
            self.stream.wait()
        return made

    def rows(self, tensor: CudaTensor, start: int, stop: int) -> CudaTensor:
        """Some of a tensor's rows; see `Engine.rows`."""
        shape = rows_shape(tensor, start, stop)
        with self.use():
            made = self.allocate(tensor.dtype, shape)
            source = tensor.address + start * (tensor.size // tensor.shape[0])
            self.stream.copy(made.address, source, made.size, "DeviceToDevice")
            self.stream.wait()
        return made

    def demand(self, done: Any, what: str) -> Any:
        """What a call of TensorRT gave, unless that is False or None.

        Raises:
            EngineError: with what TensorRT logged.
        """
        if done is None or done is False:
            reason = "; ".join(dict.fromkeys(self.log.errors[-2:])) or "TensorRT gave no reason"
            hint = f"; {MORE_MEMORY}" if ran_out_of_memory(reason) else ""
            raise EngineError(f"{what} failed: {reason}{hint}")
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


class Execution:
    """An engine's execution context, and whose shapes and addresses it has."""

    def __init__(self, spec: EngineSpec, device: Device, context: Any) -> None:
        self.spec, self.device = spec, device
        self._context: Any = context
        self.active: weakref.ref[Call] | None = None

    @property
    def context(self) -> Any:
        """The execution context.

        Raises:
            EngineError: the engine was closed.
        """
        if self._context is None:
            raise EngineError(f"{self.spec.name} was closed")
        return self._context

    def close(self) -> None:
        """Let go of the context; twice is fine."""
        self._context = None


class TensorRTBound:
    """Constants in place on the GPU."""

    def __init__(self, execution: Execution, constants: Mapping[str, CudaTensor]) -> None:
        self._execution = execution
        self._constants = constants
        self._call: Call | None = None

    def __call__(self, feeds: Mapping[str, Host]) -> dict[str, Value]:
        """Run with the remaining inputs; see `BoundEngine`."""
        execution = self._execution
        with execution.device.use():
            _ = execution.context  # refuse before anything is allocated
            sizes = check_feeds(execution.spec, {**self._constants, **feeds})
            shapes = {name: array.shape for name, array in feeds.items()}
            if self._call is None or self._call.shapes != shapes:
                self._call = Call(execution, self._constants, shapes, output_shapes(execution.spec, sizes))
            outputs = self._call.run(feeds)
        check_outputs(execution.spec, sizes, outputs)
        return outputs


class Call:
    """One set of shapes and addresses: what a CUDA graph is recorded for."""

    def __init__(
        self,
        execution: Execution,
        constants: Mapping[str, CudaTensor],
        shapes: dict[str, tuple[int, ...]],
        outputs: dict[str, tuple[int, ...]],
    ) -> None:
        """Allocate what a call needs.

        Args:
            execution: of the engine.
            constants: inputs that are on the GPU.
            shapes: of the other inputs.
            outputs: shapes of the outputs, as the engine's formulas give them.
        """
        self.shapes = shapes
        self._output_shapes = outputs
        self._execution = execution
        self._constants = constants
        self._tensors = {t.name: t for t in execution.spec.tensors}
        device = execution.device
        on_host = shapes | {n: shape for n, shape in outputs.items() if self._tensors[n].on_host}
        self._staging = {n: PinnedArray(device.rt, s, np.dtype(self._tensors[n].dtype)) for n, s in on_host.items()}
        self._inputs = {n: device.allocate(self._tensors[n].dtype, shape) for n, shape in shapes.items()}
        self._outputs: dict[str, CudaTensor] = {}
        self._size = self._scratch = 0
        self._graph: Graph | None = None
        self._warm = False
        # outputs that stay on the GPU get new memory in every call, for the caller to own: their addresses change
        self._recordable = all(t.on_host for t in execution.spec.outputs)

    def run(self, feeds: Mapping[str, Host]) -> dict[str, Value]:
        """Copy in, compute, copy out, wait."""
        stream = self._execution.device.stream
        self._prepare()
        for name, array in feeds.items():
            staging, tensor = self._staging[name], self._inputs[name]
            np.copyto(staging.array, array, casting="no")
            stream.copy(tensor.address, staging.handle, array.nbytes, "HostToDevice")
        self._launch(stream)
        results: dict[str, Value] = {}
        for spec in self._execution.spec.outputs:
            tensor = self._outputs[spec.name]
            if spec.on_host:
                staging = self._staging[spec.name]
                stream.copy(staging.handle, tensor.address, staging.array.nbytes, "DeviceToHost")
            else:
                results[spec.name] = tensor
        stream.wait()
        for spec in self._execution.spec.outputs:
            if spec.on_host:
                results[spec.name] = self._staging[spec.name].array.copy()
        self._outputs = {n: t for n, t in self._outputs.items() if self._tensors[n].on_host}
        return results

    def _prepare(self) -> None:
        """Tell the context shapes and addresses, unless it has them."""
        execution, device = self._execution, self._execution.device
        context, spec = execution.context, execution.spec
        if execution.active is None or execution.active() is not self:
            for key, shape in {**self.shapes, **{n: t.shape for n, t in self._constants.items()}}.items():
                device.demand(context.set_input_shape(key, shape), f"{spec.name}: shape {shape} of {key}")
            if missing := context.infer_shapes():
                raise EngineError(f"{spec.name}: TensorRT cannot tell shapes without {', '.join(missing)}")
            self._check_output_shapes()
            self._size = context.update_device_memory_size_for_shapes()
            execution.active, self._warm = weakref.ref(self), False
        address = device.scratch(self._size)
        if self._warm and address == self._scratch and len(self._outputs) == len(spec.outputs):
            return
        self._drop_graph()
        for name, shape in self._output_shapes.items():
            if name not in self._outputs:
                self._outputs[name] = device.allocate(self._tensors[name].dtype, shape)
        for key, tensor in {**self._inputs, **self._constants, **self._outputs}.items():
            device.demand(context.set_tensor_address(key, tensor.address), f"{spec.name}: address of {key}")
        context.set_device_memory(address, self._size)
        self._scratch, self._warm = address, False

    def _check_output_shapes(self) -> None:
        """Refuse an engine that would write more or less than what is allocated for it.

        Raises:
            EngineError: TensorRT has another shape for an output than the engine's formulas.
        """
        context = self._execution.context
        for name, wanted in self._output_shapes.items():
            shape = tuple(int(size) for size in context.get_tensor_shape(name))
            if shape != wanted:
                raise EngineError(
                    f"{self._execution.spec.name}: TensorRT makes {name} of shape {shape}; its axes are "
                    f"{list(self._tensors[name].axes)}, which is {wanted} here"
                )

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
        context = self._execution.context
        done = context.execute_async_v3(stream.handle)
        self._execution.device.demand(done, f"running {self._execution.spec.name}")

    def _record(self, stream: Stream) -> None:
        context = self._execution.context
        try:
            if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(stream.handle):
                raise EngineError("the runtime says that this engine cannot be recorded")
            stream.begin_capture()
            try:
                self._execute(stream)
            finally:
                recorded = stream.end_capture()
            self._graph = Graph(stream.rt, recorded)
        except EngineError as error:
            self._recordable = False
            name = self._execution.spec.name
            warnings.warn(f"{name} runs without a CUDA graph, kernel by kernel: {error}", RuntimeWarning, stacklevel=2)

    def _drop_graph(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            graph.close()
