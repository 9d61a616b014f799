"""Linear layers in 8 bits: which of them can be, which had better not, and the graphs that compute them.

A layer's weight is int8 or E4M3, symmetric, with a scale for each output channel (`cascade_rt.stored`). How its input
is quantised is a matter of the form:

* ``int8``: in every call, by the range of what comes. ONNX Runtime's ``com.microsoft.DynamicQuantizeMatMul`` is both in
  one operator, and OpenVINO reads it as compressed weights.
* ``w8``: not at all. ``DequantizeLinear`` widens the weight, which makes a small file and nothing faster.
* ``int8-static`` and ``fp8``: by one scale, which is found here, as ``QuantizeLinear`` and ``DequantizeLinear``. That
  is the form that TensorRT reads.

Norms, softmax, convolutions, the GRN and everything else stay as they are, and so does the timestep path, which all
precisions compute in float32.

Where inputs are quantised, a scan runs the network in float32. An input with a few values far beyond the rest is
quantised too coarsely for the others: a layer whose product is much further from the exact one than those of most
layers stays wide, and the manifest says so. Of a static form the scan runs twice: once for the largest value of every
input, and once to measure products with several scales up to the one of that value, of which the one with the smallest
error is taken.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from onnx_ir.passes import common
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cascade_rt.errors import ExportError
from cascade_rt.manifest import QuantisedRecord
from cascade_rt.stages import EngineSpec, Linear
from cascade_rt.stored import LARGEST, Kind, from_8_bits, in_8_bits, quantised, restored, scales_of

from .models.blocks import TimestepBlock
from .trace import ONNX_8_BITS, Traced

TIMES_MEDIAN, ALWAYS_FINE, MOST_ERROR = 3.0, 0.03, 0.1
"""A layer stays wide where the relative error of its product in 8 bits is so many times that of the network's median
layer and above ``ALWAYS_FINE``, or above ``MOST_ERROR``. Of gaussian inputs it is 0.01; random weights, whose streams
are uneven throughout, have a median of 0.04, and with one bound for all networks half their layers are wide."""
CLIPPED = (1.0, 0.85, 0.7, 0.55, 0.4)
"""What may be the end of a static form's range, as parts of the largest value that the scan saw."""
ROWS = 64
"""How many rows of an input a product's error is measured on."""
_OUT, _IN = 32, 32
"""Kernels for 8 bits work on so many outputs and inputs at a time. Layers with fewer, a network's last ones among them,
are not worth their error."""
_CONTRIB = "com.microsoft"


@dataclass(frozen=True, kw_only=True)
class Form:
    """How linear layers are computed in 8 bits.

    Attributes:
        kind: what weights are stored as, and inputs quantised to.
        inputs: ``static``: they have one scale, which the scan finds. ``dynamic``: every call has its own. ``wide``:
            they are not quantised, and nothing is scanned.
    """

    kind: Kind
    inputs: Literal["static", "dynamic", "wide"]

    @property
    def static(self) -> bool:
        """Whether inputs have one scale."""
        return self.inputs == "static"


FORMS: Mapping[Linear, Form] = {
    "w8": Form(kind="I8", inputs="wide"),
    "int8": Form(kind="I8", inputs="dynamic"),
    "int8-static": Form(kind="I8", inputs="static"),
    "fp8": Form(kind="F8_E4M3", inputs="static"),
}
"""By the word of `Precision.linear`."""


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What a scan of a network's linear layers saw.

    Attributes:
        errors: key of a weight -> largest relative error of its product in 8 bits.
        scales: key of a weight -> scale of its inputs, of a static form; layers whose inputs were all 0 have none.
    """

    errors: Mapping[str, float]
    scales: Mapping[str, float] = field(default_factory=dict)

    def record(self, layers: Iterable[str], form: Form) -> QuantisedRecord:
        """Which of the layers whose weights have these keys are computed in 8 bits, and why others are not."""
        layers = sorted(layers)
        wide = {key: "the scan saw no input of it" for key in layers if form.static and key not in self.scales}
        errors = {key: self.errors.get(key, 0.0) for key in layers if key not in wide}
        median = statistics.median(errors.values()) if errors else 0.0
        most = min(MOST_ERROR, max(ALWAYS_FINE, TIMES_MEDIAN * median))
        narrow = [error for error in errors.values() if error <= most]
        wide |= {
            key: f"its product in 8 bits is {error:.1e} from the exact one, that of the median layer {median:.1e}"
            for key, error in errors.items()
            if error > most
        }
        return QuantisedRecord(layers=len(narrow), largest_error=float(f"{max(narrow, default=0.0):.3e}"), wide=wide)


def scan_products(module: nn.Module, run: Callable[[], object], form: Form) -> Scan:
    """Run a network and measure what 8 bits would make of its linear layers.

    Args:
        module: fp32, with its weights.
        run: runs it, on inputs as they come in use; the same ones each time.
        form: how its layers would be computed.

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
    largest: dict[str, float] = {}
    errors: dict[str, list[float]] = {}

    def look(key: str, x: Tensor, weight: Tensor) -> None:
        del weight
        largest[key] = max(largest.get(key, 0.0), float(x.abs().max()))

    def measure(key: str, x: Tensor, weight: Tensor) -> None:
        ranges = [part * largest[key] for part in CLIPPED] if form.static else [None]
        made = _errors(key, x, weight, form.kind, ranges)
        errors[key] = [max(pair) for pair in zip(errors.get(key, made), made, strict=True)]

    for note in (look, measure) if form.static else (measure,):
        with torch.inference_mode(), _Products(keys, note):
            run()
    best = {key: min(found) for key, found in errors.items()}
    if not form.static:
        return Scan(errors=best)
    scales = {
        key: CLIPPED[errors[key].index(best[key])] * most / LARGEST[form.kind]
        for key, most in largest.items()
        if most > 0
    }
    return Scan(errors=best, scales=scales)


