"""The one table of every engine's tensors: name, dtype, axes, range, and "is it the same for every step?".

Export, verification, manifests, runtime checks and documentation are derived from `ENGINES`. An axis is either
*fixed* (a fact of the checkpoint, such as ``latent_channels``; resolved to a number when a stage is exported) or
*dynamic* (``batch``, ``height``; it has an `AxisRange`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

DType = Literal["float32", "float16", "bfloat16", "int64", "uint8", "compute"]
"""``compute`` stands for the engine's own precision: such tensors go from engine to engine and never to the host."""

HOST_DTYPES = ("float32", "int64", "uint8")

StageName = Literal["c", "b", "a", "text", "image", "effnet", "previewer"]
STAGES: tuple[StageName, ...] = get_args(StageName)

Size = Literal["tiny", "small", "big"]
"""The official sizes."""

Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
COMPUTE_DTYPE: dict[Precision, DType] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class AxisRange:
    """Accepted sizes of a dynamic axis: ``min..max`` in multiples of ``multiple``; ``opt`` is what engines tune for."""

    min: int
    opt: int
    max: int
    multiple: int = 1

    def accepts(self, size: int) -> bool:
        """Whether an engine takes this size."""
        return self.min <= size <= self.max and size % self.multiple == 0

    @property
    def only(self) -> int | None:
        """The one size that is accepted; None where there are several."""
        lowest = -(-self.min // self.multiple) * self.multiple
        return lowest if lowest <= self.max < lowest + self.multiple else None

    def __str__(self) -> str:
        every = f" in multiples of {self.multiple}" if self.multiple > 1 else ""
        return f"{self.min}..{self.max}{every}"

    def on_grid(self, multiple: int) -> AxisRange:
        """The same range in multiples of ``multiple``."""
        if multiple == 1:
            return self
        low, opt = (-(-size // multiple) * multiple for size in (self.min, self.opt))
        return AxisRange(low, opt, max(opt, self.max // multiple * multiple), multiple)


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of an engine.

    Attributes:
        name: its name in the graph; ``{level}`` in it means one tensor for every level with attention.
        dtype: element type, ``compute`` for the engine's precision.
        axes: name (dynamic, or not yet resolved) or size of every axis.
        constant: the same for every step of a loop: bound once, stays on the device.
        meaning: what the numbers are, for people.
    """

    name: str
    dtype: DType
    axes: tuple[str | int, ...]
    constant: bool = False
    meaning: str = ""

    @property
    def on_host(self) -> bool:
        """Whether NumPy sees this tensor."""
        return self.dtype in HOST_DTYPES and not self.constant

    def to_json(self) -> dict[str, Any]:
        """As a manifest record."""
        record: dict[str, Any] = {"name": self.name, "dtype": self.dtype, "axes": list(self.axes)}
        return record | {"constant_over_steps": self.constant}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> TensorSpec:
        """From a manifest record."""
        return cls(record["name"], record["dtype"], tuple(record["axes"]), record["constant_over_steps"])


@dataclass(frozen=True)
class EngineSpec:
    """One engine: a graph that is called as a unit.

    Attributes:
        name: ``stage_c.step`` and the like.
        stage: the word for it on the command line.
        model: the component of a checkpoint whose weights it uses.
        inputs: in call order.
        outputs: in call order.
        ranges: accepted sizes of its dynamic axes.
    """

    name: str
    stage: StageName
    model: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ranges: Mapping[str, AxisRange] = field(default_factory=dict)

    def resolve(self, dims: Mapping[str, int], precision: Precision) -> EngineSpec:
        """Put a checkpoint's numbers and a precision into the table's row.

        Args:
            dims: size of every fixed axis; ``kv_<level>.blocks`` and ``kv_<level>.width`` say which levels attend;
                ``granularity`` and ``grid`` say what height and width must be multiples of.
            precision: what ``compute`` means.
        """
        levels = sorted({key.partition(".")[0] for key in dims if key.startswith("kv_")})

        def tensor(spec: TensorSpec, name: str, prefix: str = "") -> TensorSpec:
            axes = tuple(dims.get(prefix + a, dims.get(a, a)) if isinstance(a, str) else a for a in spec.axes)
            dtype = COMPUTE_DTYPE[precision] if spec.dtype == "compute" else spec.dtype
            return replace(spec, name=name, axes=axes, dtype=dtype)

        def expand(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
            made: list[TensorSpec] = []
            for spec in specs:
                if "{level}" in spec.name:
                    made += [tensor(spec, level, f"{level}.") for level in levels]
                else:
                    made.append(tensor(spec, spec.name))
            return tuple(made)

        inputs, outputs = expand(self.inputs), expand(self.outputs)
        used = {axis for spec in (*inputs, *outputs) for axis in spec.axes if isinstance(axis, str)}
        grids = {"height": "granularity", "width": "granularity", "grid_height": "grid", "grid_width": "grid"}
        ranges = {
            axis: limits.on_grid(dims.get(grids.get(axis, ""), 1))
            for axis, limits in self.ranges.items()
            if axis in used
        }
        return replace(self, inputs=inputs, outputs=outputs, ranges=ranges)


_BATCH = AxisRange(1, 2, 32)
_PRIOR = AxisRange(2, 24, 96)
_DECODER = AxisRange(2, 256, 1024)
_GRID = AxisRange(1, 128, 512)
_TOKENS = AxisRange(2, 77, 308)
_CONDITION = AxisRange(2, 85, 512)
_STEPS = AxisRange(1, 20, 1000)
_PIXELS = AxisRange(32, 768, 3072)


def _t(name: str, dtype: DType, axes: str, meaning: str, constant: bool = False) -> TensorSpec:
    parsed: tuple[str | int, ...] = tuple(int(a) if a.isdigit() else a for a in axes.split())
    return TensorSpec(name, dtype, parsed, constant, meaning)


_MODULATION = _t(
    "modulation", "compute", "steps modulation", "scale and shift of every TimestepBlock, a row a timestep", True
)
_KV = _t(
    "kv_{level}", "compute", "blocks 2 batch condition_tokens width", "keys and values of the condition tokens", True
)
_MAP = _t("condition_map", "compute", "batch grid_height grid_width map_width", "effnet and pixel maps", constant=True)
_EMBEDDING = _t("timestep_embedding", "float32", "steps embedding_dim", "sinusoidal embedding of the ratios")
_POOLED = _t("clip_text_pooled", "float32", "batch 1 pooled_dim", "projected text embedding")
_STEP = _t("step", "int64", "1", "row of the modulation table")
_HOT = "batch latent_channels height width"

ENGINES: dict[str, EngineSpec] = {
    spec.name: spec
    for spec in (
        EngineSpec(
            "text_encoder",
            "text",
            "text_encoder",
            (
                _t("input_ids", "int64", "batch max_length", "token ids, padded"),
                _t("attention_mask", "int64", "batch max_length", "1 for tokens, 0 for padding"),
            ),
            (
                _t("hidden_states", "float32", "batch max_length text_dim", "last layer, before the final norm"),
                _t("pooled", "float32", "batch 1 pooled_dim", "projected end-of-text state"),
            ),
            {"batch": _BATCH},
        ),
        EngineSpec(
            "image_encoder",
            "image",
            "image_encoder",
            (_t("pixel_values", "float32", "batch 3 image_size image_size", "CLIP-normalised pixels"),),
            (_t("image_embeds", "float32", "batch 1 image_dim", "projected image embedding"),),
            {"batch": _BATCH},
        ),
        EngineSpec(
            "stage_c.context",
            "c",
            "stage_c",
            (
                _EMBEDDING,
                _POOLED,
                _t("clip_text", "float32", "batch tokens text_dim", "hidden states of the text encoder"),
                _t("clip_img", "float32", "batch images image_dim", "image embeddings, zeros for none"),
            ),
            (_MODULATION, _KV),
            {
                "batch": _BATCH,
                "steps": _STEPS,
                "tokens": _TOKENS,
                "images": AxisRange(1, 1, 8),
                "condition_tokens": _CONDITION,
            },
        ),
        EngineSpec(
            "stage_c.step",
            "c",
            "stage_c",
            (_t("latents", "float32", _HOT, "noisy latents"), _STEP, _MODULATION, _KV),
            (_t("prediction", "float32", _HOT, "the network's prediction"),),
            {"batch": _BATCH, "height": _PRIOR, "width": _PRIOR, "steps": _STEPS, "condition_tokens": _CONDITION},
        ),
        EngineSpec(
            "stage_b.context",
            "b",
            "stage_b",
            (
                _EMBEDDING,
                _POOLED,
                _t("effnet", "float32", "batch effnet_channels grid_height grid_width", "Stage C latents, resized"),
            ),
            (_MODULATION, _KV, _MAP),
            {"batch": _BATCH, "steps": _STEPS, "grid_height": _GRID, "grid_width": _GRID},
        ),
        EngineSpec(
            "stage_b.step",
            "b",
            "stage_b",
            (_t("latents", "float32", _HOT, "noisy latents"), _STEP, _MODULATION, _KV, _MAP),
            (_t("prediction", "float32", _HOT, "the network's prediction"),),
            {
                "batch": _BATCH,
                "height": _DECODER,
                "width": _DECODER,
                "steps": _STEPS,
                "grid_height": _GRID,
                "grid_width": _GRID,
            },
        ),
        EngineSpec(
            "stage_a.decode",
            "a",
            "stage_a",
            (_t("latents", "float32", _HOT, "latents times the sampler's scale factor"),),
            (_t("pixels", "float32", "batch 3 pixel_height pixel_width", "about 0..1, not clamped"),),
            {
                "batch": _BATCH,
                "height": _DECODER,
                "width": _DECODER,
                "pixel_height": AxisRange(4, 1024, 8192),
                "pixel_width": AxisRange(4, 1024, 8192),
            },
        ),
        EngineSpec(
            "stage_a.encode",
            "a",
            "stage_a",
            (_t("pixels", "float32", "batch 3 height width", "0..1"),),
            (_t("latents", "float32", "batch latent_channels latent_height latent_width", "unscaled latents"),),
            {
                "batch": _BATCH,
                "height": AxisRange(8, 1024, 4096),
                "width": AxisRange(8, 1024, 4096),
                "latent_height": AxisRange(2, 256, 1024),
                "latent_width": AxisRange(2, 256, 1024),
            },
        ),
        EngineSpec(
            "effnet_encoder",
            "effnet",
            "effnet",
            (_t("pixels", "float32", "batch 3 height width", "0..1"),),
            (_t("latents", "float32", "batch latent_channels latent_height latent_width", "Stage C latents"),),
            {
                "batch": _BATCH,
                "height": _PIXELS,
                "width": _PIXELS,
                "latent_height": AxisRange(1, 24, 96),
                "latent_width": AxisRange(1, 24, 96),
            },
        ),
        EngineSpec(
            "previewer",
            "previewer",
            "previewer",
            (_t("latents", "float32", _HOT, "Stage C latents"),),
            (_t("pixels", "float32", "batch 3 pixel_height pixel_width", "about 0..1, not clamped"),),
            {
                "batch": _BATCH,
                "height": _PRIOR,
                "width": _PRIOR,
                "pixel_height": AxisRange(16, 192, 768),
                "pixel_width": AxisRange(16, 192, 768),
            },
        ),
    )
}


def engines_of(stage: StageName) -> list[EngineSpec]:
    """The engines that ``--stage`` exports."""
    return [spec for spec in ENGINES.values() if spec.stage == stage]
