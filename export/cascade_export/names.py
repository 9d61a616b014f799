"""Names of a bundle's files: short where there is one of a kind, else with features, precision, or both."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable

from cascade_rt.stages import EngineSpec, Precision

from .targets import BuildTarget


def graph_name(spec: EngineSpec, precision: Precision, taken: Collection[str]) -> str:
    """The file of a graph: ``stage_c.step.onnx``, or ``stage_c.step.bf16.onnx`` where that is taken.

    Args:
        spec: of the engine.
        precision: of the graph.
        taken: names of other engines' files.
    """
    return _free(spec.name, precision, spec.features, ".onnx", taken)


def weights_name(model: str, specs: Iterable[EngineSpec], precision: Precision, taken: Collection[str]) -> str:
    """The weights file of a component's graphs: ``stage_c.safetensors``, or ``stage_c.bf16.safetensors``."""
    features = sorted({feature for spec in specs for feature in spec.features})
    return _free(model, precision, features, ".safetensors", taken)


def engine_file_name(spec: EngineSpec, precision: Precision, target: BuildTarget, taken: Collection[str]) -> str:
    """A TensorRT engine file: ``stage_c.step.rtx-sm89.engine``, or ``stage_c.step.bf16.rtx-sm89.engine``."""
    return _free(spec.name, precision, spec.features, f".{target.suffix}", taken)


def _free(stem: str, precision: Precision, features: Iterable[str], suffix: str, taken: Collection[str]) -> str:
    featured = ".".join([stem, *features])
    longest = f"{featured}.{precision.name}"
    numbered = (f"{longest}.{number}" for number in itertools.count(2))
    names = itertools.chain((stem, featured, longest), numbered)
    return next(f"{name}{suffix}" for name in names if f"{name}{suffix}" not in taken)
