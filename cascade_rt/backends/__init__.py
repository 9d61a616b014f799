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

    ``auto`` is CUDA where ONNX Runtime has it, else the CPU; OpenVINO is used when it is asked for.

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
    if importlib.util.find_spec("onnxruntime") is None:
        extra = PROVIDERS.get(provider, "onnxruntime")
        raise EngineError(f"no engine runtime is installed; install one with: pip install 'cascade-rt[{extra}]'")
    from .ort import available_providers

    at_hand = available_providers()
    if provider == "auto":
        return "cuda" if "cuda" in at_hand else "cpu"
    if provider not in at_hand:
        raise EngineError(
            f"provider {provider} is not available here; available: {', '.join(at_hand)}. It is installed with: "
            f"pip install 'cascade-rt[{PROVIDERS[provider]}]', and needs a device that it supports"
        )
    return provider


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
    from .ort import OrtEngine

    return OrtEngine(record, bundle.file(record.file), provider, threads)
