"""cascade-rt: Stable Cascade from engines, without torch.

from cascade_rt import CascadePipeline

pipe = CascadePipeline.from_pretrained()
pipe("a red circle", seed=0).images[0].save("out.png")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    BundleError,
    BundleNotFoundError,
    CascadeError,
    CheckpointError,
    EngineError,
    ExportError,
    GenerationInterrupted,
    OutputError,
    RequestError,
)

if TYPE_CHECKING:
    from .outputs import CascadeOutput, PriorOutput
    from .pipeline import CascadePipeline
    from .request import LoopSettings, Request

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
    "GenerationInterrupted",
    "LoopSettings",
    "OutputError",
    "PriorOutput",
    "Request",
    "RequestError",
    "__version__",
]


_LAZY = {
    "CascadePipeline": "pipeline",
    "CascadeOutput": "outputs",
    "PriorOutput": "outputs",
    "LoopSettings": "request",
    "Request": "request",
}


def __getattr__(name: str) -> Any:
    """Load a module when it is first asked for: the commands can answer Ctrl-C before NumPy is there."""
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
