"""Module -> ONNX graph without weights in memory.

The module is traced over fake tensors, every weight keeps its checkpoint key as the initializer's name, and the saved
graph points into a safetensors file. Why each step is needed is said beside it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes import common
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from cascade_rt.errors import ExportError
from cascade_rt.stages import Axis, AxisRange, EngineSpec, Precision, axis_of
from cascade_rt.stored import Kind, scales_of

from .catalog import Call, Config, build_model, call_of

TORCH_DTYPE: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "uint8": torch.uint8,
}
_ONNX_DTYPE = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
ONNX_8_BITS: dict[Kind, ir.DataType] = {"I8": ir.DataType.INT8, "F8_E4M3": ir.DataType.FLOAT8E4M3FN}
_PREFIX = "model."


@dataclass(frozen=True)
class Traced:
    """A graph and the weights that it uses.

    Attributes:
        model: the graph.
        weights: keys in the checkpoint.
        quantised: those of them that are stored in 8 bits, and as what.
    """

    model: ir.Model
    weights: tuple[str, ...]
    quantised: Mapping[str, Kind] = field(default_factory=dict)


class _Graph(nn.Module):
    """One engine as a module with one argument, the named inputs."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model = model
        self._call = call

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return self._call(self.model, inputs)


def trace(
    spec: EngineSpec,
    config: Config,
    precision: Precision,
    prepare: Callable[[nn.Module], None] = lambda module: None,
) -> Traced:
    """Trace an engine.

    Args:
        spec: resolved row of the table.
        config: of its component.
        precision: compute dtype and opset.
        prepare: told of the module before it is traced; sets what a precision needs.

    Raises:
        ExportError: the graph does not come out as the table says.
    """
    with _quiet(), FakeTensorMode():
        module = _build(spec.model, config, TORCH_DTYPE[precision.compute])
        prepare(module)
        examples, shapes = _examples(spec)
        program = torch.onnx.export(
            _Graph(module, call_of(spec)),
            (),
            kwargs={"inputs": examples},
            dynamo=True,
            # torch's own optimisation reads weights, and renames and transposes those of every Linear
            optimize=False,
            opset_version=precision.opset,
            dynamic_shapes={"inputs": shapes},
            input_names=[t.name for t in spec.inputs],
            output_names=[t.name for t in spec.outputs],
            verbose=False,
        )
    assert program is not None  # only None for the legacy exporter
    graph = program.model.graph
    # hidden weights are neither read nor renamed nor merged by the passes, which then clean up shapes and constants
    hidden = [v for name, v in graph.initializers.items() if name.startswith(_PREFIX)]
    for value in hidden:
        value.const_value = None
    with _quiet():
        _simplify(program.model)
    for value in hidden:
        name = str(value.name)
        if name in graph.initializers:
            del graph.initializers[name]
            value.name = name.removeprefix(_PREFIX)
            graph.initializers[value.name] = value
    weights = tuple(str(v.name) for v in hidden if v.name in graph.initializers and v.uses())
    for name in [n for n, v in graph.initializers.items() if not v.uses()]:
        del graph.initializers[name]
    if precision.weights != precision.compute:
        _widen(graph, weights, precision)
    _check_and_name(spec, graph)
    program.model.doc_string = f"cascade-rt {spec.name} ({precision.name})"
    return Traced(program.model, weights)


def _widen(graph: ir.Graph, weights: Iterable[str], precision: Precision) -> None:
    """Have a graph read its weights in the dtype in which they are stored, and cast them to that of its arithmetic.

    Runtimes fold the casts when they load the graph.
    """
    stored, compute = (_ONNX_DTYPE[kind] for kind in (precision.weights, precision.compute))
    casts = []
    for name in weights:
        value = graph.initializers[name]
        wide = ir.Value(name=f"{name}.wide", shape=value.shape, type=ir.TensorType(compute))
        value.replace_all_uses_with(wide)
        casts.append(ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(compute))], outputs=[wide]))
        value.type = ir.TensorType(stored)
    graph.insert_before(graph[0], casts)


