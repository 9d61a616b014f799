"""What an export is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cascade_rt.bundle import Bundle
from cascade_rt.shapes import DEFAULT_SHAPES, Shapes
from cascade_rt.stages import Precision, StageName, engines_of

from .tensorrt import ONNX, Target

Report = Callable[[str], None]


@dataclass(frozen=True)
class ExportRequest:
    """What to export.

    Attributes:
        stages: in any order.
        precision: of weights and wide activations.
        out: the bundle.
        skip_absent: leave out stages that the checkpoint does not have (for ``--stage all``).
        verify: compare with fp32 PyTorch before the bundle takes its place.
        overwrite: replace engines that are there.
        quiet: no progress bar.
        targets: engine runtimes, from `tensorrt.resolve_targets`.
        shapes: sizes that plans take, from `shapes.parse_shapes`.
    """

    stages: tuple[StageName, ...]
    precision: Precision
    out: Path
    skip_absent: bool = False
    verify: bool = True
    overwrite: bool = False
    quiet: bool = False
    targets: tuple[Target, ...] = (ONNX,)
    shapes: Shapes = DEFAULT_SHAPES

    @property
    def keeps_graphs(self) -> bool:
        """Whether graphs go into the bundle, or are only what plans are built from."""
        return ONNX in self.targets

    @property
    def plans(self) -> tuple[Target, ...]:
        """Targets that are built from graphs."""
        return tuple(t for t in self.targets if t != ONNX)


def own_precision(bundle: Bundle, stages: tuple[StageName, ...]) -> Precision | None:
    """The precision of the graphs that a bundle holds of stages; None if it holds none of some, or several."""
    engines = bundle.manifest.engines
    found = [engines.get(spec.name, ()) for stage in stages for spec in engines_of(stage)]
    precisions = {record.precision for records in found for record in records if record.runtime == "onnx"}
    complete = all(any(record.runtime == "onnx" for record in records) for records in found)
    return precisions.pop() if complete and len(precisions) == 1 else None
