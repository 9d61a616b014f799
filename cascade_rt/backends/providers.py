"""The table of providers: who runs engines, what kind of engine file, where, and in which arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..manifest import Runtime
from ..stages import DType, Linear, Precision


@dataclass(frozen=True, kw_only=True)
class Provider:
    """What runs engines.

    Attributes:
        extra: of this package, that installs it.
        runtime: the kind of engine file that it runs.
        device: where it computes, in PyTorch's words.
        computes: compute dtypes of the graphs that it takes. OpenVINO takes those of the processor: `computes`.
        linear: how it computes linear layers.
    """

    extra: str
    runtime: Runtime = "onnx"
    device: Literal["cpu", "cuda"] = "cuda"
    computes: tuple[DType, ...] = ("float32", "float16", "bfloat16")
    linear: tuple[Linear, ...] = ("plain",)

    def takes(self, precision: Precision) -> bool:
        """Whether it runs engines of a precision, on a processor or GPU that has the arithmetic."""
        return precision.compute in self.computes and precision.linear in self.linear


_ON_CPUS: tuple[Linear, ...] = ("plain", "int8", "int8-static", "w8")
_IN_TENSORRT: tuple[Linear, ...] = ("plain", "int8-static", "fp8")
PROVIDERS: dict[str, Provider] = {
    "cpu": Provider(extra="onnxruntime", device="cpu", computes=("float32", "float16"), linear=_ON_CPUS),
    "openvino": Provider(extra="openvino", device="cpu", linear=_ON_CPUS),
    "cuda": Provider(extra="onnxruntime-gpu"),
    "ort-tensorrt": Provider(extra="ort-tensorrt"),
    "tensorrt": Provider(extra="tensorrt", runtime="tensorrt", linear=_IN_TENSORRT),
    "tensorrt-rtx": Provider(extra="tensorrt-rtx", runtime="tensorrt-rtx", linear=_IN_TENSORRT),
}
"""Everything that ``--provider`` takes, beside ``auto``."""


OPENVINO_INT8_GROUP = "128"
"""How many neighbouring inputs of an int8 product share a scale in OpenVINO: the fastest of 32, 64, 128, 256, 512."""


def install_command(provider: str) -> str:
    """What installs a provider."""
    return f"pip install 'cascade-rt[{PROVIDERS[provider].extra}]'"
