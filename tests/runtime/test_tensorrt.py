# ruff: noqa: ARG002 - stand-ins take what the real ones take
"""The logic of the TensorRT runtime, over stand-ins of TensorRT and CUDA in which "device memory" is host memory.

What this shows: staging, ownership, scratch, graphs, refusals, closing. What it cannot show: that a GPU does the same.
"""

from __future__ import annotations

import ctypes
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cascade_rt import paths
from cascade_rt.backends import EngineOptions, StaleEngineError, cuda, resolve_provider, tensorrt
from cascade_rt.backends.cuda import CudaTensor
from cascade_rt.errors import EngineError
from cascade_rt.manifest import EngineRecord, Runtime, Target
from cascade_rt.stages import PRECISIONS, AxisRange, DType, EngineSpec, TensorSpec

RANGES = {"batch": AxisRange(min=1, opt=2, max=4), "width": AxisRange(min=2, opt=4, max=64, multiple=2)}


def tensor(name: str, dtype: DType = "float32", constant: bool = False) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, axes=("batch", "width"), constant=constant)


def spec(name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> EngineSpec:
    return EngineSpec(name=name, stage="c", model="stage_c", inputs=inputs, outputs=outputs, ranges=RANGES)


KV = tensor("kv", "float16", constant=True)
CONTEXT = spec("stage_c.context", (tensor("clip_text"),), (KV,))
STEP = spec("stage_c.step", (tensor("latents"), KV), (tensor("prediction"),))


def at(address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, Any]:
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    block = (ctypes.c_uint8 * count).from_address(address)
    return np.frombuffer(memoryview(block), np.uint8).view(dtype).reshape(shape)


class FakeCuda:
    """As much of ``cuda.bindings.runtime`` as is used; every function returns a tuple that begins with its status."""

    cudaError_t = types.SimpleNamespace(cudaSuccess=0)  # noqa: N815
    cudaMemcpyKind = types.SimpleNamespace(  # noqa: N815
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    cudaStreamCaptureMode = types.SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815
    cudaStreamNonBlocking = 1  # noqa: N815

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.log: list[str] = []
        self.recording: list[Callable[[], None]] | None = None
        self.room = 1 << 20
        self.capture_fails = False
        self.current = 0
        self.used: set[int] = set()

    def cudaGetDevice(self) -> tuple[Any, ...]:  # noqa: N802
        return 0, self.current

    def cudaSetDevice(self, number: int) -> tuple[Any, ...]:  # noqa: N802
        self.current = number
        return (0,) if number < 2 else (101,)

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:  # noqa: N802
        if size > self.room:
            return 2, None
        block = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(block)] = block
        self.used.add(self.current)
        return 0, ctypes.addressof(block)

    cudaMallocHost = cudaMalloc  # noqa: N815

    def cudaFree(self, address: int) -> tuple[Any, ...]:  # noqa: N802
        del self.memory[address]
        return (0,)

    cudaFreeHost = cudaFree  # noqa: N815

    def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple[Any, ...]:  # noqa: N802
        ctypes.memmove(target, source, size)
        return (0,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:  # noqa: N802
        self.log.append("stream")
        return 0, 7

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        self.log.append("stream gone")
        return (0,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Any, ...]:  # noqa: N802
        self.recording = []
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        recorded, self.recording = self.recording, None
        return (900, None) if self.capture_fails else (0, recorded)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:  # noqa: N802
        return 0, graph

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]:  # noqa: N802
        return (0,)

    def cudaGraphLaunch(self, graph: Any, stream: int) -> tuple[Any, ...]:  # noqa: N802
        self.log.append("graph")
        for work in graph:
            work()
        return (0,)

    def cudaGraphExecDestroy(self, graph: Any) -> tuple[Any, ...]:  # noqa: N802
        self.log.append("graph gone")
        return (0,)

    def cudaGetErrorString(self, status: int) -> tuple[Any, ...]:  # noqa: N802
        return 0, b"out of memory" if status == 2 else b"operation not permitted"


class FakeContext:
    """Computes ``kv = 2 * clip_text`` or ``prediction = latents + kv`` at the addresses that it was given."""

    def __init__(self, spec: EngineSpec, device: FakeCuda) -> None:
        self.spec, self.device = spec, device
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch = (0, 0)
        self.works = True
        self.more = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        return [t.name for t in self.spec.inputs if t.name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (*self.shapes[self.spec.inputs[0].name][:-1], self.shapes[self.spec.inputs[0].name][-1] + self.more)

    def update_device_memory_size_for_shapes(self) -> int:
        return 16 * int(np.prod(self.shapes[self.spec.inputs[0].name]))

    def set_device_memory(self, address: int, size: int) -> None:
        self.scratch = address, size

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if not self.works:
            return False
        address, size = self.scratch
        addresses, shape = dict(self.addresses), self.shapes[self.spec.inputs[0].name]

        def work() -> None:
            ctypes.memset(address, 255, size)  # scratch holds nothing between calls
            tensors = {t.name: at(addresses[t.name], shape, t.dtype) for t in (*self.spec.inputs, *self.spec.outputs)}
            if "kv" in addresses and len(tensors) == 2:
                tensors["kv"][:] = 2 * tensors["clip_text"]
            else:
                tensors["prediction"][:] = tensors["latents"] + tensors["kv"]

        if self.device.recording is not None:
            self.device.recording.append(work)
        else:
            self.device.log.append("plain")
            work()
        return True


class FakeEngine:
    dtypes = {"float32": "FLOAT", "float16": "HALF"}  # noqa: RUF012

    def __init__(self, spec: EngineSpec, device: FakeCuda) -> None:
        self.tensors = {t.name: t for t in (*spec.inputs, *spec.outputs)}
        self.num_io_tensors = len(self.tensors)
        self.context = FakeContext(spec, device)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return types.SimpleNamespace(name=self.dtypes[self.tensors[name].dtype])

    def get_tensor_location(self, name: str) -> Any:
        return types.SimpleNamespace(name="DEVICE")

    def create_execution_context(self, strategy: str) -> FakeContext:
        assert strategy == "USER_MANAGED"
        return self.context


class FakeRuntime:
    """Loads "plans" that are the name of an engine."""

    def __init__(self, log: Any, device: FakeCuda) -> None:
        self.log, self.device = log, device

    def deserialize_cuda_engine(self, plan: Any) -> FakeEngine | None:
        for spec in (CONTEXT, STEP):
            if bytes(plan) == spec.name.encode():
                return FakeEngine(spec, self.device)
        self.log.log("ERROR", "magic tag does not match")
        return None


def fake_tensorrt(device: FakeCuda) -> Any:
    class ILogger:
        Severity = types.SimpleNamespace(ERROR="ERROR", INTERNAL_ERROR="INTERNAL_ERROR")

    return types.SimpleNamespace(
        __version__="11.4.0",
        ILogger=ILogger,
        Runtime=lambda log: FakeRuntime(log, device),
        ExecutionContextAllocationStrategy=types.SimpleNamespace(USER_MANAGED="USER_MANAGED"),
    )


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    fake = FakeCuda()
    library = fake_tensorrt(fake)
    monkeypatch.setattr(cuda, "runtime", lambda: fake)
    monkeypatch.setattr(tensorrt, "gpu_sm", lambda *_: 89)
    monkeypatch.setattr(tensorrt, "_module", lambda runtime: library)
    tensorrt.shared_device.cache_clear()
    yield fake
    tensorrt.shared_device.cache_clear()


def record(
    spec: EngineSpec, sm: tuple[int, ...] = (86, 89), version: str = "11.4.0", runtime: Runtime = "tensorrt"
) -> EngineRecord:
    return EngineRecord.of(
        spec,
        precision=PRECISIONS["fp16"],
        runtime=runtime,
        file=f"{spec.name}.engine",
        weights=(),
        tools={},
        target=Target(sm=sm, version=version, profile={}, flags=(), graph_sha256="0" * 64, weights_sha256=()),
    )


def load(spec: EngineSpec, folder: Path, **options: Any) -> tensorrt.TensorRTEngine:
    path = folder / f"{spec.name}.engine"
    path.write_bytes(spec.name.encode())
    return tensorrt.TensorRTEngine(record(spec), path, EngineOptions(digest="0" * 64, **options))


def latents(value: float, shape: tuple[int, int] = (2, 4)) -> dict[str, Any]:
    return {"latents": np.full(shape, value, dtype=np.float32)}


def make_context(folder: Path, value: float, shape: tuple[int, int] = (2, 4)) -> dict[str, Any]:
    with load(CONTEXT, folder) as engine:
        return dict(engine.bind({})({"clip_text": np.full(shape, value, dtype=np.float32)}))


def test_context_stays_on_the_device_and_outlives_its_engine(device: FakeCuda, tmp_path: Path) -> None:
    context = make_context(tmp_path, 1.5)
    assert isinstance(context["kv"], CudaTensor)
    assert (context["kv"].shape, context["kv"].dtype) == ((2, 4), "float16")
    with load(STEP, tmp_path) as engine:
        assert np.all(engine.bind(context)(latents(1))["prediction"] == 4)


def test_results_are_owned(device: FakeCuda, tmp_path: Path) -> None:
    with load(STEP, tmp_path) as engine:
        run = engine.bind(make_context(tmp_path, 0))
        results = [run(latents(value))["prediction"] for value in (1, 2, 3)]
    assert [float(np.mean(r)) for r in results] == [1, 2, 3]  # type: ignore[arg-type]


def test_device_outputs_are_owned(device: FakeCuda, tmp_path: Path) -> None:
    with load(CONTEXT, tmp_path) as engine:
        run = engine.bind({})
        first, second = (run({"clip_text": np.full((1, 2), v, dtype=np.float32)})["kv"] for v in (1, 2))
    assert isinstance(first, CudaTensor)
    assert isinstance(second, CudaTensor)
    assert np.all(at(first.address, (1, 2), "float16") == 2)
    assert np.all(at(second.address, (1, 2), "float16") == 4)


def test_a_step_becomes_a_graph_in_its_second_call(device: FakeCuda, tmp_path: Path) -> None:
    context = make_context(tmp_path, 0)
    device.log.clear()
    with load(STEP, tmp_path) as engine:
        run = engine.bind(context)
        values = [float(np.mean(run(latents(v))["prediction"])) for v in (1, 2, 3)]  # type: ignore[arg-type]
    assert values == [1, 2, 3]
    assert device.log[:4] == ["stream", "plain", "graph", "graph"]


def test_another_shape_or_another_user_of_the_context_gets_no_stale_graph(device: FakeCuda, tmp_path: Path) -> None:
    small, large = make_context(tmp_path, 1), make_context(tmp_path, 2, (4, 8))
    with load(STEP, tmp_path) as engine:
        first, second = engine.bind(small), engine.bind(large)
        for value in (1, 2, 3):
            for run, shape, more in ((first, (2, 4), 2), (first, (2, 4), 2), (second, (4, 8), 4), (second, (4, 8), 4)):
                result = run(latents(value, shape))["prediction"]
                assert result.shape == shape
                assert np.all(result == value + more)


def test_scratch_is_shared_and_grows(device: FakeCuda, tmp_path: Path) -> None:
    small, large = make_context(tmp_path, 1), make_context(tmp_path, 1, (4, 8))
    with load(STEP, tmp_path) as one, load(STEP, tmp_path) as two:
        run = one.bind(small)
        run(latents(1))
        run(latents(1))
        before = one.context.scratch
        two.bind(large)(latents(1, (4, 8)))
        assert two.context.scratch[1] > before[1]
        assert np.all(run(latents(5))["prediction"] == 7)
        assert one.context.scratch[0] == two.context.scratch[0]


def test_a_graph_that_cannot_be_recorded_is_reported_once(device: FakeCuda, tmp_path: Path) -> None:
    device.capture_fails = True
    context = make_context(tmp_path, 0)
    with load(STEP, tmp_path) as engine:
        run = engine.bind(context)
        run(latents(1))
        with pytest.warns(RuntimeWarning, match=r"stage_c.step runs without a CUDA graph.*operation not permitted"):
            assert np.all(run(latents(2))["prediction"] == 2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert np.all(run(latents(3))["prediction"] == 3)
    assert "graph" not in device.log


def test_closing_twice_gives_everything_back_once(device: FakeCuda, tmp_path: Path) -> None:
    context = make_context(tmp_path, 0)
    engine = load(STEP, tmp_path)
    run = engine.bind(context)
    run(latents(1))
    engine.close()
    engine.close()
    assert device.log.count("stream gone") == device.log.count("stream") == 2
    with pytest.raises(EngineError, match=r"stage_c.step was closed"):
        run(latents(1))
    del run, context, engine
    assert device.memory == {}


def test_failures_are_said(device: FakeCuda, tmp_path: Path) -> None:
    context = make_context(tmp_path, 0)
    with load(STEP, tmp_path) as engine:
        run = engine.bind(context)
        engine.context.works = False
        with pytest.raises(EngineError, match=r"running stage_c.step failed: TensorRT gave no reason"):
            run(latents(1))
        device.room = 8
        with pytest.raises(EngineError, match=r"cudaMallocHost failed: out of memory; use --low-memory, or"):
            engine.bind(context)(latents(1))
    (tmp_path / "bad.engine").write_bytes(b"garbage")
    with pytest.raises(EngineError, match=r"loading bad.engine failed: magic tag does not match"):
        tensorrt.TensorRTEngine(record(STEP), tmp_path / "bad.engine", EngineOptions())
    other = replace(STEP, outputs=(tensor("prediction", "int64"),))
    with pytest.raises(EngineError, match=r"prediction is float32 on DEVICE; the manifest says int64"):
        tensorrt.TensorRTEngine(record(other), tmp_path / "stage_c.step.engine", EngineOptions())
    assert device.log.count("stream gone") == device.log.count("stream")


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"latents": np.zeros((2, 4))}, "dtype float64; it must be float32"),
        (latents(1, (2, 5)), "width 5; this engine takes 2..64 in multiples of 2"),
        (latents(1, (3, 4)), "batch 2, another input has 3"),
        ({}, "without latents"),
    ],
)
def test_a_call_is_exact(device: FakeCuda, tmp_path: Path, feeds: dict[str, Any], message: str) -> None:
    context = make_context(tmp_path, 0)
    with load(STEP, tmp_path) as engine, pytest.raises(EngineError, match=message):
        engine.bind(context)(feeds)


