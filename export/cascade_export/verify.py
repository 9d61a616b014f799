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
from cascade_rt.bundle import LoopDefaults
from cascade_rt.errors import ExportError
from cascade_rt.image import resize_bilinear
from cascade_rt.sampling import Schedule, denoise_step, guide, make_schedule, predict_x0, timestep_embedding
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
    "loop fp32": Tolerance(1e-4, "the engine's error, fed back through all steps with guidance"),
    "loop fp16": Tolerance(5e-3, "the engine's error, fed back through all steps with guidance; tiny: 1e-3"),
    "loop bf16": Tolerance(6e-2, "the engine's error, fed back through all steps with guidance; tiny: 2e-2"),
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
    schedule = make_schedule("original", 5, shift=2.0)
    conditions: dict[str, Tensor] = {}
    for tensor in _parts(specs)[0].inputs:
        if tensor.name == "timestep_embedding":
            continue
        # effnet is drawn smaller than the grid, so that the host's resize is a part of what is checked
        sizes = {"batch": 2, "tokens": 9, "images": 1, "grid_height": 3, "grid_width": 4}
        shape = [a if isinstance(a, int) else sizes[a] for a in tensor.axes]
        conditions[tensor.name] = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    by_engine = _engine_steps(specs, module, run, schedule, conditions)
    by_module = _module_steps(module, schedule, conditions)
    latents = rng.standard_normal((2, module.config.in_channels, *_grid(specs)), dtype=np.float32)
    for step in (0, len(schedule) // 2, len(schedule) - 1):
        # the context is judged by what the step makes of it: it never leaves the engine's device
        figures = compare("prediction", by_engine(latents, step), by_module(latents, step))
        for spec in _parts(specs):
            yield spec.name, "prediction", figures


def verify_loop(
    specs: list[EngineSpec],
    module: Denoiser,
    run: RunEngine,
    precision: Precision,
    schedule: Schedule,
    defaults: LoopDefaults,
    conditions: Mapping[str, Tensor],
    *,
    seed: int = 0,
    progress: Callable[[int], Any] = lambda steps: None,
) -> dict[str, Any]:
    """Compare a whole denoising loop through a denoiser's engines with the same loop through its module.

    Each loop goes on from its own latents, so that errors add up as they do for a picture; noise is the same.

    Args:
        specs: context and step.
        module: the denoiser in fp32, with its weights.
        run: runs one of the engines.
        precision: of the engines.
        schedule: the loop's tables.
        defaults: its guidance.
        conditions: inputs of `Denoiser.forward` beside sample and ratio: a prompt's row and a negative prompt's.
        seed: of latents and noise.
        progress: told of finished network calls, of which there are two a step.

    Returns:
        The figures for the manifest.

    Raises:
        ExportError: the engines' loop ends further from PyTorch's than its precision explains, or in NaN.
    """
    stage, rows = specs[0].model, 2 if defaults.guidance_scale > 1 else 1
    given = {name: tensor[:rows].clone() for name, tensor in conditions.items()}
    if "effnet" in given:
        given["effnet"][1:] = 0  # what guidance steers away from, as in both references
    shape = (1, module.config.in_channels, *_grid(specs))
    ends: list[Array] = []
    # the module first: where weights are damaged, no engine is to blame
    for predict in (_module_steps(module, schedule, given), _engine_steps(specs, module, run, schedule, given)):
        rng = np.random.default_rng(seed)
        latents = rng.standard_normal(shape, dtype=np.float32)
        for step in range(len(schedule)):
            prediction = predict(np.repeat(latents, rows, axis=0), step)
            if not np.isfinite(prediction).all():
                where = f"{stage}: step {step + 1} of a loop of {len(schedule)} made NaN or infinity"
                if not ends:
                    raise ExportError(f"{where} in fp32 PyTorch already; the checkpoint is damaged")
                raise ExportError(f"{where} in {precision}, and none in fp32 PyTorch; export it with --precision fp32")
            if rows == 2:
                prediction = guide(prediction[:1], prediction[1:], defaults.guidance_scale, defaults.guidance_rescale)
            end = predict_x0(schedule, step, latents, prediction)
            latents = denoise_step(schedule, step, latents, prediction, rng.standard_normal(shape, dtype=np.float32))
            progress(1)
        ends.append(end if schedule.returns_x0 else latents)
    bound = TOLERANCES[f"loop {precision}"]
    figures = compare(f"the end of {stage}'s loop", ends[1], ends[0])
    if figures.rel_l2 > bound.rel_l2:
        raise ExportError(
            f"{stage}: a loop of {len(schedule)} steps ends {figures.rel_l2:.2e} from fp32 PyTorch's; {precision} "
            f"engines may be up to {bound.rel_l2:.0e} ({bound.why}). Try another --precision"
        )
    return {"steps": len(schedule), "guidance_scale": defaults.guidance_scale, **asdict(figures)}


Steps = Callable[[Array, int], Array]
"""(latents ``[B, C, H, W]`` float32, step) -> prediction, like the latents."""


def _parts(specs: list[EngineSpec]) -> list[EngineSpec]:
    """Context and step, in this order."""
    return sorted(specs, key=lambda s: s.name)


def _grid(specs: list[EngineSpec]) -> tuple[int, int]:
    """A small size of latents that is not square."""
    multiple = _parts(specs)[1].ranges["height"].multiple
    return max(4, 2 * multiple), max(6, 3 * multiple)


def _engine_steps(
    specs: list[EngineSpec], module: Denoiser, run: RunEngine, schedule: Schedule, conditions: Mapping[str, Tensor]
) -> Steps:
    """The engines, their context computed."""
    config, (context_spec, step_spec) = module.config, _parts(specs)
    feeds: dict[str, Array] = {name: tensor.numpy() for name, tensor in conditions.items()}
    if "effnet" in feeds:
        height, width = (side // config.patch_size for side in _grid(specs))
        feeds["effnet"] = resize_bilinear(feeds["effnet"], height, width)
    feeds["timestep_embedding"] = timestep_embedding(schedule.ratios, config.timestep_ratio_embedding_dim)
    context = run(context_spec.name, feeds)

    def predict(latents: Array, step: int) -> Array:
        made = run(step_spec.name, {**context, "latents": latents, "step": np.array([step])})["prediction"]
        assert isinstance(made, np.ndarray)
        return made

    return predict


def _module_steps(module: Denoiser, schedule: Schedule, conditions: Mapping[str, Tensor]) -> Steps:
    """The module, unsplit."""

    def predict(latents: Array, step: int) -> Array:
        ratio = torch.full((len(latents),), float(schedule.ratios[step]))
        with torch.inference_mode():
            made: Array = module(torch.from_numpy(latents), ratio, **conditions).numpy()
        return made

    return predict
