"""ONNX Runtime's providers: what sessions are told, fixed dimensions, and calls at fixed addresses.

CUDA's way of calling runs here over the CPU provider: I/O binding, copies between tensors and the order of calls are
the real ones, only nothing is recorded.
"""

from __future__ import annotations

import gc
import importlib.util
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from cascade_rt import CascadePipeline, EngineError, RequestError, backends
from cascade_rt.backends import PROVIDERS, cuda, find_record, open_engine, resolve_provider
from cascade_rt.backends import ort as ort_backend
from cascade_rt.backends.ort import OrtEngine, OrtTensor, strays_of
from cascade_rt.backends.ort_cuda import GRAPH_ID, CudaBound
from cascade_rt.backends.ort_options import TABLE, OrtProvider, fixed_dimensions, records_calls, session
from cascade_rt.bundle import Bundle, EngineRecord, find_bundle
from cascade_rt.stages import ENGINES, AxisRange

# Read off onnxruntime-gpu 1.31.1: with its CUDA and TensorRT libraries replaced by empty ones, it took these names and
# values, and refused a name or a value that it does not know.
KNOWN_OPTIONS = {
    "cuda": {"use_tf32", "arena_extend_strategy", "enable_cuda_graph"},
    "ort-tensorrt": {
        *("trt_fp16_enable", "trt_bf16_enable", "trt_cuda_graph_enable"),
        *("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes"),
        *("trt_engine_cache_enable", "trt_engine_cache_path", "trt_timing_cache_enable", "trt_timing_cache_path"),
    },
}
GPU_PROVIDERS = tuple(KNOWN_OPTIONS)


@pytest.fixture
def bundle(shipped: Path) -> Bundle:
    return find_bundle(shipped)


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def bound_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Provider ``cuda``, as it is called, over ONNX Runtime's CPU provider."""
    monkeypatch.setitem(TABLE, "cuda", OrtProvider(TABLE["cpu"].ep, graphs=2))
    monkeypatch.setattr(ort_backend, "strays_of", lambda session: [])


def path_of(bundle: Bundle, record: EngineRecord) -> Path:
    return bundle.path / record.file


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


# --- the table ----------------------------------------------------------


def told(bundle: Bundle, name: str, provider: str, recording: bool = True) -> dict[str, str]:
    _, providers = session(provider, find_record(bundle, name, provider), "d" * 64, None, recording)
    [(ep, options)] = providers
    assert ep == TABLE[provider].ep
    return options


def test_every_other_provider_of_graphs_has_a_row_and_the_same_device() -> None:
    graphs = {name: provider for name, provider in PROVIDERS.items() if provider.runtime == "onnx"}
    assert graphs.keys() - {"openvino"} == TABLE.keys()
    for name, row in TABLE.items():
        assert row.device == PROVIDERS[name].device


@pytest.mark.parametrize("provider", GPU_PROVIDERS)
def test_options_are_names_that_the_provider_knows(bundle: Bundle, provider: str) -> None:
    for name in bundle.manifest.engines:
        options = told(bundle, name, provider)
        assert options.keys() <= KNOWN_OPTIONS[provider]
        assert all(isinstance(value, str) for value in options.values())
    assert told(bundle, "stage_c.step", provider).keys() == KNOWN_OPTIONS[provider], "the list names what is not used"


@pytest.mark.parametrize("provider", GPU_PROVIDERS)
def test_options_are_in_the_installed_libraries(provider: str) -> None:
    library = "tensorrt" if provider == "ort-tensorrt" else "cuda"
    files = list(Path(ort.__file__).parent.glob(f"capi/*onnxruntime_providers_{library}.*"))
    if not files:
        pytest.skip(f"onnxruntime-gpu is not installed: there is no library of {provider}'s options here")
    content = files[0].read_bytes()
    assert [name for name in KNOWN_OPTIONS[provider] if name.encode() not in content] == []


def test_configuration_keys_are_in_the_installed_runtime() -> None:
    [module] = Path(ort.__file__).parent.glob("capi/onnxruntime_pybind11_state*")
    content = module.read_bytes()
    keys = [GRAPH_ID, *(key for row in TABLE.values() for key in row.session)]
    assert len(keys) > 3
    assert [key for key in keys if key.encode() not in content] == []
    assert b"session.disable_cpu_fallback" not in content, "a wrong key would be found too"


@pytest.mark.parametrize("provider", ["cpu", *GPU_PROVIDERS])
def test_memory_is_planned_where_the_table_says(bundle: Bundle, provider: str) -> None:
    record = bundle.engine("stage_c.step", "onnx")
    options, _ = session(provider, record, "00", None, recording=False)
    assert options.enable_mem_reuse is options.enable_mem_pattern is (provider != "cpu")


