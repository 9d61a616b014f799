"""What every export must pass before it gets its name: each engine is compared with fp32 PyTorch.

The reference is this package's own module in fp32, unsplit; that module is compared with diffusers in
``tests/parity``, from whose code nothing here is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cascade_rt.backends import Value
from cascade_rt.errors import ExportError
from cascade_rt.image import resize_bilinear
from cascade_rt.loop import Denoising
from cascade_rt.manifest import Figures, LoopDefaults, LoopFigures, Verification
from cascade_rt.noise import PictureNoise
from cascade_rt.sampling import SamplerName, Schedule, make_schedule, timestep_embedding
from cascade_rt.stages import EngineSpec, Precision

from .catalog import COMPONENTS, Config
from .models import Control, Denoiser
from .samples import small_sizes

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
    "engine w16": Tolerance(2e-3, "weights rounded to 11 bits of mantissa"),
    "engine w8": Tolerance(5e-2, "weights rounded to 8 bits, a hundred blocks of them"),
    "engine fp16": Tolerance(5e-3, "11 bits of mantissa through a hundred blocks"),
    "engine bf16": Tolerance(4e-2, "8 bits of mantissa through a hundred blocks"),
    "engine int8": Tolerance(1e-1, "8 bits for the weights and inputs of a hundred blocks' products"),
    "engine int8-static": Tolerance(1.5e-1, "as int8, with one scale for the inputs of all calls"),
    "engine fp8": Tolerance(2e-1, "4 bits of mantissa for the weights and inputs of a hundred blocks' products"),
    "loop fp32": Tolerance(1e-4, "the engine's error, fed back through all steps with guidance"),
    "loop w16": Tolerance(5e-3, "rounded weights, fed back through all steps with guidance"),
    "loop w8": Tolerance(8e-2, "rounded weights, fed back through all steps with guidance"),
    "loop fp16": Tolerance(5e-3, "the engine's error, fed back through all steps with guidance; tiny: 1e-3"),
    "loop bf16": Tolerance(6e-2, "the engine's error, fed back through all steps with guidance; tiny: 2e-2"),
    "loop int8": Tolerance(1.5e-1, "the engine's error, fed back through all steps with guidance; tiny: 2e-2"),
    "loop int8-static": Tolerance(2e-1, "the engine's error, fed back through all steps with guidance"),
    "loop fp8": Tolerance(2.5e-1, "the engine's error, fed back through all steps with guidance"),
    "step": Tolerance(2e-6, "scalars in float64 here, in float32 in diffusers"),
    "prior loop": Tolerance(1e-4, "the engine's error through 20 steps with guidance"),
}
RESIDUAL_SIZE = 0.1
"""Standard deviation of the residuals that a loop is verified with."""
PICTURE_PSNR = 60.0
"""Least PSNR in dB (peak 1) between a whole picture of fp32 engines and diffusers' fp32 picture."""


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
    scale = np.linalg.norm(a) * size
    mean = float(np.mean((a - b) ** 2)) if pixels else 0.0
    return Figures(
        rel_l2=float(difference / size) if size else float(difference),
        max_abs=float(np.abs(a - b).max(initial=0.0)),
        cosine=float((a * b).sum() / scale) if scale else 1.0,
        psnr=float(-10 * np.log10(mean)) if mean else None,
    )


RunEngine = Callable[[str, Mapping[str, Value]], Mapping[str, Value]]
"""(engine name, inputs) -> outputs."""


def verify_engines(
    specs: Sequence[EngineSpec],
    config: Config,
    module: nn.Module,
    run: RunEngine,
    precision: Precision,
    provider: str,
    seed: int = 0,
) -> dict[str, Verification]:
    """Compare the engines of a component with its module.

    Args:
        specs: resolved engines; of a denoiser context and step.
        config: of the component.
        module: in fp32, with its weights.
        run: runs one of the engines.
        precision: of the engines.
        provider: that runs them, for the record.
        seed: of the inputs.

    Returns:
        Engine name -> figures of the output that is furthest from PyTorch.

    Raises:
        ExportError: an engine is further from PyTorch than its precision explains.
    """
    bound = TOLERANCES[f"engine {precision.name}"]
    found: dict[str, Verification] = {}
    cases = _denoiser_cases if isinstance(module, Denoiser) else _plain_cases
    with torch.inference_mode():
        for engine, tensor, figures in cases(specs, config, module, run, np.random.default_rng(seed)):
            if figures.rel_l2 > bound.rel_l2:
                raise ExportError(
                    f"{engine}: {tensor} is {figures.rel_l2:.2e} from fp32 PyTorch; {precision.name} engines may be up "
                    f"to {bound.rel_l2:.0e} ({bound.why}). Try another --precision"
                )
            if engine not in found or figures.rel_l2 > found[engine].rel_l2:
                found[engine] = Verification(
                    provider=provider, reference="fp32 PyTorch", tensor=tensor, **_fields(figures)
                )
    return found


