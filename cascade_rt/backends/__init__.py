"""Who runs engines: the table of providers, and one file a runtime behind the protocol of `base`.

Nothing here knows a bundle: an engine is opened from its manifest record and the path of its file.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from ..errors import EngineError, RequestError, refused, shown
from ..manifest import EngineRecord, Runtime
from ..stages import DType, Precision
from .base import BoundEngine, DeviceTensor, Engine, EngineOptions, StaleEngineError, Value
from .providers import PROVIDERS, Provider, install_command

__all__ = [
    "PROVIDERS",
    "BoundEngine",
    "DeviceTensor",
    "Engine",
    "EngineOptions",
    "Provider",
    "StaleEngineError",
    "Value",
    "check_options",
    "computes",
    "engine_runtime",
    "open_engine",
    "resolve_provider",
    "runs",
]

# read when ONNX Runtime is imported; a switch of its own comes too late for what it does and prints by then
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

MAX_THREADS = 1024
MAX_DEVICE = 1023


def engine_runtime(provider: str) -> Runtime:
    """The kind of engine file that a provider runs: ``onnx`` graphs, or engine files of TensorRT."""
    return PROVIDERS[provider].runtime


def computes(provider: str) -> tuple[DType, ...]:
    """Compute dtypes of the engines that a provider runs on this machine."""
    if provider == "openvino":
        from .openvino import processor_computes

        return processor_computes()
    return PROVIDERS[provider].computes


def runs(provider: str, precision: Precision) -> bool:
    """Whether a provider runs engines of a precision on this machine."""
    return PROVIDERS[provider].takes(precision) and precision.compute in computes(provider)


def resolve_provider(provider: str, suits: Callable[[str], bool] = lambda name: True) -> str:
    """Turn ``auto`` into the best provider at hand, and refuse what is not there.

    ``auto`` is the first of these that is at hand and suits: CUDA, the CPU provider, OpenVINO; where none suits, the
    first at hand. TensorRT is always asked for by name: `ort-tensorrt` builds for minutes before the first picture,
    and engine files of TensorRT are chosen when they are exported.

    Args:
        provider: ``auto``, or a name of `PROVIDERS`.
        suits: of ``auto``: whether a provider that is at hand runs what will be asked of it.

    Raises:
        RequestError: an unknown name.
        EngineError: a known one that is not installed.
    """
    if not isinstance(provider, str) or (provider != "auto" and provider not in PROVIDERS):
        raise RequestError(
            f"provider {shown(provider)} is not known; accepted: auto, {', '.join(PROVIDERS)}",
            field="provider",
            value=provider,
            accepted=f"auto, {', '.join(PROVIDERS)}",
        )
    if provider != "auto" and (runtime := engine_runtime(provider)) != "onnx":
        from .tensorrt import problem

        if reason := problem(runtime):
            raise EngineError(
                f"provider {provider} is not available here: {reason}. It is installed with: "
                f"{install_command(provider)}, and needs an NVIDIA GPU"
            )
        return provider
    wanted = ("cuda", "cpu", "openvino") if provider == "auto" else (provider,)
    first = None
    for name in filter(_runs_graphs, wanted):
        if provider != "auto" or suits(name):
            return name
        first = first or name
    if first is not None:
        return first
    at_hand = [name for name, row in PROVIDERS.items() if row.runtime == "onnx" and _runs_graphs(name)]
    if not at_hand:
        command = install_command("cpu" if provider == "auto" else provider)
        raise EngineError(f"no engine runtime is installed; install one with: {command}")
    raise EngineError(
        f"provider {provider} is not available here; available: {', '.join(at_hand)}. It is installed with: "
        f"{install_command(provider)}, and needs a device that it supports"
    )


def _runs_graphs(provider: str) -> bool:
    """Whether a provider of graphs is installed and has its device here. To ask ONNX Runtime costs its import."""
    if provider == "openvino":
        return importlib.util.find_spec("openvino") is not None
    if importlib.util.find_spec("onnxruntime") is None:
        return False
    from .ort import available

    return available(provider)


def check_options(provider: str, options: EngineOptions) -> None:
    """Refuse options that no engine of a provider can be opened with.

    Args:
        provider: a name of `PROVIDERS`.
        options: from a caller.

    Raises:
        RequestError: a number of threads, a device or a setting that is not accepted.
        EngineError: there is no such GPU here.
    """
    row, threads, device_id = PROVIDERS[provider], options.threads, options.device_id
    if threads is not None:
        if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= MAX_THREADS:
            raise refused("threads", threads, f"an integer from 1 to {MAX_THREADS}, or None")
        if row.runtime != "onnx":
            raise RequestError(
                f"threads {threads} is for providers of the CPU; provider {provider} runs on the GPU. Leave it out",
                field="threads",
                value=threads,
                accepted="None",
            )
    if isinstance(device_id, bool) or not isinstance(device_id, int) or not 0 <= device_id <= MAX_DEVICE:
        raise refused("device_id", device_id, f"an integer from 0 to {MAX_DEVICE}")
    if row.device == "cpu" and device_id:
        raise RequestError(
            f"device_id {shown(device_id)} is not accepted; provider {provider} runs on the CPU, which is device 0",
            field="device_id",
            value=device_id,
            accepted="0",
        )
    settings = options.provider_options
    if not isinstance(settings, Mapping):
        raise refused("provider_options", settings, "a mapping of names to texts, such as {'NAME': '1'}")
    for key, value in settings.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise refused("provider_options", {key: value}, "a mapping of names to texts, such as {'NAME': '1'}")
    if row.device == "cuda":
        from .cuda import gpu_sm

        gpu_sm(device_id)


def open_engine(record: EngineRecord, path: Path, provider: str, options: EngineOptions) -> Engine:
    """Load an engine. Its files have been checked: a runtime reads what it is given.

    Args:
        record: its manifest record; its ranges are what will be asked of it.
        path: of its file; weights lie beside it.
        provider: from `resolve_provider`.
        options: from `check_options`.

    Raises:
        StaleEngineError: a TensorRT engine file of another version, or for other GPUs.
        EngineError: it cannot be loaded.
    """
    runtime = engine_runtime(provider)
    if record.runtime != runtime:
        raise EngineError(f"{record.key} is for {record.runtime}; provider {provider} runs {runtime} engines")
    if record.precision.linear not in PROVIDERS[provider].linear:
        others = " or ".join(name for name, row in PROVIDERS.items() if row.takes(record.precision))
        raise EngineError(f"{record.key}: provider {provider} has no {record.precision.name} products; use {others}")
    if runtime != "onnx":
        from .tensorrt import TensorRTEngine

        return TensorRTEngine(record, path, options)
    if provider == "openvino":
        from .openvino import OpenVinoEngine

        return OpenVinoEngine(record, path, options)
    from .ort import OrtEngine

    return OrtEngine(record, path, provider, options)
