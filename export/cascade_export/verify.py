"""The parity ladder, and the rung that every export climbs before it gets its name: engine against fp32 PyTorch.

What the exporter compares with is this package's own module in fp32, unsplit; that module is compared with diffusers
in ``tests/parity``, from whose code nothing here is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cascade_rt.backends import Value
from cascade_rt.errors import ExportError
from cascade_rt.image import resize_bilinear
from cascade_rt.sampling import make_schedule, timestep_embedding
from cascade_rt.stages import EngineSpec, Precision

from .graphs import CALLS
from .models import Denoiser

Array = NDArray[Any]


@dataclass(frozen=True)
class Tolerance:
    """A bound on a relative L2 error, and why it is what it is."""

    rel_l2: float
    why: str


TOLERANCES: dict[str, Tolerance] = {
    "module": Tolerance(2e-6, "same arithmetic as diffusers, sums in another order"),
    "split": Tolerance(2e-6, "the same operations in two calls"),
    "engine fp32": Tolerance(2e-5, "another library's kernels, some fused"),
    "engine fp16": Tolerance(5e-3, "11 bits of mantissa through a hundred blocks"),
    "engine bf16": Tolerance(4e-2, "8 bits of mantissa through a hundred blocks"),
    "step": Tolerance(2e-6, "scalars in float64 here, in float32 in diffusers"),
    "prior loop": Tolerance(1e-4, "the engine's error through 20 steps with guidance"),
}
PICTURE_PSNR = 60.0
"""Least PSNR in dB (peak 1) between a whole picture of fp32 engines and diffusers' fp32 picture."""


@dataclass(frozen=True)
class Figures:
    """How far one tensor is from its reference, in float64.

    Attributes:
        rel_l2: norm of the difference over the norm of the reference.
        max_abs: largest difference.
        cosine: cosine similarity.
        psnr: dB at peak 1, for pixels only.
    """

    rel_l2: float
    max_abs: float
    cosine: float
    psnr: float | None = None


def compare(name: str, made: Array, reference: Array, pixels: bool = False) -> Figures:
    """Compare two arrays.

    Raises:
        ExportError: their shapes differ, or either holds NaN or infinity.
    """
    if made.shape != reference.shape:
        raise ExportError(f"{name} has shape {made.shape}; the reference has {reference.shape}")
    a, b = made.astype(np.float64), reference.astype(np.float64)
    for array, whose in ((a, "it"), (b, "its reference")):
        if not np.isfinite(array).all():
            raise ExportError(f"{name}: {whose} holds NaN or infinity")
    difference, size = np.linalg.norm(a - b), np.linalg.norm(b)
    rel_l2 = float(difference / size) if size else float(difference)
    scale = np.linalg.norm(a) * size
    cosine = float((a * b).sum() / scale) if scale else 1.0
    psnr = None
    if pixels:
        mean = float(np.mean((a - b) ** 2))
        psnr = float(-10 * np.log10(mean)) if mean else None
    return Figures(rel_l2, float(np.abs(a - b).max(initial=0.0)), cosine, psnr)


RunEngine = Callable[[str, Mapping[str, Value]], dict[str, Value]]


