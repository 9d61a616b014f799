"""Engine files of TensorRT and TensorRT-RTX, run through cuda-bindings. Not yet executed on a GPU.

What is known: every call exists, with these arguments, in TensorRT 10.13, 10.16 and 11.4 and TensorRT-RTX 1.7, and the
logic runs against stand-ins of both libraries (tests/export/test_tensorrt_api.py, tests/runtime/test_tensorrt.py).

How they are called is in `tensorrt_run`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import mmap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import EngineError, plain, shortened
from ..files import MIB, name_of, read_bounded, said_by, written_whole
from ..manifest import EngineRecord
from ..paths import cache_folder
from . import cuda
from .base import DeviceTensor, EngineOptions, StaleEngineError
from .cuda import CudaTensor, gpu_sm
from .tensorrt_run import DTYPES, Device, Execution, TensorRTBound

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
MAX_KERNELS_BYTES = 1024 * MIB


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


def check_identity(record: EngineRecord, version: str, sm: int) -> None:
    """Refuse an engine file that this runtime or this GPU cannot load.

    Args:
        record: of the engine file.
        version: of the runtime that is installed.
        sm: compute capability of the GPU, 89 for 8.9.

    Raises:
        StaleEngineError: it was built by another version, or for other GPUs.
    """
    built_by = record.target.version if record.target else ""
    if built_by != version:
        raise StaleEngineError(
            f"{record.file} ({record.name}) was built by {record.runtime} {built_by}; {version} is installed, and an "
            "engine file runs in the version that built it"
        )
    if sm not in record.sm:
        built = ", ".join(f"SM {number}" for number in record.sm)
        raise StaleEngineError(f"{record.file} ({record.name}) was built for {built}; this GPU is SM {sm}")


def _module(runtime: str) -> Any:
    try:
        return importlib.import_module(MODULES[runtime])
    except ImportError as error:
        raise EngineError(
            f"{runtime} cannot be loaded ({error}); install it with: pip install 'cascade-rt[{runtime}]'"
        ) from error


@functools.cache
def shared_device(runtime: str, device_id: int) -> Device:
    """The one device of a runtime and a GPU in this process."""
    return Device(_module(runtime), cuda.runtime(), device_id)


class TensorRTEngine:
    """An engine file, loaded."""

    def __init__(self, record: EngineRecord, path: Path, options: EngineOptions) -> None:
        """Load an engine file.

        Args:
            record: its manifest record.
            path: of the file.
            options: as `EngineOptions`; the digest names its compiled kernels in the user's cache (TensorRT-RTX).

        Raises:
            StaleEngineError: it was built by another version, or for other GPUs.
            EngineError: TensorRT does not load it, or its inputs and outputs are not those of the manifest.
        """
        if options.provider_options:
            name = shortened(plain(next(iter(options.provider_options))))
            raise EngineError(f"provider {record.runtime} has no option {name}; it takes no provider_options")
        self.spec = record.spec
        sm = gpu_sm(options.device_id)
        check_identity(record, str(_module(record.runtime).__version__), sm)
        self.device = shared_device(record.runtime, options.device_id)
        self._kernels: Any = None
        self._known_kernels = b""
        self._kernels_name = f"{options.digest[:32]}-sm{sm}.cache"
        self._engine: Any = None
        self._execution = Execution(self.spec, self.device, None)
        self._open = True
        self.device.open()
        try:
            with self.device.use():
                self._load(path)
        except BaseException:
            self.close()
            raise

    def _load(self, path: Path) -> None:
        name = self.spec.name
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = self.device.runtime.deserialize_cuda_engine(content)
        self._engine = engine = self.device.demand(engine, f"loading {path.name}")
        found = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        tensors = self.spec.tensors
        if sorted(found) != sorted(t.name for t in tensors):
            raise EngineError(
                f"{path.name} has tensors {found}; the manifest says {[t.name for t in tensors]} for {name}"
            )
        for tensor in tensors:
            dtype = DTYPES.get(engine.get_tensor_dtype(tensor.name).name)
            place = engine.get_tensor_location(tensor.name).name
            if dtype != tensor.dtype or place != "DEVICE":
                raise EngineError(f"{path.name}: {tensor.name} is {dtype} on {place}; the manifest says {tensor.dtype}")
        made = self.device.demand(self._make_context(engine), f"creating a context for {name}")
        self._execution = Execution(self.spec, self.device, made)

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
        self._known_kernels = _kept_kernels(self._kernels_name)
        if self._known_kernels:
            self._kernels.deserialize(self._known_kernels)  # False: of another driver or GPU; made anew, and kept
        self.device.demand(settings.set_runtime_cache(self._kernels), "setting the cache of kernels")
        return engine.create_execution_context(settings)

    @property
    def context(self) -> Any:
        """The execution context.

        Raises:
            EngineError: the engine was closed.
        """
        return self._execution.context

    def bind(self, constants: Mapping[str, DeviceTensor]) -> TensorRTBound:
        """Fix the inputs that do not change between calls."""
        return TensorRTBound(self._execution, {name: self._own(name, tensor) for name, tensor in constants.items()})

    def join(self, tensors: Sequence[DeviceTensor]) -> CudaTensor:
        """Tensors one after the other along the first axis; see `Engine.join`."""
        return self.device.join([self._own("a tensor to join", tensor) for tensor in tensors])

    def rows(self, tensor: DeviceTensor, start: int, stop: int) -> CudaTensor:
        """Some of a tensor's rows; see `Engine.rows`."""
        return self.device.rows(self._own("a tensor", tensor), start, stop)

    def _own(self, what: str, tensor: DeviceTensor) -> CudaTensor:
        if not isinstance(tensor, CudaTensor):
            raise EngineError(f"{self.spec.name}: {what} comes from another runtime than TensorRT")
        return tensor

    def close(self) -> None:
        """Give back its memory; twice is fine. Compiled kernels are kept for the next time."""
        with self.device.use():
            if not self._open:
                return
            self._open = False
            try:
                self.device.stream.wait()
                if self._kernels is not None:
                    kernels = bytes(self._kernels.serialize())
                    if kernels != self._known_kernels:
                        _keep_kernels(self._kernels_name, kernels)
            finally:
                self._execution.close()
                self._kernels = self._engine = None  # after the context, in this order
                self.device.release()

    def __enter__(self) -> TensorRTEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _kept_kernels(name: str) -> bytes:
    """Compiled kernels that were kept; empty where there are none, or where they cannot be read."""
    folder = cache_folder("tensorrt-rtx")
    if folder is None:
        return b""
    try:
        return read_bounded(folder / name, MAX_KERNELS_BYTES, EngineError)
    except (FileNotFoundError, NotADirectoryError):
        return b""
    except EngineError as error:
        warnings.warn(f"compiled kernels are made anew: {error}", RuntimeWarning, stacklevel=2)
        return b""


def _keep_kernels(name: str, content: bytes) -> None:
    """Write compiled kernels. Where that cannot be done they are compiled again next time, and a warning says so."""
    folder = cache_folder("tensorrt-rtx")
    if folder is None:
        return
    try:
        with written_whole(folder / name) as file:
            file.write(content)
    except OSError as error:
        warnings.warn(
            f"compiled kernels cannot be kept in {name_of(folder)}: {said_by(error)}", RuntimeWarning, stacklevel=2
        )
