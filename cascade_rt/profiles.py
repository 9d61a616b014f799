"""The sizes that TensorRT engine files are built for, as narrower ranges of the named sizes.

An engine file takes a minimum, a maximum, and a size that it is tuned for, and needs memory for the largest: all that a
graph takes would need tensors of over 2**31 elements. What was asked for is checked here, against the ranges and
multiples that the graph was traced for, because TensorRT accepts contradictions and builds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import msgspec

from .backends.profile import profile
from .checks import MAX_PIXELS, MIN_PIXELS
from .errors import RequestError
from .manifest import EngineRecord, Manifest, ModelFacts
from .sampling import SAMPLERS
from .sizes import grids_of, plan_sizes, round_up
from .stages import AxisRange, EngineSpec

__all__ = ["DEFAULT_SHAPES", "Shapes", "narrow", "narrowed_records", "profile"]

BATCH = AxisRange(min=1, opt=2, max=8)
"""A picture with guidance is a batch of two; the graph's 32 at full size would need tensors of over 2**31 elements."""
EFFNET_STRIDE = 32


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What ``--shapes`` asks for.

    Attributes:
        preset: ``default``: pictures from half to one and a half times the bundle's own size, batches of 1 to 8;
            ``square``: one size of picture; ``full``: all that the graph takes.
        side: pixels, for ``square``.
        axes: (engine or beginning of its name, named size) -> (min, opt, max).
    """

    preset: Literal["default", "square", "full"] = "default"
    side: int = 0
    axes: Mapping[tuple[str, str], tuple[int, int, int]] = field(default_factory=dict)


DEFAULT_SHAPES = Shapes()


def narrow(
    specs: Sequence[EngineSpec], shapes: Shapes, facts: ModelFacts, grids: tuple[int, int] = (1, 1)
) -> list[EngineSpec]:
    """Engines with the ranges that their engine files shall take.

    Args:
        specs: resolved rows of the table.
        shapes: what was asked for.
        facts: picture size and compressions.
        grids: what height and width of Stage C's and of Stage B's latents must be multiples of.

    Returns:
        In the same order.

    Raises:
        RequestError: a named size that no engine has, or sizes that an engine does not take.
    """
    check_shapes(specs, shapes)
    made = []
    for spec in specs:
        ranges = {}
        for name, limits in spec.ranges.items():
            own = _own_range(spec, name, limits, shapes)
            ranges[name] = _preset_range(spec, name, limits, shapes, facts, grids) if own is None else own
        made.append(replace(spec, ranges=ranges))
    return made


def check_shapes(specs: Sequence[EngineSpec], shapes: Shapes) -> None:
    """Refuse named sizes that no engine has or takes. It needs no graphs, so that it is known before any is made.

    Args:
        specs: resolved rows of the table, of everything that is exported.
        shapes: what was asked for.

    Raises:
        RequestError: there is one.
    """
    used: set[tuple[str, str]] = set()
    for spec in specs:
        for name, limits in spec.ranges.items():
            used |= set(_asked(spec, name, shapes))
            _own_range(spec, name, limits, shapes)
    if unknown := [key for key in shapes.axes if key not in used]:
        where, name = unknown[0]
        wanted = f"{where}.{name}" if where else name
        known = ", ".join(sorted({name for spec in specs for name in spec.ranges}))
        raise RequestError(
            f"--shapes names {wanted}, which no engine of this export takes; named sizes: {known}; "
            f"engines: {', '.join(dict.fromkeys(spec.name for spec in specs))}",
            field="shapes",
            value=wanted,
            accepted=known,
        )


def narrowed_records(records: Sequence[EngineRecord], manifest: Manifest) -> list[EngineRecord]:
    """Graphs with the sizes that engine files of them would take: ONNX Runtime's TensorRT builds one for all of them.

    Args:
        records: of graphs.
        manifest: of their bundle.
    """
    specs = narrow([record.spec for record in records], DEFAULT_SHAPES, manifest.model, grids_of(manifest))
    return [
        msgspec.structs.replace(record, ranges=dict(spec.ranges)) for record, spec in zip(records, specs, strict=True)
    ]


def _asked(spec: EngineSpec, name: str, shapes: Shapes) -> list[tuple[str, str]]:
    """The entries of ``--shapes`` for a named size of an engine: those of the engine, of its stage, and of all."""
    return [key for key in shapes.axes if key[1] == name and (not key[0] or f"{spec.name}.".startswith(f"{key[0]}."))]


def _own_range(spec: EngineSpec, name: str, limits: AxisRange, shapes: Shapes) -> AxisRange | None:
    """The range that was asked for by name; None: none was."""
    keys = _asked(spec, name, shapes)
    if not keys:
        return None
    sizes = shapes.axes[max(keys, key=lambda key: len(key[0]))]
    if not all(limits.accepts(size) for size in sizes) or list(sizes) != sorted(sizes):
        raise RequestError(
            f"--shapes {name}={':'.join(map(str, sizes))} does not fit {spec.name}, which takes {name} {limits}, "
            f"smallest first; for this engine alone write {spec.name}.{name}=MIN:OPT:MAX",
            field="shapes",
            value=sizes,
            accepted=str(limits),
        )
    low, opt, high = sizes
    return AxisRange(min=low, opt=opt, max=high, multiple=limits.multiple)


def _preset_range(
    spec: EngineSpec, name: str, limits: AxisRange, shapes: Shapes, facts: ModelFacts, grids: tuple[int, int]
) -> AxisRange:
    """The range that the preset gives."""
    if shapes.preset == "full":
        return limits
    if name == "batch":
        return AxisRange(min=BATCH.min, opt=min(BATCH.opt, limits.max), max=min(BATCH.max, limits.max))
    if name in ("height", "width"):
        return _picture_range(spec, name, limits, shapes, facts, grids)
    return limits


def _picture_range(
    spec: EngineSpec, name: str, limits: AxisRange, shapes: Shapes, facts: ModelFacts, grids: tuple[int, int]
) -> AxisRange:
    """Sizes of an engine for the pictures that a preset asks for."""
    own = facts.height if name == "height" else facts.width
    if shapes.preset == "square":
        pixels = (shapes.side, shapes.side, shapes.side)
    else:
        pixels = (max(MIN_PIXELS, own // 2), own, min(MAX_PIXELS, own * 3 // 2))
    found = [[round_up(size, limits.multiple) for size in _sizes(spec, side, facts, grids)] for side in pixels]
    sizes = min(found[0]), found[1][SAMPLERS.index(facts.default_sampler)], max(found[2])
    if shapes.preset == "square" and not all(limits.accepts(size) for size in sizes):
        raise RequestError(
            f"--shapes square-{shapes.side} needs {name} {sizes[1]} of {spec.name}, which takes {limits}",
            field="shapes",
            value=shapes.side,
            accepted=str(limits),
        )
    low, opt, high = (min(max(size, limits.min), limits.max) for size in sizes)
    return AxisRange(min=low, opt=opt, max=high, multiple=limits.multiple)


def _sizes(spec: EngineSpec, pixels: int, facts: ModelFacts, grids: tuple[int, int]) -> list[int]:
    """An engine's size for a picture's side, as each sampler plans it."""
    if spec.name == "stage_a.encode":
        return [pixels] * len(SAMPLERS)
    planned = [plan_sizes(facts, grids, sampler, pixels, pixels) for sampler in SAMPLERS]
    if spec.model in ("stage_b", "stage_a"):
        return [sizes.decoder[0] for sizes in planned]
    stride = EFFNET_STRIDE if spec.model == "effnet" else 1
    return [sizes.prior[0] * stride for sizes in planned]
