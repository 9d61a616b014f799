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
        check(self.rt, "cudaGraphLaunch", self.rt.cudaGraphLaunch(graph.executable, self._handle))

    def close(self) -> None:
        """Give the stream back."""
        handle, self._handle = self._handle, None
        if handle is not None:
            check(self.rt, "cudaStreamDestroy", self.rt.cudaStreamDestroy(handle))


class Graph:
    """An instantiated CUDA graph. Closing twice is fine."""

    def __init__(self, rt: Any, recorded: Any) -> None:
        self._rt = rt
        try:
            self.executable = check(rt, "cudaGraphInstantiate", rt.cudaGraphInstantiate(recorded, 0))
        finally:
            check(rt, "cudaGraphDestroy", rt.cudaGraphDestroy(recorded))

    def close(self) -> None:
        """Give the graph back."""
        executable, self.executable = self.executable, None
        if executable is not None:
            check(self._rt, "cudaGraphExecDestroy", self._rt.cudaGraphExecDestroy(executable))


class DeviceBuffer:
    """Memory on the GPU, given back when nothing refers to it any more."""

    def __init__(self, rt: Any, size: int) -> None:
        self._rt = rt
        self.size = size
        # every tensor gets an address, also an empty one
        self.address: int | None = int(check(rt, f"cudaMalloc of {size >> 20} MiB", rt.cudaMalloc(max(size, 1))))

    def close(self) -> None:
        """Give the memory back; twice is fine."""
        address, self.address = self.address, None
        if address is not None:
            check(self._rt, "cudaFree", self._rt.cudaFree(address))

    def __del__(self) -> None:
        address, self.address = getattr(self, "address", None), None
        if address is not None:
            self._rt.cudaFree(address)  # an error raised here would only be printed


class PinnedArray:
    """Page-locked host memory as a NumPy array: what is copied to the GPU without a detour."""

    def __init__(self, rt: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._rt = rt
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self.address: int | None = int(check(rt, "cudaMallocHost", rt.cudaMallocHost(max(size, 1))))
        block = (ctypes.c_uint8 * size).from_address(self.address)
        self.array: NDArray[Any] = np.frombuffer(memoryview(block), dtype=np.uint8).view(dtype).reshape(shape)

    def close(self) -> None:
        """Give the memory back; twice is fine. ``array`` must not be used afterwards."""
        address, self.address = self.address, None
        if address is not None:
            check(self._rt, "cudaFreeHost", self._rt.cudaFreeHost(address))


@dataclass(frozen=True)
class CudaTensor:
    """A `DeviceTensor` in memory that it keeps alive."""

    buffer: DeviceBuffer
    shape: tuple[int, ...]
    dtype: str

    @property
    def address(self) -> int:
        """Where it lies.

        Raises:
            EngineError: its memory was given back.
        """
        if self.buffer.address is None:
            raise EngineError("a tensor on the GPU was used after its engine was closed")
        return self.buffer.address