def _fields(figures: Figures) -> dict[str, Any]:
    return {name: getattr(figures, name) for name in Figures.__struct_fields__}


Case = tuple[str, str, Figures]
"""Engine, output, figures."""


def _plain_cases(
    specs: Sequence[EngineSpec], config: Config, module: nn.Module, run: RunEngine, rng: np.random.Generator
) -> Iterator[Case]:
    """Every output of every engine, for inputs as the catalogue draws them."""
    for spec in specs:
        component = COMPONENTS[spec.model]
        feeds = component.samples(spec, config, rng)
        reference = component.calls[spec.name](module, {name: torch.from_numpy(a) for name, a in feeds.items()})
        outputs = run(spec.name, feeds)
        for tensor, wanted in zip(spec.outputs, reference, strict=True):
            made = outputs[tensor.name]
            assert isinstance(made, np.ndarray)  # only what a denoiser's context makes stays on the device
            yield spec.name, tensor.name, compare(tensor.name, made, wanted.numpy(), tensor.name == "pixels")


def _denoiser_cases(
    specs: Sequence[EngineSpec], config: Config, module: nn.Module, run: RunEngine, rng: np.random.Generator
) -> Iterator[Case]:
    """The first, middle and last step for a batch of two, whose rows do not always stand at the same step.

    A context is judged by what the step makes of it: it never leaves the engine's device.
    """
    assert isinstance(module, Denoiser)
    context, step = context_and_step(specs)
    schedule = make_schedule("original", 5, shift=2.0)
    conditions = COMPONENTS[context.model].samples(context, config, rng)
    if "effnet" in conditions:  # smaller than the grid: the host's resize is compared too
        conditions["effnet"] = np.ascontiguousarray(conditions["effnet"][..., 1:, 1:])
    tensors = {name: torch.from_numpy(a) for name, a in conditions.items()}
    by_engine = predict_by_engines(specs, module, run, schedule, conditions)
    by_module = predict_by_module(module, schedule, tensors)
    latents = rng.standard_normal(latents_shape(specs, 2), dtype=np.float32)
    last = len(schedule) - 1
    for rows in ((0, 0), (last // 2, last), (last, last)):
        steps = np.array(rows, dtype=np.int64)
        figures = compare("prediction", by_engine(latents, steps), by_module(latents, steps))
        for spec in (context, step):
            yield spec.name, "prediction", figures


Predict = Callable[[Array, Array], Array]
"""(latents ``[B, C, H, W]`` float32, each row's row of the schedule ``[B]`` int64) -> prediction, like the latents."""


def verify_loop(
    specs: Sequence[EngineSpec],
    module: Denoiser,
    run: RunEngine,
    precision: Precision,
    schedule: Schedule,
    sampler: SamplerName,
    defaults: LoopDefaults,
    conditions: Mapping[str, Tensor],
    *,
    seed: int = 0,
    progress: Callable[[int], Any] = lambda steps: None,
) -> LoopFigures:
    """Compare a whole denoising loop through a denoiser's engines with the same loop through its module.

    Each loop goes on from its own latents, so that errors add up as they do for a picture; noise is the same.

    Args:
        specs: context and step.
        module: the denoiser in fp32, with its weights.
        run: runs one of the engines.
        precision: of the engines.
        schedule: the loop's tables.
        sampler: whose they are, for the record.
        defaults: its guidance.
        conditions: inputs of `Denoiser.forward` beside sample and ratio: a prompt's row and a negative prompt's.
        seed: of latents and noise.
        progress: told of finished network calls, of which there are two a step.

    Raises:
        ExportError: the engines' loop ends further from PyTorch's than its precision explains, or in NaN.
    """
    stage, rows = specs[0].model, 2 if defaults.guidance_scale > 1 else 1
    given = {name: tensor[:rows].clone() for name, tensor in conditions.items()}
    if (residuals := _residuals(specs, rows, seed)) is not None:
        given["residuals"] = residuals
    if "effnet" in given:
        given["effnet"][1:] = 0  # what guidance steers away from, as in both references
    arrays = {name: tensor.numpy() for name, tensor in given.items()}
    ends: list[Array] = []
    # the module first: where weights are damaged, no engine is to blame
    for predict in (
        predict_by_module(module, schedule, given),
        predict_by_engines(specs, module, run, schedule, arrays),
    ):
        noise = PictureNoise("torch-cpu", (seed,), 1)
        loop = Denoising(
            schedule=schedule,
            latents=noise.normal(latents_shape(specs, 1)),
            noise=noise,
            scales=(defaults.guidance_scale,),
            rescale=defaults.guidance_rescale,
            name=stage,
        )
        while not loop.done:
            prediction = predict(*loop.inputs())
            if not np.isfinite(prediction).all():
                where = f"{stage}: step {loop.step + 1} of a loop of {len(schedule)} made NaN or infinity"
                if not ends:
                    raise ExportError(f"{where} in fp32 PyTorch already; the checkpoint is damaged")
                what = f"{where} in {precision.name}, and none in fp32 PyTorch"
                raise ExportError(f"{what}; export it with --precision fp32")
            loop.advance(prediction)
            progress(1)
        ends.append(loop.result)
    bound = TOLERANCES[f"loop {precision.name}"]
    figures = compare(f"the end of {stage}'s loop", ends[1], ends[0])
    if figures.rel_l2 > bound.rel_l2:
        raise ExportError(
            f"{stage}: a loop of {len(schedule)} steps ends {figures.rel_l2:.2e} from fp32 PyTorch's; {precision.name} "
            f"engines may be up to {bound.rel_l2:.0e} ({bound.why}). Try another --precision"
        )
    return LoopFigures(sampler=sampler, steps=len(schedule), guidance_scale=defaults.guidance_scale, **_fields(figures))


def _residuals(specs: Sequence[EngineSpec], rows: int, seed: int) -> Tensor | None:
    """What a ControlNet might add; None where the engines take nothing of one."""
    context, _ = context_and_step(specs)
    tensor = next((t for t in context.inputs if t.name == "residuals"), None)
    if tensor is None:
        return None
    shape = tensor.shape(small_sizes(context) | {"batch": rows})
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)) * RESIDUAL_SIZE


