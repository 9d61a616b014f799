# ruff: noqa: ARG002 - stand-ins take what the real ones take
"""ONNX Runtime's engines at work: sizes, and calls at fixed addresses.

CUDA's way of calling runs here over the CPU provider: I/O binding, copies between tensors and the order of calls are
the real ones, only nothing is recorded.
"""

from __future__ import annotations

import ctypes
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from msgspec.structs import replace

from cascade_rt import CascadePipeline, EngineError, backends
from cascade_rt.backends import cuda
from cascade_rt.backends import ort as ort_backend
from cascade_rt.backends.base import EngineOptions
from cascade_rt.backends.ort import OrtEngine
from cascade_rt.backends.ort_cuda import GRAPH_ID, CudaBound, CudaCalls
from cascade_rt.backends.ort_options import TABLE, OrtProvider, fixed_dimensions
from cascade_rt.backends.ort_session import OrtTensor, Session, join, rows
from cascade_rt.bundle import Bundle
from cascade_rt.stages import ENGINES, AxisRange
from opened import conditions, context, latents, open_of, skip_without_gpu_calls


@pytest.fixture
def bound_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Provider ``cuda``, as it is called, over ONNX Runtime's CPU provider."""
    skip_without_gpu_calls()
    monkeypatch.setitem(TABLE, "cuda", OrtProvider(ep=TABLE["cpu"].ep, graphs=2))
    monkeypatch.setattr(ort_backend, "strays_of", lambda session: [])


def step(bundle: Bundle, provider: str = "cuda") -> OrtEngine:
    engine = open_of(bundle, "stage_c.step", provider)
    assert isinstance(engine, OrtEngine)
    return engine


def recorded(engine: OrtEngine) -> CudaCalls:
    assert isinstance(engine.calls, CudaCalls)
    return engine.calls


def expected(bundle: Bundle, prompt: int, noise: int, batch: int = 1, side: int = 4) -> np.ndarray[Any, Any]:
    with step(bundle, "cpu") as engine:
        made = engine.bind(context(bundle, "cpu", prompt, batch))(latents(noise, batch, side))["prediction"]
    assert isinstance(made, np.ndarray)
    return made


