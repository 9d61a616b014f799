"""The one table of every engine's tensors: name, dtype, axes, range, feature, and "is it the same for every step?".

Export, verification, manifests, runtime checks and documentation are derived from `ENGINES`. The size of an axis is a
formula (`Axis`) of the names that have an `AxisRange`: ``4*height``, ``tokens+4*images+4``. So the shape of every
output is computed from the inputs, and compared with what an engine returns. In the table a formula may also name a
number of the checkpoint (``latent_channels``); `EngineSpec.resolve` puts the number in its place.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, get_args

from msgspec import Meta, Struct
from msgspec import field as named
from msgspec.structs import replace as replaced

DType = Literal["float32", "float16", "bfloat16", "int64", "uint8", "compute"]
"""``compute`` stands for the precision's compute dtype: such tensors go from engine to engine, never to the host."""

HOST_DTYPES = ("float32", "int64", "uint8")
ITEM_SIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "uint8": 1}

StageName = str
"""The word for a stage on the command line: `stage_names`."""

Linear = Literal["plain", "int8", "int8-static", "fp8", "w8"]
"""How products of linear layers are computed. ``plain``: in the compute dtype. ``int8``: weights are int8, symmetric,
with a scale for each output channel; inputs are quantised to 8 bits by their range in each call. ``int8-static``: the
same weights; inputs are int8, symmetric, with one scale that the export found. ``fp8``: likewise in E4M3. ``w8``: the
weights of ``int8``, widened to the compute dtype; inputs stay as they are."""

Size = Literal["tiny", "small", "big"]
"""The official sizes."""

LARGEST_SIZE = 2**31 - 1
"""No axis is longer: ONNX Runtime and TensorRT index tensors with 32 bits in places."""
_PositiveInt = Annotated[int, Meta(ge=1, le=LARGEST_SIZE)]
_Text = Annotated[str, Meta(max_length=400)]
Formula = Annotated[str, Meta(pattern=r"^[a-z0-9_*+]{1,80}(/[a-z0-9_]{1,20})?$")]


class Precision(Struct, frozen=True, kw_only=True):
    """A recipe of arithmetic.

    Attributes:
        name: the word for it on the command line.
        compute: dtype of the wide activations and of context tensors.
        weights: dtype in which weights are stored that ``linear`` does not store otherwise.
        opset: of the ONNX graphs.
        linear: how products of linear layers are computed.
    """

    name: Annotated[str, Meta(pattern="^[a-z0-9-]{1,20}$")]
    compute: DType
    weights: DType
    opset: Annotated[int, Meta(ge=1, le=99)]
    linear: Linear = "plain"


PRECISIONS: dict[str, Precision] = {
    row.name: row
    for row in (
        # 20 is the first opset with Gelu; 22 the first whose convolutions are defined for bfloat16
        Precision(name="fp32", compute="float32", weights="float32", opset=20),
        Precision(name="fp16", compute="float16", weights="float16", opset=20),
        Precision(name="bf16", compute="bfloat16", weights="bfloat16", opset=22),
        # half the file; widened when it is loaded, so that memory and time are those of fp32
        Precision(name="w16", compute="float32", weights="float16", opset=20),
        # a quarter of fp32's file; the widened weights are multiplied as in fp32
        Precision(name="w8", compute="float32", weights="float32", opset=20, linear="w8"),
        Precision(name="int8", compute="float32", weights="float32", opset=20, linear="int8"),
        Precision(name="int8-static", compute="float32", weights="float32", opset=20, linear="int8-static"),
        Precision(name="fp8", compute="bfloat16", weights="bfloat16", opset=22, linear="fp8"),
    )
}


