"""One file an engine runtime, behind the protocol of `base`."""

from __future__ import annotations

import importlib.util

from ..bundle import Bundle, EngineRecord
from ..errors import EngineError, RequestError
from .base import BoundEngine, DeviceTensor, Engine, Value

__all__ = [
    "PROVIDERS",
    "BoundEngine",
    "DeviceTensor",
    "Engine",
    "Value",
    "find_record",
    "open_engine",
    "resolve_provider",
]

PROVIDERS: dict[str, str] = {
    "cpu": "onnxruntime",
    "openvino": "openvino",
    "cuda": "onnxruntime-gpu",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt-rtx",
}
"""Provider names and the extra of this package that installs each."""


def engine_runtime(provider: str) -> str:
    """The kind of engine that a provider runs: ``onnx`` graphs or plans."""
    return provider if provider in ("tensorrt", "tensorrt-rtx") else "onnx"


def resolve_provider(provider: str) -> str:
    """Turn ``auto`` into the best provider at hand, and refuse what is not there.

    ``auto`` is CUDA where ONNX Runtime has it, else its CPU provider; OpenVINO where it is asked for or alone.

    Raises:
        RequestError: an unknown name.
        EngineError: a known one that is not installed.
    """
    if provider != "auto" and provider not in PROVIDERS:
        raise RequestError(f"provider {provider!r} is not known; accepted: auto, {', '.join(PROVIDERS)}")
    if (runtime := engine_runtime(provider)) != "onnx":
        from .tensorrt import problem

        if reason := problem(runtime):
            raise EngineError(
                f"provider {provider} is not available here: {reason}. It is installed with: "
                f"pip install 'cascade-rt[{PROVIDERS[provider]}]', and needs an NVIDIA GPU"
            )
        return provider
    at_hand = _graph_providers()
    if not at_hand:
        extra = PROVIDERS.get(provider, "onnxruntime")
        raise EngineError(f"no engine runtime is installed; install one with: pip install 'cascade-rt[{extra}]'")
    if provider == "auto":
        return next(name for name in ("cuda", "cpu", "openvino") if name in at_hand)
    if provider not in at_hand:
        raise EngineError(
            f"provider {provider} is not available here; available: {', '.join(at_hand)}. It is installed with: "
            f"pip install 'cascade-rt[{PROVIDERS[provider]}]', and needs a device that it supports"
        )
    return provider


def _graph_providers() -> list[str]:
    """Providers of graphs that this installation has: ONNX Runtime's, and OpenVINO's own."""
    found = []
    if importlib.util.find_spec("onnxruntime") is not None:
        from .ort import available_providers

        found = available_providers()
    from . import openvino

    if "openvino" not in found and openvino.installed():
        found.append("openvino")
    return found


def find_record(bundle: Bundle, name: str, provider: str) -> EngineRecord:
    """The record of the engine that a provider runs on this machine.

    Raises:
        BundleError: the bundle has none.
    """
    if (runtime := engine_runtime(provider)) == "onnx":
        return bundle.engine(name, runtime)
    from .cuda import gpu_sm

    return bundle.engine(name, runtime, gpu_sm())


def open_engine(bundle: Bundle, name: str, provider: str, threads: int | None = None) -> Engine:
    """Load an engine of a bundle, after checking the hashes of its files.

    Args:
        bundle: where it lies.
        name: a name of `stages.ENGINES`.
        provider: from `resolve_provider`.
        threads: threads within an operator, None for the runtime's own choice.
    """
    if (runtime := engine_runtime(provider)) != "onnx":
        if threads is not None:
            raise RequestError(f"--threads {threads} goes with ONNX Runtime; provider {provider} computes on the GPU")
        from .tensorrt import open_plan

        return open_plan(bundle, name, runtime)
    record = find_record(bundle, name, provider)
    for weights in record.weights:
        bundle.file(weights)
    path = bundle.file(record.file)
    if provider == "openvino" and not _plugin_knows_this_machine():
        from .openvino import OpenVinoEngine

        return OpenVinoEngine(record, path, threads)
    from .ort import OrtEngine

    return OrtEngine(record, path, provider, threads)


def _plugin_knows_this_machine() -> bool:
    """Whether ONNX Runtime's OpenVINO plugin is installed and has a device here."""
    if importlib.util.find_spec("onnxruntime") is None:
        return False
    from .ort import available_providers

    return "openvino" in available_providers()
