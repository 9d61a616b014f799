"""cascade-rt: Stable Cascade from engines, without torch.

from cascade_rt import CascadePipeline

pipe = CascadePipeline.from_pretrained()
pipe("a red circle", seed=0).images[0].save("out.png")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import (
    BundleError,
    BundleNotFoundError,
    CascadeError,
    CheckpointError,
    EngineError,
    ExportError,
    OutputError,
    RequestError,
)

if TYPE_CHECKING:
    from .outputs import CascadeOutput, PriorOutput
    from .pipeline import CascadePipeline

__version__ = "0.1.0"

__all__ = [
    "BundleError",
    "BundleNotFoundError",
    "CascadeError",
    "CascadeOutput",
    "CascadePipeline",
    "CheckpointError",
    "EngineError",
    "ExportError",
    "OutputError",
    "PriorOutput",
    "RequestError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Load the pipeline when it is first asked for: the commands can answer Ctrl-C before NumPy is there."""
    if name == "CascadePipeline":
        from .pipeline import CascadePipeline

        return CascadePipeline
    if name in ("CascadeOutput", "PriorOutput"):
        from . import outputs

        return getattr(outputs, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
