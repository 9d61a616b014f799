"""TensorRT and TensorRT-RTX plans, run through cuda-bindings. Not yet executed on a GPU.

What is known: every call exists, with these arguments, in TensorRT 10.13, 10.16 and 11.4 and TensorRT-RTX 1.7, and the
logic runs against stand-ins of both libraries (tests/export/test_tensorrt_api.py, tests/runtime/test_tensorrt.py).

How plans are called is in `tensorrt_run`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import mmap
import os
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ..bundle import Bundle, EngineRecord
from ..errors import EngineError
from ..paths import cache_dir
from .base import DeviceTensor
from .cuda import CudaTensor, gpu_sm
from .tensorrt_run import DTYPES, Call, Device, TensorRTBound

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def problem(runtime: str) -> str | None:
    """Why a runtime cannot be used on this machine; None if it can."""
    for package, part in ((MODULES[runtime], ""), ("cuda", ".bindings")):
        if importlib.util.find_spec(package) is None or importlib.util.find_spec(package + part) is None:
            return f"the package {package}{part} is not installed"
    try:
        gpu_sm()
    except EngineError as error:
        return str(error)
    return None


def check_identity(record: EngineRecord, version: str, sm: int, command: str) -> None:
    """Refuse a plan that this runtime or this GPU cannot load.

    Args:
        record: of the plan.
        version: of the runtime that is installed.
        sm: compute capability of the GPU, 89 for 8.9.
        command: that builds it again.

    Raises:
        EngineError: it was built by another version, or for other GPUs.
    """
    name, target = record.spec.name, record.target or {}
    if target.get("version") != version:
        raise EngineError(
            f"{record.file} ({name}) was built by {record.runtime} {target.get('version')}; {version} is installed, "
            f"and plans run in the version that built them. Build it again with: {command} --overwrite"
        )
    if sm not in record.sm:
        built = ", ".join(f"SM {number}" for number in record.sm)
        raise EngineError(
            f"{record.file} ({name}) was built for {built}; this GPU is SM {sm}. Build it with: {command}"
        )


def open_plan(bundle: Bundle, name: str, runtime: str) -> TensorRTEngine:
    """Load the plan of an engine that is for this GPU.

    Raises:
        BundleError: the bundle has none, or its file is damaged.
        EngineError: it is of another version, or cannot be loaded.
    """
    sm = gpu_sm()
    record = bundle.engine(name, runtime, sm)
    command = bundle.command(name, runtime, sm)
    check_identity(record, str(_module(runtime).__version__), sm, command)
    path = bundle.file(record.file)
    return TensorRTEngine(record, path, bundle.manifest.files[record.file]["sha256"])


def _module(runtime: str) -> Any:
    try:
        return importlib.import_module(MODULES[runtime])
    except ImportError as error:
        raise EngineError(
            f"{runtime} cannot be loaded ({error}); install it with: pip install 'cascade-rt[{runtime}]'"
        ) from error


@functools.cache
def shared_device(runtime: str) -> Device:
    """The one device of a runtime in this process."""
    return Device(_module(runtime))


class TensorRTEngine:
    """A plan, loaded."""

    def __init__(self, record: EngineRecord, path: Path, digest: str) -> None:
        """Load a plan.

        Args:
            record: its manifest record, checked with `check_identity`.
            path: the plan.
            digest: its hash, which names its compiled kernels in the user's cache (TensorRT-RTX).

        Raises:
            EngineError: TensorRT does not load it, or its inputs and outputs are not those of the manifest.
        """
        self.spec = record.spec
        self.device = shared_device(record.runtime)
        self.active: weakref.ref[Call] | None = None  # whose shapes and addresses the context has
        self._kernels: Any = None
        self._known_kernels = b""
        self._kernels_file = cache_dir() / "tensorrt-rtx" / f"{digest[:32]}-sm{gpu_sm()}.cache"
        self._engine: Any = None
        self._context: Any = None
        self._open = True
        self.device.open()
        try:
            with self.device.lock:
                self._load(path)
        except BaseException:
            self.close()
            raise

    def _load(self, path: Path) -> None:
        name = self.spec.name
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
            engine = self.device.runtime.deserialize_cuda_engine(plan)
        self._engine = engine = self.device.demand(engine, f"loading {path.name}")
        found = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        tensors = (*self.spec.inputs, *self.spec.outputs)
        if sorted(found) != sorted(t.name for t in tensors):
            raise EngineError(
                f"{path.name} has tensors {found}; the manifest says {[t.name for t in tensors]} for {name}"
            )
        for tensor in tensors:
            dtype = DTYPES.get(engine.get_tensor_dtype(tensor.name).name)
            place = engine.get_tensor_location(tensor.name).name
            if dtype != tensor.dtype or place != "DEVICE":
                raise EngineError(f"{path.name}: {tensor.name} is {dtype} on {place}; the manifest says {tensor.dtype}")
        self._context = self.device.demand(self._make_context(engine), f"creating a context for {name}")

    def _make_context(self, engine: Any) -> Any:
        trt = self.device.trt
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            return engine.create_execution_context(strategy)
        # TensorRT-RTX compiles kernels on this GPU: at once, not in the background, so that a graph records the last
        settings = engine.create_runtime_config()
        settings.set_execution_context_allocation_strategy(strategy)
        settings.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        settings.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # `Call` records graphs itself
        self._kernels = settings.create_runtime_cache()
        if self._kernels_file.is_file():
            self._known_kernels = self._kernels_file.read_bytes()
            self._kernels.deserialize(self._known_kernels)  # False: of another driver or GPU; made anew, and kept
        self.device.demand(settings.set_runtime_cache(self._kernels), "setting the cache of kernels")
        return engine.create_execution_context(settings)

    @property
    def context(self) -> Any:
        """The execution context.

        Raises:
            EngineError: the engine was closed.
        """
        if self._context is None:
            raise EngineError(f"{self.spec.name} was closed")
        return self._context

    def bind(self, constants: Mapping[str, DeviceTensor]) -> TensorRTBound:
        """Fix the inputs that do not change between calls."""
        values = {}
        for name, tensor in constants.items():
            if not isinstance(tensor, CudaTensor):
                raise EngineError(f"{self.spec.name}: {name} comes from another runtime than TensorRT")
            values[name] = tensor
        return TensorRTBound(self, values)

    def close(self) -> None:
        """Give back its memory; twice is fine. Compiled kernels are kept for the next time."""
        with self.device.lock:
            if not self._open:
                return
            self._open = False
            try:
                self.device.stream.wait()
                if self._kernels is not None and self._context is not None:
                    kernels = bytes(self._kernels.serialize())
                    if kernels != self._known_kernels:
                        _write(self._kernels_file, kernels)
            finally:
                self._context = self._kernels = self._engine = None  # in this order
                self.device.release()

    def __enter__(self) -> TensorRTEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _write(path: Path, content: bytes) -> None:
    """Write a file of the cache. Where that cannot be done kernels are compiled again next time, and that is said."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        warnings.warn(f"compiled kernels cannot be kept in {path}: {error.strerror}", RuntimeWarning, stacklevel=2)