def verify_stage(
    specs: list[EngineSpec], module: nn.Module, run: RunEngine, precision: Precision, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Compare the engines of a stage with their module.

    Inputs are drawn as the loop draws them: normal latents, first, middle and last timestep, batches of two, a size
    that is not square.

    Args:
        specs: the stage's resolved engines.
        module: the model in fp32, with its weights.
        run: runs one of the engines.
        precision: of the engines.
        seed: of the inputs.

    Returns:
        Engine name -> figures for its manifest record.

    Raises:
        ExportError: an engine is further from PyTorch than its precision explains.
    """
    bound = TOLERANCES[f"engine {precision}"]
    results: dict[str, dict[str, Any]] = {}
    cases = _denoiser_cases if isinstance(module, Denoiser) else _plain_cases
    with torch.inference_mode():
        for engine, tensor, figures in cases(specs, module, run, np.random.default_rng(seed)):
            if figures.rel_l2 > bound.rel_l2:
                raise ExportError(
                    f"{engine}: {tensor} is {figures.rel_l2:.2e} from fp32 PyTorch; {precision} engines may be up to "
                    f"{bound.rel_l2:.0e} ({bound.why}). Try another --precision"
                )
            worst = results.get(engine)
            if worst is None or figures.rel_l2 > worst["rel_l2"]:
                results[engine] = {"reference": "fp32 PyTorch", "tensor": tensor, **asdict(figures)}
    return results


Case = tuple[str, str, Figures]


def _plain_cases(
    specs: list[EngineSpec], module: nn.Module, run: RunEngine, rng: np.random.Generator
) -> Iterator[Case]:
    for spec in specs:
        if spec.name == "text_encoder":
            feeds = _draw_prompts(spec, module.config, rng)
        else:
            feeds = {t.name: _draw(spec, t.name, rng) for t in spec.inputs}
        reference = CALLS[spec.name](module, {n: torch.from_numpy(a) for n, a in feeds.items()})
        outputs = run(spec.name, feeds)
        for tensor, wanted in zip(spec.outputs, reference, strict=True):
            made = outputs[tensor.name]
            assert isinstance(made, np.ndarray)  # only context tensors stay on the device
            yield spec.name, tensor.name, compare(tensor.name, made, wanted.numpy(), tensor.name == "pixels")


def _draw_prompts(spec: EngineSpec, config: Any, rng: np.random.Generator) -> dict[str, Array]:
    """Two prompts of random words, one that fills the length and a shorter one, each with its end token and padding."""
    length = spec.inputs[0].axes[1]
    assert isinstance(length, int)
    ids = rng.integers(0, config.vocab_size, size=(2, length))
    mask = np.ones((2, length), dtype=np.int64)
    for row, end in enumerate((length - 1, length // 2)):
        ids[row, end] = config.eos_token_id
        ids[row, end + 1 :] = config.pad_token_id
        mask[row, end + 1 :] = 0
    return {"input_ids": ids.astype(np.int64), "attention_mask": mask}


def _draw(spec: EngineSpec, name: str, rng: np.random.Generator) -> Array:
    tensor = next(t for t in spec.inputs if t.name == name)
    sizes = {"batch": 2, "height": 2, "width": 3}
    shape = []
    for axis in tensor.axes:
        if isinstance(axis, int):
            shape.append(axis)
        else:
            limits = spec.ranges[axis]
            least = max(limits.min, limits.multiple)
            shape.append(2 if axis == "batch" else least * sizes[axis])
    if name == "pixels":
        return rng.random(shape, dtype=np.float32)
    return rng.standard_normal(shape, dtype=np.float32)


def _denoiser_cases(
    specs: list[EngineSpec], module: nn.Module, run: RunEngine, rng: np.random.Generator
) -> Iterator[Case]:
    assert isinstance(module, Denoiser)
    context_spec, step_spec = sorted(specs, key=lambda s: s.name)  # "...context" before "...step"
    config = module.config
    multiple = step_spec.ranges["height"].multiple
    height, width = max(4, 2 * multiple), max(6, 3 * multiple)
    schedule = make_schedule("original", 5, shift=2.0)
    conditions: dict[str, Array] = {}
    for spec in context_spec.inputs:
        if spec.name == "timestep_embedding":
            continue
        # effnet is drawn smaller than the grid, so that the host's resize is a part of what is checked
        sizes = {"batch": 2, "tokens": 9, "images": 1, "grid_height": 3, "grid_width": 4}
        shape = [a if isinstance(a, int) else sizes[a] for a in spec.axes]
        conditions[spec.name] = rng.standard_normal(shape, dtype=np.float32)
    feeds = dict(conditions)
    if "effnet" in feeds:
        feeds["effnet"] = resize_bilinear(feeds["effnet"], height // config.patch_size, width // config.patch_size)
    feeds["timestep_embedding"] = timestep_embedding(schedule.ratios, config.timestep_ratio_embedding_dim)
    context = run(context_spec.name, feeds)
    latents = rng.standard_normal((2, config.in_channels, height, width), dtype=np.float32)
    given: dict[str, Tensor] = {n: torch.from_numpy(a) for n, a in conditions.items()}
    for step in (0, len(schedule) // 2, len(schedule) - 1):
        ratio = torch.full((2,), float(schedule.ratios[step]))
        reference = module(torch.from_numpy(latents), ratio, **given)
        outputs = run(step_spec.name, {**context, "latents": latents, "step": np.array([step])})
        made = outputs["prediction"]
        assert isinstance(made, np.ndarray)
        # the context is judged by what the step makes of it: it never leaves the engine's device
        figures = compare("prediction", made, reference.numpy())
        yield context_spec.name, "prediction", figures
        yield step_spec.name, "prediction", figures
