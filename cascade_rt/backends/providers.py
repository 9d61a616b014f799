"""The table of providers: who runs engines, what kind of engine file, where, and in which arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..manifest import Runtime
from ..stages import DType


@dataclass(frozen=True, kw_only=True)
class Provider:
    """What runs engines.

    Attributes:
        extra: of this package, that installs it.
        runtime: the kind of engine file that it runs.
        device: where it computes, in PyTorch's words.
        computes: compute dtypes of the graphs that it takes. OpenVINO takes those of the processor: `computes`.
    """

    extra: str
    runtime: Runtime = "onnx"
    device: Literal["cpu", "cuda"] = "cuda"
    computes: tuple[DType, ...] = ("float32", "float16", "bfloat16")


PROVIDERS: dict[str, Provider] = {
    "cpu": Provider(extra="onnxruntime", device="cpu", computes=("float32", "float16")),
    "openvino": Provider(extra="openvino", device="cpu"),
    "cuda": Provider(extra="onnxruntime-gpu"),
    "ort-tensorrt": Provider(extra="ort-tensorrt"),
    "tensorrt": Provider(extra="tensorrt", runtime="tensorrt"),
    "tensorrt-rtx": Provider(extra="tensorrt-rtx", runtime="tensorrt-rtx"),
}
"""Everything that ``--provider`` takes, beside ``auto``."""


def install_command(provider: str) -> str:
    """What installs a provider."""
    return f"pip install 'cascade-rt[{PROVIDERS[provider].extra}]'"