def fits(shape: tuple[int, ...]) -> bool:
    """Whether kernels for 8 bits take a weight of this shape: a matrix, or a convolution of one pixel."""
    plain = len(shape) >= 2 and all(size == 1 for size in shape[2:])
    return plain and shape[0] % _OUT == 0 and shape[1] % _IN == 0


class _Products(TorchFunctionMode):
    """Looks at every product with a weight that is watched."""

    def __init__(self, keys: Mapping[int, str], note: Callable[[str, Tensor, Tensor], None]) -> None:
        """Watch.

        Args:
            keys: address of a weight -> its key.
            note: is told of the key, input and weight of a product.
        """
        super().__init__()
        self._keys, self._note = keys, note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is F.linear and (key := self._keys.get(args[1].data_ptr())) is not None:
            self._note(key, args[0], args[1])
        return made


def _errors(key: str, x: Tensor, weight: Tensor, kind: Kind, ranges: Iterable[float | None]) -> list[float]:
    """Relative errors of ``x @ weight.T`` in 8 bits, on some rows of ``x``.

    Args:
        key: of the weight, for messages.
        x: ``[..., in]``.
        weight: ``[out, in]``.
        kind: of 8 bits.
        ranges: largest absolute value of a static scale; None: quantised by the range of ``x``.
    """
    flat = x.reshape(-1, x.shape[-1])
    low, high = min(float(flat.min()), 0.0), max(float(flat.max()), 0.0)
    if not high - low < float("inf"):
        raise ExportError(f"the input of {key} holds NaN or infinity in fp32 already; the checkpoint is damaged")
    furthest = flat.abs().amax(dim=1).argmax()  # what a range that is too small would cut
    rows = torch.cat([flat[:: max(1, len(flat) // ROWS)], flat[furthest : furthest + 1]])
    narrow = torch.from_numpy(restored(*quantised(weight.detach().numpy(), kind), shape=tuple(weight.shape)))
    exact = rows @ weight.T
    size = float(exact.norm())

    def error(most: float | None) -> float:
        coarse = _by_range(rows, low, high) if most is None else _by_scale(rows, most, kind)
        return float((coarse @ narrow.T - exact).norm()) / size if size else 0.0

    return [error(most) for most in ranges]


def _by_range(rows: Tensor, low: float, high: float) -> Tensor:
    """Rows in steps of a 255th of their range, as ``DynamicQuantizeLinear`` has them."""
    step = (high - low) / 255 or 1.0
    zero = round(-low / step)
    return ((rows / step).round().add(zero).clamp(0, 255) - zero) * step


def _by_scale(rows: Tensor, most: float, kind: Kind) -> Tensor:
    """Rows as ``QuantizeLinear`` and ``DequantizeLinear`` make them where ``most`` is the largest value of a kind."""
    scale = np.float32(most / LARGEST[kind] or 1.0)
    return torch.from_numpy(from_8_bits(in_8_bits((rows / float(scale)).numpy(), kind)) * scale)


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


def to_8_bits(traced: Traced, chosen: Iterable[str], form: Form, scales: Mapping[str, float]) -> Traced:
    """A graph with products in 8 bits; the given one is changed.

    Args:
        traced: from `trace`.
        chosen: keys of the weights that are stored in 8 bits.
        form: how their products are computed.
        scales: of a static form: key of a weight -> scale of its inputs.
    """
    graph, products = traced.model.graph, _products(traced.model.graph)
    narrow = [key for key in chosen if key in products]
    for key in narrow:
        stored = _Stored.of(graph.initializers[key], form.kind)
        if form.inputs == "dynamic":
            for node in products[key]:
                _replace_dynamic(graph, node, stored)
        else:
            _replace_by_wide(graph, products[key], stored, scales.get(key), form.kind)
        del graph.initializers[key]
        for value in (stored.values, stored.scales):
            graph.initializers[str(value.name)] = value
    if narrow:
        if form.inputs == "dynamic":
            traced.model.opset_imports[_CONTRIB] = 1
        common.CommonSubexpressionEliminationPass()(traced.model)  # products of the same input and scale
        common.RemoveUnusedNodesPass()(traced.model)
    return Traced(traced.model, traced.weights, dict.fromkeys(narrow, form.kind))


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


@dataclass(frozen=True)
class _Stored:
    """The initializers of a weight in 8 bits, as `cascade_rt.stored` has them.

    Attributes:
        values: ``[in, out]``.
        scales: ``[out]``, of the dtype of the graph's arithmetic.
    """

    values: ir.Value
    scales: ir.Value

    @classmethod
    def of(cls, weight: ir.Value, kind: Kind) -> _Stored:
        """Of a weight as it was traced."""
        (rows, columns), name = _shape(weight)[:2], str(weight.name)
        return cls(
            ir.Value(name=name, shape=ir.Shape([columns, rows]), type=ir.TensorType(ONNX_8_BITS[kind])),
            ir.Value(name=scales_of(name), shape=ir.Shape([rows]), type=weight.type),
        )


def _replace_dynamic(graph: ir.Graph, product: ir.Node, stored: _Stored) -> None:
    """Put a product that quantises its input itself in a product's place; a Gemm may have a bias."""
    inputs: list[ir.Value | None] = [product.inputs[0], stored.values, stored.scales]
    if len(product.inputs) > 2:
        inputs += [None, product.inputs[2]]  # no zero points
    node = ir.node("DynamicQuantizeMatMul", inputs, domain=_CONTRIB)
    ir.convenience.replace_nodes_and_values(graph, product, [product], [node], product.outputs, node.outputs)


def _replace_by_wide(
    graph: ir.Graph, products: Iterable[ir.Node], stored: _Stored, scale: float | None, kind: Kind
) -> None:
    """Have a weight's products read it from 8 bits; with a scale, their inputs are quantised to 8 bits and back."""
    weight = ir.node("DequantizeLinear", [stored.values, stored.scales], attributes={"axis": 1})
    graph.insert_before(graph[0], weight)
    for product in products:
        made: list[ir.Node] = []
        x = product.inputs[0]
        if scale is not None:
            made = _rounded(graph, x, stored, scale, kind)
            x = made[-1].outputs[0]
        # the weight lies as the product takes it, with nothing to transpose
        made.append(ir.node(product.op_type, [x, weight.outputs[0], *product.inputs[2:]]))
        ir.convenience.replace_nodes_and_values(graph, product, [product], made, product.outputs, made[-1].outputs)


def _rounded(graph: ir.Graph, x: ir.Value | None, stored: _Stored, scale: float, kind: Kind) -> list[ir.Node]:
    """What quantises a product's input to 8 bits and back."""
    compute = stored.scales.dtype
    assert compute is not None
    name = f"{str(stored.values.name).removesuffix('.weight')}.input_scale"
    of_input = _constant(graph, name, np.float32(scale), compute)
    zero = _constant(graph, f"zero_{ONNX_8_BITS[kind].name.lower()}", np.float32(0), ONNX_8_BITS[kind])
    narrow = ir.node("QuantizeLinear", [x, of_input, zero])
    return [narrow, ir.node("DequantizeLinear", [narrow.outputs[0], of_input, zero])]


def _constant(graph: ir.Graph, name: str, number: np.float32, kind: ir.DataType) -> ir.Value:
    """A number as an initializer, which may be there already."""
    if (there := graph.initializers.get(name)) is not None:
        return there
    tensor = ir.tensor(np.asarray(number).astype(kind.numpy()), dtype=kind, name=name)
    value = ir.Value(name=name, shape=ir.Shape([]), type=ir.TensorType(kind), const_value=tensor)
    graph.initializers[name] = value
    return value