def _build(component: str, config: Config, dtype: torch.dtype) -> nn.Module:
    """A module made in ``dtype``: fake parameters cannot be converted afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return build_model(component, config)
    finally:
        torch.set_default_dtype(before)


def save(traced: Traced, path: Path, weights: str, places: Mapping[str, tuple[int, int]], dtype: torch.dtype) -> None:
    """Write the graph, its weights pointing into the safetensors file ``weights`` beside it.

    Args:
        traced: from `trace`.
        path: ``.onnx`` file to write.
        weights: file name beside ``path``.
        places: byte offset and length of every tensor there.
        dtype: of the tensors there that are not in 8 bits, and of the scales of those.
    """
    kinds = {
        torch.float32: ir.DataType.FLOAT,
        torch.float16: ir.DataType.FLOAT16,
        torch.bfloat16: ir.DataType.BFLOAT16,
    }
    dtypes = dict.fromkeys(traced.weights, kinds[dtype]) | {n: ONNX_8_BITS[k] for n, k in traced.quantised.items()}
    dtypes |= {scales_of(name): kinds[dtype] for name in traced.quantised}
    for name, kind in dtypes.items():
        value = traced.model.graph.initializers[name]
        offset, length = places[name]
        assert value.shape is not None
        value.const_value = ir.ExternalTensor(
            weights, offset, length, kind, shape=value.shape, name=name, base_dir=path.parent
        )
    ir.save(traced.model, path)


def _examples(spec: EngineSpec) -> tuple[dict[str, Tensor], dict[str, dict[int, Any]]]:
    """Example inputs and torch's dynamic shapes for them.

    A named size is a multiple of a unit, so ``height`` and ``height/2`` are both whole multiples of one unit: torch
    derives axes from each other in no other way. Example sizes in units all differ and none is 0 or 1, so that torch
    takes none for a constant.
    """
    names = dict.fromkeys(name for tensor in spec.inputs for name in tensor.free_names)
    units: dict[str, tuple[int, Any]] = {}
    for index, name in enumerate(names):
        unit = _unit(name, spec.ranges[name])
        units[name] = (max(2, unit.min) + index, unit)
    examples: dict[str, Tensor] = {}
    shapes: dict[str, dict[int, Any]] = {}
    for tensor in spec.inputs:
        sizes = [(a, None) if isinstance(a, int) else _axis(spec, axis_of(a), units) for a in tensor.axes]
        shapes[tensor.name] = {i: dim for i, (_, dim) in enumerate(sizes) if dim is not None}
        examples[tensor.name] = torch.zeros([size for size, _ in sizes], dtype=TORCH_DTYPE[tensor.dtype])
    return examples, shapes


def _unit(name: str, limits: AxisRange) -> Any:
    """The dimension for torch that a named size is a multiple of."""
    return torch.export.Dim(f"{name}_unit", min=max(1, limits.min // limits.multiple), max=limits.max)


def _axis(spec: EngineSpec, axis: Axis, units: Mapping[str, tuple[int, Any]]) -> tuple[int, Any]:
    """The example size of an input's axis, and torch's dimension.

    Raises:
        ExportError: the formula has several names, or a size that is no whole multiple of the unit.
    """
    (times, name), *others = axis.terms
    per_unit = times * spec.ranges[name].multiple
    if others or per_unit % axis.over or axis.plus % axis.over:
        raise ExportError(
            f"{spec.name}: an input's axis must be a whole multiple of one named size plus a number; this one is {axis}"
        )
    size, unit = units[name]
    per_unit, plus = per_unit // axis.over, axis.plus // axis.over
    dim = unit if per_unit == 1 else per_unit * unit
    return per_unit * size + plus, dim + plus if plus else dim


def _simplify(model: ir.Model) -> None:
    """Fold what the tracer computed of shapes, and drop what nothing uses.

    Not `optimize_ir`: its rewrite rules took half of the export's time and left the graphs as they were; engines do
    those fusions themselves.
    """
    onnxscript.optimizer.fold_constants(model)
    passes = ir.passes.Sequential(
        common.IdentityEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=False),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    )
    passes(model)
    _drop_idle_transposes(model.graph)


def _drop_idle_transposes(graph: ir.Graph) -> None:
    """Remove transposes that leave every axis where it is, which torch's indexing makes.

    Up to version 1.29, ONNX Runtime folds one into the Gemm behind it as if it exchanged the axes. Python 3.10 has no
    newer one than 1.23.
    """
    for node in list(graph):
        if node.op_type != "Transpose" or node.outputs[0].is_graph_output():
            continue
        perm = node.attributes.get("perm")
        if perm is not None and list(perm.as_ints()) == sorted(perm.as_ints()):
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])  # type: ignore[arg-type]
            graph.remove(node, safe=True)


def _check_and_name(spec: EngineSpec, graph: ir.Graph) -> None:
    """Compare the graph's inputs and outputs with the table, and give their axes the table's names."""
    for values, tensors in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        names = [v.name for v in values]
        if names != [t.name for t in tensors]:
            raise ExportError(f"the graph of {spec.name} has {names}; the table says {[t.name for t in tensors]}")
        for value, tensor in zip(values, tensors, strict=True):
            made = [d if isinstance(d, int) else None for d in value.shape or ()]
            wanted = [a if isinstance(a, int) else None for a in tensor.axes]
            if len(made) != len(wanted) or any(m not in (w, None) for m, w in zip(made, wanted, strict=True)):
                raise ExportError(f"{spec.name}: {tensor.name} came out as {value.shape}; the table says {tensor.axes}")
            value.shape = ir.Shape(list(tensor.axes))
    outer = {id(v) for v in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    for node in graph:
        node.metadata_props.clear()  # stack traces of this machine, several times the size of the graph itself
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if id(value) not in outer:
                value.shape = None  # torch's symbols would stand beside the table's names


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what torch's exporter prints of its progress, and its warnings of torchvision: our user needs neither."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), Path(os.devnull).open("w") as null, contextlib.redirect_stdout(null):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
