"""What an export is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cascade_rt.manifest import Manifest
from cascade_rt.profiles import DEFAULT_SHAPES, Shapes
from cascade_rt.stages import Precision, StageName, engines_of

from .targets import ONNX, BuildTarget

Report = Callable[[str], None]
"""Gets one line for each thing that was done."""


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What to export.

    Attributes:
        stages: in any order.
        precision: of weights and wide activations.
        out: the bundle.
        features: engines whose tensors know them are made with them.
        control_blocks: residual blocks of Stage C that take a ControlNet's residuals; None: those that the checkpoint
            or the bundle names, or the published ones.
        skip_absent: leave out stages that the checkpoint does not have (for ``--stage all``).
        verify: compare with fp32 PyTorch before the bundle takes its place.
        overwrite: replace engines that are there.
        quiet: no progress bar.
        targets: engine runtimes, from `targets.resolve_targets`.
        shapes: sizes that engine files take, from `shape_options.parse_shapes`.
    """

    stages: tuple[StageName, ...]
    precision: Precision
    out: Path
    features: tuple[str, ...] = ()
    control_blocks: tuple[int, ...] | None = None
    skip_absent: bool = False
    verify: bool = True
    overwrite: bool = False
    quiet: bool = False
    targets: tuple[BuildTarget, ...] = (ONNX,)
    shapes: Shapes = DEFAULT_SHAPES

    @property
    def keeps_graphs(self) -> bool:
        """Whether graphs go into the bundle, or are only what engine files are built from."""
        return ONNX in self.targets

    @property
    def engine_files(self) -> tuple[BuildTarget, ...]:
        """Targets that are built from graphs."""
        return tuple(target for target in self.targets if target != ONNX)


def own_precision(manifest: Manifest, stages: tuple[StageName, ...]) -> Precision | None:
    """The precision of the graphs that a bundle holds of stages; None if it holds none of some, or several."""
    found = [manifest.records(spec.name, "onnx") for stage in stages for spec in engines_of(stage)]
    precisions = {record.precision for records in found for record in records}
    return precisions.pop() if all(found) and len(precisions) == 1 else None
