"""Inputs of engines, drawn for verification: a batch of two, and sizes that are small and not square."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cascade_rt.stages import AxisRange, EngineSpec, TensorSpec

Array = NDArray[Any]
_TIMES = {"batch": 2, "height": 2, "width": 3, "tokens": 5}
"""How many of the smallest accepted size are drawn."""


def draw_normal(spec: EngineSpec, _config: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Array]:
    """Standard normal numbers for every input.

    Args:
        spec: resolved engine.
        _config: of its component; not needed.
        rng: source of the numbers.

    Returns:
        float32 arrays by the names of the inputs.
    """
    sizes = small_sizes(spec)
    return {t.name: rng.standard_normal(t.shape(sizes), dtype=np.float32) for t in spec.inputs}


def draw_pictures(spec: EngineSpec, _config: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Array]:
    """Numbers from 0 to 1 for pixels, standard normal ones for everything else."""
    sizes = small_sizes(spec)
    return {t.name: _picture_or_normal(t, sizes, rng) for t in spec.inputs}


def _picture_or_normal(tensor: TensorSpec, sizes: Mapping[str, int], rng: np.random.Generator) -> Array:
    shape = tensor.shape(sizes)
    return rng.random(shape, dtype=np.float32) if tensor.name == "pixels" else rng.standard_normal(shape, np.float32)


def draw_prompts(spec: EngineSpec, config: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Array]:
    """Two prompts of random words, one that fills the length and a shorter one, each with its end token and padding."""
    batch, length = spec.tensor("input_ids").shape(small_sizes(spec))
    end_id, pad_id = config.get("eos_token_id", 49407), config.get("pad_token_id", 1)
    ids = rng.integers(0, config.get("vocab_size", 49408), size=(batch, length), dtype=np.int64)
    mask = np.ones((batch, length), dtype=np.int64)
    for row, end in enumerate((length - 1, length // 2)):
        ids[row, end] = end_id
        ids[row, end + 1 :] = pad_id
        mask[row, end + 1 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def draw_conditions(spec: EngineSpec, _config: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Array]:
    """What a prompt gives a denoiser: standard normal numbers for its context inputs but the timesteps."""
    sizes = small_sizes(spec)
    drawn = (t for t in spec.inputs if t.on_host and t.name not in ("timestep_embedding", "latents", "step"))
    return {t.name: rng.standard_normal(t.shape(sizes), dtype=np.float32) for t in drawn}


def small_sizes(spec: EngineSpec) -> dict[str, int]:
    """A small size for every named axis, not square."""
    return {name: _small(limits, _TIMES.get(name, 1)) for name, limits in spec.ranges.items()}


def _small(limits: AxisRange, times: int) -> int:
    size = max(limits.least, limits.multiple) * times
    return size if limits.accepts(size) else limits.least
