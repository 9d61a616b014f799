"""ONNX Runtime's engines at work: sizes, and calls at fixed addresses.

CUDA's way of calling runs here over the CPU provider: I/O binding, copies between tensors and the order of calls are
the real ones, only nothing is recorded.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from cascade_rt import CascadePipeline, EngineError, backends
from cascade_rt.backends import open_engine
from cascade_rt.backends import ort as ort_backend
from cascade_rt.backends.ort import OrtEngine, OrtTensor
from cascade_rt.backends.ort_cuda import GRAPH_ID, CudaBound
from cascade_rt.backends.ort_options import TABLE, OrtProvider, fixed_dimensions
from cascade_rt.bundle import Bundle
from cascade_rt.stages import ENGINES, AxisRange


@pytest.fixture
def bound_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Provider ``cuda``, as it is called, over ONNX Runtime's CPU provider."""
    monkeypatch.setitem(TABLE, "cuda", OrtProvider(TABLE["cpu"].ep, graphs=2))
    monkeypatch.setattr(ort_backend, "strays_of", lambda session: [])


def conditions(bundle: Bundle, seed: int, batch: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    config = bundle.manifest.models["stage_c"].config
    rng = np.random.default_rng(seed)
    return {
        "timestep_embedding": rng.standard_normal((3, int(config["timestep_ratio_embedding_dim"])), np.float32),
        "clip_text_pooled": rng.standard_normal((batch, 1, config["clip_text_pooled_in_channels"]), np.float32),
        "clip_text": rng.standard_normal((batch, 24, config["clip_text_in_channels"]), np.float32),
        "clip_img": np.zeros((batch, 1, config["clip_image_in_channels"]), np.float32),
    }


def context(bundle: Bundle, provider: str, seed: int, batch: int = 1) -> dict[str, Any]:
    with open_engine(bundle, "stage_c.context", provider, threads=1) as engine:
        return engine.bind({})(conditions(bundle, seed, batch))


def latents(seed: int, batch: int = 1, side: int = 4) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return {"latents": rng.standard_normal((batch, 16, side, side), np.float32), "step": np.array([1])}


def step(bundle: Bundle, provider: str = "cuda") -> OrtEngine:
    engine = open_engine(bundle, "stage_c.step", provider, threads=1)
    assert isinstance(engine, OrtEngine)
    return engine


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
    ranges = {**record.spec.ranges, **{axis: AxisRange(size, size, size) for axis, size in sizes.items()}}
    fixed = replace(record, spec=replace(record.spec, ranges=ranges))
    assert fixed_dimensions(fixed.spec) == sizes
    constants = context(bundle, "cpu", seed=1)
    with OrtEngine(fixed, bundle.path / record.file, "cpu", threads=1) as engine:
        shapes = {i.name: i.shape for i in engine.session.get_inputs()}
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
    with open_engine(bundle, "stage_c.context", "cuda", threads=1) as engine:
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
        before = weakref.ref(engine.session)
        alive = []

        def opened(engine: OrtEngine, recording: bool) -> ort.InferenceSession:
            gc.collect()
            alive.append(before() is not None)
            return real(engine, recording)

        real = OrtEngine._open
        monkeypatch.setattr(OrtEngine, "_open", opened)
        with pytest.warns(
            RuntimeWarning, match=r"stage_c.step runs without a CUDA graph, kernel by kernel: .*not permitted when"
        ):
            made = bound(latents(5))["prediction"]
        assert alive == [False], "a GPU may not hold the weights twice"
        np.testing.assert_allclose(made, expected(bundle, 1, 5), rtol=1e-5, atol=1e-6)
        bound(latents(6))  # a second warning would be an error
    assert calls.graphs == ["1", None, None]


def test_a_session_that_refuses_graphs_is_opened_without(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    row = OrtProvider(TABLE["cpu"].ep, recording={"enable_cuda_graph": "1"}, graphs=4)
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
    assert engine.recorder is None
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
    monkeypatch.setitem(TABLE, "cuda", OrtProvider(TABLE["cpu"].ep, graphs=TABLE["ort-tensorrt"].graphs))
    monkeypatch.setattr(ort_backend, "strays_of", lambda session: [])
    prompt = context(bundle, "cuda", 1)
    with step(bundle) as engine:
        bound = engine.bind(prompt)
        bound(latents(1))
        bound(latents(2))
        assert engine.recorder is not None
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