class Calls:
    """Every run by I/O binding: the number of the graph that it asks for, None where it names none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail: str | None = None) -> None:
        self.graphs: list[str | None] = []
        real = ort.InferenceSession.run_with_iobinding

        def run(session: Any, binding: Any, options: Any = None) -> None:
            self.graphs.append(options.get_run_config_entry(GRAPH_ID) if options is not None else None)
            if fail is not None and options is not None:
                raise RuntimeError(fail)
            real(session, binding, options)

        monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", run)


def test_a_fixed_axis_specialises_the_session_and_changes_no_number(bundle: Bundle) -> None:
    record = bundle.engine("stage_c.step", "onnx")
    sizes = {"batch": 1, "height": 4, "width": 4, "steps": 3}
    ranges = {**record.ranges, **{name: AxisRange(min=size, opt=size, max=size) for name, size in sizes.items()}}
    fixed = replace(record, ranges=ranges)
    assert fixed_dimensions(fixed.spec) == sizes
    constants = context(bundle, "cpu", seed=1)
    with OrtEngine(fixed, bundle.path / record.file, "cpu", EngineOptions(threads=1)) as engine:
        shapes = {i.name: i.shape for i in engine.calls.session.runtime.get_inputs()}
        assert shapes["latents"] == [1, 16, 4, 4]
        assert shapes["kv_0"][3] == "condition_tokens", "an axis with several sizes stays free"
        made = engine.bind(constants)(latents(2))["prediction"]
        with pytest.raises(EngineError, match=r"latents has height 6; this engine takes 4\.\.4"):
            engine.bind(constants)(latents(2, side=6))
    np.testing.assert_allclose(made, expected(bundle, 1, 2), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("bound_on_cpu")
def test_a_picture_is_the_same_bound_or_not(shipped: Path) -> None:
    made = []
    for provider in ("cuda", "cpu"):
        with CascadePipeline.from_pretrained(shipped, provider="cpu", threads=1) as pipe:
            pipe._runner.engines.provider = provider
            pipe.set_progress_bar_config(disable=True)
            out = pipe("a red circle", seed=3, prior_num_inference_steps=3, num_inference_steps=2, output_type="np")
            made.append(np.asarray(out.images))
    np.testing.assert_array_equal(*made)
    assert made[0].std() > 0.05, "a flat picture would prove nothing"


@pytest.mark.usefixtures("bound_on_cpu")
def test_another_prompt_is_copied_to_where_the_graph_reads(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [context(bundle, "cuda", seed) for seed in (1, 2)]
    calls = Calls(monkeypatch)
    with step(bundle) as engine:
        first, second = (engine.bind(prompt) for prompt in prompts)
        made = [bound(latents(7))["prediction"] for bound in (first, second, first)]
    assert calls.graphs == ["1", "1", "1"]
    np.testing.assert_allclose(made[0], expected(bundle, 1, 7), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(made[1], expected(bundle, 2, 7), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(made[2], made[0])
    assert np.abs(np.asarray(made[1]) - np.asarray(made[0])).max() > 1e-3


@pytest.mark.usefixtures("bound_on_cpu")
def test_the_constants_of_a_prompt_are_copied_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = context(bundle, "cuda", 1)
    copied = []
    real = ort.OrtValue.update_inplace
    monkeypatch.setattr(ort.OrtValue, "update_inplace", lambda self, data: (copied.append(data), real(self, data))[1])
    with step(bundle) as engine:
        bound = engine.bind(prompt)
        for seed in range(3):
            bound(latents(seed))
    assert sum(isinstance(data, ort.OrtValue) for data in copied) == len(prompt)
    assert sum(isinstance(data, np.ndarray) for data in copied) == 3 * 2


@pytest.mark.usefixtures("bound_on_cpu")
def test_results_are_owned_and_addresses_stay(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    bindings = []
    real = ort.InferenceSession.run_with_iobinding
    monkeypatch.setattr(
        ort.InferenceSession,
        "run_with_iobinding",
        lambda self, binding, options=None: (bindings.append(binding), real(self, binding, options))[1],
    )
    prompt = context(bundle, "cuda", 1)
    bindings.clear()
    with step(bundle) as engine:
        bound = engine.bind(prompt)
        first = np.asarray(bound(latents(1))["prediction"])
        kept = first.copy()
        bound(latents(2))
    np.testing.assert_array_equal(first, kept)
    assert bindings[0] is bindings[1]


@pytest.mark.usefixtures("bound_on_cpu")
def test_every_set_of_shapes_has_its_graph_and_there_are_few(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = context(bundle, "cuda", 1)
    calls = Calls(monkeypatch)
    released: list[int] = []
    monkeypatch.setattr(ort.InferenceSession, "release_captured_graph", lambda self, number=0: released.append(number))
    with step(bundle) as engine:
        bound = engine.bind(prompt)
        for side in (4, 6, 4, 8, 4, 6):
            made = bound(latents(1, side=side))["prediction"]
            np.testing.assert_allclose(made, expected(bundle, 1, 1, side=side), rtol=1e-5, atol=1e-6)
    bound_runs = [graph for graph in calls.graphs if graph is not None]
    assert bound_runs == ["1", "2", "1", "3", "1", "4"], "6 was dropped for 8, 4 was used meanwhile"
    assert released == [2, 3]


@pytest.mark.usefixtures("bound_on_cpu")
def test_context_tensors_are_new_in_every_call(bundle: Bundle) -> None:
    with open_of(bundle, "stage_c.context", "cuda") as engine:
        bound = engine.bind({})
        assert isinstance(bound, CudaBound)
        first = bound(conditions(bundle, 1))["kv_0"]
        assert isinstance(first, OrtTensor)
        kept = first.value.numpy().copy()
        second = bound(conditions(bundle, 2))["kv_0"]
    assert isinstance(second, OrtTensor)
    assert first.value.data_ptr() != second.value.data_ptr()
    np.testing.assert_array_equal(first.value.numpy(), kept)


@pytest.mark.usefixtures("bound_on_cpu")
def test_a_graph_that_cannot_be_recorded_is_reported_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = context(bundle, "cuda", 1)
    calls = Calls(monkeypatch, fail="operation not permitted when stream is capturing\nand more")
    with step(bundle) as engine:
        bound = engine.bind(prompt)
        calls_of_engine = recorded(engine)
        before = weakref.ref(calls_of_engine.session.runtime)
        alive = []

        def opened(recording: bool) -> Any:
            gc.collect()
            alive.append(before() is not None)
            return real(recording)

        real = calls_of_engine._open
        monkeypatch.setattr(calls_of_engine, "_open", opened)
        with pytest.warns(
            RuntimeWarning, match=r"stage_c.step runs without a CUDA graph, kernel by kernel: .*not permitted when"
        ):
            made = bound(latents(5))["prediction"]
        assert alive == [False], "a GPU may not hold the weights twice"
        np.testing.assert_allclose(made, expected(bundle, 1, 5), rtol=1e-5, atol=1e-6)
        bound(latents(6))  # a second warning would be an error
    assert calls.graphs == ["1", None, None]


def test_a_session_that_refuses_graphs_is_opened_without(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    row = OrtProvider(ep=TABLE["cpu"].ep, recording={"enable_cuda_graph": "1"}, graphs=4)
    monkeypatch.setitem(TABLE, "cuda", row)
    monkeypatch.setattr(ort_backend, "strays_of", lambda session: [])
    real = ort.InferenceSession

    def make(path: Path, options: Any, providers: Any, **rest: Any) -> Any:
        if providers[0][1]:
            raise RuntimeError("This session cannot use the graph capture feature as requested by the user")
        return real(path, options, providers=providers, **rest)

    monkeypatch.setattr(ort, "InferenceSession", make)
    with pytest.warns(RuntimeWarning, match=r"stage_c.step runs without a CUDA graph.*graph capture feature"):
        engine = step(bundle)
    assert recorded(engine).recorder is None
    engine.close()

    def refuse(*args: Any, **rest: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ort, "InferenceSession", refuse)
    with pytest.raises(EngineError, match="out of memory"):  # and no warning that blames graphs
        step(bundle)


def test_tensorrt_records_one_set_of_shapes_and_says_when_it_stops(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its provider would replay the graph of other shapes."""
    skip_without_gpu_calls()
    monkeypatch.setitem(TABLE, "cuda", OrtProvider(ep=TABLE["cpu"].ep, graphs=TABLE["ort-tensorrt"].graphs))
    monkeypatch.setattr(ort_backend, "strays_of", lambda session: [])
    prompt = context(bundle, "cuda", 1)
    with step(bundle) as engine:
        bound = engine.bind(prompt)
        bound(latents(1))
        bound(latents(2))
        assert recorded(engine).recorder is not None
        with pytest.warns(RuntimeWarning, match="records one set of shapes"):
            made = bound(latents(1, side=6))["prediction"]
        np.testing.assert_allclose(made, expected(bundle, 1, 1, side=6), rtol=1e-5, atol=1e-6)
        bound(latents(1))


