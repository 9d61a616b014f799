"""The rung that every export climbs: figures of a stage and of a whole loop, and that each refuses what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from cascade_export.graphs import dims_of
from cascade_export.models import Denoiser, DenoiserConfig
from cascade_export.precision import seeded_conditions
from cascade_export.verify import RunEngine, compare, verify_loop
from cascade_rt import ExportError
from cascade_rt.bundle import LoopDefaults
from cascade_rt.sampling import make_schedule
from cascade_rt.stages import engines_of
from cascades import SMALL_CONFIGS
from reference import randomize

CONFIG = SMALL_CONFIGS["stage_c"]
SCHEDULE = make_schedule("original", 6, shift=2.0)
GUIDED = LoopDefaults(6, 4.0, guidance_rescale=0.7, shift=2.0)
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
        step = int(feeds["step"][0])
        ratio = torch.full((rows,), float(SCHEDULE.ratios[step]))
        with torch.inference_mode():
            prediction = module(torch.from_numpy(feeds["latents"]), ratio, **conditions).numpy()
        return {"prediction": change(prediction, step)}

    return run


def check(module: Denoiser, defaults: LoopDefaults, change: Change, precision: Any = "fp32") -> dict[str, Any]:
    specs = [spec.resolve(dims_of(spec.name, CONFIG), "fp32") for spec in engines_of("c")]
    rows = 2 if defaults.guidance_scale > 1 else 1
    run = engines(module, rows, change)
    return verify_loop(specs, module, run, precision, SCHEDULE, defaults, seeded_conditions(module.config))


@pytest.mark.parametrize("defaults", [GUIDED, LoopDefaults(6, 1.0)], ids=["guided", "plain"])
def test_a_loop_through_the_module_itself_is_exact(module: Denoiser, defaults: LoopDefaults) -> None:
    figures = check(module, defaults, lambda prediction, _: prediction)
    assert figures == {
        "steps": 6,
        "guidance_scale": defaults.guidance_scale,
        "rel_l2": 0.0,
        "max_abs": 0.0,
        "cosine": pytest.approx(1.0),
        "psnr": None,
    }


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
