"""What every export must pass: figures of a stage and of a whole loop, and that each refuses what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from cascade_export.catalog import COMPONENTS
from cascade_export.models import Denoiser, DenoiserConfig
from cascade_export.precision import seeded_conditions
from cascade_export.verify import RunEngine, compare, verify_engines, verify_loop
from cascade_rt import ExportError
from cascade_rt.manifest import LoopDefaults, LoopFigures
from cascade_rt.sampling import make_schedule
from cascade_rt.stages import PRECISIONS, engines_of
from cascades import SMALL_CONFIGS
from reference import randomize

CONFIG = SMALL_CONFIGS["stage_c"]
SCHEDULE = make_schedule("original", 6, shift=2.0)
GUIDED = LoopDefaults(num_inference_steps=6, guidance_scale=4.0, guidance_rescale=0.7, shift=2.0)
PLAIN = LoopDefaults(num_inference_steps=6, guidance_scale=1.0)
SPECS = [spec.resolve(COMPONENTS["stage_c"].dims(CONFIG), PRECISIONS["fp32"]) for spec in engines_of("c")]
Change = Callable[[np.ndarray, int], np.ndarray]


@pytest.fixture(scope="module")
def module() -> Denoiser:
    made = Denoiser(DenoiserConfig.from_dict(CONFIG)).eval()
    randomize(made, torch.Generator().manual_seed(3))
    return made


def engines(module: Denoiser, rows: int, change: Change) -> RunEngine:
    """What would be engines: the module itself, with something done to each prediction."""
    conditions = {name: tensor[:rows] for name, tensor in seeded_conditions(module.config).items()}

    def run(name: str, feeds: Mapping[str, Any]) -> dict[str, Any]:
        if name == "stage_c.context":
            np.testing.assert_array_equal(feeds["clip_text"], conditions["clip_text"].numpy())
            return {}
        ratios = torch.from_numpy(SCHEDULE.ratios[feeds["step"]])
        with torch.inference_mode():
            prediction = module(torch.from_numpy(feeds["latents"]), ratios, **conditions).numpy()
        return {"prediction": change(prediction, int(feeds["step"][0]))}

    return run


def check(module: Denoiser, defaults: LoopDefaults, change: Change, precision: str = "fp32") -> LoopFigures:
    run = engines(module, 2 if defaults.guidance_scale > 1 else 1, change)
    conditions = seeded_conditions(module.config)
    return verify_loop(SPECS, module, run, PRECISIONS[precision], SCHEDULE, "original", defaults, conditions)


@pytest.mark.parametrize("defaults", [GUIDED, PLAIN], ids=["guided", "plain"])
def test_a_loop_through_the_module_itself_is_exact(module: Denoiser, defaults: LoopDefaults) -> None:
    figures = check(module, defaults, lambda prediction, _: prediction)
    assert figures.cosine == pytest.approx(1.0)
    assert (figures.sampler, figures.steps, figures.guidance_scale) == ("original", 6, defaults.guidance_scale)
    assert (figures.rel_l2, figures.max_abs, figures.psnr) == (0.0, 0.0, None)


def test_a_loop_is_refused_for_an_error_in_one_step_alone(module: Denoiser) -> None:
    def wrong(prediction: np.ndarray, step: int) -> np.ndarray:
        return prediction * np.float32(2 if step == 2 else 1)

    with pytest.raises(ExportError, match=r"stage_c: a loop of 6 steps ends .* from fp32 PyTorch's; fp16 engines"):
        check(module, GUIDED, wrong, "fp16")


def test_a_loop_is_refused_for_prompts_that_changed_places(module: Denoiser) -> None:
    with pytest.raises(ExportError, match="a loop of 6 steps"):
        check(module, GUIDED, lambda prediction, _: prediction[::-1])


def test_a_loop_that_overflows_is_refused(module: Denoiser) -> None:
    with pytest.raises(ExportError, match="step 3 of a loop of 6 made NaN or infinity in fp16, and none in fp32"):
        check(module, GUIDED, lambda prediction, step: prediction * np.float32(np.inf if step == 2 else 1), "fp16")


def test_no_engine_is_blamed_for_damaged_weights() -> None:
    damaged = Denoiser(DenoiserConfig.from_dict(CONFIG)).eval()
    with torch.no_grad():
        next(damaged.clf.parameters()).fill_(float("nan"))
    with pytest.raises(ExportError, match="made NaN or infinity in fp32 PyTorch already; the checkpoint is damaged"):
        check(damaged, GUIDED, lambda prediction, _: prediction, "bf16")


def test_engines_that_give_all_rows_the_step_of_the_first_are_refused(module: Denoiser) -> None:
    """A batch's rows stand at different steps in one of the cases."""
    schedule, given = make_schedule("original", 5, shift=2.0), {}

    def run(name: str, feeds: Mapping[str, Any], wrong: bool) -> dict[str, Any]:
        if name == "stage_c.context":
            given.update({n: torch.from_numpy(a) for n, a in feeds.items() if n != "timestep_embedding"})
            return {}
        steps = np.full_like(feeds["step"], feeds["step"][0]) if wrong else feeds["step"]
        with torch.inference_mode():
            made = module(torch.from_numpy(feeds["latents"]), torch.from_numpy(schedule.ratios[steps]), **given)
        return {"prediction": made.numpy()}

    arguments = (SPECS, CONFIG, module)
    right = verify_engines(*arguments, lambda name, feeds: run(name, feeds, False), PRECISIONS["fp32"], "torch")
    assert set(right) == {"stage_c.context", "stage_c.step"}
    assert all(figures.rel_l2 == 0 for figures in right.values())
    with pytest.raises(ExportError, match=r"stage_c\.context: prediction is .* from fp32 PyTorch"):
        verify_engines(*arguments, lambda name, feeds: run(name, feeds, True), PRECISIONS["fp32"], "torch")


def test_figures_are_those_of_their_definitions() -> None:
    wanted = np.array([3.0, 4.0], np.float32)
    figures = compare("x", np.array([3.0, 4.5], np.float32), wanted, pixels=True)
    assert figures.rel_l2 == pytest.approx(0.1)
    assert figures.max_abs == 0.5
    assert figures.cosine == pytest.approx((9 + 18) / (5 * np.hypot(3, 4.5)))
    assert figures.psnr == pytest.approx(-10 * np.log10(0.125))
    with pytest.raises(ExportError, match=r"shape \(1,\)"):
        compare("x", wanted[:1], wanted)
    with pytest.raises(ExportError, match="its reference holds NaN"):
        compare("x", wanted, np.array([3.0, np.nan], np.float32))
