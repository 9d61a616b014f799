"""What is needed of CUDA: checked calls, memory, graphs (on cuda-bindings). Not yet executed on a GPU.

`gpu_sm` and `copy_within_gpu` call the driver itself and need no package: a machine without a GPU gets an answer
whatever is installed, and ONNX Runtime comes without cuda-bindings.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError
from .failures import MORE_MEMORY, ran_out_of_memory

# CUdevice_attribute: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h
_MAJOR, _MINOR = 75, 76
_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def gpu_sm(device_id: int = 0) -> int:
    """Compute capability of a GPU, 89 for 8.9.

    Raises:
        EngineError: there is no driver, or no such GPU that it can use.
    """
    driver = _driver()
    count, device, major, minor = (ctypes.c_int() for _ in range(4))
    _ask(driver, "cuInit", 0)
    _ask(driver, "cuDeviceGetCount", ctypes.byref(count))
    if not 0 <= device_id < count.value:
        there = f"; device_id is 0 to {count.value - 1}" if count.value else ""
        raise EngineError(f"there is no NVIDIA GPU {device_id} here, the driver has {count.value}{there}")
    _ask(driver, "cuDeviceGet", ctypes.byref(device), device_id)
    _ask(driver, "cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, device)
    _ask(driver, "cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, device)
    return 10 * major.value + minor.value


def copy_within_gpu(target: int, source: int, size: int, device_id: int) -> None:
    """Copy ``size`` bytes between two addresses of one GPU, and wait. It needs the driver only.

    Raises:
        EngineError: the driver is missing, or refuses.
    """
    driver = _driver()
    device, context, left = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    _ask(driver, "cuInit", 0)
    _ask(driver, "cuDeviceGet", ctypes.byref(device), device_id)
    # the context that CUDA's runtime, and so ONNX Runtime, allocates in
    _ask(driver, "cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    try:
        _ask(driver, "cuCtxPushCurrent_v2", context)
        try:
            _ask(driver, "cuMemcpyDtoD_v2", *(ctypes.c_uint64(n) for n in (target, source)), ctypes.c_size_t(size))
            _ask(driver, "cuCtxSynchronize")  # the copy itself does not wait
        finally:
            _ask(driver, "cuCtxPopCurrent_v2", ctypes.byref(left))
    finally:
        _ask(driver, "cuDevicePrimaryCtxRelease_v2", device)


def _driver() -> Any:
    try:
        return ctypes.CDLL(_DRIVER)
    except OSError:
        raise EngineError(f"there is no NVIDIA GPU here (the driver's {_DRIVER} is not found)") from None


def _ask(driver: Any, name: str, *arguments: Any) -> None:
    if status := getattr(driver, name)(*arguments):
        raise EngineError(f"there is no NVIDIA GPU here that can be used ({name} gives status {status})")


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
        hint = f"; {MORE_MEMORY}" if ran_out_of_memory(f"{reason} {status}") else ""
        raise EngineError(f"{what} failed: {reason}{hint}")
    return values[0] if len(values) == 1 else tuple(values)


@contextmanager
def on_device(rt: Any, device_id: int) -> Iterator[None]:
    """Within, this thread's calls of CUDA go to one GPU; afterwards to the one that they went to before.

    Raises:
        EngineError: there is no such GPU.
    """
    before = check(rt, "cudaGetDevice", rt.cudaGetDevice())
    if before == device_id:
        yield
        return
    check(rt, f"cudaSetDevice {device_id}", rt.cudaSetDevice(device_id))
    try:
        yield
    finally:
        check(rt, f"cudaSetDevice {before}", rt.cudaSetDevice(before))


class Stream:
    """A stream and the calls that are queued on it. Closing twice is fine."""

    def __init__(self, rt: Any) -> None:
        self.rt = rt
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
    def size(self) -> int:
        """Bytes."""
        return self.buffer.size

    @property
    def address(self) -> int:
        """Where it lies."""
        return int(self.buffer.handle)