def test_recording_is_asked_for_by_its_own_option_only(bundle: Bundle) -> None:
    for provider, option in (("cuda", "enable_cuda_graph"), ("ort-tensorrt", "trt_cuda_graph_enable")):
        assert option in told(bundle, "stage_c.step", provider)
        assert option not in told(bundle, "stage_c.step", provider, recording=False)


def test_steps_are_recorded_and_nothing_else(bundle: Bundle) -> None:
    specs = {name: records[0].spec for name, records in bundle.manifest.engines.items()}
    for provider in GPU_PROVIDERS:
        assert {n for n, s in specs.items() if records_calls(provider, s)} == {"stage_c.step", "stage_b.step"}
    assert not any(records_calls("cpu", spec) for spec in specs.values())
    kept = replace(specs["stage_c.step"].outputs[0], dtype="float16")
    assert not records_calls("cuda", replace(specs["stage_c.step"], outputs=(kept,))), "the caller keeps its address"


def test_tensorrt_is_left_strongly_typed_and_nothing_may_run_on_the_cpu(bundle: Bundle) -> None:
    options = told(bundle, "stage_c.step", "ort-tensorrt")
    assert options["trt_fp16_enable"] == options["trt_bf16_enable"] == "False"
    made, _ = session("ort-tensorrt", find_record(bundle, "stage_c.step", "ort-tensorrt"), "d", None, True)
    assert made.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"


def test_tensorrt_builds_for_the_sizes_that_are_accepted(bundle: Bundle) -> None:
    record = find_record(bundle, "stage_c.step", "ort-tensorrt")
    whole = find_record(bundle, "stage_c.step", "cuda").spec.ranges
    assert record.spec.ranges["batch"].max == 8 < whole["batch"].max
    options = told(bundle, "stage_c.step", "ort-tensorrt")
    for which in ("min", "opt", "max"):
        shapes = dict(item.split(":") for item in options[f"trt_profile_{which}_shapes"].split(","))
        batch, height = (getattr(record.spec.ranges[axis], which) for axis in ("batch", "height"))
        assert shapes["latents"] == f"{batch}x16x{height}x{height}"
        assert shapes.keys() == {"latents", "modulation", "kv_0", "kv_1"}, "step has no dynamic axis"


def test_engines_of_other_weights_are_kept_elsewhere(bundle: Bundle, tmp_path: Path) -> None:
    record = find_record(bundle, "stage_c.step", "ort-tensorrt")
    paths = []
    for digest in ("a" * 64, "b" * 64):
        _, [(_, options)] = session("ort-tensorrt", record, digest, None, True)
        paths.append(options["trt_engine_cache_path"])
        assert Path(paths[-1]).is_dir()
        assert Path(paths[-1]).is_relative_to(tmp_path)
        assert options["trt_timing_cache_path"] == str(Path(paths[-1]).parent)
    assert paths[0] != paths[1]


def test_a_cache_that_cannot_be_written_is_said(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.warns(RuntimeWarning, match="engines cannot be kept in"):
        options = told(bundle, "stage_c.step", "ort-tensorrt")
    assert "trt_engine_cache_enable" not in options


# --- fixed dimensions ---------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "only"),
    [
        (AxisRange(2, 2, 2), 2),
        (AxisRange(1, 2, 2), None),
        (AxisRange(5, 8, 15, 8), 8),
        (AxisRange(8, 8, 16, 8), None),
        (AxisRange(5, 8, 7, 8), None),
    ],
)
def test_an_axis_with_one_accepted_size_is_known(limits: AxisRange, only: int | None) -> None:
    assert limits.only == only
    assert [size for size in range(40) if limits.accepts(size)] == [only] or only is None


def test_the_shipped_bundle_keeps_every_axis_that_requests_choose(bundle: Bundle) -> None:
    for records in bundle.manifest.engines.values():
        assert fixed_dimensions(records[0].spec) == {}


def test_a_fixed_axis_specialises_the_session_and_changes_no_number(bundle: Bundle) -> None:
    record = bundle.engine("stage_c.step", "onnx")
    sizes = {"batch": 1, "height": 4, "width": 4, "steps": 3}
    ranges = {**record.spec.ranges, **{axis: AxisRange(size, size, size) for axis, size in sizes.items()}}
    fixed = replace(record, spec=replace(record.spec, ranges=ranges))
    assert fixed_dimensions(fixed.spec) == sizes
    constants = context(bundle, "cpu", seed=1)
    with OrtEngine(fixed, path_of(bundle, record), "cpu", threads=1) as engine:
        shapes = {i.name: i.shape for i in engine.session.get_inputs()}
        assert shapes["latents"] == [1, 16, 4, 4]
        assert shapes["kv_0"][3] == "condition_tokens", "an axis with several sizes stays free"
        made = engine.bind(constants)(latents(2))["prediction"]
        with pytest.raises(EngineError, match=r"latents has height 6; this engine takes 4\.\.4"):
            engine.bind(constants)(latents(2, side=6))
    np.testing.assert_allclose(made, expected(bundle, 1, 2), rtol=1e-4, atol=1e-5)


