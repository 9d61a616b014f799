"""The sizes that an engine is built for, as narrower ranges of the table's axes.

A plan of TensorRT takes a minimum, a maximum, and a size that it is tuned for, and needs memory for the largest: all
that a graph takes would need tensors of over 2**31 elements. What was asked for is checked here, against the ranges and
multiples that the graph was traced for, because TensorRT accepts contradictions and builds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from .bundle import ModelFacts
from .errors import RequestError
from .request import MAX_PIXELS, MIN_PIXELS, plan_sizes, round_up
from .sampling import SAMPLERS
from .stages import AxisRange, EngineSpec

BATCH = AxisRange(1, 2, 8)
"""A picture with guidance is a batch of two; the graph's 32 at full size would need tensors of over 2**31 elements."""
EFFNET_STRIDE = 32


@dataclass(frozen=True)
class Shapes:
    """What ``--shapes`` asks for.

    Attributes:
        preset: ``default``: pictures from half to one and a half times the bundle's own size, batches of 1 to 8;
            ``square``: one size of picture; ``full``: all that the graph takes.
        side: pixels, for ``square``.
        axes: (engine or beginning of its name, axis) -> (min, opt, max).
    """

    preset: Literal["default", "square", "full"] = "default"
    side: int = 0
    axes: Mapping[tuple[str, str], tuple[int, int, int]] = field(default_factory=dict)


DEFAULT_SHAPES = Shapes()


def narrow(
    specs: Sequence[EngineSpec], shapes: Shapes, facts: ModelFacts, granularity: int = 1
) -> dict[str, EngineSpec]:
    """The engines with the ranges that their plans shall take.

    Args:
        specs: resolved rows of the table, of whole stages.
        shapes: what was asked for.
        facts: picture size and compressions.
        granularity: what Stage B's height and width are multiples of.

    Raises:
        RequestError: an axis that no engine has, or sizes that an engine does not take.
    """
    used: set[tuple[str, str]] = set()
    made = {}
    for spec in specs:
        ranges = dict(spec.ranges)
        for axis in sorted({a for t in spec.inputs for a in t.axes if isinstance(a, str)}):
            ranges[axis] = _range(spec, axis, specs, shapes, facts, granularity, used)
        made[spec.name] = replace(spec, ranges=ranges)
    if unknown := [key for key in shapes.axes if key not in used]:
        where, axis = unknown[0]
        name = f"{where}.{axis}" if where else axis
        known = sorted({_source(s, a, specs)[0] for s in specs for t in s.inputs for a in t.axes if isinstance(a, str)})
        raise RequestError(
            f"--shapes names {name}, which no engine of this export takes; axes: {', '.join(known)}; "
            f"engines: {', '.join(s.name for s in specs)}"
        )
    return made


def profile(spec: EngineSpec) -> dict[str, list[list[int]]]:
    """Smallest, tuned and largest shape of every input that has a dynamic axis."""
    return {
        tensor.name: [
            [a if isinstance(a, int) else getattr(spec.ranges[a], which) for a in tensor.axes]
            for which in ("min", "opt", "max")
        ]
        for tensor in spec.inputs
        if any(isinstance(a, str) for a in tensor.axes)
    }


def _source(spec: EngineSpec, axis: str, specs: Sequence[EngineSpec]) -> tuple[str, AxisRange, int]:
    """The axis that sizes come from, its range, and how many of it make one of ``axis``.

    The maps of Stage B lie on a grid that is coarser than its latents by the patch size: both must move together.
    """
    if axis.startswith("grid_"):
        name = axis.removeprefix("grid_")
        for sibling in specs:
            if sibling.model == spec.model and {axis, name} <= sibling.ranges.keys():
                latents, grid = sibling.ranges[name], sibling.ranges[axis]
                return name, latents, latents.multiple // grid.multiple
    return axis, spec.ranges[axis], 1


def _range(
    spec: EngineSpec,
    axis: str,
    specs: Sequence[EngineSpec],
    shapes: Shapes,
    facts: ModelFacts,
    granularity: int,
    used: set[tuple[str, str]],
) -> AxisRange:
    name, limits, patch = _source(spec, axis, specs)
    keys = [k for k in shapes.axes if k[1] == name and (not k[0] or f"{spec.name}.".startswith(f"{k[0]}."))]
    used |= set(keys)
    if keys:
        sizes = shapes.axes[max(keys, key=lambda k: len(k[0]))]
        if not all(limits.accepts(size) for size in sizes):
            raise RequestError(
                f"--shapes {name}={':'.join(map(str, sizes))} does not fit {spec.name}, which takes {name} {limits}; "
                f"for this engine alone write {spec.name}.{name}=MIN:OPT:MAX"
            )
        chosen = AxisRange(*sizes, limits.multiple)
    elif shapes.preset == "full":
        chosen = limits
    elif name == "batch":
        chosen = AxisRange(BATCH.min, BATCH.opt, min(BATCH.max, limits.max))
    elif name in ("height", "width"):
        chosen = _picture_range(spec, name, limits, shapes, facts, granularity)
    else:
        chosen = limits
    return AxisRange(chosen.min // patch, chosen.opt // patch, chosen.max // patch, max(1, chosen.multiple // patch))


def _picture_range(
    spec: EngineSpec, name: str, limits: AxisRange, shapes: Shapes, facts: ModelFacts, granularity: int
) -> AxisRange:
    """Sizes of an engine for the pictures that a preset asks for."""
    own = facts.height if name == "height" else facts.width
    if shapes.preset == "square":
        pixels = (shapes.side, shapes.side, shapes.side)
    else:
        pixels = (max(MIN_PIXELS, own // 2), own, min(MAX_PIXELS, own * 3 // 2))
    found = [[round_up(s, limits.multiple) for s in _sizes(spec, p, facts, granularity)] for p in pixels]
    sizes = min(found[0]), found[1][SAMPLERS.index(facts.default_sampler)], max(found[2])
    if shapes.preset == "square" and not all(limits.accepts(size) for size in sizes):
        raise RequestError(
            f"--shapes square-{shapes.side} needs {name} {sizes[1]} of {spec.name}, which takes {limits}"
        )
    low, opt, high = (min(max(size, limits.min), limits.max) for size in sizes)
    return AxisRange(low, opt, high, limits.multiple)


def _sizes(spec: EngineSpec, pixels: int, facts: ModelFacts, granularity: int) -> list[int]:
    """An engine's size for a picture's side, as each sampler plans it."""
    if spec.name == "stage_a.encode":
        return [pixels] * len(SAMPLERS)
    plans = [plan_sizes(facts, (1, granularity), sampler, pixels, pixels) for sampler in SAMPLERS]
    if spec.model in ("stage_b", "stage_a"):
        return [plan.decoder[0] for plan in plans]
    stride = EFFNET_STRIDE if spec.model == "effnet" else 1
    return [plan.prior[0] * stride for plan in plans]