def context_and_step(specs: Sequence[EngineSpec]) -> tuple[EngineSpec, EngineSpec]:
    """The two engines of a denoiser."""
    context, step = sorted(specs, key=lambda spec: spec.name)
    return context, step


def latents_shape(specs: Sequence[EngineSpec], pictures: int) -> tuple[int, ...]:
    """Small latents that are not square."""
    step = context_and_step(specs)[1]
    return step.tensor("latents").shape(small_sizes(step) | {"batch": pictures})


def predict_by_engines(
    specs: Sequence[EngineSpec],
    module: Denoiser,
    run: RunEngine,
    schedule: Schedule,
    conditions: Mapping[str, Array],
) -> Predict:
    """The engines, their context computed.

    Args:
        specs: context and step.
        module: whose config is needed.
        run: runs one of the engines.
        schedule: the loop's tables.
        conditions: of the context; effnet of any size.
    """
    config, (context_spec, step_spec) = module.config, context_and_step(specs)
    feeds: dict[str, Array] = {t.name: conditions[t.name] for t in context_spec.inputs if t.name in conditions}
    if "effnet" in feeds:
        height, width = (side // config.patch_size for side in latents_shape(specs, 1)[-2:])
        feeds["effnet"] = np.ascontiguousarray(resize_bilinear(feeds["effnet"], height, width))
    feeds["timestep_embedding"] = timestep_embedding(schedule.ratios, config.timestep_ratio_embedding_dim)
    context = run(context_spec.name, feeds)

    def predict(latents: Array, steps: Array) -> Array:
        made = run(step_spec.name, {**context, "latents": latents, "step": steps})["prediction"]
        assert isinstance(made, np.ndarray)
        return made

    return predict


def predict_by_module(module: Denoiser, schedule: Schedule, conditions: Mapping[str, Tensor]) -> Predict:
    """The module, unsplit; ``residuals`` among the conditions are those of a ControlNet."""
    others = {name: tensor for name, tensor in conditions.items() if name != "residuals"}
    residuals = conditions.get("residuals")
    control = None if residuals is None else Control(residuals, module.config.control_blocks)

    def predict(latents: Array, steps: Array) -> Array:
        ratios = torch.from_numpy(schedule.ratios[steps])
        with torch.inference_mode():
            made: Array = module(torch.from_numpy(latents), ratios, control=control, **others).numpy()
        return made

    return predict
