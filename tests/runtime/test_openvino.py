"""Engines compiled by OpenVINO."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from cascade_rt import CascadePipeline, EngineError
from cascade_rt.backends import EngineOptions, computes, resolve_provider
from cascade_rt.bundle import Bundle
from cascade_rt.manifest import EngineRecord
from cascade_rt.stages import PRECISIONS, AxisRange, DType, TensorSpec
from opened import context, open_of

if importlib.util.find_spec("openvino") is None:
    pytest.skip("openvino is not installed: pip install 'cascade-rt[openvino]'", allow_module_level=True)

import openvino
from openvino import opset8 as ops

from cascade_rt.backends import openvino as backend
from cascade_rt.backends.openvino import OpenVinoEngine, OpenVinoTensor


def test_the_picture_is_the_one_of_onnx_runtime(shipped: Path) -> None:
    made = []
    for provider in ("openvino", "cpu"):
        with CascadePipeline.from_pretrained(shipped, provider=provider) as pipe:
            pipe.set_progress_bar_config(disable=True)
            images = pipe("a red circle", seed=3, prior_num_inference_steps=4, num_inference_steps=3, output_type="np")
            made.append(np.asarray(images.images, np.float64))
    error = np.mean((made[0] - made[1]) ** 2)
    assert np.isfinite(made[0]).all()
    assert error < 1e-7, "more than 70 dB apart: not the same engine in fp32"
    assert made[1].std() > 0.05, "a flat picture would prove nothing"


def test_context_tensors_outlive_their_engine_and_results_are_owned(bundle: Bundle) -> None:
    constants = context(bundle, "openvino", 0)
    assert all(not isinstance(value, np.ndarray) for value in constants.values())
    latents = np.random.default_rng(1).standard_normal((1, 16, 6, 6), np.float32)
    with open_of(bundle, "stage_c.step", "openvino") as engine:
        run = engine.bind(constants)
        first = run({"latents": latents, "step": np.array([0])})["prediction"]
        assert isinstance(first, np.ndarray)
        kept = first.copy()
        again = run({"latents": latents, "step": np.array([0])})["prediction"]
        run({"latents": latents * 2, "step": np.array([0])})
    assert np.array_equal(first, kept)
    assert np.array_equal(first, again)
    assert np.abs(kept).max() > 0


def test_wrong_calls_are_refused(bundle: Bundle) -> None:
    constants = context(bundle, "openvino", 0)
    engine = open_of(bundle, "stage_c.step", "openvino")
    with pytest.raises(EngineError, match="float64"):
        engine.bind(constants)({"latents": np.zeros((1, 16, 6, 6)), "step": np.array([0])})
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="was closed"):
        engine.bind(constants)({"latents": np.zeros((1, 16, 6, 6), np.float32), "step": np.array([0])})


def test_tensors_of_another_runtime_are_refused(bundle: Bundle) -> None:
    with open_of(bundle, "stage_c.step", "openvino") as step, pytest.raises(EngineError, match="another runtime"):
        step.bind({"modulation": np.zeros((1, 4), np.float32)})  # type: ignore[dict-item]


def test_a_precision_that_the_processor_lacks_is_one_line(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:

    class OldCore(openvino.Core):  # type: ignore[misc]
        def get_property(self, *_: str) -> Any:
            return ["INT8"]

    record = bundle.engine("text_encoder")
    monkeypatch.setattr(openvino, "Core", OldCore)
    with pytest.raises(EngineError, match="does not compute under OpenVINO") as error:
        OpenVinoEngine(record, bundle.path / record.file, EngineOptions())
    assert "--provider cpu" in str(error.value)
    assert computes("openvino") == ()
    with pytest.raises(EngineError, match=r"which provider openvino does not compute here.*--provider cpu"):
        open_of(bundle, "text_encoder", "openvino")


def test_the_provider_is_known() -> None:
    assert resolve_provider("openvino") == "openvino"
    assert resolve_provider("auto") in ("cpu", "cuda")


def _is_weight(node: Any) -> bool:
    if node.get_type_name() == "Reshape":  # of a 1 x 1 convolution
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")


def test_unit_factors_go_and_nothing_else_changes(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO multiplies every weight with Gemm's alpha, which is 1, and keeps the products."""

    def products(model: Any) -> int:
        return sum(op.get_type_name() == "Multiply" for op in model.get_ops())

    path = bundle.file(bundle.engine("stage_c.step", "onnx").file)
    model = openvino.Core().read_model(path)
    layers = sum(op.get_type_name() == "MatMul" and _is_weight(op.input_value(1).get_node()) for op in model.get_ops())
    before = products(model)
    backend._drop_unit_factors(model)
    assert before - products(model) == 2 * layers > 20  # alpha and beta
    again = products(model)
    backend._drop_unit_factors(model)
    assert products(model) == again > 20, "other products stay"

    def prediction() -> Any:
        with open_of(bundle, "stage_c.step", "openvino") as engine:
            latents = np.random.default_rng(1).standard_normal((1, 16, 6, 6), np.float32)
            return engine.bind(constants)({"latents": latents, "step": np.array([0])})["prediction"]

    constants = context(bundle, "openvino", 0)
    without = prediction()
    monkeypatch.setattr(backend, "_drop_unit_factors", lambda model: None)
    assert np.abs(without - prediction()).max() < 1e-5 * np.abs(without).max()