@pytest.mark.parametrize(
    ("version", "sm", "message"),
    [
        ("11.4.0", 89, None),
        ("10.16.1.11", 89, r"was built by tensorrt 11.4.0; 10.16.1.11 is installed"),
        ("11.4.0", 90, r"was built for SM 86, SM 89; this GPU is SM 90"),
    ],
)
def test_identity(version: str, sm: int, message: str | None) -> None:
    if message is None:
        tensorrt.check_identity(record(STEP), version, sm)
        return
    with pytest.raises(StaleEngineError, match=message):
        tensorrt.check_identity(record(STEP), version, sm)


def test_a_stale_engine_is_not_loaded(device: FakeCuda, tmp_path: Path) -> None:
    with pytest.raises(StaleEngineError, match=r"was built by tensorrt 11.3.0; 11.4.0 is installed"):
        tensorrt.TensorRTEngine(record(STEP, version="11.3.0"), tmp_path / "none.engine", EngineOptions())
    assert device.log == []


def test_rows_of_two_requests_share_a_call(device: FakeCuda, tmp_path: Path) -> None:
    one, two = (make_context(tmp_path, value, (rows, 4)) for value, rows in ((1, 1), (3, 2)))
    with load(STEP, tmp_path) as engine:
        both = engine.join([one["kv"], two["kv"]])
        assert (both.shape, both.dtype) == ((3, 4), "float16")
        made = engine.bind({"kv": both})(latents(0.5, (3, 4)))["prediction"]
        np.testing.assert_array_equal(made, np.repeat([[2.5], [6.5], [6.5]], 4, axis=1))
        last = engine.rows(both, 2, 3)
        np.testing.assert_array_equal(engine.bind({"kv": last})(latents(0, (1, 4)))["prediction"], [[6, 6, 6, 6]])
        for call, message in (
            (lambda: engine.join([one["kv"], make_context(tmp_path, 0, (1, 6))["kv"]]), "cannot be joined"),
            (lambda: engine.join([]), "at least one"),
            (lambda: engine.rows(both, 2, 4), "has no rows 2 to 4"),
            (lambda: engine.join([np.zeros((1, 4))]), "another runtime than TensorRT"),  # type: ignore[list-item]
        ):
            with pytest.raises(EngineError, match=message):
                call()


