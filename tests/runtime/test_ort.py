# ruff: noqa: ARG002 - stand-ins take what the real ones take
"""ONNX Runtime's providers: what sessions are told, and which are refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import platform
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
from msgspec.structs import replace

from cascade_rt import EngineError, RequestError, paths
from cascade_rt.backends import PROVIDERS, check_options, cuda, resolve_provider
from cascade_rt.backends import ort as ort_backend
from cascade_rt.backends.base import EngineOptions
from cascade_rt.backends.ort import OrtEngine, strays_of
from cascade_rt.backends.ort_cuda import GRAPH_ID
from cascade_rt.backends.ort_options import (
    CONFIGURATION,
    TABLE,
    _lacks_vnni,
    fixed_dimensions,
    records_calls,
    session_options,
)
from cascade_rt.bundle import Bundle
from cascade_rt.manifest import EngineRecord
from cascade_rt.stages import PRECISIONS, AxisRange
from opened import open_of, record_of, skip_without_gpu_calls

# Read off onnxruntime-gpu 1.31.1: with its CUDA and TensorRT libraries replaced by empty ones, it took these names and
# values, and refused a name or a value that it does not know.
KNOWN_OPTIONS = {
    "cuda": {"use_tf32", "arena_extend_strategy", "enable_cuda_graph", "device_id"},
    "ort-tensorrt": {
        *("device_id", "trt_fp16_enable", "trt_bf16_enable", "trt_cuda_graph_enable"),
        *("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes"),
        *("trt_engine_cache_enable", "trt_engine_cache_path", "trt_timing_cache_enable", "trt_timing_cache_path"),
    },
}
GPU_PROVIDERS = tuple(KNOWN_OPTIONS)


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def path_of(bundle: Bundle, record: EngineRecord) -> Path:
    return bundle.path / record.file


def told(bundle: Bundle, name: str, provider: str, recording: bool = True, **options: Any) -> dict[str, str]:
    record, given = record_of(bundle, name, provider), EngineOptions(digest="d" * 64, **options)
    _, providers = session_options(provider, record, given, recording)
    [(ep, made)] = providers
    assert ep == TABLE[provider].ep
    return made


def test_every_other_provider_of_graphs_has_a_row_and_the_same_device() -> None:
    graphs = {name: provider for name, provider in PROVIDERS.items() if provider.runtime == "onnx"}
    assert graphs.keys() - {"openvino"} == TABLE.keys()
    for name, row in TABLE.items():
        assert row.device == PROVIDERS[name].device


@pytest.mark.parametrize("provider", GPU_PROVIDERS)
def test_options_are_names_that_the_provider_knows(bundle: Bundle, provider: str) -> None:
    for record in bundle.manifest.engines:
        options = told(bundle, record.name, provider)
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
    skip_without_gpu_calls()
    [module] = Path(ort.__file__).parent.glob("capi/onnxruntime_pybind11_state*")
    content = module.read_bytes()
    keys = [GRAPH_ID, *CONFIGURATION, *(key for row in TABLE.values() for key in row.session)]
    assert len(keys) > 3
    assert [key for key in keys if key.encode() not in content] == []
    assert b"session.disable_cpu_fallback" not in content, "a wrong key would be found too"


@pytest.mark.parametrize("provider", ["cpu", *GPU_PROVIDERS])
def test_memory_is_planned_where_the_table_says(bundle: Bundle, provider: str) -> None:
    record = bundle.engine("stage_c.step", "onnx")
    options, _ = session_options(provider, record, EngineOptions(), recording=False)
    assert options.enable_mem_reuse is options.enable_mem_pattern is (provider != "cpu")


def test_recording_is_asked_for_by_its_own_option_only(bundle: Bundle) -> None:
    for provider, option in (("cuda", "enable_cuda_graph"), ("ort-tensorrt", "trt_cuda_graph_enable")):
        assert option in told(bundle, "stage_c.step", provider)
        assert option not in told(bundle, "stage_c.step", provider, recording=False)


def test_steps_are_recorded_and_nothing_else(bundle: Bundle) -> None:
    specs = {record.name: record.spec for record in bundle.manifest.engines}
    for provider in GPU_PROVIDERS:
        assert {n for n, s in specs.items() if records_calls(provider, s)} == {"stage_c.step", "stage_b.step"}
    assert not any(records_calls("cpu", spec) for spec in specs.values())
    kept = replace(specs["stage_c.step"].outputs[0], dtype="float16")
    assert not records_calls("cuda", dataclasses.replace(specs["stage_c.step"], outputs=(kept,))), (
        "the caller keeps its address"
    )


def test_tensorrt_is_left_strongly_typed_and_nothing_may_run_on_the_cpu(bundle: Bundle) -> None:
    options = told(bundle, "stage_c.step", "ort-tensorrt")
    assert options["trt_fp16_enable"] == options["trt_bf16_enable"] == "False"
    made, _ = session_options("ort-tensorrt", record_of(bundle, "stage_c.step", "ort-tensorrt"), EngineOptions(), True)
    assert made.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"


def test_tensorrt_builds_for_the_sizes_that_are_accepted(bundle: Bundle) -> None:
    record = record_of(bundle, "stage_c.step", "ort-tensorrt")
    whole = record_of(bundle, "stage_c.step", "cuda").ranges
    assert record.spec.ranges["batch"].max == 8 < whole["batch"].max
    options = told(bundle, "stage_c.step", "ort-tensorrt")
    for which in ("min", "opt", "max"):
        shapes = dict(item.split(":") for item in options[f"trt_profile_{which}_shapes"].split(","))
        batch, height = (getattr(record.spec.ranges[axis], which) for axis in ("batch", "height"))
        assert shapes["latents"] == f"{batch}x16x{height}x{height}"
        assert shapes.keys() == {"latents", "step", "modulation", "kv_0", "kv_1"}
        assert shapes["step"] == str(batch)


def test_engines_of_other_weights_are_kept_elsewhere(bundle: Bundle, tmp_path: Path) -> None:
    record = record_of(bundle, "stage_c.step", "ort-tensorrt")
    paths = []
    for digest in ("a" * 64, "b" * 64):
        _, [(_, options)] = session_options("ort-tensorrt", record, EngineOptions(digest=digest), True)
        paths.append(options["trt_engine_cache_path"])
        assert Path(paths[-1]).is_dir()
        assert Path(paths[-1]).is_relative_to(tmp_path)
        assert options["trt_timing_cache_path"] == str(Path(paths[-1]).parent)
    assert paths[0] != paths[1]


def test_a_cache_that_cannot_be_written_is_said(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    paths._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="nothing can be kept between runs below .*cache: Not a directory"):
        options = told(bundle, "stage_c.step", "ort-tensorrt")
    told(bundle, "stage_c.context", "ort-tensorrt")  # a second warning would be an error
    assert "trt_engine_cache_enable" not in options


# --- fixed dimensions ---------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "only"),
    [
        (AxisRange(min=2, opt=2, max=2), 2),
        (AxisRange(min=1, opt=2, max=2), None),
        (AxisRange(min=5, opt=8, max=15, multiple=8), 8),
        (AxisRange(min=8, opt=8, max=16, multiple=8), None),
    ],
)
def test_an_axis_with_one_accepted_size_is_known(limits: AxisRange, only: int | None) -> None:
    assert limits.only == only
    assert [size for size in range(40) if limits.accepts(size)] == [only] or only is None


def test_the_shipped_bundle_keeps_every_axis_that_requests_choose(bundle: Bundle) -> None:
    for record in bundle.manifest.engines:
        assert fixed_dimensions(record.spec) == {}


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
        OrtEngine(record, path_of(bundle, record), "cuda", EngineOptions())


def test_a_session_that_cannot_be_made_is_not_made_elsewhere(bundle: Bundle, tmp_path: Path) -> None:
    record = bundle.engine("stage_a.decode", "onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no graph")
    with pytest.raises(EngineError, match=r"broken.onnx cannot be loaded by provider cpu"):
        OrtEngine(record, broken, "cpu", EngineOptions())


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
        OrtEngine(record, path_of(bundle, record), "cuda", EngineOptions())
    assert tried == [[(TABLE["cuda"].ep, {**TABLE["cuda"].options, "device_id": "0"})]]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("provider", "instead"), [("cpu", "provider openvino"), ("cuda", "provider ort-tensorrt")])
def test_bf16_where_operators_are_missing(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, provider: str, instead: str
) -> None:
    def refuse(*args: Any, **rest: Any) -> Any:
        raise RuntimeError("Provider type for DepthToSpace node is not set")

    monkeypatch.setattr(ort, "InferenceSession", refuse)
    record = replace(bundle.engine("stage_c.step", "onnx"), precision=PRECISIONS["bf16"])
    with pytest.raises(EngineError, match=rf"use --{instead}, or export with --precision fp"):
        OrtEngine(record, path_of(bundle, record), provider, EngineOptions())
    with pytest.raises(EngineError) as error:
        OrtEngine(bundle.engine("stage_c.step", "onnx"), path_of(bundle, record), provider, EngineOptions())
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
    monkeypatch.setattr(ort_backend, "gpu_sm", lambda *_: 89)
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
    skip_without_gpu_calls()
    options = ort.SessionOptions()
    for key, value in TABLE["cuda"].session.items():
        options.add_session_config_entry(key, value)
    path = path_of(bundle, bundle.engine("stage_a.decode", "onnx"))
    found = strays_of(ort.InferenceSession(path, options, providers=[TABLE["cpu"].ep]))
    assert "Conv" in found
    assert "Shape" not in found


@pytest.mark.parametrize(
    ("machine", "flags", "precision", "exact"),
    [
        ("x86_64", "fpu avx2 avx512_vnni", "int8", False),
        ("x86_64", "fpu avx2 avx_vnni", "int8", False),
        ("x86_64", "fpu avx2", "int8", True),
        ("x86_64", "fpu avx2", "int8-static", True),
        ("x86_64", "fpu avx2", "w8", False),
        ("x86_64", "fpu avx2", "fp32", False),
        ("AMD64", None, "int8", True),  # no Linux: not known to have it
        ("aarch64", "fpu", "int8", False),
    ],
)
def test_int8_is_exact_where_the_processor_would_overflow(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, machine: str, flags: str | None, precision: str, exact: bool
) -> None:
    """Where it would not, nothing is set: unsigned weights take 2.5 times as long."""

    def cpuinfo(path: Path, **_: object) -> str:
        if flags is None:
            raise FileNotFoundError
        return f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: spectre_vnni\n"

    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(Path, "read_text", cpuinfo)
    _lacks_vnni.cache_clear()
    record = replace(bundle.engine("stage_c.step", "onnx"), precision=PRECISIONS[precision])
    made, _ = session_options("cpu", record, EngineOptions(), recording=False)
    monkeypatch.undo()
    _lacks_vnni.cache_clear()
    try:
        assert (made.get_session_config_entry("session.x64quantprecision") == "1") is exact
    except RuntimeError:  # it was not set
        assert not exact


# --- what callers set -----------------------------------------------------


@pytest.mark.parametrize("provider", GPU_PROVIDERS)
def test_a_callers_options_reach_the_provider_and_override_ours(bundle: Bundle, provider: str) -> None:
    name, value = ("use_tf32", "1") if provider == "cuda" else ("trt_fp16_enable", "True")
    assert told(bundle, "stage_c.step", provider)[name] != value
    options = told(bundle, "stage_c.step", provider, device_id=3, provider_options={name: value, "gpu_mem_limit": "9"})
    assert (options[name], options["gpu_mem_limit"], options["device_id"]) == (value, "9", "3")


def test_a_callers_settings_reach_the_session(bundle: Bundle) -> None:
    key = "session.intra_op.spin_duration_us"
    record = bundle.engine("stage_a.decode")
    for given, wanted in (({}, "200"), ({key: "7"}, "7")):
        made, _ = session_options("cpu", record, EngineOptions(threads=2, provider_options=given), False)
        assert made.get_session_config_entry(key) == wanted
        assert made.intra_op_num_threads == 2


@pytest.mark.parametrize(
    ("provider", "option"),
    [
        ("cpu", "use_arena"),
        ("cpu", "session.intra_op.spining"),
        ("cuda", "session.intra_op.spining"),
        ("ort-tensorrt", "session.intra_op.spining"),
    ],
)
def test_an_option_that_a_provider_does_not_know_is_named(bundle: Bundle, provider: str, option: str) -> None:
    with pytest.raises(EngineError, match=rf"{provider} has no option {option}; accepted: .*session\.intra_op"):
        told(bundle, "stage_a.decode", provider, provider_options={option: "1"})


@pytest.mark.parametrize(
    ("provider", "options", "message"),
    [
        ("cpu", {"threads": 0}, "threads 0 is not accepted; it must be an integer from 1 to 1024"),
        ("cpu", {"threads": True}, "threads True is not accepted"),
        ("cpu", {"threads": 2**31}, "threads 2147483648 is not accepted"),
        ("openvino", {"threads": 10**5000}, "threads .* is not accepted"),
        ("cpu", {"threads": 1.0}, "threads 1.0 is not accepted"),
        ("tensorrt", {"threads": 4}, "threads 4 is for providers of the CPU"),
        ("cpu", {"device_id": 1}, "device_id 1 is not accepted; provider cpu runs on the CPU"),
        ("openvino", {"device_id": 1}, "device_id 1 is not accepted; provider openvino runs on the CPU"),
        ("cuda", {"device_id": -1}, "device_id -1 is not accepted; it must be an integer from 0"),
        ("cuda", {"device_id": False}, "device_id False is not accepted"),
        ("cpu", {"provider_options": ["a"]}, "provider_options .* is not accepted; it must be a mapping"),
        ("cpu", {"provider_options": {"a": 1}}, "provider_options {'a': 1} is not accepted"),
    ],
)
def test_options_are_checked_before_anything_is_opened(provider: str, options: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        check_options(provider, EngineOptions(**options))


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        def cuInit(self, flags: int) -> int:  # noqa: N802
            return 0

        def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
            count._obj.value = 2
            return 0

        def cuDeviceGet(self, device: Any, number: int) -> int:  # noqa: N802
            device._obj.value = number
            return 0

        def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:  # noqa: N802
            value._obj.value = {75: 8, 76: device.value}[attribute]
            return 0

    monkeypatch.setattr(cuda, "_driver", Driver)
    assert (cuda.gpu_sm(), cuda.gpu_sm(1)) == (80, 81)
    check_options("cuda", EngineOptions(device_id=1))
    with pytest.raises(EngineError, match="no NVIDIA GPU 2 here, the driver has 2; device_id is 0 to 1"):
        check_options("cuda", EngineOptions(device_id=2))


def test_a_mistyped_option_of_the_cpu_opens_nothing(bundle: Bundle) -> None:
    with pytest.raises(EngineError, match="provider cpu has no option nonsense"):
        open_of(bundle, "stage_a.decode", "cpu", provider_options={"nonsense": "1"})
