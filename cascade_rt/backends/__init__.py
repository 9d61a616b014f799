"""One file an engine runtime, behind the protocol of `base`."""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass, replace
from typing import Literal

from ..bundle import Bundle, EngineRecord
from ..errors import EngineError, RequestError
from ..shapes import DEFAULT_SHAPES, narrow
from .base import BoundEngine, DeviceTensor, Engine, Value

__all__ = [
    "PROVIDERS",
    "BoundEngine",
    "DeviceTensor",
    "Engine",
    "Provider",
    "Value",
    "engine_runtime",
    "find_record",
    "open_engine",
    "resolve_provider",
]


@dataclass(frozen=True)
class Provider:
    """What runs engines.

    Attributes:
        extra: of this package, that installs it.
        runtime: the kind of engine that it runs: ``onnx`` graphs, or plans.
        device: where it computes, in PyTorch's words.
    """

    extra: str
    runtime: Literal["onnx", "tensorrt", "tensorrt-rtx"] = "onnx"
    device: Literal["cpu", "cuda"] = "cuda"


PROVIDERS: dict[str, Provider] = {
    "cpu": Provider("onnxruntime", device="cpu"),
    "openvino": Provider("openvino", device="cpu"),
    "cuda": Provider("onnxruntime-gpu"),
    "ort-tensorrt": Provider("ort-tensorrt"),
    "tensorrt": Provider("tensorrt", "tensorrt"),
    "tensorrt-rtx": Provider("tensorrt-rtx", "tensorrt-rtx"),
}
"""Everything that ``--provider`` takes, beside ``auto``."""


def engine_runtime(provider: str) -> str:
    """The kind of engine that a provider runs: ``onnx`` graphs or plans."""
    return PROVIDERS[provider].runtime


def resolve_provider(provider: str) -> str:
    """Turn ``auto`` into the best provider at hand, and refuse what is not there.

    ``auto`` is CUDA where ONNX Runtime and the machine have it, else the CPU provider; OpenVINO where it is asked for
    or alone. TensorRT is always asked for by name: `ort-tensorrt` builds for minutes before the first picture, and
    plans are chosen when they are exported.

    Raises:
        RequestError: an unknown name.
        EngineError: a known one that is not installed.
    """
    if provider != "auto" and provider not in PROVIDERS:
        raise RequestError(f"provider {provider!r} is not known; accepted: auto, {', '.join(PROVIDERS)}")
    if provider != "auto" and (runtime := engine_runtime(provider)) != "onnx":
        from .tensorrt import problem

        if reason := problem(runtime):
            raise EngineError(
                f"provider {provider} is not available here: {reason}. It is installed with: "
                f"pip install 'cascade-rt[{PROVIDERS[provider].extra}]', and needs an NVIDIA GPU"
            )
        return provider
    wanted = ("cuda", "cpu", "openvino") if provider == "auto" else (provider,)
    if (found := next(filter(_runs_graphs, wanted), None)) is not None:
        return found
    at_hand = [name for name, row in PROVIDERS.items() if row.runtime == "onnx" and _runs_graphs(name)]
    if not at_hand:
        extra = PROVIDERS["cpu" if provider == "auto" else provider].extra
        raise EngineError(f"no engine runtime is installed; install one with: pip install 'cascade-rt[{extra}]'")
    raise EngineError(
        f"provider {provider} is not available here; available: {', '.join(at_hand)}. It is installed with: "
        f"pip install 'cascade-rt[{PROVIDERS[provider].extra}]', and needs a device that it supports"
    )


def _runs_graphs(provider: str) -> bool:
    """Whether a provider of graphs is installed and has its device here. To ask ONNX Runtime costs its import."""
    if provider == "openvino":
        from . import openvino

        return openvino.installed()
    if importlib.util.find_spec("onnxruntime") is None:
        return False
    from .ort import available

    return available(provider)


def find_record(bundle: Bundle, name: str, provider: str) -> EngineRecord:
    """The record of the engine that a provider runs on this machine.

    Raises:
        BundleError: the bundle has none.
    """
    if (runtime := engine_runtime(provider)) == "onnx":
        graph = bundle.engine(name, runtime)
        return _narrowed(bundle, graph) if provider == "ort-tensorrt" else graph
    from .cuda import gpu_sm

    return bundle.engine(name, runtime, gpu_sm())


def _narrowed(bundle: Bundle, graph: EngineRecord) -> EngineRecord:
    """A graph with the sizes that a plan of it would take: ONNX Runtime's TensorRT builds one too, for all of them."""
    graphs = {record.spec.name: record.spec for record in bundle.manifest.records if record.runtime == "onnx"}
    decoder = graphs.get("stage_b.step")
    granularity = decoder.ranges["height"].multiple if decoder else 1
    specs = narrow(list(graphs.values()), DEFAULT_SHAPES, bundle.manifest.model, granularity)
    return replace(graph, spec=specs[graph.spec.name])


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
            raise RequestError(
                f"--threads {threads} is for providers of the CPU; provider {provider} is one of the GPU"
            )
        from .tensorrt import open_plan

        return open_plan(bundle, name, runtime)
    record = find_record(bundle, name, provider)
    for weights in record.weights:
        bundle.file(weights)
    path = bundle.file(record.file)
    if provider == "openvino":
        from .openvino import OpenVinoEngine

        return OpenVinoEngine(record, path, threads)
    from .ort import OrtEngine

    hashes = "".join(bundle.manifest.files[file]["sha256"] for file in record.files)
    return OrtEngine(record, path, provider, threads, hashlib.sha256(hashes.encode()).hexdigest())