# --- sessions -----------------------------------------------------------


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="ONNX Runtime has CUDA here")
def test_a_session_without_its_provider_is_refused(bundle: Bundle) -> None:
    """ONNX Runtime makes one on the CPU and goes on; nobody would know."""
    record = bundle.engine("stage_a.decode", "onnx")
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(
            EngineError, match=r"left CUDAExecutionProvider out.*on CPUExecutionProvider.*\[onnxruntime-gpu\]"
        ),
    ):
        OrtEngine(record, path_of(bundle, record), "cuda")


def test_a_session_that_cannot_be_made_is_not_made_elsewhere(bundle: Bundle, tmp_path: Path) -> None:
    record = bundle.engine("stage_a.decode", "onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"broken.onnx cannot be loaded by provider cpu"):
        OrtEngine(record, broken, "cpu")


def test_no_other_provider_is_tried(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime prints a line otherwise, and makes the session on the CPU."""
    tried = []

    def make(session: Any, providers: Any, *rest: Any) -> None:
        session._fallback_providers = [TABLE["cpu"].ep]
        tried.append(providers)
        raise RuntimeError("no such library")

    monkeypatch.setattr(ort.InferenceSession, "_create_inference_session", make)
    record = bundle.engine("stage_a.decode", "onnx")
    with pytest.raises(EngineError, match="no such library"):
        OrtEngine(record, path_of(bundle, record), "cuda")
    assert tried == [[(TABLE["cuda"].ep, dict(TABLE["cuda"].options))]]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("provider", "instead"), [("cpu", "provider openvino"), ("cuda", "provider ort-tensorrt")])
def test_bf16_where_operators_are_missing(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, provider: str, instead: str
) -> None:
    def refuse(*args: Any, **rest: Any) -> Any:
        raise RuntimeError("Provider type for DepthToSpace node is not set")

    monkeypatch.setattr(ort, "InferenceSession", refuse)
    record = replace(bundle.engine("stage_c.step", "onnx"), precision="bf16")
    with pytest.raises(EngineError, match=rf"use --{instead}, or export with --precision fp"):
        OrtEngine(record, path_of(bundle, record), provider)
    with pytest.raises(EngineError) as error:
        OrtEngine(bundle.engine("stage_c.step", "onnx"), path_of(bundle, record), provider)
    assert "bf16" not in str(error.value)


def test_compiled_in_is_not_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu names CUDA on every machine; without a GPU `auto` must not choose it."""
    everything = [TABLE["ort-tensorrt"].ep, TABLE["cuda"].ep, TABLE["cpu"].ep]
    monkeypatch.setattr(ort, "get_available_providers", lambda: everything)
    monkeypatch.setattr(cuda, "_DRIVER", "libno-such-driver.so")
    assert resolve_provider("auto") == "cpu"
    for provider in GPU_PROVIDERS:
        with pytest.raises(EngineError, match=rf"provider {provider} is not available here.*cascade-rt\[.+\]"):
            resolve_provider(provider)
    monkeypatch.setattr(ort_backend, "gpu_sm", lambda: 89)
    assert resolve_provider("auto") == "cuda"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorrt" else object())
    assert not ort_backend.available("ort-tensorrt")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert resolve_provider("ort-tensorrt") == "ort-tensorrt"


def test_an_unknown_provider_is_told_all_names() -> None:
    with pytest.raises(RequestError, match="cpu, openvino, cuda, ort-tensorrt, tensorrt, tensorrt-rtx"):
        resolve_provider("trt")


def test_another_tensorrt_than_onnx_runtimes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    monkeypatch.setitem(sys.modules, "tensorrt", types.SimpleNamespace(__version__="11.4.0"))
    ort_backend.load_libraries.cache_clear()
    with pytest.raises(EngineError, match=r"needs TensorRT 10.*11\.4\.0 is installed.*cascade-rt\[ort-tensorrt\]"):
        ort_backend.load_libraries("ort-tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", types.SimpleNamespace(__version__="10.16.1"))
    ort_backend.load_libraries("ort-tensorrt")
    ort_backend.load_libraries.cache_clear()


def test_what_the_cpu_runs_is_found(bundle: Bundle) -> None:
    options = ort.SessionOptions()
    for key, value in TABLE["cuda"].session.items():
        options.add_session_config_entry(key, value)
    path = path_of(bundle, bundle.engine("stage_a.decode", "onnx"))
    found = strays_of(ort.InferenceSession(path, options, providers=[TABLE["cpu"].ep]))
    assert "Conv" in found
    assert "Shape" not in found


# --- calls at fixed addresses -------------------------------------------


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
