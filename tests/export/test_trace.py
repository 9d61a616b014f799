"""Every engine of the table traces, in every precision, as the table says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from cascade_export.catalog import COMPONENTS, build_model
from cascade_export.loading import weights_of
from cascade_export.models.blocks import GlobalResponseNorm
from cascade_export.networks import Network
from cascade_export.trace import TORCH_DTYPE, Traced, save, trace
from cascade_export.weights_file import write_weights
from cascade_rt.errors import ExportError
from cascade_rt.stages import ENGINES, PRECISIONS, EngineSpec, axis_of, tensor_row
from cascades import SMALL_CONFIGS
from reference import rel_l2


def config_of(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.dumps(SMALL_CONFIGS[ENGINES[name].model]))
    return config


def resolved(name: str, precision: str = "fp32") -> EngineSpec:
    row = ENGINES[name]
    return row.resolve(COMPONENTS[row.model].dims(config_of(name)), PRECISIONS[precision])


def saved(name: str, precision: str, folder: Path) -> tuple[Traced, onnx.GraphProto]:
    """A traced engine, written with random weights; its graph without them."""
    config, recipe = config_of(name), PRECISIONS[precision]
    traced = trace(resolved(name, precision), config, recipe)
    source = weights_of(ENGINES[name].model, config, Network(config=config, weights=None))
    dtype = TORCH_DTYPE[recipe.weights]
    written = write_weights(folder / "w.safetensors", traced.weights, source, dtype)
    save(traced, folder / "g.onnx", "w.safetensors", written.places, dtype)
    return traced, onnx.load(folder / "g.onnx", load_external_data=False).graph


TRACED = [(name, precision) for name in ENGINES for precision in ("fp32", "fp16", "bf16")]


@pytest.mark.parametrize(("name", "precision"), [*TRACED, ("previewer", "w16")])
def test_an_engine_traces(name: str, precision: str, tmp_path: Path) -> None:
    spec = resolved(name, precision)
    traced, graph = saved(name, precision, tmp_path)
    onnx.checker.check_model(str(tmp_path / "g.onnx"), full_check=True)
    assert traced.model.opset_imports[""] == PRECISIONS[precision].opset
    perms = [list(a.ints) for node in graph.node if node.op_type == "Transpose" for a in node.attribute]
    assert all(perm != sorted(perm) for perm in perms), (
        "a transpose that does nothing; ONNX Runtime 1.29 folds it wrong"
    )
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
        keys = build_model(spec.model, config_of(name)).state_dict().keys()
    assert external == set(traced.weights)
    assert external <= set(keys)


@pytest.mark.parametrize("name", ["stage_c.step", "stage_b.step"])
def test_every_sample_takes_its_own_row_of_the_table(name: str) -> None:
    """The rows of a call may stand at different steps: the table is read once for each of them."""
    graph = trace(resolved(name), config_of(name), PRECISIONS["fp32"]).model.graph
    reads = [node for node in graph if node.op_type == "Gather" and node.inputs[0] is graph.inputs[2]]
    assert graph.inputs[2].name == "modulation"
    assert len(reads) == 1
    splits = [node for node in graph if node.op_type == "Split"]
    levels = [tensor for tensor in resolved(name).inputs if tensor.name.startswith("kv_")]
    assert len(splits) == 1 + len(levels), "one for all scales and shifts, and one for the keys and values of a level"


def test_an_axis_of_two_names_is_no_axis_of_an_input() -> None:
    row = ENGINES["stage_c.step"]
    spec = resolved("stage_c.step")
    odd = tensor_row("odd", "float32", "batch height+width", "what torch cannot derive from one size")
    assert len(axis_of("height+width").terms) == 2
    changed = replace(spec, inputs=(*spec.inputs, odd))
    with pytest.raises(ExportError, match=r"stage_c\.step: an input's axis must be a whole multiple of one named size"):
        trace(changed, config_of(row.name), PRECISIONS["fp32"])


@pytest.mark.parametrize("name", ["stage_b.step", "stage_a.decode", "stage_a.encode"])
def test_no_bf16_operator_that_cuda_lacks(name: str, tmp_path: Path) -> None:
    """ONNX Runtime's CUDA provider has no DepthToSpace and no Pad in bfloat16."""
    saved(name, "bf16", tmp_path)
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "g.onnx", load_external_data=False)).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    found = [(n.op_type, kinds[n.input[0]]) for n in graph.node if n.op_type in ("DepthToSpace", "Pad")]
    assert found
    assert {kind for _, kind in found} == {onnx.TensorProto.FLOAT}


def test_matrices_go_into_products_as_the_checkpoint_has_them(tmp_path: Path) -> None:
    """A weight behind a Transpose would be copied by every runtime that loads the graph."""
    _, graph = saved("stage_c.step", "fp32", tmp_path)
    weights = {i.name for i in graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL}
    transposed = [n.input[0] for n in graph.node if n.op_type == "Transpose" and n.input[0] in weights]
    products = [n for n in graph.node if n.op_type == "Gemm" and n.input[1] in weights]
    assert not transposed
    assert len(products) >= sum(name.endswith((".0.weight", ".4.weight")) for name in weights if "channelwise" in name)
    assert all(len(n.input) == 3 for n in products), "the bias belongs into the product"


def test_a_channel_that_is_zero_everywhere_has_a_finite_gradient() -> None:
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


def test_weights_of_half_the_size_are_widened_before_they_are_used(tmp_path: Path) -> None:
    """The arithmetic is that of fp32 over rounded weights."""
    runs = {}
    for precision in ("fp32", "w16"):
        folder = tmp_path / precision
        folder.mkdir()
        traced, graph = saved("previewer", precision, folder)
        kinds = {entry.name: entry.data_type for entry in graph.initializer}
        stored = {kinds[name] for name in traced.weights}
        assert stored == {onnx.TensorProto.FLOAT if precision == "fp32" else onnx.TensorProto.FLOAT16}
        session = onnxruntime.InferenceSession(folder / "g.onnx", providers=["CPUExecutionProvider"])
        latents = np.random.default_rng(0).standard_normal((1, 16, 4, 6), dtype=np.float32)
        runs[precision] = session.run(None, {"latents": latents})[0]
    sizes = {precision: (tmp_path / precision / "w.safetensors").stat().st_size for precision in runs}
    assert sizes["w16"] < 0.6 * sizes["fp32"]
    assert 1e-6 < rel_l2(runs["w16"], runs["fp32"]) < 1e-3


def test_every_engine_has_a_call() -> None:
    assert {name: row.model for name, row in ENGINES.items()} == {
        engine: component.name for component in COMPONENTS.values() for engine in component.calls
    }
