"""Engines compiled by OpenVINO itself, where ONNX Runtime's plugin knows no device."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cascade_rt import CascadePipeline, EngineError, backends
from cascade_rt.backends import open_engine, resolve_provider
from cascade_rt.bundle import Bundle, find_bundle
from cascade_rt.sampling import timestep_embedding

if importlib.util.find_spec("openvino") is None:
    pytest.skip("openvino is not installed: pip install 'cascade-rt[openvino]'", allow_module_level=True)


@pytest.fixture(autouse=True)
def _without_the_plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backends, "_plugin_knows_this_machine", lambda: False)
    return


@pytest.fixture
def bundle(shipped: Path) -> Bundle:
    return find_bundle(shipped)


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
