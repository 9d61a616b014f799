"""Engines compiled by OpenVINO."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cascade_rt import CascadePipeline, EngineError
from cascade_rt.backends import open_engine, resolve_provider
from cascade_rt.backends import openvino as backend
from cascade_rt.bundle import Bundle
from cascade_rt.sampling import timestep_embedding

if importlib.util.find_spec("openvino") is None:
    pytest.skip("openvino is not installed: pip install 'cascade-rt[openvino]'", allow_module_level=True)


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


def _context(bundle: Bundle) -> dict[str, Any]:
    config = bundle.manifest.models["stage_c"].config
    rng = np.random.default_rng(0)
    with open_engine(bundle, "stage_c.context", "openvino") as engine:
        return engine.bind({})(
            {
                "timestep_embedding": timestep_embedding(np.array([0.5], np.float32), 32),
                "clip_text_pooled": rng.standard_normal((1, 1, config["clip_text_pooled_in_channels"]), np.float32),
                "clip_text": rng.standard_normal((1, 24, config["clip_text_in_channels"]), np.float32),
                "clip_img": np.zeros((1, 1, config["clip_image_in_channels"]), np.float32),
            }
        )


def test_context_tensors_outlive_their_engine_and_results_are_owned(bundle: Bundle) -> None:
    context = _context(bundle)
    assert all(not isinstance(value, np.ndarray) for value in context.values())
    latents = np.random.default_rng(1).standard_normal((1, 16, 6, 6), np.float32)
    with open_engine(bundle, "stage_c.step", "openvino", threads=1) as engine:
        run = engine.bind(context)
        first = run({"latents": latents, "step": np.array([0])})["prediction"]
        assert isinstance(first, np.ndarray)
        kept = first.copy()
        again = run({"latents": latents, "step": np.array([0])})["prediction"]
        run({"latents": latents * 2, "step": np.array([0])})
    assert np.array_equal(first, kept)
    assert np.array_equal(first, again)
    assert np.abs(kept).max() > 0


def test_wrong_calls_are_refused(bundle: Bundle) -> None:
    context = _context(bundle)
    engine = open_engine(bundle, "stage_c.step", "openvino")
    with pytest.raises(EngineError, match="float64"):
        engine.bind(context)({"latents": np.zeros((1, 16, 6, 6)), "step": np.array([0])})
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="was closed"):
        engine.bind(context)({"latents": np.zeros((1, 16, 6, 6), np.float32), "step": np.array([0])})


def test_tensors_of_another_runtime_are_refused(bundle: Bundle) -> None:
    with open_engine(bundle, "stage_c.step", "openvino") as step, pytest.raises(EngineError, match="another runtime"):
        step.bind({"modulation": np.zeros((1, 4), np.float32)})  # type: ignore[dict-item]


def test_a_precision_that_the_processor_lacks_is_one_line(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    import openvino

    class OldCore(openvino.Core):  # type: ignore[misc]
        def get_property(self, *_: str) -> Any:
            return ["INT8"]

    monkeypatch.setattr(openvino, "Core", OldCore)
    with pytest.raises(EngineError, match="does not compute under OpenVINO") as error:
        open_engine(bundle, "text_encoder", "openvino")
    assert "--provider cpu" in str(error.value)


def test_the_provider_is_known() -> None:
    assert resolve_provider("openvino") == "openvino"
    assert resolve_provider("auto") in ("cpu", "cuda")


def _is_weight(node: Any) -> bool:
    if node.get_type_name() == "Reshape":  # of a 1 x 1 convolution
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "Constant")


def test_unit_factors_go_and_nothing_else_changes(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO multiplies every weight with Gemm's alpha, which is 1, and keeps the products."""
    import openvino

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
        with open_engine(bundle, "stage_c.step", "openvino") as engine:
            latents = np.random.default_rng(1).standard_normal((1, 16, 6, 6), np.float32)
            return engine.bind(context)({"latents": latents, "step": np.array([0])})["prediction"]

    context = _context(bundle)
    without = prediction()
    monkeypatch.setattr(backend, "_drop_unit_factors", lambda model: None)
    assert np.abs(without - prediction()).max() < 1e-5 * np.abs(without).max()


@pytest.mark.parametrize(("value", "dropped"), [(1.0, True), (0.5, False), (-1.0, False)])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_only_a_scalar_one_is_a_unit_factor(dtype: str, value: float, dropped: bool) -> None:
    import openvino
    from openvino import opset8 as ops
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


def test_auto_does_not_import_it() -> None:
    """Its import takes longer than a small model does, and `auto` mostly ends with another provider."""
    pytest.importorskip("onnxruntime")
    code = "import sys, cascade_rt.backends as b; print(b.resolve_provider('auto'), 'openvino' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[1] == "False"


def test_a_unit_factor_goes_from_either_side_and_names_stay() -> None:
    import openvino
    from openvino import opset8 as ops

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