@pytest.mark.usefixtures("bound_on_cpu")
def test_a_closed_engine_refuses(bundle: Bundle) -> None:
    prompt = context(bundle, "cuda", 1)
    engine = step(bundle)
    bound = engine.bind(prompt)
    bound(latents(1))
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match=r"stage_c\.step was closed"):
        bound(latents(1))


@pytest.mark.usefixtures("bound_on_cpu")
def test_a_call_is_exact(bundle: Bundle) -> None:
    feeds = {**latents(1), "latents": latents(1)["latents"].astype(np.float64)}
    prompt = context(bundle, "cuda", 1)
    with step(bundle) as engine, pytest.raises(EngineError, match="latents has dtype float64"):
        engine.bind(prompt)(feeds)


def test_the_table_of_engines_has_steps(bundle: Bundle) -> None:
    """What is recorded follows from the table: a step is an engine with inputs that stay the same."""
    steps = {name for name, spec in ENGINES.items() if any(t.constant for t in spec.inputs)}
    assert steps == {"stage_c.step", "stage_b.step"}
    assert backends.engine_runtime("ort-tensorrt") == "onnx"


# --- rows of tensors ------------------------------------------------------


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_rows_of_two_requests_share_a_call(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, provider: str, request: pytest.FixtureRequest
) -> None:
    if provider == "cuda":
        request.getfixturevalue("bound_on_cpu")
    one, two = context(bundle, provider, 1), context(bundle, provider, 2, batch=2)
    feeds = latents(5, batch=3)
    with step(bundle, provider) as engine:
        both = {name: engine.join([one[name], two[name]]) for name in one}
        assert both["modulation"].shape == (6, one["modulation"].shape[1])
        together = engine.bind(both)({**feeds, "step": np.array([1, 4, 5])})["prediction"]
        first = engine.bind(one)({"latents": feeds["latents"][:1], "step": np.array([1])})["prediction"]
        second = engine.bind(two)({"latents": feeds["latents"][1:], "step": np.array([1, 2])})["prediction"]
        np.testing.assert_allclose(together, np.concatenate([first, second]), rtol=1e-4, atol=1e-5)
        again = {name: engine.rows(both[name], 1, 3) for name in both if name != "modulation"}
        again["modulation"] = engine.rows(both["modulation"], 3, 6)
        cut = engine.bind(again)({"latents": feeds["latents"][1:], "step": np.array([1, 2])})["prediction"]
        np.testing.assert_array_equal(cut, second)
        assert not np.allclose(first, second[:1]), "equal rows would prove nothing"


