"""w8: weights in 8 bits, widened in the graph; products and inputs are those of fp32."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from cascade_export.checkpoints import open_checkpoint
from cascade_export.exporter import export
from cascade_export.job import ExportRequest
from cascade_rt import CascadePipeline
from cascade_rt.bundle import Bundle
from cascade_rt.stages import PRECISIONS
from reference import rel_l2

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="openvino is not installed: pip install 'cascade-rt[openvino]'"
)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped text encoder and Stage C, verified."""
    out = tmp_path_factory.mktemp("w8") / "bundle"
    request = ExportRequest(stages=("text", "c"), precision=PRECISIONS["w8"], out=out, quiet=True)
    return export(open_checkpoint(None, "tiny"), request).path


def test_weights_alone_are_in_8_bits(narrow: Path) -> None:
    for name in ("stage_c.step", "text_encoder"):
        graph = onnx.load(narrow / f"{name}.onnx", load_external_data=False).graph
        kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
        readers = [node for node in graph.node if node.op_type == "DequantizeLinear"]
        assert {node.input[0] for node in readers} == {n for n, kind in kinds.items() if kind == onnx.TensorProto.INT8}
        assert len(readers) > 5
        assert not {"QuantizeLinear", "DynamicQuantizeMatMul"} & {node.op_type for node in graph.node}


def test_the_file_is_smaller(narrow: Path, shipped: Path) -> None:
    """Less so than of the published networks: tiny's embeddings, norms and contexts count for more."""
    for name in ("stage_c", "text_encoder"):
        made, wide = (folder / f"{name}.safetensors" for folder in (narrow, shipped))
        stored = load_file(made)
        assert sum(values.dtype == np.int8 for values in stored.values()) > 5
        assert made.stat().st_size < 0.6 * wide.stat().st_size


def test_its_error_is_that_of_rounded_weights(narrow: Path) -> None:
    """Weights are rounded, and nothing else is; no scan has decided anything."""
    for engine in Bundle(narrow).manifest.engines:
        assert engine.verification is not None
        assert 1e-4 < engine.verification.rel_l2 < 2e-2, engine.name
    assert all(not model.quantised for model in Bundle(narrow).manifest.models.values())


@pytest.mark.parametrize("provider", ["cpu", pytest.param("openvino", marks=needs_openvino)])
def test_providers_compute_the_same(narrow: Path, pipe: CascadePipeline, provider: str) -> None:
    """Both are kept from quantising inputs by themselves, which they do for such weights: 1 % in a product."""

    def embeddings(pipeline: CascadePipeline) -> NDArray[Any]:
        made = pipeline.prior("a large red circle at the left", seed=3, num_inference_steps=5)
        return np.asarray(made.image_embeddings)

    with (
        CascadePipeline.from_pretrained(narrow, provider=provider) as made,
        CascadePipeline.from_pretrained(narrow, provider="cpu") as other,
    ):
        assert rel_l2(embeddings(made), embeddings(other)) < 1e-4
        assert 1e-5 < rel_l2(embeddings(made), embeddings(pipe)) < 2e-2