def test_an_engine_that_would_write_more_than_its_formulas_say_is_not_run(device: FakeCuda, tmp_path: Path) -> None:
    context = make_context(tmp_path, 0)
    with load(STEP, tmp_path) as engine:
        engine.context.more = 2
        device.log.clear()
        with pytest.raises(EngineError, match=r"TensorRT makes prediction of shape \(2, 6\).*which is \(2, 4\) here"):
            engine.bind(context)(latents(1))
        assert "plain" not in device.log


def test_another_gpu_is_used_and_left_again(device: FakeCuda, tmp_path: Path) -> None:
    with load(CONTEXT, tmp_path, device_id=1) as engine:
        assert device.current == 0
        device.used.clear()
        engine.bind({})({"clip_text": np.zeros((1, 2), np.float32)})
        assert device.used == {1}
        assert device.current == 0
    with pytest.raises(EngineError, match="cudaSetDevice 2 failed"):
        load(CONTEXT, tmp_path, device_id=2)


def test_no_option_is_ignored(device: FakeCuda, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="provider tensorrt has no option foo; it takes no provider_options"):
        load(STEP, tmp_path, provider_options={"foo": "1"})


def test_a_machine_without_a_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_DRIVER", "libno-such-driver.so")
    with pytest.raises(EngineError, match="no NVIDIA GPU here"):
        cuda.gpu_sm()
    for provider in ("tensorrt", "tensorrt-rtx"):
        with pytest.raises(EngineError, match=rf"provider {provider} is not available here.*cascade-rt\[{provider}\]"):
            resolve_provider(provider)


def test_compiled_kernels_are_kept_and_where_they_cannot_be_it_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tensorrt._kept_kernels("a.cache") == b""
    tensorrt._keep_kernels("a.cache", b"kernels")
    assert tensorrt._kept_kernels("a.cache") == b"kernels"
    folder = tmp_path / "cache" / "cascade-rt" / "tensorrt-rtx"
    assert [file.name for file in folder.iterdir()] == ["a.cache"]
    (folder / "b.cache").mkdir()
    with pytest.warns(RuntimeWarning, match=r"compiled kernels are made anew: .*b.cache is no regular file"):
        assert tensorrt._kept_kernels("b.cache") == b""
    with pytest.warns(RuntimeWarning, match="compiled kernels cannot be kept in .*: Is a directory"):
        tensorrt._keep_kernels("b.cache", b"kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "a.cache"))
    paths._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"nothing can be kept between runs below .*a.cache: Not a directory"):
        tensorrt._keep_kernels("c.cache", b"kernels")
    assert tensorrt._kept_kernels("c.cache") == b"", "and this is said once"