def value_of(array: np.ndarray[Any, Any], kind: int) -> OrtTensor:
    return OrtTensor(ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind))


@pytest.mark.parametrize(("dtype", "bits", "kind"), [("float16", np.float16, 10), ("bfloat16", np.uint16, 16)])
def test_rows_of_half_precision(dtype: str, bits: Any, kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 2**16, (n, 2, 3), np.uint16).view(bits) for n in (2, 1, 3)]  # NaN among them
    tensors = [value_of(array, kind) for array in arrays]
    joined = join(tensors, "cpu", 0)
    assert (joined.shape, joined.dtype) == ((6, 2, 3), dtype)
    whole = np.concatenate(arrays).tobytes()
    assert content(joined) == whole
    assert content(rows(joined, 2, 5, "cpu", 0)) == np.concatenate(arrays)[2:5].tobytes()


def test_rows_on_a_gpu_are_copied_by_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver is a stand-in whose device memory is host memory; the addresses and sizes are the real ones."""
    driver = Driver()
    monkeypatch.setattr(cuda, "_driver", lambda: driver)
    monkeypatch.setattr(
        ort.OrtValue,
        "ortvalue_from_shape_and_type",
        lambda shape, kind, device, device_id: made(shape, kind, "cpu", 0),
    )
    arrays = [np.full((n, 3), n, np.float32) for n in (1, 2)]
    joined = join([value_of(array, 1) for array in arrays], "cuda", 1)
    np.testing.assert_array_equal(joined.value.numpy(), np.concatenate(arrays))
    np.testing.assert_array_equal(rows(joined, 1, 2, "cuda", 1).value.numpy(), [[2, 2, 2]])
    assert driver.devices == {1}
    assert driver.contexts == 0, "every context is given back"
    driver.fails = True
    with pytest.raises(EngineError, match="cuMemcpyDtoD_v2 gives status 700"):
        rows(joined, 0, 1, "cuda", 1)
    assert driver.contexts == 0


made = ort.OrtValue.ortvalue_from_shape_and_type


class Driver:
    """As much of CUDA's driver as `cuda.copy_within_gpu` calls."""

    def __init__(self) -> None:
        self.devices: set[int] = set()
        self.contexts = 0
        self.fails = False

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:  # noqa: N802
        self.devices.add(number)
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:  # noqa: N802
        self.contexts += 1
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device: Any) -> int:  # noqa: N802
        self.contexts -= 1
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:  # noqa: N802
        self.contexts += 1
        return 0

    def cuCtxPopCurrent_v2(self, context: Any) -> int:  # noqa: N802
        self.contexts -= 1
        return 0

    def cuMemcpyDtoD_v2(self, target: Any, source: Any, size: Any) -> int:  # noqa: N802
        if self.fails:
            return 700
        ctypes.memmove(target.value, source.value, size.value)
        return 0

    def cuCtxSynchronize(self) -> int:  # noqa: N802
        return 0


