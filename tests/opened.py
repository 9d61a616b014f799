"""Engines of a bundle, opened by hand: what the loader does, for tests of one engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from cascade_rt.backends import Engine, EngineOptions
from cascade_rt.bundle import Bundle
from cascade_rt.loader import EngineLoader
from cascade_rt.manifest import EngineRecord

Arrays = dict[str, np.ndarray[Any, Any]]
OLDEST_WITH_CUDA = (1, 31)
"""The version of ONNX Runtime that the extras of its GPU providers ask for. The CPU provider runs on older ones."""


def skip_without_gpu_calls() -> None:
    """Skip where ONNX Runtime is older than its GPU providers may be."""
    import onnxruntime

    if tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) < OLDEST_WITH_CUDA:
        pytest.skip(f"ONNX Runtime {onnxruntime.__version__} is too old for the GPU providers, which ask for 1.31")


def record_of(bundle: Bundle, name: str, provider: str) -> EngineRecord:
    """The record that a provider runs; of ``ort-tensorrt``, with the sizes that its engine is built for."""
    loader = EngineLoader(bundle, "cpu")
    loader.provider = provider
    return loader.record(name)


def open_of(bundle: Bundle, name: str, provider: str, threads: int | None = 1, **options: Any) -> Engine:
    """An engine of a bundle, opened; the caller closes it."""
    loader = EngineLoader(bundle, "cpu")
    loader.provider = provider
    loader.options = EngineOptions(threads=threads, **options)
    return loader._open(loader.record(name))


def conditions(bundle: Bundle, seed: int, batch: int = 1) -> Arrays:
    """Inputs of ``stage_c.context``."""
    config: Mapping[str, Any] = bundle.manifest.models["stage_c"].config
    rng = np.random.default_rng(seed)
    return {
        "timestep_embedding": rng.standard_normal((3, int(config["timestep_ratio_embedding_dim"])), np.float32),
        "clip_text_pooled": rng.standard_normal((batch, 1, config["clip_text_pooled_in_channels"]), np.float32),
        "clip_text": rng.standard_normal((batch, 24, config["clip_text_in_channels"]), np.float32),
        "clip_img": np.zeros((batch, 1, config["clip_image_in_channels"]), np.float32),
    }


def context(bundle: Bundle, provider: str, seed: int, batch: int = 1, threads: int | None = 1) -> dict[str, Any]:
    """What ``stage_c.context`` makes of them."""
    with open_of(bundle, "stage_c.context", provider, threads) as engine:
        return dict(engine.bind({})(conditions(bundle, seed, batch)))


def latents(seed: int, batch: int = 1, side: int = 4) -> Arrays:
    """The other inputs of ``stage_c.step``."""
    rng = np.random.default_rng(seed)
    return {"latents": rng.standard_normal((batch, 16, side, side), np.float32), "step": np.full(batch, 1)}