@pytest.mark.parametrize(("value", "dropped"), [(1.0, True), (0.5, False), (-1.0, False)])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_only_a_scalar_one_is_a_unit_factor(dtype: str, value: float, dropped: bool) -> None:
    from openvino.passes import ConstantFolding, Manager

    kind = getattr(openvino.Type, dtype)
    for shape, expected in (([], dropped), ([1], False)):
        x = ops.parameter([2, 3], kind)
        factor = ops.convert(ops.constant(np.full(shape, value, np.float32)), kind)
        folded = openvino.Model([ops.multiply(ops.negative(x), factor)], [x])
        manager = Manager()
        manager.register_pass(ConstantFolding())
        manager.run_passes(folded)
        backend._drop_unit_factors(folded)
        left = any(op.get_type_name() == "Multiply" for op in folded.get_ops())
        assert left != expected


# --- rows, half precision, options ---------------------------------------------

HALVES: list[tuple[DType, str]] = [("float16", "f16"), ("bfloat16", "bf16"), ("float32", "f32")]


def half_graphs(folder: Path, dtype: DType, kind: str) -> dict[str, EngineRecord]:
    """``kv = 2 * clip_text`` in a half precision, and ``prediction = latents + kv``, as OpenVINO's own files."""
    element = getattr(openvino.Type, kind)
    text = ops.parameter([-1, 4], openvino.Type.f32, name="clip_text")
    doubled = ops.convert(ops.multiply(text, ops.constant(np.float32(2))), element)
    save(folder / "stage_c.context.xml", {"kv": doubled}, {"clip_text": text})
    latents = ops.parameter([-1, 4], openvino.Type.f32, name="latents")
    kv = ops.parameter([-1, 4], element, name="kv")
    added = ops.add(latents, ops.convert(kv, openvino.Type.f32))
    save(folder / "stage_c.step.xml", {"prediction": added}, {"latents": latents, "kv": kv})

    def tensor(name: str, of: DType, constant: bool = False) -> TensorSpec:
        return TensorSpec(name=name, dtype=of, axes=("batch", 4), constant=constant)

    def record(name: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> EngineRecord:
        return EngineRecord(
            name=name,
            precision=next(p for p in PRECISIONS.values() if p.compute == dtype),
            runtime="onnx",
            file=f"{name}.xml",
            weights=(),
            inputs=inputs,
            outputs=outputs,
            ranges={"batch": AxisRange(min=1, opt=2, max=8)},
            tools={},
        )

    held = tensor("kv", dtype, constant=True)
    return {
        "context": record("stage_c.context", (tensor("clip_text", "float32"),), (held,)),
        "step": record("stage_c.step", (tensor("latents", "float32"), held), (tensor("prediction", "float32"),)),
    }


def save(path: Path, outputs: dict[str, Any], inputs: dict[str, Any]) -> None:
    results = []
    for name, node in outputs.items():
        node.output(0).get_tensor().set_names({name})
        results.append(ops.result(node))
    for name, node in inputs.items():
        node.output(0).get_tensor().set_names({name})
    openvino.save_model(openvino.Model(results, list(inputs.values())), path, compress_to_fp16=False)


@pytest.mark.parametrize(("dtype", "kind"), HALVES)
def test_rows_of_two_requests_share_a_call(tmp_path: Path, dtype: DType, kind: str) -> None:
    if dtype not in computes("openvino"):
        pytest.skip(f"this processor does not compute {dtype} under OpenVINO")
    records = half_graphs(tmp_path, dtype, kind)
    texts = [np.arange(4 * n, dtype=np.float32).reshape(n, 4) + n for n in (1, 2)]
    with OpenVinoEngine(records["context"], tmp_path / "stage_c.context.xml", EngineOptions(threads=1)) as engine:
        made = [engine.bind({})({"clip_text": text})["kv"] for text in texts]
    assert all(isinstance(tensor, OpenVinoTensor) and tensor.dtype == dtype for tensor in made)
    latents = np.full((3, 4), 0.25, np.float32)
    with OpenVinoEngine(records["step"], tmp_path / "stage_c.step.xml", EngineOptions(threads=1)) as engine:
        joined = engine.join(made)  # type: ignore[arg-type]
        assert (joined.shape, joined.dtype) == ((3, 4), dtype)
        whole = engine.bind({"kv": joined})({"latents": latents})["prediction"]
        np.testing.assert_array_equal(whole, 2 * np.concatenate(texts) + latents)
        cut = engine.bind({"kv": engine.rows(joined, 1, 3)})({"latents": latents[1:]})["prediction"]
        np.testing.assert_array_equal(cut, whole[1:])  # type: ignore[index]


def test_bits_of_bfloat16_stay_as_they_are() -> None:
    """NumPy has no bfloat16, and OpenVINO shows it as another type: NaN, infinities and denormals must survive."""
    rng = np.random.default_rng(0)
    bits = [rng.integers(0, 2**16, (n, 3), np.uint16) for n in (2, 5)]
    tensors = [OpenVinoTensor(openvino.Tensor(b, list(b.shape), openvino.Type.bf16)) for b in bits]
    engine = OpenVinoEngine.__new__(OpenVinoEngine)
    joined = engine.join(tensors)
    assert joined.dtype == "bfloat16"
    np.testing.assert_array_equal(joined.value.data.view(np.uint16), np.concatenate(bits))
    some = engine.rows(joined, 1, 4)
    np.testing.assert_array_equal(some.value.data.view(np.uint16), np.concatenate(bits)[1:4])


def test_rows_that_do_not_fit_are_refused(bundle: Bundle) -> None:
    made = context(bundle, "openvino", 1)
    with open_of(bundle, "stage_c.step", "openvino") as engine:
        half = OpenVinoTensor(openvino.Tensor(openvino.Type.f16, list(made["kv_0"].shape)))
        for call, message in (
            (lambda: engine.join([made["kv_0"], made["modulation"]]), "cannot be joined"),
            (lambda: engine.join([made["kv_0"], half]), "cannot be joined"),
            (lambda: engine.join([]), "at least one"),
            (lambda: engine.rows(made["kv_0"], 0, 2), "has no rows 0 to 2"),
            (lambda: engine.join([np.zeros((1, 2))]), "another runtime than OpenVINO"),  # type: ignore[list-item]
        ):
            with pytest.raises(EngineError, match=message):
                call()


def test_outputs_are_what_the_formulas_say(tmp_path: Path) -> None:
    records = half_graphs(tmp_path, "float32", "f32")
    feeds = {"clip_text": np.zeros((2, 4), np.float32)}
    for output, message in (
        (replace(records["context"].outputs[0], axes=("batch", 5)), r"kv has shape \(2, 4\)"),
        (replace(records["context"].outputs[0], dtype="float16"), "returned kv as float32; it must be float16"),
    ):
        record = replace(records["context"], outputs=(output,))
        with (
            OpenVinoEngine(record, tmp_path / "stage_c.context.xml", EngineOptions()) as engine,
            pytest.raises(EngineError, match=message),
        ):
            engine.bind({})(feeds)


def test_a_callers_options_reach_openvino(bundle: Bundle) -> None:
    engine = open_of(bundle, "stage_a.decode", "openvino", provider_options={"ENABLE_CPU_PINNING": "NO"})
    assert isinstance(engine, OpenVinoEngine)
    assert not engine.compiled.get_property("ENABLE_CPU_PINNING")
    assert engine.compiled.get_property("INFERENCE_NUM_THREADS") == 1
    engine.close()
    with pytest.raises(EngineError, match=r"provider openvino has no option FOO; accepted: .*NUM_STREAMS"):
        open_of(bundle, "stage_a.decode", "openvino", provider_options={"FOO": "1"})
    with pytest.raises(EngineError, match=r"cannot be compiled by OpenVINO: .*PERFORMANCE_HINT"):
        open_of(bundle, "stage_a.decode", "openvino", provider_options={"PERFORMANCE_HINT": "nonsense"})


def test_memory_that_runs_out_is_said(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def create_infer_request(self) -> Any:
            raise MemoryError("std::bad_alloc")

    with open_of(bundle, "stage_a.decode", "openvino") as engine:
        monkeypatch.setattr(engine, "_compiled", Full())
        with pytest.raises(EngineError, match=r"not enough memory .*--low-memory, or a smaller size or batch"):
            engine.bind({})({"latents": np.zeros((1, 4, 16, 16), np.float32)})


def test_auto_does_not_import_it() -> None:
    """Its import takes longer than a small model does, and `auto` mostly ends with another provider."""
    pytest.importorskip("onnxruntime")
    code = "import sys, cascade_rt.backends as b; print(b.resolve_provider('auto'), 'openvino' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == "False"


def test_a_unit_factor_goes_from_either_side_and_names_stay() -> None:

    x = ops.parameter([2, 3], openvino.Type.f32, name="x")
    one = ops.constant(np.float32(1))
    negative = ops.negative(x)
    left = ops.multiply(one, negative)
    first, second = ops.result(ops.multiply(ops.relu(left), one), "y"), ops.result(ops.exp(left), "z")
    first.output(0).get_tensor().set_names({"y"})
    untouched = ops.result(ops.multiply(x, one), "w")
    model = openvino.Model([first, second, untouched], [x])
    backend._drop_unit_factors(model)
    assert sum(op.get_type_name() == "Multiply" for op in model.get_ops()) == 1, "the input keeps its own name"
    assert model.output("y").get_node().input_value(0).get_node().get_type_name() == "Relu"
    values = np.arange(-3, 3, dtype=np.float32).reshape(2, 3)
    made = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(values)
    for index, wanted in enumerate((np.maximum(-values, 0), np.exp(-values), values)):
        assert np.allclose(made[index], wanted, rtol=1e-5)
