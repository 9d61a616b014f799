"""The little of CUDA that TensorRT needs, on cuda-bindings: checked calls, memory, graphs. Not yet executed on a GPU.

`gpu_sm` asks the driver itself and needs no package, so that a machine without a GPU is told so whatever it lacks.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError

# CUdevice_attribute: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h
_MAJOR, _MINOR = 75, 76
_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def gpu_sm() -> int:
    """Compute capability of the first GPU, 89 for 8.9.

    Raises:
        EngineError: there is no driver or no GPU that it can use.
    """
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        raise EngineError(f"there is no NVIDIA GPU here (the driver's {_DRIVER} is not found)") from None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    calls: list[tuple[str, Callable[[], int]]] = [
        ("cuInit", lambda: driver.cuInit(0)),
        ("cuDeviceGet", lambda: driver.cuDeviceGet(ctypes.byref(device), 0)),
        ("cuDeviceGetAttribute", lambda: driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)),
        ("cuDeviceGetAttribute", lambda: driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)),
    ]
    for name, call in calls:
        if status := call():
            raise EngineError(f"there is no NVIDIA GPU here that can be used ({name} gives status {status})")
    return 10 * major.value + minor.value


def runtime() -> Any:
    """The module ``cuda.bindings.runtime``.

    Raises:
        EngineError: it is not installed.
    """
    try:
        from cuda.bindings import runtime as module
    except ImportError:
        raise EngineError(
            "cuda-bindings is not installed; install it with: pip install 'cascade-rt[tensorrt]'"
        ) from None
    return module


def check(rt: Any, what: str, result: tuple[Any, ...]) -> Any:
    """The value of a runtime call, once its status is found right.

    Args:
        rt: from `runtime`.
        what: was called, for the message.
        result: the tuple that every function of cuda-bindings returns: status, then values.

    Raises:
        EngineError: the call failed.
    """
    status, *values = result
    if status != rt.cudaError_t.cudaSuccess:
        _, text = rt.cudaGetErrorString(status)
        reason = text.decode() if isinstance(text, bytes) else str(status)
        hint = "; use a smaller size or batch, or --low-memory" if "emory" in str(status) else ""
        raise EngineError(f"{what} failed: {reason}{hint}")
    return values[0] if len(values) == 1 else tuple(values)


class Stream:
    """A stream and the calls that are queued on it. Closing twice is fine."""

    def __init__(self) -> None:
        self.rt = runtime()
        flags = self.rt.cudaStreamNonBlocking
        self._handle: Any = check(self.rt, "cudaStreamCreateWithFlags", self.rt.cudaStreamCreateWithFlags(flags))

    @property
    def handle(self) -> int:
        """The address that TensorRT takes."""
        return int(self._handle)

    def copy(self, target: int, source: int, size: int, kind: str) -> None:
        """Queue a copy of ``size`` bytes; ``kind`` is a name of ``cudaMemcpyKind`` less its prefix."""
        way = getattr(self.rt.cudaMemcpyKind, f"cudaMemcpy{kind}")
        check(self.rt, f"copy {kind}", self.rt.cudaMemcpyAsync(target, source, size, way, self._handle))

    def wait(self) -> None:
        """Wait until everything that was queued is done."""
        check(self.rt, "cudaStreamSynchronize", self.rt.cudaStreamSynchronize(self._handle))

    def begin_capture(self) -> None:
        """Record what is queued from now on instead of doing it."""
        mode = self.rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        check(self.rt, "cudaStreamBeginCapture", self.rt.cudaStreamBeginCapture(self._handle, mode))

    def end_capture(self) -> Any:
        """The recorded graph."""
        return check(self.rt, "cudaStreamEndCapture", self.rt.cudaStreamEndCapture(self._handle))

    def launch(self, graph: Graph) -> None:
        """Queue a recorded graph."""
        check(self.rt, "cudaGraphLaunch", self.rt.cudaGraphLaunch(graph.handle, self._handle))

    def close(self) -> None:
        """Give the stream back."""
        handle, self._handle = self._handle, None
        if handle is not None:
            check(self.rt, "cudaStreamDestroy", self.rt.cudaStreamDestroy(handle))


class Owned:
    """Something of CUDA's that is given back once: by `close`, or when nothing refers to it any more."""

    def __init__(self, rt: Any, handle: Any) -> None:
        self._rt = rt
        self._handle: Any = handle

    def _give_back(self, handle: Any) -> tuple[Any, ...]:
        raise NotImplementedError

    @property
    def handle(self) -> Any:
        """What CUDA knows it by.

        Raises:
            EngineError: it was given back.
        """
        if self._handle is None:
            raise EngineError(f"{type(self).__name__} was used after it was closed")
        return self._handle

    def close(self) -> None:
        """Give it back; twice is fine."""
        handle, self._handle = self._handle, None
        if handle is not None:
            check(self._rt, f"giving back {type(self).__name__}", self._give_back(handle))

    def __del__(self) -> None:
        handle, self._handle = getattr(self, "_handle", None), None
        if handle is not None and not sys.is_finalizing():
            self._give_back(handle)  # an error raised here would only be printed


class Graph(Owned):
    """An instantiated CUDA graph."""

    def __init__(self, rt: Any, recorded: Any) -> None:
        try:
            super().__init__(rt, check(rt, "cudaGraphInstantiate", rt.cudaGraphInstantiate(recorded, 0)))
        finally:
            check(rt, "cudaGraphDestroy", rt.cudaGraphDestroy(recorded))

    def _give_back(self, handle: Any) -> tuple[Any, ...]:
        done: tuple[Any, ...] = self._rt.cudaGraphExecDestroy(handle)
        return done


class DeviceBuffer(Owned):
    """Memory on the GPU."""

    def __init__(self, rt: Any, size: int) -> None:
        self.size = size
        # also an empty tensor gets an address
        super().__init__(rt, int(check(rt, f"cudaMalloc of {size >> 20} MiB", rt.cudaMalloc(max(size, 1)))))

    def _give_back(self, handle: Any) -> tuple[Any, ...]:
        done: tuple[Any, ...] = self._rt.cudaFree(handle)
        return done


class PinnedArray(Owned):
    """Page-locked host memory as a NumPy array, ``array``: what is copied to the GPU without a detour."""

    def __init__(self, rt: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        super().__init__(rt, int(check(rt, "cudaMallocHost", rt.cudaMallocHost(max(size, 1)))))
        block = (ctypes.c_uint8 * size).from_address(self.handle)
        self.array: NDArray[Any] = np.frombuffer(memoryview(block), dtype=np.uint8).view(dtype).reshape(shape)

    def _give_back(self, handle: Any) -> tuple[Any, ...]:
        done: tuple[Any, ...] = self._rt.cudaFreeHost(handle)
        return done


@dataclass(frozen=True)
class CudaTensor:
    """A `DeviceTensor` in memory that it keeps alive."""

    buffer: DeviceBuffer
    shape: tuple[int, ...]
    dtype: str

    @property
    def address(self) -> int:
        """Where it lies."""
        return int(self.buffer.handle)
