"""cascade-rt: Stable Cascade from engines, without torch.

from cascade_rt import CascadePipeline

pipe = CascadePipeline.from_pretrained()
pipe("a red circle", seed=0).images[0].save("out.png")
"""

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
