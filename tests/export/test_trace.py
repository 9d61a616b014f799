"""Every engine of the table traces, in every precision, as the table says."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch

from cascade_export.components import Component
from cascade_export.graphs import CALLS, dims_of
from cascade_export.loading import weights_of
from cascade_export.models import build_model
from cascade_export.models.blocks import GlobalResponseNorm
from cascade_export.trace import OPSET, WEIGHT_DTYPE, save, trace
from cascade_export.weights import write_safetensors
from cascade_rt.stages import ENGINES, Precision
from cascades import SMALL_CONFIGS


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", list(ENGINES))
def test_an_engine_traces(name: str, precision: Precision, tmp_path: Path) -> None:
    config = json.loads(json.dumps(SMALL_CONFIGS[ENGINES[name].model]))
    spec = ENGINES[name].resolve(dims_of(name, config), precision)
    traced = trace(spec, config, precision)
    assert traced.opset == OPSET[precision]
    source = weights_of(spec.model, config, Component(config, None))
    dtype = WEIGHT_DTYPE[precision]
    places = write_safetensors(tmp_path / "w.safetensors", traced.weights, source, dtype)
    save(traced, tmp_path / "g.onnx", "w.safetensors", places, dtype)
    onnx.checker.check_model(str(tmp_path / "g.onnx"), full_check=True)
    graph = onnx.load(tmp_path / "g.onnx", load_external_data=False).graph
    kinds = {"float32": 1, "uint8": 2, "int64": 7, "float16": 10, "bfloat16": 16}
    for values, tensors in ((graph.input, spec.inputs), (graph.output, spec.outputs)):
        assert [v.name for v in values] == [t.name for t in tensors]
        for value, tensor in zip(values, tensors, strict=True):
            shape = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            assert shape == list(tensor.axes)
            assert value.type.tensor_type.elem_type == kinds[tensor.dtype]
            assert tensor.dtype == "float32" or tensor.constant or not tensor.dtype.endswith("16")
    # every weight keeps its key, and none is copied into the graph
    external = {i.name for i in graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL}
    with torch.device("meta"):
        keys = build_model(spec.model, config).state_dict().keys()
    assert external == set(traced.weights)
    assert external <= set(keys)


@pytest.mark.parametrize("name", ["stage_b.step", "stage_a.decode", "stage_a.encode"])
def test_no_bf16_operator_that_cuda_lacks(name: str, tmp_path: Path) -> None:
    """ONNX Runtime's CUDA provider has no DepthToSpace and no Pad in bfloat16."""
    config = json.loads(json.dumps(SMALL_CONFIGS[ENGINES[name].model]))
    traced = trace(ENGINES[name].resolve(dims_of(name, config), "bf16"), config, "bf16")
    source = weights_of(ENGINES[name].model, config, Component(config, None))
    places = write_safetensors(tmp_path / "w.safetensors", traced.weights, source, torch.bfloat16)
    save(traced, tmp_path / "g.onnx", "w.safetensors", places, torch.bfloat16)
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "g.onnx", load_external_data=False)).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    found = [(n.op_type, kinds[n.input[0]]) for n in graph.node if n.op_type in ("DepthToSpace", "Pad")]
    assert found
    assert {kind for _, kind in found} == {onnx.TensorProto.FLOAT}


def test_matrices_go_into_products_as_the_checkpoint_has_them(tmp_path: Path) -> None:
    """A weight behind a Transpose would be copied by every runtime that loads the graph."""
    config = json.loads(json.dumps(SMALL_CONFIGS["stage_c"]))
    traced = trace(ENGINES["stage_c.step"].resolve(dims_of("stage_c.step", config), "fp32"), config, "fp32")
    source = weights_of("stage_c", config, Component(config, None))
    places = write_safetensors(tmp_path / "w.safetensors", traced.weights, source, torch.float32)
    save(traced, tmp_path / "g.onnx", "w.safetensors", places, torch.float32)
    graph = onnx.load(tmp_path / "g.onnx", load_external_data=False).graph
    weights = {i.name for i in graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL}
    transposed = [n.input[0] for n in graph.node if n.op_type == "Transpose" and n.input[0] in weights]
    products = [n for n in graph.node if n.op_type == "Gemm" and n.input[1] in weights]
    assert not transposed
    assert len(products) >= sum(name.endswith((".0.weight", ".4.weight")) for name in weights if "channelwise" in name)
    assert all(len(n.input) == 3 for n in products), "the bias belongs into the product"


def test_a_channel_that_is_silent_everywhere_does_not_end_a_training() -> None:
    norm = GlobalResponseNorm(2)
    x = torch.zeros(1, 2, 2, 2)
    x[..., 1] = torch.arange(4.0).view(1, 2, 2)
    x.requires_grad_()
    with torch.no_grad():
        norm.gamma.fill_(0.5)
    norm(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0


def test_every_engine_has_a_call() -> None:
    assert set(CALLS) == set(ENGINES)