class AxisRange(Struct, frozen=True, kw_only=True):
    """Accepted sizes of an axis: ``min..max`` in multiples of ``multiple``; ``opt`` is what engines are tuned for."""

    min: _PositiveInt
    opt: _PositiveInt
    max: _PositiveInt
    multiple: _PositiveInt = 1

    def __post_init__(self) -> None:
        """Refuse a range without sizes.

        Raises:
            ValueError: ``min <= opt <= max`` does not hold, or no multiple lies between them.
        """
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"a range needs min <= opt <= max; this one has {self.min}, {self.opt}, {self.max}")
        if self.max // self.multiple * self.multiple < self.min:
            raise ValueError(f"no multiple of {self.multiple} lies in {self.min}..{self.max}")

    def accepts(self, size: int) -> bool:
        """Whether an engine takes this size."""
        return self.min <= size <= self.max and size % self.multiple == 0

    @property
    def least(self) -> int:
        """The smallest size that is accepted."""
        return -(-self.min // self.multiple) * self.multiple

    @property
    def only(self) -> int | None:
        """The one size that is accepted; None where there are several."""
        return self.least if self.max < self.least + self.multiple else None

    def __str__(self) -> str:
        every = f" in multiples of {self.multiple}" if self.multiple > 1 else ""
        return f"{self.min}..{self.max}{every}"

    def on_grid(self, multiple: int) -> AxisRange:
        """The same range in multiples of ``multiple``."""
        if multiple == 1:
            return self
        low, opt = (-(-size // multiple) * multiple for size in (self.min, self.opt))
        return AxisRange(min=low, opt=opt, max=max(opt, self.max // multiple * multiple), multiple=multiple)


@dataclass(frozen=True)
class Axis:
    """The size of an axis as a formula of named sizes: ``(sum of times * name + plus) / over``.

    Attributes:
        terms: (times, name) of every named size.
        plus: what is added.
        over: what the sum is divided by, without a remainder; where ``plus`` is one less, the quotient is rounded up:
            ``height+31/32``.
    """

    terms: tuple[tuple[int, str], ...]
    plus: int = 0
    over: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """The named sizes that it depends on."""
        return tuple(name for _, name in self.terms)

    def size(self, sizes: Mapping[str, int]) -> int:
        """The size for named sizes.

        Raises:
            ValueError: the division leaves a remainder.
        """
        total = self.plus + sum(times * sizes[name] for times, name in self.terms)
        if total % self.over and self.plus != self.over - 1:
            raise ValueError(f"{total} is no multiple of {self.over}")
        return total // self.over

    def solve(self, size: int) -> int | None:
        """The named size that gives ``size``; None where there is none, or where several names decide."""
        if len(self.terms) != 1:
            return None
        (times, _), total = self.terms[0], size * self.over - self.plus
        return total // times if total > 0 and total % times == 0 else None


@functools.lru_cache(maxsize=4096)
def axis_of(formula: str) -> Axis:
    """The axis of a formula without numbers of a checkpoint; see `resolve_axis`.

    Raises:
        ValueError: it is no formula, or a number.
    """
    made = resolve_axis(formula, {})
    if isinstance(made, int):
        raise ValueError(f"{formula!r} is a number; write it as one")
    return made


def resolve_axis(formula: str, dims: Mapping[str, int]) -> Axis | int:
    """Read a formula: names and numbers joined by ``*``, sums of these, and at the end ``/`` and a divisor.

    Args:
        formula: such as ``tokens+clip_seq*images+clip_seq`` or ``height/patch_size``.
        dims: names that stand for a number.

    Raises:
        ValueError: it is of another form.
    """
    if not re.fullmatch(r"[a-z0-9_]+([*+][a-z0-9_]+)*(/[a-z0-9_]+)?", formula):
        raise ValueError(f"{formula!r} is no formula of an axis")
    total, _, below = formula.partition("/")
    over = _number(below, dims) if below else 1
    if not over:
        raise ValueError(f"{formula!r} divides by {below}, which is no number above 0")
    terms: list[tuple[int, str]] = []
    plus = 0
    for product in total.split("+"):
        times, names = 1, []
        for factor in product.split("*"):
            number = _number(factor, dims)
            if number is None:
                names.append(factor)
            else:
                times *= number
        if len(names) > 1:
            raise ValueError(f"{formula!r} multiplies {' by '.join(names)}; only numbers multiply a named size")
        if names and times:
            terms.append((times, names[0]))
        elif not names:
            plus += times
    if terms:
        return Axis(tuple(terms), plus, over)
    if plus % over:
        raise ValueError(f"{formula!r}: {plus} is no multiple of {over}")
    return plus // over


def _number(word: str, dims: Mapping[str, int]) -> int | None:
    return int(word) if word.isdigit() else dims.get(word)


def _text(axis: Axis) -> str:
    """The formula of an axis, as `axis_of` reads it."""
    parts = [name if times == 1 else f"{times}*{name}" for times, name in axis.terms]
    parts += [str(axis.plus)] if axis.plus else []
    return "+".join(parts) + (f"/{axis.over}" if axis.over > 1 else "")


class TensorSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One input or output of an engine.

    Attributes:
        name: its name in the graph; ``{level}`` in it means one tensor for every level with attention.
        dtype: element type; in the table ``compute`` for the precision's.
        axes: size, or formula of the size (`axis_of`), of every axis. Batch is the first axis where there is one.
        constant: the same for every step of a loop: bound once, stays on the device.
        feature: only engines with this feature have the tensor; empty: all have it.
        meaning: what the numbers are, for people.
    """

    name: Annotated[str, Meta(pattern=r"^[a-z0-9_{}]{1,60}$")]
    dtype: DType
    axes: Annotated[tuple[Annotated[int, Meta(ge=1, le=LARGEST_SIZE)] | Formula, ...], Meta(min_length=1, max_length=8)]
    constant: bool = named(default=False, name="constant_over_steps")
    feature: Annotated[str, Meta(pattern="^[a-z0-9_]{0,20}$")] = ""
    meaning: _Text = ""

    @property
    def on_host(self) -> bool:
        """Whether NumPy sees this tensor."""
        return self.dtype in HOST_DTYPES and not self.constant

    @property
    def free_names(self) -> tuple[str, ...]:
        """The named sizes that its shape depends on."""
        return tuple(dict.fromkeys(n for a in self.axes if isinstance(a, str) for n in axis_of(a).names))

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape for named sizes.

        Raises:
            ValueError: an axis would not be a whole number.
        """
        return tuple(a if isinstance(a, int) else axis_of(a).size(sizes) for a in self.axes)


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """One engine: a graph that is called as a unit.

    Attributes:
        name: ``stage_c.step`` and the like.
        stage: the word for it on the command line.
        model: the component of a checkpoint whose weights it uses.
        inputs: in call order.
        outputs: in call order.
        ranges: accepted sizes of the names in its axes.
        grids: in the table: number of the checkpoint that a named size must be a multiple of.
        features: that it was made with, sorted.
    """

    name: str
    stage: StageName
    model: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ranges: Mapping[str, AxisRange] = field(default_factory=dict)
    grids: Mapping[str, str] = field(default_factory=dict)
    features: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """Inputs and outputs."""
        return (*self.inputs, *self.outputs)

    def tensor(self, name: str) -> TensorSpec:
        """An input or output by name."""
        return next(t for t in self.tensors if t.name == name)

    def resolve(self, dims: Mapping[str, int], precision: Precision, features: Iterable[str] = ()) -> EngineSpec:
        """Put a checkpoint's numbers, a precision and features into the table's row.

        Args:
            dims: the numbers that its formulas name; ``kv_<level>.blocks`` and ``kv_<level>.width`` say which levels
                attend.
            precision: what ``compute`` means.
            features: tensors of other features are left out.

        Raises:
            ValueError: an axis names neither a number nor a size that has a range.
        """
        chosen = tuple(sorted(set(features)))
        levels = sorted({key.partition(".")[0] for key in dims if key.startswith("kv_")})

        def tensor(spec: TensorSpec, name: str, own: Mapping[str, int]) -> TensorSpec:
            sizes = {**dims, **own}
            axes = [a if isinstance(a, int) else resolve_axis(a, sizes) for a in spec.axes]
            if unknown := {n for a in axes if isinstance(a, Axis) for n in a.names} - self.ranges.keys():
                raise ValueError(f"{self.name}: {spec.name} has the size {', '.join(sorted(unknown))} without a range")
            return replaced(
                spec,
                name=name,
                axes=tuple(a if isinstance(a, int) else _text(a) for a in axes),
                dtype=precision.compute if spec.dtype == "compute" else spec.dtype,
            )

        def expand(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
            made: list[TensorSpec] = []
            for spec in specs:
                if spec.feature and spec.feature not in chosen:
                    continue
                if "{level}" in spec.name:
                    for level in levels:
                        own = {key.partition(".")[2]: n for key, n in dims.items() if key.startswith(f"{level}.")}
                        made.append(tensor(spec, spec.name.replace("kv_{level}", level), own))
                else:
                    made.append(tensor(spec, spec.name, {}))
            return tuple(made)

        inputs, outputs = expand(self.inputs), expand(self.outputs)
        used = {name for spec in (*inputs, *outputs) for name in spec.free_names}
        ranges = {
            name: limits.on_grid(dims[self.grids[name]] if name in self.grids else 1)
            for name, limits in self.ranges.items()
            if name in used
        }
        return replace(self, inputs=inputs, outputs=outputs, ranges=ranges, grids={}, features=chosen)


def _range(least: int, opt: int, most: int) -> AxisRange:
    return AxisRange(min=least, opt=opt, max=most)


_BATCH = _range(1, 2, 32)
_PRIOR = _range(2, 24, 96)
_DECODER = _range(2, 256, 1024)
_TOKENS = _range(2, 77, 308)
_CONDITION = _range(2, 85, 512)
_STEPS = _range(1, 20, 4000)  # the rows of several schedules may lie in one table
_PIXELS = _range(32, 768, 3072)
_ON_GRID = {"height": "granularity", "width": "granularity"}


def tensor_row(
    name: str, dtype: DType, axes: str, meaning: str, *, constant: bool = False, feature: str = ""
) -> TensorSpec:
    """A tensor of the table; ``axes`` are formulas with spaces between them."""
    parsed = tuple(int(a) if a.isdigit() else a for a in axes.split())
    return TensorSpec(name=name, dtype=dtype, axes=parsed, constant=constant, feature=feature, meaning=meaning)


_MODULATION = tensor_row(
    "modulation",
    "compute",
    "steps modulation",
    "scale and shift of every TimestepBlock, a row a timestep; rows of several schedules may follow each other",
    constant=True,
)
_MAP = tensor_row(
    "condition_map",
    "compute",
    "batch height/patch_size width/patch_size map_width",
    "effnet and pixel maps",
    constant=True,
)
_EMBEDDING = tensor_row("timestep_embedding", "float32", "steps embedding_dim", "sinusoidal embedding of the ratios")
_POOLED = tensor_row("clip_text_pooled", "float32", "batch 1 pooled_dim", "projected text embedding")
_STEP = tensor_row("step", "int64", "batch", "row of the modulation table, for every row of the batch")
_HOT = "batch latent_channels height width"
_LATENTS = tensor_row("latents", "float32", _HOT, "noisy latents")
_PREDICTION = tensor_row("prediction", "float32", _HOT, "the network's prediction")


_ON_STREAM = "batch control_blocks height/patch_size width/patch_size stream_width"
_RESIDUALS = tensor_row(
    "residuals",
    "float32",
    _ON_STREAM,
    "of a ControlNet: resized to Stage C's grid, and times the control scale",
    feature="control",
)
_CONTROL = tensor_row(
    "control",
    "compute",
    _ON_STREAM,
    "what is added to the residual stream in front of each controlled block",
    constant=True,
    feature="control",
)


def _kv(tokens: str) -> TensorSpec:
    meaning = "keys and values of the condition tokens"
    return tensor_row("kv_{level}", "compute", f"batch blocks 2 {tokens} width", meaning, constant=True)


ENGINES: dict[str, EngineSpec] = {
    spec.name: spec
    for spec in (
        EngineSpec(
            name="text_encoder",
            stage="text",
            model="text_encoder",
            inputs=(
                tensor_row("input_ids", "int64", "batch max_length", "token ids, padded"),
                tensor_row("attention_mask", "int64", "batch max_length", "1 for tokens, 0 for padding"),
            ),
            outputs=(
                tensor_row(
                    "hidden_states", "float32", "batch max_length text_dim", "last layer, before the final norm"
                ),
                tensor_row("pooled", "float32", "batch 1 pooled_dim", "projected end-of-text state"),
            ),
            ranges={"batch": _BATCH},
        ),
        EngineSpec(
            name="image_encoder",
            stage="image",
            model="image_encoder",
            inputs=(tensor_row("pixel_values", "float32", "batch 3 image_size image_size", "CLIP-normalised pixels"),),
            outputs=(tensor_row("image_embeds", "float32", "batch 1 image_dim", "projected image embedding"),),
            ranges={"batch": _BATCH},
        ),
        EngineSpec(
            name="stage_c.context",
            stage="c",
            model="stage_c",
            inputs=(
                _EMBEDDING,
                _POOLED,
                tensor_row("clip_text", "float32", "batch tokens text_dim", "hidden states of the text encoder"),
                tensor_row("clip_img", "float32", "batch images image_dim", "image embeddings, zeros for none"),
                _RESIDUALS,
            ),
            outputs=(_MODULATION, _kv("tokens+clip_seq*images+clip_seq"), _CONTROL),
            ranges={
                "batch": _BATCH,
                "steps": _STEPS,
                "tokens": _TOKENS,
                "images": _range(1, 1, 8),
                "height": _PRIOR,
                "width": _PRIOR,
            },
            grids=_ON_GRID,
        ),
        EngineSpec(
            name="stage_c.step",
            stage="c",
            model="stage_c",
            inputs=(_LATENTS, _STEP, _MODULATION, _kv("condition_tokens"), _CONTROL),
            outputs=(_PREDICTION,),
            ranges={
                "batch": _BATCH,
                "height": _PRIOR,
                "width": _PRIOR,
                "steps": _STEPS,
                "condition_tokens": _CONDITION,
            },
            grids=_ON_GRID,
        ),
        EngineSpec(
            name="stage_b.context",
            stage="b",
            model="stage_b",
            inputs=(
                _EMBEDDING,
                _POOLED,
                tensor_row(
                    "effnet",
                    "float32",
                    "batch effnet_channels height/patch_size width/patch_size",
                    "Stage C latents, resized to Stage B's grid",
                ),
            ),
            outputs=(_MODULATION, _kv("clip_seq"), _MAP),
            ranges={"batch": _BATCH, "steps": _STEPS, "height": _DECODER, "width": _DECODER},
            grids=_ON_GRID,
        ),
        EngineSpec(
            name="stage_b.step",
            stage="b",
            model="stage_b",
            inputs=(_LATENTS, _STEP, _MODULATION, _kv("clip_seq"), _MAP),
            outputs=(_PREDICTION,),
            ranges={"batch": _BATCH, "height": _DECODER, "width": _DECODER, "steps": _STEPS},
            grids=_ON_GRID,
        ),
        EngineSpec(
            name="stage_a.decode",
            stage="a",
            model="stage_a",
            inputs=(tensor_row("latents", "float32", _HOT, "latents times the sampler's scale factor"),),
            outputs=(
                tensor_row(
                    "pixels", "float32", "batch 3 compression*height compression*width", "about 0..1, not clamped"
                ),
            ),
            ranges={"batch": _BATCH, "height": _DECODER, "width": _DECODER},
        ),
        EngineSpec(
            name="stage_a.encode",
            stage="a",
            model="stage_a",
            inputs=(tensor_row("pixels", "float32", "batch 3 height width", "0..1"),),
            outputs=(
                tensor_row(
                    "latents",
                    "float32",
                    "batch latent_channels height/compression width/compression",
                    "unscaled latents",
                ),
            ),
            ranges={"batch": _BATCH, "height": _range(8, 1024, 4096), "width": _range(8, 1024, 4096)},
            grids={"height": "compression", "width": "compression"},
        ),
        EngineSpec(
            name="effnet_encoder",
            stage="effnet",
            model="effnet",
            inputs=(tensor_row("pixels", "float32", "batch 3 height width", "0..1"),),
            outputs=(
                tensor_row("latents", "float32", "batch latent_channels height+31/32 width+31/32", "Stage C latents"),
            ),
            ranges={"batch": _BATCH, "height": _PIXELS, "width": _PIXELS},
        ),
        EngineSpec(
            name="previewer",
            stage="previewer",
            model="previewer",
            inputs=(tensor_row("latents", "float32", _HOT, "Stage C latents"),),
            outputs=(tensor_row("pixels", "float32", "batch 3 8*height 8*width", "about 0..1, not clamped"),),
            ranges={"batch": _BATCH, "height": _PRIOR, "width": _PRIOR},
        ),
    )
}


CONTROLS = ("canny", "inpainting", "super_resolution", "picture")
"""The kinds of ControlNets: what their control picture shows. ``picture``: whatever the caller gives."""


def _controlnet(kind: str, sides: AxisRange) -> EngineSpec:
    return EngineSpec(
        name=f"controlnet.{kind}",
        stage=kind.replace("_", "-"),
        model=f"controlnet_{kind}",
        inputs=(
            tensor_row(
                "control", "float32", "batch control_channels height width", "control picture, 0..1, or latents"
            ),
        ),
        outputs=(
            tensor_row(
                "residuals",
                "float32",
                "batch control_blocks height/control_stride width/control_stride stream_width",
                "one for each controlled block of Stage C",
            ),
        ),
        ranges={"batch": _BATCH, "height": sides, "width": sides},
        grids=dict.fromkeys(("height", "width"), "control_stride"),
    )


# super-resolution is told the latents of the smaller picture, enlarged to the larger one's
for _kind in CONTROLS:
    _spec = _controlnet(_kind, _PRIOR if _kind == "super_resolution" else _PIXELS)
    ENGINES[_spec.name] = _spec


def stage_names() -> tuple[StageName, ...]:
    """The words for stages on the command line: c, b, a, and one for each other network, in the order of the table."""
    named_first = ("c", "b", "a")
    rest = dict.fromkeys(spec.stage for spec in ENGINES.values())
    return tuple(dict.fromkeys((*named_first, *rest)))


def engines_of(stage: StageName) -> list[EngineSpec]:
    """The engines that ``--stage`` exports."""
    return [spec for spec in ENGINES.values() if spec.stage == stage]


SIZES: tuple[Size, ...] = get_args(Size)
