"""Linear layers in 8 bits: which of them can be, which had better not, and the graphs that compute them.

A layer's weight is int8, symmetric, with a scale for each output channel (`cascade_rt.stored`); its input is quantised
in every call, by the range of what comes. ONNX Runtime's ``com.microsoft.DynamicQuantizeMatMul`` is both in one
operator, and OpenVINO reads it as compressed weights. Norms, softmax, convolutions, the GRN and everything else stay as
they are, and so does the timestep path, which all precisions compute in float32.

No calibration is needed, but a scan: an input with a few values far beyond the rest is quantised too coarsely for the
others. A layer whose product is much further from the exact one than those of most layers stays in float32, and the
manifest says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from onnx_ir.passes import common
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cascade_rt.errors import ExportError
from cascade_rt.manifest import Int8Record
from cascade_rt.stages import EngineSpec
from cascade_rt.stored import quantised, restored, scales_of

from .models.blocks import TimestepBlock
from .trace import Traced

TIMES_MEDIAN, ALWAYS_FINE, MOST_ERROR = 3.0, 0.03, 0.1
"""A layer stays in float32 where the relative error of its product in 8 bits is so many times that of the network's
median layer and above ``ALWAYS_FINE``, or above ``MOST_ERROR``. Of gaussian inputs it is 0.01; random weights, whose
streams are uneven throughout, have a median of 0.04, and with one bound for all networks half their layers are wide."""
ROWS = 64
"""How many rows of an input a product's error is measured on."""
_OUT, _IN = 32, 32
"""Kernels for 8 bits work on so many outputs and inputs at a time. Layers with fewer, a network's last ones among them,
are not worth their error."""
_CONTRIB = "com.microsoft"


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What a scan of a network's linear layers saw.

    Attributes:
        errors: key of a weight -> largest relative error of its product in 8 bits.
    """

    errors: Mapping[str, float]

    def record(self, layers: Iterable[str]) -> Int8Record:
        """Which of the layers whose weights have these keys are computed in 8 bits, and why others are not."""
        errors = {key: self.errors.get(key, 0.0) for key in sorted(layers)}
        median = statistics.median(errors.values()) if errors else 0.0
        most = min(MOST_ERROR, max(ALWAYS_FINE, TIMES_MEDIAN * median))
        narrow = [error for error in errors.values() if error <= most]
        wide = {
            key: f"its product in 8 bits is {error:.1e} from the exact one, that of the median layer {median:.1e}"
            for key, error in errors.items()
            if error > most
        }
        return Int8Record(layers=len(narrow), largest_error=float(f"{max(narrow, default=0.0):.3e}"), wide=wide)


def scan_products(module: nn.Module, run: Callable[[], object]) -> Scan:
    """Run a network and measure what 8 bits would make of its linear layers.

    Args:
        module: fp32, with its weights.
        run: runs it, on inputs as they come in use.

    Raises:
        ExportError: the network makes NaN or infinity.
    """
    exact = {
        weight.data_ptr()
        for block in module.modules()
        if isinstance(block, TimestepBlock)
        for weight in block.parameters()
    }
    keys = {
        weight.data_ptr(): key
        for key, weight in module.state_dict(keep_vars=True).items()
        if fits(tuple(weight.shape)) and weight.data_ptr() not in exact
    }
    errors: dict[str, float] = {}
    with torch.inference_mode(), _Products(keys, errors):
        run()
    return Scan(errors=errors)


def fits(shape: tuple[int, ...]) -> bool:
    """Whether kernels for 8 bits take a weight of this shape: a matrix, or a convolution of one pixel."""
    plain = len(shape) >= 2 and all(size == 1 for size in shape[2:])
    return plain and shape[0] % _OUT == 0 and shape[1] % _IN == 0


class _Products(TorchFunctionMode):
    """Measures every product with a weight that is watched."""

    def __init__(self, keys: Mapping[int, str], errors: dict[str, float]) -> None:
        """Watch.

        Args:
            keys: address of a weight -> its key.
            errors: is filled: key -> largest relative error.
        """
        super().__init__()
        self._keys, self._errors = keys, errors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is F.linear and (key := self._keys.get(args[1].data_ptr())) is not None:
            self._errors[key] = max(self._errors.get(key, 0.0), _error(key, args[0], args[1]))
        return made


def _error(key: str, x: Tensor, weight: Tensor) -> float:
    """Relative error of ``x @ weight.T`` in 8 bits, on some rows of ``x``."""
    flat = x.reshape(-1, x.shape[-1])
    low, high = min(float(flat.min()), 0.0), max(float(flat.max()), 0.0)
    if not high - low < float("inf"):
        raise ExportError(f"the input of {key} holds NaN or infinity in fp32 already; the checkpoint is damaged")
    rows = flat[:: max(1, len(flat) // ROWS)]
    step = (high - low) / 255 or 1.0
    zero = round(-low / step)
    coarse = ((rows / step).round().add(zero).clamp(0, 255) - zero) * step
    narrow = torch.from_numpy(restored(*quantised(weight.detach().numpy()), shape=tuple(weight.shape)))
    exact = rows @ weight.T
    size = float(exact.norm())
    return float((coarse @ narrow.T - exact).norm()) / size if size else 0.0


def products_of(graphs: Mapping[str, Traced], rows: Iterable[EngineSpec]) -> set[str]:
    """Keys of the weights that graphs use in products alone, of shapes that kernels take.

    What a context engine computes once a picture, and every step builds on, stays as it is; its keys and values have
    the weights of the step.

    Args:
        graphs: of a component, by the engine's name.
        rows: its engines.
    """
    found: set[str] = set()
    others: set[str] = set()
    for spec in rows:
        own = _products(graphs[spec.name].model.graph)
        others |= set(graphs[spec.name].weights) - own.keys()
        if not any(tensor.constant for tensor in spec.outputs):
            found |= own.keys()
    return found - others


def to_int8(traced: Traced, chosen: Iterable[str]) -> Traced:
    """A graph with products in 8 bits; the given one is changed.

    Args:
        traced: from `trace`.
        chosen: keys of the weights that are stored in 8 bits.
    """
    graph, products = traced.model.graph, _products(traced.model.graph)
    narrow = [key for key in chosen if key in products]
    for key in narrow:
        values, scales = _stored(graph.initializers[key])
        for node in products[key]:
            _replace(graph, node, values, scales)
        del graph.initializers[key]
        for value in (values, scales):
            graph.initializers[str(value.name)] = value
    if narrow:
        traced.model.opset_imports[_CONTRIB] = 1
        common.RemoveUnusedNodesPass()(traced.model)
    return Traced(traced.model, traced.weights, frozenset(narrow))


def _products(graph: ir.Graph) -> dict[str, list[ir.Node]]:
    """Weights that are used in products alone -> those products."""
    found: dict[str, list[ir.Node]] = {}
    for name, weight in graph.initializers.items():
        if fits(shape := _shape(weight)):
            nodes = list(_multiplied(weight, len(shape)))
            products = [node for node in nodes if node is not None]
            if products and len(products) == len(nodes):
                found[name] = products
    return found


def _shape(weight: ir.Value) -> tuple[int, ...]:
    assert weight.shape is not None  # an initializer's
    return weight.shape.numpy()


def _multiplied(value: ir.Value, axes: int, made_by: str = "") -> Iterator[ir.Node | None]:
    """What a weight of ``axes`` axes is multiplied by; None for every use of another kind.

    A convolution of one pixel is made a matrix in the graph, and a layer of transformers is transposed there.
    """
    for node, index in value.uses():
        product = _is_plain(node) if made_by != "Transpose" else node.op_type == "MatMul"
        if product and index == 1:
            yield node
        elif not made_by and index == 0 and (node.op_type, axes) in (("Reshape", 4), ("Transpose", 2)):
            yield from _multiplied(node.outputs[0], axes, node.op_type)
        else:
            yield None


def _is_plain(node: ir.Node) -> bool:
    """Whether a node is a Gemm that computes ``x @ weight.T + bias``."""
    numbers = {"transA": 0, "alpha": 1, "beta": 1} | {name: a.value for name, a in node.attributes.items()}
    return node.op_type == "Gemm" and numbers == {"transA": 0, "transB": 1, "alpha": 1, "beta": 1}


def _stored(weight: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The initializers of a weight in 8 bits, as `cascade_rt.stored` has them."""
    (rows, columns), name = _shape(weight)[:2], str(weight.name)
    values = ir.Value(name=name, shape=ir.Shape([columns, rows]), type=ir.TensorType(ir.DataType.INT8))
    scales = ir.Value(name=scales_of(name), shape=ir.Shape([rows]), type=ir.TensorType(ir.DataType.FLOAT))
    return values, scales


def _replace(graph: ir.Graph, product: ir.Node, values: ir.Value, scales: ir.Value) -> None:
    """Put a product in 8 bits in a product's place; a Gemm may have a bias."""
    inputs: list[ir.Value | None] = [product.inputs[0], values, scales]
    if len(product.inputs) > 2:
        inputs += [None, product.inputs[2]]  # no zero points
    node = ir.node("DynamicQuantizeMatMul", inputs, domain=_CONTRIB)
    ir.convenience.replace_nodes_and_values(graph, product, [product], [node], product.outputs, node.outputs)
