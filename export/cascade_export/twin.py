"""A bf16 graph's twin in fp32 arithmetic, for machines on which nothing runs bf16.

ONNX Runtime's CPU provider has no bf16 convolution. So that a bf16 export can be verified on any machine all the same,
the twin runs the same graph over the same bf16 weights, with every operation in fp32: it checks the graph, the names
and every byte of the weights. What it cannot show is the rounding of bf16 arithmetic, and the figures say so.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

_BF16, _FP32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def write_fp32_twin(graph: Path, twin: Path) -> None:
    """Write the twin of a bf16 graph.

    Args:
        graph: the bf16 graph; its weights lie beside it.
        twin: file to write, in the same folder: it points into the same weights.
    """
    model = ir.load(graph)
    g = model.graph
    for value in [v for v in g.initializers.values() if v.dtype == _BF16]:
        _widen(g, value)
    for node in list(g):
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.INT and name == "to" and attribute.as_int() == _BF16:
                node.attributes[name] = ir.AttrInt64(name, _FP32)
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == _BF16:
                wide = ir.tensor(attribute.as_tensor().numpy().astype("float32"))
                node.attributes[name] = ir.AttrTensor(name, wide)
        for output in node.outputs:
            if output.dtype == _BF16:
                output.dtype = _FP32
    for value in (*g.inputs, *g.outputs):
        if value.dtype == _BF16:
            value.dtype = _FP32
    ir.save(model, twin)


def _widen(graph: ir.Graph, value: ir.Value) -> None:
    """Put a Cast to fp32 between a bf16 initializer and its uses."""
    uses = list(value.uses())
    cast = ir.node("Cast", [value], attributes={"to": int(_FP32)})
    cast.outputs[0].name = f"{value.name}.fp32"
    cast.outputs[0].dtype = _FP32
    cast.outputs[0].shape = value.shape
    for node, index in uses:
        node.replace_input_with(index, cast.outputs[0])
    graph.insert_before(graph[0], cast)