def content(tensor: OrtTensor) -> bytes:
    return ctypes.string_at(tensor.value.data_ptr(), tensor.value.tensor_size_in_bytes())


def test_rows_that_do_not_fit_are_refused(bundle: Bundle) -> None:
    made = context(bundle, "cpu", 1)
    with step(bundle, "cpu") as engine:
        for call, message in (
            (lambda: engine.join([made["kv_0"], made["modulation"]]), "cannot be joined"),
            (lambda: engine.join([made["kv_0"], value_of(np.zeros((1, 2), np.float16), 10)]), "float16"),
            (lambda: engine.join([]), "at least one"),
            (lambda: engine.rows(made["kv_0"], 0, 2), "has no rows 0 to 2"),
            (lambda: engine.rows(made["kv_0"], 1, 1), "has no rows 1 to 1"),
            (lambda: engine.join([np.zeros((1, 2))]), "another runtime than ONNX Runtime"),  # type: ignore[list-item]
        ):
            with pytest.raises(EngineError, match=message):
                call()


# --- what comes back ------------------------------------------------------


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_outputs_are_what_the_formulas_say(bundle: Bundle, provider: str, request: pytest.FixtureRequest) -> None:
    """A graph that returns another shape or dtype than its manifest says is refused, not handed on."""
    if provider == "cuda":
        request.getfixturevalue("bound_on_cpu")
    record = bundle.engine("stage_a.decode", "onnx")
    pixels = record.outputs[0]
    feeds = {"latents": np.zeros((1, 4, 16, 16), np.float32)}
    wrong = {
        r"pixels has shape \(1, 3, 64, 64\)": replace(pixels, axes=("batch", 3, "8*height", "4*width")),
        "returned pixels as float32; it must be int64": replace(pixels, dtype="int64"),
    }
    for message, output in wrong.items():
        changed = replace(record, outputs=(output,))
        said = message if provider == "cpu" else "failed in ONNX Runtime"  # its buffers have the shape and dtype
        with (
            OrtEngine(changed, bundle.path / record.file, provider, EngineOptions(threads=1)) as engine,
            pytest.raises(EngineError, match=rf"stage_a\.decode.*{said}"),
        ):
            engine.bind({})(feeds)


def test_memory_that_runs_out_is_said(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def run_with_ort_values(self, *args: Any) -> Any:
            raise self.error

    with open_of(bundle, "stage_a.decode", "cpu") as engine:
        assert isinstance(engine, OrtEngine)
        for error in (MemoryError("std::bad_alloc"), RuntimeError("Failed to allocate memory for requested buffer")):
            monkeypatch.setattr(engine.calls, "_session", session_of(engine, Full(error)))
            with pytest.raises(EngineError, match=r"not enough memory .*--low-memory, or a smaller size or batch"):
                engine.bind({})({"latents": np.zeros((1, 4, 16, 16), np.float32)})


def session_of(engine: OrtEngine, runtime: Any) -> Session:
    return Session(spec=engine.spec, runtime=runtime, device="cpu")
